// SPDX-License-Identifier: Apache-2.0

package operation_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/operation"
	"github.com/demarc-dev/demarc/seal"
)

func called(req []byte) operation.Cancel {
	return operation.Cancel{ID: "op-1", Appliance: "eu-1", Request: fleet.DigestOf(req), Reason: "no more", At: start, Nonce: nonce}
}

// again seals and opens a document and gives what came back, its kind, and what the unverified look at it says.
func again[T seal.Body](t testing.TB, v T) (T, string) {
	t.Helper()
	b := sealed(t, v, operator)
	got, _, err := seal.Open[T](b, public(t, operator))
	if err != nil {
		t.Fatal(err)
	}
	if twice := sealed(t, got, operator); !bytes.Equal(twice, b) {
		t.Errorf("%T: sealed again it has other bytes", v)
	}
	kind, err := operation.Kind(b)
	if err != nil {
		t.Fatal(err)
	}
	return got, kind
}

func same[T seal.Body](t *testing.T, v T, kind string) {
	t.Helper()
	if got, k := again(t, v); !reflect.DeepEqual(got, v) || k != kind {
		t.Errorf("%T: %s, %+v, want %+v", v, k, got, v)
	}
}

func TestDocumentsComeBackAsTheyWere(t *testing.T) {
	req, app, res, _ := chain(t)
	same(t, request(), operation.TypeRequest)
	same(t, approval(req), operation.TypeApproval)
	same(t, result(req, app), operation.TypeResult)
	same(t, released(res), operation.TypeRelease)
	same(t, called(req), operation.TypeCancel)
	same(t, plan(), operation.TypePlanApproval)
}

// The same instant is the same bytes, whatever zone the signer's clock is set to.
func TestTimesAreInUTC(t *testing.T) {
	r := request()
	east := time.FixedZone("", 3*3600)
	r.At, r.NotAfter = r.At.In(east), r.NotAfter.In(east)
	if !bytes.Equal(sealed(t, r, operator), sealed(t, request(), operator)) {
		t.Error("a zone changed the bytes")
	}
	b, err := request().MarshalJSON()
	if err != nil {
		t.Fatal(err)
	}
	for _, at := range []string{"2026-03-01T15:00:00+03:00", "2026-03-01T12:00:00+00:00", "2026-03-01T12:00:00.0Z"} {
		var got operation.Request
		if err := got.UnmarshalJSON(bytes.Replace(b, []byte(`"at":"2026-03-01T12:00:00Z"`), []byte(`"at":"`+at+`"`), 1)); err == nil {
			t.Errorf("%s: a second spelling of an instant was taken", at)
		}
	}
}

// A refused statement leaves what it was read into as it was, and nothing of an older one shines through a new one.
func TestReadingIsWholeOrNotAtAll(t *testing.T) {
	r := request()
	if err := r.UnmarshalJSON([]byte(`{"_type":"https://in-toto.io/Statement/v1"}`)); err == nil || !reflect.DeepEqual(r, request()) {
		t.Errorf("%v, %+v", err, r)
	}
	bare := request()
	bare.Vars = nil
	b, err := bare.MarshalJSON()
	if err != nil {
		t.Fatal(err)
	}
	if err := r.UnmarshalJSON(b); err != nil || !reflect.DeepEqual(r, bare) {
		t.Errorf("%v, %+v", err, r)
	}
}

func TestStatementsHaveOneForm(t *testing.T) {
	_, app, _, _ := chain(t)
	b, err := result(nil, app).MarshalJSON()
	if err != nil {
		t.Fatal(err)
	}
	text := string(b)
	swap := func(old, new string) string {
		s := strings.Replace(text, old, new, 1)
		if s == text {
			t.Fatalf("%q is not in the statement", old)
		}
		return s
	}
	for name, s := range map[string]string{
		"nothing":              "",
		"null":                 "null",
		"null predicate":       text[:strings.Index(text, `"predicate":`)] + `"predicate":null}`,
		"no predicate":         text[:strings.Index(text, `,"predicate":`)] + `}`,
		"list as predicate":    text[:strings.Index(text, `"predicate":`)] + `"predicate":[]}`,
		"subjects in an order": strings.NewReplacer(`"name":"stdout"`, `"name":"stderr"`, `"name":"stderr"`, `"name":"stdout"`).Replace(text),
		"subject more":         swap(`"subject":[`, `"subject":[{"name":"x","digest":{"sha256":"00"}},`),
		"subject's other hash": swap(`{"sha256":`, `{"sha512":"00","sha256":`),
		"another digest":       swap(`"sha256":"`, `"sha256":"0`),
		"key in capitals":      swap(`"id":`, `"ID":`),
		"key twice":            swap(`"id":`, `"id":"op-2","id":`),
		"key twice outside":    swap(`"_type":`, `"_type":"x","_type":`),
		"unknown outside":      swap(`"_type":`, `"x":1,"_type":`),
		"default spelled out":  swap(`"reason":"x"`, `"reason":""`),
		"number as fraction":   swap(`"exit":1`, `"exit":1.0`),
		"escaped letter":       swap(`"held"`, `"hel\u0064"`),
		"trailing":             text + "{}",
		"other order":          swap(`"exit":1,"signal":"none"`, `"signal":"none","exit":1`),
	} {
		var r operation.Result
		if err := r.UnmarshalJSON([]byte(s)); !errors.Is(err, fault.Invalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	var r operation.Result
	if err := r.UnmarshalJSON(b); err != nil {
		t.Errorf("the untouched statement: %v", err)
	}
}

type foreign struct {
	Type          string   `json:"_type"`
	Subject       []string `json:"subject"`
	PredicateType string   `json:"predicateType"`
	Predicate     struct{} `json:"predicate"`
}

func (foreign) PayloadType() string { return "application/vnd.in-toto+json" }

type other struct{}

func (other) PayloadType() string { return "application/vnd.demarc.grant+json;v=1" }

func TestKindRefuses(t *testing.T) {
	for name, b := range map[string][]byte{
		"nothing":    nil,
		"not sealed": []byte(`{}`),
		"other type": sealed(t, other{}, operator),
		"newer version": sealed(t, foreign{Type: "https://in-toto.io/Statement/v1",
			PredicateType: "https://demarc.dev/operation/request/v2"}, operator),
		"no statement":   sealed(t, foreign{Type: "https://in-toto.io/Statement/v0.1", PredicateType: operation.TypeRequest}, operator),
		"strange type":   sealed(t, foreign{Type: "https://in-toto.io/Statement/v1", PredicateType: strings.Repeat("x", 4096)}, operator),
		"without a type": sealed(t, foreign{Type: "https://in-toto.io/Statement/v1"}, operator),
	} {
		kind, err := operation.Kind(b)
		if !errors.Is(err, fault.Invalid) || kind != "" || len(fault.Text(err)) > 400 {
			t.Errorf("%s: %q, %v", name, kind, err)
		}
	}
}

func TestEachFieldIsChecked(t *testing.T) {
	req, app, res, _ := chain(t)
	type checked interface{ Check() error }
	rq := func(f func(*operation.Request)) checked { x := request(); f(&x); return x }
	ap := func(f func(*operation.Approval)) checked { x := approval(req); f(&x); return x }
	rs := func(f func(*operation.Result)) checked { x := result(req, app); f(&x); return x }
	rl := func(f func(*operation.Release)) checked { x := released(res); f(&x); return x }
	cn := func(f func(*operation.Cancel)) checked { x := called(req); f(&x); return x }
	pl := func(f func(*operation.PlanApproval)) checked { x := plan(); f(&x); return x }
	for _, ok := range []checked{request(), approval(req), result(req, app), released(res), called(req), plan()} {
		if err := ok.Check(); err != nil {
			t.Fatalf("%T: %v", ok, err)
		}
		// Nothing at all is never a document.
		if err := reflect.Zero(reflect.TypeOf(ok)).Interface().(checked).Check(); !errors.Is(err, fault.Invalid) {
			t.Errorf("%T without anything: %v", ok, err)
		}
	}
	for name, c := range map[string]struct {
		c    checked
		want string
	}{
		"id":              {rq(func(x *operation.Request) { x.ID = "Op 1" }), "operation name"},
		"appliance":       {rq(func(x *operation.Request) { x.Appliance = "" }), "appliance name"},
		"template":        {rq(func(x *operation.Request) { x.Template = "../x" }), "template name"},
		"template digest": {rq(func(x *operation.Request) { x.TemplateDigest = "" }), "template_digest"},
		"variable's name": {rq(func(x *operation.Request) { x.Vars = map[string]string{"A": ""} }), `vars "A"`},
		"value too long": {rq(func(x *operation.Request) { x.Vars = map[string]string{"a": strings.Repeat("x", 4097)} }),
			"vars a: a value"},
		"value that hides":         {rq(func(x *operation.Request) { x.Vars = map[string]string{"a": "\u202e"} }), "vars a: must be"},
		"value no UTF-8":           {rq(func(x *operation.Request) { x.Vars = map[string]string{"a": "\xff"} }), "vars a: must be"},
		"reason redraws":           {rq(func(x *operation.Request) { x.Reason = "\x1b[1A approved" }), "reason: must be"},
		"reason returns":           {rq(func(x *operation.Request) { x.Reason = "bad\rgood" }), "reason: must be"},
		"recipient":                {rq(func(x *operation.Request) { x.Recipient = "age1xyz" }), "recipient"},
		"recipient in capitals":    {rq(func(x *operation.Request) { x.Recipient = strings.ToUpper(recipient) + "A" }), "recipient"},
		"no time":                  {rq(func(x *operation.Request) { x.At = time.Time{} }), "not_after"},
		"long nonce":               {rq(func(x *operation.Request) { x.Nonce = strings.Repeat("a", 65) }), "nonce"},
		"customer as operator":     {rq(func(x *operation.Request) { x.Operator = "local" }), "operator"},
		"approval's request":       {ap(func(x *operation.Approval) { x.Request = "md5:00" }), "request"},
		"approval's argument":      {ap(func(x *operation.Approval) { x.Argv = []string{"a", "b\x00"} }), "argv 1"},
		"approval's long argument": {ap(func(x *operation.Approval) { x.Argv = []string{strings.Repeat("x", 8<<10+1)} }), "argv 0"},
		"approval's many":          {ap(func(x *operation.Approval) { x.Argv = make([]string, 257) }), "argv: at most 256"},
		"approval's bytes": {ap(func(x *operation.Approval) {
			x.Argv = strings.Split(strings.Repeat(strings.Repeat("x", 8000)+" ", 9), " ")
		}), "argv: at most 256"},
		"approval's end":      {ap(func(x *operation.Approval) { x.NotAfter = x.At }), "not_after"},
		"result's command":    {rs(func(x *operation.Result) { x.Argv = nil }), "argv"},
		"result's stdout":     {rs(func(x *operation.Result) { x.Stdout = "" }), "stdout"},
		"result's stderr":     {rs(func(x *operation.Result) { x.Stderr = "" }), "stderr"},
		"result's approval":   {rs(func(x *operation.Result) { x.Approval = "" }), "approval"},
		"result's signal":     {rs(func(x *operation.Result) { x.Signal = strings.Repeat("x", 33) }), "signal"},
		"release's result":    {rl(func(x *operation.Release) { x.Result = "" }), "result"},
		"release of nothing":  {rl(func(x *operation.Release) { x.Output = "" }), "output"},
		"release's decision":  {rl(func(x *operation.Release) { x.Decision = "approve" }), "decision"},
		"release's time":      {rl(func(x *operation.Release) { x.At = time.Time{} }), "at"},
		"release's nonce":     {rl(func(x *operation.Release) { x.Nonce = "" }), "nonce"},
		"cancel's request":    {cn(func(x *operation.Cancel) { x.Request = "" }), "request"},
		"cancel's time":       {cn(func(x *operation.Cancel) { x.At = time.Time{} }), "at"},
		"cancel's nonce":      {cn(func(x *operation.Cancel) { x.Nonce = "a" }), "nonce"},
		"plan":                {pl(func(x *operation.PlanApproval) { x.Plan = "" }), "plan"},
		"plan's release":      {pl(func(x *operation.PlanApproval) { x.Release = "" }), "release"},
		"plan without phases": {pl(func(x *operation.PlanApproval) { x.Phases = nil }), "phases"},
		"plan's phase twice":  {pl(func(x *operation.PlanApproval) { x.Phases = []fleet.Phase{fleet.Deploy, fleet.Deploy} }), "twice"},
		"plan's end":          {pl(func(x *operation.PlanApproval) { x.NotAfter = time.Time{} }), "not_after"},
	} {
		if err := c.c.Check(); !errors.Is(err, fault.Invalid) || !strings.Contains(fault.Text(err), c.want) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
	}
}

// A third party's tool reads the statement with nothing but the in-toto specification.
func TestInTotoShape(t *testing.T) {
	req, app, _, _ := chain(t)
	b, err := result(req, app).MarshalJSON()
	if err != nil {
		t.Fatal(err)
	}
	var s struct {
		Type    string `json:"_type"`
		Subject []struct {
			Name   string            `json:"name"`
			Digest map[string]string `json:"digest"`
		} `json:"subject"`
		PredicateType string         `json:"predicateType"`
		Predicate     map[string]any `json:"predicate"`
	}
	if err := json.Unmarshal(b, &s); err != nil {
		t.Fatal(err)
	}
	stdout, stderr := output.Commitments()
	want := map[string]fleet.Digest{"approval": fleet.DigestOf(app), "stdout": stdout, "stderr": stderr}
	for _, sub := range s.Subject {
		if "sha256:"+sub.Digest["sha256"] != string(want[sub.Name]) {
			t.Errorf("subject %s: %v", sub.Name, sub.Digest)
		}
	}
	if len(s.Subject) != len(want) || s.Type != "https://in-toto.io/Statement/v1" || s.PredicateType != operation.TypeResult ||
		s.Predicate["exit"] != 1.0 {
		t.Errorf("%+v", s)
	}
}

// Each field of each document that is a name, a digest, a text, a command or a nonce is looked at.
func TestNoFieldIsForgotten(t *testing.T) {
	type checked interface{ Check() error }
	req, app, res, _ := chain(t)
	wrong := map[string][]string{
		"ID": {"", "Op 1", "../x", strings.Repeat("x", 64)}, "Nonce": {"", "short", nonce + "\n", nonce + "é"},
		"Reason": {"\x1b[2J", "\u202e", "\xff", strings.Repeat("x", 1025)},
		"Signal": {"\x1b", strings.Repeat("x", 33)}, "Template": {"", "A"}, "Decision": {"", "yes", "Approve"},
		"Recipient": {"", "age1", "AGE-SECRET-KEY-1"},
	}
	for _, doc := range []checked{request(), approval(req), result(req, app), released(res), called(req), plan()} {
		typ := reflect.TypeOf(doc)
		for i := range typ.NumField() {
			var bad []any
			switch reflect.ValueOf(doc).Field(i).Interface().(type) {
			case fleet.Digest:
				bad = []any{fleet.Digest("x"), fleet.Digest("")}
			case fleet.ApplianceID:
				bad = []any{fleet.ApplianceID(""), fleet.ApplianceID("EU 1")}
			case fleet.Principal:
				bad = []any{fleet.Principal(""), fleet.Local, fleet.PrincipalOf("acme.example", fleet.Appliance, "ann")}
			case fleet.ReasonKind:
				bad = []any{fleet.ReasonKind("open /etc/x"), fleet.ReasonKind("\x1b"), fleet.ReasonKind(strings.Repeat("x", 41))}
			case operation.State:
				bad = []any{operation.State(""), operation.Running, operation.Released}
			case time.Time:
				bad = []any{time.Time{}}
			case []string:
				bad = []any{[]string{"a", "\x1b"}, []string{strings.Repeat("x", 8<<10+1)}, make([]string, 257)}
			case []fleet.Phase:
				bad = []any{[]fleet.Phase{}, []fleet.Phase{fleet.OperateRead}}
			case map[string]string:
				many := map[string]string{}
				for n := range 65 {
					many["a"+strings.Repeat("b", n%31)+string(rune('a'+n/31))] = ""
				}
				if len(many) != 65 {
					t.Fatalf("%d variables", len(many))
				}
				bad = []any{many, map[string]string{"": ""}}
			case string:
				for _, s := range wrong[typ.Field(i).Name] {
					bad = append(bad, s)
				}
			case bool, int:
				continue // each value is one
			case int64:
				bad = []any{int64(-1), int64(64<<20 + 1)}
			}
			if len(bad) == 0 {
				t.Errorf("%s.%s: the test knows no wrong value", typ, typ.Field(i).Name)
			}
			for _, v := range bad {
				c := reflect.New(typ).Elem()
				c.Set(reflect.ValueOf(doc))
				c.Field(i).Set(reflect.ValueOf(v))
				if err := c.Interface().(checked).Check(); !errors.Is(err, fault.Invalid) {
					t.Errorf("%s.%s: %.40q was taken: %v", typ, typ.Field(i).Name, v, err)
				}
			}
		}
	}
}

func TestStatementSaysWhatItIs(t *testing.T) {
	b, err := plan().MarshalJSON()
	if err != nil {
		t.Fatal(err)
	}
	var r operation.Request
	if err := r.UnmarshalJSON(b); err == nil || !strings.Contains(fault.Text(err), "plan-approval/v1\", and a ") {
		t.Error(err)
	}
	l := released(nil)
	l.Decision, l.Output = operation.DecisionWithhold, ""
	if b, err = l.MarshalJSON(); err != nil || strings.Count(string(b), `"sha256":`) != 1 || strings.Contains(string(b), `"name":"output"`) {
		t.Errorf("an output that is not let out is a subject: %s, %v", b, err)
	}
}

// TestWhatCannotBeSeenIsRefused (FAULTS.md A17): what shows nothing, or something else than it is, is no part of a text that a
// person approves.
func TestWhatCannotBeSeenIsRefused(t *testing.T) {
	for name, r := range map[string]rune{"Hangul filler": 0x3164, "Hangul choseong filler": 0x115f, "Hangul jungseong filler": 0x1160,
		"halfwidth Hangul filler": 0xffa0,
		"variation selector 1":    0xfe00, "variation selector 16": 0xfe0f, "variation selector 17": 0xe0100, "variation selector 256": 0xe01ef,
		"combining grapheme joiner": 0x34f,
		"braille blank":             0x2800, "Khmer inherent vowel": 0x17b4, "Mongolian selector": 0x180b, "Mongolian vowel separator": 0x180e,
		"Mongolian selector 4": 0x180f,
		"zero width space":     0x200b, "zero width joiner": 0x200d, "word joiner": 0x2060, "soft hyphen": 0xad, "byte order mark": 0xfeff,
		"right to left override": 0x202e,
		"tag a":                  0xe0061, "language tag": 0xe0001, "no-break space": 0xa0, "em space": 0x2003, "ideographic space": 0x3000,
		"line separator": 0x2028, "private use": 0xe000, "escape": 0x1b} {
		a := operation.Approval{ID: "op-1", Appliance: "eu-1", Request: fleet.DigestOf(nil), Decision: operation.DecisionApprove, At: start,
			NotAfter: start.Add(time.Hour), Nonce: nonce}
		a.Argv = []string{"bin/x", "a" + string(r) + "b"}
		if err := a.Check(); !errors.Is(err, fault.Invalid) {
			t.Errorf("%s in an argument: %v", name, err)
		}
		a.Argv, a.Reason = []string{"bin/x"}, "fine"+string(r)
		if err := a.Check(); !errors.Is(err, fault.Invalid) {
			t.Errorf("%s in a reason: %v", name, err)
		}
	}
	for _, text := range []string{"plain text, two lines\nand\ta tab", "Stra\u00dfe", "\u6f22\u5b57", "\uac00", "e\u0301", "\U0001f600",
		"\u2801"} {
		a := operation.Approval{ID: "op-1", Appliance: "eu-1", Request: fleet.DigestOf(nil), Decision: operation.DecisionApprove,
			Argv: []string{"bin/x", text}, Reason: text,
			At: start, NotAfter: start.Add(time.Hour), Nonce: nonce}
		if err := a.Check(); err != nil {
			t.Errorf("%q: %v", text, err)
		}
	}
}
