// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"time"
)

// step is one fault of a schedule.
type step struct {
	At, Hold time.Duration
	Kind     string
	Target   string        // leader, follower, or the place of a node: 0, 1, 2
	By       time.Duration // of a clock's jump
}

func (s step) String() string {
	out := fmt.Sprintf("%7s  %-13s", s.At.Round(100*time.Millisecond), s.Kind)
	if !kindOf(s.Kind).all {
		out += " of " + s.Target
	}
	if s.By != 0 {
		out += fmt.Sprintf(" by %s", s.By)
	}
	return out + fmt.Sprintf(" for %s", s.Hold.Round(100*time.Millisecond))
}

// Times of a schedule.
const (
	quietFirst = 3 * time.Second // before the first fault
	quietLast  = 4 * time.Second // after the last
)

var jumps = []time.Duration{90 * time.Second, -90 * time.Second, time.Hour, -time.Hour, 10 * time.Hour, -10 * time.Hour}

// plan draws a schedule. The same seed, length and kinds give the same one.
func plan(seed uint64, length time.Duration, names []string) []step {
	r := rand.New(rand.NewPCG(seed, 0))
	between := func(from, to time.Duration) time.Duration { return from + time.Duration(r.Int64N(int64(to-from))) }
	var out []step
	var deck []string
	for at := quietFirst; len(names) > 0; {
		if len(deck) == 0 { // each kind comes before any comes again
			deck = slices.Clone(names)
			r.Shuffle(len(deck), func(i, j int) { deck[i], deck[j] = deck[j], deck[i] })
		}
		k := kindOf(deck[0])
		s := step{At: at, Hold: between(k.hold[0], k.hold[1]), Kind: k.name, Target: [...]string{"leader", "leader", "follower", "0", "1", "2"}[r.IntN(6)]}
		if k.jumps {
			s.By = jumps[r.IntN(len(jumps))]
		}
		if at+s.Hold+quietLast > length {
			return out
		}
		out = append(out, s)
		deck = deck[1:]
		next := at + s.Hold + between(time.Second, 3*time.Second)
		if !k.alone && len(deck) > 0 && !kindOf(deck[0]).alone && r.IntN(4) == 0 {
			next = at + between(time.Second, s.Hold) // the next one comes while this one lasts
		}
		at = next
	}
	return out
}

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
