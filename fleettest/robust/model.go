// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"math"
	"slices"
	"strings"
	"time"

	"github.com/anishathalye/porcupine"
)

// groupSize is how many appliances a group has: one list reads them all, so that a torn read shows.
const groupSize = 3

// group is a customer with its appliances: "-" for one that is not registered, else the reason of its ban, "" before any.
type group struct {
	founded bool
	reason  [groupSize]string
}

// counter is an appliance that never enrols, and the newest probe that it was sent.
type counter struct {
	enlisted bool
	id       string
	sent     uint64
}

// Faults that the book answers with.
const (
	conflict = "conflict"
	notFound = "not_found"
)

// stepGroup tells whether an answer can be given in a state, and which state follows.
func stepGroup(g group, o op) (bool, group) {
	want := ""
	next := g
	switch o.Kind {
	case opFound:
		if g.founded {
			want = conflict
		}
		next.founded = true
	case opCreate:
		switch {
		case !g.founded:
			want = notFound
		case g.reason[o.Name] != absent:
			want = conflict
		default:
			next.reason[o.Name] = ""
		}
	case opBan:
		if g.reason[o.Name] == absent {
			want = notFound
		} else {
			next.reason[o.Name] = o.Value
		}
	case opList:
		return o.Group == g.reason, g
	default:
		return false, g
	}
	if want != "" {
		next = g
	}
	return o.Outcome == unknown || o.Fault == want, next
}

func stepCounter(c counter, o op) (bool, counter) {
	want := ""
	next := c
	switch o.Kind {
	case opEnlist:
		if c.enlisted {
			want = conflict
		}
		next.enlisted = true
	case opAsk:
		switch {
		case !c.enlisted:
			want = notFound
		case c.id != o.Value:
			next.id, next.sent = o.Value, o.Add
		default:
			next.sent += o.Add
		}
	case opGet:
		if !c.enlisted || c.id != o.Value {
			return o.Fault == notFound, c
		}
		return o.Fault == "" && o.Sent == c.sent, c
	default:
		return false, c
	}
	if want != "" {
		next = c
	}
	return o.Outcome == unknown || o.Fault == want, next
}

func isCounter(key string) bool { return strings.HasPrefix(key, counterPrefix) }

const (
	groupPrefix   = "g-"
	counterPrefix = "c-"
)

// modelOf is the state machine of one key.
func modelOf(key string) porcupine.Model {
	m := porcupine.Model{
		DescribeOperation: func(in, _ any) string { return describe(in.(op)) },
		DescribeState:     func(s any) string { return fmt.Sprintf("%+v", s) },
	}
	if isCounter(key) {
		m.Init = func() any { return counter{} }
		m.Step = func(s, in, _ any) (bool, any) {
			ok, next := stepCounter(s.(counter), in.(op))
			return ok, next
		}
		return m
	}
	m.Init = func() any { return group{reason: [groupSize]string{absent, absent, absent}} }
	m.Step = func(s, in, _ any) (bool, any) {
		ok, next := stepGroup(s.(group), in.(op))
		return ok, next
	}
	return m
}

func describe(o op) string {
	var what string
	switch o.Kind {
	case opFound, opEnlist:
		what = o.Kind
	case opCreate:
		what = fmt.Sprintf("create %d", o.Name)
	case opBan:
		what = fmt.Sprintf("ban %d %s", o.Name, o.Value)
	case opList:
		what = fmt.Sprintf("list %q", o.Group)
	case opAsk:
		what = fmt.Sprintf("ask %s +%d", o.Value, o.Add)
	case opGet:
		what = fmt.Sprintf("get %s = %d", o.Value, o.Sent)
	}
	return fmt.Sprintf("%s -> %s %s (node %s, worker %d, %d tries)", what, o.Outcome, o.Fault, o.Node, o.Worker, o.Tries)
}

// byKey sorts the calls that say something into the histories of their keys.
func byKey(ops []op) map[string][]porcupine.Operation {
	out := map[string][]porcupine.Operation{}
	for _, o := range ops {
		till := o.Return
		switch {
		case o.Outcome == undone, o.Outcome == unknown && !o.writes():
			continue
		case o.Outcome == unknown:
			till = math.MaxInt64 / 2 // it may happen after everything else
		}
		out[o.Key] = append(out[o.Key], porcupine.Operation{ClientId: o.Worker, Input: o, Call: o.Call, Output: o.Outcome, Return: till})
	}
	return out
}

// verdict is what porcupine says of a history.
type verdict struct {
	keys, ops int
	bad       string // the first key whose history is not linearizable, or could not be decided
	why       string
	picture   func(path string) error
}

// linearizable looks at each key by itself. The budget is for all of them.
func linearizable(ctx context.Context, ops []op, acts []act, budget time.Duration) verdict {
	all := byKey(ops)
	v := verdict{keys: len(all)}
	ctx, cancel := context.WithTimeout(ctx, budget)
	defer cancel()
	keys := make([]string, 0, len(all))
	for k := range all {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	for _, k := range keys {
		v.ops += len(all[k])
		left := time.Millisecond
		if end, ok := ctx.Deadline(); ok {
			left = max(left, time.Until(end))
		}
		m := modelOf(k)
		res, info := porcupine.CheckOperationsVerbose(m, all[k], left)
		if res == porcupine.Ok {
			continue
		}
		v.bad, v.why = k, "is not linearizable"
		if res == porcupine.Unknown {
			v.why = "could not be decided in time"
		}
		var notes []porcupine.Annotation
		for _, a := range acts {
			notes = append(notes, porcupine.Annotation{Tag: "faults", Start: a.From, End: a.To, Description: a.What})
		}
		info.AddAnnotations(notes)
		v.picture = func(path string) error { return porcupine.VisualizePath(m, info, path) }
		return v
	}
	return v
}
