// SPDX-License-Identifier: Apache-2.0

package raft

import (
	"context"
	"crypto/tls"
	"errors"
	"log/slog"
	"net"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	hraft "github.com/hashicorp/raft"

	"github.com/demarc-dev/demarc/fault"
)

// The protocols of the listener: the server's TLS must offer both.
const (
	ProtoRaft    = "demarc-raft/1"
	ProtoForward = "demarc-forward/1"
)

// maxConns bounds the connections that are open at the listener; peers need a handful each.
const maxConns = 512

// network is one listener with two protocols, and the way out to the peers. It is hraft's StreamLayer.
type network struct {
	n     *Node
	tls   *tls.Config
	raft  chan net.Conn // accepted for hraft
	wg    sync.WaitGroup
	slots chan struct{}

	mu     sync.Mutex
	conns  map[net.Conn]struct{}
	isCut  bool
	closed bool
}

func newNetwork(n *Node) *network {
	return &network{n: n, tls: n.cfg.ServerTLS, raft: make(chan net.Conn), slots: make(chan struct{}, maxConns), conns: map[net.Conn]struct{}{}}
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
		select {
		case w.slots <- struct{}{}:
		default:
			_ = c.Close()
			continue
		}
		w.wg.Go(func() {
			defer func() { <-w.slots }()
			w.welcome(c)
		})
	}
}

// welcome proves the peer and hands the connection to its protocol.
func (w *network) welcome(c net.Conn) {
	t := tls.Server(c, w.tls)
	ctx, cancel := context.WithTimeout(w.n.ctx, handshakeWait)
	err := t.HandshakeContext(ctx)
	cancel()
	if err != nil {
		_ = c.Close()
		if w.n.ctx.Err() == nil {
			w.n.log.Warn("a peer was refused", "remote", c.RemoteAddr().String(), "err", err)
		}
		return
	}
	tracked, ok := w.track(t)
	if !ok {
		return
	}
	switch t.ConnectionState().NegotiatedProtocol {
	case ProtoRaft:
		select {
		case w.raft <- tracked:
			<-tracked.done
		case <-w.n.ctx.Done():
		}
	case ProtoForward:
		w.n.serveForward(tracked)
	}
	_ = tracked.Close()
}

// tracked is a connection that closes with the network.
type tracked struct {
	net.Conn
	w    *network
	once sync.Once
	done chan struct{}
}

func (w *network) track(c net.Conn) (*tracked, bool) {
	t := &tracked{Conn: c, w: w, done: make(chan struct{})}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.closed || w.isCut {
		_ = c.Close()
		return nil, false
	}
	w.conns[t] = struct{}{}
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
	var open []net.Conn
	if on {
		for c := range w.conns {
			open = append(open, c)
		}
	}
	w.mu.Unlock()
	for _, c := range open {
		_ = c.Close()
	}
}

func (w *network) close() {
	_ = w.n.cfg.Listener.Close()
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
	conf := w.n.cfg.ClientTLS(id).Clone()
	conf.NextProtos = []string{proto}
	t := tls.Client(c, conf)
	if err := t.HandshakeContext(ctx); err != nil {
		_ = c.Close()
		return nil, fault.Because(err, "raft.dial", fault.Unavailable, "node %s is not proven", id)
	}
	if got := t.ConnectionState().NegotiatedProtocol; got != proto {
		_ = t.Close()
		return nil, fault.New("raft.dial", fault.Unavailable, "node %s speaks %q and not %s", id, got, proto)
	}
	out, ok := w.track(t)
	if !ok {
		return nil, fault.New("raft.dial", fault.Unavailable, "this node is cut off")
	}
	return out, nil
}

// Dial implements hraft.StreamLayer.
func (w *network) Dial(addr hraft.ServerAddress, timeout time.Duration) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(w.n.ctx, timeout)
	defer cancel()
	return w.dial(ctx, w.n.idOf(string(addr)), string(addr), ProtoRaft)
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
