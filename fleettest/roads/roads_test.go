// SPDX-License-Identifier: Apache-2.0

package roads

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/demarc-dev/demarc/mesh/roadtest"
)

var only = flag.String("fault", "", "play this fault alone")

func TestMain(m *testing.M) {
	if len(os.Args) == 4 && os.Args[1] == "token" {
		if err := printToken(os.Args[2], os.Args[3]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

// needs skips where these tests were not asked for; where they were, what is missing is a failure.
func needs(t *testing.T) {
	t.Helper()
	if os.Getenv("DEMARC_NETNS") == "" {
		t.Skip("real processes in network namespaces: make test-roads runs them, as root")
	}
	if os.Geteuid() != 0 {
		t.Fatal("needs root")
	}
	for _, tool := range []string{"ip", "iptables"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Fatalf("needs %s", tool)
		}
	}
	if err := command("ip", "netns", "list"); err != nil {
		t.Fatal(err)
	}
}

// gap is written as it was seen: once a second.
func gap(d time.Duration) string {
	if d < time.Second {
		return "below 1000 ms"
	}
	return fmt.Sprintf("%d ms", d.Milliseconds())
}

// programs builds demarc and demarcd.
func programs(t *testing.T) string {
	t.Helper()
	bin := t.TempDir()
	if out, err := exec.Command("go", "build", "-o", bin+"/", "../../cmd/demarc", "../../cmd/demarcd").CombinedOutput(); err != nil {
		t.Fatalf("go build: %v: %s", err, out)
	}
	return bin
}

// innerPath is what a proxy that opens TLS sees of an inner connection.
const innerPath = "/demarc/inner"

// TestInnerTLSThroughInspection: both roads lead through a proxy that opens TLS. The plain one fails with the name of the proxy's CA, the
// inner one enrols the appliance and carries the channel, and the proxy reads nothing of it.
func TestInnerTLSThroughInspection(t *testing.T) {
	needs(t)
	bin := programs(t)
	dir, err := os.MkdirTemp("", "dmroads")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	net, err := newTopology(len(faults), asks)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := net.close(); err != nil {
			t.Error(err)
		}
	}()
	net.proxy.Opens.Store(true)
	p := &pair{net: net, bin: bin, dir: dir}
	defer func() {
		if err := p.close(); err != nil {
			t.Error(err)
		}
	}()
	if err := p.begin(ctx, asks, true, "https"); err != nil {
		t.Fatal(err)
	}
	if c, err := p.probe(ctx, "200"); err != nil || c.Echoed != 200 {
		t.Errorf("%+v, %v", c, err)
	}
	out, err := p.customer(ctx, "transport", "use", "plain").CombinedOutput()
	if err == nil || !strings.Contains(string(out), "Corp Inspect CA") {
		t.Errorf("the plain road: %v: %s", err, out)
	}
	clear := net.proxy.Clear()
	if !bytes.Contains(clear, []byte(innerPath)) || len(clear) < 10_000 {
		t.Errorf("the proxy read %d bytes and no upgrade: the test shows nothing", len(clear))
	}
	for _, canary := range []string{appliance, domain, "spiffe://"} {
		if bytes.Contains(clear, []byte(canary)) {
			t.Errorf("the proxy read %q", canary)
		}
	}
}

// fault is what is done to the road in use.
type fault struct {
	name   string
	road   string          // that is broken, the first of the list; "" is https
	proxy  proxy           // that https goes through
	wired  bool            // the appliance's link is a wire
	beside string          // lines of the https road beside a tailnet
	ready  func(*topology) // before the programs start; nil: nothing
	inject func(*topology) error
	during func(context.Context, *pair) error // nil: nothing
	heal   func(*topology) error
	proof  func(*topology, counts) error // that the fault was there; nil: none but what follows from the rest
	moves  bool                          // the channel must move to the other road
	told   string                        // what the customer is told who orders the broken road meanwhile; "": nobody orders
}

// roads are the road that is broken, and the other one.
func (f *fault) roads() (first, other string) {
	switch f.road {
	case "privatelink", "tailscale":
		return f.road, "https"
	}
	return "https", "privatelink"
}

func relay(m roadtest.Mode) func(*topology) error {
	return func(t *topology) error { t.relay.Set(m); return nil }
}

var faults = append(onRoads(), []fault{
	{name: "reset", inject: relay(roadtest.Reset), heal: relay(roadtest.Pass), moves: true},
	{name: "black hole", inject: relay(roadtest.BlackHole), heal: relay(roadtest.Pass), moves: true},
	{name: "half-open", inject: relay(roadtest.HalfOpen), heal: relay(roadtest.Pass), moves: true},
	{name: "loss 30%", inject: func(t *topology) error { return t.lose(true) }, heal: func(t *topology) error { return t.lose(false) }},
	{name: "latency 2 s", inject: relay(roadtest.Slow), heal: relay(roadtest.Pass), proof: waited},
	{name: "large hello swallowed", inject: func(t *topology) error { t.relay.Set(roadtest.Swallow); t.relay.Cut(); return nil },
		during: goesSmall,
		heal:   relay(roadtest.Pass)},
	{name: "DNS failure", moves: true, inject: func(t *topology) error { t.dnsFails.Store(true); t.relay.Cut(); return nil },
		heal: func(t *topology) error { t.dnsFails.Store(false); return nil }},
	{name: "proxy 407", proxy: asks, moves: true, told: "refuses the user and password",
		inject: func(t *topology) error { t.proxy.Refuses.Store(true); t.proxy.Cut(); return nil },
		heal:   func(t *topology) error { t.proxy.Refuses.Store(false); return nil }},
	{name: "proxy without auth", proxy: silent, moves: true, told: "asks for authentication",
		inject: func(t *topology) error { t.proxy.Refuses.Store(true); t.proxy.Cut(); return nil },
		heal:   func(t *topology) error { t.proxy.Refuses.Store(false); return nil }},
	{name: "proxy of a private CA", proxy: private, moves: true, told: "the proxy's own certificate was issued by",
		inject: func(t *topology) error { t.foreign.Store(true); t.proxy.Cut(); return nil },
		heal:   func(t *topology) error { t.foreign.Store(false); return nil }},
	{name: "proxy opens TLS", proxy: asks, moves: true, told: "Corp Inspect CA",
		inject: func(t *topology) error { t.proxy.Opens.Store(true); t.proxy.Cut(); return nil },
		heal:   func(t *topology) error { t.proxy.Opens.Store(false); return nil }},
}...)

// waited shows that a delay was there: bytes of the channel waited for all of it, each way. How long no echo came does not tell: messages
// that are on their way behind each other come one after another, however late they are (FAULTS.md H2).
func waited(t *topology, _ counts) error {
	if to, back := t.relay.Waited(); to < 10 || back < 10 {
		return fmt.Errorf("%d pieces waited for %s towards the control plane and %d back: nothing was delayed", to, roadtest.Delay, back)
	}
	return nil
}

// goesSmall tells that the channel is up over a road whose box swallows large first messages, and that the customer's status says how
// (FAULTS.md F1).
func goesSmall(ctx context.Context, p *pair) error {
	if err := p.seen(ctx, "https", 75*time.Second); err != nil {
		return err
	}
	if p.net.relay.Swallowed() == 0 {
		return errors.New("the box swallowed nothing: the test shows nothing")
	}
	return until(ctx, 20*time.Second, "the status says hello_too_large", func() bool {
		out, err := p.customer(ctx, "local", "status").CombinedOutput()
		return err == nil && strings.Contains(string(out), "hello_too_large")
	})
}

// onRoads are the faults of the other roads.
func onRoads() []fault {
	all := []fault{
		{name: "reset", moves: true, inject: relay(roadtest.Reset), heal: relay(roadtest.Pass)},
		{name: "black hole", moves: true, inject: relay(roadtest.BlackHole), heal: relay(roadtest.Pass)},
		{name: "half-open", moves: true, inject: relay(roadtest.HalfOpen), heal: relay(roadtest.Pass)},
		{name: "loss 30%", inject: func(t *topology) error { return t.lose(true) }, heal: func(t *topology) error { return t.lose(false) }},
		{name: "latency 2 s", inject: relay(roadtest.Slow), heal: relay(roadtest.Pass), proof: waited},
		{name: "DNS failure", moves: true, inject: func(t *topology) error { t.dnsFails.Store(true); t.relay.Cut(); return nil },
			heal: func(t *topology) error { t.dnsFails.Store(false); return nil }},
	}
	for i := range all {
		all[i].name, all[i].road = "privatelink, "+all[i].name, "privatelink"
	}
	for _, x := range []struct {
		name  string
		ways  []string
		how   []string
		moves bool
	}{
		{"rejected", []string{"OUTPUT"}, []string{"-j", "REJECT"}, true},
		{"black hole", []string{"INPUT", "OUTPUT"}, []string{"-j", "DROP"}, true},
		{"half-open", []string{"INPUT"}, []string{"-j", "DROP"}, true},
		{"loss 30%", []string{"INPUT", "OUTPUT"}, []string{"-m", "statistic", "--mode", "random", "--probability", "0.3", "-j", "DROP"}, false},
	} {
		all = append(all, fault{name: "tailscale, " + x.name, road: "tailscale", moves: x.moves,
			inject: func(t *topology) error { return t.tailnetRule(true, x.ways, x.how) },
			heal:   func(t *topology) error { return t.tailnetRule(false, x.ways, x.how) }})
	}
	return append(all, ofTailnet()...)
}

// hold is how long a fault lasts that the channel may sit out.
const hold = 25 * time.Second

// TestLiveSwitchUnderFaults breaks the road in use while messages flow: the channel moves to the other road, comes back when it is
// healed, and moves again by the customer's order. No message may be lost, doubled or out of order. All faults run at once,
// each with programs and namespaces of its own.
func TestLiveSwitchUnderFaults(t *testing.T) {
	needs(t)
	bin := programs(t)
	ctx, cancel := context.WithTimeout(t.Context(), 260*time.Second)
	defer cancel()
	type outcome struct {
		counts counts
		err    error
		took   time.Duration
	}
	if *only != "" {
		faults = slices.DeleteFunc(faults, func(f fault) bool { return !strings.HasPrefix(f.name, *only) })
	}
	outcomes := make([]outcome, len(faults))
	var wg sync.WaitGroup
	for i, f := range faults {
		dir, err := os.MkdirTemp("", "dmroads") // short: a socket's path has 107 bytes
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = os.RemoveAll(dir) })
		wg.Go(func() {
			began := time.Now()
			c, err := f.play(ctx, i, bin, dir)
			outcomes[i] = outcome{c, err, time.Since(began)}
		})
	}
	wg.Wait()
	for i, f := range faults {
		o := outcomes[i]
		c := o.counts
		lost := c.Sent - min(c.Sent, c.Echoed)
		fmt.Printf("%-24s sent %d, echoed %d, lost %d, doubled %d, out of order %d, gap %s, in %s\n", f.name, c.Sent, c.Echoed, lost, c.Doubled,
			c.OutOfOrder, gap(c.gap), o.took.Round(time.Second))
		t.Run(f.name, func(t *testing.T) {
			if o.err != nil {
				t.Error(o.err)
			}
			if c.Sent == 0 || lost != 0 || c.Doubled != 0 || c.OutOfOrder != 0 {
				t.Errorf("sent %d, lost %d, doubled %d, out of order %d", c.Sent, lost, c.Doubled, c.OutOfOrder)
			}
		})
	}
}

// play runs one fault from the start of the programs to their end.
func (f *fault) play(ctx context.Context, n int, bin, dir string) (c counts, err error) {
	var net *topology
	var w *world
	if f.road == "tailscale" {
		if w, err = newWorldOver(n, f.wired); err == nil {
			net = &w.topology
		}
	} else {
		net, err = newTopology(n, f.proxy)
	}
	if err != nil {
		return c, err
	}
	if f.ready != nil {
		f.ready(net)
	}
	p := &pair{net: net, bin: bin, dir: dir, first: f.road, beside: f.beside}
	defer func() {
		if err != nil {
			err = fmt.Errorf("%w\nthe appliance's log ends with:\n%s", err, p.tail("appliance"))
		}
		err = errors.Join(err, p.close(), net.close())
	}()
	if w != nil {
		err = p.beginTailnet(ctx, w, w.tailnet.AuthKey, "tailscale")
	} else {
		first, _ := f.roads()
		err = p.begin(ctx, f.proxy, false, first)
	}
	if err != nil {
		return c, err
	}
	stop, flowed := make(chan struct{}), make(chan error, 1)
	go func() {
		var ferr error
		c, ferr = p.flow(ctx, stop)
		flowed <- ferr
	}()
	err = f.story(ctx, p)
	close(stop)
	err = errors.Join(err, <-flowed)
	if err == nil && f.proof != nil {
		err = f.proof(net, c)
	}
	return c, err
}

// story is what happens while the messages flow.
func (f *fault) story(ctx context.Context, p *pair) error {
	first, other := f.roads()
	if err := pause(ctx, 3*time.Second); err != nil { // messages flow over the road that is broken next
		return err
	}
	if f.proxy != none && p.net.proxy.Asked.Load() == 0 {
		return errors.New("the proxy was not asked: the road leads past it")
	}
	if err := f.inject(p.net); err != nil {
		return err
	}
	if f.moves {
		if err := p.seen(ctx, other, 75*time.Second); err != nil {
			return err
		}
	} else if err := pause(ctx, hold); err != nil {
		return err
	}
	if p.net.proxy != nil && bytes.Contains(p.net.proxy.Clear(), []byte(innerPath)) {
		return errors.New("an inner connection was tried, and the customer's file allows none")
	}
	if f.during != nil {
		if err := f.during(ctx, p); err != nil {
			return err
		}
	}
	if f.told != "" {
		out, err := p.customer(ctx, "transport", "use", first).CombinedOutput()
		if err == nil || !strings.Contains(string(out), f.told) {
			return fmt.Errorf("transport use over the broken road: %w: %s, want %q", err, out, f.told)
		}
	}
	if err := f.heal(p.net); err != nil {
		return err
	}
	if err := p.seen(ctx, first, 110*time.Second); err != nil { // back by itself: within 90 s and the time of a dial
		return err
	}
	for _, route := range []string{other, first} {
		if err := told(p.customer(ctx, "transport", "use", route)); err != nil {
			return err
		}
		if err := p.seen(ctx, route, 20*time.Second); err != nil {
			return err
		}
	}
	return nil
}

func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}
