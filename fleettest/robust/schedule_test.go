// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"time"
)

// TestASeedGivesOneSchedule: the same seed the same, another seed another, and each kind within five minutes.
func TestASeedGivesOneSchedule(t *testing.T) {
	names := allNames()
	const length = 5 * time.Minute
	for seed := range uint64(50) {
		nodes := 3 + 2*int(seed%2)
		a, b := plan(seed, length, nodes, names), plan(seed, length, nodes, names)
		if fmt.Sprint(a) != fmt.Sprint(b) {
			t.Fatalf("seed %d gives two schedules", seed)
		}
		if fmt.Sprint(a) == fmt.Sprint(plan(seed+1, length, nodes, names)) {
			t.Fatalf("seeds %d and %d give the same schedule", seed, seed+1)
		}
		if bad := unsound(a, length); bad != "" {
			t.Errorf("seed %d: %s", seed, bad)
		}
		seen, beside := map[string]bool{}, false
		for _, s := range a {
			seen[s.Kind] = true
			beside = beside || s.Beside
		}
		if want, got := len(names), len(seen); want != got {
			t.Errorf("seed %d: want all %d kinds, got %d", seed, want, got)
		}
		if !beside {
			t.Errorf("seed %d: no two faults at the same time", seed)
		}
	}
}

// unsound says what a schedule must not do.
func unsound(steps []step, length time.Duration) string {
	var over, alone, member time.Duration // when all before, those that are alone, and changes of the members have ended
	var last time.Duration
	for _, s := range steps {
		k := kindOf(s.Kind)
		switch {
		case s.At < last || s.At < quietFirst || s.At+s.Hold+quietLast > length:
			return fmt.Sprintf("%s is out of its time", s)
		case s.At < over != s.Beside:
			return fmt.Sprintf("%s: those before end at %s", s, over)
		case s.At < alone, k.alone && s.At < over:
			return fmt.Sprintf("%s is not alone, or not beside one that is", s)
		case k.member && s.At < member:
			return fmt.Sprintf("%s begins while the members change", s)
		case (s.By != 0) != (k.jumps || k.slows):
			return fmt.Sprintf("%s has a size that it should not have, or none", s)
		}
		last, over = s.At, max(over, s.At+s.Hold)
		if k.alone {
			alone = s.At + s.Hold
		}
		if k.member {
			member = s.At + s.Hold
		}
	}
	return ""
}

// TestUnsound keeps the test above honest.
func TestUnsound(t *testing.T) {
	at := func(at, hold int, kind string, more ...bool) step {
		return step{At: time.Duration(at) * time.Second, Hold: time.Duration(hold) * time.Second, Kind: kind, Target: "leader",
			Beside: len(more) > 0}
	}
	for name, tc := range map[string]struct {
		steps []step
		want  string
	}{
		"one after another":       {[]step{at(3, 5, "kill"), at(9, 5, "replace"), at(15, 5, "demote")}, ""},
		"beside":                  {[]step{at(3, 5, "kill"), at(5, 5, "replace", true)}, ""},
		"beside, and not told":    {[]step{at(3, 5, "kill"), at(5, 5, "replace")}, "those before end at 8s"},
		"told, and not beside":    {[]step{at(3, 5, "kill"), at(9, 5, "replace", true)}, "those before end"},
		"two change the members":  {[]step{at(3, 5, "lost node"), at(5, 5, "replace", true)}, "while the members change"},
		"the third changes them":  {[]step{at(3, 9, "demote"), at(5, 5, "kill", true), at(7, 5, "replace", true)}, "while the members change"},
		"all are killed beside":   {[]step{at(3, 5, "pause"), at(5, 2, "kill all", true)}, "is not alone"},
		"beside all are killed":   {[]step{at(3, 3, "kill all"), at(5, 2, "pause", true)}, "is not alone"},
		"before its time":         {[]step{at(1, 3, "kill")}, "out of its time"},
		"too late":                {[]step{at(55, 3, "kill")}, "out of its time"},
		"a clock that stays":      {[]step{at(3, 3, "clock")}, "size"},
		"packets without a delay": {[]step{at(3, 3, "delay")}, "size"},
	} {
		t.Run(name, func(t *testing.T) {
			got := unsound(tc.steps, time.Minute)
			if tc.want == "" && got != "" || !strings.Contains(got, tc.want) {
				t.Errorf("want %q, got %q", tc.want, got)
			}
		})
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
	if once, again := fmt.Sprint(series(1)), fmt.Sprint(series(1)); once != again {
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
