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
	"net/textproto"
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
	w.one = &http.Transport{DialContext: dial.DialContext, MaxIdleConnsPerHost: 64, IdleConnTimeout: 90 * time.Second, DisableCompression: true}
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

// guard asks who is behind a request at a private door; a request whose sender can't be named does not pass.
func (w *web) guard(next http.Handler) http.Handler {
	return http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		c, ok := r.Context().Value(connKey{}).(*conn)
		if !ok || r.Method == http.MethodConnect {
			http.Error(rw, "this door does not serve that request", http.StatusNotImplemented)
			return
		}
		if c.who != nil {
			if _, err := c.who(); err != nil {
				w.gate.cfg.Logger.Warn("a caller on the tailnet has no name", "door", c.now().Name, "err", err)
				http.Error(rw, "the tailnet does not say who you are: try again", http.StatusServiceUnavailable)
				return
			}
		}
		next.ServeHTTP(rw, r)
	})
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
	for name, value := range map[string]string{HeaderLogin: peer.Login, HeaderName: peer.Name, HeaderNode: peer.Node, HeaderTags: strings.Join(peer.Tags, ",")} {
		if value != "" {
			r.Out.Header.Set(name, mime.QEncoding.Encode("utf-8", value))
		}
	}
}

// reserved tells whether only a door may set this header. Some applications read - and _ as the same sign.
func reserved(name string) bool {
	name = textproto.CanonicalMIMEHeaderKey(strings.ReplaceAll(name, "_", "-"))
	return strings.HasPrefix(name, "Tailscale-") || strings.HasPrefix(name, "X-Demarc-") ||
		strings.HasPrefix(name, "X-Forwarded-") || name == "Forwarded" || name == "X-Real-Ip"
}

// RoundTrip speaks HTTP/2 to the application where the request can't do without.
func (w *web) RoundTrip(r *http.Request) (*http.Response, error) {
	if strings.HasPrefix(r.Header.Get("Content-Type"), "application/grpc") {
		return w.two.RoundTrip(r)
	}
	return w.one.RoundTrip(r)
}

func (w *web) failed(rw http.ResponseWriter, r *http.Request, err error) {
	if r.Context().Err() != nil {
		return // the caller has gone
	}
	w.gate.cfg.Logger.Warn("the application does not answer at a door", "err", err)
	http.Error(rw, "the application does not answer: try again", http.StatusBadGateway)
}
