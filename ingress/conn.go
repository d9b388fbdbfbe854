// SPDX-License-Identifier: Apache-2.0

package ingress

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/pires/go-proxyproto"
)

// conn is an end user's connection. door, source and admitted are guarded by the gate's mutex.
type conn struct {
	net.Conn
	gate *Gate
	head io.Reader // what was read beyond a PROXY header; nil when none was read
	once sync.Once
	done chan struct{}

	door     Door
	source   netip.Addr // who it comes from: the peer, or whom a trusted balancer named
	admitted bool
	named    bool // it counts as its source's

	who func() (Peer, error) // asks once
}

// Read reads what is left behind a PROXY header first.
func (c *conn) Read(b []byte) (int, error) {
	if c.head != nil {
		return c.head.Read(b)
	}
	return c.Conn.Read(b)
}

// RemoteAddr is the source that was admitted, for logs and X-Forwarded-For.
func (c *conn) RemoteAddr() net.Addr {
	c.gate.mu.Lock()
	defer c.gate.mu.Unlock()
	if c.head == nil || !c.admitted {
		return c.Conn.RemoteAddr()
	}
	return net.TCPAddrFromAddrPort(netip.AddrPortFrom(c.source, 0))
}

// CloseWrite ends one direction, where the connection can.
func (c *conn) CloseWrite() error {
	if h, ok := c.Conn.(interface{ CloseWrite() error }); ok {
		return h.CloseWrite()
	}
	return c.Close()
}

// Close forgets the connection and closes it.
func (c *conn) Close() error {
	c.once.Do(func() {
		c.gate.mu.Lock()
		delete(c.gate.conns, c)
		if c.named {
			c.gate.conned.drop(c.source)
		} else {
			c.gate.conned.dropUnnamed()
		}
		c.gate.mu.Unlock()
		close(c.done)
	})
	return c.Conn.Close()
}

// abort closes at once: bytes that wait to be sent are dropped, so that a cut is a cut.
func (c *conn) abort() error {
	if t, ok := c.Conn.(*net.TCPConn); ok {
		_ = t.SetLinger(0) // without it the close is only less abrupt
	}
	return c.Close()
}

// origin gives who the connection comes from.
func (c *conn) origin() netip.Addr {
	c.gate.mu.Lock()
	defer c.gate.mu.Unlock()
	return c.source
}

// now gives the rules that the connection stands under at this moment.
func (c *conn) now() Door {
	c.gate.mu.Lock()
	defer c.gate.mu.Unlock()
	return c.door
}

func addrOf(a net.Addr) netip.AddrPort {
	if t, ok := a.(*net.TCPAddr); ok {
		p := t.AddrPort()
		return netip.AddrPortFrom(p.Addr().Unmap().WithZone(""), p.Port())
	}
	p, _ := netip.ParseAddrPort(a.String()) // an address that is none is invalid, and admitted nowhere
	return netip.AddrPortFrom(p.Addr().Unmap().WithZone(""), p.Port())
}

// enter admits a connection or closes it, before a byte of it is read. The decision and the entry into the list of
// connections are one step under the lock, so that no change of plan can fall between them.
func (g *Gate) enter(d *door, raw net.Conn) {
	remote := addrOf(raw.RemoteAddr())
	c := &conn{Conn: raw, gate: g, source: remote.Addr(), done: make(chan struct{})}
	g.mu.Lock()
	behind := within(c.source, d.Balancers)
	c.admitted = !behind && d.admits(c.source)
	private := d.Side == Tailnet
	in := !g.closed && !d.gone && (behind || c.admitted)
	var full, mine bool
	switch {
	case !in:
	case behind:
		full = !g.conned.takeUnnamed()
	default:
		full, mine = g.conned.take(c.source)
		c.named = true
	}
	in = in && !full && !mine
	if in {
		c.door = d.Door
		g.conns[c] = struct{}{}
	}
	name := d.Name
	g.mu.Unlock()
	if !in {
		_ = raw.Close() // refused; nothing was promised
		switch {
		case full:
			g.refused(AllConnections, name, c.source)
		case mine:
			g.refused(SourceConnections, name, c.source)
		}
		return
	}
	if k, ok := g.cfg.Tailnet.(Knower); ok && private {
		c.who = sync.OnceValues(func() (Peer, error) {
			ctx, cancel := context.WithTimeout(g.ctx, g.cfg.HeaderWait)
			defer cancel()
			return k.WhoIs(ctx, remote)
		})
	}
	g.work.Go(func() {
		if behind && !g.introduce(c) {
			_ = c.Close() // the balancer named nobody who may enter
			return
		}
		g.serve(c)
	})
}

// introduce reads the PROXY header of a trusted balancer and decides on the source that it names.
// A balancer that speaks for itself (a health check) is judged by its own address.
func (g *Gate) introduce(c *conn) bool {
	if err := c.SetReadDeadline(time.Now().Add(g.cfg.HeaderWait)); err != nil {
		return false
	}
	r := bufio.NewReaderSize(c.Conn, 4096)
	header, err := proxyproto.Read(r)
	if err != nil {
		return false
	}
	if err := c.SetReadDeadline(time.Time{}); err != nil {
		return false
	}
	source := c.source
	if header.Command.IsProxy() {
		named, ok := header.SourceAddr.(*net.TCPAddr)
		if !ok {
			return false
		}
		source = addrOf(named).Addr()
	}
	g.mu.Lock()
	_, still := g.conns[c]
	admits := still && c.door.admits(source)
	mine := admits && !g.conned.name(source)
	if admits && !mine {
		c.source, c.admitted, c.named, c.head = source, true, true, r
	}
	name := c.door.Name
	g.mu.Unlock()
	if mine {
		g.refused(SourceConnections, name, source)
	}
	return admits && !mine
}

// serve hands an admitted connection to the proxy of its protocol and returns when it is over.
func (g *Gate) serve(c *conn) {
	d := c.now()
	if d.Protocol == TCP {
		g.pass(c, d)
		return
	}
	var in net.Conn = c
	if d.TLS == TLSFiles {
		in = tls.Server(c, g.web.tls)
	}
	if !g.web.take(in) {
		_ = c.Close() // the gate is closing
		return
	}
	<-c.done
}

// pass carries bytes both ways until both directions have ended or one has failed.
func (g *Gate) pass(c *conn, d Door) {
	defer func() { _ = c.Close() }() // the end of the connection; its errors have no reader
	ctx, cancel := context.WithTimeout(g.ctx, g.cfg.HeaderWait)
	up, err := new(net.Dialer).DialContext(ctx, "tcp", d.To)
	cancel()
	if err != nil {
		g.notices.warn("the application does not answer at a door", "door", d.Name, "err", err)
		_ = c.abort()
		return
	}
	g.work.Go(func() {
		<-c.done // over, cut, or failed in either direction
		_ = up.Close()
	})
	var out sync.WaitGroup
	out.Go(func() {
		if oneWay(up, c.from()) != nil {
			_ = c.abort()
		}
	})
	if oneWay(c.sink(), up) != nil {
		_ = c.abort()
	}
	out.Wait()
}

// from and sink give the kernel's own connection where nothing was read ahead, so that bytes need not pass through us.
func (c *conn) from() io.Reader {
	if c.head != nil {
		return c
	}
	return c.Conn
}

func (c *conn) sink() net.Conn {
	if _, ok := c.Conn.(interface{ CloseWrite() error }); ok {
		return c.Conn
	}
	return c
}

func oneWay(to net.Conn, from io.Reader) error {
	_, err := io.Copy(to, from)
	h, ok := to.(interface{ CloseWrite() error })
	if !ok {
		return errors.Join(err, to.Close())
	}
	if err != nil {
		return err
	}
	return h.CloseWrite()
}
