// SPDX-License-Identifier: Apache-2.0

package grant_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/grant"
)

var start = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

const nonce = "0123456789abcdef"

func g(p fleet.Phase, edit ...func(*grant.Grant)) grant.Grant {
	out := grant.Grant{Appliance: "eu-1", Phase: p, From: start, Nonce: nonce}
	for _, f := range edit {
		f(&out)
	}
	return ending(out)
}

// ending gives a grant the end that it must have, where a test does not care.
func ending(g grant.Grant) grant.Grant {
	if g.Until.IsZero() && (g.Phase != fleet.Observe || g.Uses > 0) {
		g.Until = g.From.Add(30 * 24 * time.Hour)
	}
	return g
}

func given(t testing.TB, s grant.State, gs ...grant.Grant) grant.State {
	t.Helper()
	for i, one := range gs {
		var err error
		if s, err = s.Give(fmt.Sprintf("g%d-%d", len(s.Held), i), one, nil, start); err != nil {
			t.Fatal(err)
		}
	}
	return s
}

func denied(t testing.TB, s grant.State, name, text string) grant.State {
	t.Helper()
	s, err := s.Forbid("d-"+name, grant.Deny{Appliance: "eu-1", Name: name, Cedar: text, At: start, Nonce: nonce}, nil, start)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func act(p fleet.Phase, edit ...func(*grant.Input)) grant.Input {
	in := grant.Input{Appliance: "eu-1", Phase: p, Who: "spiffe://acme.example/operator/ann", Now: start.Add(time.Hour)}
	for _, f := range edit {
		f(&in)
	}
	return in
}

func TestNothingIsGrantedButObserve(t *testing.T) {
	for _, d := range (grant.State{}).Access("eu-1", start) {
		if d.Allow != (d.Phase == fleet.Observe) || d.Why == "" {
			t.Errorf("%+v", d)
		}
	}
	s, _, err := grant.State{}.Revoke("r", grant.Revoke{Appliance: "eu-1", All: true, At: start, Nonce: nonce}, start)
	if err != nil {
		t.Fatal(err)
	}
	if d := grant.Decide(act(fleet.Observe), s); d.Allow || !strings.Contains(d.Why, "switched observing off") {
		t.Errorf("%+v", d)
	}
	if d := grant.Decide(act(fleet.Observe), given(t, s, g(fleet.Observe))); !d.Allow {
		t.Errorf("%+v", d)
	}
}

func TestEachPhaseIsItsOwn(t *testing.T) {
	for _, p := range fleet.Phases() {
		s := given(t, grant.State{}, g(p))
		for _, q := range fleet.Phases() {
			d := grant.Decide(act(q), s)
			if want := p == q || q == fleet.Observe; d.Allow != want {
				t.Errorf("granted %s, asked %s: %+v", p, q, d)
			}
		}
	}
}

func TestLimits(t *testing.T) {
	until := func(d time.Duration) func(*grant.Grant) { return func(x *grant.Grant) { x.Until = start.Add(d) } }
	for name, c := range map[string]struct {
		g    grant.Grant
		in   grant.Input
		want bool
		why  string
	}{
		"plain":             {g(fleet.Deploy), act(fleet.Deploy), true, "granted deploy"},
		"before its end":    {g(fleet.Deploy, until(time.Hour+time.Millisecond)), act(fleet.Deploy), true, ""},
		"at its end":        {g(fleet.Deploy, until(time.Hour)), act(fleet.Deploy), false, "ended at"},
		"not yet":           {g(fleet.Deploy, func(x *grant.Grant) { x.From = start.Add(2 * time.Hour) }), act(fleet.Deploy), false, "begins at"},
		"another appliance": {g(fleet.Deploy, func(x *grant.Grant) { x.Appliance = "us-1" }), act(fleet.Deploy), false, "has not granted"},
		"in scope": {g(fleet.OperateRead, func(x *grant.Grant) { x.Scope.Operations = []string{"a", "state"} }),
			act(fleet.OperateRead, func(i *grant.Input) { i.Operation = "state" }), true, ""},
		"out of scope": {g(fleet.OperateRead, func(x *grant.Grant) { x.Scope.Operations = []string{"a", "state"} }),
			act(fleet.OperateRead, func(i *grant.Input) { i.Operation = "dump" }), false, "scope"},
		"no operation named": {g(fleet.OperateRead, func(x *grant.Grant) { x.Scope.Operations = []string{"a"} }), act(fleet.OperateRead), false,
			"scope"},
		"another service": {g(fleet.OperateRead, func(x *grant.Grant) { x.Scope.Services = []string{"web"} }),
			act(fleet.OperateRead, func(i *grant.Input) { i.Service, i.Operation = "store", "state" }), false, "scope"},
		"no such phase": {g(fleet.Deploy), act("operate"), false, "no such phase"},
	} {
		s, err := grant.State{}.Give("g", c.g, nil, start)
		if err != nil {
			t.Fatal(name, err)
		}
		d := grant.Decide(c.in, s)
		if d.Allow != c.want || !strings.Contains(d.Why, c.why) {
			t.Errorf("%s: %+v", name, d)
		}
		if d.Allow && (d.Grant != "g" || !slices.Equal(d.By, []string{"g"})) {
			t.Errorf("%s: does not say by which grant: %+v", name, d)
		}
	}
}

func TestUsesAreCounted(t *testing.T) {
	s := given(t, grant.State{}, g(fleet.Deploy, func(x *grant.Grant) { x.Uses = 2 }))
	for i := range 3 {
		d := grant.Decide(act(fleet.Deploy), s)
		if d.Allow != (i < 2) || (d.Allow && d.UsesLeft != 2-i) {
			t.Fatalf("use %d: %+v", i, d)
		}
		next, err := s.Use("g0-0", start)
		if (err == nil) != (i < 2) {
			t.Fatalf("use %d: %v", i, err)
		}
		s = next
	}
	if d := grant.Decide(act(fleet.Deploy), s); !strings.Contains(d.Why, "spent") {
		t.Fatalf("%+v", d)
	}
	if _, err := s.Use("nobody", start); !errors.Is(err, fault.NotFound) {
		t.Fatal(err)
	}
}

func TestTheCheapestGrantIsUsed(t *testing.T) {
	limited := func(x *grant.Grant) { x.Uses = 5 }
	short := func(x *grant.Grant) { x.Until = start.Add(2 * time.Hour) }
	for want, gs := range map[string][]grant.Grant{
		"g1-1": {g(fleet.Deploy, limited), g(fleet.Deploy)},
		"g0-0": {g(fleet.Deploy, limited, short), g(fleet.Deploy, limited)},
		"g2-2": {g(fleet.Deploy, limited), g(fleet.Deploy), g(fleet.Deploy, short)},
	} {
		if d := grant.Decide(act(fleet.Deploy), given(t, grant.State{}, gs...)); d.Grant != want {
			t.Errorf("want %s: %+v", want, d)
		}
	}
}

func TestReplayGivesNothing(t *testing.T) {
	s := given(t, grant.State{}, g(fleet.Deploy))
	if _, err := s.Give("g0-0", g(fleet.Deploy), nil, start); !errors.Is(err, fault.Conflict) {
		t.Fatal(err)
	}
	s, ended, err := s.Revoke("r", grant.Revoke{Appliance: "eu-1", Phase: fleet.Deploy, At: start, Nonce: nonce}, start)
	if err != nil || !slices.Equal(ended, []string{"g0-0"}) {
		t.Fatal(ended, err)
	}
	if d := grant.Decide(act(fleet.Deploy), s); d.Allow || !strings.Contains(d.Why, "revoked") {
		t.Fatalf("%+v", d)
	}
	if _, err := s.Give("g0-0", g(fleet.Deploy), nil, start); !errors.Is(err, fault.Conflict) {
		t.Fatal("a revoked grant came back")
	}
	if _, _, err := s.Revoke("r", grant.Revoke{Appliance: "eu-1", Grant: "nobody", At: start, Nonce: nonce},
		start); !errors.Is(err, fault.NotFound) {
		t.Fatal(err)
	}
	s = denied(t, s, "no", `forbid (principal, action, resource);`)
	if s, err = s.Lift("l", grant.Lift{Appliance: "eu-1", Deny: "d-no", At: start, Nonce: nonce}, start); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Forbid("d-no", grant.Deny{Appliance: "eu-1", Name: "no", Cedar: `forbid (principal, action, resource);`, At: start,
		Nonce: nonce}, nil, start); !errors.Is(err, fault.Conflict) {
		t.Fatal("a lifted deny came back by a replay", err)
	}
}

func TestDeniesWin(t *testing.T) {
	s := given(t, grant.State{}, g(fleet.OperateWrite), g(fleet.OperateRead), g(fleet.Deploy))
	write := act(fleet.OperateWrite, func(i *grant.Input) { i.Operation, i.Service = "reindex", "store" })
	for name, c := range map[string]struct {
		text string
		in   grant.Input
		want bool
	}{
		"a person":        {`forbid (principal == Vendor::"spiffe://acme.example/operator/ann", action, resource);`, write, false},
		"another person":  {`forbid (principal == Vendor::"spiffe://acme.example/operator/bob", action, resource);`, write, true},
		"all operations":  {`forbid (principal, action in Action::"operate", resource);`, write, false},
		"operations only": {`forbid (principal, action in Action::"operate", resource);`, act(fleet.Deploy), true},
		"a service":       {`forbid (principal, action, resource in Service::"store");`, write, false},
		"another service": {`forbid (principal, action, resource in Service::"web");`, write, true},
		"an operation":    {`forbid (principal, action, resource == Operation::"reindex");`, write, false},
		"the night":       {`forbid (principal, action, resource) when { context.now > 0 };`, write, false},
		"observe too":     {`forbid (principal, action, resource);`, act(fleet.Observe), false},
		"what overflows":  {`forbid (principal, action, resource) when { context.now + 9223372036854775807 < 0 };`, write, false},
	} {
		d := grant.Decide(c.in, denied(t, s, "d", c.text))
		if d.Allow != c.want {
			t.Errorf("%s: %+v", name, d)
		}
		if !d.Allow && !slices.Contains(d.By, "d") {
			t.Errorf("%s: does not say which deny: %+v", name, d)
		}
	}
	for _, e := range []string{grant.DeletePersistentData, grant.ReadSecretValues, grant.LeaveScope, grant.ChangeAuditLog,
		grant.ChangeConsent} {
		in := write
		in.Effects = []string{"harmless", e}
		if d := grant.Decide(in, s); d.Allow || !slices.Equal(d.By, []string{"builtin:" + e}) {
			t.Errorf("%s: %+v", e, d)
		}
	}
}

func TestDocumentsAreChecked(t *testing.T) {
	type checked interface{ Check() error }
	deny := func(text string) checked {
		return grant.Deny{Appliance: "eu-1", Name: "d", Cedar: text, At: start, Nonce: nonce}
	}
	for want, c := range map[string]checked{
		"nonce":            g(fleet.Deploy, func(x *grant.Grant) { x.Nonce = "x" }),
		"from":             g(fleet.Deploy, func(x *grant.Grant) { x.From = time.Time{} }),
		"until":            g(fleet.Deploy, func(x *grant.Grant) { x.Until = x.From }),
		"uses":             g(fleet.Deploy, func(x *grant.Grant) { x.Uses = -1 }),
		"only the phases":  g(fleet.Deploy, func(x *grant.Grant) { x.Scope.Services = []string{"a"} }),
		"service":          g(fleet.OperateRead, func(x *grant.Grant) { x.Scope.Services = []string{`a"]`} }),
		"phase":            g("sudo"),
		"appliance":        g(fleet.Deploy, func(x *grant.Grant) { x.Appliance = `x" ) ;` }),
		"name one grant":   grant.Revoke{Appliance: "eu-1", All: true, Phase: fleet.Deploy, At: start, Nonce: nonce},
		"or all":           grant.Revoke{Appliance: "eu-1", At: start, Nonce: nonce},
		"line 2, column 1": deny("forbid (principal, action, resource);\npermit (principal, action, resource);"),
		"not Cedar":        deny("forbid everything"),
		"1 to 32":          deny("// nothing"),
		"limit":            deny(strings.Repeat(" ", grant.MaxCedar+1)),
		"the id of one":    grant.Lift{Appliance: "eu-1", At: start, Nonce: nonce},
	} {
		if err := c.Check(); !errors.Is(err, fault.Invalid) || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v", want, err)
		}
	}
}

// drawn makes states with a few grants and denies of every kind.
func drawn(t *rapid.T) (grant.State, []grant.Grant) {
	var s grant.State
	var all []grant.Grant
	for i := range rapid.IntRange(0, 5).Draw(t, "grants") {
		one := g(rapid.SampledFrom(fleet.Phases()).Draw(t, "phase"))
		one.Appliance = rapid.SampledFrom([]fleet.ApplianceID{"eu-1", "us-1"}).Draw(t, "appliance")
		one.From = start.Add(time.Duration(rapid.IntRange(0, 3).Draw(t, "from")) * time.Hour)
		if rapid.Bool().Draw(t, "ends") {
			one.Until = one.From.Add(time.Duration(rapid.IntRange(1, 3).Draw(t, "until")) * time.Hour)
		}
		one.Uses = grant.Count(rapid.IntRange(0, 2).Draw(t, "uses"))
		if strings.HasPrefix(string(one.Phase), "operate.") {
			one.Scope.Operations = rapid.SampledFrom([][]string{nil, {"state"}, {"dump", "state"}}).Draw(t, "operations")
			one.Scope.Services = rapid.SampledFrom([][]string{nil, {"store"}, {"web"}}).Draw(t, "services")
		}
		one = ending(one)
		next, err := s.Give(fmt.Sprint("g", i), one, nil, start)
		if err != nil {
			t.Fatal(err)
		}
		s, all = next, append(all, one)
		for range rapid.IntRange(0, 2).Draw(t, "used") {
			if used, err := s.Use(fmt.Sprint("g", i), one.From); err == nil {
				s = used
			}
		}
	}
	return s, all
}

func drawAct(t *rapid.T) grant.Input {
	return grant.Input{Appliance: "eu-1", Phase: rapid.SampledFrom(fleet.Phases()).Draw(t, "act"),
		Now:       start.Add(time.Duration(rapid.IntRange(0, 6).Draw(t, "now")) * 30 * time.Minute),
		Operation: rapid.SampledFrom([]string{"", "state", "dump"}).Draw(t, "operation"),
		Service:   rapid.SampledFrom([]string{"", "store", "web"}).Draw(t, "service")}
}

// What is allowed stays within the law, computed here another way; and less consent never allows more.
func TestLessConsentNeverAllowsMore(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s, _ := drawn(t)
		in := drawAct(t)
		before, _ := json.Marshal(s)
		d := grant.Decide(in, s)
		law := in.Phase == fleet.Observe && !s.ObserveOff
		for _, h := range s.Held {
			x := h.Grant
			within := func(names []string, n string) bool { return len(names) == 0 || slices.Contains(names, n) }
			law = law || x.Phase == in.Phase && x.Appliance == in.Appliance && !in.Now.Before(x.From) &&
				(x.Until.IsZero() || in.Now.Before(x.Until)) &&
				(x.Uses == 0 || h.Used < int(x.Uses)) && within(x.Scope.Operations, in.Operation) && within(x.Scope.Services, in.Service)
		}
		if d.Allow != law {
			t.Fatalf("decided %+v, the law says %v", d, law)
		}
		if after, _ := json.Marshal(s); string(after) != string(before) {
			t.Fatal("deciding altered the state")
		}
		if d.Allow && d.Grant != "" {
			if _, err := s.Use(d.Grant, in.Now); err != nil {
				t.Fatalf("allowed by a grant that can't be used: %v", err)
			}
		}
		forbidden := s
		forbidden.Denies = []grant.Denied{{ID: "d", Name: "d", Cedar: "forbid (principal, action, resource);"}}
		if grant.Decide(in, forbidden).Allow {
			t.Fatal("a deny lost")
		}
		if len(s.Held) == 0 || d.Allow {
			return
		}
		i := rapid.IntRange(0, len(s.Held)-1).Draw(t, "shrink")
		less := s
		less.Held = slices.Clone(s.Held)
		switch rapid.IntRange(0, 3).Draw(t, "how") {
		case 0:
			less.Held = slices.Delete(less.Held, i, i+1)
		case 1:
			less.Held[i].Used++
		case 2:
			less.Held[i].RevokedAt = start
		case 3:
			less.Held[i].Grant.From = less.Held[i].Grant.From.Add(time.Minute)
		}
		if grant.Decide(in, less).Allow {
			t.Fatal("less consent allows more")
		}
	})
}

func TestAccessAndPoliciesTellTheTruth(t *testing.T) {
	s := given(t, grant.State{}, g(fleet.OperateRead, func(x *grant.Grant) { x.Scope.Operations, x.Uses = []string{"state"}, 3 }),
		g(fleet.Deploy))
	s = denied(t, s, "no-night", `forbid (principal, action, resource) when { context.now < 0 };`)
	for _, d := range s.Access("eu-1", start.Add(time.Hour)) {
		want := d.Phase == fleet.Observe || d.Phase == fleet.OperateRead || d.Phase == fleet.Deploy
		if d.Allow != want || (d.Phase == fleet.OperateRead && !strings.Contains(d.Why, "operations state only")) {
			t.Errorf("%+v", d)
		}
	}
	text := strings.Join(grant.Policies(s, start.Add(time.Hour)), "\n")
	for _, want := range []string{"builtin:read_secret_values", "no-night", "used 0 of 3", `Action::"deploy"`,
		`["state"].contains(context.operation)`} {
		if !strings.Contains(text, want) {
			t.Errorf("%q is not in\n%s", want, text)
		}
	}
}

// Whatever the text: no panic, one answer, and a deny that is taken never allows what was refused without it.
func FuzzDeny(f *testing.F) {
	f.Add(`forbid (principal, action, resource) when { context.now > 5 };`)
	f.Add(`forbid (principal, action in Action::"operate", resource in Service::"store") unless { context.effects.contains("x") };`)
	f.Add(`forbid (principal, action, resource) when { context has now.a.b };`)
	f.Add("// \"\nforbid (principal, action, resource) when { \"\\\"(\" like \"*\" && [[[]]] == [] };")
	f.Add(`permit (principal, action, resource);`)
	granted := given(f, grant.State{}, g(fleet.OperateRead, func(x *grant.Grant) { x.Scope.Operations = []string{"state"} }))
	f.Fuzz(func(t *testing.T, text string) {
		d := grant.Deny{Appliance: "eu-1", Name: "d", Cedar: text, At: start, Nonce: nonce}
		s, err := granted.Forbid("d", d, nil, start)
		if again := d.Check(); fault.Text(again) != fault.Text(err) {
			t.Fatalf("two answers: %v, %v", err, again)
		}
		if err != nil {
			if !errors.Is(err, fault.Invalid) {
				t.Fatalf("%v", err)
			}
			return
		}
		for _, p := range fleet.Phases() {
			for _, name := range []string{"state", "dump"} {
				in := act(p, func(i *grant.Input) { i.Operation = name })
				with, without := grant.Decide(in, s), grant.Decide(in, granted)
				if with.Allow && !without.Allow {
					t.Fatalf("a deny allowed something: %+v", with)
				}
				if !with.Allow && without.Allow && !slices.Equal(with.By, []string{"d"}) {
					t.Fatalf("refused, and does not say by what: %+v", with)
				}
			}
		}
		s.Access("eu-1", start)
	})
}
