// SPDX-License-Identifier: Apache-2.0

package grant

import (
	"slices"
	"time"

	"github.com/demarc-dev/demarc/fleet"
)

// usable lists the grants of a phase that give something now or later: not revoked, not spent, not over.
func (s State) usable(in Input) []Held {
	var out []Held
	for _, h := range s.Held {
		if h.Grant.Phase == in.Phase && h.Grant.Appliance == in.Appliance && h.RevokedAt.IsZero() && !h.spent() && !h.ended(in.Now) {
			out = append(out, h)
		}
	}
	return out
}

// reach says what is granted of a phase, now and later, one line for each scope and stretch of time. Grants that overlap or
// meet make one stretch, and those of a wider scope count for a narrower one too. Grants without a number of uses are told
// apart from counted ones: the end of the one is not the end of the other.
func (s State) reach(in Input) []Reach {
	all := s.usable(in)
	var out []Reach
	if in.Phase == fleet.Observe && !s.ObserveOff {
		out = append(out, Reach{UsesLeft: -1})
	}
	for _, scope := range scopesOf(all) {
		for _, counted := range []bool{false, true} {
			var within []Held
			own := false // a stretch of wider grants alone is told with these
			for _, h := range all {
				if (h.Grant.Uses > 0) == counted && h.Grant.Scope.covers(scope) {
					within = append(within, h)
					own = own || scope.covers(h.Grant.Scope)
				}
			}
			if own {
				out = append(out, stretches(scope, within)...)
			}
		}
	}
	return out
}

// stretches joins grants that overlap or meet.
func stretches(scope Scope, held []Held) []Reach {
	slices.SortStableFunc(held, func(a, b Held) int { return a.Grant.From.Compare(b.Grant.From) })
	var out []Reach
	for _, h := range held {
		g := h.Grant
		if n := len(out) - 1; n >= 0 && (out[n].Until.IsZero() || !g.From.After(out[n].Until)) {
			out[n].Grants = append(out[n].Grants, h.ID)
			out[n].Until = latest(out[n].Until, g.Until)
			out[n].UsesLeft = total(out[n].UsesLeft, h.left())
			continue
		}
		out = append(out, Reach{scope, g.From, g.Until, h.left(), []string{h.ID}})
	}
	return out
}

// inForce sums up what is in force: until when without a gap the vendor can do something of the phase, and how often.
func inForce(reach []Reach, held []Held, at time.Time) (until time.Time, uses int) {
	for _, r := range stretches(Scope{}, slices.Clone(held)) {
		if !r.From.After(at) {
			until = r.Until
		}
	}
	for _, h := range held {
		if !h.Grant.From.After(at) {
			uses = total(uses, h.left())
		}
	}
	for _, r := range reach {
		if r.Grants == nil { // by default
			return time.Time{}, -1
		}
	}
	return until, uses
}

// latest is the later end of two; none is the latest.
func latest(a, b time.Time) time.Time {
	if a.IsZero() || b.IsZero() {
		return time.Time{}
	}
	if a.After(b) {
		return a
	}
	return b
}

// total adds uses; any number and some are any number.
func total(a, b int) int {
	if a < 0 || b < 0 {
		return -1
	}
	return a + b
}

// covers reports whether each act within other is within the scope.
func (s Scope) covers(other Scope) bool {
	all := func(wide, narrow []string) bool {
		return len(wide) == 0 || len(narrow) > 0 && !slices.ContainsFunc(narrow, func(n string) bool { return !slices.Contains(wide, n) })
	}
	return all(s.Operations, other.Operations) && all(s.Services, other.Services)
}

// scopesOf lists the distinct scopes, the widest first.
func scopesOf(held []Held) []Scope {
	var out []Scope
	for _, h := range held {
		s := h.Grant.Scope
		if !slices.ContainsFunc(out, func(o Scope) bool { return o.covers(s) && s.covers(o) }) {
			out = append(out, s)
		}
	}
	size := func(s Scope) int { return min(1, len(s.Operations)+len(s.Services)) }
	slices.SortStableFunc(out, func(a, b Scope) int { return size(a) - size(b) })
	return out
}
