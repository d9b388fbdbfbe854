// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"connectrpc.com/connect"

	controlv1 "github.com/demarc-dev/demarc/api/control/v1"
	"github.com/demarc-dev/demarc/api/control/v1/controlv1connect"
	"github.com/demarc-dev/demarc/audit"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/fleettest/caller"
	"github.com/demarc-dev/demarc/fleettest/process"
)

// story is the run itself: workers call, the nemesis acts, and half way one appliance is banned.
func (r *run) story(steps []step) error {
	ctx, stop := context.WithCancel(r.ctx)
	var calls, faults sync.WaitGroup
	defer func() { stop(); calls.Wait(); faults.Wait() }()
	k := &keys{}
	for i := range r.workers {
		c := &crew{run: r}
		if err := c.refresh(); err != nil {
			return err
		}
		c.v.At = i % len(c.v.Clients)
		w := newWorker(i, r.seed, c, r.h, k)
		calls.Go(func() { defer c.close(); w.run(ctx, r.think) })
	}
	for _, n := range r.live() {
		r.looking.Go(func() { r.watch(n) })
	}
	var mu sync.Mutex
	var errs []error
	fail := func(err error) {
		if err != nil {
			mu.Lock()
			defer mu.Unlock()
			errs = append(errs, err)
		}
	}
	faults.Go(func() {
		if process.Pause(ctx, r.duration/2) == nil {
			fail(r.ban())
		}
	})
	err := r.nemesis(ctx, steps, &faults, fail)
	faults.Wait()
	stop()
	calls.Wait()
	return errors.Join(append(errs, err)...)
}

// nemesis plays the steps. One that is not meant to begin beside another waits until all before it have ended: what takes longer
// than it was drawn puts off what follows, and what does not fit any more is left out.
func (r *run) nemesis(ctx context.Context, steps []step, faults *sync.WaitGroup, fail func(error)) error {
	began := time.Now()
	var late time.Duration
	for i, s := range steps {
		if err := process.Pause(ctx, time.Until(began.Add(s.At+late))); err != nil {
			return err
		}
		if !s.Beside {
			if err := r.idle(ctx); err != nil {
				return err
			}
			late = max(late, time.Since(began)-s.At)
		}
		if time.Since(began)+s.Hold+quietLast > r.duration+r.duration/4 {
			fmt.Printf("%d of %d faults are left out: those before took longer than they were drawn\n", len(steps)-i, len(steps))
			break
		}
		r.lasts(1)
		faults.Go(func() {
			defer r.lasts(-1)
			fail(r.play(s))
		})
		if kindOf(s.Kind).alone {
			if err := r.idle(ctx); err != nil {
				return err
			}
		}
	}
	return process.Pause(ctx, time.Until(began.Add(r.duration)))
}

// lasts counts the faults that last.
func (r *run) lasts(more int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.running += more
}

// idle waits until no fault lasts.
func (r *run) idle(ctx context.Context) error {
	return process.Until(ctx, 3*patience, "no fault lasts", func() bool {
		r.mu.Lock()
		defer r.mu.Unlock()
		return r.running == 0
	})
}

// ban bans an appliance that is online, however long it takes.
func (r *run) ban() error {
	v, err := r.only(30*time.Second, r.live()...)
	if err != nil {
		return err
	}
	defer v.Close()
	var e caller.Ending
	err = process.Until(r.ctx, patience, "the ban of "+banned+" is answered", func() bool {
		e = caller.Ask(r.ctx, v, func(ctx context.Context, c controlv1connect.ControlClient) error {
			_, err := c.BanAppliance(ctx,
				connect.NewRequest(&controlv1.BanApplianceRequest{RequestId: "ban-of-" + banned, Name: banned, Reason: "half way"}))
			return err
		})
		return e.Outcome == done || e.Outcome == refused
	})
	if err == nil && e.Outcome == done {
		return nil
	}
	return errors.Join(err, fmt.Errorf("the ban of %s: %s: %s", banned, e.Outcome, e.Detail))
}

// recovered waits until all nodes show the same log, and takes a change through each.
func (r *run) recovered() error {
	var all []*caller.Vendor
	for _, n := range r.live() {
		v, err := r.only(10*time.Second, n)
		if err != nil {
			return err
		}
		defer v.Close()
		all = append(all, v)
	}
	for _, v := range all {
		var last caller.Ending
		if err := process.Until(r.ctx, patience, "a change goes through "+v.Names[0]+" after all faults have ended", func() bool {
			last = caller.Ask(r.ctx, v, func(ctx context.Context, c controlv1connect.ControlClient) error {
				_, err := c.RegisterCustomer(ctx,
					connect.NewRequest(&controlv1.RegisterCustomerRequest{RequestId: "after-" + v.Names[0], Name: "after-" + v.Names[0]}))
				return err
			})
			return last.Outcome == done
		}); err != nil {
			return fmt.Errorf("%w: %s", err, last.Detail)
		}
	}
	return process.Until(r.ctx, patience, "all nodes show the same log", func() bool {
		var sizes []int64
		for _, v := range all {
			l, err := r.look(v, 5*time.Second)
			if err != nil {
				return false
			}
			sizes = append(sizes, l.Size)
		}
		return slices.Min(sizes) == slices.Max(sizes)
	})
}

// lastReads lists everything at each node, and adds it to the history of each group.
func (r *run) lastReads() error {
	groups := map[string]bool{}
	for _, o := range r.h.ops {
		if !isCounter(o.Key) {
			groups[o.Key] = true
		}
	}
	for i, n := range r.live() {
		v, err := r.only(30*time.Second, n)
		if err != nil {
			return err
		}
		defer v.Close()
		var all []*controlv1.Appliance
		from := r.h.now()
		e := caller.Ask(r.ctx, v, func(ctx context.Context, c controlv1connect.ControlClient) error {
			res, err := c.ListAppliances(ctx, connect.NewRequest(&controlv1.ListAppliancesRequest{}))
			all = res.Msg.GetAppliances()
			return err
		})
		if e.Outcome != done {
			return fmt.Errorf("node %s does not list the appliances at the end: %s", n.Name, e.Detail)
		}
		to := r.h.now()
		by := map[string][]*controlv1.Appliance{}
		for _, a := range all {
			by[a.GetCustomer()] = append(by[a.GetCustomer()], a)
			if a.GetName() == banned && (a.GetOnline() || a.GetStatus() != "banned") {
				r.h.breach(fmt.Sprintf("node %s shows the banned appliance %s as %s, online %v", n.Name, banned, a.GetStatus(), a.GetOnline()))
			}
		}
		for g := range groups {
			r.h.add(op{Worker: r.workers + i, Key: g, Kind: opList, Node: n.Name, Tries: 1, Call: from, Return: to, Outcome: done,
				Group: groupOf(g, by[g])})
		}
	}
	return nil
}

// lasting checks that the appliance that stays is served: every message of a probe is echoed once.
func (r *run) lasting() error {
	if err := process.Until(r.ctx, patience,
		"appliance "+kept+" is online after all faults have ended", func() bool { return r.online(kept) }); err != nil {
		return err
	}
	out, err := r.demarc("", "probe", "--appliance", kept, "--count", "50", "--rate", "25", "--output", "json")
	if err != nil {
		return err
	}
	var c struct {
		Sent, Echoed, Doubled uint64
	}
	if err := json.Unmarshal([]byte(out), &c); err != nil || c.Sent != 50 || c.Echoed != 50 || c.Doubled != 0 {
		return fmt.Errorf("probe of %s at the end: %s", kept, out)
	}
	return nil
}

// evidence exports the log from each node and lets the auditor's command compare them. It gives the longest.
func (r *run) evidence() (log audit.Log, entries []audit.Entry, err error) {
	args := []string{"verify"}
	for _, n := range r.live() {
		file := r.path("evidence-" + n.Name + ".json")
		if _, err := r.demarc(n.Name, "evidence", "export", "--out", file); err != nil {
			return log, nil, err
		}
		args = append(args, file)
		b, err := os.ReadFile(file)
		if err != nil {
			return log, nil, err
		}
		bundle, err := audit.ParseBundle(b)
		if err != nil {
			return log, nil, err
		}
		if len(bundle.Logs) != 1 {
			return log, nil, fmt.Errorf("the evidence of %s has %d logs", n.Name, len(bundle.Logs))
		}
		if int64(len(bundle.Logs[0].Entries)) <= log.Size() {
			continue
		}
		log, entries = audit.Log{}, nil
		for _, leaf := range bundle.Logs[0].Entries {
			e, err := audit.ParseEntry([]byte(leaf))
			if err != nil {
				return log, nil, err
			}
			log, entries = log.AppendLeaf([]byte(leaf)), append(entries, e)
		}
	}
	args = append(args, "--pin", audit.VendorOrigin(domain)+"="+r.path("acme", "log.pub"))
	for _, a := range []string{kept, banned} {
		args = append(args, "--pin", audit.CustomerOrigin(domain, fleet.ApplianceID(a))+"="+r.path(a, "data", "log.pub"))
	}
	_, err = r.demarc("", args...)
	return log, entries, err
}

// judge looks at all that was seen. The first line says what is wrong.
func (r *run) judge() (bad []string, summary string, err error) {
	r.hush()
	log, entries, err := r.evidence()
	if err != nil {
		return nil, "", err
	}
	by := string(fleet.PrincipalOf(domain, fleet.Operator, operator))
	bad = append(bad, r.h.odd...)
	bad = append(bad, checkWrites(by, r.h.ops, entries)...)
	bad = append(bad, checkLooks(by, r.h.looks, r.h.ops, log, entries)...)
	bad = append(bad, checkBan(entries, banned)...)
	bad = append(bad, checkRoster(entries, r.h.turns)...)
	logs := map[string]io.Reader{}
	for _, n := range append(r.live(), r.gone...) {
		f, err := os.Open(n.Log)
		if err != nil {
			return nil, "", err
		}
		defer f.Close()
		logs[n.Name] = f
	}
	terms, two := checkTerms(logs)
	bad = append(bad, two...)
	for _, n := range append(r.live(), r.gone...) {
		if err := n.Died(r.excuses); err != nil {
			bad = append(bad, err.Error())
		}
	}
	v := linearizable(r.ctx, r.h.ops, r.h.acts, 10*time.Minute)
	if v.bad != "" {
		bad = append(bad, fmt.Sprintf("the history of %s %s: see linearizability.html", v.bad, v.why))
		if err := v.picture(r.path("linearizability.html")); err != nil {
			return bad, "", err
		}
	}
	writes, reads := r.h.acked(0, r.h.now())
	count := map[string]int{}
	for _, o := range r.h.ops {
		count[o.Outcome]++
	}
	if writes < 20 || reads < 20 || terms == 0 {
		bad = append(bad, fmt.Sprintf("nothing is shown: %d changes and %d reads were answered, in %d terms", writes, reads, terms))
	}
	return bad, fmt.Sprintf("%d calls (%d done, %d refused, %d did not happen, %d of unknown end) on %d keys; %d looks at the log, which "+
		"has %d entries; %d leaders; %d changes of the members",
		len(r.h.ops), count[done], count[refused], count[undone], count[unknown], v.keys, len(r.h.looks), log.Size(), terms, len(r.h.turns)), nil
}

func (r *run) excuses(at time.Time) bool {
	for _, e := range r.excused {
		if !at.Before(e[0]) && !at.After(e[1]) {
			return true
		}
	}
	return false
}

// failed leaves what people need to look into it.
func (r *run) failed(steps []step, why []string) error {
	var b strings.Builder
	fmt.Fprintf(&b, "seed %d, duration %s\n\n", r.seed, r.duration)
	for _, s := range steps {
		fmt.Fprintln(&b, s)
	}
	fmt.Fprintf(&b, "\n%s\n", strings.Join(why, "\n"))
	return errors.Join(os.WriteFile(filepath.Join(r.out, "reason.txt"), []byte(b.String()), 0o600), r.h.save(r.path("history.json")))
}
