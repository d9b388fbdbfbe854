// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"connectrpc.com/connect"

	controlv1 "github.com/demarc-dev/demarc/api/control/v1"
	"github.com/demarc-dev/demarc/fleettest/caller"
	"github.com/demarc-dev/demarc/fleettest/platform"
	"github.com/demarc-dev/demarc/fleettest/process"
)

const (
	domain   = "acme.example"
	operator = "ann"
	customer = "globex"
	kept     = "eu-1" // an appliance that stays
	banned   = "eu-2" // and one that is banned half way
	office   = "office"
)

// run is one run of the suite.
type run struct {
	options
	ctx      context.Context
	net      *network
	others   []string // hosts that are no nodes
	slots    []*host  // hosts of nodes
	h        *history
	quiet    chan struct{} // closed when nobody looks any more
	hushed   sync.Once
	expect   []byte
	apps     []*process.Process
	platform *platform.Platform

	looking sync.WaitGroup // one for each node that was ever there

	mu      sync.Mutex
	nodes   []*node // members, and those that are about to be
	gone    []*node // that were removed
	free    []*host // of nodes, in the order in which they became free
	number  int     // of the newest node's name
	turn    int     // grows with each node that comes or goes
	running int     // faults
	cas     int     // changes of CA
	saved   int     // snapshots
	leader  string
	excused [][2]time.Time // when a node may end by itself
}

func (r *run) path(parts ...string) string {
	return filepath.Join(append([]string{r.out}, parts...)...)
}

func (r *run) lead() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.leader
}

// begin makes the network, the disks and the programs, and waits until all of them work.
func (r *run) begin() error {
	r.others = []string{office, kept, banned}
	var hosts []string
	for i := range r.count + spare {
		hosts = append(hosts, fmt.Sprintf("h%d", i+1))
	}
	var err error
	if r.net, err = newNetwork(append(slices.Clone(hosts), r.others...)...); err != nil {
		return err
	}
	for _, h := range hosts {
		r.slots = append(r.slots, r.net.hosts[h])
	}
	r.free = slices.Clone(r.slots[r.count:])
	args := []string{"control-plane", "init", "--dir", r.path("acme"), "--trust-domain", domain, "--operator", operator}
	for i := range r.count {
		a := r.slots[i].addr
		args = append(args, "--node", fmt.Sprintf("cp-%d=%s:7444,%s:7443,127.0.0.1:7480", i+1, a, a))
	}
	if _, err := r.demarc("", args...); err != nil {
		return err
	}
	if err := r.tellOperator(); err != nil {
		return err
	}
	for r.number = range r.count {
		n, err := r.newNode(fmt.Sprintf("cp-%d", r.number+1), r.slots[r.number])
		r.enter(n)
		if err != nil {
			return err
		}
	}
	r.number = r.count
	for _, n := range r.live() {
		if err := n.Start(); err != nil {
			return err
		}
	}
	for _, n := range r.live() {
		if err := process.Until(r.ctx, patience, n.Name+" answers", func() bool { return r.status(n, 3*time.Second) == nil }); err != nil {
			return fmt.Errorf("%w: %s", err, n.Tail())
		}
	}
	return r.beginAppliances()
}

// tellOperator puts the hosts of nodes that may come into the operator's file.
func (r *run) tellOperator() error {
	file := r.path("acme", "operator", "operator.yaml")
	b, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	head, rest, ok := strings.Cut(string(b), "nodes:\n")
	if !ok {
		return fmt.Errorf("%s has no list of nodes", file)
	}
	for _, h := range r.slots[r.count:] {
		rest = fmt.Sprintf("    - %s:7443\n", h.addr) + rest
	}
	return os.WriteFile(file, []byte(head+"nodes:\n"+rest), 0o600)
}

// demarc runs the command as a person in the office would, with the operator's file of one node, or of all where it is "".
func (r *run) demarc(node string, args ...string) (string, error) {
	if node == "" {
		node = "operator"
	}
	ctx, cancel := context.WithTimeout(r.ctx, 2*time.Minute)
	defer cancel()
	c := exec.CommandContext(ctx, filepath.Join(r.bin, "demarc"), args...)
	c.Env = append(os.Environ(), "DEMARC_CONTEXT="+r.path("acme", "operator", node+".yaml"))
	var out strings.Builder
	c.Stdout, c.Stderr = &out, &out
	err := process.Inside(r.net.hosts[office].ns, c.Start)
	if err == nil {
		err = c.Wait()
	}
	if err != nil {
		return out.String(), fmt.Errorf("demarc %s: %w: %s", strings.Join(args, " "), err, out.String())
	}
	return out.String(), nil
}

// only speaks to these nodes, from the office.
func (r *run) only(total time.Duration, nodes ...*node) (*caller.Vendor, error) {
	at := map[string]string{}
	for _, n := range nodes {
		at[n.Name] = n.api()
	}
	return caller.New(r.path("acme"), domain, at, r.net.dialFrom(office), total)
}

// status asks one node once.
func (r *run) status(n *node, wait time.Duration) error {
	v, err := r.only(wait, n)
	if err != nil {
		return err
	}
	defer v.Close()
	_, err = r.look(v, wait)
	return err
}

// look asks the one node of v for its view of the log, and keeps it.
func (r *run) look(v *caller.Vendor, wait time.Duration) (look, error) {
	ctx, cancel := context.WithTimeout(r.ctx, wait)
	defer cancel()
	l := look{Node: v.Names[0], Call: r.h.now()}
	res, err := v.Clients[0].Status(ctx, connect.NewRequest(&controlv1.StatusRequest{}))
	if err != nil {
		return l, err
	}
	l.Return, l.Size, l.Root = r.h.now(), res.Msg.GetAuditSize(), res.Msg.GetAuditRoot()
	r.h.saw(l)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.leader = res.Msg.GetLeader()
	return l, nil
}

// watch looks at a node again and again, until it is gone.
func (r *run) watch(n *node) {
	v, err := r.only(3*time.Second, n)
	if err != nil {
		r.h.breach(err.Error())
		return
	}
	defer v.Close()
	for r.ctx.Err() == nil {
		select {
		case <-n.left:
			return
		case <-r.quiet:
			return
		default:
		}
		_, _ = r.look(v, 3*time.Second) // a node under a fault need not answer
		_ = process.Pause(r.ctx, 300*time.Millisecond)
	}
}

// hush ends all watching.
func (r *run) hush() {
	r.hushed.Do(func() { close(r.quiet) })
	r.looking.Wait()
}

func (r *run) beginAppliances() error {
	short, err := os.MkdirTemp("", "dmrob") // a socket's path has 107 bytes
	if err != nil {
		return err
	}
	r.sockets = short
	if r.platform, err = platform.Serve(filepath.Join(short, "tokens")); err != nil {
		return err
	}
	for _, c := range []string{customer, counters} {
		if _, err := r.demarc("", "customer", "add", c); err != nil {
			return err
		}
	}
	for _, name := range []string{kept, banned} {
		if err := r.beginAppliance(name); err != nil {
			return err
		}
	}
	for _, name := range []string{kept, banned} {
		if err := process.Until(r.ctx, patience, "appliance "+name+" is online", func() bool { return r.online(name) }); err != nil {
			return fmt.Errorf("%w: %s", err, r.apps[0].Tail())
		}
	}
	return nil
}

func (r *run) online(name string) bool {
	out, err := r.demarc("", "appliance", "show", name, "--output", "json", "--timeout", "5s")
	return err == nil && strings.Contains(strings.ReplaceAll(out, " ", ""), `"online":true`)
}

func (r *run) beginAppliance(name string) error {
	expect, err := r.platform.Expect(name)
	if err != nil {
		return err
	}
	r.expect = expect
	proof, err := r.platform.Proof(name)
	if err != nil {
		return err
	}
	dir := r.path(name)
	if err := errors.Join(os.MkdirAll(filepath.Join(dir, "secrets"), 0o700),
		os.WriteFile(filepath.Join(dir, "expect.json"), expect, 0o600)); err != nil {
		return err
	}
	if _, err := r.demarc("", "appliance", "add", name, "--customer", customer, "--expect", filepath.Join(dir, "expect.json")); err != nil {
		return err
	}
	var at []string
	for _, h := range r.slots { // those of nodes that may come too
		at = append(at, fmt.Sprintf("%q", h.addr+":7443"))
	}
	file := filepath.Join(dir, "appliance.yaml")
	if err := os.WriteFile(file, []byte(fmt.Sprintf(`version: demarc/1
role: appliance
name: %s
customer: %s
trust_domain: %s
dir: data
socket: %s
control_plane:
  addresses: [%s]
  bundle_file: ../acme/bundle.pem
  release_keys: [../acme/operator/signing.pub]
transports:
  - kind: https
%ssecrets: {kind: files, dir: secrets}
`, name, customer, domain, filepath.Join(r.sockets, name), strings.Join(at, ", "), proof)), 0o600); err != nil {
		return err
	}
	p := &process.Process{Name: name, Namespace: r.net.hosts[name].ns, Log: r.path(name + ".log"),
		Argv: []string{filepath.Join(r.bin, "demarcd"), "run", "-c", file}}
	r.apps = append(r.apps, p)
	return p.Start()
}

// close ends all that was started, and leaves the files.
func (r *run) close() error {
	r.hush()
	var errs []error
	for _, p := range r.apps {
		errs = append(errs, p.End(syscall.SIGTERM, time.Minute))
	}
	all := append(r.live(), r.gone...)
	for _, n := range all {
		if n.disk != nil {
			errs = append(errs, n.disk.freeze(false))
		}
		errs = append(errs, n.End(syscall.SIGTERM, time.Minute))
	}
	if r.platform != nil {
		errs = append(errs, r.platform.Close())
	}
	if r.sockets != "" {
		errs = append(errs, os.RemoveAll(r.sockets))
	}
	for _, n := range all {
		if n.disk != nil {
			errs = append(errs, n.disk.close())
		}
	}
	if r.net != nil {
		errs = append(errs, r.net.close())
	}
	return errors.Join(errs...)
}

// keep puts the data of the nodes beside the rest of a failed run, out of the file systems that are unmounted at its end.
func (r *run) keep() error {
	var errs []error
	for _, n := range r.live() {
		if n.disk != nil {
			errs = append(errs, process.Command("cp", "-a", n.dir, r.path("data-"+n.Name)))
		}
	}
	return errors.Join(errs...)
}
