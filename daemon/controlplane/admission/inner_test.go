// SPDX-License-Identifier: Apache-2.0

package admission

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/http2"

	"github.com/demarc-dev/demarc/configs"
	"github.com/demarc-dev/demarc/daemon"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/identity"
	"github.com/demarc-dev/demarc/identity/identitytest"
	"github.com/demarc-dev/demarc/mesh"
	"github.com/demarc-dev/demarc/mesh/roadtest"
)

// innerTest is an inner listener that runs, with the authority of the vendor and that of the web.
type innerTest struct {
	addr, certFile, keyFile string
	vendor                  *identity.Authority
	web                     *roadtest.CA
	node, appliance         *tls.Certificate
}

func webFiles(t *testing.T, ca *roadtest.CA, certFile, keyFile string) {
	t.Helper()
	leaf, err := ca.Leaf("127.0.0.1")
	if err != nil {
		t.Fatal(err)
	}
	key, err := x509.MarshalPKCS8PrivateKey(leaf.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	for name, b := range map[string]*pem.Block{certFile: {Type: "CERTIFICATE", Bytes: leaf.Certificate[0]},
		keyFile: {Type: "PRIVATE KEY", Bytes: key}} {
		if err := os.WriteFile(name, pem.EncodeToMemory(b), 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

func startInner(t *testing.T) *innerTest {
	t.Helper()
	return startInnerOf(t, MaxUnproven)
}

func startInnerOf(t *testing.T, places int) *innerTest {
	t.Helper()
	now := time.Now()
	d := &innerTest{certFile: filepath.Join(t.TempDir(), "c"), keyFile: filepath.Join(t.TempDir(), "k")}
	var err error
	if d.vendor, err = identity.NewCA(domain, now, rand.Reader, identity.DefaultCALife); err != nil {
		t.Fatal(err)
	}
	if d.node, err = identitytest.Leaf(d.vendor, fleet.PrincipalOf(domain, fleet.Node, "cp-1"), now, time.Hour); err != nil {
		t.Fatal(err)
	}
	if d.appliance, err = identitytest.Leaf(d.vendor, fleet.PrincipalOf(domain, fleet.Appliance, "eu-1"), now, time.Hour); err != nil {
		t.Fatal(err)
	}
	if d.web, err = roadtest.NewCA("Web CA"); err != nil {
		t.Fatal(err)
	}
	webFiles(t, d.web, d.certFile, d.keyFile)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	d.addr = l.Addr().String()
	_ = l.Close()
	conf := identity.Server(identity.Fixed(d.node, identity.Pool([]*x509.Certificate{d.vendor.Cert})), func(fleet.Principal,
		fleet.Serial) error {
		return nil
	}, false, "h2")
	who := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		p, _, err := identity.PrincipalOf(r.TLS)
		b, _ := io.ReadAll(r.Body)
		fmt.Fprintf(w, "%s %v %s", p, err != nil, b)
	})
	parts, err := InnerListener(&configs.InnerDoor{Listen: d.addr, CertFile: d.certFile, KeyFile: d.keyFile}, conf, places,
		func(name string, ln net.Listener, c *tls.Config) daemon.Part {
			return daemon.HTTP(name, ln, c, who, slog.New(slog.DiscardHandler))
		}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, len(parts))
	for _, p := range parts {
		go func() { done <- p.Run(ctx, func() {}) }()
	}
	t.Cleanup(func() {
		cancel()
		for range parts {
			if err := <-done; err != nil {
				t.Error(err)
			}
		}
	})
	return d
}

// dial goes over the inner route; p may be nil.
func (d *innerTest) dial(t *testing.T, p *mesh.Proxy, cas *x509.CertPool, inner bool) (net.Conn, error) {
	t.Helper()
	h := mesh.HTTPS{Addresses: []string{d.addr}, Proxy: p, Wait: 5 * time.Second}
	if inner {
		h.Inner = &mesh.Inner{URL: "wss://" + d.addr, CAs: cas}
	}
	r, err := mesh.NewHTTPS(h)
	if err != nil {
		t.Fatal(err)
	}
	return r.Dial(t.Context(), "")
}

// call proves the node inside the connection, as an appliance does, and asks who it is there.
func (d *innerTest) call(ctx context.Context, c net.Conn, leaf *tls.Certificate, body string) (string, error) {
	defer c.Close()
	tc, err := mesh.NewHello(mesh.HelloConfig{}).Shake(ctx, mesh.LayerChannel, c, nil, identity.Client(identity.Fixed(leaf,
		identity.Pool([]*x509.Certificate{d.vendor.Cert})), identity.WantNode(domain), "h2"))
	if err != nil {
		return "", err
	}
	cc, err := new(http2.Transport).NewClientConn(tc)
	if err != nil {
		return "", err
	}
	defer cc.Close()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "https://control-plane/", strings.NewReader(body))
	if err != nil {
		return "", err
	}
	res, err := cc.RoundTrip(req)
	if err != nil {
		return "", err
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	return string(b), err
}

// TestInnerListenerIsTheSame: through a proxy that opens TLS the identities of both sides hold, and the proxy reads nothing; the
// plain route through it fails with the name of the proxy's CA, whatever ALPN the proxy knows.
func TestInnerListenerIsTheSame(t *testing.T) {
	d := startInner(t)
	corp, err := roadtest.NewCA("Corp Inspect CA")
	if err != nil {
		t.Fatal(err)
	}
	for _, protos := range [][]string{nil, {"http/1.1"}, {"h2", "http/1.1"}} {
		p := &roadtest.Proxy{CA: corp, Protos: protos}
		p.Opens.Store(true)
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer ln.Close()
		go p.Serve(ln)
		by := &mesh.Proxy{URL: "http://" + ln.Addr().String()}
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()

		c, err := d.dial(t, by, nil, false)
		if err != nil {
			t.Fatal(err)
		}
		want := "Corp Inspect CA"
		if len(protos) == 1 { // such a proxy hangs up before it shows a certificate
			want = "a proxy on the path opens TLS"
		}
		if _, err = d.call(ctx, c, d.appliance, ""); fault.Of(err) != fault.Denied || !strings.Contains(fault.Text(err), want) {
			t.Errorf("%q: the plain route: %v, want %q", protos, err, want)
		}
		for leaf, want := range map[*tls.Certificate]string{d.appliance: "spiffe://acme.example/appliance/eu-1 false canary-77",
			{}: " true canary-77"} {
			if c, err = d.dial(t, by, corp.Pool(), true); err != nil {
				t.Fatal(err)
			}
			got, err := d.call(ctx, c, leaf, "canary-77")
			if err != nil || got != want {
				t.Errorf("%q: inside: %q, %v, want %q", protos, got, err, want)
			}
		}
		if clear := p.Clear(); !bytes.Contains(clear, []byte(mesh.InnerPath)) || bytes.Contains(clear, []byte("canary-77")) {
			t.Errorf("%q: the proxy's clear text has %d bytes; it must hold the upgrade, and no canary", protos, len(clear))
		}
	}
}

// TestInnerListenerTakesNothingElse: no other path, no request that is no upgrade.
func TestInnerListenerTakesNothingElse(t *testing.T) {
	d := startInner(t)
	tr := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: d.web.Pool()}, ForceAttemptHTTP2: true}
	defer tr.CloseIdleConnections()
	for path, want := range map[string]int{"/": 404, "/demarc.boundary.v1.Bootstrap/Challenge": 404, mesh.InnerPath + "/x": 404,
		mesh.InnerPath: 426} {
		res, err := (&http.Client{Transport: tr}).Post("https://"+d.addr+path, "application/proto", strings.NewReader("x"))
		if err != nil {
			t.Fatal(err)
		}
		_ = res.Body.Close()
		if res.StatusCode != want || res.ProtoMajor != 1 {
			t.Errorf("%s: %s over %s, want %d over HTTP/1.1", path, res.Status, res.Proto, want)
		}
	}
}

// TestInnerListenerBoundsAnonymous: silent upgrades fill the places and no more; a proven connection holds none; and silence ends. The
// places are few, so that all are taken before the first one's time is up, on a machine that is busy, too.
func TestInnerListenerBoundsAnonymous(t *testing.T) {
	const places = 3
	d := startInnerOf(t, places)
	proven, err := d.dial(t, nil, d.web.Pool(), true)
	if err != nil {
		t.Fatal(err)
	}
	defer proven.Close()
	tc, err := mesh.NewHello(mesh.HelloConfig{}).Shake(t.Context(), mesh.LayerChannel, proven, nil,
		identity.Client(identity.Fixed(d.appliance, identity.Pool([]*x509.Certificate{d.vendor.Cert})), identity.WantNode(domain), "h2"))
	if err != nil {
		t.Fatal(err)
	}
	slow, err := tls.Dial("tcp", d.addr, &tls.Config{RootCAs: d.web.Pool()})
	if err != nil {
		t.Fatal(err)
	}
	defer slow.Close()
	if _, err := io.WriteString(slow, "GET "+mesh.InnerPath+" HTTP/1.1\r\nX-A: "); err != nil { // and never ends
		t.Fatal(err)
	}
	silent := []net.Conn{slow}
	var refused error
	for end := time.Now().Add(time.Minute); refused == nil; { // where the machine is so slow that places were left meanwhile, more are taken
		if time.Now().After(end) {
			t.Fatalf("%d silent upgrades were taken, and nobody is refused", len(silent)-1)
		}
		c, err := d.dial(t, nil, d.web.Pool(), true)
		if err != nil {
			if strings.Contains(err.Error(), "503") { // and not its own timeout
				refused = err
			}
			continue
		}
		defer c.Close()
		silent = append(silent, c)
	}
	if taken := len(silent) - 1; taken < places {
		t.Fatalf("after %d upgrades: %v, want 503 after %d", taken, refused, places)
	}
	if _, err := tc.Write([]byte(http2.ClientPreface)); err != nil {
		t.Errorf("the proven one: %v", err)
	}
	for i, c := range silent {
		_ = c.SetReadDeadline(time.Now().Add(time.Minute))
		if _, err := io.Copy(io.Discard, c); errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("the silent connection %d stands", i)
		}
	}
	var after net.Conn
	for end := time.Now().Add(time.Minute); ; { // the server may still be closing some
		if after, err = d.dial(t, nil, d.web.Pool(), true); err == nil || time.Now().After(end) {
			break
		}
	}
	if err != nil {
		t.Fatalf("after the silence: %v", err)
	}
	if _, err := d.call(t.Context(), after, d.appliance, ""); err != nil {
		t.Errorf("after the silence: %v", err)
	}
}

// TestInnerListenerReloadsItsCertificate: a new one is used at once, and a broken one leaves the old one in use.
func TestInnerListenerReloadsItsCertificate(t *testing.T) {
	d := startInner(t)
	serial := func() string {
		t.Helper()
		c, err := tls.Dial("tcp", d.addr, &tls.Config{RootCAs: d.web.Pool()})
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		return c.ConnectionState().PeerCertificates[0].SerialNumber.String()
	}
	first := serial()
	webFiles(t, d.web, d.certFile, d.keyFile)
	second := serial()
	if first == second {
		t.Error("the new certificate is not used")
	}
	if err := os.WriteFile(d.keyFile, []byte("broken"), 0o600); err != nil {
		t.Fatal(err)
	}
	if third := serial(); third != second {
		t.Error("a broken pair changed the certificate")
	}
	if _, err := InnerListener(&configs.InnerDoor{Listen: "127.0.0.1:0", CertFile: d.certFile, KeyFile: d.keyFile}, &tls.Config{}, 1,
		nil, slog.New(slog.DiscardHandler)); fault.Of(err) != fault.Invalid {
		t.Errorf("a start with a broken pair: %v, want invalid", err)
	}
}
