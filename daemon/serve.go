// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"context"
	"crypto/tls"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"time"

	"github.com/demarc-dev/demarc/fault"
)

// Bounds of every HTTP server here. A stranger can hold a connection no longer than these without saying anything.
const (
	headerTimeout  = 10 * time.Second
	idleTimeout    = 2 * time.Minute
	maxHeaderBytes = 64 << 10
	pingAfter      = 10 * time.Second // of silence on an HTTP/2 connection
	pingTimeout    = 10 * time.Second
	drain          = 3 * time.Second // for calls in flight at a stop
)

// HTTP serves a handler on a listener, with TLS where conf is not nil, until its context ends. It then lets calls in
// flight end for 3 s and closes what is left.
func HTTP(name string, ln net.Listener, conf *tls.Config, h http.Handler, log *slog.Logger) Part {
	srv := server(name, conf, h, log)
	if conf == nil {
		return serve(name, srv, func() error { return srv.Serve(ln) })
	}
	return serve(name, srv, func() error { return srv.ServeTLS(ln, "", "") })
}

// Calls is the calls that come over one connection whose TLS handshake was done. It has an HTTP server of its own, so that one
// connection can be ended in order while all others go on.
type Calls struct {
	conn *tls.Conn
	srv  *http.Server
}

// NewCalls makes what serves h on a connection that negotiated "h2", or HTTP/1.1 where its peer offered nothing. State is told
// how it fares, as [http.Server.ConnState] is.
func NewCalls(name string, c *tls.Conn, h http.Handler, state func(net.Conn, http.ConnState), log *slog.Logger) *Calls {
	srv := server(name, nil, h, log)
	srv.Protocols.SetHTTP2(true)
	srv.Protocols.SetUnencryptedHTTP2(false)
	srv.ConnState = state
	return &Calls{c, srv}
}

// Serve begins, and returns at once. It is called once, before all that ends the connection.
func (c *Calls) Serve() { _ = c.srv.Serve(&once{conn: c.conn}) } // the error is that there is no second connection

// Leave tells the peer to go elsewhere (GOAWAY). Calls that are under way end as they would have, and a call that the peer sent
// meanwhile was not begun: an HTTP/2 client makes it again elsewhere by itself. The connection is closed after. It does not wait.
func (c *Calls) Leave() {
	over, cancel := context.WithCancel(context.Background())
	cancel()
	_ = c.srv.Shutdown(over) // it begins, and the context ends the waiting
}

// End is Leave for at most 3 s; what is under way then is cut off.
func (c *Calls) End() {
	stop, cancel := context.WithTimeout(context.Background(), drain)
	defer cancel()
	if c.srv.Shutdown(stop) != nil {
		c.Close()
	}
}

// Close cuts the connection.
func (c *Calls) Close() { _ = c.conn.Close() }

// once is a listener that gives one connection.
type once struct {
	conn  *tls.Conn
	given bool
}

// Accept implements net.Listener.
func (o *once) Accept() (net.Conn, error) {
	if o.given {
		return nil, net.ErrClosed
	}
	o.given = true
	return o.conn, nil
}

// Close implements net.Listener.
func (*once) Close() error { return nil }

// Addr implements net.Listener.
func (o *once) Addr() net.Addr { return o.conn.LocalAddr() }

func server(name string, conf *tls.Config, h http.Handler, log *slog.Logger) *http.Server {
	srv := &http.Server{
		Handler:           h,
		TLSConfig:         conf,
		ReadHeaderTimeout: headerTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxHeaderBytes,
		ErrorLog:          slog.NewLogLogger(log.With("part", name).Handler(), slog.LevelDebug),
		HTTP2:             &http.HTTP2Config{SendPingTimeout: pingAfter, PingTimeout: pingTimeout, MaxConcurrentStreams: 64},
		Protocols:         new(http.Protocols),
	}
	srv.Protocols.SetHTTP1(true)
	srv.Protocols.SetHTTP2(conf != nil)
	srv.Protocols.SetUnencryptedHTTP2(conf == nil)
	return srv
}

func serve(name string, srv *http.Server, run func() error) Part {
	return Func(name, func(ctx context.Context, ready func()) error {
		failed := make(chan error, 1)
		go func() { failed <- run() }()
		ready()
		select {
		case err := <-failed:
			return fault.At("daemon.HTTP", fault.Unavailable, err)
		case <-ctx.Done():
		}
		stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), drain)
		defer cancel()
		if err := srv.Shutdown(stop); err != nil {
			_ = srv.Close() // what did not end by itself
		}
		if err := <-failed; !errors.Is(err, http.ErrServerClosed) {
			return fault.At("daemon.HTTP", fault.Unavailable, err)
		}
		return nil
	})
}
