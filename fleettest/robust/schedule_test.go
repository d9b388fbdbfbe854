// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"math/rand/v2"
	"testing"
	"time"
)

// TestASeedGivesOneSchedule: the same seed the same, another seed another, and each kind within five minutes.
func TestASeedGivesOneSchedule(t *testing.T) {
	names := allNames()
	for seed := range uint64(50) {
		a, b := plan(seed, 5*time.Minute, names), plan(seed, 5*time.Minute, names)
		if fmt.Sprint(a) != fmt.Sprint(b) {
			t.Fatalf("seed %d gives two schedules", seed)
		}
		if fmt.Sprint(a) == fmt.Sprint(plan(seed+1, 5*time.Minute, names)) {
			t.Fatalf("seeds %d and %d give the same schedule", seed, seed+1)
		}
		seen := map[string]bool{}
		last := step{}
		for _, s := range a {
			seen[s.Kind] = true
			if s.At < last.At || s.At+s.Hold+quietLast > 5*time.Minute {
				t.Errorf("seed %d: %s after %s", seed, s, last)
			}
			if kindOf(s.Kind).alone && s.At < last.At+last.Hold || last.Kind != "" && kindOf(last.Kind).alone && s.At < last.At+last.Hold {
				t.Errorf("seed %d: %s and %s at the same time", seed, last, s)
			}
			last = s
		}
		if want, got := len(names), len(seen); want != got {
			t.Errorf("seed %d: want all %d kinds, got %d", seed, want, got)
		}
	}
}

func TestKindsThatAreLeftOut(t *testing.T) {
	names, err := namesOf([]string{"disk", "kill"})
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range names {
		if n == "kill" || kindOf(n).needs == "disk" {
			t.Errorf("%s is still there", n)
		}
	}
	if want, got := len(allNames())-4, len(names); want != got {
		t.Errorf("want %d kinds, got %d", want, got)
	}
	if _, err := namesOf([]string{"lightning"}); err == nil {
		t.Error("a fault that there is not can be left out")
	}
}

// TestASeedGivesOneSeriesOfCalls: what a client draws does not depend on how its calls end.
func TestASeedGivesOneSeriesOfCalls(t *testing.T) {
	series := func(seed uint64) (out []string) {
		w, k := newWorker(3, seed, nil, nil, nil), &key{name: "g-1"}
		k.founded.Store(true)
		for range 100 {
			out = append(out, fmt.Sprintf("%+v", w.choose(k)))
		}
		return out
	}
	if fmt.Sprint(series(1)) != fmt.Sprint(series(1)) {
		t.Error("one seed gives two series")
	}
	if fmt.Sprint(series(1)) == fmt.Sprint(series(2)) {
		t.Error("two seeds give one series")
	}
}

// TestKeysAreGivenUp: after so many calls, or so many of unknown end.
func TestKeysAreGivenUp(t *testing.T) {
	k, r := &keys{}, rand.New(rand.NewPCG(1, 1))
	uses := map[string]int{}
	for range 20 * keyCalls {
		x := k.pick(r)
		if uses[x.name]++; uses[x.name] > keyCalls {
			t.Fatalf("%s is used %d times", x.name, uses[x.name])
		}
		if isCounter(x.name) && uses[x.name] == 10 {
			x.lost.Store(keyUnknown)
		}
		if isCounter(x.name) && uses[x.name] > 10 {
			t.Fatalf("%s is used on", x.name)
		}
	}
}
