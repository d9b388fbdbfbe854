// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"connectrpc.com/connect"

	controlv1 "github.com/demarc-dev/demarc/api/control/v1"
	"github.com/demarc-dev/demarc/identity/identitytest"
)

const (
	domain   = "acme.example"
	operator = "ann"
	customer = "globex"
	space    = "demarc"
	kept     = "eu-1" // an appliance that stays
	banned   = "eu-2" // and one that is banned half way
	office   = "office"
)

// node is one of the control plane, with its disk and its clock.
type node struct {
	*process
	disk   *disk
	clock  string // the folder that its clock's file is in
	addr   string
	faulty bool // run.mu guards it
}

// run is one run of the suite.
type run struct {
	options
	ctx    context.Context
	net    *network
	nodes  []*node
	others []string // hosts that are no nodes
	h      *history
	expect []byte
	apps   []*process
	server *http.Server

	mu      sync.Mutex
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
	names := []string{"cp-1", "cp-2", "cp-3"}
	r.others = []string{office, kept, banned}
	var err error
	if r.net, err = newNetwork(append(names, r.others...)...); err != nil {
		return err
	}
	args := []string{"control-plane", "init", "--dir", r.path("acme"), "--trust-domain", domain, "--operator", operator}
	for _, n := range names {
		a := r.net.hosts[n].addr
		args = append(args, "--node", fmt.Sprintf("%s=%s:7444,%s:7443,127.0.0.1:7480", n, a, a))
	}
	if _, err := r.demarc("", args...); err != nil {
		return err
	}
	for _, n := range names {
		if err := r.addNode(n); err != nil {
			return err
		}
	}
	for _, n := range r.nodes {
		if err := n.start(); err != nil {
			return err
		}
	}
	for _, n := range r.nodes {
		if err := until(r.ctx, time.Minute, n.name+" answers", func() bool { return r.status(n, 3*time.Second) == nil }); err != nil {
			return fmt.Errorf("%w: %s", err, n.tail())
		}
	}
	return r.beginAppliances()
}

func (r *run) addNode(name string) error {
	n := &node{addr: r.net.hosts[name].addr, clock: r.path("acme", name)}
	if r.has("disk") {
		d, err := newDisk(r.path(name+".img"), r.path("acme", name, "data"))
		if d != nil {
			n.disk = d
		}
		if err != nil {
			return err
		}
	}
	n.process = &process{name: name, ns: r.net.hosts[name].ns, log: r.path(name + ".log"),
		argv: []string{filepath.Join(r.bin, "demarcd"), "run", "-c", r.path("acme", name, "node.yaml"), "--log-level", "debug"}}
	if r.has("clock") {
		if err := setClock(n.clock, 0); err != nil {
			return err
		}
		n.argv[0], n.dir = filepath.Join(r.bin, shiftedName), n.clock
	}
	r.nodes = append(r.nodes, n)
	one, err := os.ReadFile(r.path("acme", "operator", "operator.yaml"))
	if err != nil {
		return err
	}
	var lines []string // the operator's file with this node alone
	for _, l := range strings.Split(string(one), "\n") {
		if !strings.Contains(l, ":7443") || strings.Contains(l, n.addr+":") {
			lines = append(lines, l)
		}
	}
	return os.WriteFile(r.path("acme", "operator", name+".yaml"), []byte(strings.Join(lines, "\n")), 0o600)
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
	err := inside(r.net.hosts[office].ns, c.Start)
	if err == nil {
		err = c.Wait()
	}
	if err != nil {
		return out.String(), fmt.Errorf("demarc %s: %w: %s", strings.Join(args, " "), err, out.String())
	}
	return out.String(), nil
}

// only speaks to these nodes, from the office.
func (r *run) only(total time.Duration, nodes ...*node) (*vendor, error) {
	at := map[string]string{}
	for _, n := range nodes {
		at[n.name] = net.JoinHostPort(n.addr, "7443")
	}
	v, err := newVendor(r.path("acme"), domain, at, r.net.dialFrom(office), total)
	if err == nil {
		v.expect = r.expect
	}
	return v, err
}

// status asks one node once.
func (r *run) status(n *node, wait time.Duration) error {
	v, err := r.only(wait, n)
	if err != nil {
		return err
	}
	defer v.close()
	_, err = r.look(v, wait)
	return err
}

// look asks the one node of v for its view of the log, and keeps it.
func (r *run) look(v *vendor, wait time.Duration) (look, error) {
	ctx, cancel := context.WithTimeout(r.ctx, wait)
	defer cancel()
	l := look{Node: v.names[0], Call: r.h.now()}
	res, err := v.clients[0].Status(ctx, connect.NewRequest(&controlv1.StatusRequest{}))
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

// watch looks at a node again and again.
func (r *run) watch(ctx context.Context, n *node) error {
	v, err := r.only(3*time.Second, n)
	if err != nil {
		return err
	}
	defer v.close()
	for ctx.Err() == nil {
		_, _ = r.look(v, 3*time.Second) // a node under a fault need not answer
		_ = pause(ctx, 300*time.Millisecond)
	}
	return nil
}

func (r *run) beginAppliances() error {
	issuer, err := identitytest.NewIssuer("https://cluster.globex.example")
	if err != nil {
		return err
	}
	short, err := os.MkdirTemp("", "dmrob") // a socket's path has 107 bytes
	if err != nil {
		return err
	}
	r.sockets = short
	l, err := net.Listen("unix", r.tokens())
	if err != nil {
		return err
	}
	r.server = &http.Server{ReadHeaderTimeout: 5 * time.Second, Handler: http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		t, err := issuer.Token(space, q.URL.Query().Get("account"), q.URL.Query().Get("audience"), time.Now())
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		_, _ = io.WriteString(w, t)
	})}
	go func() { _ = r.server.Serve(l) }()
	for _, c := range []string{customer, counters} {
		if _, err := r.demarc("", "customer", "add", c); err != nil {
			return err
		}
	}
	for _, name := range []string{kept, banned} {
		if err := r.beginAppliance(issuer, name); err != nil {
			return err
		}
	}
	for _, name := range []string{kept, banned} {
		if err := until(r.ctx, time.Minute, "appliance "+name+" is online", func() bool { return r.online(name) }); err != nil {
			return fmt.Errorf("%w: %s", err, r.apps[0].tail())
		}
	}
	return nil
}

func (r *run) tokens() string { return filepath.Join(r.sockets, "tokens") }

func (r *run) online(name string) bool {
	out, err := r.demarc("", "appliance", "show", name, "--output", "json", "--timeout", "5s")
	return err == nil && strings.Contains(strings.ReplaceAll(out, " ", ""), `"online":true`)
}

func (r *run) beginAppliance(issuer *identitytest.Issuer, name string) error {
	expect, err := expectOf(issuer, name)
	if err != nil {
		return err
	}
	r.expect = expect
	self, err := os.Executable()
	if err != nil {
		return err
	}
	dir := r.path(name)
	if err := errors.Join(os.MkdirAll(filepath.Join(dir, "secrets"), 0o700), os.WriteFile(filepath.Join(dir, "expect.json"), expect, 0o600)); err != nil {
		return err
	}
	if _, err := r.demarc("", "appliance", "add", name, "--customer", customer, "--expect", filepath.Join(dir, "expect.json")); err != nil {
		return err
	}
	var at []string
	for _, n := range r.nodes {
		at = append(at, fmt.Sprintf("%q", net.JoinHostPort(n.addr, "7443")))
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
proof:
  kind: kubernetes
  token_command: [%q, token, %q, %q]
secrets: {kind: files, dir: secrets}
`, name, customer, domain, filepath.Join(r.sockets, name), strings.Join(at, ", "), self, r.tokens(), name)), 0o600); err != nil {
		return err
	}
	p := &process{name: name, ns: r.net.hosts[name].ns, log: r.path(name + ".log"), argv: []string{filepath.Join(r.bin, "demarcd"), "run", "-c", file}}
	r.apps = append(r.apps, p)
	return p.start()
}

// close ends all that was started, and leaves the files.
func (r *run) close() error {
	var errs []error
	for _, p := range r.apps {
		errs = append(errs, p.end(syscall.SIGTERM, 15*time.Second))
	}
	for _, n := range r.nodes {
		if n.disk != nil {
			errs = append(errs, n.disk.freeze(false))
		}
		errs = append(errs, n.end(syscall.SIGTERM, 15*time.Second))
	}
	if r.server != nil {
		errs = append(errs, r.server.Close(), os.RemoveAll(r.sockets))
	}
	for _, n := range r.nodes {
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
	for _, n := range r.nodes {
		if n.disk != nil {
			errs = append(errs, command("cp", "-a", r.path("acme", n.name, "data"), r.path("data-"+n.name)))
		}
	}
	return errors.Join(errs...)
}

// until looks again and again.
func until(ctx context.Context, limit time.Duration, what string, is func() bool) error {
	for end := time.Now().Add(limit); ; {
		if is() {
			return nil
		}
		if time.Now().After(end) {
			return fmt.Errorf("not so within %s: %s", limit, what)
		}
		if err := pause(ctx, 200*time.Millisecond); err != nil {
			return err
		}
	}
}

func pause(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-t.C:
		return nil
	}
}
