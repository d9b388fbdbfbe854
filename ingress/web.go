// SPDX-License-Identifier: Apache-2.0

package ingress

import (
	"context"
	"crypto/tls"
	"errors"
	"log/slog"
	"mime"
	"net"
	"net/http"
	"net/http/httputil"
	"strings"
	"sync"
	"time"
)

// Headers by which an application learns who is behind a request at a private door. Whatever a caller sends under these
// names, or under any name that begins with one of the reserved prefixes, is removed at every door.
const (
	HeaderLogin = "Tailscale-User-Login" // the spelling that `tailscale serve` uses, so that applications need no change
	HeaderName  = "Tailscale-User-Name"
	HeaderNode  = "X-Demarc-Node"
	HeaderTags  = "X-Demarc-Tags"
	HeaderDoor  = "X-Demarc-Door"
)

// web is the reverse proxy behind all HTTP doors: one server, fed by the accept loops.
type web struct {
	gate   *Gate
	server *http.Server
	tls    *tls.Config
	one    *http.Transport // to an upstream that speaks HTTP/1.1
	two    *http.Transport // to an upstream that speaks HTTP/2 in the clear: gRPC
	feed   chan net.Conn
	ended  chan struct{}
	once   sync.Once
}

type connKey struct{}

func newWeb(g *Gate) *web {
	w := &web{gate: g, feed: make(chan net.Conn), ended: make(chan struct{})}
	w.tls = &tls.Config{MinVersion: tls.VersionTLS12, NextProtos: []string{"h2", "http/1.1"}, GetCertificate: g.cfg.Certificate}
	dial := &net.Dialer{Timeout: g.cfg.HeaderWait}
	w.one = &http.Transport{DialContext: dial.DialContext, MaxIdleConnsPerHost: 64, IdleConnTimeout: 90 * time.Second,
		DisableCompression: true}
	w.two = &http.Transport{DialContext: dial.DialContext, DisableCompression: true, Protocols: new(http.Protocols)}
	w.two.Protocols.SetUnencryptedHTTP2(true)
	quiet := slog.NewLogLogger(g.cfg.Logger.Handler(), slog.LevelDebug)
	proxy := &httputil.ReverseProxy{Rewrite: w.rewrite, Transport: w, FlushInterval: -1, ErrorLog: quiet, ErrorHandler: w.failed}
	w.server = &http.Server{
		Handler:           w.guard(proxy),
		ReadHeaderTimeout: g.cfg.HeaderWait,
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    64 << 10,
		TLSConfig:         w.tls,
		ErrorLog:          quiet,
		Protocols:         new(http.Protocols),
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			if t, ok := c.(*tls.Conn); ok {
				c = t.NetConn()
			}
			return context.WithValue(ctx, connKey{}, c)
		},
	}
	w.server.Protocols.SetHTTP1(true)
	w.server.Protocols.SetHTTP2(true)
	w.server.Protocols.SetUnencryptedHTTP2(true)
	return w
}

// Accept, Close and Addr make web the listener of its server.
func (w *web) Accept() (net.Conn, error) {
	select {
	case c := <-w.feed:
		return c, nil
	case <-w.ended:
		return nil, net.ErrClosed
	}
}

// Close ends the feed.
func (w *web) Close() error {
	w.once.Do(func() { close(w.ended) })
	return nil
}

// Addr is asked by the server for logs only.
func (w *web) Addr() net.Addr { return &net.TCPAddr{} }

func (w *web) take(c net.Conn) bool {
	select {
	case w.feed <- c:
		return true
	case <-w.ended:
		return false
	}
}

func (w *web) close() error {
	err := w.server.Close()
	_ = w.Close() // the server may not have begun yet
	w.one.CloseIdleConnections()
	w.two.CloseIdleConnections()
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

// guard refuses what a door does not serve, bounds what a source has under way, and asks who is behind a request at a private door:
// one whose sender can't be named does not pass.
func (w *web) guard(next http.Handler) http.Handler {
	return http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		c, ok := r.Context().Value(connKey{}).(*conn)
		if !ok {
			http.Error(rw, "this door does not serve that request", http.StatusNotImplemented)
			return
		}
		if status, why := tidy(r); status != 0 {
			http.Error(rw, why, status)
			return
		}
		source := c.origin()
		full, mine := w.gate.asked.take(source)
		switch {
		case full:
			w.gate.refused(AllRequests, c.now().Name, source)
			comeBack(rw, "too many requests are under way: try again", http.StatusServiceUnavailable)
			return
		case mine:
			w.gate.refused(SourceRequests, c.now().Name, source)
			comeBack(rw, "too many requests of yours are under way: try again", http.StatusTooManyRequests)
			return
		}
		defer w.gate.asked.drop(source)
		if c.who != nil {
			if _, err := c.who(); err != nil {
				w.gate.notices.warn("a caller on the tailnet has no name", "door", c.now().Name, "err", err)
				http.Error(rw, "the tailnet does not say who you are: try again", http.StatusServiceUnavailable)
				return
			}
		}
		next.ServeHTTP(&answer{rw, r.Header.Get("Upgrade") != ""}, r)
	})
}

func comeBack(rw http.ResponseWriter, why string, status int) {
	rw.Header().Set("Retry-After", "1")
	http.Error(rw, why, status)
}

// rewrite makes the request to the application out of the one that came in.
func (w *web) rewrite(r *httputil.ProxyRequest) {
	c := r.In.Context().Value(connKey{}).(*conn) // guard saw to it
	d := c.now()
	for _, h := range []map[string][]string{r.Out.Header, r.Out.Trailer} {
		for name := range h {
			if reserved(name) {
				delete(h, name)
			}
		}
	}
	address(r)
	if r.Out.Body != nil {
		r.Out.Body = &body{ReadCloser: r.Out.Body, in: r.In, out: r.Out.Trailer}
	}
	r.Out.URL.Scheme, r.Out.URL.Host = "http", d.To
	r.Out.Host = r.In.Host
	r.SetXForwarded()
	r.Out.Header.Set(HeaderDoor, d.Name)
	if c.who == nil {
		return
	}
	peer, err := c.who()
	if err != nil {
		return // guard has refused it already
	}
	for name, value := range map[string]string{HeaderLogin: peer.Login, HeaderName: peer.Name, HeaderNode: peer.Node,
		HeaderTags: strings.Join(peer.Tags, ",")} {
		if value != "" {
			r.Out.Header.Set(name, mime.QEncoding.Encode("utf-8", value))
		}
	}
}

// RoundTrip speaks HTTP/2 to the application where the request can't do without. A change of protocol that nobody asked for is an error.
func (w *web) RoundTrip(r *http.Request) (*http.Response, error) {
	to := w.one
	if speaksGRPC(r) {
		to = w.two
	}
	a, err := to.RoundTrip(r)
	if err == nil && switched(r, a) {
		_ = a.Body.Close() // and with it the connection
		return nil, errSwitched
	}
	return a, err
}

func (w *web) failed(rw http.ResponseWriter, r *http.Request, err error) {
	if r.Context().Err() != nil {
		return // the caller has gone
	}
	if b, ok := r.Body.(*body); ok && b.broken.Load() {
		http.Error(rw, "the body of the request can't be read", http.StatusBadRequest)
		return
	}
	door := r.Header.Get(HeaderDoor)
	if errors.Is(err, errSwitched) {
		w.gate.notices.warn(errSwitched.Error(), "door", door)
		http.Error(rw, "the application's answer can't be passed on", http.StatusBadGateway)
		return
	}
	w.gate.notices.warn("the application does not answer at a door", "door", door, "err", err)
	http.Error(rw, "the application does not answer: try again", http.StatusBadGateway)
}
