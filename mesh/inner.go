// SPDX-License-Identifier: Apache-2.0

package mesh

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net"
	"net/http"
	"net/url"

	"github.com/coder/websocket"

	"github.com/demarc-dev/demarc/fault"
)

// InnerPath is where a control plane takes the upgrade of an inner connection.
const InnerPath = "/demarc/inner"

// Bounds of an inner connection, in bytes. A message holds what one write of the TLS inside it makes: a record, or the flight
// of a handshake.
const (
	maxInnerMessage = 64 << 10
	maxUpgrade      = 16 << 10 // the headers of the answer to the upgrade
)

// Inner is the way through a proxy that opens TLS: an outer TLS that the proxy may open, a WebSocket (RFC 6455, binary
// messages, no compression), and in it a plain stream of bytes, over which the caller runs the TLS that proves and hides. The
// outer TLS is verified, and proves nobody to the caller.
type Inner struct {
	URL string         // wss://host[:port]/path
	CAs *x509.CertPool // of the outer TLS; nil: the system's
}

func (i *Inner) parse() (*url.URL, error) {
	u, err := url.Parse(i.URL)
	if err != nil || u.Scheme != "wss" || u.Hostname() == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" {
		return nil, fault.New("mesh.Inner", fault.Invalid, "inner_tls.url is not of the form wss://host[:port]/path")
	}
	if u.Path == "" || u.Path == "/" {
		u.Path = InnerPath
	}
	u.Scheme = "https"
	return u, nil
}

// over opens the inner connection over c, which it closes on an error; again opens another to the same place. The deadline of ctx bounds
// the opening alone.
func (i *Inner) over(ctx context.Context, h *Hello, c net.Conn, again Dial) (net.Conn, error) {
	const op = "mesh.Inner"
	u, err := i.parse()
	if err != nil {
		_ = c.Close()
		return nil, err
	}
	path := c
	outer, err := h.Shake(ctx, LayerOuter, c, func(ctx context.Context) (net.Conn, error) {
		second, err := again(ctx)
		path = second
		return second, err
	}, &tls.Config{MinVersion: tls.VersionTLS12, ServerName: u.Hostname(), RootCAs: i.CAs, NextProtos: []string{"http/1.1"}})
	if err != nil {
		return nil, outerFault(err)
	}
	given := false
	tr := &http.Transport{DisableKeepAlives: true, DisableCompression: true, MaxResponseHeaderBytes: maxUpgrade,
		DialTLSContext: func(context.Context, string, string) (net.Conn, error) {
			if given {
				return nil, fault.New(op, fault.Internal, "the upgrade wants a second connection")
			}
			given = true
			return outer, nil
		}}
	hc := &http.Client{Transport: tr, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	ws, resp, err := websocket.Dial(ctx, u.String(), &websocket.DialOptions{HTTPClient: hc, CompressionMode: websocket.CompressionDisabled})
	if err != nil {
		_ = outer.NetConn().Close()
		if resp != nil {
			return nil, fault.Because(err, op, fault.Unavailable, "what answers at inner_tls.url takes no upgrade to a WebSocket (status %d): the "+
				"proxy drops it, or the path is not that of your vendor's inner door", resp.StatusCode)
		}
		return nil, fault.Because(err, op, fault.Unavailable, "the upgrade at inner_tls.url failed: the connection ended, or the answer is not "+
			"HTTP or is longer than %d bytes", maxUpgrade)
	}
	return newStream(ws, path), nil
}

func outerFault(err error) error {
	const op = "mesh.Inner"
	if cert, ok := stranger(err); ok {
		return For(Settings, fault.Because(err, op, fault.Denied, "the outer certificate was issued by %s, which this machine does not trust: "+
			"if that is your inspecting proxy, put its CA in inner_tls.ca_file", issuer(cert)))
	}
	var name x509.HostnameError
	if errors.As(err, &name) {
		return For(Settings, fault.Because(err, op, fault.Denied, "the outer certificate is not for the host of inner_tls.url"))
	}
	return err // it is explained already
}

// AcceptInner takes the upgrade of a request and gives the stream of bytes in it. On an error the answer has been written.
// The bounds on the request are those of the server. The caller closes the connection.
func AcceptInner(w http.ResponseWriter, r *http.Request) (net.Conn, error) {
	ws, err := websocket.Accept(w, r, &websocket.AcceptOptions{CompressionMode: websocket.CompressionDisabled})
	if err != nil {
		return nil, fault.Because(err, "mesh.AcceptInner", fault.Invalid, "the request is no upgrade to a WebSocket")
	}
	return newStream(ws, nil), nil
}

// stream is the bytes inside the WebSocket as a connection. It closes at once: the TLS inside it says goodbye by itself.
type stream struct {
	net.Conn // of the WebSocket
	ws       *websocket.Conn
	path     net.Conn // what carries it, where the WebSocket does not know
}

func newStream(ws *websocket.Conn, path net.Conn) net.Conn {
	c := websocket.NetConn(context.Background(), ws, websocket.MessageBinary)
	ws.SetReadLimit(maxInnerMessage) // NetConn takes the limit away
	return &stream{c, ws, path}
}

// Write sends b in messages of at most half of what the other side takes.
func (s *stream) Write(b []byte) (int, error) {
	for n := 0; ; {
		k := min(len(b)-n, maxInnerMessage/2)
		m, err := s.Conn.Write(b[n : n+k])
		if n += m; err != nil || n == len(b) {
			return n, err
		}
	}
}

// Close ends the connection without waiting for the other side.
func (s *stream) Close() error { return s.ws.CloseNow() }

// LocalAddr is that of the TCP connection.
func (s *stream) LocalAddr() net.Addr {
	if s.path != nil {
		return s.path.LocalAddr()
	}
	return s.Conn.LocalAddr()
}

// RemoteAddr is that of the TCP connection.
func (s *stream) RemoteAddr() net.Addr {
	if s.path != nil {
		return s.path.RemoteAddr()
	}
	return s.Conn.RemoteAddr()
}
