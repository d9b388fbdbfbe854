// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"time"
)

// step is one fault of a schedule.
type step struct {
	At, Hold time.Duration
	Kind     string
	Target   string        // leader, follower, or the place of a node: 0, 1, 2
	By       time.Duration // of a clock's jump, of the packets' delay
	Beside   bool          // it begins while another one lasts
}

func (s step) String() string {
	out := fmt.Sprintf("%7s  %-13s", s.At.Round(100*time.Millisecond), s.Kind)
	if !kindOf(s.Kind).all {
		out += " of " + s.Target
	}
	if s.By != 0 {
		out += fmt.Sprintf(" by %s", s.By)
	}
	out += fmt.Sprintf(" for %s", s.Hold.Round(100*time.Millisecond))
	if s.Beside {
		out += ", beside another one"
	}
	return out
}

// Times of a schedule.
const (
	quietFirst = 3 * time.Second // before the first fault
	quietLast  = 4 * time.Second // after the last
)

var (
	jumps  = []time.Duration{90 * time.Second, -90 * time.Second, time.Hour, -time.Hour, 10 * time.Hour, -10 * time.Hour}
	delays = []time.Duration{20 * time.Millisecond, 80 * time.Millisecond, 200 * time.Millisecond}
)

// plan draws a schedule for so many nodes. The same arguments give the same one.
func plan(seed uint64, length time.Duration, nodes int, names []string) []step {
	r := rand.New(rand.NewPCG(seed, 0))
	between := func(from, to time.Duration) time.Duration { return from + time.Duration(r.Int64N(int64(to-from))) }
	targets := []string{"leader", "leader", "follower"}
	for i := range nodes {
		targets = append(targets, strconv.Itoa(i))
	}
	var out []step
	var deck []string
	var over, settled time.Duration // when all faults, and all changes of the members, have ended
	beside := false
	for at := quietFirst; len(names) > 0; {
		if len(deck) == 0 { // each kind comes before any comes again
			deck = slices.Clone(names)
			r.Shuffle(len(deck), func(i, j int) { deck[i], deck[j] = deck[j], deck[i] })
		}
		k := kindOf(deck[0])
		s := step{At: at, Hold: between(k.hold[0], k.hold[1]), Kind: k.name, Target: targets[r.IntN(len(targets))], Beside: beside}
		switch {
		case k.jumps:
			s.By = jumps[r.IntN(len(jumps))]
		case k.slows:
			s.By = delays[r.IntN(len(delays))]
		}
		if at+s.Hold+quietLast > length {
			return out
		}
		out = append(out, s)
		deck = deck[1:]
		over = max(over, at+s.Hold)
		if k.member {
			settled = at + s.Hold
		}
		early := at + between(time.Second, s.Hold+1)
		at, beside = over+between(time.Second, 3*time.Second), false
		if !k.alone && len(deck) > 0 && r.IntN(3) == 0 && canJoin(kindOf(deck[0]), early < settled) {
			at, beside = early, true // the next one comes while this one lasts
		}
	}
	return out
}

// canJoin tells whether a fault may begin while another one lasts: two changes of the members are not made at the same time.
func canJoin(next kind, changing bool) bool { return !next.alone && !(next.member && changing) }

// namesOf gives the kinds that can be injected, without those that were left out.
func namesOf(without []string) (names []string, err error) {
	for _, w := range without {
		if !slices.ContainsFunc(kinds, func(k kind) bool { return k.name == w || k.needs == w }) {
			return nil, fmt.Errorf("-without %s: there is no such fault; there are %s", w, strings.Join(allNames(), ", "))
		}
	}
	for _, k := range kinds {
		if !slices.Contains(without, k.name) && (k.needs == "" || !slices.Contains(without, k.needs)) {
			names = append(names, k.name)
		}
	}
	return names, nil
}

func allNames() (out []string) {
	for _, k := range kinds {
		out = append(out, k.name)
	}
	return out
}
