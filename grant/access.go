// SPDX-License-Identifier: Apache-2.0

package grant

import (
	"cmp"
	"fmt"
	"iter"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/demarc-dev/demarc/fleet"
)

// Bounds of what Access does for one phase: acts that are tried, and what asking the policies about them costs. A policy
// costs one, and one more for each eight bytes that a customer wrote.
const (
	maxTries = 4096
	maxCost  = 1 << 18
)

// Access is what the vendor can do right now, phase by phase. A phase that is allowed for some acts only counts as
// allowed, and Why says for which: Access tries the acts that the grants and the denies tell apart. It would rather say
// too much than too little: where there are more acts than it tries, and none was allowed, that counts as allowed too.
func (s State) Access(a fleet.ApplianceID, now time.Time) []Decision {
	out := make([]Decision, 0, len(fleet.Phases()))
	words := s.words()
	for _, p := range fleet.Phases() {
		in := Input{Appliance: a, Phase: p, Now: now}
		d := s.access(in, words)
		d.Reach = s.reach(in)
		if d.Allow {
			d.Until, d.UsesLeft = inForce(d.Reach, s.usable(in), now)
		}
		out = append(out, d)
	}
	return out
}

func (s State) access(in Input, words []string) Decision {
	l := s.law(in.Phase, in.Now)
	found := l.decide(in)
	refused := slices.Clone(found.By)
	cost := len(l.names)
	for _, d := range s.Denies {
		cost += len(d.Cedar) / 8
	}
	left := min(maxTries, maxCost/cost)
	var within []string
	for _, scope := range s.scopes(in) {
		d, by := l.try(scope.acts(in, words), &left)
		refused = append(refused, by...)
		if !d.Allow {
			continue
		}
		within = append(within, scope.String())
		if !found.Allow {
			found = d
		}
		if len(scope.Operations)+len(scope.Services) == 0 {
			within = nil // everything: what the narrower ones allow is in it
			break
		}
	}
	switch refused = unique(refused); {
	case !found.Allow && left == 0:
		return Decision{Allow: true, Phase: in.Phase, By: refused, UsesLeft: -1,
			Why: fmt.Sprintf("%s may be allowed: no act that was tried is, and there are more than can be tried", in.Phase)}
	case !found.Allow && len(found.By) == 0 && len(refused) > 0: // no scope keeps the vendor out, a deny does
		found.By, found.Why = refused, s.whyNot(in, refused)
		return found
	case !found.Allow:
		return found
	}
	if len(within) > 0 {
		found.Why += ", for " + few(within, "; or ") + " only"
	}
	if len(s.Denies) > 0 {
		names := make([]string, 0, len(s.Denies))
		for _, d := range s.Denies {
			names = append(names, d.Name)
		}
		found.Why += "; the customer's denies hold: " + few(names, ", ")
	}
	return found
}

// try decides acts until one is allowed, and says who refused the others.
func (l law) try(acts iter.Seq[Input], left *int) (Decision, []string) {
	var by []string
	for in := range acts {
		if *left == 0 {
			break
		}
		*left--
		d := l.decide(in)
		if d.Allow {
			return d, by
		}
		by = append(by, d.By...)
	}
	return Decision{}, unique(by)
}

// scopes lists what the phase's live grants reach: everything first, where one of them or the default does.
func (s State) scopes(in Input) []Scope {
	var out []Scope
	if in.Phase == fleet.Observe && !s.ObserveOff {
		out = append(out, Scope{})
	}
	for _, h := range s.Held {
		if h.Grant.Phase == in.Phase && h.Grant.Appliance == in.Appliance && h.stale(in.Now) == "" {
			out = append(out, h.Grant.Scope)
		}
	}
	size := func(x Scope) int { return min(1, len(x.Operations)+len(x.Services)) }
	slices.SortStableFunc(out, func(a, b Scope) int {
		return cmp.Or(size(a)-size(b), slices.Compare(a.Operations, b.Operations), slices.Compare(a.Services, b.Services))
	})
	return slices.CompactFunc(out, func(a, b Scope) bool {
		return slices.Equal(a.Operations, b.Operations) && slices.Equal(a.Services, b.Services)
	})
}

// acts are those within a scope that the denies can tell apart: each of its names, or, where it has none, no name, a
// name that no deny speaks of, and those that the denies do.
func (s Scope) acts(in Input, words []string) iter.Seq[Input] {
	people := []fleet.Principal{""}
	names := []string{"", "any"}
	for _, w := range words {
		if strings.HasPrefix(w, "spiffe://") {
			people = append(people, fleet.Principal(w))
		} else if fleet.CheckName("name", w) == nil {
			names = append(names, w)
		}
	}
	operations, services := s.Operations, s.Services
	if len(operations) == 0 {
		operations = names
	}
	if len(services) == 0 {
		services = names
	}
	return func(yield func(Input) bool) {
		for _, in.Who = range people {
			for _, in.Operation = range operations {
				for _, in.Service = range services {
					if !yield(in) {
						return
					}
				}
			}
		}
	}
}

// few joins at most eight.
func few(all []string, with string) string {
	if over := len(all) - 8; over > 0 {
		return strings.Join(all[:8], with) + fmt.Sprintf(" and %d more", over)
	}
	return strings.Join(all, with)
}

// words lists the strings that the denies speak of, at most 64.
func (s State) words() []string {
	var out []string
	quoted := regexp.MustCompile(`"([^"\\\n]{1,128})"`)
	for _, d := range s.Denies {
		for _, m := range quoted.FindAllStringSubmatch(d.Cedar, -1) {
			out = append(out, m[1])
		}
	}
	out = unique(out)
	return out[:min(len(out), 64)]
}

// String names what is in the scope.
func (s Scope) String() string {
	var parts []string
	if len(s.Operations) > 0 {
		parts = append(parts, "operations "+strings.Join(s.Operations, ", "))
	}
	if len(s.Services) > 0 {
		parts = append(parts, "services "+strings.Join(s.Services, ", "))
	}
	if len(parts) == 0 {
		return "everything"
	}
	return strings.Join(parts, " and ")
}

// Policies is every policy that decides now, in Cedar, each after a comment with its name.
func Policies(s State, now time.Time) []string {
	return s.explain(func(h Held) bool { return h.stale(now) == "" })
}

// ExplainPolicies is every policy of the book that a time or a use can make decide: all but revoked and spent grants.
func ExplainPolicies(s State) []string {
	return s.explain(func(h Held) bool {
		return h.RevokedAt.IsZero() && !h.spent()
	})
}

func (s State) explain(listed func(Held) bool) []string {
	var out []string
	for _, e := range builtins() {
		out = append(out, "// builtin:"+e+"\n"+builtin(e))
	}
	for _, d := range s.Denies {
		out = append(out, "// deny "+d.Name+" "+d.ID+"\n"+d.Cedar)
	}
	if !s.ObserveOff {
		out = append(out, "// "+ObserveDefault+"\n"+observe)
	}
	for _, h := range s.Held {
		if !listed(h) {
			continue
		}
		note := "// grant " + h.ID
		if h.Grant.Uses > 0 {
			note += fmt.Sprintf(", used %d of %d times", h.Used, h.Grant.Uses)
		}
		out = append(out, note+"\n"+h.Grant.policy())
	}
	return out
}
