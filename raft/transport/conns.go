// SPDX-License-Identifier: Apache-2.0

package transport

import (
	"crypto/tls"
	"crypto/x509"
	"net"
	"sync"
	"time"
)

// conns is the open connections with the peers, in both directions.
type conns struct {
	mu     sync.Mutex
	open   map[*conn]struct{}
	isCut  bool // no connection is let in for now
	closed bool // nor ever again
}

// conn is a connection with a peer whose identity is proven. It implements forward.Conn.
type conn struct {
	net.Conn
	id    string // of the peer, "" if it is not known
	set   *conns
	once  sync.Once
	done  chan struct{}
	since time.Time
}

func newConns() *conns { return &conns{open: map[*conn]struct{}{}} }

// oldestOver is the oldest connection with a peer that has as many as it may, nil if it has fewer. The lock is held.
func (s *conns) oldestOver(id string) (oldest *conn) {
	n := 0
	if id == "" { // nodes are not told apart
		return nil
	}
	for c := range s.open {
		if c.id != id {
			continue
		}
		if n++; oldest == nil || c.since.Before(oldest.since) {
			oldest = c
		}
	}
	if n < maxPeerConns {
		return nil
	}
	return oldest
}

// add takes a connection in, unless none is let in now; then it is closed.
func (s *conns) add(raw net.Conn, id string) (*conn, bool) {
	c := &conn{Conn: raw, id: id, set: s, done: make(chan struct{}), since: time.Now()}
	s.mu.Lock()
	open := !s.closed && !s.isCut
	var out *conn
	if open {
		out = s.oldestOver(id)
		s.open[c] = struct{}{}
	}
	s.mu.Unlock()
	if out != nil {
		out.Abort()
	}
	if !open {
		c.Abort() // without the lock, and without waiting for the peer
		return nil, false
	}
	return c, true
}

// evict ends the connections that match.
func (s *conns) evict(match func(*conn) bool) {
	s.mu.Lock()
	var out []*conn
	for c := range s.open {
		if match(c) {
			out = append(out, c)
		}
	}
	s.mu.Unlock()
	for _, c := range out {
		c.Abort()
	}
}

// evictPeer ends every connection with one peer.
func (s *conns) evictPeer(id string) { s.evict(func(c *conn) bool { return c.id == id }) }

// evictRevoked ends the connections whose peer's certificate fails a check.
func (s *conns) evictRevoked(check func(id string, leaf *x509.Certificate) error) {
	s.evict(func(c *conn) bool {
		t, ok := c.Conn.(*tls.Conn)
		if !ok {
			return false
		}
		all := t.ConnectionState().PeerCertificates
		return len(all) == 0 || check(c.id, all[0]) != nil
	})
}

// setCut ends every connection and keeps new ones out while on is true.
func (s *conns) setCut(on bool) {
	s.mu.Lock()
	s.isCut = on
	s.mu.Unlock()
	if on {
		s.evict(func(*conn) bool { return true })
	}
}

// close ends every connection for ever.
func (s *conns) close() {
	s.mu.Lock()
	s.closed = true
	s.mu.Unlock()
	s.setCut(true)
}

// Close closes the connection once.
func (c *conn) Close() error {
	var err error
	c.once.Do(func() {
		c.set.mu.Lock()
		delete(c.set.open, c)
		c.set.mu.Unlock()
		err = c.Conn.Close()
		close(c.done)
	})
	return err
}

// Peer implements forward.Conn.
func (c *conn) Peer() string { return c.id }

// Done implements forward.Conn.
func (c *conn) Done() <-chan struct{} { return c.done }

// Abort implements forward.Conn: it closes the connection without a TLS goodbye, which would wait for a peer that does not
// read.
func (c *conn) Abort() {
	if t, ok := c.Conn.(*tls.Conn); ok {
		_ = t.NetConn().Close()
	}
	_ = c.Close()
}
