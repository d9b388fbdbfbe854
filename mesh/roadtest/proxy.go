// SPDX-License-Identifier: Apache-2.0

// Package roadtest holds what stands on a road in the tests: a proxy that asks for a password and can open TLS, and a relay
// that delays, holds, cuts and halves what goes through it.
package roadtest

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"io"
	"math/big"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"
)

// CA is an authority of the test's own.
type CA struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

// NewCA draws an authority.
func NewCA(name string) (*CA, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	t := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, NotBefore: time.Now().Add(-time.Hour),
		NotAfter: time.Now().Add(24 * time.Hour), IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	der, err := x509.CreateCertificate(rand.Reader, t, t, key.Public(), key)
	if err != nil {
		return nil, err
	}
	cert, err := x509.ParseCertificate(der)
	return &CA{cert, key}, err
}

// PEM is the authority's certificate.
func (c *CA) PEM() []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.cert.Raw})
}

// Pool trusts this authority alone.
func (c *CA) Pool() *x509.CertPool {
	p := x509.NewCertPool()
	p.AddCert(c.cert)
	return p
}

// Leaf issues a certificate for a host: a name or an address.
func (c *CA) Leaf(host string) (*tls.Certificate, error) { return c.LeafUntil(host, c.cert.NotAfter) }

// LeafUntil is Leaf with an end of its own.
func (c *CA) LeafUntil(host string, end time.Time) (*tls.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	serial, err := rand.Int(rand.Reader, big.NewInt(1<<62))
	if err != nil {
		return nil, err
	}
	t := &x509.Certificate{SerialNumber: serial, Subject: pkix.Name{CommonName: "leaf"}, NotBefore: c.cert.NotBefore, NotAfter: end,
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}
	if ip := net.ParseIP(host); ip != nil {
		t.IPAddresses = []net.IP{ip}
	} else {
		t.DNSNames = []string{host}
	}
	der, err := x509.CreateCertificate(rand.Reader, t, c.cert, key.Public(), c.key)
	return &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, err
}

// Dial is how a proxy or a relay goes on.
type Dial func(ctx context.Context, network, addr string) (net.Conn, error)

// maxClear bounds what a proxy keeps of the clear text, in bytes.
const maxClear = 64 << 20

// Proxy takes CONNECT. Its fields are set before it serves; its switches at any time.
type Proxy struct {
	User, Password string
	CA             *CA      // of the TLS that it shows when it opens TLS
	Protos         []string // ALPN that it then knows
	Dial           Dial     // nil: the system's

	Opens   atomic.Bool // it opens TLS, reads, and encrypts again
	Refuses atomic.Bool // it answers 407, whatever the password
	Asked   atomic.Int64

	mu    sync.Mutex
	clear bytes.Buffer
	conns map[net.Conn]bool
}

// Serve takes connections until the listener is closed.
func (p *Proxy) Serve(ln net.Listener) {
	for {
		c, err := ln.Accept()
		if err != nil {
			return
		}
		go p.serve(c)
	}
}

// Clear is what the proxy has read in clear text so far, both ways.
func (p *Proxy) Clear() []byte {
	p.mu.Lock()
	defer p.mu.Unlock()
	return bytes.Clone(p.clear.Bytes())
}

// Cut resets every connection.
func (p *Proxy) Cut() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for c := range p.conns {
		reset(c)
	}
}

// Write keeps clear text.
func (p *Proxy) Write(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.clear.Len()+len(b) <= maxClear {
		p.clear.Write(b)
	}
	return len(b), nil
}

func (p *Proxy) track(c net.Conn) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.conns == nil {
		p.conns = map[net.Conn]bool{}
	}
	p.conns[c] = true
}

func (p *Proxy) drop(c net.Conn) {
	_ = c.Close()
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.conns, c)
}

func (p *Proxy) serve(down net.Conn) {
	p.track(down)
	defer p.drop(down)
	r := bufio.NewReader(down)
	req, err := http.ReadRequest(r)
	if err != nil || req.Method != http.MethodConnect {
		return
	}
	p.Asked.Add(1)
	req.Header.Set("Authorization", req.Header.Get("Proxy-Authorization"))
	u, pw, _ := req.BasicAuth()
	if p.Refuses.Load() || u != p.User || pw != p.Password {
		_, _ = io.WriteString(down, "HTTP/1.1 407 Proxy Authentication Required\r\nProxy-Authenticate: Basic realm=\"road\"\r\nContent-Length: "+
			"0\r\n\r\n")
		return
	}
	dial := p.Dial
	if dial == nil {
		dial = new(net.Dialer).DialContext
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	up, err := dial(ctx, "tcp", req.Host)
	if err != nil {
		_, _ = io.WriteString(down, "HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n")
		return
	}
	p.track(up)
	defer p.drop(up)
	if _, err := io.WriteString(down, "HTTP/1.1 200 OK\r\n\r\n"); err != nil {
		return
	}
	if !p.Opens.Load() {
		both(&ahead{down, r}, up, io.Discard)
		return
	}
	host, _, _ := net.SplitHostPort(req.Host)
	in := tls.Server(&ahead{down, r},
		&tls.Config{NextProtos: p.Protos, GetCertificate: func(h *tls.ClientHelloInfo) (*tls.Certificate, error) {
			if h.ServerName != "" {
				return p.CA.Leaf(h.ServerName)
			}
			return p.CA.Leaf(host)
		}})
	if err := in.HandshakeContext(ctx); err != nil {
		return
	}
	out := tls.Client(up, &tls.Config{InsecureSkipVerify: true, ServerName: host, NextProtos: p.Protos})
	if err := out.HandshakeContext(ctx); err != nil {
		return
	}
	both(in, out, p)
}

// both copies both ways until one of them ends, and tells w what goes by.
func both(a, b net.Conn, w io.Writer) {
	var wg sync.WaitGroup
	for _, way := range [][2]net.Conn{{a, b}, {b, a}} {
		wg.Go(func() {
			_, _ = io.Copy(way[1], io.TeeReader(way[0], w))
			_ = a.Close()
			_ = b.Close()
		})
	}
	wg.Wait()
}

type ahead struct {
	net.Conn
	r io.Reader
}

// Read gives what was read ahead first.
func (a *ahead) Read(b []byte) (int, error) { return a.r.Read(b) }

func reset(c net.Conn) {
	if t, ok := c.(*tls.Conn); ok {
		c = t.NetConn()
	}
	if t, ok := c.(*net.TCPConn); ok {
		_ = t.SetLinger(0)
	}
	_ = c.Close()
}
