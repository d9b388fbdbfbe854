// SPDX-License-Identifier: Apache-2.0

package operation_test

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/operation"
	"github.com/demarc-dev/demarc/seal"
)

// changed gives v with its field i set to something else that is as well formed as the old value, where that is possible.
func changed(t testing.TB, v any, i int) any {
	t.Helper()
	rv := reflect.ValueOf(v)
	c := reflect.New(rv.Type()).Elem()
	c.Set(rv)
	f := c.Field(i)
	switch x := f.Interface().(type) {
	case fleet.Digest:
		f.SetString(string(fleet.DigestOf([]byte("other"))))
	case operation.State:
		f.SetString(string(operation.Failed))
	case time.Time:
		f.Set(reflect.ValueOf(x.Add(time.Second)))
	case []string:
		f.Set(reflect.ValueOf(append(slices.Clone(x), "other")))
	case map[string]string:
		f.Set(reflect.ValueOf(map[string]string{"other": "x"}))
	case []fleet.Phase:
		f.Set(reflect.ValueOf(x[:1]))
	case bool:
		f.SetBool(!x)
	case int, int64:
		f.SetInt(f.Int() + 1)
	default:
		if f.Kind() != reflect.String {
			t.Fatalf("%s.%s: the test knows no other value of a %s", rv.Type(), rv.Type().Field(i).Name, f.Type())
		}
		f.SetString(f.String() + "z")
	}
	if reflect.DeepEqual(c.Interface(), v) {
		t.Fatalf("%s.%s: the test changed nothing", rv.Type(), rv.Type().Field(i).Name)
	}
	return c.Interface()
}

// forged puts another payload under the signatures of a sealed document.
func forged(t testing.TB, sealed []byte, doc any) []byte {
	t.Helper()
	payload, err := json.Marshal(doc)
	if err != nil {
		t.Fatal(err)
	}
	var env struct {
		PayloadType string          `json:"payloadType"`
		Payload     string          `json:"payload"`
		Signatures  json.RawMessage `json:"signatures"`
	}
	if err := json.Unmarshal(sealed, &env); err != nil {
		t.Fatal(err)
	}
	env.Payload = base64.StdEncoding.EncodeToString(payload)
	out, err := json.Marshal(env)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// Whoever holds no key can't change a field of any document, the last one of the chain included.
func TestEveryFieldIsSigned(t *testing.T) {
	req, app, res, rel := chain(t)
	whole := [][]byte{req, app, res, rel}
	if !bytes.Equal(forged(t, req, request()), req) {
		t.Fatal("the test does not write envelopes as seal does: it would be refused for that")
	}
	for n, doc := range []any{request(), approval(req), result(req, app), released(res)} {
		for i := range reflect.TypeOf(doc).NumField() {
			docs := make([][]byte, 4)
			copy(docs, whole[:n+1]) // nothing comes after it whose digest would tell
			docs[n] = forged(t, whole[n], changed(t, doc, i))
			c, err := operation.VerifyChain(docs[0], docs[1], docs[2], docs[3], keys(t))
			if !errors.Is(err, fault.Denied) || !strings.Contains(fault.Text(err), "not signed by") {
				t.Errorf("%T.%s: %v", doc, reflect.TypeOf(doc).Field(i).Name, err)
			}
			if !reflect.DeepEqual(c, operation.Chain{}) {
				t.Errorf("%T.%s: a chain came with the error: %+v", doc, reflect.TypeOf(doc).Field(i).Name, c)
			}
		}
	}
}

// Whoever signs the last document can say only what is his to say: the fields named here, and no other.
func TestWhatASignerMayChoose(t *testing.T) {
	req, app, res, rel := chain(t)
	free := map[string]string{
		"Request":  "ID Appliance Operator Template TemplateDigest Release Vars Reason At NotAfter Nonce",
		"Approval": "Argv Reason At NotAfter Nonce",
		"Result":   "State Exit Signal Stdout Stderr Reason Started Ended",
		"Release":  "Output Reason At Nonce",
	}
	whole := [][]byte{req, app, res, rel}
	for n, doc := range []any{request(), approval(req), result(req, app), released(res)} {
		typ := reflect.TypeOf(doc)
		for i := range typ.NumField() {
			docs := make([][]byte, 4)
			copy(docs, whole[:n+1])
			switch v := changed(t, doc, i).(type) {
			case operation.Request:
				docs[n] = sealed(t, v, operator)
			case operation.Approval:
				docs[n] = sealed(t, v, customer)
			case operation.Result:
				docs[n] = sealed(t, v, box)
			case operation.Release:
				docs[n] = sealed(t, v, customer)
			}
			_, err := operation.VerifyChain(docs[0], docs[1], docs[2], docs[3], keys(t))
			name := typ.Field(i).Name
			if may := slices.Contains(strings.Fields(free[typ.Name()]), name); may != (err == nil) {
				t.Errorf("%s.%s: may be chosen %v, and the chain says %v", typ.Name(), name, may, err)
			}
		}
	}
}

// Each way in which a chain can be broken has a sentence of its own.
func TestEachBreachHasItsSentence(t *testing.T) {
	req, app, res, rel := chain(t)
	ap := func(f func(*operation.Approval)) []byte { a := approval(req); f(&a); return sealed(t, a, customer) }
	re := func(f func(*operation.Result)) []byte { r := result(req, app); f(&r); return sealed(t, r, box) }
	rl := func(res []byte, f func(*operation.Release)) []byte {
		l := released(res)
		f(&l)
		return sealed(t, l, customer)
	}
	rejected := ap(func(a *operation.Approval) { a.Decision = operation.DecisionReject })
	failed := re(func(r *operation.Result) { r.State = operation.Failed })
	long := request()
	long.NotAfter = start.Add(2 * time.Minute)
	short := sealed(t, long, operator)
	shortApp := func() []byte { a := approval(short); return sealed(t, a, customer) }()
	seen := map[string]string{}
	for _, c := range []struct {
		name, want string
		docs       [4][]byte
	}{
		{"nothing", "the request is missing", [4][]byte{}},
		{"no approval", "no approval", [4][]byte{req, nil, res, rel}},
		{"no result", "no result", [4][]byte{req, app, nil, rel}},
		{"other request", "for another request", [4][]byte{req, ap(func(a *operation.Approval) { a.Request = fleet.DigestOf(nil) })}},
		{"other operation", "approval names another operation", [4][]byte{req, ap(func(a *operation.Approval) { a.ID = "op-2" })}},
		{"other appliance", "approval names another appliance", [4][]byte{req, ap(func(a *operation.Approval) { a.Appliance = "eu-2" })}},
		{"approved before", "approval is older", [4][]byte{req, ap(func(a *operation.Approval) { a.At = start.Add(-operation.Skew - 1) })}},
		{"approved too late", "had run out when",
			[4][]byte{req, ap(func(a *operation.Approval) { a.At = start.Add(time.Hour); a.NotAfter = start.Add(2 * time.Hour) })}},
		{"result after a no", "had said no", [4][]byte{req, rejected, func() []byte { return sealed(t, result(req, rejected), box) }()}},
		{"result of other request", "result is of another request",
			[4][]byte{req, app, re(func(r *operation.Result) { r.Request = fleet.DigestOf(nil) })}},
		{"result of other approval", "result is of another approval",
			[4][]byte{req, app, re(func(r *operation.Result) { r.Approval = fleet.DigestOf(nil) })}},
		{"result of other operation", "result names another operation", [4][]byte{req, app, re(func(r *operation.Result) { r.ID = "op-2" })}},
		{"result of other appliance", "result names another appliance",
			[4][]byte{req, app, re(func(r *operation.Result) { r.Appliance = "eu-2" })}},
		{"other arguments", "the arguments differ",
			[4][]byte{req, app, re(func(r *operation.Result) { r.Argv = []string{"bin/store", "wipe"} })}},
		{"began before the yes", "began before it was approved",
			[4][]byte{req, app, re(func(r *operation.Result) { r.Started = start.Add(time.Minute - operation.Skew - 1) })}},
		{"began after the yes ran out", "the approval had run out",
			[4][]byte{req, app, re(func(r *operation.Result) { r.Started, r.Ended = start.Add(time.Hour), start.Add(time.Hour) })}},
		{"began after the request ran out", "after the request had run out", [4][]byte{short, shortApp, sealed(t, result(short, shortApp), box)}},
		{"release of other result", "release is of another result",
			[4][]byte{req, app, res, rl(res, func(l *operation.Release) { l.Result = fleet.DigestOf(nil) })}},
		{"release of other operation", "release names another operation",
			[4][]byte{req, app, res, rl(res, func(l *operation.Release) { l.ID = "op-2" })}},
		{"release of other appliance", "release names another appliance",
			[4][]byte{req, app, res, rl(res, func(l *operation.Release) { l.Appliance = "eu-2" })}},
		{"release of a failure", "is failed: it has no output", [4][]byte{req, app, failed, rl(failed, func(*operation.Release) {})}},
		{"release before the end", "older than the end",
			[4][]byte{req, app, res, rl(res, func(l *operation.Release) { l.At = start.Add(3*time.Minute - operation.Skew - 1) })}},
	} {
		_, err := operation.VerifyChain(c.docs[0], c.docs[1], c.docs[2], c.docs[3], keys(t))
		if !errors.Is(err, fault.Denied) || !strings.Contains(fault.Text(err), c.want) {
			t.Errorf("%s: %v, want %q", c.name, err, c.want)
			continue
		}
		if other, twice := seen[fault.Text(err)]; twice {
			t.Errorf("%s and %s: the same sentence %q", c.name, other, fault.Text(err))
		}
		seen[fault.Text(err)] = c.name
	}
	// What the clocks may differ is not a breach.
	if _, err := operation.VerifyChain(req, ap(func(a *operation.Approval) { a.At = start.Add(-operation.Skew) }), nil, nil,
		keys(t)); err != nil {
		t.Error(err)
	}
}

func TestTheOtherEnds(t *testing.T) {
	req, app, res, _ := chain(t)
	no := approval(req)
	no.Decision, no.Argv = operation.DecisionReject, nil
	stays := released(res)
	stays.Decision, stays.Output = operation.DecisionWithhold, ""
	for want, docs := range map[operation.State][4][]byte{
		operation.Requested: {req, {}, {}, {}}, // empty is what a message gives for a document that is not there
		operation.Rejected:  {req, sealed(t, no, customer)},
		operation.Cancelled: {req, app, func() []byte { r := result(req, app); r.State = operation.Cancelled; return sealed(t, r, box) }()},
		operation.Withheld:  {req, app, res, sealed(t, stays, customer)},
	} {
		if c, err := operation.VerifyChain(docs[0], docs[1], docs[2], docs[3], keys(t)); err != nil || c.State != want {
			t.Errorf("%s: %s, %v", want, c.State, err)
		}
	}
}

// A key that is pinned for two parties would let one consent for the other.
func TestNoKeySpeaksForTwo(t *testing.T) {
	one := public(t, operator)
	req := sealed(t, request(), operator)
	for name, k := range map[string]operation.Keys{
		"operator and customer":  {Operators: one, Customers: append(public(t, customer), one...), Appliance: public(t, box)},
		"operator and appliance": {Operators: one, Customers: public(t, customer), Appliance: one},
		"customer and appliance": {Operators: one, Customers: public(t, box), Appliance: public(t, box)},
		"under another name": {Operators: one, Customers: []seal.Key{{ID: "SHA256:mine", Public: operator.Public()}},
			Appliance: public(t, box)},
	} {
		if _, err := operation.VerifyChain(req, nil, nil, nil, k); !errors.Is(err, fault.Denied) ||
			!strings.Contains(err.Error(), "can't speak for both") {
			t.Errorf("%s: %v", name, err)
		}
	}
	twice := operation.Keys{Operators: append(public(t, operator), one...), Customers: public(t, customer), Appliance: public(t, box)}
	if _, err := operation.VerifyChain(req, nil, nil, nil, twice); err != nil {
		t.Errorf("a key that is listed twice for one party: %v", err)
	}
}

func TestVerifyTemplate(t *testing.T) {
	tpl, err := operation.ParseTemplate([]byte(good))
	if err != nil {
		t.Fatal(err)
	}
	r := request()
	r.TemplateDigest, r.Vars = tpl.Digest(), map[string]string{"section": "notes", "limit": "5"}
	argv := []string{"bin/store", "state", "--section", "notes", "--limit=5"}
	verify := func(r operation.Request, argv []string) operation.Chain {
		req := sealed(t, r, operator)
		a := approval(req)
		a.Argv = argv
		c, err := operation.VerifyChain(req, sealed(t, a, customer), nil, nil, keys(t))
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	if err := operation.VerifyTemplate(verify(r, argv), tpl); err != nil {
		t.Fatal(err)
	}
	other := tpl
	other.About = "looks harmless"
	renamed := tpl
	renamed.Name = "stats"
	bad := r
	bad.Vars = map[string]string{"section": "everything"}
	for name, err := range map[string]error{
		"other text":      operation.VerifyTemplate(verify(r, argv), other),
		"other name":      operation.VerifyTemplate(verify(r, argv), renamed),
		"other arguments": operation.VerifyTemplate(verify(r, append(slices.Clone(argv), "--all")), tpl),
		"other value":     operation.VerifyTemplate(verify(bad, argv), tpl),
	} {
		if !errors.Is(err, fault.Denied) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestVerifyOutput(t *testing.T) {
	req, app, res, _ := chain(t)
	o := output
	secret := []byte("as age would write it")
	l := released(res)
	l.Output = fleet.DigestOf(secret)
	c, err := operation.VerifyChain(req, app, res, sealed(t, l, customer), keys(t))
	if err != nil {
		t.Fatal(err)
	}
	if got, err := operation.VerifyOutput(c, secret, o.Encode()); err != nil || !reflect.DeepEqual(got, o) {
		t.Fatalf("%v, %v", got, err)
	}
	held, err := operation.VerifyChain(req, app, res, nil, keys(t))
	if err != nil {
		t.Fatal(err)
	}
	swapped := o
	swapped.Stdout, swapped.Stderr = o.Stderr, o.Stdout
	for name, c := range map[string]struct {
		c      operation.Chain
		secret []byte
		text   []byte
		kind   fault.Kind
	}{
		"not released":      {held, secret, o.Encode(), fault.Denied},
		"no chain":          {operation.Chain{}, secret, o.Encode(), fault.Denied},
		"other ciphertext":  {c, []byte("other"), o.Encode(), fault.Denied},
		"streams exchanged": {c, secret, swapped.Encode(), fault.Denied},
		"one byte more":     {c, secret, append(o.Encode(), 'x'), fault.Invalid},
		"bare text":         {c, secret, []byte("out"), fault.Invalid},
	} {
		if got, err := operation.VerifyOutput(c.c, c.secret, c.text); !errors.Is(err, c.kind) || got.Stdout != nil {
			t.Errorf("%s: %v, %v", name, got, err)
		}
	}
}

func TestOutputHasOneEncoding(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		o := operation.Output{Stdout: rapid.SliceOf(rapid.Byte()).Draw(t, "stdout"), Stderr: rapid.SliceOf(rapid.Byte()).Draw(t, "stderr"),
			Truncated: rapid.Bool().Draw(t, "truncated")}
		copy(o.StdoutSalt[:], rapid.SliceOfN(rapid.Byte(), 32, 32).Draw(t, "salt"))
		back, err := operation.ParseOutput(o.Encode())
		if err != nil || !bytes.Equal(back.Stdout, o.Stdout) || !bytes.Equal(back.Stderr, o.Stderr) || back.Truncated != o.Truncated ||
			back.StdoutSalt != o.StdoutSalt {
			t.Fatalf("%v, %v", back, err)
		}
	})
	for name, b := range map[string]string{
		"other version":        strings.Replace(string(output.Encode()), "/1", "/2", 1),
		"length beyond":        "demarc-output/1\n" + strings.Repeat("\x00", 65) + "\x00\x00\x00\x05abc",
		"length near the wrap": "demarc-output/1\n" + strings.Repeat("\x00", 65) + "\xff\xff\xff\xff\x00\x00\x00\x00",
		"another flag":         strings.Replace(string(output.Encode()), "\n\x01", "\n\x02", 1),
		"something behind it":  string(output.Encode()[:4095]) + "x",
		"longer":               string(output.Encode()) + "\x00",
	} {
		if _, err := operation.ParseOutput([]byte(b)); !errors.Is(err, fault.Invalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := operation.ParseOutput(operation.Output{Stdout: make([]byte, 64<<20+1)}.Encode()); !errors.Is(err, fault.Invalid) {
		t.Errorf("an output beyond the limit: %v", err)
	}
}
