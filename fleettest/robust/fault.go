// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"syscall"
	"time"
)

// kind is one sort of fault. inject gives what ends it.
type kind struct {
	name  string
	needs string // "disk": a loop device, "clock": a demarcd whose clock moves
	hold  [2]time.Duration
	all   bool // has no one node as its target
	alone bool // no other fault meanwhile
	jumps bool
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
		return n.start, n.end(syscall.SIGKILL, 10*time.Second)
	}},
	{name: "kill all", hold: [2]time.Duration{time.Second, 3 * time.Second}, all: true, alone: true, inject: killAll},
	{name: "pause", hold: short, inject: func(_ *run, n *node, _ step) (func() error, error) {
		return func() error { return n.signal(syscall.SIGCONT) }, n.signal(syscall.SIGSTOP)
	}},
	{name: "cut off", hold: short, inject: func(r *run, n *node, _ step) (func() error, error) { // from the other nodes alone: clients still reach it
		return r.block(r.peersOf(n), true, true, n)
	}},
	{name: "isolate", hold: short, inject: func(r *run, n *node, _ step) (func() error, error) {
		return r.block(append(r.peersOf(n), r.others...), true, true, n)
	}},
	{name: "link", hold: short, inject: func(r *run, n *node, _ step) (func() error, error) { // between two nodes; the third reaches both
		return r.block(r.peersOf(n)[:1], true, true, n)
	}},
	{name: "deaf", hold: short, inject: func(r *run, n *node, _ step) (func() error, error) {
		return r.block(r.peersOf(n), true, false, n)
	}},
	{name: "mute", hold: short, inject: func(r *run, n *node, _ step) (func() error, error) {
		return r.block(r.peersOf(n), false, true, n)
	}},
	{name: "loss 30%", hold: long, all: true, inject: lossy},
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
		return func() error { return setClock(n.clock, 0) }, setClock(n.clock, s.By)
	}},
	{name: "roll", hold: [2]time.Duration{10 * time.Second, 14 * time.Second}, all: true, alone: true, inject: roll},
}

func killAll(r *run, _ *node, _ step) (func() error, error) {
	var errs []error
	for _, n := range r.nodes { // within a few milliseconds
		errs = append(errs, n.end(syscall.SIGKILL, 10*time.Second))
	}
	return func() error {
		var errs []error
		for _, n := range r.nodes {
			errs = append(errs, n.start())
		}
		return errors.Join(errs...)
	}, errors.Join(errs...)
}

// roll stops one node after another in an orderly way and waits until each answers again.
func roll(r *run, _ *node, _ step) (func() error, error) {
	for _, n := range r.nodes {
		if err := n.end(syscall.SIGTERM, 20*time.Second); err != nil {
			return nil, err
		}
		if err := n.start(); err != nil {
			return nil, err
		}
		if err := until(r.ctx, 40*time.Second, n.name+" answers after an orderly restart", func() bool { return r.status(n, 3*time.Second) == nil }); err != nil {
			return nil, err
		}
	}
	return func() error { return nil }, nil
}

func lossy(r *run, _ *node, _ step) (func() error, error) {
	const part = 0.3
	set := func(on bool) error {
		var errs []error
		for _, n := range r.nodes {
			errs = append(errs, r.net.lose(on, n.name, part))
		}
		return errors.Join(errs...)
	}
	return func() error { return set(false) }, set(true)
}

func (r *run) peersOf(n *node) (out []string) {
	i := slices.Index(r.nodes, n)
	for j := 1; j < len(r.nodes); j++ {
		out = append(out, r.nodes[(i+j)%len(r.nodes)].name)
	}
	return out
}

// block cuts a node from others: what it hears of them, what they hear of it, or both.
func (r *run) block(others []string, in, out bool, n *node) (func() error, error) {
	set := func(on bool) error {
		var errs []error
		for _, o := range others {
			if in {
				errs = append(errs, r.net.deafen(on, n.name, o))
			}
			if out {
				errs = append(errs, r.net.deafen(on, o, n.name))
			}
		}
		return errors.Join(errs...)
	}
	return func() error { return set(false) }, set(true)
}

// target finds the node that a step means now: not one that has another fault.
func (r *run) target(s step) *node {
	r.mu.Lock()
	defer r.mu.Unlock()
	lead := slices.IndexFunc(r.nodes, func(n *node) bool { return n.name == r.leader })
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
			return fmt.Errorf("%s: every node has a fault already", s.Kind)
		}
		defer func() { r.mu.Lock(); n.faulty = false; r.mu.Unlock() }()
		what += " of " + n.name
		if n.name == r.lead() {
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
		_ = pause(r.ctx, rest)
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
	fmt.Printf("%7s  %-46s %5s  %5d changes and %5d reads answered meanwhile\n", time.Duration(from).Round(100*time.Millisecond), what, time.Duration(to-from).Round(100*time.Millisecond), w, d)
	if err != nil {
		return fmt.Errorf("end of %s: %w", what, err)
	}
	return nil
}
