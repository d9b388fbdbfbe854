// SPDX-License-Identifier: Apache-2.0

package mesh_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"io"
	"log/slog"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/demarc-dev/demarc/api/channel"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/identity"
	"github.com/demarc-dev/demarc/mesh"
	"github.com/demarc-dev/demarc/mesh/roadtest"
)

// box is what stands between a caller and a server in memory: it may swallow a first record that does not fit one packet, or keep back
// what the server says.
type box struct {
	server        *tls.Config
	swallow, dead atomic.Bool
	late          time.Duration // before the server says its first byte
	hang          time.Duration // after which who got nothing hangs up; 0: never

	mu    sync.Mutex
	sizes []int // of the first records
	work  sync.WaitGroup
}

func (b *box) dial(context.Context) (net.Conn, error) {
	near, far := net.Pipe()
	b.work.Go(func() { b.serve(far) })
	return near, nil
}

func (b *box) seen() []int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return append([]int(nil), b.sizes...)
}

func (b *box) serve(c net.Conn) {
	defer func() { _ = c.Close() }()
	head := make([]byte, 5)
	if _, err := io.ReadFull(c, head); err != nil {
		return
	}
	rest := make([]byte, binary.BigEndian.Uint16(head[3:]))
	if _, err := io.ReadFull(c, rest); err != nil {
		return
	}
	first := append(head, rest...)
	b.mu.Lock()
	b.sizes = append(b.sizes, len(first))
	b.mu.Unlock()
	if b.dead.Load() || b.swallow.Load() && roadtest.TooLong(first) {
		if b.hang > 0 {
			time.Sleep(b.hang) // fake time
			return
		}
		_, _ = io.Copy(io.Discard, c) // until the caller gives up
		return
	}
	time.Sleep(b.late)            // fake time
	line := make(chan []byte, 64) // so that the caller's alert does not wait for a server that writes
	b.work.Go(func() {
		defer close(line)
		for {
			p := make([]byte, 16<<10)
			n, err := c.Read(p)
			line <- p[:n]
			if err != nil {
				return
			}
		}
	})
	s := tls.Server(&replayed{Conn: c, r: io.MultiReader(bytes.NewReader(first), &pieces{line: line})}, b.server)
	if s.Handshake() == nil {
		_, _ = io.Copy(io.Discard, s)
	}
}

// pieces reads what comes on a line.
type pieces struct {
	line chan []byte
	left []byte
}

func (p *pieces) Read(b []byte) (int, error) {
	for len(p.left) == 0 {
		next, open := <-p.line
		if !open {
			return 0, io.EOF
		}
		p.left = next
	}
	n := copy(b, p.left)
	p.left = p.left[n:]
	return n, nil
}

type replayed struct {
	net.Conn
	r io.Reader
}

func (r *replayed) Read(b []byte) (int, error) { return r.r.Read(b) }

// helloTest is a hello and a box, in fake time.
type helloTest struct {
	*box
	h   *mesh.Hello
	log *logged
	cfg *tls.Config
}

type logged struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logged) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(b)
}

func (l *logged) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func newHelloTest(t *testing.T, ca *roadtest.CA, cfg mesh.HelloConfig) *helloTest {
	t.Helper()
	leaf, err := ca.LeafUntil("control.example", time.Now().Add(1000*time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	x := &helloTest{box: &box{server: &tls.Config{Certificates: []tls.Certificate{*leaf}, SessionTicketsDisabled: true}}, log: &logged{}}
	cfg.Logger = slog.New(slog.NewTextHandler(x.log, nil))
	x.h = mesh.NewHello(cfg)
	x.cfg = &tls.Config{RootCAs: ca.Pool(), ServerName: "control.example", MinVersion: tls.VersionTLS13}
	return x
}

// shake gives the curve, and how long it took.
func (x *helloTest) shake(t *testing.T) (tls.CurveID, time.Duration, error) {
	t.Helper()
	began := time.Now()
	c, err := x.dial(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	s, err := x.h.Shake(t.Context(), mesh.LayerChannel, c, x.dial, x.cfg)
	if err != nil {
		return 0, time.Since(began), err
	}
	curve := s.ConnectionState().CurveID
	_ = s.NetConn().Close()
	return curve, time.Since(began), nil
}

// TestALargeHelloIsSwallowed: a box that swallows a first record of more than 1,400 bytes does not keep the transport down: the second
// try, without ML-KEM, comes after 11 s, on record, remembered for a while, and then the full form is tried again (FAULTS.md F1).
func TestALargeHelloIsSwallowed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		x := newHelloTest(t, newCA(t, "Vendor CA"), mesh.HelloConfig{})
		defer x.work.Wait()
		expect := func(want tls.CurveID, within time.Duration, small bool) {
			t.Helper()
			curve, took, err := x.shake(t)
			if err != nil || curve != want || took != within {
				t.Fatalf("%s after %s, %v; want %s after %s", curve, took, err, want, within)
			}
			if x.h.Small(mesh.LayerChannel) != small || (mesh.ReasonOf(x.h.Err()) == mesh.HelloTooLarge) != small {
				t.Errorf("small %v, told %v; want %v", x.h.Small(mesh.LayerChannel), x.h.Err(), small)
			}
		}
		expect(tls.X25519MLKEM768, 0, false)
		x.swallow.Store(true)
		expect(tls.X25519, 11*time.Second, true)
		if log := x.log.String(); strings.Count(log, "reason=hello_too_large") != 1 {
			t.Errorf("the log: %s", log)
		}
		expect(tls.X25519, 0, true) // remembered
		x.swallow.Store(false)
		expect(tls.X25519, 0, true) // an outage that is over does not show by itself
		time.Sleep(time.Hour)
		if x.h.Small(mesh.LayerChannel) {
			t.Error("after an hour the small form is still what comes next")
		}
		expect(tls.X25519MLKEM768, 0, false)
		x.swallow.Store(true)
		expect(tls.X25519, 11*time.Second, true)
		time.Sleep(time.Hour)
		expect(tls.X25519, 11*time.Second, true) // and again
	})
}

// TestAServerThatGotNothingHangsUp: its end, after much silence, is as good as no answer; one that comes at once is not (FAULTS.md F1).
func TestAServerThatGotNothingHangsUp(t *testing.T) {
	for hang, small := range map[time.Duration]bool{10 * time.Second: true, time.Second: false} {
		synctest.Test(t, func(t *testing.T) {
			x := newHelloTest(t, newCA(t, "Vendor CA"), mesh.HelloConfig{})
			defer x.work.Wait()
			x.hang = hang
			x.swallow.Store(true)
			if curve, took, err := x.shake(t); (err == nil) != small || took != hang || small && curve != tls.X25519 {
				t.Errorf("%s, %v after %s", curve, err, took)
			}
			if x.h.Small(mesh.LayerChannel) != small {
				t.Errorf("small next: %v", !small)
			}
			time.Sleep(5 * time.Minute) // the first time it may have been a node with too much to do
			if x.h.Small(mesh.LayerChannel) {
				t.Error("small for more than 5 minutes, after the first time")
			}
		})
	}
}

// TestPQRequiredSendsNothingSmall: where the customer's file forbids the small form it is never sent, the full form offers nothing but
// ML-KEM, and the cause is named (FAULTS.md F1).
func TestPQRequiredSendsNothingSmall(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		x := newHelloTest(t, newCA(t, "Vendor CA"), mesh.HelloConfig{PQRequired: true})
		defer x.work.Wait()
		if curve, _, err := x.shake(t); err != nil || curve != tls.X25519MLKEM768 {
			t.Fatal(curve, err)
		}
		x.swallow.Store(true)
		for range 3 {
			_, took, err := x.shake(t)
			if mesh.ReasonOf(err) != mesh.HelloTooLarge || fault.Of(err) != fault.Unavailable || took != 11*time.Second ||
				!strings.Contains(fault.Text(err), "pq: required") {
				t.Errorf("%v after %s", err, took)
			}
		}
		for _, n := range x.seen() {
			if n <= roadtest.Packet-200 {
				t.Errorf("a first record of %d bytes left", n)
			}
		}
		x.swallow.Store(false)
		x.server.CurvePreferences = []tls.CurveID{tls.X25519}
		if curve, _, err := x.shake(t); err == nil {
			t.Errorf("a server without ML-KEM is taken: %s", curve)
		}
	})
}

// TestOnlySwallowingMakesAHelloSmall: what fails in another way is not tried in the small form, and nothing is remembered.
func TestOnlySwallowingMakesAHelloSmall(t *testing.T) {
	for name, tc := range map[string]struct {
		spoil   func(x *helloTest, other *roadtest.CA)
		ok      bool
		records int
		reason  mesh.Reason
	}{
		"slow, but it speaks": {func(x *helloTest, _ *roadtest.CA) { x.late = 10 * time.Second }, true, 1, ""},
		// small, too: it is not the size
		"nobody answers":    {func(x *helloTest, _ *roadtest.CA) { x.dead.Store(true) }, false, 2, mesh.Unreached},
		"another authority": {func(x *helloTest, other *roadtest.CA) { x.cfg.RootCAs = other.Pool() }, false, 1, mesh.TLSOpened},
		"small, of nobody": {func(x *helloTest, other *roadtest.CA) { x.swallow.Store(true); x.cfg.RootCAs = other.Pool() }, false, 2,
			mesh.TLSOpened},
		"no common protocol": {func(x *helloTest, _ *roadtest.CA) {
			x.server.NextProtos, x.cfg.NextProtos = []string{"a"}, []string{"b"}
		}, false, 1, mesh.TLSOpened},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				x := newHelloTest(t, newCA(t, "Vendor CA"), mesh.HelloConfig{})
				defer x.work.Wait()
				tc.spoil(x, newCA(t, "Other CA"))
				curve, _, err := x.shake(t)
				if (err == nil) != tc.ok || err == nil && curve != tls.X25519MLKEM768 || mesh.ReasonOf(err) != tc.reason {
					t.Errorf("%s, %v (%s)", curve, err, mesh.ReasonOf(err))
				}
				if n := len(x.seen()); n != tc.records || x.h.Small(mesh.LayerChannel) || x.h.Err() != nil {
					t.Errorf("%d first records, small next %v, told %v", n, x.h.Small(mesh.LayerChannel), x.h.Err())
				}
			})
		})
	}
	t.Run("given up", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			x := newHelloTest(t, newCA(t, "Vendor CA"), mesh.HelloConfig{})
			defer x.work.Wait()
			x.swallow.Store(true)
			ctx, cancel := context.WithCancel(t.Context())
			time.AfterFunc(time.Second, cancel)
			c, _ := x.dial(ctx)
			if _, err := x.h.Shake(ctx, mesh.LayerChannel, c, x.dial, x.cfg); err == nil || len(x.seen()) != 1 {
				t.Errorf("%v after %d first records", err, len(x.seen()))
			}
		})
	})
}

// captured keeps what is written first, and says nothing.
type captured struct {
	net.Conn
	b []byte
}

var errCaptured = errors.New("enough")

func (c *captured) Write(b []byte) (int, error) {
	c.b = append(c.b, b...)
	return 0, errCaptured
}

// TestHelloSizes are golden: the size of each first message, with ML-KEM and without (FAULTS.md F1). A change of Go's that makes
// the small one not fit one packet is seen here.
func TestHelloSizes(t *testing.T) {
	leaf := identity.Client(identity.Fixed(&tls.Certificate{}, x509.NewCertPool()), identity.WantNode("acme.example"), channel.Proto)
	web := &tls.Config{MinVersion: tls.VersionTLS12, ServerName: "proxy.globex.example", NextProtos: []string{"http/1.1"}}
	for name, tc := range map[string]struct {
		cfg    *tls.Config
		curves []tls.CurveID
		want   int
	}{
		"channel":           {leaf, mesh.FullCurves, 1470},
		"channel, required": {leaf, mesh.OnlyCurves, 1430},
		"channel, small":    {leaf, mesh.SmallCurves, 248},
		"proxy":             {web, mesh.FullCurves, 1519},
		"proxy, small":      {web, mesh.SmallCurves, 297},
	} {
		cfg := tc.cfg.Clone()
		cfg.CurvePreferences = tc.curves
		near, far := net.Pipe()
		c := &captured{Conn: near}
		_ = tls.Client(c, cfg).Handshake()
		_, _ = near.Close(), far.Close()
		if len(c.b) != tc.want {
			t.Errorf("%s: %d bytes, want %d", name, len(c.b), tc.want)
		}
		if small := strings.Contains(name, "small"); small == roadtest.TooLong(c.b) {
			t.Errorf("%s: a box that swallows what does not fit one packet has it: %v", name, roadtest.TooLong(c.b))
		}
	}
}

// TestEveryLayersHelloIsTriedSmall: the TLS to a proxy and the outer TLS are tried again without ML-KEM as the channel's is.
func TestEveryLayersHelloIsTriedSmall(t *testing.T) {
	vendor, corp := newCA(t, "Vendor CA"), newCA(t, "Corp CA")
	leaf, err := vendor.Leaf("control.example")
	if err != nil {
		t.Fatal(err)
	}
	swallowed := func(target string) (string, *roadtest.Relay) {
		r := &roadtest.Relay{Target: target}
		r.Set(roadtest.Swallow)
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = ln.Close(); r.Cut() })
		go r.Serve(ln)
		return ln.Addr().String(), r
	}
	inner := &tls.Config{Certificates: []tls.Certificate{*leaf}}
	hello := mesh.NewHello(mesh.HelloConfig{Wait: 2 * time.Second})

	t.Run("outer", func(t *testing.T) {
		at, r := swallowed(webServer(t, corp, innerEcho(inner)))
		route, err := mesh.NewHTTPS(mesh.HTTPS{Addresses: []string{at}, Hello: hello, Wait: time.Minute,
			Inner: &mesh.Inner{URL: "wss://" + at + mesh.InnerPath, CAs: corp.Pool()}})
		if err != nil {
			t.Fatal(err)
		}
		c, err := route.Dial(t.Context(), "")
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = c.Close() }()
		if r.Swallowed() != 1 || !hello.Small(mesh.LayerOuter) || hello.Small(mesh.LayerChannel) {
			t.Errorf("swallowed %d, small %v", r.Swallowed(), hello.Small(mesh.LayerOuter))
		}
	})
	t.Run("proxy", func(t *testing.T) {
		up := listen(t, echo)
		own, err := corp.Leaf("127.0.0.1")
		if err != nil {
			t.Fatal(err)
		}
		ln, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{Certificates: []tls.Certificate{*own}})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = ln.Close() })
		p := &roadtest.Proxy{}
		go p.Serve(ln)
		at, r := swallowed(ln.Addr().String())
		for _, required := range []bool{false, true} {
			h := hello
			if required {
				h = mesh.NewHello(mesh.HelloConfig{Wait: 2 * time.Second, PQRequired: true})
			}
			route, err := mesh.NewHTTPS(
				mesh.HTTPS{Addresses: []string{up}, Hello: h, Wait: time.Minute, Proxy: &mesh.Proxy{URL: "https://" + at, CAs: corp.Pool()}})
			if err != nil {
				t.Fatal(err)
			}
			c, err := route.Dial(t.Context(), "")
			if required {
				if mesh.ReasonOf(err) != mesh.HelloTooLarge || !strings.Contains(fault.Text(err), "pq: required") {
					t.Errorf("pq: required: %v", err)
				}
				continue
			}
			if err != nil {
				t.Fatal(err)
			}
			says(t, c)
			_ = c.Close()
			if r.Swallowed() != 1 || !h.Small(mesh.LayerProxy) {
				t.Errorf("swallowed %d, small %v", r.Swallowed(), h.Small(mesh.LayerProxy))
			}
		}
	})
}

// TestAStaleSessionIsRenewed: a session that could be better now has a successor over the same route, which is up before it ends.
func TestAStaleSessionIsRenewed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := &fake{name: "a"}
		var stale atomic.Bool
		s, err := mesh.NewSwitch(mesh.SwitchConfig{Routes: []mesh.Route{a}, Rand: func() float64 { return 0.5 },
			Stale: func(string) bool { return stale.CompareAndSwap(true, false) }})
		if err != nil {
			t.Fatal(err)
		}
		m := runSwitch(t, s, a)
		time.Sleep(10 * time.Minute)
		synctest.Wait()
		if n := a.dials.Load(); n != 1 {
			t.Fatalf("%d dials while nothing was stale", n)
		}
		stale.Store(true)
		time.Sleep(2 * time.Minute)
		synctest.Wait()
		if n := a.dials.Load(); n != 2 || m.low.Load() < 1 || m.now.Load() != 1 || s.Current() != "a" {
			t.Errorf("%d dials, at least %d sessions, %d now, current %q", n, m.low.Load(), m.now.Load(), s.Current())
		}
		a.down.Store(true) // a try that fails leaves the one that is up
		stale.Store(true)
		time.Sleep(2 * time.Minute)
		synctest.Wait()
		if n := a.dials.Load(); n != 3 || s.Current() != "a" || s.Last("a") != nil {
			t.Errorf("%d dials, current %q, last %v", n, s.Current(), s.Last("a"))
		}
	})
}
