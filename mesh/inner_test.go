// SPDX-License-Identifier: Apache-2.0

package mesh_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/coder/websocket"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/mesh"
	"github.com/demarc-dev/demarc/mesh/roadtest"
)

func newCA(t *testing.T, name string) *roadtest.CA {
	t.Helper()
	ca, err := roadtest.NewCA(name)
	if err != nil {
		t.Fatal(err)
	}
	return ca
}

// webServer serves h with a certificate for 127.0.0.1.
func webServer(t *testing.T, ca *roadtest.CA, h http.HandlerFunc) string {
	t.Helper()
	leaf, err := ca.Leaf("127.0.0.1")
	if err != nil {
		t.Fatal(err)
	}
	s := httptest.NewUnstartedServer(h)
	s.Config.ErrorLog = nil
	s.TLS = &tls.Config{Certificates: []tls.Certificate{*leaf}, NextProtos: []string{"http/1.1"}}
	s.StartTLS()
	t.Cleanup(s.Close)
	return s.Listener.Addr().String()
}

// innerEcho takes the upgrade and echoes what is inside the inner TLS.
func innerEcho(inner *tls.Config) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		c, err := mesh.AcceptInner(w, r)
		if err != nil {
			return
		}
		echo(tls.Server(c, inner))
	}
}

// TestInnerThroughInspection: the proxy opens the outer TLS, and reads nothing of what the inner one carries.
func TestInnerThroughInspection(t *testing.T) {
	vendor, web, corp := newCA(t, "Vendor CA"), newCA(t, "Web CA"), newCA(t, "Corp Inspect CA")
	leaf, err := vendor.Leaf("control.example")
	if err != nil {
		t.Fatal(err)
	}
	at := webServer(t, web, innerEcho(&tls.Config{Certificates: []tls.Certificate{*leaf}}))
	p := &roadtest.Proxy{User: "ann", Password: "pw", CA: corp, Protos: []string{"http/1.1"}}
	p.Opens.Store(true)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	go p.Serve(ln)
	route := func(inner *mesh.Inner) mesh.Route {
		r, err := mesh.NewHTTPS(
			mesh.HTTPS{Addresses: []string{at}, Inner: inner, Proxy: &mesh.Proxy{URL: "http://" + ln.Addr().String(), User: "ann", Password: "pw"}})
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	conf := &tls.Config{RootCAs: vendor.Pool(), ServerName: "control.example"}
	open := func(i *mesh.Inner) (net.Conn, error) {
		raw, err := route(i).Dial(t.Context(), "")
		if err != nil {
			return nil, err
		}
		return mesh.NewHello(mesh.HelloConfig{}).Shake(t.Context(), mesh.LayerChannel, raw, nil, conf)
	}
	url := "wss://" + at + mesh.InnerPath

	if _, err := open(nil); fault.Of(err) != fault.Denied || !strings.Contains(fault.Text(err), "Corp Inspect CA") {
		t.Errorf("the plain route: %v, want the name of the proxy's CA", err)
	}
	if _, err := open(&mesh.Inner{URL: url}); fault.Of(err) != fault.Denied || !strings.Contains(fault.Text(err), "inner_tls.ca_file") {
		t.Errorf("without the proxy's CA: %v", err)
	}
	c, err := open(&mesh.Inner{URL: url, CAs: corp.Pool()})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	canary := bytes.Repeat([]byte("canary-5c1d-"), 100_000) // 1.2 MB: over many messages
	go func() { _, _ = c.Write(canary) }()
	got := make([]byte, len(canary))
	if _, err := io.ReadFull(c, got); err != nil || !bytes.Equal(got, canary) {
		t.Fatalf("the echo differs: %v", err)
	}
	clear := p.Clear()
	if !bytes.Contains(clear, []byte("GET "+mesh.InnerPath)) {
		t.Error("the proxy did not open the outer TLS: the test shows nothing")
	}
	if bytes.Contains(clear, []byte("canary")) {
		t.Error("the proxy read what went through the inner TLS")
	}
	if host, _, _ := net.SplitHostPort(c.RemoteAddr().String()); host != "127.0.0.1" {
		t.Errorf("RemoteAddr = %v", c.RemoteAddr())
	}
}

// TestInnerRefused: each wrong answer to the upgrade has its sentence, and none of them is read without a bound.
func TestInnerRefused(t *testing.T) {
	web := newCA(t, "Web CA")
	raw := func(s string, endless bool) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			c, _, err := w.(http.Hijacker).Hijack()
			if err != nil {
				return
			}
			defer c.Close()
			_, err = io.WriteString(c, s)
			for n := 0; endless && err == nil && n < 100<<20; n += 64 << 10 {
				_, err = io.WriteString(c, "X-A: "+strings.Repeat("x", 64<<10)+"\r\n")
			}
			if endless && err == nil {
				t.Error("100 MiB of headers were read")
			}
		}
	}
	for name, tc := range map[string]struct {
		serve http.HandlerFunc
		url   string
		kind  fault.Kind
		text  string
	}{
		"not found": {http.NotFound, "", fault.Unavailable, "none of its"},
		"redirect": {func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "https://portal.example", http.StatusFound)
		}, "", fault.Unavailable, "none of its"},
		"100 MiB of headers": {raw("HTTP/1.1 101 Switching Protocols\r\n", true), "", fault.Unavailable, "none of its"},
		"not HTTP":           {raw("SSH-2.0\r\n", false), "", fault.Unavailable, "none of its"},
		"another accept": {raw("HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: "+
			"x\r\n\r\n", false), "", fault.Unavailable, "none of its"},
		"of another host": {http.NotFound, "wss://other.example/", fault.Denied, "not for the host"},
	} {
		t.Run(name, func(t *testing.T) {
			at := webServer(t, web, tc.serve)
			if tc.url == "" {
				tc.url = "wss://" + at
			}
			r, err := mesh.NewHTTPS(mesh.HTTPS{Addresses: []string{at}, Inner: &mesh.Inner{URL: tc.url, CAs: web.Pool()}, Wait: 5 * time.Second})
			if err != nil {
				t.Fatal(err)
			}
			if _, err := r.Dial(t.Context(), ""); fault.Of(err) != tc.kind || !strings.Contains(fault.Text(err), tc.text) {
				t.Errorf("Dial = %v, want %s %q", err, tc.kind, tc.text)
			}
		})
	}
	for _, bad := range []string{"", "https://a", "wss://", "wss://u:p@a", "wss://a?x=y", "ws://a"} {
		if _, err := mesh.NewHTTPS(mesh.HTTPS{Addresses: []string{"a:1"}, Inner: &mesh.Inner{URL: bad}}); fault.Of(err) != fault.Invalid {
			t.Errorf("%q: %v, want invalid", bad, err)
		}
	}
}

// TestInnerMessageBound: a peer that sends a message without end is cut off, in both directions of the road.
func TestInnerMessageBound(t *testing.T) {
	web := newCA(t, "Web CA")
	flood := func(ctx context.Context, ws *websocket.Conn) int {
		w, err := ws.Writer(ctx, websocket.MessageBinary)
		n := 0
		for b := make([]byte, 64<<10); err == nil && n < 100<<20; n += len(b) {
			_, err = w.Write(b)
		}
		return n
	}
	read := func(c net.Conn) (int64, error) { defer c.Close(); return io.Copy(io.Discard, c) }
	t.Run("of the server", func(t *testing.T) {
		at := webServer(t, web, func(w http.ResponseWriter, r *http.Request) {
			if ws, err := websocket.Accept(w, r, nil); err == nil {
				defer ws.CloseNow()
				if n := flood(t.Context(), ws); n >= 100<<20 {
					t.Error("100 MiB were taken")
				}
			}
		})
		r, err := mesh.NewHTTPS(mesh.HTTPS{Addresses: []string{at}, Inner: &mesh.Inner{URL: "wss://" + at, CAs: web.Pool()}})
		if err != nil {
			t.Fatal(err)
		}
		c, err := r.Dial(t.Context(), "")
		if err != nil {
			t.Fatal(err)
		}
		if n, err := read(c); err == nil || n > 128<<10 {
			t.Errorf("read %d bytes, %v", n, err)
		}
	})
	t.Run("of the client", func(t *testing.T) {
		type end struct {
			n   int64
			err error
		}
		ends := make(chan end, 1)
		at := webServer(t, web, func(w http.ResponseWriter, r *http.Request) {
			c, err := mesh.AcceptInner(w, r)
			if err != nil {
				t.Error(err)
				return
			}
			n, err := read(c)
			ends <- end{n, err}
		})
		tr := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: web.Pool()}}
		defer tr.CloseIdleConnections()
		ws, _, err := websocket.Dial(t.Context(), "wss://"+at, &websocket.DialOptions{HTTPClient: &http.Client{Transport: tr}})
		if err != nil {
			t.Fatal(err)
		}
		defer ws.CloseNow()
		if n := flood(t.Context(), ws); n >= 100<<20 {
			t.Error("100 MiB were taken")
		}
		if e := <-ends; e.err == nil || e.n > 128<<10 {
			t.Errorf("read %d bytes, %v", e.n, e.err)
		}
	})
}

// TestEnvironmentProxy: the environment counts where it is asked for, by its own rules.
func TestEnvironmentProxy(t *testing.T) {
	up := listen(t, echo)
	_, port, err := net.SplitHostPort(up)
	if err != nil {
		t.Fatal(err)
	}
	asked := make(chan string, 8)
	at := listen(t, func(c net.Conn) {
		defer c.Close()
		req, err := http.ReadRequest(bufio.NewReader(c))
		if err != nil {
			return
		}
		asked <- req.Host + " " + req.Header.Get("Proxy-Authorization")
		_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\n\r\n")
		echo(c)
	})
	for name, tc := range map[string]struct {
		env, no string
		kind    fault.Kind // of the making
		want    string     // what the proxy is asked; "" for nothing
	}{
		"none":              {"", "", "", ""},
		"plain":             {"http://" + at, "", "", "control.example:" + port + " "},
		"without scheme":    {at, "", "", "control.example:" + port + " "},
		"user and password": {"http://ann:s3cret@" + at, "", "", "control.example:" + port + " Basic YW5uOnMzY3JldA=="},
		"not for this":      {"http://" + at, ".example", "", ""},
		"not for all":       {"http://" + at, "*", "", ""},
		"socks":             {"socks5://u:s3cret@" + at, "", fault.Invalid, ""},
		"broken":            {"http://u:s3cret@[::1", "", fault.Invalid, ""},
	} {
		t.Run(name, func(t *testing.T) {
			for _, k := range []string{"https_proxy", "no_proxy", "REQUEST_METHOD"} {
				t.Setenv(k, "")
			}
			t.Setenv("HTTPS_PROXY", tc.env)
			t.Setenv("NO_PROXY", tc.no)
			find, err := mesh.EnvironmentProxy(mesh.Proxy{})
			if fault.Of(err) != tc.kind {
				t.Fatalf("EnvironmentProxy = %v, want %s", err, tc.kind)
			}
			if err != nil {
				if strings.Contains(err.Error(), "s3cret") {
					t.Errorf("the error tells the password: %v", err)
				}
				return
			}
			r, err := mesh.NewHTTPS(mesh.HTTPS{Addresses: []string{"control.example:" + port}, ProxyFor: find, Wait: time.Second})
			if err != nil {
				t.Fatal(err)
			}
			c, err := r.Dial(t.Context(), "")
			if tc.want == "" {
				if err == nil || len(asked) > 0 {
					t.Errorf("it went through the proxy: %v", err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			says(t, c)
			if got := <-asked; got != tc.want {
				t.Errorf("the proxy was asked %q, want %q", got, tc.want)
			}
		})
	}
}
