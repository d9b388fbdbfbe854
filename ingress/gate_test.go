// SPDX-License-Identifier: Apache-2.0

package ingress_test

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/ingress"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func prefixes(ss ...string) (out []netip.Prefix) {
	for _, s := range ss {
		out = append(out, netip.MustParsePrefix(s))
	}
	return out
}

func public() fleet.Posture { return fleet.Posture{Exposure: fleet.Public} }

func allow(ss ...string) fleet.Posture {
	return fleet.Posture{Exposure: fleet.Allowlist, Allow: prefixes(ss...)}
}

func newGate(t *testing.T, cfg ingress.Config) *ingress.Gate {
	t.Helper()
	if cfg.Host == nil {
		cfg.Host = ingress.HostNet{}
	}
	g := ingress.New(cfg)
	t.Cleanup(func() {
		if err := g.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
	})
	return g
}

func set(t *testing.T, g *ingress.Gate, p fleet.Posture, site ingress.Site, ports ...ingress.Port) {
	t.Helper()
	plan, err := ingress.Compile(p, ports, site)
	if err != nil {
		t.Fatal(err)
	}
	if err := g.Set(t.Context(), plan); err != nil {
		t.Fatal(err)
	}
}

// echo is an application that sends back each line; it says how many connections it has accepted.
func echo(t *testing.T) (addr string, accepted *atomic.Int64) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	accepted = new(atomic.Int64)
	t.Cleanup(func() { _ = l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			accepted.Add(1)
			go func() {
				defer func() { _ = c.Close() }()
				_, _ = io.Copy(c, c)
			}()
		}
	}()
	return l.Addr().String(), accepted
}

func dialFrom(t *testing.T, source string, to net.Addr) net.Conn {
	t.Helper()
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(source)}, Timeout: 5 * time.Second}
	c, err := d.Dial("tcp", to.String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	if err := c.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	return c
}

func says(c net.Conn, word string) error {
	if _, err := fmt.Fprintf(c, "%s\n", word); err != nil {
		return err
	}
	got := make([]byte, len(word)+1)
	if _, err := io.ReadFull(c, got); err != nil {
		return err
	}
	if string(got) != word+"\n" {
		return fmt.Errorf("got %q, want %q", got, word)
	}
	return nil
}

func tcpPort(up string) ingress.Port {
	return ingress.Port{Name: "mq", Protocol: ingress.TCP, Widest: fleet.Public, Upstream: up, HostAddr: "127.0.0.1:0"}
}

func TestAllowlistAtAccept(t *testing.T) {
	up, accepted := echo(t)
	g := newGate(t, ingress.Config{})
	set(t, g, allow("127.0.0.2/32"), ingress.Site{}, tcpPort(up))
	to := g.Doors()[0].Addr
	if err := says(dialFrom(t, "127.0.0.2", to), "hello"); err != nil {
		t.Errorf("the listed source is refused: %v", err)
	}
	if err := says(dialFrom(t, "127.0.0.3", to), "hello"); err == nil {
		t.Error("a source that is not listed gets through")
	}
	if n := accepted.Load(); n != 1 {
		t.Errorf("the application saw %d connections, want 1", n)
	}
}

func TestChangeKeepsAllowedAndCutsOthers(t *testing.T) {
	up, _ := echo(t)
	g := newGate(t, ingress.Config{})
	set(t, g, public(), ingress.Site{}, tcpPort(up))
	to := g.Doors()[0].Addr
	two, three := dialFrom(t, "127.0.0.2", to), dialFrom(t, "127.0.0.3", to)
	for _, c := range []net.Conn{two, three} {
		if err := says(c, "before"); err != nil {
			t.Fatal(err)
		}
	}
	set(t, g, allow("127.0.0.2/32"), ingress.Site{}, tcpPort(up))
	if got := g.Doors()[0].Addr.String(); got != to.String() {
		t.Errorf("the door moved from %s to %s: its filter shall be swapped in place", to, got)
	}
	if err := says(two, "after"); err != nil {
		t.Errorf("a connection that is still allowed was cut: %v", err)
	}
	if err := says(three, "after"); err == nil {
		t.Error("a connection that is no longer allowed goes on")
	}
	// The way back, and a port that is closed again.
	set(t, g, public(), ingress.Site{}, tcpPort(up))
	if err := says(dialFrom(t, "127.0.0.3", to), "again"); err != nil {
		t.Error(err)
	}
	set(t, g, fleet.Posture{Exposure: fleet.Closed}, ingress.Site{}, tcpPort(up))
	if err := says(two, "closed"); err == nil {
		t.Error("a connection outlives the posture closed")
	}
	if c, err := net.DialTimeout("tcp", to.String(), time.Second); err == nil {
		_ = c.Close()
		t.Error("something still listens under the posture closed")
	}
}

func TestMoveKeepsConnections(t *testing.T) {
	up, _ := echo(t)
	g := newGate(t, ingress.Config{})
	set(t, g, public(), ingress.Site{}, tcpPort(up))
	old := g.Doors()[0].Addr
	c := dialFrom(t, "127.0.0.2", old)
	if err := says(c, "before"); err != nil {
		t.Fatal(err)
	}
	port := tcpPort(up)
	port.HostAddr = "127.0.0.4:0"
	set(t, g, public(), ingress.Site{}, port)
	if err := says(c, "after"); err != nil {
		t.Errorf("moving a door cut a connection: %v", err)
	}
	if err := says(dialFrom(t, "127.0.0.2", g.Doors()[0].Addr), "new"); err != nil {
		t.Error(err)
	}
	if c, err := net.DialTimeout("tcp", old.String(), time.Second); err == nil {
		_ = c.Close()
		t.Error("the old address still listens")
	}
}

func TestFailedChangeLeavesOldDoors(t *testing.T) {
	up, _ := echo(t)
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = taken.Close() }()
	g := newGate(t, ingress.Config{})
	set(t, g, public(), ingress.Site{}, tcpPort(up))
	before, to := g.Plan(), g.Doors()[0].Addr
	c := dialFrom(t, "127.0.0.3", to)
	if err := says(c, "before"); err != nil {
		t.Fatal(err)
	}
	spare := ingress.Port{Name: "aaa", Protocol: ingress.TCP, Widest: fleet.Public, Upstream: up, HostAddr: "127.0.0.5:0"}
	bad := ingress.Port{Name: "bad", Protocol: ingress.TCP, Widest: fleet.Public, Upstream: up, HostAddr: taken.Addr().String()}
	plan, err := ingress.Compile(allow("127.0.0.2/32"), []ingress.Port{spare, bad, tcpPort(up)}, ingress.Site{})
	if err != nil {
		t.Fatal(err)
	}
	if err := g.Set(t.Context(), plan); fault.Of(err) != fault.Unavailable || !strings.Contains(fault.Text(err), `"bad"`) {
		t.Fatalf("Set = %v, want unavailable naming the door", err)
	}
	if got := g.Plan(); got.Posture.Exposure != before.Posture.Exposure || len(g.Doors()) != 1 {
		t.Errorf("the plan is half changed: %+v", got)
	}
	if err := says(c, "after"); err != nil {
		t.Errorf("a failed change cut a connection: %v", err)
	}
	if err := says(dialFrom(t, "127.0.0.3", to), "new"); err != nil {
		t.Errorf("a failed change narrowed the old door: %v", err)
	}
	plan.Doors[0].From = nil
	if err := g.Set(t.Context(), plan); fault.Of(err) != fault.Invalid {
		t.Errorf("Set of a plan with an empty list = %v, want invalid", err)
	}
}

func TestProxyProtocolFromTrustedBalancersOnly(t *testing.T) {
	up, accepted := echo(t)
	g := newGate(t, ingress.Config{HeaderWait: 200 * time.Millisecond})
	site := ingress.Site{Balancers: prefixes("127.0.0.9/32")}
	set(t, g, allow("192.0.2.0/24", "127.0.0.2/32"), site, tcpPort(up))
	to := g.Doors()[0].Addr
	header := func(source string) string { return "PROXY TCP4 " + source + " 127.0.0.1 1000 443\r\n" }
	for name, tc := range map[string]struct {
		from, header string
		ok           bool
	}{
		"balancer names a listed source":   {"127.0.0.9", header("192.0.2.7"), true},
		"balancer names another source":    {"127.0.0.9", header("198.51.100.7"), false},
		"balancer says nothing of use":     {"127.0.0.9", "GET / HTTP/1.1\r\n\r\n", false},
		"balancer for itself, not listed":  {"127.0.0.9", "PROXY UNKNOWN\r\n", false},
		"balancer says nothing":            {"127.0.0.9", "", false},
		"stranger claims a listed source":  {"127.0.0.3", header("192.0.2.7"), false},
		"listed source without a balancer": {"127.0.0.2", "", true},
	} {
		t.Run(name, func(t *testing.T) {
			c := dialFrom(t, tc.from, to)
			if _, err := io.WriteString(c, tc.header); err != nil && tc.ok {
				t.Fatal(err)
			}
			if tc.header == "" && !tc.ok {
				if n, err := c.Read(make([]byte, 1)); err == nil {
					t.Errorf("read %d bytes from a silent door", n)
				}
				return
			}
			if err := says(c, "hello"); (err == nil) != tc.ok {
				t.Errorf("let in = %v (%v), want %v", err == nil, err, tc.ok)
			}
		})
	}
	if n := accepted.Load(); n != 2 {
		t.Errorf("the application saw %d connections, want 2", n)
	}
}

func TestTooManyConnections(t *testing.T) {
	up, _ := echo(t)
	g := newGate(t, ingress.Config{MaxConns: 1})
	set(t, g, public(), ingress.Site{}, tcpPort(up))
	to := g.Doors()[0].Addr
	if err := says(dialFrom(t, "127.0.0.2", to), "first"); err != nil {
		t.Fatal(err)
	}
	if err := says(dialFrom(t, "127.0.0.2", to), "second"); err == nil {
		t.Error("the limit of connections does not hold")
	}
}

func TestHalfCloseGoesThrough(t *testing.T) {
	up, _ := echo(t)
	g := newGate(t, ingress.Config{})
	set(t, g, public(), ingress.Site{}, tcpPort(up))
	c := dialFrom(t, "127.0.0.2", g.Doors()[0].Addr)
	if _, err := io.WriteString(c, "all of it"); err != nil {
		t.Fatal(err)
	}
	if err := c.(*net.TCPConn).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(c); err != nil || string(b) != "all of it" {
		t.Errorf("got %q, %v", b, err)
	}
}

// TestDeadDoorIsOpenedAgain: a listener that fails by itself is named, and the same plan set again heals it.
func TestDeadDoorIsOpenedAgain(t *testing.T) {
	up, _ := echo(t)
	host := &breakable{}
	g := newGate(t, ingress.Config{Host: host})
	set(t, g, public(), ingress.Site{}, tcpPort(up))
	if err := host.last.Close(); err != nil {
		t.Fatal(err)
	}
	deadline := time.Now().Add(5 * time.Second)
	for g.Doors()[0].Err == nil {
		if time.Now().After(deadline) {
			t.Fatal("the dead door is not named")
		}
		<-time.After(time.Millisecond)
	}
	set(t, g, public(), ingress.Site{}, tcpPort(up))
	if err := says(dialFrom(t, "127.0.0.2", g.Doors()[0].Addr), "hello"); err != nil {
		t.Error(err)
	}
}

type breakable struct{ last net.Listener }

func (b *breakable) Open(ctx context.Context, addr string) (net.Listener, error) {
	l, err := ingress.HostNet{}.Open(ctx, addr)
	b.last = l
	return l, err
}

func TestNoSideNoDoor(t *testing.T) {
	g := ingress.New(ingress.Config{})
	plan, err := ingress.Compile(public(), []ingress.Port{tcpPort("127.0.0.1:1")}, ingress.Site{})
	if err != nil {
		t.Fatal(err)
	}
	if err := g.Set(t.Context(), plan); fault.Of(err) != fault.Unavailable {
		t.Errorf("Set = %v, want unavailable", err)
	}
	if err := g.Close(); err != nil {
		t.Fatal(err)
	}
	if err := g.Set(t.Context(),
		ingress.Plan{Version: ingress.Version, Posture: fleet.Posture{Exposure: fleet.Closed}}); fault.Of(err) != fault.Unavailable {
		t.Errorf("Set after Close = %v, want unavailable", err)
	}
}

// webPort and app are used by the tests of HTTP doors.
func webPort(up string) ingress.Port {
	return ingress.Port{Name: "web", Protocol: ingress.HTTP, Widest: fleet.Public, Upstream: up, HostAddr: "127.0.0.1:0", TailnetAddr: ":80"}
}

func app(t *testing.T, h http.HandlerFunc) string {
	t.Helper()
	s := httptest.NewUnstartedServer(h)
	s.Config.Protocols = new(http.Protocols)
	s.Config.Protocols.SetHTTP1(true)
	s.Config.Protocols.SetUnencryptedHTTP2(true)
	s.Start()
	t.Cleanup(s.Close)
	return s.Listener.Addr().String()
}

func request(t *testing.T, c net.Conn, r *http.Request) (*http.Response, string) {
	t.Helper()
	if err := r.Write(c); err != nil {
		t.Fatal(err)
	}
	resp, err := http.ReadResponse(bufio.NewReader(c), r)
	if err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp, string(b)
}
