// SPDX-License-Identifier: Apache-2.0

package operation_test

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"strings"
	"testing"

	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/operation"
	"github.com/demarc-dev/demarc/seal"
)

func FuzzParseTemplate(f *testing.F) {
	f.Add([]byte(good))
	f.Add([]byte("a: &a [*a]"))
	f.Add([]byte("<<: {a: b}\n? [x]\n: !!binary aGk="))
	f.Fuzz(func(t *testing.T, b []byte) {
		tpl, err := operation.ParseTemplate(b)
		if err != nil {
			return
		}
		if err := tpl.Check(); err != nil {
			t.Fatalf("what was parsed does not check: %v", err)
		}
		if err := tpl.Digest().Check(); err != nil || tpl.Limit() <= 0 {
			t.Fatalf("%v, %s", err, tpl.Limit())
		}
		argv, err := tpl.Argv(nil)
		if err == nil && (len(argv) == 0 || argv[0] != tpl.Run[0] || len(argv) > len(tpl.Run)) {
			t.Fatalf("%q out of %q", argv, tpl.Run)
		}
	})
}

// FuzzArgv fills whatever stands in a value into a template whose pattern allows everything.
func FuzzArgv(f *testing.F) {
	for _, s := range []string{"", "-x", "${b}", "a b", "a\nb", "\xff", "\u202e", strings.Repeat("x", 300)} {
		f.Add(s)
	}
	tpl := operation.Template{Version: operation.TemplateVersion, Name: "p", About: "x", Kind: operation.KindScript, Tier: fleet.OperateRead,
		Timeout: "1s",
		Run:     []string{"x", "${v}", "--v=${v}"}, Vars: map[string]operation.Var{"v": {Type: operation.TypeString, Pattern: "^[^é]*$"}}}
	f.Fuzz(func(t *testing.T, v string) {
		argv, err := tpl.Argv(map[string]string{"v": v})
		if err == nil && (len(argv) != 3 || argv[1] != v || argv[2] != "--v="+v || strings.HasPrefix(v, "-")) {
			t.Fatalf("%q: %q", v, argv)
		}
	})
}

// FuzzKind tries the bytes as an envelope, and as the payload of one that nobody signed: Kind looks before it is verified.
func FuzzKind(f *testing.F) {
	req, app, res, rel := chain(f)
	for _, b := range [][]byte{req, app, res, rel, sealed(f, plan(), customer), sealed(f, called(req), customer),
		sealed(f, other{}, customer)} {
		f.Add(b)
	}
	for _, v := range []json.Marshaler{request(), called(req), plan()} {
		b, err := v.MarshalJSON()
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	if kind, err := operation.Kind(
		unsigned(
			[]byte(`{"_type":"https://in-toto.io/Statement/v1","subject":null,"predicateType":"` + operation.TypeCancel +
				`","predicate":{}}`))); kind != operation.TypeCancel {
		f.Fatalf("the envelope of this test is not one: %v", err)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		for _, env := range [][]byte{b, unsigned(b)} {
			if kind, err := operation.Kind(env); (kind == "") != (err != nil) {
				t.Fatalf("%q, %v", kind, err)
			}
		}
	})
}

func unsigned(payload []byte) []byte {
	return []byte(`{"payloadType":"application/vnd.in-toto+json","payload":"` + base64.StdEncoding.EncodeToString(payload) +
		`","signatures":[{"keyid":"SHA256:x","sig":"eA=="}]}`)
}

// FuzzStatements reads each kind of document: one that is read is written again in the same bytes, and its check does
// not fall over. The envelope around it is tried in package seal.
func FuzzStatements(f *testing.F) {
	req, app, res, _ := chain(f)
	for _, v := range []json.Marshaler{request(), approval(req), result(req, app), released(res), called(req), plan()} {
		b, err := v.MarshalJSON()
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		read[operation.Request](t, b)
		read[operation.Approval](t, b)
		read[operation.Result](t, b)
		read[operation.Release](t, b)
		read[operation.Cancel](t, b)
		read[operation.PlanApproval](t, b)
	})
}

func read[T interface {
	seal.Body
	json.Marshaler
	Check() error
}](t *testing.T, b []byte) {
	var v T
	if json.Unmarshal(b, &v) != nil {
		return
	}
	_ = v.Check()
	again, err := v.MarshalJSON()
	if err != nil {
		t.Fatalf("%T was read and can't be written: %v", v, err)
	}
	var compact bytes.Buffer
	if json.Compact(&compact, b) != nil || !bytes.Equal(compact.Bytes(), again) {
		t.Fatalf("%T has two spellings:\n%s\n%s", v, b, again)
	}
}

// FuzzVerifyChain takes any bytes in the place of any document: what was not signed by the right party is refused.
func FuzzVerifyChain(f *testing.F) {
	req, app, res, rel := chain(f)
	whole := [][]byte{req, app, res, rel}
	for i, b := range whole {
		f.Add(uint8(i), b)
		f.Add(uint8(i+1), b)
	}
	k := keys(f)
	f.Fuzz(func(t *testing.T, i uint8, b []byte) {
		docs := make([][]byte, 4)
		copy(docs, whole)
		docs[i%4] = b
		_, err := operation.VerifyChain(docs[0], docs[1], docs[2], docs[3], k)
		if err == nil && !bytes.Equal(b, whole[i%4]) && (i%4 != 3 || len(b) != 0) {
			t.Fatalf("another document %d was taken: %q", i%4, b)
		}
	})
}

func FuzzParseOutput(f *testing.F) {
	f.Add(operation.Output{Stdout: []byte("out"), Stderr: []byte("err")}.Encode())
	f.Add(output.Encode())
	f.Add([]byte("demarc-output/1\n\xff\xff\xff\xff"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if o, err := operation.ParseOutput(b); err == nil && !bytes.Equal(o.Encode(), b) {
			t.Fatalf("%q has two spellings", b)
		}
	})
}
