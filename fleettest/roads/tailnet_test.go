// SPDX-License-Identifier: Apache-2.0

package roads

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"

	"github.com/demarc-dev/demarc/identity/identitytest"
	"github.com/demarc-dev/demarc/mesh/meshtest"
)

// Addresses of the world in which the tailnet's discipline is watched. The road is the default route of both sides.
const (
	applianceAt   = "10.77.1.2"
	worldAt       = "10.77.9.1" // the resolver, and the tailnet's coordinator, relay and STUN
	coordinator   = "coordinator.road.test"
	relayName     = "relay.road.test"
	controlName   = "cp.road.test"
	raftListen    = "127.0.0.1:7444"
	metricsListen = "127.0.0.1:7480"
)

// world is a topology with a tailnet in its middle. Whatever the two sides ask and send is on record.
type world struct {
	topology
	watches []*watch
	broken  atomic.Bool // the resolver fails

	mu    sync.Mutex
	asked map[string]int // names
}

func newWorld(n int) (*world, error) { return newWorldOver(n, false) }

// newWorldOver has the appliance's link be a wire where it is asked for.
func newWorldOver(n int, wired bool) (_ *world, err error) {
	base := fmt.Sprintf("dmroads%dx%d", os.Getpid(), n)
	w := &world{topology: topology{appliance: base + "a", road: base + "r", control: base + "c"}, asked: map[string]int{}}
	defer func() {
		if err != nil {
			err = errors.Join(err, w.close())
		}
	}()
	var steps [][]string
	for _, ns := range []string{w.appliance, w.road, w.control} {
		steps = append(steps, []string{"netns", "add", ns}, []string{"-n", ns, "link", "set", "lo", "up"})
	}
	for _, l := range [][5]string{
		{w.appliance, applianceAt, "app0", roadToAppliance, "fd77:1::"},
		{w.control, controlOnRoad, "cp0", roadToControl, "fd77:2::"},
	} {
		steps = append(steps, []string{"link", "add", "road0", "netns", l[0], "type", "veth", "peer", "name", l[2], "netns", w.road},
			[]string{"-n", l[0], "addr", "add", l[1] + "/24", "dev", "road0"},
			[]string{"-n", l[0], "addr", "add", l[4] + "2/64", "dev", "road0", "nodad"}, []string{"-n", l[0], "link", "set", "road0", "up"},
			[]string{"-n", w.road, "addr", "add", l[3] + "/24", "dev", l[2]},
			[]string{"-n", w.road, "addr", "add", l[4] + "1/64", "dev", l[2], "nodad"}, []string{"-n", w.road, "link", "set", l[2], "up"},
			[]string{"-n", l[0], "route", "add", "default", "via", l[3]}, []string{"-n", l[0], "-6", "route", "add", "default", "via", l[4] + "1"})
	}
	steps = append(steps, []string{"-n", w.road, "addr", "add", worldAt + "/32", "dev", "lo"},
		[]string{"netns", "exec", w.road, "sysctl", "-q", "-w", "net.ipv4.ip_forward=1"})
	for _, s := range steps {
		if err := command("ip", s...); err != nil {
			return nil, err
		}
	}
	if wired {
		if err := w.cut(base + "w"); err != nil {
			return nil, err
		}
	}
	for _, ns := range []string{w.appliance, w.control} {
		if err := resolver(ns, worldAt); err != nil {
			return nil, err
		}
	}
	return w, inside(w.road, w.stand)
}

// stand runs on a thread of the road.
func (w *world) stand() error {
	for _, at := range []string{"app0", "cp0"} {
		s, err := watchLink(at)
		if err != nil {
			return err
		}
		w.watches = append(w.watches, s)
		w.closers = append(w.closers, s.close)
	}
	pc, err := net.ListenPacket("udp4", net.JoinHostPort(worldAt, "53"))
	if err != nil {
		return err
	}
	w.closers = append(w.closers, func() { _ = pc.Close() })
	go w.resolve(pc)
	if w.tailnet, err = meshtest.StartAt("key-for-tests", nil,
		meshtest.Place{IP: worldAt, Coordinator: coordinator, Relay: relayName}); err != nil {
		return err
	}
	w.closers = append(w.closers, func() { _ = w.tailnet.Close() })
	return nil
}

// resolve answers for the world's own names, and writes down every question.
func (w *world) resolve(pc net.PacketConn) {
	known := map[string][4]byte{coordinator: {10, 77, 9, 1}, relayName: {10, 77, 9, 1}, controlName: {10, 77, 2, 2}}
	for b := make([]byte, 1500); ; {
		n, from, err := pc.ReadFrom(b)
		if err != nil {
			return
		}
		var m dnsmessage.Message
		if m.Unpack(b[:n]) != nil || len(m.Questions) != 1 {
			w.note("a packet to the resolver that is no question")
			continue
		}
		q := m.Questions[0]
		name := strings.TrimSuffix(q.Name.String(), ".")
		w.note(name)
		m.Response, m.Additionals = true, nil
		switch a, ok := known[name]; {
		case w.broken.Load(), w.dnsFails.Load() && strings.HasPrefix(from.String(), applianceAt+":"):
			if name == coordinator {
				w.unresolved.Add(1)
			}
			m.RCode = dnsmessage.RCodeServerFailure
		case !ok:
			m.RCode = dnsmessage.RCodeNameError
		case q.Type == dnsmessage.TypeA:
			m.Answers = []dnsmessage.Resource{
				{Header: dnsmessage.ResourceHeader{Name: q.Name, Class: q.Class, Type: q.Type, TTL: 1}, Body: &dnsmessage.AResource{A: a}}}
		}
		if out, err := m.Pack(); err == nil {
			_, _ = pc.WriteTo(out, from)
		}
	}
}

func (w *world) note(name string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.asked[name]++
}

func (w *world) questions(name string) int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.asked[name]
}

// names are those that were asked for, in order.
func (w *world) names() []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	var all []string
	for n := range w.asked {
		all = append(all, n)
	}
	slices.Sort(all)
	return all
}

// beginTailnet is [pair.begin] with a tailnet as the first road, and the public network as the second. The appliance shows the tailnet a
// key, and comes up on the road want.
func (p *pair) beginTailnet(ctx context.Context, w *world, key, want string) error {
	issuer, err := identitytest.NewIssuer("https://cluster.globex.example")
	if err != nil {
		return err
	}
	expect, err := json.Marshal(issuer.Expect(space, account))
	if err != nil {
		return err
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	if err := errors.Join(p.platform(issuer), p.write(string(expect), "eu-1.json"), p.write(w.tailnet.AuthKey, "tailnet.key"),
		p.write(key, "customer", "tailnet.key"),
		told(p.vendor(ctx, "control-plane", "init", "--dir", p.path("acme"), "--trust-domain", domain, "--node",
			"cp-1="+raftListen+","+controlName+":"+port+","+metricsListen,
			"--tailnet-url", w.tailnet.URL, "--tailnet-auth-key-file", p.path("tailnet.key")))); err != nil {
		return err
	}
	if err := p.start("control-plane", p.net.control, p.path("acme", "cp-1", "node.yaml"),
		"DEMARC_LISTEN="+controlOnRoad+":"+port); err != nil {
		return err
	}
	if err := until(ctx, time.Minute,
		"the control plane answers", func() bool { return p.vendor(ctx, "status", "--timeout", "5s").Run() == nil }); err != nil {
		return fmt.Errorf("%w: %s", err, p.tail("control-plane"))
	}
	if err := errors.Join(told(p.vendor(ctx, "customer", "add", "globex")),
		told(p.vendor(ctx, "appliance", "add", appliance, "--customer", "globex", "--expect", p.path("eu-1.json"))),
		os.MkdirAll(p.path("customer", "secrets"), 0o700)); err != nil {
		return err
	}
	const file = `version: demarc/1
role: appliance
name: %s
customer: globex
trust_domain: %s
dir: data
socket: appliance.sock
control_plane:
  addresses: ["%s:%s"]
  bundle_file: ../acme/bundle.pem
  release_keys: [../acme/operator/signing.pub]
transports:
%s  - kind: https%s
proof:
  kind: kubernetes
  token_command: [%q, token, %q]
secrets: {kind: files, dir: secrets}
`
	road := fmt.Sprintf("  - kind: tailscale\n    addresses: [\"cp-1:%s\"]\n    tailnet: {control_url: %q, auth_key_file: tailnet.key, "+
		"hostname: %s}\n", port, w.tailnet.URL, hostname)
	for name, r := range map[string]string{"appliance.yaml": road, "plain.yaml": ""} {
		if err := p.write(fmt.Sprintf(file, appliance, domain, controlName, port, r, p.beside, self, p.path("platform.sock")), "customer",
			name); err != nil {
			return err
		}
	}
	if err := p.start("appliance", p.net.appliance, p.path("customer", "appliance.yaml")); err != nil {
		return err
	}
	if err := p.seen(ctx, want, time.Minute); err != nil {
		return fmt.Errorf("%w: %s", err, p.tail("appliance"))
	}
	return nil
}

// stop ends the program that began last.
func (p *pair) stop() error {
	last := p.done[len(p.done)-1]
	p.done = p.done[:len(p.done)-1]
	return last()
}

// TestTailnetDiscipline runs a control plane and an appliance, both with a tailnet, where the test owns the resolver and the default
// route. Whatever they ask and wherever they send is what their files name: no log host, no gateway's port mapper, no fallback of
// the library's own when the resolver fails and the coordinator can't be found. The host's ports are those of the files. The nodes'
// folders hold what docs/tailnet.md lists, for their owner alone.
func TestTailnetDiscipline(t *testing.T) {
	needs(t)
	bin := programs(t)
	dir, err := os.MkdirTemp("", "dmroads")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	phase := phases(t)
	w, err := newWorld(len(faults) + 1)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := w.close(); err != nil {
			t.Error(err)
		}
	}()
	defer w.holdsPackets(t) // wherever the test ends: what was sent until then is told
	defer w.holdsNames(t)
	p := &pair{net: &w.topology, bin: bin, dir: dir}
	defer func() {
		if err := p.close(); err != nil {
			t.Error(err)
		}
	}()
	if err := p.beginTailnet(ctx, w, w.tailnet.AuthKey, "tailscale"); err != nil {
		t.Fatal(err)
	}
	phase("both are up")
	if c, err := p.probe(ctx, "60"); err != nil || c.Echoed != c.Sent || c.Sent == 0 {
		t.Errorf("%+v, %v", c, err)
	}
	p.holdsPorts(t)
	with, err := rss(w.appliance)
	if err != nil {
		t.Error(err)
	}
	p.holdsFolders(t)
	if quiet, all := w.tailnet.Logless(); quiet != all || all != 2 {
		t.Errorf("%d of %d nodes told the coordinator that they send no logs, want both", quiet, all)
	}
	phase("messages have flowed")

	// The appliance comes back where the resolver fails: the library has a list of hosts of its own to ask instead.
	if err := p.stop(); err != nil {
		t.Fatal(err)
	}
	w.broken.Store(true)
	before := w.questions(coordinator)
	if err := p.start("again", w.appliance, p.path("customer", "appliance.yaml")); err != nil {
		t.Fatal(err)
	}
	if err := until(ctx, 30*time.Second,
		"the coordinator is asked for again and again", func() bool { return w.questions(coordinator) > before+12 }); err != nil {
		t.Error(err)
	}
	phase("the resolver failed")
	w.broken.Store(false)
	if err := p.seen(ctx, "tailscale", 90*time.Second); err != nil {
		t.Fatalf("after the resolver failed: %v: %s", err, p.tail("again"))
	}
	phase("back on the tailnet")
	if err := p.stop(); err != nil {
		t.Fatal(err)
	}
	if err := p.start("plain", w.appliance, p.path("customer", "plain.yaml")); err != nil {
		t.Fatal(err)
	}
	if err := p.seen(ctx, "https", time.Minute); err != nil {
		t.Fatalf("without a tailnet: %v: %s", err, p.tail("plain"))
	}
	without, err := rss(w.appliance)
	if err != nil {
		t.Error(err)
	}
	fmt.Printf("resident memory of an appliance: %.1f MiB with a tailnet node, %.1f MiB without\n", float64(with)/1024, float64(without)/1024)
	phase("without a tailnet")
}

// phases logs how long each phase took.
func phases(t *testing.T) func(string) {
	last := time.Now()
	return func(name string) {
		t.Logf("%s: %s", name, time.Since(last).Round(100*time.Millisecond))
		last = time.Now()
	}
}

// holdsNames checks what was asked.
func (w *world) holdsNames(t *testing.T) {
	names := w.names()
	for _, n := range names {
		if n != coordinator && n != relayName && n != controlName {
			t.Errorf("the resolver was asked for %q, which no file names", n)
		}
	}
	if !slices.Contains(names, coordinator) || !slices.Contains(names, controlName) {
		t.Errorf("the resolver was asked for %q alone: the test shows nothing", names)
	}
}

// holdsPackets checks where packets went.
func (w *world) holdsPackets(t *testing.T) {
	u, err := url.Parse(w.tailnet.URL)
	if err != nil {
		t.Fatal(err)
	}
	relay, stun := w.tailnet.Ports()
	allowed := map[string]string{
		"udp " + worldAt + ":53":                     "resolver",
		"tcp " + worldAt + ":" + u.Port():            "coordinator",
		"tcp " + worldAt + ":" + strconv.Itoa(relay): "relay",
		"udp " + worldAt + ":" + strconv.Itoa(stun):  "STUN",
		"tcp " + controlOnRoad + ":" + port:          "control plane",
	}
	seen := map[string]bool{}
	for _, s := range w.watches {
		flows, lost, err := s.flows()
		if err != nil || lost != 0 {
			t.Errorf("%s: %d packets are not on record, %v", s.link, lost, err)
		}
		for _, f := range flows {
			to := f.proto + " " + f.dst.String()
			what, ok := allowed[to]
			peer := f.dst.Addr().String() == applianceAt || f.dst.Addr().String() == controlOnRoad ||
				strings.HasPrefix(f.dst.Addr().String(), "fd77:")
			switch {
			case ok:
				seen[s.link+" "+what] = true
			case f.proto == "udp" && peer: // WireGuard, which has a random port on each side
				seen[s.link+" peer"] = true
			case strings.HasPrefix(f.proto, "icmp") && peer: // the kernel's word that a program has ended
			case f.proto == "tcp" && f.src.String() == controlOnRoad+":"+port: // answers
			default:
				t.Errorf("%s: %s from %s, %d packets: no file names it", s.link, to, f.src, f.packets)
			}
		}
	}
	for _, want := range []string{"app0 resolver", "app0 coordinator", "app0 relay", "app0 STUN", "app0 control plane", "app0 peer",
		"cp0 resolver", "cp0 coordinator", "cp0 relay", "cp0 STUN"} {
		if !seen[want] {
			t.Errorf("no packet for %s is on record: the test shows nothing", want)
		}
	}
}

// holdsPorts reads the kernel's tables on both sides.
func (p *pair) holdsPorts(t *testing.T) {
	for ns, want := range map[string][]string{
		p.net.appliance: nil,
		p.net.control:   {controlOnRoad + ":" + port, raftListen, metricsListen},
	} {
		slices.Sort(want)
		tcp, udp, err := sockets(ns)
		if err != nil {
			t.Fatal(err)
		}
		if !slices.Equal(tcp, want) {
			t.Errorf("%s listens at %q, its file says %q", ns, tcp, want)
		}
		ports := map[string]bool{}
		for _, at := range udp {
			_, port, err := net.SplitHostPort(at)
			if err != nil {
				t.Fatal(err)
			}
			ports[port] = true
		}
		if len(ports) == 0 || len(ports) > 2 { // WireGuard's, one for each family
			t.Errorf("%s has the UDP sockets %q, want those of one tailnet node", ns, udp)
		}
	}
}

// holdsFolders looks into the folders of the nodes while they run.
func (p *pair) holdsFolders(t *testing.T) {
	doc, err := os.ReadFile("../../docs/tailnet.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, dir := range []string{p.path("customer", "data", "transport-tailscale"), p.path("acme", "cp-1", "data", "tailnet")} {
		err := filepath.Walk(dir, func(path string, info os.FileInfo, err error) error {
			if err != nil {
				return err
			}
			name := strings.TrimPrefix(strings.TrimPrefix(path, dir), "/")
			if info.Mode().Perm()&0o077 != 0 {
				t.Errorf("%s in %s is open to others: %s", name, filepath.Base(dir), info.Mode())
			}
			top, _, _ := strings.Cut(name, "/")
			if name != "" && !strings.Contains(string(doc), "| `"+top+"` |") || name != top && !info.IsDir() {
				t.Errorf("%s in %s is not in docs/tailnet.md", name, filepath.Base(dir))
			}
			return nil
		})
		if err != nil {
			t.Error(err)
		}
	}
	for _, ns := range []string{p.net.appliance, p.net.control} {
		files, err := unnamed(ns)
		if err != nil {
			t.Error(err)
		}
		for name, written := range files {
			if written && strings.Contains(name, "tailscaled") {
				t.Errorf("%s has no name any more, and was written to: something is logged", name)
			}
		}
		if len(files) < 2 {
			t.Errorf("%s: the files of the library's logger are not among %v: the test shows nothing", ns, files)
		}
	}
}
