// SPDX-License-Identifier: Apache-2.0

package ingress_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/http2"

	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/ingress"
)

// raw is an application that answers each connection with the same bytes and keeps what it was sent, head and all that follows.
func raw(t *testing.T, answer string) (addr string, sent func() string) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	var all bytes.Buffer
	var work sync.WaitGroup
	t.Cleanup(func() { _ = l.Close(); work.Wait() })
	work.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			work.Go(func() {
				defer func() { _ = c.Close() }()
				_ = c.SetDeadline(time.Now().Add(20 * time.Second))
				r := bufio.NewReader(c)
				for line := ""; line != "\r\n"; {
					if line, err = r.ReadString('\n'); err != nil {
						return
					}
					mu.Lock()
					all.WriteString(line)
					mu.Unlock()
				}
				_, _ = io.WriteString(c, answer)
				if strings.HasPrefix(answer, "HTTP/1.1 101") {
					rest, _ := io.ReadAll(r)
					mu.Lock()
					all.Write(rest)
					mu.Unlock()
				}
			})
		}
	})
	return l.Addr().String(), func() string {
		mu.Lock()
		defer mu.Unlock()
		return all.String()
	}
}

const okay = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok"

// ask sends bytes to a door and gives the status line of what comes back.
func ask(t *testing.T, g *ingress.Gate, request string) (status, all string) {
	t.Helper()
	c := dialFrom(t, "127.0.0.1", g.Doors()[0].Addr)
	if err := c.SetDeadline(time.Now().Add(30 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(c, request); err != nil {
		t.Fatal(err)
	}
	b, _ := io.ReadAll(c)
	status, _, _ = strings.Cut(string(b), "\r\n")
	return status, string(b)
}

// TestNothingButWebSocketChangesTheProtocol: whatever a caller writes to have a raw way to the application, the application is not asked,
// and the caller gets none (FAULTS.md E1).
func TestNothingButWebSocketChangesTheProtocol(t *testing.T) {
	for name, head := range map[string]string{
		"h2c": "GET / HTTP/1.1\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: " +
			"AAMAAABkAARAAAAAAAIAAAAA\r\n",
		"h2c, settings kept":    "GET / HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\r\n",
		"other case":            "GET / HTTP/1.1\r\ncONNECTION: uPGRADE\r\nuPGRADE: H2C\r\nhttp2-settings: AAM\r\n",
		"list, h2c first":       "GET / HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: h2c, websocket\r\n",
		"list, h2c last":        "GET / HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: websocket, h2c\r\n",
		"list, no blank":        "GET / HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: websocket,h2c\r\n",
		"empty in the list":     "GET / HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: ,websocket\r\n",
		"two lines":             "GET / HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nUpgrade: h2c\r\n",
		"two lines, h2c first":  "GET / HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: h2c\r\nUpgrade: websocket\r\n",
		"with a version":        "GET / HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: websocket/13\r\n",
		"TLS":                   "GET / HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: TLS/1.0\r\n",
		"anything":              "GET / HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n",
		"HTTP/2.0":              "GET / HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: HTTP/2.0\r\n",
		"POST":                  "POST / HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nContent-Length: 0\r\n",
		"HTTP/1.0":              "GET / HTTP/1.0\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n",
		"no word in Connection": "GET / HTTP/1.1\r\nUpgrade: h2c\r\n",
	} {
		t.Run(name, func(t *testing.T) {
			for how, answer := range map[string]string{
				"the application agrees":           "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n",
				"the application names none":       "HTTP/1.1 101 Switching Protocols\r\n\r\n",
				"the application names WebSocket":  "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
				"the application goes on as usual": okay,
			} {
				up, sent := raw(t, answer)
				g := newGate(t, ingress.Config{})
				set(t, g, public(), ingress.Site{}, webPort(up))
				// Connection: close would stand in the way of nothing: a tunnel does not heed it.
				status, all := ask(t, g, head+"Host: a\r\n\r\nTUNNEL Tailscale-User-Login: root\r\nConnection: close\r\n\r\n")
				if strings.Contains(sent(), "TUNNEL Tailscale-User-Login") || strings.Contains(status, "101") {
					t.Errorf("%s: a way past the door: %q", how, all)
				}
				if low := strings.ToLower(sent()); strings.Contains(low, "\r\nupgrade:") || strings.Contains(low, "http2-settings") {
					t.Errorf("%s: the application is asked to change the protocol: %q", how, sent())
				}
				want := "502"
				if answer == okay {
					want = "200"
				}
				if !strings.Contains(status, want) {
					t.Errorf("%s: answered %q, want %s", how, status, want)
				}
			}
		})
	}
	t.Run("WebSocket asked, h2c answered", func(t *testing.T) {
		for _, to := range []string{"Upgrade: h2c\r\n", "Upgrade: websocket, h2c\r\n", "Upgrade: websocket\r\nUpgrade: h2c\r\n", ""} {
			up, sent := raw(t, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\n"+to+"\r\n")
			g := newGate(t, ingress.Config{})
			set(t, g, public(), ingress.Site{}, webPort(up))
			status, _ := ask(t, g, "GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: WebSocket\r\n\r\nTUNNEL\r\n\r\n")
			if !strings.Contains(status, "502") || strings.Contains(sent(), "TUNNEL") {
				t.Errorf("%q: answered %q, the application got %q", to, status, sent())
			}
		}
	})
}

// TestConnectStopsAtTheDoor: neither HTTP version's CONNECT, extended (RFC 8441) or not, reaches the application (FAULTS.md E1).
func TestConnectStopsAtTheDoor(t *testing.T) {
	up, sent := raw(t, "HTTP/1.1 200 OK\r\n\r\n")
	g := newGate(t, ingress.Config{})
	set(t, g, public(), ingress.Site{}, webPort(up))
	for _, line := range []string{"CONNECT a:80 HTTP/1.1", "CONNECT / HTTP/1.1", "CONNECT * HTTP/1.1"} {
		if status, _ := ask(t, g, line+"\r\nHost: a\r\nConnection: close\r\n\r\n"); strings.Contains(status, " 200") {
			t.Errorf("%s: %s", line, status)
		}
	}
	tr := &http2.Transport{AllowHTTP: true, DialTLSContext: func(ctx context.Context, _, _ string, _ *tls.Config) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "tcp", g.Doors()[0].Addr.String())
	}}
	defer tr.CloseIdleConnections()
	for _, protocol := range []string{"", "websocket"} {
		r, err := http.NewRequest(http.MethodConnect, "http://a/", nil)
		if err != nil {
			t.Fatal(err)
		}
		if protocol != "" {
			r.Header[":protocol"] = []string{protocol}
		}
		if resp, err := tr.RoundTrip(r); err == nil {
			_ = resp.Body.Close()
			if resp.StatusCode < 400 {
				t.Errorf("CONNECT of HTTP/2 with protocol %q: %s", protocol, resp.Status)
			}
		}
	}
	if sent() != "" {
		t.Errorf("the application got %q", sent())
	}
}

// TestA101OfHTTP2IsNotPassedOn: an application that speaks HTTP/2 can't send the caller a change of protocol either (FAULTS.md E1).
func TestA101OfHTTP2IsNotPassedOn(t *testing.T) {
	up := app(t, func(w http.ResponseWriter, r *http.Request) {
		if r.ProtoMajor == 2 {
			w.WriteHeader(http.StatusSwitchingProtocols)
		}
		_, _ = io.WriteString(w, "ok")
	})
	g := newGate(t, ingress.Config{})
	set(t, g, public(), ingress.Site{}, webPort(up))
	if _, all := ask(t, g,
		"POST / HTTP/1.1\r\nHost: a\r\nContent-Type: application/grpc\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"); strings.Contains(all,
		" 101 ") {
		t.Errorf("the caller is told to change the protocol: %q", all)
	}
}

// TestAddressGoesThroughUnchanged: path and query reach the application byte for byte (FAULTS.md E2).
func TestAddressGoesThroughUnchanged(t *testing.T) {
	up, sent := raw(t, okay)
	g := newGate(t, ingress.Config{})
	set(t, g, public(), ingress.Site{}, webPort(up))
	for _, at := range []string{
		"/", "/?", "/?a=1;b=2", "/?a;b", "/?100%", "/?a=%zz&b=1", "/?a=%", "/?%", "/?a=b%2", "/?a=1&&b=2&", "/?=", "/?a=1?b=2", "/?q=a+b%20c",
		"/?q=\xff\xfe", "/?q=\"<>^`{|}",
		"/a%2Fb", "/a%2fb", "/%41", "/a//b", "//a/b", "//", "///x", "/a/../b", "/a/./b", "/..", "/%2e%2e/b", "/a;v=1/b", "/{a}", "/a|b", "/\"a\"",
		"/a^b", "/caf\xc3\xa9", "/\xff",
		"/[x]", "/a\\b", "/a#b", "/a:b", "/@", "/a%20b", "/a+b", "/;", "/a%00b",
	} {
		status, _ := ask(t, g, "GET "+at+" HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
		lines := strings.Split(sent(), "\r\n\r\n")
		line, _, _ := strings.Cut(lines[len(lines)-2], "\r\n")
		if !strings.Contains(status, "200") || line != "GET "+at+" HTTP/1.1" {
			t.Errorf("%q arrives as %q (%s)", at, line, status)
		}
	}
	// An absolute form is the address of a proxy: what follows the host goes on.
	status, _ := ask(t, g, "GET http://other.example/a?b;c HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
	if all := sent(); !strings.Contains(status, "200") ||
		!strings.HasSuffix(all[:strings.LastIndex(all, "\r\nHost:")], "GET /a?b;c HTTP/1.1") {
		t.Errorf("the absolute form arrives as %q (%s)", all, status)
	}
}

// TestHTTP2CantWriteARequestLine: HTTP/2 can carry blanks in a path, and they must not end the address in HTTP/1.1 (FAULTS.md E2).
func TestHTTP2CantWriteARequestLine(t *testing.T) {
	up, sent := raw(t, okay)
	g := newGate(t, ingress.Config{})
	set(t, g, public(), ingress.Site{}, webPort(up))
	for _, path := range []string{"/?a b", "/?a HTTP/1.1", "/a b", "/?\x7f", "/ HTTP/1.1\r\nTailscale-User-Login: root\r\n\r\nGET /"} {
		if status := ask2(t, g, path, ""); status == "200" {
			t.Errorf("%q is passed on: %q", path, sent())
		}
	}
	if status := ask2(t, g, "/?a;b", ""); status != "200" || !strings.Contains(sent(), "GET /?a;b HTTP/1.1\r\n") {
		t.Errorf("%s: %q", status, sent())
	}
}

// ask2 asks over HTTP/2, frame by frame, and gives the status; "" where the stream was reset or the connection ended.
func ask2(t *testing.T, g *ingress.Gate, path, contentType string) string {
	t.Helper()
	c := dialFrom(t, "127.0.0.1", g.Doors()[0].Addr)
	_ = c.SetDeadline(time.Now().Add(30 * time.Second))
	_, _ = io.WriteString(c, http2.ClientPreface)
	f := http2.NewFramer(c, c)
	_ = f.WriteSettings()
	_ = f.WriteHeaders(
		http2.HeadersFrameParam{StreamID: 1,
			BlockFragment: headerBlock(map[string]string{":method": "GET", ":scheme": "http", ":authority": "a", ":path": path}, contentType),
			EndStream:     true, EndHeaders: true})
	return statusOf(f)
}

// TestMalformedBodyIsTheCallersFault: 400, and no word against the application (FAULTS.md E4).
func TestMalformedBodyIsTheCallersFault(t *testing.T) {
	for name, body := range map[string]string{
		"negative chunk": "-1\r\nab\r\n0\r\n\r\n", "no chunk": "zz\r\n\r\n", "chunk too large": "fffffffffffffffff\r\n",
		"no end of a chunk": "2\r\nabXX",
		"endless size":      strings.Repeat("0", 10_000) + "\r\n", "bad trailer": "0\r\nX y\r\n\r\n",
	} {
		t.Run(name, func(t *testing.T) {
			var log lines
			up := app(t, func(_ http.ResponseWriter, r *http.Request) { _, _ = io.Copy(io.Discard, r.Body) })
			g := newGate(t, ingress.Config{Logger: slog.New(slog.NewTextHandler(&log, nil))})
			set(t, g, public(), ingress.Site{}, webPort(up))
			status, _ := ask(t, g, "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n"+body)
			if !strings.HasPrefix(status, "HTTP/1.1 400") || strings.Contains(log.String(), "application") {
				t.Errorf("answered %.30q, logged %q", status, log.String())
			}
		})
	}
}

// lines is a log that is read while it is written.
type lines struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lines) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(b)
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// TestRequestTrailers: the values of trailers arrive, but for those that only a door may set (FAULTS.md E6).
func TestRequestTrailers(t *testing.T) {
	up := app(t, func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		_, _ = fmt.Fprintf(w, "sum=%s who=%s more=%s", r.Trailer.Get("X-Sum"), r.Trailer.Get("X-Demarc-Node"), r.Trailer.Get("Grpc-Status"))
	})
	g := newGate(t, ingress.Config{})
	set(t, g, public(), ingress.Site{}, webPort(up))
	for _, kind := range []string{"text/plain", "application/grpc"} { // to the application by HTTP/1.1, and by HTTP/2
		_, all := ask(t, g, "POST / HTTP/1.1\r\nHost: a\r\nContent-Type: "+kind+
			"\r\nTransfer-Encoding: chunked\r\nTrailer: X-Sum, X-Demarc-Node, Grpc-Status\r\nConnection: close\r\n\r\n"+
			"1\r\nx\r\n0\r\nX-Sum: 42\r\nX-Demarc-Node: evil\r\nGrpc-Status: 0\r\n\r\n")
		if !strings.Contains(all, "sum=42 who= more=0") {
			t.Errorf("%s: %q", kind, all)
		}
	}
}

// TestGRPCWebGoesByHTTP1: only gRPC itself is sent to the application by HTTP/2 (FAULTS.md E3).
func TestGRPCWebGoesByHTTP1(t *testing.T) {
	// HTTP/1.1 only
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "ok") }))
	t.Cleanup(srv.Close)
	both := app(t, func(w http.ResponseWriter, r *http.Request) { _, _ = io.WriteString(w, r.Proto) })
	for kind, want := range map[string]string{
		"application/grpc": "HTTP/2.0", "application/grpc+proto": "HTTP/2.0", "Application/GRPC; charset=utf-8": "HTTP/2.0",
		"application/grpc-web": "", "application/grpc-web+proto": "", "application/grpc-web-text": "", "application/grpcx": "",
	} {
		up := srv.Listener.Addr().String()
		if want != "" {
			up = both
		}
		g := newGate(t, ingress.Config{})
		set(t, g, public(), ingress.Site{}, webPort(up))
		status, all := ask(t, g, "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\nContent-Type: "+kind+"\r\nConnection: close\r\n\r\n")
		if !strings.HasSuffix(status, "200 OK") || !strings.Contains(all, want) {
			t.Errorf("%s: %q, want %s", kind, all, want)
		}
	}
}

// TestNamesThatOnlyADoorMaySet: who the caller is and where it comes from is said by the door alone, however a header is spelled (FAULTS.md
// E8).
func TestNamesThatOnlyADoorMaySet(t *testing.T) {
	up, sent := raw(t, okay)
	g := newGate(t, ingress.Config{})
	set(t, g, public(), ingress.Site{}, webPort(up))
	head := ""
	for _, name := range []string{"True-Client-IP", "CF-Connecting-IP", "X-Client-IP", "X-Original-URL", "X-Rewrite-URL", "X.Forwarded.For",
		"Tailscale.User.Login", "x_demarc_node", "X-Demarc.Door",
		"Client-IP", "X-Real_IP", "Forwarded", "X-Forwarded", "Proxy", "X~Forwarded~Host", "tailscale-User-Login"} {
		head += name + ": SPOOF\r\n"
	}
	if status, _ := ask(t, g, "GET / HTTP/1.1\r\nHost: a\r\n"+head+"X-Kept: yes\r\nConnection: close\r\n\r\n"); !strings.Contains(status,
		"200") || strings.Contains(sent(), "SPOOF") || !strings.Contains(sent(), "X-Kept: yes") {
		t.Errorf("%s: the application sees\n%s", status, sent())
	}
}

// TestDoorsWantModernTLS: TLS below 1.2 is refused (MUTANTS.md, ingress/web.go).
func TestDoorsWantModernTLS(t *testing.T) {
	cert, key, pool := writePair(t, t.TempDir(), "app.example")
	files, err := ingress.Load(cert, key)
	if err != nil {
		t.Fatal(err)
	}
	g := newGate(t, ingress.Config{Certificate: files.Certificate})
	set(t, g, public(), ingress.Site{TLS: true}, webPort("127.0.0.1:1"))
	for version, want := range map[uint16]bool{tls.VersionTLS10: false, tls.VersionTLS11: false, tls.VersionTLS12: true,
		tls.VersionTLS13: true} {
		c := tls.Client(dialFrom(t, "127.0.0.1", g.Doors()[0].Addr),
			&tls.Config{RootCAs: pool, ServerName: "app.example", MinVersion: version, MaxVersion: version})
		if err := c.Handshake(); (err == nil) != want {
			t.Errorf("%s: %v", tls.VersionName(version), err)
		}
	}
	if end := files.Expires(); time.Until(end) <= 0 || time.Until(end) > time.Hour {
		t.Errorf("the certificate ends at %s", end)
	}
}

// TestASlowHeaderEnds: who does not finish its header in time is cut off (MUTANTS.md, ingress/web.go).
func TestASlowHeaderEnds(t *testing.T) {
	g := newGate(t, ingress.Config{HeaderWait: 100 * time.Millisecond})
	set(t, g, public(), ingress.Site{}, webPort("127.0.0.1:1"))
	for name, head := range map[string]string{"nothing": "", "half a header": "GET / HTTP/1.1\r\nHost: a\r\n"} {
		c := dialFrom(t, "127.0.0.1", g.Doors()[0].Addr)
		_ = c.SetDeadline(time.Now().Add(time.Minute))
		if _, err := io.WriteString(c, head); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadAll(c); errors.Is(err, context.DeadlineExceeded) || isTimeout(err) {
			t.Errorf("%s: the connection stays: %v", name, err)
		}
	}
}

func isTimeout(err error) bool {
	var n net.Error
	return errors.As(err, &n) && n.Timeout()
}

// watched counts the reads of the connections that a door takes in.
type watched struct {
	reads atomic.Int64
	ended chan struct{}
}

func (w *watched) Open(ctx context.Context, addr string) (net.Listener, error) {
	l, err := ingress.HostNet{}.Open(ctx, addr)
	return watchedListener{l, w}, err
}

type watchedListener struct {
	net.Listener
	w *watched
}

func (l watchedListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return &watchedConn{Conn: c, w: l.w}, nil
}

type watchedConn struct {
	net.Conn
	w    *watched
	once sync.Once
}

func (c *watchedConn) Read(b []byte) (int, error) {
	c.w.reads.Add(1)
	return c.Conn.Read(b)
}

func (c *watchedConn) Close() error {
	c.once.Do(func() { c.w.ended <- struct{}{} })
	return c.Conn.Close()
}

// TestAllowlistBeforeTheFirstByte: who is not listed is closed without a byte of it being read, and without having to send one
// (MUTANTS.md, ingress/conn.go).
func TestAllowlistBeforeTheFirstByte(t *testing.T) {
	up, accepted := echo(t)
	for _, port := range []ingress.Port{tcpPort(up), webPort(up)} {
		w := &watched{ended: make(chan struct{}, 4)}
		g := newGate(t, ingress.Config{Host: w})
		set(t, g, allow("127.0.0.2/32"), ingress.Site{}, port)
		silent := dialFrom(t, "127.0.0.3", g.Doors()[0].Addr)
		_ = silent.SetDeadline(time.Now().Add(time.Minute))
		if _, err := silent.Read(make([]byte, 1)); err == nil || isTimeout(err) {
			t.Fatalf("%s: a silent stranger's connection: %v, want closed", port.Name, err)
		}
		<-w.ended
		loud := dialFrom(t, "127.0.0.3", g.Doors()[0].Addr)
		_, _ = io.WriteString(loud, "GET / HTTP/1.1\r\nHost: a\r\n\r\n")
		<-w.ended
		if n := w.reads.Load(); n != 0 {
			t.Errorf("%s: %d reads from who is not listed", port.Name, n)
		}
	}
	if n := accepted.Load(); n != 0 {
		t.Errorf("the application saw %d connections", n)
	}
}

// TestTwoPrivatePorts: two ports that want one address on the tailnet do not keep each other from having a door (FAULTS.md E6).
func TestTwoPrivatePorts(t *testing.T) {
	a := ingress.Port{Name: "web", Protocol: ingress.HTTP, Widest: fleet.Public, Upstream: "127.0.0.1:20001", TailnetAddr: ":80"}
	b := ingress.Port{Name: "db", Protocol: ingress.TCP, Widest: fleet.Public, Upstream: "127.0.0.1:20002", TailnetAddr: ":80"}
	for _, want := range []struct {
		addr string
		open int
	}{{":80", 1}, {":5432", 2}} {
		b.TailnetAddr = want.addr
		plan, err := ingress.Compile(fleet.Posture{Exposure: fleet.Private}, []ingress.Port{a, b}, ingress.Site{Tailnet: true})
		if err != nil || len(plan.Doors) != want.open || len(plan.Doors)+len(plan.Shut) != 2 {
			t.Fatalf("db at %s: %+v, %v", want.addr, plan, err)
		}
		if want.open == 1 && !strings.Contains(plan.Shut[0].Why, "ingress.tailnet_ports") {
			t.Errorf("%+v", plan.Shut)
		}
	}
}

// TestMappedNetworkIsRefused: IPv4 that is written as IPv6 would let nobody in (FAULTS.md E6).
func TestMappedNetworkIsRefused(t *testing.T) {
	for n, want := range map[string]string{"::ffff:127.0.0.0/104": "127.0.0.0/8", "::ffff:0:0/96": "0.0.0.0/0",
		"::ffff:192.0.2.1/128": "192.0.2.1/32"} {
		if err := allow(n).Check(); err == nil || !strings.Contains(err.Error(), "write "+want) {
			t.Errorf("%s: %v, want a word of %s", n, err, want)
		}
	}
	if err := allow("::/0", "2001:db8::/32", "64:ff9b::/96").Check(); err != nil {
		t.Error(err)
	}
}
