// SPDX-License-Identifier: Apache-2.0

package ingress_test

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/ingress"
)

// tailnet stands for a tailnet on loopback: it opens on 127.0.0.1 and says that callers come from a tailnet address.
type tailnet struct {
	peer ingress.Peer
	err  error
}

func (n *tailnet) Open(ctx context.Context, _ string) (net.Listener, error) {
	l, err := ingress.HostNet{}.Open(ctx, "127.0.0.1:0")
	return tailnetListener{l}, err
}

func (n *tailnet) WhoIs(_ context.Context, remote netip.AddrPort) (ingress.Peer, error) {
	if remote.Addr() != netip.MustParseAddr("100.64.0.7") {
		return ingress.Peer{}, fmt.Errorf("asked about %s", remote)
	}
	return n.peer, n.err
}

type tailnetListener struct{ net.Listener }

func (l tailnetListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return tailnetConn{c}, nil
}

type tailnetConn struct{ net.Conn }

func (tailnetConn) RemoteAddr() net.Addr {
	return &net.TCPAddr{IP: net.IPv4(100, 64, 0, 7), Port: 4242}
}

func headers(w http.ResponseWriter, r *http.Request) {
	_, _ = io.Copy(io.Discard, r.Body)
	for _, h := range []http.Header{r.Header, r.Trailer} {
		for k, v := range h {
			_, _ = fmt.Fprintf(w, "%s=%s\n", k, strings.Join(v, ","))
		}
	}
	_, _ = fmt.Fprintf(w, "host=%s\n", r.Host)
}

func spoofed(t *testing.T) *http.Request {
	t.Helper()
	r, err := http.NewRequest(http.MethodPost, "http://app.example/", strings.NewReader("x"))
	if err != nil {
		t.Fatal(err)
	}
	r.ContentLength = -1
	r.Trailer = http.Header{"X-Demarc-Node": {"SPOOF"}}
	for _, name := range []string{ingress.HeaderLogin, "tailscale-user-profile-pic", "Tailscale_User_Login", "X_Demarc_Node",
		ingress.HeaderTags, "X-Forwarded-For", "X-Real-IP", "Forwarded"} {
		r.Header[name] = []string{"SPOOF"}
	}
	r.Header.Set("Connection", "X-Demarc-Door")
	r.Header.Set("X-Kept", "yes")
	return r
}

func TestIdentityHeaders(t *testing.T) {
	up := app(t, headers)
	net := &tailnet{peer: ingress.Peer{Login: "ann@example.com", Name: "Änn\r\nX-Evil: 1", Node: "laptop"}}
	g := newGate(t, ingress.Config{Tailnet: net})

	set(t, g, fleet.Posture{Exposure: fleet.Private}, ingress.Site{Tailnet: true}, webPort(up))
	resp, body := request(t, dialFrom(t, "127.0.0.2", g.Doors()[0].Addr), spoofed(t))
	if resp.StatusCode != 200 || strings.Contains(body, "SPOOF") || strings.Contains(body, "X-Evil=") {
		t.Errorf("a private door passed spoofed headers on: %d\n%s", resp.StatusCode, body)
	}
	for _, want := range []string{"Tailscale-User-Login=ann@example.com\n", "X-Demarc-Node=laptop\n", "X-Demarc-Door=web\n", "X-Kept=yes\n",
		"X-Forwarded-For=100.64.0.7\n", "host=app.example\n"} {
		if !strings.Contains(body, want) {
			t.Errorf("the application does not see %q in\n%s", want, body)
		}
	}

	net.err = errors.New("no netmap")
	if resp, body := request(t, dialFrom(t, "127.0.0.2", g.Doors()[0].Addr), spoofed(t)); resp.StatusCode != http.StatusServiceUnavailable {
		t.Errorf("a caller without a name gets %d %s", resp.StatusCode, body)
	}

	set(t, g, public(), ingress.Site{}, webPort(up))
	_, body = request(t, dialFrom(t, "127.0.0.2", g.Doors()[0].Addr), spoofed(t))
	if strings.Contains(body, "SPOOF") || strings.Contains(body, "Tailscale-User") || !strings.Contains(body, "X-Forwarded-For=127.0.0.2\n") {
		t.Errorf("a public door passed spoofed headers on:\n%s", body)
	}
}

func TestPrivateOpensNothingOnTheHost(t *testing.T) {
	up := app(t, headers)
	g := newGate(t, ingress.Config{Host: refuses{t}, Tailnet: &tailnet{}})
	set(t, g, fleet.Posture{Exposure: fleet.Private}, ingress.Site{Tailnet: true}, webPort(up))
	set(t, g, fleet.Posture{Exposure: fleet.Closed}, ingress.Site{Tailnet: true}, webPort(up))
}

type refuses struct{ t *testing.T }

func (r refuses) Open(_ context.Context, addr string) (net.Listener, error) {
	r.t.Errorf("the host's network was asked for a socket at %s", addr)
	return nil, errors.New("refused")
}

func TestKeptConnectionUsesTheNewUpstream(t *testing.T) {
	one := app(t, func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "one") })
	two := app(t, func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "two") })
	g := newGate(t, ingress.Config{})
	set(t, g, public(), ingress.Site{}, webPort(one))
	c := dialFrom(t, "127.0.0.2", g.Doors()[0].Addr)
	get := func() string {
		r, err := http.NewRequest(http.MethodGet, "http://app.example/", nil)
		if err != nil {
			t.Fatal(err)
		}
		_, body := request(t, c, r)
		return body
	}
	if got := get(); got != "one" {
		t.Fatal(got)
	}
	set(t, g, allow("127.0.0.2/32"), ingress.Site{}, webPort(two))
	if got := get(); got != "two" {
		t.Errorf("got %q over the kept connection, want two", got)
	}
}

func TestWebSocketPassesAndIsCut(t *testing.T) {
	up := app(t, func(w http.ResponseWriter, _ *http.Request) {
		c, rw, err := http.NewResponseController(w).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		defer func() { _ = c.Close() }()
		_, _ = io.WriteString(c, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
		_, _ = io.Copy(c, rw)
	})
	g := newGate(t, ingress.Config{})
	set(t, g, public(), ingress.Site{}, webPort(up))
	open := func(from string) net.Conn {
		c := dialFrom(t, from, g.Doors()[0].Addr)
		_, _ = io.WriteString(c, "GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
		resp, err := http.ReadResponse(bufio.NewReaderSize(c, 16), nil)
		if err != nil || resp.StatusCode != 101 {
			t.Fatalf("upgrade: %v %v", resp, err)
		}
		if err := says(c, "before"); err != nil {
			t.Fatal(err)
		}
		return c
	}
	two, three := open("127.0.0.2"), open("127.0.0.3")
	set(t, g, allow("127.0.0.2/32"), ingress.Site{}, webPort(up))
	if err := says(two, "after"); err != nil {
		t.Errorf("an allowed WebSocket was cut: %v", err)
	}
	if err := says(three, "after"); err == nil {
		t.Error("a WebSocket that is no longer allowed goes on")
	}
}

func writePair(t *testing.T, dir, name string) (certFile, keyFile string, pool *x509.CertPool) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), DNSNames: []string{name}, NotAfter: time.Now().Add(time.Hour), IsCA: true,
		BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	certFile, keyFile = filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	cert := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	if err := errors.Join(os.WriteFile(certFile, cert, 0o600),
		os.WriteFile(keyFile, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER}), 0o600)); err != nil {
		t.Fatal(err)
	}
	pool = x509.NewCertPool()
	pool.AppendCertsFromPEM(cert)
	return certFile, keyFile, pool
}

func TestTLSFromFiles(t *testing.T) {
	dir := t.TempDir()
	cert, key, pool := writePair(t, dir, "app.example")
	files, err := ingress.Load(cert, key)
	if err != nil {
		t.Fatal(err)
	}
	up := app(t, func(w http.ResponseWriter, r *http.Request) {
		_, _ = fmt.Fprintf(w, "%s %s", r.Proto, r.Header.Get("X-Forwarded-Proto"))
	})
	g := newGate(t, ingress.Config{Certificate: files.Certificate})
	set(t, g, public(), ingress.Site{TLS: true}, webPort(up))
	to := g.Doors()[0].Addr.String()
	get := func(pool *x509.CertPool, contentType string) (string, int, error) {
		tr := &http.Transport{ForceAttemptHTTP2: true, TLSClientConfig: &tls.Config{RootCAs: pool, ServerName: "app.example"}}
		defer tr.CloseIdleConnections()
		r, err := http.NewRequest(http.MethodPost, "https://"+to+"/", nil)
		if err != nil {
			t.Fatal(err)
		}
		r.Header.Set("Content-Type", contentType)
		resp, err := tr.RoundTrip(r)
		if err != nil {
			return "", 0, err
		}
		defer func() { _ = resp.Body.Close() }()
		b, err := io.ReadAll(resp.Body)
		return string(b), resp.ProtoMajor, err
	}
	if body, major, err := get(pool, "text/plain"); err != nil || major != 2 || body != "HTTP/1.1 https" {
		t.Errorf("HTTP/2 at the door: %q, %d, %v", body, major, err)
	}
	if body, _, err := get(pool, "application/grpc"); err != nil || body != "HTTP/2.0 https" {
		t.Errorf("gRPC to the application: %q, %v", body, err)
	}
	// Renewal without a restart; a pair that does not fit leaves the old one.
	_, _, pool2 := writePair(t, dir, "app.example")
	if _, _, err := get(pool2, "text/plain"); err != nil {
		t.Errorf("the renewed certificate is not served: %v", err)
	}
	if err := os.WriteFile(cert, []byte("torn"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := files.Reload(); fault.Of(err) != fault.Invalid {
		t.Errorf("Reload of a torn file = %v, want invalid", err)
	}
	if _, _, err := get(pool2, "text/plain"); err != nil {
		t.Errorf("a torn file takes the door down: %v", err)
	}
	if _, err := ingress.Load(filepath.Join(dir, "none"), key); fault.Of(err) != fault.Unavailable {
		t.Errorf("Load of no file = %v, want unavailable", err)
	}
}

func TestTLSDoorWithoutCertificate(t *testing.T) {
	g := newGate(t, ingress.Config{})
	plan, err := ingress.Compile(public(), []ingress.Port{webPort("127.0.0.1:1")}, ingress.Site{TLS: true})
	if err != nil {
		t.Fatal(err)
	}
	if err := g.Set(t.Context(), plan); fault.Of(err) != fault.Invalid {
		t.Errorf("Set = %v, want invalid", err)
	}
}

func TestApplicationDown(t *testing.T) {
	g := newGate(t, ingress.Config{})
	set(t, g, public(), ingress.Site{}, webPort("127.0.0.1:1"))
	r, err := http.NewRequest(http.MethodGet, "http://app.example/", nil)
	if err != nil {
		t.Fatal(err)
	}
	if resp, body := request(t, dialFrom(t, "127.0.0.2", g.Doors()[0].Addr), r); resp.StatusCode != http.StatusBadGateway ||
		strings.Contains(body, "127.0.0.1") {
		t.Errorf("got %d %q", resp.StatusCode, body)
	}
}
