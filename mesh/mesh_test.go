// SPDX-License-Identifier: Apache-2.0

package mesh_test

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/mesh"
	"github.com/demarc-dev/demarc/mesh/roadtest"
)

func listen(t *testing.T, serve func(net.Conn)) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go serve(c)
		}
	}()
	return l.Addr().String()
}

func echo(c net.Conn) {
	_, _ = io.Copy(c, c)
	_ = c.Close()
}

func echoAll(l net.Listener) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		go echo(c)
	}
}

func says(t *testing.T, c net.Conn) {
	t.Helper()
	if err := roundTrip(c); err != nil {
		t.Fatal(err)
	}
}

func roundTrip(c net.Conn) error {
	if err := c.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		return err
	}
	if _, err := io.WriteString(c, "hello"); err != nil {
		return err
	}
	got := make([]byte, 5)
	if _, err := io.ReadFull(c, got); err != nil || string(got) != "hello" {
		return fmt.Errorf("got %q, %w", got, err)
	}
	return nil
}

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestDirectRoutes(t *testing.T) {
	up := listen(t, echo)
	for name, open := range map[string]func([]string) (mesh.Route, error){
		mesh.NameHTTPS:       func(a []string) (mesh.Route, error) { return mesh.NewHTTPS(mesh.HTTPS{Addresses: a}) },
		mesh.NamePrivateLink: func(a []string) (mesh.Route, error) { return mesh.NewPrivateLink(mesh.PrivateLink{Addresses: a}) },
	} {
		t.Run(name, func(t *testing.T) {
			r, err := open([]string{"127.0.0.1:1", up})
			if err != nil {
				t.Fatal(err)
			}
			if r.Name() != name {
				t.Errorf("Name = %q", r.Name())
			}
			c, err := r.Dial(t.Context(), "")
			if err != nil {
				t.Fatal(err)
			}
			says(t, c)
			_ = c.Close()
			if _, err := r.Dial(t.Context(), listen(t, echo)); fault.Of(err) != fault.Denied {
				t.Errorf("Dial of what is not listed = %v, want denied", err)
			}
			if _, err := r.Dial(t.Context(), "127.0.0.1:1"); fault.Of(err) != fault.Unavailable {
				t.Errorf("Dial of a closed port = %v, want unavailable", err)
			}
			for _, bad := range [][]string{nil, {"x"}, {":443"}, {"a:0"}, {"a:b"}, make([]string, mesh.MaxAddresses+1)} {
				if _, err := open(bad); fault.Of(err) != fault.Invalid {
					t.Errorf("%q: %v, want invalid", bad, err)
				}
			}
		})
	}
}

// proxy is a CONNECT proxy with Basic authentication.
func proxy(user, password string) func(net.Conn) {
	return func(c net.Conn) {
		defer func() { _ = c.Close() }()
		r := bufio.NewReader(c)
		req, err := http.ReadRequest(r)
		if err != nil {
			return
		}
		req.Header.Set("Authorization", req.Header.Get("Proxy-Authorization"))
		if u, p, ok := req.BasicAuth(); !ok || u != user || p != password {
			_, _ = io.WriteString(c, "HTTP/1.1 407 Proxy Authentication Required\r\nProxy-Authenticate: Basic realm=\"x\"\r\n\r\n")
			return
		}
		up, err := net.Dial("tcp", req.Host)
		if err != nil {
			_, _ = io.WriteString(c, "HTTP/1.1 502 Bad Gateway\r\n\r\n")
			return
		}
		defer func() { _ = up.Close() }()
		_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\n\r\nAHEAD")
		go func() { _, _ = io.Copy(up, r); _ = up.Close() }()
		_, _ = io.Copy(c, up)
	}
}

func TestProxy(t *testing.T) {
	up := listen(t, echo)
	at := "http://" + listen(t, proxy("ann", "s3cret"))
	answers := func(s string) string {
		return "http://" + listen(t, func(c net.Conn) {
			_, _ = http.ReadRequest(bufio.NewReader(c))
			_, _ = io.WriteString(c, s)
			_ = c.Close()
		})
	}
	for name, tc := range map[string]struct {
		proxy mesh.Proxy
		kind  fault.Kind
		text  string
	}{
		"right":          {mesh.Proxy{URL: at, User: "ann", Password: "s3cret"}, "", ""},
		"wrong password": {mesh.Proxy{URL: at, User: "ann", Password: "wr0ng"}, fault.Denied, "refuses the user and password"},
		"none":           {mesh.Proxy{URL: at}, fault.Denied, "set proxy.auth_file"},
		"forbidden":      {mesh.Proxy{URL: answers("HTTP/1.1 403 Forbidden\r\n\r\n")}, fault.Denied, "forbids"},
		"redirect":       {mesh.Proxy{URL: answers("HTTP/1.1 302 Found\r\nLocation: http://portal/\r\n\r\n")}, fault.Unavailable, "none of its"},
		"not HTTP":       {mesh.Proxy{URL: answers("SSH-2.0\r\n")}, fault.Unavailable, "none of its"},
		"endless header": {mesh.Proxy{URL: answers("HTTP/1.1 200 OK\r\nX: " + strings.Repeat("x", 1<<20))}, fault.Unavailable, "none of its"},
		"not there":      {mesh.Proxy{URL: "http://127.0.0.1:1"}, fault.Unavailable, "none of its"},
	} {
		t.Run(name, func(t *testing.T) {
			r, err := mesh.NewHTTPS(mesh.HTTPS{Addresses: []string{up}, Proxy: &tc.proxy})
			if err != nil {
				t.Fatal(err)
			}
			c, err := r.Dial(t.Context(), "")
			if fault.Of(err) != tc.kind || !strings.Contains(fault.Text(err), tc.text) {
				t.Fatalf("Dial = %v, want %s %q", err, tc.kind, tc.text)
			}
			if err != nil {
				if strings.Contains(err.Error(), "s3cret") || strings.Contains(err.Error(), "wr0ng") {
					t.Errorf("the error tells the password: %v", err)
				}
				return
			}
			defer func() { _ = c.Close() }()
			ahead := make([]byte, 5)
			if _, err := io.ReadFull(c, ahead); err != nil || string(ahead) != "AHEAD" {
				t.Fatalf("bytes behind the proxy's answer: %q, %v", ahead, err)
			}
			says(t, c)
		})
	}
	for _, bad := range []mesh.Proxy{{URL: ""}, {URL: "socks5://a:1"}, {URL: "http://u:p@a:1"}, {URL: "http://a:1/x"},
		{URL: "http://a:1", User: "a:b"}, {URL: "http://a:1", User: "a", Password: "b\r\nX: y"}} {
		if _, err := mesh.NewHTTPS(mesh.HTTPS{Addresses: []string{up}, Proxy: &bad}); fault.Of(err) != fault.Invalid {
			t.Errorf("%q: %v, want invalid", bad.URL, err)
		}
	}
}

// TestProxyOfAPrivateCA: the proxy is reached by TLS. What is wrong with its own certificate is told by name, and it is asked for nothing.
func TestProxyOfAPrivateCA(t *testing.T) {
	up := listen(t, echo)
	ours, err := roadtest.NewCA("Corp Proxy CA")
	if err != nil {
		t.Fatal(err)
	}
	other, err := roadtest.NewCA("Corp Other CA")
	if err != nil {
		t.Fatal(err)
	}
	asked := make(chan struct{}, 1)
	behind := func(ca *roadtest.CA, host string, end time.Duration) string {
		leaf, err := ca.LeafUntil(host, time.Now().Add(end))
		if err != nil {
			t.Fatal(err)
		}
		plain := proxy("ann", "s3cret")
		return "https://" + listen(t, func(c net.Conn) {
			s := tls.Server(c, &tls.Config{Certificates: []tls.Certificate{*leaf}})
			if s.Handshake() == nil {
				select {
				case asked <- struct{}{}:
				default:
				}
			}
			plain(s)
		})
	}
	for name, tc := range map[string]struct {
		at     string
		cas    *x509.CertPool
		kind   fault.Kind
		reason mesh.Reason
		text   string
	}{
		"right": {behind(ours, "127.0.0.1", time.Hour), ours.Pool(), "", "", ""},
		"another CA": {behind(other, "127.0.0.1", time.Hour), ours.Pool(), fault.Denied, mesh.Settings,
			`was issued by "Corp Other CA", which this machine does not trust`},
		"the system's": {behind(ours, "127.0.0.1", time.Hour), nil, fault.Denied, mesh.Settings, "put its CA in ca_file of this transport"},
		"another host": {behind(ours, "proxy.example", time.Hour), ours.Pool(), fault.Denied, mesh.Settings, "not for the host of proxy.url"},
		"expired":      {behind(ours, "127.0.0.1", -time.Minute), ours.Pool(), fault.Expired, mesh.ClockOff, "check the clock first"},
		"without TLS": {"https://" + listen(t, func(c net.Conn) { _, _ = io.WriteString(c, "HTTP/1.1 400 Bad Request\r\n\r\n"); _ = c.Close() }),
			ours.Pool(), fault.Denied, mesh.Settings, "does not speak TLS"},
		"hangs up": {"https://" + listen(t, func(c net.Conn) { _ = c.Close() }), ours.Pool(), fault.Unavailable, mesh.Unreached, "none of its"},
	} {
		t.Run(name, func(t *testing.T) {
			r, err := mesh.NewHTTPS(
				mesh.HTTPS{Addresses: []string{up}, Proxy: &mesh.Proxy{URL: tc.at, User: "ann", Password: "s3cret", CAs: tc.cas}})
			if err != nil {
				t.Fatal(err)
			}
			select {
			case <-asked:
			default:
			}
			c, err := r.Dial(t.Context(), "")
			if fault.Of(err) != tc.kind || !strings.Contains(fault.Text(err), tc.text) || mesh.ReasonOf(err) != tc.reason {
				t.Fatalf("Dial = %v (%s), want %s %q (%s)", err, mesh.ReasonOf(err), tc.kind, tc.text, tc.reason)
			}
			if err != nil {
				if len(asked) > 0 {
					t.Error("the proxy was believed")
				}
				return
			}
			defer func() { _ = c.Close() }()
			if _, err := io.ReadFull(c, make([]byte, 5)); err != nil { // what the proxy says ahead
				t.Fatal(err)
			}
			says(t, c)
		})
	}
}

func TestProxySilent(t *testing.T) {
	held := make(chan struct{})
	defer close(held)
	at := "http://" + listen(t, func(c net.Conn) { <-held; _ = c.Close() })
	r, err := mesh.NewHTTPS(mesh.HTTPS{Addresses: []string{"127.0.0.1:1"}, Proxy: &mesh.Proxy{URL: at}, Wait: 50 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.Dial(t.Context(), ""); fault.Of(err) != fault.Unavailable {
		t.Errorf("Dial through a silent proxy = %v, want unavailable", err)
	}
}

func authority(t *testing.T, issuer string, notAfter time.Time) (tls.Certificate, *x509.CertPool) {
	t.Helper()
	make1 := func(tmpl, parent *x509.Certificate, key, signer *ecdsa.PrivateKey) *x509.Certificate {
		der, err := x509.CreateCertificate(rand.Reader, tmpl, parent, key.Public(), signer)
		if err != nil {
			t.Fatal(err)
		}
		c, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	var keys [2]*ecdsa.PrivateKey
	for i := range keys {
		var err error
		if keys[i], err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
			t.Fatal(err)
		}
	}
	far := time.Now().Add(time.Hour)
	caT := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: issuer}, NotAfter: far, IsCA: true,
		BasicConstraintsValid: true}
	ca := make1(caT, caT, keys[0], keys[0])
	leaf := make1(&x509.Certificate{SerialNumber: big.NewInt(2), DNSNames: []string{"control.example"}, NotAfter: notAfter}, ca, keys[1],
		keys[0])
	pool := x509.NewCertPool()
	pool.AddCert(ca)
	return tls.Certificate{Certificate: [][]byte{leaf.Raw, ca.Raw}, PrivateKey: keys[1]}, pool
}

func TestInspectionIsNamed(t *testing.T) {
	soon := time.Now().Add(time.Hour)
	vendor, roots := authority(t, "Vendor CA", soon)
	middle, _ := authority(t, "Corp Inspect\nCA", soon)
	long, _ := authority(t, strings.Repeat("z", 4000), soon)
	old, oldRoots := authority(t, "Vendor CA", time.Now().Add(-time.Hour))
	serve := func(cert tls.Certificate) string {
		return listen(t, func(c net.Conn) { echo(tls.Server(c, &tls.Config{Certificates: []tls.Certificate{cert}})) })
	}
	for name, tc := range map[string]struct {
		addr  string
		roots *x509.CertPool
		kind  fault.Kind
		text  string
	}{
		"vendor": {serve(vendor), roots, "", ""},
		"inspected": {serve(middle), roots, fault.Denied,
			`the certificate was issued by "Corp Inspect\nCA", which is not your vendor: a proxy on the path opens TLS`},
		"long name": {serve(long), roots, fault.Denied, `issued by "` + strings.Repeat("z", 100) + `", which`},
		"expired":   {serve(old), oldRoots, fault.Expired, "check the clock"},
		"portal": {listen(t, func(c net.Conn) { _, _ = io.WriteString(c, "HTTP/1.1 302 Found\r\n\r\n"); echo(c) }), roots, fault.Denied,
			"does not speak TLS"},
		"hangs up": {listen(t, func(c net.Conn) { _ = c.Close() }), roots, fault.Unavailable, ""},
	} {
		for _, own := range []bool{false, true} { // verified by crypto/tls, or by the caller's own function
			t.Run(fmt.Sprintf("%s own=%v", name, own), func(t *testing.T) {
				r, err := mesh.NewHTTPS(mesh.HTTPS{Addresses: []string{tc.addr}})
				if err != nil {
					t.Fatal(err)
				}
				raw, err := r.Dial(t.Context(), "")
				if err != nil {
					t.Fatal(err)
				}
				cfg := &tls.Config{RootCAs: tc.roots, ServerName: "control.example"}
				if own {
					cfg.InsecureSkipVerify = true
					cfg.VerifyConnection = func(cs tls.ConnectionState) error {
						_, err := cs.PeerCertificates[0].Verify(x509.VerifyOptions{Roots: tc.roots})
						return err
					}
				}
				ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
				defer cancel()
				c, err := mesh.NewHello(mesh.HelloConfig{}).Shake(ctx, mesh.LayerChannel, raw, nil, cfg)
				if fault.Of(err) != tc.kind || !strings.Contains(fault.Text(err), tc.text) {
					t.Fatalf("Handshake = %v, want %s %q", err, tc.kind, tc.text)
				}
				if err == nil {
					says(t, c)
					_ = c.Close()
				}
			})
		}
	}
}

// TestWhyNobodyAnswers (FAULTS.md F2): a port where nothing listens, a name that does not resolve, a proxy that is away and a silence are
// told apart, and each address is told with what was met there.
func TestWhyNobodyAnswers(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	shut := l.Addr().String()
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		addresses []string
		proxy     *mesh.Proxy
		wait      time.Duration
		want      mesh.Reason
		texts     []string
	}{
		"nothing listens":   {[]string{shut}, nil, 0, mesh.ConnRefused, []string{shut + ": connection refused"}},
		"nor at the second": {[]string{shut, shut}, nil, 0, mesh.ConnRefused, []string{"none of its 2 addresses"}},
		"the name is none": {[]string{"a.invalid:443"}, nil, 5 * time.Second, mesh.NameUnknown,
			[]string{"a.invalid:443: the name does not resolve"}},
		"one of each": {[]string{shut, "a.invalid:443"}, nil, 5 * time.Second, mesh.Unreached,
			[]string{"connection refused", "does not resolve"}},
		"no answer": {[]string{shut}, nil, time.Nanosecond, mesh.Unreached, []string{"no answer within 1ns"}},
		"the proxy is away": {[]string{"node:443"}, &mesh.Proxy{URL: "http://" + shut}, 0, mesh.ProxyUnreached,
			[]string{"the proxy does not answer: connection refused"}},
	} {
		t.Run(name, func(t *testing.T) {
			r, err := mesh.NewHTTPS(mesh.HTTPS{Addresses: tc.addresses, Proxy: tc.proxy, Wait: tc.wait})
			if err != nil {
				t.Fatal(err)
			}
			_, err = r.Dial(t.Context(), "")
			if got := mesh.ReasonOf(err); got != tc.want || fault.Of(err) != fault.Unavailable {
				t.Errorf("%v: %q, want %q", err, got, tc.want)
			}
			for _, text := range tc.texts {
				if !strings.Contains(fault.Text(err), text) {
					t.Errorf("%q does not say %q", fault.Text(err), text)
				}
			}
		})
	}
}
