// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"connectrpc.com/connect"

	controlv1 "github.com/demarc-dev/demarc/api/control/v1"
	"github.com/demarc-dev/demarc/api/control/v1/controlv1connect"
	"github.com/demarc-dev/demarc/fleettest/caller"
)

// A key is given up for a new one after so many calls, or so many of unknown end: each of those doubles the checker's work.
const (
	keyCalls   = 240
	keyUnknown = 5
)

// key is one object under test. Workers share it.
type key struct {
	name    string
	calls   atomic.Int64
	lost    atomic.Int64 // calls of unknown end
	founded atomic.Bool
}

// keys hands out the objects that are in use.
type keys struct {
	mu     sync.Mutex
	next   int
	active []*key
}

const keysInUse = 4 // groups and counters in turn

// pick gives one of the keys in use.
func (k *keys) pick(r *rand.Rand) *key {
	k.mu.Lock()
	defer k.mu.Unlock()
	for len(k.active) < keysInUse {
		k.active = append(k.active, k.fresh(len(k.active)%2 == 1))
	}
	i := r.IntN(len(k.active))
	if x := k.active[i]; x.calls.Load() >= keyCalls || x.lost.Load() >= keyUnknown {
		k.active[i] = k.fresh(isCounter(x.name))
	}
	k.active[i].calls.Add(1)
	return k.active[i]
}

func (k *keys) fresh(count bool) *key {
	k.next++
	prefix := groupPrefix
	if count {
		prefix = counterPrefix
	}
	return &key{name: fmt.Sprintf("%s%d", prefix, k.next)}
}

// worker is one operator that calls in a loop.
type worker struct {
	id   int
	r    *rand.Rand
	crew *crew
	v    *caller.Vendor // of this call
	h    *history
	keys *keys
	seq  int
}

func newWorker(id int, seed uint64, c *crew, h *history, k *keys) *worker {
	return &worker{id: id, r: rand.New(rand.NewPCG(seed, uint64(id)+1)), crew: c, h: h, keys: k}
}

// run calls until ctx ends; what it is in the middle of is waited for.
func (w *worker) run(ctx context.Context, think time.Duration) {
	for ctx.Err() == nil {
		w.once(w.keys.pick(w.r))
		t := time.NewTimer(think/2 + time.Duration(w.r.Int64N(int64(think))))
		select {
		case <-ctx.Done():
		case <-t.C:
		}
		t.Stop()
	}
}

// choose draws the next call on a key.
func (w *worker) choose(k *key) op {
	w.seq++
	o := op{Worker: w.id, Key: k.name, Kind: opList}
	n := w.r.IntN(100)
	if isCounter(k.name) {
		o.Value = [...]string{"a", "a", "a", "b"}[w.r.IntN(4)]
		switch {
		case n < 40:
			o.Kind = opGet
		case n < 45, !k.founded.Load():
			o.Kind = opEnlist
		default:
			o.Kind, o.Add = opAsk, 1+w.r.Uint64N(3)
		}
	} else {
		o.Name = w.r.IntN(groupSize)
		switch {
		case n < 45:
		case n < 50, !k.founded.Load():
			o.Kind = opFound
		case n < 65:
			o.Kind = opCreate
		default:
			o.Kind, o.Value = opBan, fmt.Sprintf("%d.%d", w.id, w.seq)
		}
	}
	if o.Kind != opList && o.Kind != opGet {
		o.Request = fmt.Sprintf("w%d-%d-%x", w.id, w.seq, w.r.Uint64())
	}
	return o
}

func (w *worker) once(k *key) {
	o := w.choose(k)
	if err := w.crew.refresh(); err != nil {
		w.h.breach(err.Error())
	}
	w.v = w.crew.v
	if first := w.r.Uint64(); w.r.IntN(3) == 0 {
		w.v.At = int(first % uint64(len(w.v.Clients))) // followers, and nodes that are cut off, are asked too
	}
	o.Call = w.h.now()
	e := w.call(&o)
	o.Return = w.h.now()
	o.Outcome, o.Fault, o.Detail, o.Tries, o.Node = e.Outcome, e.Fault, e.Detail, e.Tries, e.Node
	if o.Kind == opFound || o.Kind == opEnlist {
		if o.Outcome == done || o.Outcome == refused {
			k.founded.Store(true)
		}
	}
	if o.Outcome == unknown && o.writes() {
		k.lost.Add(1)
	}
	w.h.add(o)
}

func applianceOf(key string, n int) string { return fmt.Sprintf("%s-%d", key, n) }

// counters is the customer of all counters.
const counters = "counters"

// call does it, with what the node answers in o.
func (w *worker) call(o *op) caller.Ending {
	ctx := context.Background()
	switch o.Kind {
	case opFound:
		return caller.Ask(ctx, w.v, func(ctx context.Context, c controlv1connect.ControlClient) error {
			_, err := c.RegisterCustomer(ctx, connect.NewRequest(&controlv1.RegisterCustomerRequest{RequestId: o.Request, Name: o.Key}))
			return err
		})
	case opCreate, opEnlist:
		name, customer := applianceOf(o.Key, o.Name), o.Key
		if o.Kind == opEnlist {
			name, customer = o.Key, counters
		}
		return caller.Ask(ctx, w.v, func(ctx context.Context, c controlv1connect.ControlClient) error {
			_, err := c.RegisterAppliance(ctx,
				connect.NewRequest(
					&controlv1.RegisterApplianceRequest{RequestId: o.Request, Name: name, Customer: customer, Expect: w.crew.run.expect}))
			return err
		})
	case opBan:
		return caller.Ask(ctx, w.v, func(ctx context.Context, c controlv1connect.ControlClient) error {
			_, err := c.BanAppliance(ctx,
				connect.NewRequest(&controlv1.BanApplianceRequest{RequestId: o.Request, Name: applianceOf(o.Key, o.Name), Reason: o.Value}))
			return err
		})
	case opList:
		return caller.Ask(ctx, w.v, func(ctx context.Context, c controlv1connect.ControlClient) error {
			res, err := c.ListAppliances(ctx, connect.NewRequest(&controlv1.ListAppliancesRequest{Customer: o.Key}))
			if err == nil {
				o.Group = groupOf(o.Key, res.Msg.GetAppliances())
			}
			return err
		})
	case opAsk:
		return caller.Ask(ctx, w.v, func(ctx context.Context, c controlv1connect.ControlClient) error {
			_, err := c.Probe(ctx,
				connect.NewRequest(&controlv1.ProbeRequest{RequestId: o.Request, Appliance: o.Key, Id: o.Value, Count: uint32(o.Add)}))
			return err
		})
	}
	return caller.Ask(ctx, w.v, func(ctx context.Context, c controlv1connect.ControlClient) error {
		res, err := c.GetProbe(ctx, connect.NewRequest(&controlv1.GetProbeRequest{Appliance: o.Key, Id: o.Value}))
		if err == nil {
			o.Sent = res.Msg.GetSent()
		}
		return err
	})
}

func groupOf(key string, all []*controlv1.Appliance) [groupSize]string {
	out := [groupSize]string{absent, absent, absent}
	for _, a := range all {
		for i := range out {
			if strings.TrimPrefix(a.GetName(), key) == fmt.Sprintf("-%d", i) {
				out[i] = a.GetReason()
			}
		}
	}
	return out
}
