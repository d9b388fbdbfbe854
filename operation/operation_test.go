// SPDX-License-Identifier: Apache-2.0

package operation_test

import (
	"crypto/ed25519"
	"errors"
	"fmt"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/operation"
	"github.com/demarc-dev/demarc/seal"
)

var start = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

func key(b byte) ed25519.PrivateKey {
	return ed25519.NewKeyFromSeed([]byte(strings.Repeat(string(rune('a'+b)), 32)))
}

var operator, customer, box = key(0), key(1), key(2)

func public(t testing.TB, k ed25519.PrivateKey) []seal.Key {
	t.Helper()
	p, err := seal.KeyOf(k.Public())
	if err != nil {
		t.Fatal(err)
	}
	return []seal.Key{p}
}

func keys(t testing.TB) operation.Keys {
	return operation.Keys{Operators: public(t, operator), Customers: public(t, customer), Appliance: public(t, box)}
}

func sealed[T seal.Body](t testing.TB, v T, by ed25519.PrivateKey) []byte {
	t.Helper()
	b, err := seal.Seal(v, by)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

const (
	nonce     = "0123456789abcdef"
	recipient = "age16rt3p2ckhxxh5ugjhujk4t5tqc3ujtvtd5dn2wtzfnakathd6d0s2vn65m"
)

func request() operation.Request {
	return operation.Request{ID: "op-1", Appliance: "eu-1", Operator: fleet.PrincipalOf("acme.example", fleet.Operator, "ann"),
		Template:       "state",
		TemplateDigest: fleet.DigestOf([]byte("t")), Release: fleet.DigestOf([]byte("r")), Vars: map[string]string{"section": "a<b"},
		Reason: "why", Recipient: recipient, At: start, NotAfter: start.Add(time.Hour), Nonce: nonce}
}

func approval(req []byte) operation.Approval {
	return operation.Approval{ID: "op-1", Appliance: "eu-1", Request: fleet.DigestOf(req), Decision: operation.DecisionApprove,
		Argv:   []string{"bin/store", "state"},
		Reason: "fine", At: start.Add(time.Minute), NotAfter: start.Add(time.Hour), Nonce: nonce}
}

// output is what the operation of the tests wrote.
var output = operation.Output{Stdout: []byte("out"), Stderr: []byte("err!"), Truncated: true, StdoutSalt: [32]byte{1, 2, 3},
	StderrSalt: [32]byte{4, 5, 6}}

func result(req, app []byte) operation.Result {
	stdout, stderr := output.Commitments()
	return operation.Result{ID: "op-1", Appliance: "eu-1", Request: fleet.DigestOf(req), Approval: fleet.DigestOf(app),
		Argv:  []string{"bin/store", "state"},
		State: operation.Held, Exit: 1, Signal: "none", Stdout: stdout, Stderr: stderr, Reason: "x", Started: start.Add(2 * time.Minute),
		Ended: start.Add(3 * time.Minute)}
}

func released(res []byte) operation.Release {
	return operation.Release{ID: "op-1", Appliance: "eu-1", Result: fleet.DigestOf(res), Decision: operation.DecisionRelease,
		Output: fleet.DigestOf([]byte("o")),
		Reason: "ok", At: start.Add(4 * time.Minute), Nonce: nonce}
}

func plan() operation.PlanApproval {
	return operation.PlanApproval{Appliance: "eu-1", Release: fleet.DigestOf([]byte("r")), Plan: fleet.DigestOf([]byte("p")),
		Phases: []fleet.Phase{fleet.Install, fleet.Deploy}, At: start, NotAfter: start.Add(time.Hour), Nonce: nonce}
}

func TestNext(t *testing.T) {
	legal := map[string]operation.State{
		"requested approve": operation.Approved, "requested reject": operation.Rejected, "requested expire": operation.Expired,
		"requested cancel": operation.Cancelled,
		"approved start":   operation.Running, "approved expire": operation.Expired, "approved cancel": operation.Cancelled,
		"running finish": operation.Held, "running fail": operation.Failed, "running cancel": operation.Cancelled,
		"held release": operation.Released, "held withhold": operation.Withheld,
	}
	for _, s := range operation.States() {
		moves := 0
		for _, e := range operation.Events() {
			got, err := operation.Next(s, e)
			want, ok := legal[string(s)+" "+string(e)]
			if ok {
				moves++
			}
			if ok != (err == nil) || got != want || (!ok && !errors.Is(err, fault.Conflict)) {
				t.Errorf("%s %s: %q, %v, want %q", s, e, got, err, want)
			}
		}
		if s.Final() != (moves == 0) {
			t.Errorf("%s is final: %v, and %d moves lead out of it", s, s.Final(), moves)
		}
	}
	for _, c := range [][2]string{{"requested", "explode"}, {"nowhere", "approve"}} {
		if _, err := operation.Next(operation.State(c[0]), operation.Event(c[1])); !errors.Is(err, fault.Invalid) {
			t.Errorf("%v: %v", c, err)
		}
	}
}

func chain(t testing.TB) (req, app, res, rel []byte) {
	req = sealed(t, request(), operator)
	app = sealed(t, approval(req), customer)
	res = sealed(t, result(req, app), box)
	rel = sealed(t, released(res), customer)
	return
}

func TestChain(t *testing.T) {
	req, app, res, rel := chain(t)
	for want, docs := range map[operation.State][4][]byte{
		operation.Requested: {req}, operation.Approved: {req, app}, operation.Held: {req, app, res}, operation.Released: {req, app, res, rel},
	} {
		c, err := operation.VerifyChain(docs[0], docs[1], docs[2], docs[3], keys(t))
		if err != nil || c.State != want || !reflect.DeepEqual(c.Request, request()) {
			t.Errorf("%s: %s, %v", want, c.State, err)
		}
	}
	for name, docs := range map[string][4][]byte{
		"no approval": {req, nil, res, rel}, "no result": {req, app, nil, rel}, "nothing": {},
		"approval as request": {app, app, res, rel}, "request as approval": {req, req},
	} {
		if _, err := operation.VerifyChain(docs[0], docs[1], docs[2], docs[3], keys(t)); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

// Whoever signs in another's place is refused: each document by each wrong party.
func TestChainKnowsWhoseWordItIs(t *testing.T) {
	req, app, res, rel := chain(t)
	for i, wrong := range [][4][]byte{
		{sealed(t, request(), customer), app, res, rel}, {req, sealed(t, approval(req), operator)}, {req, sealed(t, approval(req), box)},
		{req, app, sealed(t, result(req, app), customer)}, {req, app, sealed(t, result(req, app), operator)},
		{req, app, res, sealed(t, released(res), operator)},
	} {
		if _, err := operation.VerifyChain(wrong[0], wrong[1], wrong[2], wrong[3], keys(t)); !errors.Is(err, fault.Denied) {
			t.Errorf("case %d: %v", i, err)
		}
	}
}

// No field of any document can be changed without the chain breaking, even where the party that signs it signs anew:
// all that comes after is bound to what was there before.
func TestEveryFieldIsBound(t *testing.T) {
	req, app, res, rel := chain(t)
	each := func(name string, v any, try func(v any) error) {
		rv := reflect.ValueOf(v)
		for i := range rv.NumField() {
			c := reflect.New(rv.Type()).Elem()
			c.Set(rv)
			f := c.Field(i)
			switch x := f.Interface().(type) {
			case fleet.Digest:
				f.Set(reflect.ValueOf(fleet.DigestOf([]byte("other"))))
			case operation.State:
				f.SetString(string(operation.Failed))
			case time.Time:
				f.Set(reflect.ValueOf(x.Add(time.Second)))
			case []string:
				f.Set(reflect.ValueOf([]string{"other"}))
			case map[string]string:
				f.Set(reflect.ValueOf(map[string]string{"other": "x"}))
			case bool:
				f.SetBool(!x)
			case int, int64:
				f.SetInt(f.Int() + 1)
			default:
				f.SetString(f.String() + "z")
			}
			if err := try(c.Interface()); err == nil {
				t.Errorf("%s.%s was changed, and the chain holds", name, rv.Type().Field(i).Name)
			}
		}
	}
	each("Request", request(), func(v any) error {
		_, err := operation.VerifyChain(sealed(t, v.(operation.Request), operator), app, res, rel, keys(t))
		return err
	})
	each("Approval", approval(req), func(v any) error {
		_, err := operation.VerifyChain(req, sealed(t, v.(operation.Approval), customer), res, rel, keys(t))
		return err
	})
	each("Result", result(req, app), func(v any) error {
		_, err := operation.VerifyChain(req, app, sealed(t, v.(operation.Result), box), rel, keys(t))
		return err
	})
}

func TestChecks(t *testing.T) {
	req, app, res, _ := chain(t)
	if err := plan().Check(); err != nil {
		t.Fatal(err)
	}
	cancel := operation.Cancel{ID: "op-1", Appliance: "eu-1", Request: fleet.DigestOf(req), At: start, Nonce: nonce}
	if err := cancel.Check(); err != nil {
		t.Fatal(err)
	}
	type checked interface{ Check() error }
	mut := func(f func(*operation.Request)) checked { r := request(); f(&r); return r }
	for want, c := range map[string]checked{
		"nonce":           mut(func(r *operation.Request) { r.Nonce = "short" }),
		"16 to 64":        mut(func(r *operation.Request) { r.Nonce = nonce + " " }),
		"recipient":       mut(func(r *operation.Request) { r.Recipient = "" }),
		"operator":        mut(func(r *operation.Request) { r.Operator = "spiffe://acme.example/node/a" }),
		"not_after":       mut(func(r *operation.Request) { r.NotAfter = r.At }),
		"reason":          mut(func(r *operation.Request) { r.Reason = strings.Repeat("x", 1025) }),
		"release":         mut(func(r *operation.Request) { r.Release = "sha256:zz" }),
		"decision":        func() checked { a := approval(req); a.Decision = "maybe"; return a }(),
		"names the comma": func() checked { a := approval(req); a.Argv = nil; return a }(),
		"state":           func() checked { r := result(req, app); r.State = operation.Running; return r }(),
		"ended":           func() checked { r := result(req, app); r.Ended = start; return r }(),
		"withhold":        func() checked { r := released(res); r.Decision = operation.DecisionWithhold; return r }(),
		"phases":          func() checked { p := plan(); p.Phases = []fleet.Phase{fleet.OperateAdmin}; return p }(),
	} {
		if err := c.Check(); !errors.Is(err, fault.Invalid) || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v", want, err)
		}
	}
}

func TestStatementsAreInToto(t *testing.T) {
	b, err := request().MarshalJSON()
	if err != nil {
		t.Fatal(err)
	}
	want := `{"_type":"https://in-toto.io/Statement/v1","subject":[{"name":"template","digest":{"sha256":"`
	if !strings.HasPrefix(string(b), want) || !strings.Contains(string(b), `"predicateType":"https://demarc.dev/operation/request/v1"`) {
		t.Fatalf("%s", b)
	}
	for name, s := range map[string]string{
		"another subject": strings.Replace(string(b), `"name":"template"`, `"name":"tempLate"`, 1),
		"no subject":      strings.Replace(string(b), `"subject":[`, `"subject":[],"x":[`, 1),
		"another type":    strings.Replace(string(b), "Statement/v1", "Statement/v2", 1),
		"another kind":    strings.Replace(string(b), "operation/request/v1", "operation/approval/v1", 1),
		"unknown field":   strings.Replace(string(b), `"id":"op-1"`, `"id":"op-1","extra":1`, 1),
	} {
		var r operation.Request
		if s == string(b) {
			t.Fatalf("%s: the case changes nothing", name)
		}
		if err := r.UnmarshalJSON([]byte(s)); err == nil {
			t.Errorf("%s: taken", name)
		}
	}
	kind, err := operation.Kind(sealed(t, plan(), customer))
	if err != nil || kind != operation.TypePlanApproval {
		t.Fatalf("%q, %v", kind, err)
	}
}

func TestOutput(t *testing.T) {
	req, app, _, _ := chain(t)
	o := output
	back, err := operation.ParseOutput(o.Encode())
	if err != nil || !reflect.DeepEqual(o, back) {
		t.Fatalf("%v, %v", back, err)
	}
	if err := back.Matches(result(req, app)); err != nil {
		t.Fatal(err)
	}
	for name, spoil := range map[string]func(o *operation.Output){
		"stdout":    func(o *operation.Output) { o.Stdout = []byte("Out") },
		"stderr":    func(o *operation.Output) { o.Stderr = nil },
		"exchanged": func(o *operation.Output) { o.Stdout, o.Stderr = o.Stderr, o.Stdout },
		"exchanged, salted": func(o *operation.Output) {
			*o = operation.Output{Stdout: o.Stderr, Stderr: o.Stdout, Truncated: o.Truncated, StdoutSalt: o.StderrSalt, StderrSalt: o.StdoutSalt}
		},
		"not cut off":  func(o *operation.Output) { o.Truncated = false },
		"no salt":      func(o *operation.Output) { o.StdoutSalt = [32]byte{} },
		"another salt": func(o *operation.Output) { o.StderrSalt[31] ^= 1 },
	} {
		bad := o
		if spoil(&bad); !errors.Is(bad.Matches(result(req, app)), fault.Denied) {
			t.Errorf("%s: taken", name)
		}
	}
	for i := range o.Encode() {
		if _, err := operation.ParseOutput(o.Encode()[:i]); err == nil {
			t.Fatalf("cut at %d and taken", i)
		}
	}
}

const good = `version: demarc-template/1
name: state
about: shows the state of the store
kind: exec
service: store
tier: operate.read
argv: [bin/store, state, --section, "${section}", "--limit=${limit}"]
vars:
  section: {type: string, pattern: "^(summary|notes)$"}
  limit: {type: int, optional: true}
effects: {network: true}
timeout: 10s
output: 65536
`

func TestTemplates(t *testing.T) {
	tpl, err := operation.ParseTemplate([]byte(good))
	if err != nil {
		t.Fatal(err)
	}
	again, err := operation.ParseTemplate([]byte("# a comment\n" + good))
	if err != nil || again.Digest() != tpl.Digest() || tpl.Limit() != 10*time.Second {
		t.Fatalf("a comment changed the digest, or %v", err)
	}
	for name, swap := range map[string][2]string{
		"unknown key":       {"kind: exec", "kind: exec\ncolour: red"},
		"double key":        {"kind: exec", "kind: exec\nkind: exec"},
		"another version":   {"demarc-template/1", "demarc-template/2"},
		"no pattern":        {`{type: string, pattern: "^(summary|notes)$"}`, "{type: string}"},
		"loose pattern":     {"^(summary|notes)$", "summary|notes"},
		"escaped end":       {"^(summary|notes)$", `^a\\$`},
		"broken pattern":    {"^(summary|notes)$", "^(a$"},
		"unknown variable":  {"${section}", "${other}"},
		"open placeholder":  {"${section}", "${section"},
		"program by value":  {"argv: [bin/store,", `argv: ["${section}",`},
		"unused variable":   {"--limit=${limit}", "x"},
		"tier that deploys": {"operate.read", "deploy"},
		"no time":           {"10s", "0s"},
		"too long":          {"10s", "25h"},
		"writes and reads":  {"{network: true}", "{writes: [/data]}"},
		"script of service": {"kind: exec", "kind: script"},
		"second document":   {"output: 65536", "output: 65536\n---\na: b"},
		"anchor":            {"[bin/store, state,", "&a [bin/store, state,"},
	} {
		text := strings.Replace(good, swap[0], swap[1], 1)
		if text == good {
			t.Fatalf("%s: the case changes nothing", name)
		}
		if tp, err := operation.ParseTemplate([]byte(text)); err == nil {
			t.Errorf("%s: taken: %+v", name, tp)
		} else if !errors.Is(err, fault.Invalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := operation.ParseTemplate([]byte(strings.Repeat("#", operation.MaxTemplate+1))); err == nil {
		t.Error("a huge template was taken")
	}
}

func TestArgv(t *testing.T) {
	tpl, err := operation.ParseTemplate([]byte(good))
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		vars map[string]string
		want string // "" is an error
	}{
		{map[string]string{"section": "summary"}, "[bin/store state --section summary]"},
		{map[string]string{"section": "notes", "limit": "-5"}, "[bin/store state --section notes --limit=-5]"},
		{map[string]string{}, ""},
		{map[string]string{"section": "summary\n"}, ""},
		{map[string]string{"section": "summary; rm -rf /"}, ""},
		{map[string]string{"section": "${limit}"}, ""},
		{map[string]string{"section": "notes", "limit": "5x"}, ""},
		{map[string]string{"section": "notes", "limit": "+5"}, ""},
		{map[string]string{"section": "notes", "other": "5"}, ""},
		{map[string]string{"section": "notes\x00"}, ""},
	} {
		got, err := tpl.Argv(c.vars)
		if (err == nil) != (c.want != "") || (err == nil && fmt.Sprint(got) != c.want) {
			t.Errorf("%q: %v, %v, want %s", c.vars, got, err, c.want)
		}
	}
	loose, err := operation.ParseTemplate([]byte(strings.Replace(good, "^(summary|notes)$", "^[^é]*$", 1)))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := loose.Argv(map[string]string{"section": "--exec=/bin/sh"}); err == nil {
		t.Error("a value became an option")
	}
	if got, err := loose.Argv(map[string]string{"section": "a b $(c) `d` ${limit}"}); err != nil || got[3] != "a b $(c) `d` ${limit}" {
		t.Errorf("a value was split or expanded: %q, %v", got, err)
	}
}
