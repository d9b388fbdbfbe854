// SPDX-License-Identifier: Apache-2.0

package grant_test

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/grant"
)

// TestAccessShowsTheTrueEnd (FAULTS.md A12): until when, and how often, the vendor can act, from several grants together.
func TestAccessShowsTheTrueEnd(t *testing.T) {
	hours := func(from, until int, edit ...func(*grant.Grant)) grant.Grant {
		x := g(fleet.OperateRead, edit...)
		x.From, x.Until = start.Add(time.Duration(from)*time.Hour), start.Add(time.Duration(until)*time.Hour)
		return x
	}
	uses := func(n grant.Count) func(*grant.Grant) { return func(x *grant.Grant) { x.Uses = n } }
	only := func(names ...string) func(*grant.Grant) { return func(x *grant.Grant) { x.Scope.Operations = names } }
	at := start.Add(time.Hour)
	for _, c := range []struct {
		name  string
		gs    []grant.Grant
		end   func(grant.State) grant.State
		until int // hours after start; 0: not allowed
		uses  int
		reach []string
	}{
		{"one", []grant.Grant{hours(0, 5)}, nil, 5, -1, []string{"everything 0-5 -1"}},
		{"the second ends later", []grant.Grant{hours(0, 2), hours(0, 9)}, nil, 9, -1, []string{"everything 0-9 -1"}},
		{"the first ends later", []grant.Grant{hours(0, 9), hours(0, 2)}, nil, 9, -1, []string{"everything 0-9 -1"}},
		{"they meet", []grant.Grant{hours(0, 2), hours(2, 4), hours(4, 6)}, nil, 6, -1, []string{"everything 0-6 -1"}},
		{"one has not begun, with a gap", []grant.Grant{hours(0, 2), hours(3, 9)}, nil, 2, -1,
			[]string{"everything 0-2 -1", "everything 3-9 -1"}},
		{"none has begun", []grant.Grant{hours(2, 3)}, nil, 0, 0, []string{"everything 2-3 -1"}},
		{"all have ended", []grant.Grant{hours(-3, 1)}, nil, 0, 0, nil},
		{"a narrow one ends later", []grant.Grant{hours(0, 2), hours(0, 9, only("state"))}, nil, 9, -1,
			[]string{"everything 0-2 -1", "operations state 0-9 -1"}},
		{"a wide one ends later", []grant.Grant{hours(0, 9), hours(0, 2, only("state"))}, nil, 9, -1,
			[]string{"everything 0-9 -1", "operations state 0-9 -1"}},
		{"a wide one goes on", []grant.Grant{hours(0, 2, only("state")), hours(2, 9)}, nil, 9, -1,
			[]string{"everything 2-9 -1", "operations state 0-9 -1"}},
		{"they overlap in part", []grant.Grant{hours(0, 2, only("a", "b")), hours(0, 4, only("b", "c"))}, nil, 4, -1,
			[]string{"operations a, b 0-2 -1", "operations b, c 0-4 -1"}},
		{"counted", []grant.Grant{hours(0, 5, uses(3))}, nil, 5, 3, []string{"everything 0-5 3"}},
		{"counted twice", []grant.Grant{hours(0, 5, uses(3)), hours(0, 9, uses(4))}, nil, 9, 7, []string{"everything 0-9 7"}},
		{"counted, and another later", []grant.Grant{hours(0, 5, uses(3)), hours(5, 9, uses(4))}, nil, 9, 3, []string{"everything 0-9 7"}},
		{"any number, then counted", []grant.Grant{hours(0, 2), hours(0, 9, uses(1))}, nil, 9, -1,
			[]string{"everything 0-2 -1", "everything 0-9 1"}},
		{"one is spent", []grant.Grant{hours(0, 9, uses(1)), hours(0, 2, uses(2))}, func(s grant.State) grant.State {
			s, _ = s.Use("g0-0", at)
			return s
		}, 2, 2, []string{"everything 0-2 2"}},
		{"one is partly used", []grant.Grant{hours(0, 9, uses(3))}, func(s grant.State) grant.State { s, _ = s.Use("g0-0", at); return s }, 9, 2,
			[]string{"everything 0-9 2"}},
		{"the longer one is revoked", []grant.Grant{hours(0, 9), hours(0, 2)}, func(s grant.State) grant.State {
			return revoked(t, s, grant.Revoke{Grant: "g0-0"})
		}, 2, -1, []string{"everything 0-2 -1"}},
		{"another appliance's", []grant.Grant{hours(0, 2), hours(0, 9, func(x *grant.Grant) { x.Appliance = "us-1" })}, nil, 2, -1,
			[]string{"everything 0-2 -1"}},
		{"denied", []grant.Grant{hours(0, 9)}, func(s grant.State) grant.State {
			return denied(t, s, "d", `forbid (principal, action, resource);`)
		}, 0, 0, []string{"everything 0-9 -1"}},
		{"denied in part", []grant.Grant{hours(0, 2), hours(0, 9, only("state"))}, func(s grant.State) grant.State {
			return denied(t, s, "d", `forbid (principal, action, resource == Operation::"dump");`)
		}, 9, -1, []string{"everything 0-2 -1", "operations state 0-9 -1"}},
	} {
		s := given(t, grant.State{}, c.gs...)
		if c.end != nil {
			s = c.end(s)
		}
		for _, d := range s.Access("eu-1", at) {
			if d.Phase != fleet.OperateRead {
				continue
			}
			if d.Allow != (c.until > 0) || c.until > 0 && (!d.Until.Equal(start.Add(time.Duration(c.until)*time.Hour)) || d.UsesLeft != c.uses) {
				t.Errorf("%s: allowed %v until %s, %d uses; want %d h, %d", c.name, d.Allow, d.Until, d.UsesLeft, c.until, c.uses)
			}
			var got []string
			for _, r := range d.Reach {
				got = append(got, fmt.Sprintf("%s %d-%d %d", r.Scope, int(r.From.Sub(start).Hours()), int(r.Until.Sub(start).Hours()), r.UsesLeft))
			}
			if !slices.Equal(got, c.reach) {
				t.Errorf("%s: %q, want %q", c.name, got, c.reach)
			}
		}
	}
	for _, d := range (grant.State{}).Access("eu-1", at) {
		if d.Phase == fleet.Observe && (!d.Until.IsZero() || d.UsesLeft != -1 || len(d.Reach) != 1) {
			t.Errorf("observe by default: %+v", d)
		}
	}
}

// TestAccessNeverUnderstates: whatever is granted, an act that is allowed at a time is within what Access shows.
func TestAccessNeverUnderstates(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s, _ := drawn(t)
		looked := start.Add(time.Duration(rapid.IntRange(0, 6).Draw(t, "looked")) * 30 * time.Minute)
		in := drawAct(t)
		if in.Now.Before(looked) {
			in.Now = looked
		}
		if !grant.Decide(in, s).Allow {
			return
		}
		within := func(names []string, n string) bool { return len(names) == 0 || slices.Contains(names, n) }
		for _, d := range s.Access("eu-1", looked) {
			if d.Phase != in.Phase {
				continue
			}
			if !slices.ContainsFunc(d.Reach, func(r grant.Reach) bool {
				return within(r.Scope.Operations, in.Operation) && within(r.Scope.Services, in.Service) && !in.Now.Before(r.From) &&
					(r.Until.IsZero() || in.Now.Before(r.Until)) && r.UsesLeft != 0
			}) {
				t.Fatalf("%+v is allowed, and Access shows %+v", in, d.Reach)
			}
			if in.Now.Equal(looked) && (!d.Allow || !d.Until.IsZero() && !in.Now.Before(d.Until) || d.UsesLeft == 0) {
				t.Fatalf("%+v is allowed now, and Access says %+v", in, d)
			}
		}
	})
}
