// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"syscall"
	"time"

	"github.com/demarc-dev/demarc/fleettest/process"
)

// kind is one sort of fault. inject gives what ends it.
type kind struct {
	name  string
	needs string // "disk": a loop device, "clock": a demarcd whose clock moves, "members": changes of the members, "keys": other keys
	hold  [2]time.Duration
	all   bool // has no one node as its target
	alone bool // no other fault meanwhile
	jumps bool
	slows bool // packets are held up
	// member: it changes the members, or what they prove themselves with. One such is made at a time.
	member bool
	// mayEnd: a node may end by itself under it, and be started again: where a vote can't be stored there is nothing better to do.
	mayEnd bool
	inject func(r *run, n *node, s step) (heal func() error, err error)
}

func kindOf(name string) kind {
	i := slices.IndexFunc(kinds, func(k kind) bool { return k.name == name })
	return kinds[i]
}

var (
	short = [2]time.Duration{3 * time.Second, 6 * time.Second}
	long  = [2]time.Duration{7 * time.Second, 10 * time.Second} // longer than the time after which a stalled disk costs the lead
)

var kinds = []kind{
	{name: "kill", hold: short, inject: func(_ *run, n *node, _ step) (func() error, error) {
		return n.Start, n.End(syscall.SIGKILL, time.Minute)
	}},
	{name: "kill all", hold: [2]time.Duration{time.Second, 3 * time.Second}, all: true, alone: true, inject: killAll},
	{name: "pause", hold: short, inject: func(_ *run, n *node, _ step) (func() error, error) {
		return func() error { return n.Signal(syscall.SIGCONT) }, n.Signal(syscall.SIGSTOP)
	}},
	{name: "cut off", hold: short, inject: func(r *run, n *node, _ step) (func() error, error) {
		// from the other nodes alone: clients still reach it
		return r.block(r.peersOf(n), true, true, n)
	}},
	{name: "isolate", hold: short, inject: func(r *run, n *node, _ step) (func() error, error) {
		return r.block(append(r.peersOf(n), r.others...), true, true, n)
	}},
	{name: "link", hold: short, inject: func(r *run, n *node, _ step) (func() error, error) { // between two nodes; the third reaches both
		return r.block(r.peerOf(n), true, true, n)
	}},
	{name: "deaf", hold: short, inject: func(r *run, n *node, _ step) (func() error, error) {
		return r.block(r.peersOf(n), true, false, n)
	}},
	{name: "mute", hold: short, inject: func(r *run, n *node, _ step) (func() error, error) {
		return r.block(r.peersOf(n), false, true, n)
	}},
	{name: "loss 30%", hold: long, all: true, inject: lossy},
	{name: "delay", hold: long, slows: true, inject: delay},
	{name: "slow disk", needs: "disk", hold: long, inject: func(_ *run, n *node, _ step) (func() error, error) {
		stop, ended := make(chan struct{}), make(chan error, 1)
		go func() { ended <- n.disk.slow(stop) }()
		return func() error { close(stop); return <-ended }, nil
	}},
	{name: "stalled disk", needs: "disk", hold: long, inject: func(_ *run, n *node, _ step) (func() error, error) {
		return func() error { return n.disk.freeze(false) }, n.disk.freeze(true)
	}},
	{name: "full disk", needs: "disk", hold: long, mayEnd: true, inject: func(_ *run, n *node, _ step) (func() error, error) {
		return func() error { return n.disk.fill(false) }, n.disk.fill(true)
	}},
	{name: "clock", needs: "clock", hold: short, jumps: true, inject: func(_ *run, n *node, s step) (func() error, error) {
		return func() error { return setClock(n.home, 0) }, setClock(n.home, s.By)
	}},
	{name: "replace", needs: "members", hold: long, member: true, inject: replace},
	{name: "lost node", needs: "members", hold: short, member: true, inject: lose},
	{name: "one more", needs: "members", hold: short, all: true, member: true, inject: grow},
	{name: "demote", needs: "members", hold: short, member: true, inject: demote},
	{name: "transfer", needs: "members", hold: [2]time.Duration{time.Second, 2 * time.Second}, inject: transfer},
	{name: "ca", needs: "keys", hold: long, all: true, member: true, inject: anotherCA},
	{name: "kek", needs: "keys", hold: short, all: true, member: true, inject: anotherKEK},
	{name: "snapshot", needs: "keys", hold: short, all: true, inject: snapshot},
	{name: "roll", hold: [2]time.Duration{10 * time.Second, 14 * time.Second}, all: true, alone: true, inject: roll},
}

func killAll(r *run, _ *node, _ step) (func() error, error) {
	var errs []error
	for _, n := range r.live() { // within a few milliseconds
		errs = append(errs, n.End(syscall.SIGKILL, time.Minute))
	}
	return func() error {
		var errs []error
		for _, n := range r.live() {
			errs = append(errs, n.Start())
		}
		return errors.Join(errs...)
	}, errors.Join(errs...)
}

// roll stops one node after another in an orderly way and waits until each answers again.
func roll(r *run, _ *node, _ step) (func() error, error) {
	for _, n := range r.live() {
		if err := n.End(syscall.SIGTERM, time.Minute); err != nil {
			return nil, err
		}
		if err := n.Start(); err != nil {
			return nil, err
		}
		if err := process.Until(r.ctx, patience,
			n.Name+" answers after an orderly restart", func() bool { return r.status(n, 3*time.Second) == nil }); err != nil {
			return nil, err
		}
	}
	return func() error { return nil }, nil
}

func lossy(r *run, _ *node, _ step) (func() error, error) {
	const part = 0.3
	set := func(on bool) error {
		var errs []error
		for _, h := range r.slots {
			errs = append(errs, r.net.lose(on, h.name, part))
		}
		return errors.Join(errs...)
	}
	return func() error { return set(false) }, set(true)
}

// delay holds up all packets of a node, and sees that it does: one that is sent and one that answers wait half of it at least, each.
func delay(r *run, n *node, s step) (func() error, error) {
	l, err := newRelay(r.net, n.host, s.By, r.seed)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(r.ctx, 5*time.Second)
	defer cancel()
	began := time.Now()
	c, err := r.net.dialFrom(office)(ctx, "tcp", n.api())
	if took := time.Since(began); err == nil && took < s.By { // where packets are lost beside, it may fail
		return nil, errors.Join(fmt.Errorf("a connection was made in %s", took), c.Close(), l.close())
	}
	if err == nil {
		_ = c.Close()
	}
	return l.close, nil
}

// peersOf gives the hosts of all other nodes, those that may come meanwhile too.
func (r *run) peersOf(n *node) (out []string) {
	for _, h := range r.slots {
		if h != n.host {
			out = append(out, h.name)
		}
	}
	return out
}

// peerOf gives the host of one other node.
func (r *run) peerOf(n *node) []string {
	all := r.live()
	i := slices.Index(all, n)
	return []string{all[(i+1)%len(all)].host.name}
}

// block cuts a node from others: what it hears of them, what they hear of it, or both.
func (r *run) block(others []string, in, out bool, n *node) (func() error, error) {
	set := func(on bool) error {
		var errs []error
		for _, o := range others {
			if in {
				errs = append(errs, r.net.deafen(on, n.host.name, o))
			}
			if out {
				errs = append(errs, r.net.deafen(on, o, n.host.name))
			}
		}
		return errors.Join(errs...)
	}
	return func() error { return set(false) }, set(true)
}

// target finds the node that a step means now: not one that has another fault. It gives nil where each has one.
func (r *run) target(s step) *node {
	r.mu.Lock()
	defer r.mu.Unlock()
	lead := slices.IndexFunc(r.nodes, func(n *node) bool { return n.Name == r.leader })
	i, err := strconv.Atoi(s.Target)
	switch {
	case err == nil:
	case s.Target == "follower":
		i = (lead + 1) % len(r.nodes)
	default:
		i = max(lead, 0)
	}
	for j := range r.nodes {
		if n := r.nodes[(i+j)%len(r.nodes)]; !n.faulty {
			n.faulty = true
			return n
		}
	}
	return nil
}

// play injects one step, holds it, and heals it.
func (r *run) play(s step) error {
	k := kindOf(s.Kind)
	var n *node
	what := s.Kind
	if !k.all {
		if n = r.target(s); n == nil {
			fmt.Printf("%7s  %s is left out: every node has a fault already\n", time.Duration(r.h.now()).Round(100*time.Millisecond), s.Kind)
			return nil
		}
		defer func() { r.mu.Lock(); n.faulty = false; r.mu.Unlock() }()
		what += " of " + n.Name
		if n.Name == r.lead() {
			what += ", which leads"
		}
	}
	if s.By != 0 {
		what += fmt.Sprintf(", by %s", s.By)
	}
	from := r.h.now()
	heal, err := k.inject(r, n, s)
	if err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	if rest := s.Hold - time.Duration(r.h.now()-from); rest > 0 {
		_ = process.Pause(r.ctx, rest)
	}
	err = heal()
	to := r.h.now()
	if k.mayEnd {
		r.mu.Lock()
		r.excused = append(r.excused, [2]time.Time{r.h.began.Add(time.Duration(from)), r.h.began.Add(time.Duration(to)).Add(5 * time.Second)})
		r.mu.Unlock()
	}
	r.h.acted(act{what, from, to})
	w, d := r.h.acked(from, to)
	fmt.Printf("%7s  %-46s %5s  %5d changes and %5d reads answered meanwhile\n", time.Duration(from).Round(100*time.Millisecond), what,
		time.Duration(to-from).Round(100*time.Millisecond), w, d)
	if err != nil {
		return fmt.Errorf("end of %s: %w", what, err)
	}
	return nil
}
