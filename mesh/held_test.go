// SPDX-License-Identifier: Apache-2.0

package mesh_test

import (
	"errors"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/mesh"
	"github.com/demarc-dev/demarc/mesh/meshtest"
)

// crowd is more connections than the library's stack can reset at its end: see quiesce.
const crowd = 2000

// leaks are goroutines of this package's code and of the library's nodes; the tailnet of the test keeps its own.
func leaks(t *testing.T, base goleak.Option) {
	t.Helper()
	if err := goleak.Find(base, goleak.IgnoreTopFunction("net/http.(*conn).serve"),
		goleak.IgnoreAnyFunction("tailscale.com/tstest/integration/testcontrol.(*Server).serveNoiseUpgrade"),
		goleak.IgnoreAnyFunction("tailscale.com/derp/derpserver.(*Server).Accept")); err != nil {
		t.Error(err)
	}
}

// gather has a dial n connections to b's door, and gives both ends of each once a byte has crossed it.
func gather(t *testing.T, a *mesh.Node, l net.Listener, to string, n int) (dialled, taken []net.Conn) {
	t.Helper()
	var mu sync.Mutex
	var work sync.WaitGroup
	turn := make(chan struct{}, 64) // the library drops what comes too fast from one peer
	work.Go(func() {
		for range n {
			c, err := l.Accept()
			if err != nil {
				t.Error(err)
				return
			}
			taken = append(taken, c)
			if _, err := c.Write([]byte("x")); err != nil {
				t.Error(err)
			}
		}
	})
	for range n {
		turn <- struct{}{}
		work.Go(func() {
			defer func() { <-turn }()
			c, err := a.Dial(t.Context(), to)
			if err == nil {
				_, err = io.ReadFull(c, make([]byte, 1))
			}
			if err != nil {
				t.Error(err)
				return
			}
			mu.Lock()
			defer mu.Unlock()
			dialled = append(dialled, c)
		})
	}
	work.Wait()
	if t.Failed() {
		t.FailNow()
	}
	return dialled, taken
}

// ended reads from each connection until it ends.
func ended(t *testing.T, conns []net.Conn) {
	t.Helper()
	until := time.Now().Add(30 * time.Second)
	open := 0
	for _, c := range conns {
		_ = c.SetReadDeadline(until)
		_, err := c.Read(make([]byte, 1))
		if nerr := net.Error(nil); err == nil || errors.As(err, &nerr) && nerr.Timeout() {
			open++
		}
	}
	if open > 0 {
		t.Errorf("%d of %d connections did not end", open, len(conns))
	}
}

// TestCrowdedNodeEnds: a node with more connections than the library can reset ends in time, with all of them: the peer hears of
// it, and no goroutine stays. So does one whose connections were closed just before, and one whose peer is dead.
func TestCrowdedNodeEnds(t *testing.T) {
	tn := tailnet(t)
	warm := mustJoin(t, mesh.TailnetConfig{ControlURL: tn.URL, Credentials: key(tn.AuthKey), Hostname: "warm", Dir: t.TempDir()})
	if err := warm.Close(); err != nil { // what a process keeps for good is there now
		t.Fatal(err)
	}
	for _, x := range []struct {
		name string
		// what happens before the node of the door ends
		before func(t *testing.T, tn *meshtest.Tailnet, a, b *mesh.Node, dialled, taken []net.Conn)
		told   bool // the peer hears of the end
	}{
		{"open", func(*testing.T, *meshtest.Tailnet, *mesh.Node, *mesh.Node, []net.Conn, []net.Conn) {}, true},
		{"just closed", func(_ *testing.T, _ *meshtest.Tailnet, _, _ *mesh.Node, dialled, taken []net.Conn) {
			for i := range taken {
				_, _ = taken[i].Close(), dialled[i].Close()
			}
		}, true},
		{"peer dead", func(t *testing.T, tn *meshtest.Tailnet, a, b *mesh.Node, _, _ []net.Conn) {
			tn.Hide(a.Addrs()[0], true)
			for end := time.Now().Add(30 * time.Second); ; {
				_, err := b.Dial(t.Context(), "a:1")
				if err != nil && strings.Contains(err.Error(), "no peer") {
					return
				}
				if time.Now().After(end) {
					t.Fatalf("b still sees a: %v", err)
				}
			}
		}, false},
	} {
		t.Run(x.name, func(t *testing.T) {
			tn := tailnet(t)
			warm := mustJoin(t, mesh.TailnetConfig{ControlURL: tn.URL, Credentials: key(tn.AuthKey), Hostname: "warm", Dir: t.TempDir()})
			if err := warm.Close(); err != nil { // what a process keeps for good is there now
				t.Fatal(err)
			}
			base := goleak.IgnoreCurrent()
			b := mustJoin(t, mesh.TailnetConfig{ControlURL: tn.URL, Credentials: key(tn.AuthKey), Hostname: "b", Dir: t.TempDir(), Doors: true,
				Addresses: []string{"a:1"}, Wait: time.Second})
			l, err := b.Listen(t.Context(), ":80")
			if err != nil {
				t.Fatal(err)
			}
			to := net.JoinHostPort(b.Addrs()[0].String(), "80")
			a := mustJoin(t, mesh.TailnetConfig{ControlURL: tn.URL, Credentials: key(tn.AuthKey), Hostname: "a", Dir: t.TempDir(),
				Addresses: []string{to}, Wait: 30 * time.Second})
			from := time.Now()
			dialled, taken := gather(t, a, l, to, crowd)
			t.Logf("%d connections in %s", crowd, time.Since(from).Round(time.Millisecond))
			x.before(t, tn, a, b, dialled, taken)
			for _, n := range []struct {
				name string
				node *mesh.Node
			}{{"of the door", b}, {"that dialled", a}} {
				from := time.Now()
				if err := n.node.Close(); err != nil {
					t.Errorf("the node %s: %v", n.name, err)
				}
				t.Logf("the node %s ended in %s", n.name, time.Since(from).Round(time.Millisecond))
				if n.node == b && x.told {
					ended(t, dialled)
				}
			}
			ended(t, taken)
			ended(t, dialled)
			leaks(t, base)
		})
	}
}

// TestNodeHoldsNoMore: what a door takes in beyond the node's bound is closed at once, and has room again when others have ended.
func TestNodeHoldsNoMore(t *testing.T) {
	tn := tailnet(t)
	b := join(t, tn, mesh.TailnetConfig{Hostname: "b", Doors: true, MaxHeld: 3})
	l, err := b.Listen(t.Context(), ":80")
	if err != nil {
		t.Fatal(err)
	}
	to := net.JoinHostPort(b.Addrs()[0].String(), "80")
	a := join(t, tn, mesh.TailnetConfig{Hostname: "a", Addresses: []string{to}, Wait: 30 * time.Second, MaxHeld: 4})
	if n := join(t, tn, mesh.TailnetConfig{Hostname: "c"}).Most(); n != mesh.MaxHeld {
		t.Errorf("a node of which nothing is said holds %d connections, want %d", n, mesh.MaxHeld)
	}
	dialled, taken := gather(t, a, l, to, 3)
	go echoAll(l)
	more, err := a.Dial(t.Context(), to)
	if err != nil {
		t.Fatal(err)
	}
	ended(t, []net.Conn{more})
	if _, err := a.Dial(t.Context(), to); fault.Of(err) != fault.Busy {
		t.Errorf("a fifth dial of a node that holds four = %v, want busy", err)
	}
	_ = more.Close()
	if err := taken[0].Close(); err != nil {
		t.Fatal(err)
	}
	_ = dialled[0].Close()
	c, err := a.Dial(t.Context(), to)
	if err != nil {
		t.Fatal(err)
	}
	if err := roundTrip(c); err != nil {
		t.Errorf("after others have ended: %v", err)
	}
}
