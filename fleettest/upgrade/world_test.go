// SPDX-License-Identifier: Apache-2.0

package upgrade

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect"

	controlv1 "github.com/demarc-dev/demarc/api/control/v1"
	"github.com/demarc-dev/demarc/api/control/v1/controlv1connect"
	"github.com/demarc-dev/demarc/fleettest/caller"
	"github.com/demarc-dev/demarc/fleettest/platform"
	"github.com/demarc-dev/demarc/fleettest/process"
)

const (
	domain   = "acme.example"
	patience = 2 * time.Minute // for what must come about: a slow machine is no finding
)

// node is one of the three, and runs one of the two builds.
type node struct {
	*process.Process
	api string
}

// world is a control plane, its appliances, and clients that make changes all the time.
type world struct {
	t    *testing.T
	dir  string
	b    builds
	node []*node
	all  *caller.Vendor // of the test itself

	stop   context.CancelFunc
	calls  sync.WaitGroup
	mu     sync.Mutex
	acked  []string // request ids
	faults []string
	count  atomic.Int64
}

func (w *world) path(parts ...string) string {
	return filepath.Join(append([]string{w.dir}, parts...)...)
}

func (w *world) must(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
}

// begin makes a cluster of the previous build, and clients that make changes.
func begin(t *testing.T, b builds) *world {
	dir, err := os.MkdirTemp("", "dmup") // short: there are Unix sockets in it
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	w := &world{t: t, dir: dir, b: b}
	at, err := process.Free(9)
	w.must(err)
	args := []string{"control-plane", "init", "--dir", w.path("acme"), "--trust-domain", domain, "--operator", "ann"}
	nodes := map[string]string{}
	for i := range 3 {
		name := fmt.Sprintf("cp-%d", i+1)
		raft, api, metrics := at[3*i], at[3*i+1], at[3*i+2]
		args = append(args, "--node", fmt.Sprintf("%s=%s,%s,%s", name, raft, api, metrics))
		nodes[name] = api
		w.node = append(w.node, &node{api: api, Process: w.program(name, w.path("acme", name, "node.yaml"), b.old)})
	}
	_, err = w.demarc(b.old, "", args...)
	w.must(err)
	for _, n := range w.node {
		w.must(n.Start())
	}
	w.all, err = caller.New(w.path("acme"), domain, nodes, new(net.Dialer).DialContext, 30*time.Second)
	w.must(err)
	t.Cleanup(w.all.Close)
	for _, n := range w.node {
		w.answers(n)
	}
	_, err = w.demarc(b.old, "", "customer", "add", "globex")
	w.must(err)
	ctx, stop := context.WithCancel(t.Context())
	w.stop = stop
	for i := range 4 {
		v, err := caller.New(w.path("acme"), domain, nodes, new(net.Dialer).DialContext, 30*time.Second)
		w.must(err)
		w.calls.Go(func() { defer v.Close(); w.client(ctx, i, v) })
	}
	t.Cleanup(func() { stop(); w.calls.Wait() })
	return w
}

// program is a demarcd that ends with the test.
func (w *world) program(name, file, bin string) *process.Process {
	p := &process.Process{Name: name, Log: w.path(name + ".log"), Argv: []string{filepath.Join(bin, "demarcd"), "run", "-c", file}}
	w.t.Cleanup(func() {
		if err := p.End(syscall.SIGTERM, time.Minute); err != nil {
			w.t.Error(err)
		}
		if err := p.Died(func(time.Time) bool { return false }); err != nil {
			w.t.Error(err)
		}
		if w.t.Failed() {
			w.t.Logf("%s:\n%s", name, p.Tail())
		}
	})
	return p
}

// client makes one change after another, at all nodes in turn, and asks with the same request id until it is answered.
func (w *world) client(ctx context.Context, id int, v *caller.Vendor) {
	for i := 0; ctx.Err() == nil; i++ {
		v.At = i % len(v.Clients)
		name := fmt.Sprintf("c-%d-%d", id, i)
		var e caller.Ending
		for range 4 { // also after the end of the story: what was begun is answered
			e = caller.Ask(context.WithoutCancel(ctx), v, func(ctx context.Context, c controlv1connect.ControlClient) error {
				_, err := c.RegisterCustomer(ctx, connect.NewRequest(&controlv1.RegisterCustomerRequest{RequestId: "request-" + name, Name: name}))
				return err
			})
			if e.Outcome == caller.Done || e.Outcome == caller.Refused {
				break
			}
		}
		w.mu.Lock()
		if e.Outcome == caller.Done {
			w.acked = append(w.acked, "request-"+name)
		} else {
			w.faults = append(w.faults, fmt.Sprintf("%s: %s by %s: %s", name, e.Outcome, e.Node, e.Detail))
		}
		w.mu.Unlock()
		w.count.Add(1)
		_ = process.Pause(ctx, 20*time.Millisecond)
	}
}

// goesOn waits until every client has had answers in the state that there is now.
func (w *world) goesOn(what string) {
	w.t.Helper()
	from := w.count.Load()
	w.must(process.Until(w.t.Context(), patience, "changes go on: "+what, func() bool { return w.count.Load() >= from+40 }))
	w.t.Logf("%s: %d changes", what, w.count.Load())
}

// demarc runs the command of a build, with the operator's file or with that of one node.
func (w *world) demarc(bin, node string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(w.t.Context(), patience)
	defer cancel()
	c := exec.CommandContext(ctx, filepath.Join(bin, "demarc"), args...)
	file := w.path("acme", "operator", "operator.yaml")
	if node != "" {
		b, err := os.ReadFile(file)
		if err != nil {
			return "", err
		}
		head, rest, _ := strings.Cut(string(b), "nodes:\n")
		for strings.HasPrefix(rest, "    - ") {
			_, rest, _ = strings.Cut(rest, "\n")
		}
		file = w.path("acme", "operator", "one.yaml")
		if err := os.WriteFile(file, []byte(head+"nodes: [\""+node+"\"]\n"+rest), 0o600); err != nil {
			return "", err
		}
	}
	c.Env = append(os.Environ(), "DEMARC_CONTEXT="+file)
	out, err := c.CombinedOutput()
	if err != nil {
		return string(out), fmt.Errorf("demarc %s: %w: %s", strings.Join(args, " "), err, out)
	}
	return string(out), nil
}

// answers waits until a node has all that is committed, and says who leads.
func (w *world) answers(n *node) (leader string) {
	w.t.Helper()
	v, err := caller.New(w.path("acme"), domain, map[string]string{n.Name: n.api}, new(net.Dialer).DialContext, 3*time.Second)
	w.must(err)
	defer v.Close()
	err = process.Until(w.t.Context(), patience, n.Name+" answers", func() bool {
		return caller.Ask(w.t.Context(), v, func(ctx context.Context, c controlv1connect.ControlClient) error {
			res, err := c.Status(ctx, connect.NewRequest(&controlv1.StatusRequest{}))
			if err == nil {
				leader = res.Msg.GetLeader()
			}
			return err
		}).Outcome == caller.Done && leader != ""
	})
	if err != nil {
		w.t.Fatalf("%v\n%s", err, n.Tail())
	}
	return leader
}

// switchTo stops a node in order and starts it with another build, on the same data.
func (w *world) switchTo(n *node, bin string) {
	w.t.Helper()
	w.must(n.End(syscall.SIGTERM, time.Minute))
	n.Argv[0] = filepath.Join(bin, "demarcd")
	w.must(n.Start())
	w.answers(n)
}

// lead makes a node the leader.
func (w *world) lead(n *node) {
	w.t.Helper()
	var last error
	if err := process.Until(w.t.Context(), patience, n.Name+" leads", func() bool {
		_, last = w.demarc(w.b.now, "", "--timeout", "20s", "control-plane", "transfer-leadership", "--to", n.Name)
		return w.answers(n) == n.Name
	}); err != nil {
		w.t.Fatal(err, last)
	}
}

// appliance starts one of a build, and waits until it is served.
func (w *world) appliance(p *platform.Platform, name, bin string) *process.Process {
	w.t.Helper()
	expect, err := p.Expect(name)
	w.must(err)
	proof, err := p.Proof(name)
	w.must(err)
	dir := w.path(name)
	w.must(os.MkdirAll(filepath.Join(dir, "secrets"), 0o700))
	w.must(os.WriteFile(filepath.Join(dir, "expect.json"), expect, 0o600))
	_, err = w.demarc(w.b.old, "", "appliance", "add", name, "--customer", "globex", "--expect", filepath.Join(dir, "expect.json"))
	w.must(err)
	file := filepath.Join(dir, "appliance.yaml")
	w.must(os.WriteFile(file, fmt.Appendf(nil, `version: demarc/1
role: appliance
name: %s
customer: globex
trust_domain: %s
dir: data
socket: a.sock
control_plane:
  addresses: [%q, %q, %q]
  bundle_file: ../acme/bundle.pem
  release_keys: [../acme/operator/signing.pub]
transports:
  - kind: https
%ssecrets: {kind: files, dir: secrets}
`, name, domain, w.node[0].api, w.node[1].api, w.node[2].api, proof), 0o600))
	a := w.program(name, file, bin)
	w.must(a.Start())
	return a
}

// served waits until an appliance echoes each message of a probe once.
func (w *world) served(a *process.Process) {
	w.t.Helper()
	var last error
	if err := process.Until(w.t.Context(), patience, a.Name+" is served", func() bool {
		var out string
		if out, last = w.demarc(w.b.now, "", "--timeout", "20s", "appliance", "show", a.Name, "--output", "json"); last == nil &&
			!strings.Contains(strings.ReplaceAll(out, " ", ""), `"online":true`) {
			last = fmt.Errorf("it is not online: %s", out)
		}
		if last == nil {
			if out, last = w.demarc(w.b.now, "", "--timeout", "20s", "probe", "--appliance", a.Name, "--count", "20", "--rate", "50", "--output",
				"json"); last == nil {
				if s := strings.ReplaceAll(out, " ", ""); !strings.Contains(s, `"echoed":20`) ||
					strings.Contains(s, `"doubled":`) && !strings.Contains(s, `"doubled":0`) {
					last = fmt.Errorf("probe: %s", out)
				}
			}
		}
		return last == nil
	}); err != nil {
		w.t.Fatalf("%v: %v\n%s", err, last, a.Tail())
	}
}
