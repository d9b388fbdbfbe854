// SPDX-License-Identifier: Apache-2.0

package raft

import (
	"context"
	"crypto/tls"
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

const acceptRetry = 50 * time.Millisecond

// ErrRemoved is in an error of Config.Peer if the caller was removed for good: it is notified, and stops. With any other error
// it is refused, and may be let in later, with another certificate for instance.
var ErrRemoved = errors.New("removed for good")

// network is one listener with two protocols, and the way out to the peers. It is hraft's StreamLayer.
type network struct {
	cfg        *Config
	ctx        context.Context // of the node
	addrs      *addresses
	server     forward.Server
	trans      *hraft.NetworkTransport // nil before it is made
	accepted   chan net.Conn           // for hraft
	wg         sync.WaitGroup
	handshakes *handshakes
	conns      *conns

	mu       sync.Mutex
	serving  sync.WaitGroup // forward connections whose requests are being answered
	draining bool           // no forward connection begins any more
}

func newNetwork(ctx context.Context, cfg *Config, addrs *addresses) *network {
	return &network{cfg: cfg, ctx: ctx, addrs: addrs, accepted: make(chan net.Conn), handshakes: newHandshakes(), conns: newConns()}
}

// accept takes connections until the listener closes.
func (w *network) accept() {
	for {
		c, err := w.cfg.Listener.Accept()
		if err != nil {
			if w.ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
				return
			}
			w.cfg.Logger.Warn("a connection of a peer was not accepted", "err", err)
			select {
			case <-w.ctx.Done():
				return
			case <-time.After(acceptRetry):
			}
			continue
		}
		g := w.handshakes.admit(c)
		w.wg.Go(func() {
			defer w.handshakes.done(g)
			t, id, err := w.shakeHands(g)
			w.handshakes.done(g)
			if err == nil {
				w.serve(t, id)
				return
			}
			_ = c.Close()
			if now, skipped := w.handshakes.logsRefusal(t != nil); now && w.ctx.Err() == nil {
				w.cfg.Logger.Warn("a peer was refused", "remote", c.RemoteAddr().String(), "err", err, "left_out", skipped)
			}
		})
	}
}

// shakeHands does the TLS handshake. The TLS config has verified the caller; that it has is checked again here. A node that
// was removed is notified. With an error, the connection is returned if its peer proved its identity.
func (w *network) shakeHands(c net.Conn) (*tls.Conn, string, error) {
	const op = "raft.shakeHands"
	ctx, cancel := context.WithTimeout(w.ctx, handshakeTimeout)
	defer cancel()
	t := tls.Server(c, w.cfg.ServerTLS)
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
	if w.cfg.Peer == nil {
		return t, "", nil
	}
	id, err := w.cfg.Peer(t.ConnectionState())
	index := w.addrs.index()
	if errors.Is(err, ErrRemoved) { // names are never used again: no configuration that the caller knows is newer
		index = math.MaxUint64
	}
	if err == nil && w.addrs.removed(id) {
		err = fault.Because(ErrRemoved, op, fault.Denied, "node %q was removed from the cluster", fault.Clip(id))
	}
	if err != nil {
		if errors.Is(err, ErrRemoved) && t.ConnectionState().NegotiatedProtocol == ProtoForward {
			_ = forward.NotifyRemoved(t, index)
		}
		return t, "", fault.At(op, fault.Denied, err)
	}
	return t, id, nil
}

// serve hands a proven connection to its protocol.
func (w *network) serve(t *tls.Conn, id string) {
	c, ok := w.conns.add(t, id)
	if !ok {
		return
	}
	if w.cfg.Peer != nil { // an eviction since the check in shakeHands did not find this connection
		if _, err := w.cfg.Peer(t.ConnectionState()); err != nil {
			c.Abort()
			return
		}
	}
	switch t.ConnectionState().NegotiatedProtocol {
	case ProtoRaft:
		select {
		case w.accepted <- c:
			return // the library closes it, or the network does
		case <-w.ctx.Done():
		case <-c.done:
		}
	case ProtoForward:
		w.mu.Lock()
		serve := !w.draining
		if serve {
			w.serving.Add(1)
		}
		w.mu.Unlock()
		if serve {
			w.server.Serve(w.ctx, c)
			w.serving.Done()
		}
	}
	_ = c.Close()
}

// drain waits until all requests of peers are answered. No new ones are read since the node's context ended.
func (w *network) drain() {
	w.mu.Lock()
	w.draining = true
	w.mu.Unlock()
	w.serving.Wait()
}

// spawn runs a goroutine that ends with the node's context, unless the network has been closed.
func (w *network) spawn(f func()) {
	w.conns.mu.Lock()
	defer w.conns.mu.Unlock()
	if !w.conns.closed {
		w.wg.Go(f)
	}
}

// close ends every connection for ever. A node that did not start leaves the listener to its caller.
func (w *network) close(listener bool) {
	if listener {
		_ = w.cfg.Listener.Close()
	}
	w.conns.close()
}

// dial reaches a member by TLS with one protocol.
func (w *network) dial(ctx context.Context, id, addr, proto string) (*conn, error) {
	const op = "raft.dial"
	raw, err := w.cfg.Dial(ctx, addr)
	if err != nil {
		return nil, fault.Because(err, op, fault.Unavailable, "node %s is not reached", id)
	}
	conf := w.cfg.ClientTLS(id)
	if conf == nil {
		_ = raw.Close()
		return nil, fault.New(op, fault.Unavailable, "there is no TLS config for node %s", id)
	}
	conf = conf.Clone()
	conf.NextProtos, conf.MinVersion = []string{proto}, tls.VersionTLS13
	t := tls.Client(raw, conf)
	if err := t.HandshakeContext(ctx); err != nil {
		_ = raw.Close()
		return nil, fault.Because(err, op, fault.Unavailable, "node %s is not proven", id)
	}
	if got := t.ConnectionState().NegotiatedProtocol; got != proto {
		_ = t.Close()
		return nil, fault.New(op, fault.Unavailable, "node %s speaks %q and not %s", id, got, proto)
	}
	c, ok := w.conns.add(t, id)
	if !ok {
		return nil, fault.New(op, fault.Unavailable, "this node is cut off")
	}
	if conf.VerifyConnection != nil { // as in serve
		if err := conf.VerifyConnection(t.ConnectionState()); err != nil {
			c.Abort()
			return nil, fault.Because(err, op, fault.Unavailable, "node %s is not proven", id)
		}
	}
	return c, nil
}

// reach dials a member at every address that is known of it, all at once. The answerer proves its identity by its
// certificate, so a stale address does no harm but for the time that it takes.
func (w *network) reach(ctx context.Context, id, proto string) (*conn, error) {
	addrs := w.addrs.of(id)
	switch len(addrs) {
	case 0:
		return nil, fault.New("raft.dial", fault.Unavailable, "no address of node %q is known", fault.Clip(id))
	case 1:
		return w.dial(ctx, id, addrs[0], proto)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	type reply struct {
		c   *conn
		err error
	}
	replies := make(chan reply, len(addrs))
	for _, addr := range addrs {
		go func() { // ends with the context; the loop below waits for it
			c, err := w.dial(ctx, id, addr, proto)
			replies <- reply{c, err}
		}()
	}
	var won *conn
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
	if won != nil {
		return won, nil
	}
	return nil, failed
}

// dialForward reaches a member for package forward.
func (w *network) dialForward(ctx context.Context, id string) (forward.Conn, error) {
	c, err := w.reach(ctx, id, ProtoForward)
	if err != nil {
		return nil, err
	}
	return c, nil
}

// Dial implements hraft.StreamLayer. The library's address is a member's id: see [byID].
func (w *network) Dial(addr hraft.ServerAddress, timeout time.Duration) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(w.ctx, timeout)
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
	case c := <-w.accepted:
		return c, nil
	case <-w.ctx.Done():
		return nil, net.ErrClosed
	}
}

// Close implements net.Listener for hraft; the node closes the listener itself.
func (w *network) Close() error { return nil }

// Addr implements net.Listener for hraft: the address that peers know.
func (w *network) Addr() net.Addr { return memberAddr(w.cfg.Self.Addr) }

type memberAddr string

// Network implements net.Addr.
func (memberAddr) Network() string { return "tcp" }

// String implements net.Addr.
func (m memberAddr) String() string { return string(m) }

// hclogger lets hashicorp's logger write into slog.
func hclogger(l *slog.Logger) hclog.Logger {
	return hclog.New(&hclog.LoggerOptions{Name: "raft", Level: hclog.Info, Output: lineWriter{l}, DisableTime: true})
}

// levels are those of hclog. Its INFO is for debugging here.
var levels = map[string]slog.Level{
	"[ERROR]": slog.LevelError, "[WARN]": slog.LevelWarn, "[DEBUG]": slog.LevelDebug, "[INFO]": slog.LevelDebug,
}

type lineWriter struct{ l *slog.Logger }

// Write takes one line of hclog: "[WARN]  raft: what: key=value".
func (w lineWriter) Write(b []byte) (int, error) {
	line := strings.TrimSpace(string(b))
	level := slog.LevelInfo
	for word, is := range levels {
		if rest, ok := strings.CutPrefix(line, word); ok {
			line, level = strings.TrimSpace(rest), is
		}
	}
	w.l.Log(context.Background(), level, line)
	return len(b), nil
}
