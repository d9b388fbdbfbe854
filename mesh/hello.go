// SPDX-License-Identifier: Apache-2.0

package mesh

import (
	"context"
	"crypto/tls"
	"errors"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/demarc-dev/demarc/fault"
)

// Layer is one TLS of a transport.
type Layer string

// The layers.
const (
	LayerProxy   Layer = "proxy"   // to an https:// proxy itself
	LayerOuter   Layer = "outer"   // that an inspecting proxy may open
	LayerChannel Layer = "channel" // that proves and hides: of the caller
	LayerBlind   Layer = "blind"   // that proves nobody: what works there says nothing of the channel's
)

// Curves of the two forms of a ClientHello. The share of ML-KEM-768 has 1,184 bytes, so that the full form does not fit one packet, and
// some boxes on the way swallow a first message that comes in two. The small form leaves ML-KEM out. What a server agrees to is sealed
// by the handshake itself (RFC 8446 section 4.1.3): nobody on the way can change it, but somebody can drop the full form until the small
// one is sent. That is why there is a setting that forbids it.
var (
	fullCurves  = []tls.CurveID{tls.X25519MLKEM768, tls.X25519, tls.CurveP256}
	onlyCurves  = []tls.CurveID{tls.X25519MLKEM768} // of the channel where the small form is forbidden
	smallCurves = []tls.CurveID{tls.X25519, tls.CurveP256}
)

// HelloConfig is what a transport's hello works with. Zero times take the defaults.
type HelloConfig struct {
	PQRequired bool // never the small form
	// Wait is for the first byte of an answer to the full form; default 11 s: a server that got nothing, as a node of the control plane,
	// hangs up after 10 s, which counts as no answer, too.
	Wait time.Duration
	// Keep is for how long the small form is used after it worked where the full one did not; default 1 h. The first time it is a
	// twelfth of that: it may have been a node that had too much to do.
	Keep   time.Duration
	Logger *slog.Logger
}

// Hello runs the client's side of TLS on one transport: with ML-KEM, and where the first message is swallowed, once more without.
// That the small form works is remembered in memory for a while; then the full one is tried again, so that an outage does not
// leave a transport without ML-KEM for good. Safe for concurrent use.
type Hello struct {
	cfg HelloConfig

	mu    sync.Mutex
	until map[Layer]time.Time // the small form is used until then; absent: the full form worked, or was not tried yet
}

// smallWait is for the first byte of an answer to the small form.
const smallWait = 8 * time.Second

// NewHello gives the hello of a transport.
func NewHello(cfg HelloConfig) *Hello {
	if cfg.Wait <= 0 {
		cfg.Wait = 11 * time.Second
	}
	if cfg.Keep <= 0 {
		cfg.Keep = time.Hour
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	return &Hello{cfg: cfg, until: map[Layer]time.Time{}}
}

// Small reports whether the next handshake of a layer is in the small form.
func (h *Hello) Small(layer Layer) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return time.Now().Before(h.until[layer])
}

// Err says that a layer goes on in the small form, with the reason [HelloTooLarge]; nil where none does. It is no failure of the transport.
func (h *Hello) Err() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, layer := range []Layer{LayerChannel, LayerOuter, LayerProxy, LayerBlind} {
		if until, ok := h.until[layer]; ok {
			return For(HelloTooLarge, fault.New("mesh.Hello", fault.Unavailable, "a box on the path swallows a first message of TLS that does "+
				"not fit one packet (%s): it goes on without ML-KEM, and is tried with it again after %s", layer, until.UTC().Format(time.RFC3339)))
		}
	}
	return nil
}

// Dial opens one more connection to a place.
type Dial func(context.Context) (net.Conn, error)

// Shake runs a handshake over c. again opens a second connection to the same place, for the small form; nil: there is no second try. cfg
// does the verification: of it only the curves are changed. What is wrong with the path is named. On an error no connection is left open.
func (h *Hello) Shake(ctx context.Context, layer Layer, c net.Conn, again Dial, cfg *tls.Config) (*tls.Conn, error) {
	if h.Small(layer) {
		t, _, err := h.shake(ctx, c, with(cfg, smallCurves), smallWait)
		return t, err
	}
	curves := fullCurves
	if h.cfg.PQRequired && layer == LayerChannel {
		curves = onlyCurves
	}
	wait := h.cfg.Wait
	if end, ok := ctx.Deadline(); ok {
		wait = min(wait, time.Until(end)/2) // the second try has as much
	}
	t, e, err := h.shake(ctx, c, with(cfg, curves), wait)
	if err == nil {
		h.whole(layer)
		return t, nil
	}
	if ctx.Err() != nil || !e.unanswered(err) || again == nil {
		return nil, err
	}
	if h.cfg.PQRequired {
		return nil, For(HelloTooLarge, fault.Because(err, "mesh.Hello", fault.Unavailable, "the connection opens, and the first message of TLS, "+
			"%d bytes that do not fit one packet, got no answer within %s: a box on the path may swallow it; pq: required of this transport "+
			"forbids to send it smaller, without ML-KEM", e.sent.Load(), wait.Round(time.Millisecond)))
	}
	second, cause := again(ctx)
	if cause != nil {
		return nil, cause
	}
	t, e2, cause := h.shake(ctx, second, with(cfg, smallCurves), smallWait)
	switch {
	case cause == nil: // by who was proven: an answer of anybody's is not remembered
		h.cut(layer, int(e.sent.Load()))
	case e2.unanswered(cause):
		return nil, fault.Because(err, "mesh.Hello", fault.Unavailable, "the connection opens, and no answer comes to the first message of TLS, "+
			"large or small: whoever took the connection is stuck, or the path drops all that follows")
	}
	return t, cause
}

// shake waits for the first byte of the other side for so long at most; what follows has the time that ctx has.
func (h *Hello) shake(ctx context.Context, c net.Conn, cfg *tls.Config, wait time.Duration) (*tls.Conn, *ear, error) {
	own, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	e := &ear{Conn: c}
	patience := time.AfterFunc(wait, func() {
		if !e.heard.Load() {
			cancel(errUnanswered)
		}
	})
	defer patience.Stop()
	began := time.Now()
	t := tls.Client(e, cfg)
	if err := t.HandshakeContext(own); err != nil {
		_ = c.Close()
		hungUp := ctx.Err() == nil && !e.heard.Load() && time.Since(began) >= wait/2
		if errors.Is(context.Cause(own), errUnanswered) || hungUp {
			err = errUnanswered
		}
		return nil, e, Explain(err)
	}
	return t, e, nil
}

// errUnanswered is of a handshake whose first message got no answer in time.
var errUnanswered = errors.New("the first message of TLS got no answer")

// ear is a connection of which it is known whether the other side ever said something.
type ear struct {
	net.Conn
	heard atomic.Bool
	sent  atomic.Int64 // bytes, until something is heard
}

// Read implements [net.Conn].
func (e *ear) Read(b []byte) (int, error) {
	n, err := e.Conn.Read(b)
	if n > 0 && !e.heard.Load() {
		e.heard.Store(true)
	}
	return n, err
}

// Write implements [net.Conn].
func (e *ear) Write(b []byte) (int, error) {
	n, err := e.Conn.Write(b)
	if !e.heard.Load() {
		e.sent.Add(int64(n))
	}
	return n, err
}

// NetConn gives the connection beneath, to [KeepAlive].
func (e *ear) NetConn() net.Conn { return e.Conn }

// unanswered reports whether a handshake failed as one does whose first message was swallowed: it went out, and no byte ever came back.
func (e *ear) unanswered(err error) bool {
	return errors.Is(err, errUnanswered) && e.sent.Load() > 0 && !e.heard.Load()
}

func with(cfg *tls.Config, curves []tls.CurveID) *tls.Config {
	c := cfg.Clone()
	c.CurvePreferences = curves
	return c
}

// whole notes that the full form worked.
func (h *Hello) whole(layer Layer) {
	h.mu.Lock()
	_, was := h.until[layer]
	delete(h.until, layer)
	h.mu.Unlock()
	if was {
		h.cfg.Logger.Info("the first message of TLS goes through with ML-KEM again", "layer", string(layer))
	}
}

// cut notes that the small form was answered where the full one was not.
func (h *Hello) cut(layer Layer, size int) {
	h.mu.Lock()
	keep := h.cfg.Keep
	if _, again := h.until[layer]; !again {
		keep /= 12
	}
	until := time.Now().Add(keep)
	h.until[layer] = until
	h.mu.Unlock()
	h.cfg.Logger.Warn("a box on the path swallows a first message of TLS that does not fit one packet: it goes on without ML-KEM; "+
		"pq: required of the transport forbids that",
		"reason", string(HelloTooLarge), "layer", string(layer), "bytes", size, "until", until.UTC().Format(time.RFC3339))
}
