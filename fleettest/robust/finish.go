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
)

// story is the run itself: workers call, the nemesis acts, and half way one appliance is banned.
func (r *run) story(steps []step) error {
	ctx, stop := context.WithCancel(r.ctx)
	var calls, faults sync.WaitGroup
	defer func() { stop(); calls.Wait(); faults.Wait() }()
	k := &keys{}
	for i := range r.workers {
		v, err := r.only(12*time.Second, r.nodes...)
		if err != nil {
			return err
		}
		v.at = i % len(v.clients)
		w := newWorker(i, r.seed, v, r.h, k)
		calls.Go(func() { defer v.close(); w.run(ctx, r.think) })
	}
	for _, n := range r.nodes {
		calls.Go(func() {
			if err := r.watch(ctx, n); err != nil {
				r.h.breach(err.Error())
			}
		})
	}
	began := time.Now()
	var mu sync.Mutex
	var errs []error
	fail := func(err error) {
		mu.Lock()
		defer mu.Unlock()
		errs = append(errs, err)
	}
	faults.Go(func() {
		if pause(ctx, r.duration/2) == nil {
			if err := r.ban(); err != nil {
				fail(err)
			}
		}
	})
	for _, s := range steps {
		if err := pause(ctx, time.Until(began.Add(s.At))); err != nil {
			return err
		}
		if kindOf(s.Kind).alone {
			r.idle(ctx)
		}
		done := make(chan struct{})
		faults.Go(func() {
			defer close(done)
			if err := r.play(s); err != nil {
				fail(err)
			}
		})
		if kindOf(s.Kind).alone {
			<-done
		}
	}
	if err := pause(ctx, time.Until(began.Add(r.duration))); err != nil {
		return err
	}
	faults.Wait()
	stop()
	calls.Wait()
	return errors.Join(errs...)
}

// idle waits until no node has a fault.
func (r *run) idle(ctx context.Context) {
	_ = until(ctx, time.Minute, "no node has a fault", func() bool {
		r.mu.Lock()
		defer r.mu.Unlock()
		return !slices.ContainsFunc(r.nodes, func(n *node) bool { return n.faulty })
	})
}

// ban bans an appliance that is online, however long it takes.
func (r *run) ban() error {
	v, err := r.only(30*time.Second, r.nodes...)
	if err != nil {
		return err
	}
	defer v.close()
	for try := 0; ; try++ {
		e := ask(r.ctx, v, func(ctx context.Context, c controlv1connect.ControlClient) error {
			_, err := c.BanAppliance(ctx, connect.NewRequest(&controlv1.BanApplianceRequest{RequestId: "ban-of-" + banned, Name: banned, Reason: "half way"}))
			return err
		})
		switch {
		case e.outcome == done:
			return nil
		case e.outcome == refused || try == 5:
			return fmt.Errorf("the ban of %s: %s: %s", banned, e.outcome, e.detail)
		}
	}
}

// recovered waits until all nodes show the same log, and takes a change through each.
func (r *run) recovered() error {
	var all []*vendor
	for _, n := range r.nodes {
		v, err := r.only(10*time.Second, n)
		if err != nil {
			return err
		}
		defer v.close()
		all = append(all, v)
	}
	for i, v := range all {
		var last ending
		if err := until(r.ctx, time.Minute, "a change goes through "+r.nodes[i].name+" after all faults have ended", func() bool {
			last = ask(r.ctx, v, func(ctx context.Context, c controlv1connect.ControlClient) error {
				_, err := c.RegisterCustomer(ctx, connect.NewRequest(&controlv1.RegisterCustomerRequest{RequestId: "after-" + v.names[0], Name: "after-" + v.names[0]}))
				return err
			})
			return last.outcome == done
		}); err != nil {
			return fmt.Errorf("%w: %s", err, last.detail)
		}
	}
	return until(r.ctx, time.Minute, "all nodes show the same log", func() bool {
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
	for i, n := range r.nodes {
		v, err := r.only(30*time.Second, n)
		if err != nil {
			return err
		}
		defer v.close()
		var all []*controlv1.Appliance
		from := r.h.now()
		e := ask(r.ctx, v, func(ctx context.Context, c controlv1connect.ControlClient) error {
			res, err := c.ListAppliances(ctx, connect.NewRequest(&controlv1.ListAppliancesRequest{}))
			all = res.Msg.GetAppliances()
			return err
		})
		if e.outcome != done {
			return fmt.Errorf("node %s does not list the appliances at the end: %s", n.name, e.detail)
		}
		to := r.h.now()
		by := map[string][]*controlv1.Appliance{}
		for _, a := range all {
			by[a.GetCustomer()] = append(by[a.GetCustomer()], a)
			if a.GetName() == banned && (a.GetOnline() || a.GetStatus() != "banned") {
				r.h.breach(fmt.Sprintf("node %s shows the banned appliance %s as %s, online %v", n.name, banned, a.GetStatus(), a.GetOnline()))
			}
		}
		for g := range groups {
			r.h.add(op{Worker: r.workers + i, Key: g, Kind: opList, Node: n.name, Tries: 1, Call: from, Return: to, Outcome: done, Group: groupOf(g, by[g])})
		}
	}
	return nil
}

// lasting checks that the appliance that stays is served: every message of a probe is echoed once.
func (r *run) lasting() error {
	if err := until(r.ctx, 90*time.Second, "appliance "+kept+" is online after all faults have ended", func() bool { return r.online(kept) }); err != nil {
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
	for _, n := range r.nodes {
		file := r.path("evidence-" + n.name + ".json")
		if _, err := r.demarc(n.name, "evidence", "export", "--out", file); err != nil {
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
			return log, nil, fmt.Errorf("the evidence of %s has %d logs", n.name, len(bundle.Logs))
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
	log, entries, err := r.evidence()
	if err != nil {
		return nil, "", err
	}
	by := string(fleet.PrincipalOf(domain, fleet.Operator, operator))
	bad = append(bad, r.h.odd...)
	bad = append(bad, checkWrites(by, r.h.ops, entries)...)
	bad = append(bad, checkLooks(by, r.h.looks, r.h.ops, log, entries)...)
	bad = append(bad, checkBan(entries, banned)...)
	logs := map[string]io.Reader{}
	for _, n := range r.nodes {
		f, err := os.Open(n.log)
		if err != nil {
			return nil, "", err
		}
		defer f.Close()
		logs[n.name] = f
	}
	terms, two := checkTerms(logs)
	bad = append(bad, two...)
	for _, n := range r.nodes {
		if err := n.died(r.excuses); err != nil {
			bad = append(bad, err.Error())
		}
	}
	v := linearizable(r.ctx, r.h.ops, r.h.acts, 3*time.Minute)
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
	return bad, fmt.Sprintf("%d calls (%d done, %d refused, %d did not happen, %d of unknown end) on %d keys; %d looks at the log, which has %d entries; %d leaders",
		len(r.h.ops), count[done], count[refused], count[undone], count[unknown], v.keys, len(r.h.looks), log.Size(), terms), nil
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
