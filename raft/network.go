// SPDX-License-Identifier: Apache-2.0

package raft

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"log/slog"
	"math"
	"net"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	hraft "github.com/hashicorp/raft"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/raft/forward"
)

// The protocols of the listener: the server's TLS must offer both.
const (
	ProtoRaft    = "demarc-raft/1"
	ProtoForward = "demarc-forward/1"
)

// ErrGone is in an error of Config.Peer where the caller was removed for good: it is told so, and stops. Any other is refused, and
// may be let in later, with another certificate for instance.
var ErrGone = errors.New("removed for good")

// network is one listener with two protocols, and the way out to the peers. It is hraft's StreamLayer.
type network struct {
	n    *Node
	tls  *tls.Config
	raft chan net.Conn // accepted for hraft
	wg   sync.WaitGroup
	hall *hall

	mu       sync.Mutex
	conns    map[*tracked]struct{}
	serving  sync.WaitGroup // forward connections whose questions are being answered
	isCut    bool
	draining bool // no forward connection begins any more
	closed   bool
}

func newNetwork(n *Node) *network {
	return &network{n: n, tls: n.cfg.ServerTLS, raft: make(chan net.Conn), hall: newHall(), conns: map[*tracked]struct{}{}}
}

// accept takes connections until the listener closes.
func (w *network) accept() {
	for {
		c, err := w.n.cfg.Listener.Accept()
		if err != nil {
			if w.n.ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
				return
			}
			w.n.log.Warn("a connection of a peer was not accepted", "err", err)
			select {
			case <-w.n.ctx.Done():
				return
			case <-time.After(50 * time.Millisecond):
			}
			continue
		}
		g := w.hall.enter(c)
		w.wg.Go(func() {
			defer w.hall.leave(g)
			t, id, err := w.greet(g)
			w.hall.leave(g)
			if err == nil {
				w.welcome(t, id)
				return
			}
			_ = c.Close()
			if now, left := w.hall.refuses(t != nil); now && w.n.ctx.Err() == nil {
				w.n.log.Warn("a peer was refused", "remote", c.RemoteAddr().String(), "err", err, "left_out", left)
			}
		})
	}
}

// greet shakes hands. The TLS config has verified the caller; that it has is looked at again here. A node that is no
// member any more is told so. With an error, the connection is there if its peer proved who it is.
func (w *network) greet(c net.Conn) (*tls.Conn, string, error) {
	const op = "raft.greet"
	ctx, cancel := context.WithTimeout(w.n.ctx, handshakeWait)
	defer cancel()
	t := tls.Server(c, w.tls)
	if err := t.HandshakeContext(ctx); err != nil {
		return nil, "", fault.At(op, fault.Denied, err)
	}
	switch s := t.ConnectionState(); {
	case len(s.VerifiedChains) == 0:
		return nil, "", fault.New(op, fault.Denied, "the caller proved no identity")
	case s.Version < tls.VersionTLS13:
		return nil, "", fault.New(op, fault.Denied, "the caller speaks TLS older than 1.3")
	case s.NegotiatedProtocol != ProtoRaft && s.NegotiatedProtocol != ProtoForward:
		return nil, "", fault.New(op, fault.Denied, "the caller chose none of the protocols %s and %s", ProtoRaft, ProtoForward)
	}
	if w.n.cfg.Peer == nil {
		return t, "", nil
	}
	id, err := w.n.cfg.Peer(t.ConnectionState())
	index := w.n.members.index()
	if errors.Is(err, ErrGone) { // whoever keeps the names says so, and takes none back: no configuration that the caller knows is newer
		index = math.MaxUint64
	}
	if err == nil && w.n.members.isGone(id) {
		err = fault.Because(ErrGone, op, fault.Denied, "node %q was removed from the cluster", fault.Clip(id))
	}
	if err != nil {
		if errors.Is(err, ErrGone) && t.ConnectionState().NegotiatedProtocol == ProtoForward {
			_ = forward.NotifyRemoved(t, index)
		}
		return t, "", fault.At(op, fault.Denied, err)
	}
	return t, id, nil
}

// welcome hands a proven connection to its protocol.
func (w *network) welcome(t *tls.Conn, id string) {
	tracked, ok := w.track(t, id)
	if !ok {
		return
	}
	if w.n.cfg.Peer != nil { // what made the peer's certificate worthless since greet asked did not find this connection
		if _, err := w.n.cfg.Peer(t.ConnectionState()); err != nil {
			tracked.Abort()
			return
		}
	}
	switch t.ConnectionState().NegotiatedProtocol {
	case ProtoRaft:
		select {
		case w.raft <- tracked:
			return // the library closes it, or the network does
		case <-w.n.ctx.Done():
		case <-tracked.done:
		}
	case ProtoForward:
		w.mu.Lock()
		serve := !w.draining
		if serve {
			w.serving.Add(1)
		}
		w.mu.Unlock()
		if serve {
			w.n.server.Serve(w.n.ctx, tracked)
			w.serving.Done()
		}
	}
	_ = tracked.Close()
}

// tracked is a connection that closes with the network.
type tracked struct {
	net.Conn
	id   string // of the peer, "" where it is not known
	w    *network
	once sync.Once
	done chan struct{}
	came time.Time
}

// crowded gives the oldest connection with a peer that has as many as it may, nil where it has fewer. The lock is held.
func (w *network) crowded(id string) (oldest *tracked) {
	n := 0
	if id == "" { // who it is is not known here
		return nil
	}
	for c := range w.conns {
		if c.id != id {
			continue
		}
		if n++; oldest == nil || c.came.Before(oldest.came) {
			oldest = c
		}
	}
	if n < peerConns {
		return nil
	}
	return oldest
}

func (w *network) track(c net.Conn, id string) (*tracked, bool) {
	t := &tracked{Conn: c, id: id, w: w, done: make(chan struct{}), came: time.Now()}
	w.mu.Lock()
	open := !w.closed && !w.isCut
	var out *tracked
	if open {
		out = w.crowded(id)
		w.conns[t] = struct{}{}
	}
	w.mu.Unlock()
	if out != nil {
		out.Abort()
	}
	if !open {
		t.Abort() // without the lock, and without waiting for the peer
		return nil, false
	}
	return t, true
}

// Close closes the connection once.
func (t *tracked) Close() error {
	var err error
	t.once.Do(func() {
		t.w.mu.Lock()
		delete(t.w.conns, t)
		t.w.mu.Unlock()
		err = t.Conn.Close()
		close(t.done)
	})
	return err
}

// cut ends every connection and keeps new ones out while on is true.
func (w *network) cut(on bool) {
	w.mu.Lock()
	w.isCut = on
	var open []*tracked
	if on {
		for c := range w.conns {
			open = append(open, c)
		}
	}
	w.mu.Unlock()
	for _, c := range open {
		c.Abort()
	}
}

// kick ends every connection with one peer.
func (w *network) kick(id string) {
	w.mu.Lock()
	var open []*tracked
	for c := range w.conns {
		if c.id == id {
			open = append(open, c)
		}
	}
	w.mu.Unlock()
	for _, c := range open {
		c.Abort()
	}
}

// Recheck ends the connections, of either direction, whose peer's certificate, which was verified in the handshake, does not pass
// any more. Questions that wait on them are unsure or asked again, as where a connection breaks.
func (n *Node) Recheck(passes func(id string, leaf *x509.Certificate) error) {
	n.net.mu.Lock()
	var open []*tracked
	for c := range n.net.conns {
		t, ok := c.Conn.(*tls.Conn)
		if !ok {
			continue
		}
		if all := t.ConnectionState().PeerCertificates; len(all) == 0 || passes(c.id, all[0]) != nil {
			open = append(open, c)
		}
	}
	n.net.mu.Unlock()
	for _, c := range open {
		c.Abort()
	}
}

// Peer implements [forward.Conn].
func (t *tracked) Peer() string { return t.id }

// Done implements [forward.Conn].
func (t *tracked) Done() <-chan struct{} { return t.done }

// Abort implements [forward.Conn]: it closes the connection without a goodbye, which would wait for a peer that does not read.
func (t *tracked) Abort() {
	if c, ok := t.Conn.(*tls.Conn); ok {
		_ = c.NetConn().Close()
	}
	_ = t.Close()
}

// drain waits until all questions of peers are answered. No new ones are read since the node's context ended.
func (w *network) drain() {
	w.mu.Lock()
	w.draining = true
	w.mu.Unlock()
	w.serving.Wait()
}

// spawn runs goroutines that end with their connection, unless the network has been closed.
func (w *network) spawn(fs ...func()) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.closed {
		return false
	}
	for _, f := range fs {
		w.wg.Go(f)
	}
	return true
}

// close ends every connection for ever. A node that did not begin leaves the listener to its caller.
func (w *network) close(listener bool) {
	if listener {
		_ = w.n.cfg.Listener.Close()
	}
	w.mu.Lock()
	w.closed = true
	w.mu.Unlock()
	w.cut(true)
}

// dial reaches a member by TLS with one protocol.
func (w *network) dial(ctx context.Context, id, addr, proto string) (*tracked, error) {
	c, err := w.n.cfg.Dial(ctx, addr)
	if err != nil {
		return nil, fault.Because(err, "raft.dial", fault.Unavailable, "node %s is not reached", id)
	}
	conf := w.n.cfg.ClientTLS(id)
	if conf == nil {
		_ = c.Close()
		return nil, fault.New("raft.dial", fault.Unavailable, "there is no TLS config for node %s", id)
	}
	conf = conf.Clone()
	conf.NextProtos, conf.MinVersion = []string{proto}, tls.VersionTLS13
	t := tls.Client(c, conf)
	if err := t.HandshakeContext(ctx); err != nil {
		_ = c.Close()
		return nil, fault.Because(err, "raft.dial", fault.Unavailable, "node %s is not proven", id)
	}
	if got := t.ConnectionState().NegotiatedProtocol; got != proto {
		_ = t.Close()
		return nil, fault.New("raft.dial", fault.Unavailable, "node %s speaks %q and not %s", id, got, proto)
	}
	out, ok := w.track(t, id)
	if !ok {
		return nil, fault.New("raft.dial", fault.Unavailable, "this node is cut off")
	}
	if conf.VerifyConnection != nil { // as in welcome
		if err := conf.VerifyConnection(t.ConnectionState()); err != nil {
			out.Abort()
			return nil, fault.Because(err, "raft.dial", fault.Unavailable, "node %s is not proven", id)
		}
	}
	return out, nil
}

// reach dials a member wherever it may be: where it said that it is, where the log says, where the list says. Who answers
// is proven by its certificate, so a stale address does no harm but for the time that it takes: all are tried at once.
func (w *network) reach(ctx context.Context, id, proto string) (*tracked, error) {
	addrs := w.n.where(id)
	switch len(addrs) {
	case 0:
		return nil, fault.New("raft.dial", fault.Unavailable, "it is not known where node %q is", fault.Clip(id))
	case 1:
		return w.dial(ctx, id, addrs[0], proto)
	}
	ctx, cancel := context.WithCancel(ctx)
	type reply struct {
		c   *tracked
		err error
	}
	replies := make(chan reply, len(addrs))
	for _, addr := range addrs {
		go func() { // ends with the context, and is waited for below
			c, err := w.dial(ctx, id, addr, proto)
			replies <- reply{c, err}
		}()
	}
	var won *tracked
	var failed error
	for range addrs {
		switch r := <-replies; {
		case r.err == nil && won == nil:
			won = r.c
			cancel()
		case r.err == nil:
			r.c.Abort()
		default:
			failed = r.err
		}
	}
	cancel()
	if won != nil {
		return won, nil
	}
	return nil, failed
}

// Dial implements hraft.StreamLayer. What the library takes for an address is a member's id: see [byID].
func (w *network) Dial(addr hraft.ServerAddress, timeout time.Duration) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(w.n.ctx, timeout)
	defer cancel()
	c, err := w.reach(ctx, string(addr), ProtoRaft)
	if err != nil {
		return nil, err
	}
	return c, nil
}

// Accept implements net.Listener for hraft.
func (w *network) Accept() (net.Conn, error) {
	select {
	case c := <-w.raft:
		return c, nil
	case <-w.n.ctx.Done():
		return nil, net.ErrClosed
	}
}

// Close implements net.Listener for hraft; the node closes the listener itself.
func (w *network) Close() error { return nil }

// Addr implements net.Listener for hraft: what it tells is the address that peers know.
func (w *network) Addr() net.Addr { return member(w.n.cfg.Self.Addr) }

type member string

func (member) Network() string  { return "tcp" }
func (m member) String() string { return string(m) }

// hclogger lets hashicorp's logger write into slog.
func hclogger(l *slog.Logger) hclog.Logger {
	return hclog.New(&hclog.LoggerOptions{Name: "raft", Level: hclog.Info, Output: lineWriter{l}, DisableTime: true})
}

type lineWriter struct{ l *slog.Logger }

// Write takes one line of hclog: "[WARN]  raft: what: key=value".
func (w lineWriter) Write(b []byte) (int, error) {
	line := strings.TrimSpace(string(b))
	level := slog.LevelInfo
	for word, is := range map[string]slog.Level{"[ERROR]": slog.LevelError, "[WARN]": slog.LevelWarn, "[DEBUG]": slog.LevelDebug, "[INFO]": slog.LevelDebug} {
		if rest, ok := strings.CutPrefix(line, word); ok {
			line, level = strings.TrimSpace(rest), is
		}
	}
	w.l.Log(context.Background(), level, line)
	return len(b), nil
}
