// SPDX-License-Identifier: Apache-2.0

package mesh

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"

	"github.com/demarc-dev/demarc/fault"
)

// maxProxyAnswer bounds what a proxy may say before it is a tunnel.
const maxProxyAnswer = 16 << 10

// Proxy is an HTTP proxy that is asked to CONNECT. Its user and password are sent to it alone.
type Proxy struct {
	URL      string         // http://host:port or https://host:port, without user and password
	User     string         // empty: no authentication
	Password string         //
	CAs      *x509.CertPool // for an https:// proxy; nil: the system's
}

func (p *Proxy) parse() (*url.URL, error) {
	const op = "mesh.Proxy"
	u, err := url.Parse(p.URL)
	if err != nil || (u.Scheme != "http" && u.Scheme != "https") || u.Hostname() == "" || (u.Path != "" && u.Path != "/") || u.RawQuery != "" {
		return nil, fault.New(op, fault.Invalid, "the proxy's URL is not of the form http://host:port or https://host:port")
	}
	if u.User != nil {
		return nil, fault.New(op, fault.Invalid, "the proxy's URL carries a user or password: put them in proxy.auth_file")
	}
	if strings.ContainsAny(p.User, ":\r\n") || strings.ContainsAny(p.Password, "\r\n") {
		return nil, fault.New(op, fault.Invalid, "the proxy's user or password has a character that can't be sent")
	}
	return u, nil
}

func (p *Proxy) check() error {
	_, err := p.parse()
	return err
}

// dial opens a tunnel through the proxy. The deadline of ctx bounds the whole of it.
func (p *Proxy) dial(ctx context.Context, d *net.Dialer, h *Hello, addr string) (net.Conn, error) {
	const op = "mesh.Proxy"
	u, err := p.parse()
	if err != nil {
		return nil, err
	}
	port := u.Port()
	if port == "" {
		port = map[string]string{"http": "80", "https": "443"}[u.Scheme]
	}
	open := func(ctx context.Context) (net.Conn, error) {
		c, err := d.DialContext(ctx, "tcp", net.JoinHostPort(u.Hostname(), port))
		if err != nil {
			return nil, For(ProxyUnreached, fault.Because(err, op, fault.Unavailable, "the proxy does not answer: %s", words(err, 0)))
		}
		return c, nil
	}
	c, err := open(ctx)
	if err != nil {
		return nil, err
	}
	if u.Scheme == "https" {
		own := &tls.Config{MinVersion: tls.VersionTLS12, ServerName: u.Hostname(), RootCAs: p.CAs, NextProtos: []string{"http/1.1"}}
		t, err := h.Shake(ctx, LayerProxy, c, open, own)
		if err != nil {
			return nil, proxyFault(err)
		}
		c = t
	}
	stop := context.AfterFunc(ctx, func() { _ = c.Close() }) // ends whatever read or write is under way
	defer stop()
	tunnel, err := p.connect(c, addr)
	if err == nil && !stop() {
		err = fault.At(op, fault.Unavailable, context.Cause(ctx))
	}
	if err != nil {
		_ = c.Close()
		return nil, err
	}
	return tunnel, nil
}

// proxyFault names what is wrong with the TLS of an https:// proxy itself.
func proxyFault(err error) error {
	const op = "mesh.Proxy"
	if cert, ok := stranger(err); ok {
		return For(Settings, fault.Because(err, op, fault.Denied, "the proxy's own certificate was issued by %s, which this machine does not "+
			"trust: if that is your proxy, put its CA in ca_file of this transport", issuer(cert)))
	}
	var name x509.HostnameError
	if errors.As(err, &name) {
		return For(Settings, fault.Because(err, op, fault.Denied, "the proxy's own certificate is not for the host of proxy.url"))
	}
	var expired x509.CertificateInvalidError
	if errors.As(err, &expired) && expired.Reason == x509.Expired {
		return For(ClockOff, fault.Because(err, op, fault.Expired, "the proxy's own certificate is not valid at this machine's time: check the "+
			"clock first"))
	}
	var record tls.RecordHeaderError
	if errors.As(err, &record) {
		return For(Settings, fault.Because(err, op, fault.Denied, "what answers at proxy.url does not speak TLS: a proxy that is reached "+
			"without it has a URL of http://"))
	}
	if r := ReasonOf(err); r == HelloTooLarge || errors.Is(err, errUnanswered) {
		return fault.Because(For(r, err), op, fault.Unavailable, "to the proxy: %s", fault.Text(err))
	}
	return fault.Because(err, op, fault.Unavailable, "the proxy hung up")
}

func (p *Proxy) connect(c net.Conn, addr string) (net.Conn, error) {
	const op = "mesh.Proxy"
	ask := "CONNECT " + addr + " HTTP/1.1\r\nHost: " + addr + "\r\n"
	if p.User != "" {
		ask += "Proxy-Authorization: Basic " + base64.StdEncoding.EncodeToString([]byte(p.User+":"+p.Password)) + "\r\n"
	}
	if _, err := io.WriteString(c, ask+"\r\n"); err != nil {
		return nil, fault.Because(err, op, fault.Unavailable, "the proxy hung up")
	}
	limited := &io.LimitedReader{R: c, N: maxProxyAnswer}
	r := bufio.NewReader(limited)
	resp, err := http.ReadResponse(r, &http.Request{Method: http.MethodConnect})
	if err != nil {
		return nil, fault.Because(err, op, fault.Unavailable, "the proxy's answer is not HTTP, or longer than %d bytes", maxProxyAnswer)
	}
	// The body is not read and not closed: after a 200 it is the tunnel, after anything else the connection is dropped.
	switch {
	case resp.StatusCode == http.StatusProxyAuthRequired:
		scheme, _, _ := strings.Cut(resp.Header.Get("Proxy-Authenticate"), " ")
		if p.User == "" {
			return nil, For(ProxyRefuses, fault.New(op, fault.Denied, "the proxy asks for authentication (%.32q): set proxy.auth_file", scheme))
		}
		return nil, For(ProxyRefuses, fault.New(op, fault.Denied, "the proxy refuses the user and password of proxy.auth_file (it asks for "+
			"%.32q; Basic is sent)", scheme))
	case resp.StatusCode == http.StatusForbidden:
		return nil, For(ProxyRefuses,
			fault.New(op, fault.Denied, "the proxy forbids %s: ask its administrator to allow CONNECT to that address", addr))
	case resp.StatusCode != http.StatusOK:
		return nil, fault.New(op, fault.Unavailable, "the proxy answers %d to CONNECT %s", resp.StatusCode, addr)
	}
	if r.Buffered() == 0 {
		return &ahead{Conn: c, r: c}, nil
	}
	head, err := r.Peek(r.Buffered())
	if err != nil {
		return nil, fault.At(op, fault.Internal, err)
	}
	return &ahead{Conn: c, r: io.MultiReader(strings.NewReader(string(head)), c)}, nil
}

// ahead is a tunnel through a proxy, of which some bytes may have been read already.
type ahead struct {
	net.Conn
	r io.Reader
}

// Read gives the bytes that were read ahead first.
func (a *ahead) Read(b []byte) (int, error) { return a.r.Read(b) }

// NetConn gives the connection beneath, to the proxy.
func (a *ahead) NetConn() net.Conn { return a.Conn }
