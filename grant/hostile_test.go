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

func revoked(t testing.TB, s grant.State, r grant.Revoke) grant.State {
	t.Helper()
	r.Appliance, r.At, r.Nonce = "eu-1", start, nonce
	s, _, err := s.Revoke("r", r, start)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// A grant of observe gives what it says. Only one without limits is the default given back.
func TestObserveComesBackOnlyAsFarAsItIsGranted(t *testing.T) {
	off := revoked(t, grant.State{}, grant.Revoke{All: true})
	for name, c := range map[string]struct {
		edit func(*grant.Grant)
		at   time.Duration
		want bool
	}{
		"plain":                  {func(*grant.Grant) {}, time.Hour, true},
		"within its window":      {func(x *grant.Grant) { x.Until = start.Add(2 * time.Hour) }, time.Hour, true},
		"after its window":       {func(x *grant.Grant) { x.Until = start.Add(time.Minute) }, time.Hour, false},
		"plain, not begun":       {func(x *grant.Grant) { x.From = start.Add(2 * time.Hour) }, time.Hour, false},
		"plain, begun meanwhile": {func(x *grant.Grant) { x.From = start.Add(time.Minute) }, time.Hour, true},
	} {
		in := act(fleet.Observe)
		in.Now = start.Add(c.at)
		if d := grant.Decide(in, given(t, off, g(fleet.Observe, c.edit))); d.Allow != c.want {
			t.Errorf("%s: %+v", name, d)
		}
	}
	if given(t, off, g(fleet.Observe)).ObserveOff {
		t.Error("a plain grant of observe left the switch off")
	}
	once := given(t, off, g(fleet.Observe, func(x *grant.Grant) { x.Uses = 1 }))
	once, err := once.Use("g0-0", start)
	if err != nil {
		t.Fatal(err)
	}
	if d := grant.Decide(act(fleet.Observe), once); d.Allow {
		t.Errorf("observe went on after its one use: %+v", d)
	}
	back := revoked(t, given(t, off, g(fleet.Observe)), grant.Revoke{Grant: "g0-0"})
	if d := grant.Decide(act(fleet.Observe), back); d.Allow {
		t.Errorf("the grant that switched observe on was revoked, and it is on: %+v", d)
	}
	counted := given(t, grant.State{}, g(fleet.Observe, func(x *grant.Grant) { x.Uses = 1 }))
	if d := grant.Decide(act(fleet.Observe), counted); !d.Allow || d.Grant != "" || d.UsesLeft != -1 {
		t.Errorf("what is on by default cost a use: %+v", d)
	}
}

// The book never fills up with what ended, and what it forgot does not come back.
func TestMemoryIsBoundedAndReplayStaysRefused(t *testing.T) {
	var s grant.State
	var err error
	dated := func(i int) grant.Grant {
		return g(fleet.Deploy, func(x *grant.Grant) { x.From = start.Add(time.Duration(i) * time.Second) })
	}
	const rounds = grant.MaxHeld + grant.MaxGone + 100
	for i := range rounds {
		id := fmt.Sprint("g", i)
		now := start.Add(time.Duration(i) * time.Second)
		if s, err = s.Give(id, dated(i), nil, now); err != nil {
			t.Fatalf("grant %d: %v", i, err)
		}
		if s, _, err = s.Revoke("r", grant.Revoke{Appliance: "eu-1", Grant: id, At: now, Nonce: nonce}, now); err != nil {
			t.Fatal(err)
		}
	}
	if len(s.Held) > grant.MaxHeld || len(s.Gone) > grant.MaxGone {
		t.Fatalf("%d held, %d gone", len(s.Held), len(s.Gone))
	}
	now := start.Add(rounds * time.Second)
	for _, i := range []int{0, 50, 99, 100, 101, grant.MaxGone, rounds - 1} {
		if _, err := s.Give(fmt.Sprint("g", i), dated(i), nil, now); !errors.Is(err, fault.Conflict) {
			t.Errorf("grant %d came back: %v", i, err)
		}
	}
	if _, err := s.Give("new", dated(rounds), nil, now); err != nil {
		t.Errorf("a new grant is refused: %v", err)
	}
	if _, _, err := s.Revoke("r", grant.Revoke{Appliance: "eu-1", Grant: "g100", At: now, Nonce: nonce}, now); err != nil {
		t.Errorf("to revoke what is gone is no error: %v", err)
	}
}

func TestLiveGrantsNeverMakeWay(t *testing.T) {
	var s grant.State
	var err error
	for i := range grant.MaxHeld {
		if s, err = s.Give(fmt.Sprint("g", i), g(fleet.Deploy, func(x *grant.Grant) { x.Uses = 1 }), nil, start); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := s.Give("more", g(fleet.Deploy), nil, start); !errors.Is(err, fault.Busy) {
		t.Fatal(err)
	}
	if s, err = s.Use("g7", start); err != nil {
		t.Fatal(err)
	}
	if s, err = s.Give("more", g(fleet.Deploy), nil, start); err != nil {
		t.Fatal(err)
	}
	if slices.ContainsFunc(s.Held, func(h grant.Held) bool { return h.ID == "g7" }) || len(s.Held) != grant.MaxHeld {
		t.Fatal("another than the spent grant made way")
	}
	if _, err := s.Give("g7", g(fleet.Deploy, func(x *grant.Grant) { x.Uses = 1 }), nil, start); !errors.Is(err, fault.Conflict) {
		t.Fatal("a spent grant came back with its uses", err)
	}
}

func TestLiftingNeverRunsDry(t *testing.T) {
	var s grant.State
	var err error
	const rounds = grant.MaxGone + 10
	deny := func(i int) grant.Deny {
		return grant.Deny{Appliance: "eu-1", Name: "d", Cedar: "forbid (principal, action, resource);",
			At: start.Add(time.Duration(i) * time.Second), Nonce: nonce}
	}
	for i := range rounds {
		id := fmt.Sprint("d", i)
		if s, err = s.Forbid(id, deny(i), nil, start); err != nil {
			t.Fatal(i, err)
		}
		if s, err = s.Lift("l", grant.Lift{Appliance: "eu-1", Deny: id, At: start, Nonce: nonce}, start); err != nil {
			t.Fatal(i, err)
		}
	}
	for _, i := range []int{0, 9, 10, rounds - 1} {
		if _, err := s.Forbid(fmt.Sprint("d", i), deny(i), nil, start); !errors.Is(err, fault.Conflict) {
			t.Errorf("deny %d came back: %v", i, err)
		}
	}
}

// A deny that Cedar would take, and that would never do what its author means, is refused with its place.
func TestDeniesThatWouldNotWorkAreRefused(t *testing.T) {
	const fine = "forbid (principal, action, resource);\n  "
	for _, tc := range []struct{ text, want string }{
		{fine + `forbid (principal, action == Action::"operate-write", resource);`, "line 2, column 3: "},
		{fine + `forbid (principal, action, resource) when { action == Action::"Deploy" };`, `Action::"Deploy"`},
		{fine + `forbid (principal == User::"ann", action, resource);`, "User"},
		{fine + `forbid (principal, action, resource in Servce::"store");`, "Servce"},
		{fine + `forbid (principal, action, resource == Vendor::"x");`, "applicable"},
		{fine + `forbid (principal, action, resource) when { context.time > 3 };`, "time"},
		{fine + `forbid (principal, action, resource) when { context.operation == 3 };`, "not compatible"},
		{fine + `forbid (principal, action, resource) when { datetime("x") < datetime("2026-01-01") };`, "datetime"},
		{fine + `forbid (principal, action, resource) when { "true" };`, "Bool"},
		{fine + `forbid (principal, action, resource`, "line 2, column "},
		{fine + `permit (principal, action, resource);`, "line 2, column 3: a deny holds forbid policies only"},
		{fine + `forbid (principal, action, resource) when { context has ` + strings.Repeat("a.", 40),
			"line 2, column 76: the path has too many parts"},
		{fine + `forbid (principal, action, resource) when { context has ` + strings.Repeat("a // \" (\n . ", 40),
			"the path has too many parts"},
		{fine + `forbid (principal, action, resource) when { ` + strings.Repeat("(", 5000) + "true" + strings.Repeat(")", 5000) + " };",
			"nested too deep"},
		{fine + `forbid (principal, action, resource) when { "\")" == "` + `\\" || ` + strings.Repeat("[", 40) + strings.Repeat("]", 40),
			"nested too deep"},
		{fine + `forbid (principal, action, resource) when { /* " */ ` + strings.Repeat("(", 5000), "comments begin with //"},
		{fine + `forbid (principal, action, resource) when { ` + strings.Repeat("! -", 20) + "1 == 1 };", "too many signs"},
		{"", "1 to 32"},
		{strings.Repeat("forbid (principal, action, resource);", 33), "1 to 32"},
		{"forbid (principal, action, resource) when { \xff };", "not Cedar"},
	} {
		text, want := tc.text, tc.want
		d := grant.Deny{Appliance: "eu-1", Name: "d", Cedar: text, At: start, Nonce: nonce}
		err := d.Check()
		if !errors.Is(err, fault.Invalid) || !strings.Contains(fault.Text(err), want) ||
			len(text) > 0 && !strings.Contains(fault.Text(err), "line ") {
			t.Errorf("%.120q: %v, want %q", text, err, want)
			continue
		}
		for range 50 { // the answer is part of the book: the same on every run
			if again := d.Check(); fault.Text(again) != fault.Text(err) {
				t.Fatalf("two answers for %.120q:\n%s\n%s", text, fault.Text(err), fault.Text(again))
			}
		}
	}
	for _, text := range []string{
		`forbid (principal, action, resource) when { context.operation like "a.b.c.d.e.f.g.h.i.j.k.l.m.n.o.p.q.r.s.t.u/*((((!!!!!!!!!!!!!!" };`,
		"// it's (((((((((((((((((((((((((((((((((((((((((((((((( a comment /* too !!!!!!!!!!!!\nforbid (principal, action, resource);",
		`forbid (principal, action, resource) when { if context.operation like "a" then context.now > 1 else context.service != "x" };`,
		`forbid (principal, action, resource) when { ["\"", "\\"].contains(context.operation) };`,
	} {
		if err := (grant.Deny{Appliance: "eu-1", Name: "d", Cedar: text, At: start, Nonce: nonce}).Check(); err != nil {
			t.Errorf("%.80q: %v", text, err)
		}
	}
	if err := (grant.Deny{Appliance: "eu-1", Name: grant.ObserveDefault, Cedar: fine, At: start, Nonce: nonce}).Check(); !errors.Is(err,
		fault.Invalid) {
		t.Error("a deny poses as the built-in permit", err)
	}
}

func TestAllDeniesTogetherAreBounded(t *testing.T) {
	text := "forbid (principal, action, resource);" + strings.Repeat(" ", grant.MaxCedar-40)
	var s grant.State
	var err error
	for i := range 5 {
		d := grant.Deny{Appliance: "eu-1", Name: fmt.Sprint("d", i), Cedar: text, At: start, Nonce: nonce}
		if s, err = s.Forbid(d.Name, d, nil, start); (err != nil) != (i == 4) {
			t.Fatal(i, err)
		}
	}
	if !errors.Is(err, fault.Busy) {
		t.Fatal(err)
	}
}

func TestAnUnreadableBookAllowsNothing(t *testing.T) {
	s := given(t, grant.State{}, g(fleet.Deploy))
	s.Denies = []grant.Denied{{ID: "d", Name: "torn", Cedar: "forbid (principal, act"}}
	for _, p := range fleet.Phases() {
		if d := grant.Decide(act(p), s); d.Allow || !slices.Equal(d.By, []string{"torn"}) {
			t.Errorf("%+v", d)
		}
	}
	for _, d := range s.Access("eu-1", start) {
		if d.Allow {
			t.Errorf("%+v", d)
		}
	}
}

// What Access leaves out, the customer does not know of.
func TestAccessLeavesNothingOut(t *testing.T) {
	only := func(names ...string) func(*grant.Grant) { return func(x *grant.Grant) { x.Scope.Operations = names } }
	for name, c := range map[string]struct {
		gs   []grant.Grant
		deny string
		want bool
		why  []string
	}{
		"the first name is forbidden": {[]grant.Grant{g(fleet.OperateRead, only("a", "b"))},
			`forbid (principal, action, resource == Operation::"a");`, true, []string{"operations a, b only", "denies hold: d"}},
		"each name is forbidden": {[]grant.Grant{g(fleet.OperateRead, only("a", "b"))}, `forbid (principal, action, resource);`, false,
			[]string{"forbidden by d"}},
		"each name by itself": {[]grant.Grant{g(fleet.OperateRead, only("a", "b"))},
			`forbid (principal, action, resource) when { ["a", "b"].contains(context.operation) };`, false, []string{"forbidden by d"}},
		"several scopes": {[]grant.Grant{g(fleet.OperateRead, only("a")), g(fleet.OperateRead, only("b"))}, "", true,
			[]string{"operations a; or operations b only"}},
		"a scope and everything": {[]grant.Grant{g(fleet.OperateRead, only("a")), g(fleet.OperateRead)}, "", true,
			[]string{"granted operate.read"}},
		"all but one operation": {[]grant.Grant{g(fleet.OperateRead)},
			`forbid (principal, action, resource) unless { context.operation == "state" };`, true, []string{"denies hold: d"}},
		"all but one person": {[]grant.Grant{g(fleet.OperateRead)},
			`forbid (principal, action, resource) unless { principal == Vendor::"spiffe://acme.example/operator/ann" };`, true, nil},
		"all but a named service": {[]grant.Grant{g(fleet.OperateRead)},
			`forbid (principal, action, resource) unless { resource in Service::"store" };`, true, nil},
		"all without a name": {[]grant.Grant{g(fleet.OperateRead)}, `forbid (principal, action, resource) when { context.operation == "" };`,
			true, nil},
		"another appliance's": {[]grant.Grant{g(fleet.OperateRead, func(x *grant.Grant) { x.Appliance = "us-1" })}, "", false,
			[]string{"has not granted"}},
	} {
		s := given(t, grant.State{}, c.gs...)
		if c.deny != "" {
			s = denied(t, s, "d", c.deny)
		}
		for _, d := range s.Access("eu-1", start.Add(time.Hour)) {
			if d.Phase != fleet.OperateRead {
				continue
			}
			if d.Allow != c.want {
				t.Errorf("%s: %+v", name, d)
			}
			for _, why := range c.why {
				if !strings.Contains(d.Why, why) {
					t.Errorf("%s: %q does not say %q", name, d.Why, why)
				}
			}
			if name == "a scope and everything" && strings.Contains(d.Why, "only") {
				t.Errorf("%s: %q", name, d.Why)
			}
		}
	}
}

// Where the denies leave more acts than Access tries, it does not call the phase shut.
func TestAccessSaysWhenItDoesNotKnow(t *testing.T) {
	text := `forbid (principal, action, resource) unless { context.operation == "zz" && context.service == "zz" && (`
	for i := range 62 {
		text += fmt.Sprintf(`context.operation != "w%02d" && `, i)
	}
	text += strings.Repeat("context.now > 1 && ", 600) + "true) };"
	s := denied(t, given(t, grant.State{}, g(fleet.OperateRead)), "d", text)
	for _, d := range s.Access("eu-1", start) {
		if d.Phase == fleet.OperateRead && (!d.Allow || d.Grant != "" || !strings.Contains(d.Why, "may be allowed")) {
			t.Errorf("%+v", d)
		}
		if d.Phase == fleet.OperateWrite && d.Allow {
			t.Errorf("no grant, and %+v", d)
		}
	}
	open := act(fleet.OperateRead, func(i *grant.Input) { i.Operation, i.Service = "zz", "zz" })
	if d := grant.Decide(open, s); !d.Allow {
		t.Errorf("the act that Access could not find: %+v", d)
	}
}

func TestExplainPoliciesShowsWhatMayDecide(t *testing.T) {
	s := given(t, grant.State{}, g(fleet.Deploy, func(x *grant.Grant) { x.From = start.Add(time.Hour) }), g(fleet.Install))
	s = revoked(t, s, grant.Revoke{Phase: fleet.Install})
	text := strings.Join(grant.ExplainPolicies(s), "\n")
	if !strings.Contains(text, `Action::"deploy"`) || strings.Contains(text, `Action::"install"`) {
		t.Error(text)
	}
}

// rules are denies with what they mean, written another way.
var rules = []struct {
	text string
	hits func(grant.Input) bool
}{
	{`forbid (principal, action in Action::"operate", resource);`, func(i grant.Input) bool {
		return strings.HasPrefix(string(i.Phase), "operate.")
	}},
	{`forbid (principal, action == Action::"observe", resource);`, func(i grant.Input) bool { return i.Phase == fleet.Observe }},
	{`forbid (principal, action, resource in Service::"store");`, func(i grant.Input) bool { return i.Service == "store" }},
	{`forbid (principal, action, resource == Operation::"dump");`, func(i grant.Input) bool { return i.Operation == "dump" }},
	{`forbid (principal == Vendor::"spiffe://a.example/operator/ann", action, resource);`, func(i grant.Input) bool {
		return i.Who == "spiffe://a.example/operator/ann"
	}},
	{`forbid (principal, action, resource in Appliance::"us-1");`, func(i grant.Input) bool { return i.Appliance == "us-1" }},
	{`forbid (principal, action, resource) unless { context.effects.isEmpty() };`, func(i grant.Input) bool { return len(i.Effects) > 0 }},
	{fmt.Sprintf(`forbid (principal, action, resource) when { context.now >= %d };`,
		start.Add(time.Hour).UnixMilli()), func(i grant.Input) bool { return !i.Now.Before(start.Add(time.Hour)) }},
}

// Whatever is granted: denies and the built-in set win, and less consent of any kind never allows more.
func TestDeniesWinAndLessIsLess(t *testing.T) {
	builtins := []string{grant.DeletePersistentData, grant.ReadSecretValues, grant.LeaveScope, grant.ChangeAuditLog, grant.ChangeConsent}
	rapid.Check(t, func(t *rapid.T) {
		s, _ := drawn(t)
		in := drawAct(t)
		in.Who = rapid.SampledFrom([]fleet.Principal{"", "spiffe://a.example/operator/ann", "spiffe://a.example/operator/bob"}).Draw(t, "who")
		in.Effects = rapid.SliceOfNDistinct(rapid.SampledFrom(append([]string{"harmless"}, builtins...)), 0, 2,
			rapid.ID[string]).Draw(t, "effects")
		bare := grant.Decide(in, s)
		var hit []string
		for _, e := range in.Effects {
			if slices.Contains(builtins, e) {
				hit = append(hit, "builtin:"+e)
			}
		}
		for _, i := range rapid.SliceOfNDistinct(rapid.IntRange(0, len(rules)-1), 0, 3, rapid.ID[int]).Draw(t, "denies") {
			name := fmt.Sprint("d", i)
			next, err := s.Forbid(name, grant.Deny{Appliance: "eu-1", Name: name, Cedar: rules[i].text, At: start, Nonce: nonce}, nil, start)
			if err != nil {
				t.Fatal(err)
			}
			if s = next; rules[i].hits(in) {
				hit = append(hit, name)
			}
		}
		d := grant.Decide(in, s)
		if len(hit) > 0 {
			slices.Sort(hit)
			if d.Allow || !slices.Equal(d.By, hit) {
				t.Fatalf("%+v, and these forbid it: %v", d, hit)
			}
		} else if d.Allow != bare.Allow {
			t.Fatalf("denies that don't apply made %+v of %+v", d, bare)
		}
		if len(s.Held) == 0 || d.Allow {
			return
		}
		less := s
		less.Held = slices.Clone(s.Held)
		x := &less.Held[rapid.IntRange(0, len(s.Held)-1).Draw(t, "shrink")].Grant
		switch rapid.IntRange(0, 4).Draw(t, "how") {
		case 0:
			if end := x.From.Add(time.Minute); x.Until.IsZero() || end.Before(x.Until) {
				x.Until = end
			}
		case 1:
			x.Uses = 1
		case 2:
			x.Scope.Operations = narrower(x.Scope.Operations, "state")
		case 3:
			x.Scope.Services = narrower(x.Scope.Services, "store")
		case 4:
			less.ObserveOff = true
		}
		if got := grant.Decide(in, less); got.Allow {
			t.Fatalf("less consent allows more: %+v", got)
		}
	})
}

// narrower takes a name away from a scope. An empty scope means any, so the last name is replaced, not removed.
func narrower(names []string, one string) []string {
	switch len(names) {
	case 0:
		return []string{one}
	case 1:
		return []string{"none-of-them"}
	}
	return names[1:]
}

// A state that was copied by assignment is not altered by what is done to its copy.
func TestCopiesAreCopies(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s, _ := drawn(t)
		s, err := s.Forbid("d", grant.Deny{Appliance: "eu-1", Name: "d", Cedar: rules[0].text, At: start, Nonce: nonce}, nil, start)
		if err != nil {
			t.Fatal(err)
		}
		before, _ := json.Marshal(s)
		now := start.Add(90 * time.Minute)
		work := s
		for range rapid.IntRange(1, 6).Draw(t, "steps") {
			next, err := work, error(nil)
			switch rapid.IntRange(0, 5).Draw(t, "step") {
			case 0:
				next, err = work.Give(fmt.Sprint("n", len(work.Held)), g(fleet.Deploy), nil, now)
			case 1:
				next, _, err = work.Revoke("r", grant.Revoke{Appliance: "eu-1", All: true, At: now, Nonce: nonce}, now)
			case 2:
				next, err = work.Use(fmt.Sprint("g", rapid.IntRange(0, 5).Draw(t, "which")), now)
			case 3:
				next, err = work.Lift("l", grant.Lift{Appliance: "eu-1", Deny: "d", At: now, Nonce: nonce}, now)
			case 4:
				next, err = work.Forbid("e", grant.Deny{Appliance: "eu-1", Name: "e", Cedar: rules[1].text, At: now, Nonce: nonce}, nil, now)
			case 5:
				work.Access("eu-1", now)
				grant.ExplainPolicies(work)
			}
			if err == nil {
				work = next
			}
		}
		if after, _ := json.Marshal(s); string(after) != string(before) {
			t.Fatalf("the copy wrote through:\n%s\n%s", before, after)
		}
		var again grant.State
		b, err := json.Marshal(work)
		if err != nil {
			t.Fatal(err)
		}
		if err := json.Unmarshal(b, &again); err != nil {
			t.Fatal(err)
		}
		if b2, _ := json.Marshal(again); string(b2) != string(b) {
			t.Fatalf("a snapshot changes the state:\n%s\n%s", b, b2)
		}
	})
}
