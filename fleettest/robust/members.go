// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/demarc-dev/demarc/fleettest/process"
)

// node is one of the control plane, with its disk and its clock. Nodes come and go: a name is used once, a host again.
type node struct {
	*process.Process
	host *host
	disk *disk
	dir  string        // its data
	home string        // its folder, which its clock's file is in too
	left chan struct{} // closed when nobody looks at it any more

	// run.mu guards these.
	faulty bool
	lost   bool // its disk was wiped
	cas    int  // changes of CA when it was removed
}

func (n *node) api() string { return net.JoinHostPort(n.host.addr, "7443") }

// spare is how many hosts there are beside those of the first nodes: one for a node that comes while the one that goes is there,
// and one so that the address of a node is not used again at once.
const spare = 2

// newNode makes the disk and the process of a node whose folder is there.
func (r *run) newNode(name string, h *host) (*node, error) {
	n := &node{host: h, home: r.path("acme", name), dir: r.path("acme", name, "data"), left: make(chan struct{})}
	n.Process = &process.Process{Name: name, Namespace: h.ns, Log: r.path(name + ".log"),
		Argv: []string{filepath.Join(r.bin, "demarcd"), "run", "-c", r.path("acme", name, "node.yaml"), "--log-level", "debug"}}
	if r.has("disk") {
		d, err := newDisk(r.path(name+".img"), n.dir)
		n.disk = d // to be unmounted also where the mount failed half way
		if err != nil {
			return n, err
		}
	}
	if r.has("clock") {
		if err := setClock(n.home, 0); err != nil {
			return n, err
		}
		n.Argv[0], n.Dir = filepath.Join(r.bin, shiftedName), n.home
	}
	b, err := os.ReadFile(r.path("acme", "operator", "operator.yaml"))
	if err != nil {
		return n, err
	}
	return n, os.WriteFile(r.path("acme", "operator", name+".yaml"), onlyNode(b, h.addr), 0o600)
}

// onlyNode is an operator's file with one of its nodes.
func onlyNode(file []byte, addr string) []byte {
	var lines []string
	for l := range strings.SplitSeq(string(file), "\n") {
		if !strings.Contains(l, ":7443") || strings.Contains(l, addr+":") {
			lines = append(lines, l)
		}
	}
	return []byte(strings.Join(lines, "\n"))
}

// live is who is a member, or about to be.
func (r *run) live() []*node {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.nodes)
}

// enter puts a node among the live ones.
func (r *run) enter(n *node) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.nodes, r.turn = append(r.nodes, n), r.turn+1
}

// drop takes it out.
func (r *run) drop(n *node) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.nodes = slices.DeleteFunc(r.nodes, func(x *node) bool { return x == n })
	n.cas = r.cas
	r.gone, r.turn = append(r.gone, n), r.turn+1
}

// insist makes a change of the members. What another fault is in the way of is made once that has ended.
func (r *run) insist(do, name string, args ...string) error {
	var last error
	err := process.Until(r.ctx, patience, strings.Join(args, " "), func() bool {
		_, last = r.demarc("", append([]string{"--timeout", "60s", "control-plane"}, args...)...)
		return last == nil
	})
	if err != nil {
		return errors.Join(err, last)
	}
	r.h.changed(change{Do: do, Name: name})
	return nil
}

// patience is how long what must come about may take. It is long so that a slow machine is no finding.
const patience = 4 * time.Minute

// hire adds a node as a non-voter, starts it, and waits until it answers.
func (r *run) hire() (*node, error) {
	r.mu.Lock()
	r.number++
	name := fmt.Sprintf("cp-%d", r.number)
	h := r.free[0]
	r.free = r.free[1:]
	r.mu.Unlock()
	if err := r.insist("add", name, "add", name, "--dir", r.path("acme"), "--addr",
		fmt.Sprintf("%s:7444,%s:7443,127.0.0.1:7480", h.addr, h.addr)); err != nil {
		return nil, err
	}
	n, err := r.newNode(name, h)
	r.enter(n)
	if err != nil {
		return n, err
	}
	if err := n.Start(); err != nil {
		return n, err
	}
	r.looking.Go(func() { r.watch(n) })
	return n, process.Until(r.ctx, patience, name+" answers after it was added", func() bool { return r.status(n, 3*time.Second) == nil })
}

// fire ends a node that was removed: it is told, and stops by itself; one that does not hear of it is stopped.
func (r *run) fire(n *node) error {
	r.drop(n)
	n.Leave()
	select {
	case <-n.Ended():
	case <-r.ctx.Done():
	case <-time.After(20 * time.Second):
	}
	close(n.left)
	err := n.End(syscall.SIGTERM, time.Minute)
	if n.disk != nil {
		err = errors.Join(err, n.disk.close())
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.free = append(r.free, n.host)
	return err
}

// replaceBy lets a new node take the place of one that runs or is lost.
func (r *run) replaceBy(old, by *node) error {
	old.Leave() // it may stop from now on
	if err := r.insist("replace", old.Name, "replace", old.Name, "--by", by.Name, "--reason", "robustness"); err != nil {
		return err
	}
	return r.fire(old)
}

func replace(r *run, n *node, _ step) (func() error, error) {
	by, err := r.hire()
	return func() error { return r.replaceBy(n, by) }, err
}

// lose wipes the disk of a node that was killed: it never comes back, and another one takes its place.
func lose(r *run, n *node, _ step) (func() error, error) {
	if err := n.End(syscall.SIGKILL, time.Minute); err != nil {
		return nil, err
	}
	if err := wipe(n.dir); err != nil {
		return nil, err
	}
	n.lost = true
	return func() error {
		by, err := r.hire()
		if err != nil {
			return err
		}
		return r.replaceBy(n, by)
	}, nil
}

// grow adds one voter more, and takes it away again.
func grow(r *run, _ *node, _ step) (func() error, error) {
	n, err := r.hire()
	if err != nil {
		return nil, err
	}
	if err := r.insist("promote", n.Name, "promote", n.Name); err != nil {
		return nil, err
	}
	return func() error {
		n.Leave()
		if err := r.insist("remove", n.Name, "remove", n.Name, "--reason", "robustness"); err != nil {
			return err
		}
		return r.fire(n)
	}, nil
}

func demote(r *run, n *node, _ step) (func() error, error) {
	return func() error { return r.insist("promote", n.Name, "promote", n.Name) }, r.insist("demote", n.Name, "demote", n.Name)
}

// transfer hands leadership to a node, where that can be: one that has a fault, or does not vote, can't lead.
func transfer(r *run, n *node, _ step) (func() error, error) {
	_, err := r.demarc("", "--timeout", "20s", "control-plane", "transfer-leadership", "--to", n.Name)
	if err != nil {
		_, err = r.demarc("", "--timeout", "20s", "control-plane", "transfer-leadership")
	}
	if err == nil {
		r.h.changed(change{Do: "transfer", Name: n.Name})
	}
	return func() error { return nil }, nil // another fault may be in the way: that is no finding
}

// members compares the cluster, as each node tells it, with what it is meant to be: who votes, and who was removed.
func (r *run) members() error {
	want := map[string]string{}
	for _, n := range r.live() {
		want[n.Name] = "voter"
	}
	for _, n := range r.gone {
		want[n.Name] = "removed"
	}
	for _, n := range r.live() {
		out, err := r.demarc(n.Name, "--timeout", "60s", "control-plane", "members", "--output", "json")
		if err != nil {
			return err
		}
		if bad, err := checkMembers([]byte(out), want); err != nil || bad != "" {
			return errors.Join(err, fmt.Errorf("node %s: %s", n.Name, bad))
		}
	}
	return nil
}

// checkMembers compares what demarc control-plane members says with roles by name.
func checkMembers(out []byte, want map[string]string) (string, error) {
	var doc struct {
		Members []struct{ Name, Role string }
		Removed []string
	}
	if err := json.Unmarshal(out, &doc); err != nil {
		return "", fmt.Errorf("%w: %s", err, out)
	}
	got := map[string]string{}
	for _, m := range doc.Members {
		got[m.Name] = m.Role
	}
	for _, name := range doc.Removed {
		if got[name] != "" {
			return fmt.Sprintf("%s was removed, and is a member", name), nil
		}
		got[name] = "removed"
	}
	for name := range got {
		if want[name] == "" {
			return fmt.Sprintf("%s is a %s, and should not be there", name, got[name]), nil
		}
	}
	for name := range want {
		if want[name] != got[name] {
			return fmt.Sprintf("%s is %q, and should be a %s", name, got[name], want[name]), nil
		}
	}
	return "", nil
}

// ghost starts the node that was removed last once more, with all that it had: it is told, stops, and was never served. One that was
// removed before the CA was changed has nothing to prove itself with: nobody would tell it.
func (r *run) ghost() error {
	i := slices.IndexFunc(r.gone, func(n *node) bool { return slices.Contains(r.free, n.host) && !n.lost && n.cas == r.cas })
	if i < 0 {
		return nil
	}
	n := r.gone[i]
	if n.disk != nil {
		if err := n.disk.mount(); err != nil {
			return err
		}
		defer func() { _ = n.disk.close() }()
	}
	before, err := os.Stat(n.Log)
	if err != nil {
		return err
	}
	if err := n.Start(); err != nil {
		return err
	}
	n.Leave()
	var served error
	if err := process.Until(r.ctx, 2*time.Minute, n.Name+", which was removed, ends by itself", func() bool {
		if v, err := r.only(2*time.Second, n); err == nil {
			if l, err := r.look(v, 2*time.Second); err == nil {
				served = fmt.Errorf("node %s was removed, and showed a log of %d entries", n.Name, l.Size)
			}
			v.Close()
		}
		select {
		case <-n.Ended():
			return true
		default:
			return false
		}
	}); err != nil {
		return errors.Join(err, n.End(syscall.SIGTERM, time.Minute))
	}
	b, err := os.ReadFile(n.Log)
	if err == nil && !strings.Contains(string(b[before.Size():]), "was removed") {
		err = fmt.Errorf("node %s ended, and did not say that it was removed: %s", n.Name, n.Tail())
	}
	return errors.Join(served, err)
}
