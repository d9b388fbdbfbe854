// SPDX-License-Identifier: Apache-2.0

package appliance

import (
	"context"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/demarc-dev/demarc/daemon/appliance/tailnet"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/ingress"
	"github.com/demarc-dev/demarc/mesh"
	"github.com/demarc-dev/demarc/mesh/meshtest"
)

func authKey(k string) func() (mesh.Credentials, error) {
	return func() (mesh.Credentials, error) { return mesh.Credentials{AuthKey: k}, nil }
}

// says serves one word to each caller until the listener is closed.
func says(l net.Listener, word string) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		_, _ = io.WriteString(c, word)
		_ = c.Close()
	}
}

// hears dials over a node until the word comes or ctx ends.
func hears(ctx context.Context, dial func(context.Context, string) (net.Conn, error), addr string) (string, error) {
	for {
		c, err := dial(ctx, addr)
		if err == nil {
			_ = c.SetDeadline(time.Now().Add(5 * time.Second))
			var b []byte
			if b, err = io.ReadAll(c); err == nil && len(b) > 0 {
				return string(b), c.Close()
			}
			_ = c.Close()
		}
		if ctx.Err() != nil {
			return "", err
		}
	}
}

// TestTwoTailnets: the vendor's tailnet and the customer's, in one process, under two coordinators that give out the same names and
// addresses. A dial on one never goes over the other, what is opened on one is not on the other, and both close without a trace.
func TestTwoTailnets(t *testing.T) {
	tailnets := map[string]*meshtest.Tailnet{}
	for _, name := range []string{"vendor", "customer"} {
		tn, err := meshtest.Start(name + "-key")
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = tn.Close() }()
		tailnets[name] = tn
	}
	dir := t.TempDir()
	for name, tn := range tailnets { // what a process keeps for good
		n, err := mesh.Join(t.Context(), mesh.TailnetConfig{ControlURL: tn.URL, Credentials: authKey(tn.AuthKey), Hostname: "warm",
			Dir: filepath.Join(dir, "warm-"+name)})
		if err != nil {
			t.Fatal(err)
		}
		if err := n.Close(); err != nil {
			t.Fatal(err)
		}
	}
	base := goleak.IgnoreCurrent()
	others := map[string]*mesh.Node{}
	var to string // where both cp answer
	for name, tn := range tailnets {
		n, err := mesh.Join(t.Context(), mesh.TailnetConfig{ControlURL: tn.URL, Credentials: authKey(tn.AuthKey), Hostname: "cp",
			Dir: filepath.Join(dir, "cp-"+name), Doors: true,
			Addresses: []string{"appliance:80"}, Wait: 30 * time.Second})
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = n.Close() }()
		l, err := n.Listen(t.Context(), ":7443")
		if err != nil {
			t.Fatal(err)
		}
		go says(l, name)
		others[name] = n
		at := net.JoinHostPort(n.Addrs()[0].String(), "7443")
		if to != "" && at != to {
			t.Fatalf("the two tailnets give out %s and %s: the test shows less than it says", to, at)
		}
		to = at
	}
	vendor, customer := tailnets["vendor"], tailnets["customer"]
	route := tailnet.NewTransport(mesh.TailnetConfig{ControlURL: vendor.URL, Credentials: authKey(vendor.AuthKey), Hostname: "appliance",
		Dir: filepath.Join(dir, "transport"), Addresses: []string{to}, Wait: 30 * time.Second})
	private := newPrivateSide(mesh.TailnetConfig{ControlURL: customer.URL, Credentials: authKey(customer.AuthKey), Hostname: "appliance",
		Dir: filepath.Join(dir, "ingress")})
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	if _, err := private.Up(ctx); err != nil {
		t.Fatal(err)
	}
	door, err := private.Open(ctx, ":80")
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan struct{})
	go func() { says(door, "the door"); close(served) }()
	for range 3 {
		if got, err := hears(ctx, route.Dial, ""); err != nil || got != "vendor" {
			t.Errorf("over the vendor's tailnet %s answers %q, %v", to, got, err)
		}
	}
	if got, err := hears(ctx, others["customer"].Dial, "appliance:80"); err != nil || got != "the door" {
		t.Errorf("the door on the customer's tailnet answers %q, %v", got, err)
	}
	short, cut := context.WithTimeout(ctx, 2*time.Second)
	defer cut()
	if got, err := hears(short, others["vendor"].Dial, "appliance:80"); err == nil {
		t.Errorf("over the vendor's tailnet the door answers %q", got)
	}
	if _, err := private.Joined().Dial(ctx, to); fault.Of(err) != fault.Denied {
		t.Errorf("the node of the doors dials %s: %v, want denied", to, err)
	}
	if n, err := route.Up(ctx); err != nil {
		t.Error(err)
	} else if _, err := n.Listen(ctx, ":80"); fault.Of(err) != fault.Denied {
		t.Errorf("the node of the route listens: %v, want denied", err)
	}
	keys := map[string]bool{}
	for _, of := range []string{"transport", "ingress"} {
		b, err := os.ReadFile(filepath.Join(dir, of, "tailscaled.state"))
		if err != nil || keys[string(b)] {
			t.Errorf("the state of %s: %v, the other's: %t", of, err, keys[string(b)])
		}
		keys[string(b)] = true
	}
	route.Close()
	private.Close()
	<-served
	for _, n := range others {
		if err := n.Close(); err != nil {
			t.Error(err)
		}
	}
	if err := goleak.Find(base, goleak.IgnoreTopFunction("net/http.(*conn).serve"),
		goleak.IgnoreAnyFunction("tailscale.com/tstest/integration/testcontrol.(*Server).serveNoiseUpgrade"),
		goleak.IgnoreAnyFunction("tailscale.com/derp/derpserver.(*Server).Accept")); err != nil {
		t.Error(err)
	}
}

// TestPrivateSideHoldsNobodyUp: while the coordinator of the customer's tailnet is silent, the lock of the doors is free, nobody waits
// beyond the node's own bound, and the end does not wait for the join.
func TestPrivateSideHoldsNobodyUp(t *testing.T) {
	silent, err := net.Listen("tcp4", "127.0.0.1:0") // accepts, and says nothing
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = silent.Close() }()
	a := &Appliance{private: newPrivateSide(mesh.TailnetConfig{ControlURL: "http://" + silent.Addr().String(), Credentials: authKey("k"),
		Hostname: "a", Dir: t.TempDir()})}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	joins := make(chan error, 1)
	go func() { joins <- a.ready(ctx, ingress.Plan{Doors: []ingress.Door{{Side: ingress.Tailnet}}}) }()
	for !a.private.Joining() {
		select {
		case err := <-joins:
			t.Fatalf("ready ended: %v", err)
		case <-time.After(time.Millisecond):
		}
	}
	if !a.door.TryLock() {
		t.Fatal("the doors are locked for the join")
	}
	a.door.Unlock()
	from := time.Now()
	if _, err := a.private.WhoIs(ctx, netip.MustParseAddrPort("100.64.0.1:1")); fault.Of(err) != fault.NotFound ||
		time.Since(from) > time.Second {
		t.Errorf("WhoIs = %v after %s", err, time.Since(from))
	}
	if _, err := a.private.Open(ctx, ":80"); fault.Of(err) != fault.Unavailable ||
		!strings.Contains(err.Error(), "customer's tailnet is not joined yet") || time.Since(from) > 2*openWait {
		t.Errorf("Open = %v after %s", err, time.Since(from))
	}
	if err := a.ready(ctx, ingress.Plan{Doors: []ingress.Door{{Side: ingress.Host}}}); err != nil {
		t.Errorf("a plan without a door on the tailnet waits for it: %v", err)
	}
	from = time.Now()
	a.private.Stop()
	if err := <-joins; err == nil {
		t.Error("joined a coordinator that says nothing")
	}
	a.private.Close()
	if took := time.Since(from); took > 10*time.Second {
		t.Errorf("the end took %s", took)
	}
	if _, err := a.private.Open(ctx, ":80"); fault.Of(err) != fault.Unavailable {
		t.Errorf("Open after the end = %v", err)
	}
}
