// SPDX-License-Identifier: Apache-2.0

// Package transport connects the nodes of a cluster: one listener with TLS 1.3 and mutual authentication (mTLS) for two
// protocols, and connections to the other nodes by the same rules.
//
// ALPN picks the protocol: demarc-raft/1 is hashicorp/raft's own, and demarc-forward/1 that of package forward. The number of
// handshakes and of connections is bounded, so that callers without a certificate keep no node out. While a node is cut off,
// see [Network.SetCut], it has no connections at all.
package transport

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"log/slog"
	"math"
	"net"
	"sync"
	"time"

	hraft "github.com/hashicorp/raft"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/raft/forward"
)

// The protocols of the listener: the server's TLS must offer both.
const (
	ProtoRaft    = "demarc-raft/1"
	ProtoForward = "demarc-forward/1"
)

const (
	acceptRetry      = 50 * time.Millisecond
	handshakeTimeout = 10 * time.Second
)

// ErrRemoved is in an error of [Config.Peer] if the caller was removed for good: it is notified, and stops. With any other error
// it is refused, and may be let in later, with another certificate for instance.
var ErrRemoved = errors.New("removed for good")

// Config is what a network is made of. All fields but Peer are required.
type Config struct {
	Addr      string       // the one that peers know
	Listener  net.Listener // plain TCP
	ServerTLS *tls.Config
	ClientTLS func(id string) *tls.Config // nil: the member can't be dialled
	Dial      func(ctx context.Context, addr string) (net.Conn, error)
	Peer      func(tls.ConnectionState) (id string, err error) // which node calls, and why it may not; nil: nodes are not told apart
	Logger    *slog.Logger

	Addresses func(id string) []string // at which a node may be
	Removed   func(id string) bool     // whether a node was a member and is none any more
	Index     func() uint64            // of the newest configuration that is known
}

// Network is the listener of a node, and its way out to the peers.
type Network struct {
	cfg        Config
	ctx        context.Context // of the node
	server     forward.Server
	accepted   chan net.Conn // for hraft
	tasks      sync.WaitGroup
	handshakes *handshakes
	conns      *conns

	mu       sync.Mutex
	serving  sync.WaitGroup // forward connections whose requests are being answered
	draining bool           // no forward connection begins any more
}

// New returns a network that reads no more requests when ctx ends. Nothing is accepted before [Network.Run].
func New(ctx context.Context, cfg Config) *Network {
	return &Network{cfg: cfg, ctx: ctx, accepted: make(chan net.Conn), handshakes: newHandshakes(), conns: newConns()}
}

// Run takes connections until the listener closes, and lets server answer requests.
func (w *Network) Run(server forward.Server) {
	w.server = server
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
		w.tasks.Go(func() {
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
func (w *Network) shakeHands(c net.Conn) (*tls.Conn, string, error) {
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
	index := w.cfg.Index()
	if errors.Is(err, ErrRemoved) { // names are never used again: no configuration that the caller knows is newer
		index = math.MaxUint64
	}
	if err == nil && w.cfg.Removed(id) {
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
func (w *Network) serve(t *tls.Conn, id string) {
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

// Drain waits until all requests of peers are answered. No new ones are read since the node's context ended.
func (w *Network) Drain() {
	w.mu.Lock()
	w.draining = true
	w.mu.Unlock()
	w.serving.Wait()
}

// Spawn runs a goroutine that ends with the node's context, unless the network has been closed.
func (w *Network) Spawn(f func()) {
	w.conns.mu.Lock()
	defer w.conns.mu.Unlock()
	if !w.conns.closed {
		w.tasks.Go(f)
	}
}

// CloseConns ends every connection for ever, and leaves the listener to its owner.
func (w *Network) CloseConns() { w.conns.close() }

// Close closes the listener and every connection for ever. [Network.Wait] waits for what it served.
func (w *Network) Close() {
	_ = w.cfg.Listener.Close()
	w.conns.close()
}

// Wait waits for the goroutines of connections, after Close.
func (w *Network) Wait() { w.tasks.Wait() }

// SetCut ends every connection and keeps new ones out while on is true.
func (w *Network) SetCut(on bool) { w.conns.setCut(on) }

// EvictPeer ends every connection with one node.
func (w *Network) EvictPeer(id string) { w.conns.evictPeer(id) }

// EvictRevoked ends the connections whose peer's certificate fails a check.
func (w *Network) EvictRevoked(check func(id string, leaf *x509.Certificate) error) {
	w.conns.evictRevoked(check)
}

// dial reaches a member by TLS with one protocol.
func (w *Network) dial(ctx context.Context, id, addr, proto string) (*conn, error) {
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
func (w *Network) reach(ctx context.Context, id, proto string) (*conn, error) {
	addrs := w.cfg.Addresses(id)
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

// DialForward reaches a node by demarc-forward/1, wherever it is.
func (w *Network) DialForward(ctx context.Context, id string) (forward.Conn, error) {
	c, err := w.reach(ctx, id, ProtoForward)
	if err != nil {
		return nil, err
	}
	return c, nil
}

// DialForwardAt reaches a node by demarc-forward/1 at one address.
func (w *Network) DialForwardAt(ctx context.Context, id, addr string) (forward.Conn, error) {
	c, err := w.dial(ctx, id, addr, ProtoForward)
	if err != nil {
		return nil, err
	}
	return c, nil
}

// Streams is the network as hashicorp/raft uses it: what is an address there is the id of a node.
func (w *Network) Streams() hraft.StreamLayer { return streams{w} }

type streams struct{ w *Network }

// Dial implements hraft.StreamLayer.
func (s streams) Dial(id hraft.ServerAddress, timeout time.Duration) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(s.w.ctx, timeout)
	defer cancel()
	c, err := s.w.reach(ctx, string(id), ProtoRaft)
	if err != nil {
		return nil, err
	}
	return c, nil
}

// Accept implements net.Listener.
func (s streams) Accept() (net.Conn, error) {
	select {
	case c := <-s.w.accepted:
		return c, nil
	case <-s.w.ctx.Done():
		return nil, net.ErrClosed
	}
}

// Close implements net.Listener; the node closes the listener itself.
func (s streams) Close() error { return nil }

// Addr implements net.Listener: the address that peers know.
func (s streams) Addr() net.Addr { return memberAddr(s.w.cfg.Addr) }

type memberAddr string

// Network implements net.Addr.
func (memberAddr) Network() string { return "tcp" }

// String implements net.Addr.
func (m memberAddr) String() string { return string(m) }
