// SPDX-License-Identifier: Apache-2.0

package audit_test

import (
	"bytes"
	"crypto"
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"
	"unicode/utf8"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
	"pgregory.net/rapid"

	"github.com/demarc-dev/demarc/audit"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
)

var t0 = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

func key(n byte) ed25519.PrivateKey {
	return ed25519.NewKeyFromSeed(bytes.Repeat([]byte{n}, ed25519.SeedSize))
}

func entry(i int) audit.Entry {
	return audit.Entry{At: t0.Add(time.Duration(i) * time.Second), By: fleet.Local, Request: fleet.RequestID(fmt.Sprint("r", i)),
		Kind: "test.add/1", Body: json.RawMessage(fmt.Sprintf(`{"n": %d, "s":"<&>"}`, i))}
}

func logOf(n int) audit.Log {
	var l audit.Log
	for i := range n {
		l = l.Append(entry(i))
	}
	return l
}

func TestEntryRoundTrip(t *testing.T) {
	for name, e := range map[string]audit.Entry{
		"full":    entry(1),
		"private": {At: t0, Kind: "secret.add/1", BodyDigest: fleet.DigestOf([]byte("x"))},
		"refused": {At: t0.In(time.FixedZone("x", 3600)), Kind: "a/1", Fault: fault.Denied, Detail: "no\ngrant \xff"},
		"no json": {At: t0, Kind: "a/1", Body: json.RawMessage(`{"`)},
		"bytes":   {At: t0, Kind: "a/1", Body: json.RawMessage("{\"a\":\"\xff\"}")},
		"nanos":   {At: t0.Add(123), Kind: "a/1"},
	} {
		leaf := e.Leaf()
		got, err := audit.ParseEntry(leaf)
		if err != nil {
			t.Errorf("%s: %v in %s", name, err, leaf)
			continue
		}
		if !bytes.Equal(got.Leaf(), leaf) || !got.At.Equal(e.At) || bytes.Contains(leaf, []byte("\n")) {
			t.Errorf("%s: %s reads as %+v", name, leaf, got)
		}
	}
	if got, _ := audit.ParseEntry(
		audit.Entry{At: t0, Kind: "a/1", Body: json.RawMessage(`{"`)}.Leaf()); got.BodyDigest != fleet.DigestOf([]byte(`{"`)) {
		t.Error("the digest of a body that is not JSON was lost")
	}
}

func TestParseEntryRefuses(t *testing.T) {
	good := string(entry(1).Leaf())
	for name, b := range map[string]string{
		"empty": "", "version": strings.Replace(good, "entry/1", "entry/2", 1), "space": strings.Replace(good, `,"kind"`, `, "kind"`, 1),
		"unknown": strings.Replace(good, `{"v"`, `{"x":1,"v"`, 1), "body": strings.Replace(good, `"n":1`, `"n":2`, 1),
		"fault": strings.TrimSuffix(good, "}") + `,"fault":"oops"}`, "time": strings.Replace(good, "2026", "20x6", 1),
		"zone": strings.Replace(good, "06Z", "06+00:00", 1), "kind": strings.Replace(good, "test.add/1", "", 1),
		"trailing": good + "\n", "long": strings.Repeat("x", audit.MaxLeaf+1),
	} {
		if _, err := audit.ParseEntry([]byte(b)); !errors.Is(err, fault.Invalid) {
			t.Errorf("%s: ParseEntry = %v, want invalid", name, err)
		}
	}
}

// naive is RFC 6962 as it is written down.
func naive(leaves [][]byte) tlog.Hash {
	if len(leaves) == 1 {
		return tlog.RecordHash(leaves[0])
	}
	k := 1
	for k*2 < len(leaves) {
		k *= 2
	}
	return tlog.NodeHash(naive(leaves[:k]), naive(leaves[k:]))
}

func TestRootsAndProofs(t *testing.T) {
	const n = 300 // more than two blocks
	l := logOf(n)
	leaves, err := l.Entries(0, n)
	if err != nil {
		t.Fatal(err)
	}
	head := func(size int64) audit.Head {
		root, err := l.RootAt(size)
		if err != nil {
			t.Fatal(err)
		}
		return audit.Head{Origin: "o", Size: size, Root: root}
	}
	for _, size := range []int64{1, 2, 3, 7, 64, 127, 128, 129, 255, 256, 257, n} {
		h := head(size)
		if want := naive(leaves[:size]); h.Root != [32]byte(want) {
			t.Fatalf("root of %d differs from RFC 6962's", size)
		}
		for _, i := range []int64{0, size / 2, size - 1} {
			p, err := l.Inclusion(i, size)
			if err != nil {
				t.Fatal(err)
			}
			if err := audit.Included(l.Entry(i), i, h, p); err != nil {
				t.Errorf("%d in %d: %v", i, size, err)
			}
			if audit.Included([]byte("other"), i, h, p) == nil {
				t.Errorf("%d in %d: another leaf is proven", i, size)
			}
		}
		for _, from := range []int64{0, 1, size / 2, size} {
			p, err := l.Consistency(from, size)
			if err != nil {
				t.Fatal(err)
			}
			old := head(from)
			if err := audit.Grown(old, h, p); err != nil {
				t.Errorf("%d to %d: %v", from, size, err)
			}
			old.Root[0] ^= 1
			if audit.Grown(old, h, p) == nil {
				t.Errorf("%d to %d: another past is proven", from, size)
			}
		}
	}
	for name, err := range map[string]error{
		"entries": second(l.Entries(0, n+1)), "inclusion": second(l.Inclusion(n, n)), "negative": second(l.Inclusion(-1, n)),
		"consistency": second(l.Consistency(5, 4)), "root": second(l.RootAt(n + 1)),
	} {
		if !errors.Is(err, fault.NotFound) {
			t.Errorf("%s out of range: %v, want not_found", name, err)
		}
	}
	if l.Entry(n) != nil || l.Entry(-1) != nil {
		t.Error("an entry out of range")
	}
	if audit.Grown(audit.Head{Origin: "a"}, audit.Head{Origin: "b"}, nil) == nil {
		t.Error("one log grew into another")
	}
}

func second[T any](_ T, err error) error { return err }

// TestPersistent: random histories that branch are compared with plain slices.
func TestPersistent(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		type pair struct {
			log    audit.Log
			leaves [][]byte
		}
		all := []pair{{}}
		for i := range rapid.IntRange(1, 60).Draw(t, "steps") {
			p := all[rapid.IntRange(0, len(all)-1).Draw(t, "branch")]
			for j := range rapid.IntRange(1, 140).Draw(t, "many") {
				leaf := fmt.Appendf(nil, "%d/%d", i, j)
				p = pair{p.log.AppendLeaf(leaf), append(p.leaves[:len(p.leaves):len(p.leaves)], leaf)}
			}
			all = append(all, p)
		}
		for _, p := range all[1:] {
			if p.log.Root() != [32]byte(naive(p.leaves)) || p.log.Size() != int64(len(p.leaves)) {
				t.Fatal("a branch disturbed another")
			}
			for i, leaf := range p.leaves {
				if !bytes.Equal(p.log.Entry(int64(i)), leaf) {
					t.Fatalf("entry %d is %q, want %q", i, p.log.Entry(int64(i)), leaf)
				}
			}
		}
	})
}

// TestReadersOfOlderValues is for the race detector: readers of each value while the writer goes on and rehearses.
func TestReadersOfOlderValues(t *testing.T) {
	l := logOf(100)
	var wg sync.WaitGroup
	for i := range 200 {
		old, want := l, l.Root()
		wg.Go(func() {
			if old.Root() != want || old.Entry(old.Size()-1) == nil {
				t.Error("an older value changed")
			}
		})
		_ = l.Append(entry(1000 + i)) // a rehearsal
		l = l.Append(entry(100 + i))
	}
	wg.Wait()
	if l.Root() != logOf(300).Root() {
		t.Error("a rehearsal left a trace")
	}
}

const origin = "acme.example/appliance/eu-1"

func signer(t testing.TB, name string, k crypto.Signer) note.Signer {
	t.Helper()
	s, err := audit.NoteSigner(name, k)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func verifier(t testing.TB, name string, k crypto.Signer) note.Verifier {
	t.Helper()
	v, err := audit.NoteVerifier(name, k.Public())
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func checkpoint(t testing.TB, name string, l audit.Log, size int64, k crypto.Signer) []byte {
	t.Helper()
	root, err := l.RootAt(size)
	if err != nil {
		t.Fatal(err)
	}
	b, err := audit.Checkpoint(name, size, root, signer(t, name, k))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestCheckpoint(t *testing.T) {
	l := logOf(5)
	b := checkpoint(t, origin, l, 5, key(1))
	h, err := audit.OpenCheckpoint(b, verifier(t, origin, key(1)))
	if err != nil || h != l.Head(origin) {
		t.Fatalf("OpenCheckpoint = %+v, %v", h, err)
	}
	// The library's own verifier key opens it too.
	vkey, err := note.NewEd25519VerifierKey(origin, key(1).Public().(ed25519.PublicKey))
	if err != nil {
		t.Fatal(err)
	}
	v, err := note.NewVerifier(vkey)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := audit.OpenCheckpoint(b, v); err != nil {
		t.Errorf("with the library's verifier: %v", err)
	}
	for name, tc := range map[string]struct {
		b    []byte
		v    []note.Verifier
		kind fault.Kind
	}{
		"other key":  {b, []note.Verifier{verifier(t, origin, key(2))}, fault.Denied},
		"other name": {b, []note.Verifier{verifier(t, "x", key(1))}, fault.Denied},
		"no key":     {b, nil, fault.Denied},
		"one of two": {b, []note.Verifier{verifier(t, origin, key(1)), verifier(t, "x", key(2))}, fault.Denied},
		"edited":     {bytes.Replace(b, []byte("\n5\n"), []byte("\n6\n"), 1), []note.Verifier{verifier(t, origin, key(1))}, fault.Denied},
		"not a note": {[]byte("x"), []note.Verifier{verifier(t, origin, key(1))}, fault.Invalid},
		"too long":   {bytes.Repeat([]byte("x"), 70<<10), []note.Verifier{verifier(t, origin, key(1))}, fault.Invalid},
		"extra lines": {signed(t, origin+"\n5\n"+strings.Repeat("A", 43)+"=\nmore\n", key(1)), []note.Verifier{verifier(t, origin, key(1))},
			fault.Invalid},
		"zeros": {signed(t, origin+"\n05\n"+strings.Repeat("A", 43)+"=\n", key(1)), []note.Verifier{verifier(t, origin, key(1))},
			fault.Invalid},
		"short root": {signed(t, origin+"\n5\nAAAA\n", key(1)), []note.Verifier{verifier(t, origin, key(1))}, fault.Invalid},
	} {
		if _, err := audit.OpenCheckpoint(tc.b, tc.v...); fault.Of(err) != tc.kind {
			t.Errorf("%s: %v, want %q", name, err, tc.kind)
		}
	}
	for _, bad := range []string{"", "a b", "a+b", "a\nb", "\xff", strings.Repeat("a", 256)} {
		if _, err := audit.NoteSigner(bad, key(1)); !errors.Is(err, fault.Invalid) {
			t.Errorf("name %q: %v", bad, err)
		}
	}
}

func signed(t testing.TB, text string, k crypto.Signer) []byte {
	t.Helper()
	b, err := note.Sign(&note.Note{Text: text}, signer(t, origin, k))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestCosign(t *testing.T) {
	l := logOf(5)
	b := checkpoint(t, origin, l, 5, key(1))
	c, err := audit.Cosign(b, "acme.example/witness", key(2), t0)
	if err != nil {
		t.Fatal(err)
	}
	w, err := audit.CosignVerifier("acme.example/witness", key(2).Public())
	if err != nil {
		t.Fatal(err)
	}
	h, at, err := audit.OpenCosigned(c, verifier(t, origin, key(1)), w)
	if err != nil || h != l.Head(origin) || !at.Equal(t0) {
		t.Fatalf("OpenCosigned = %+v, %s, %v", h, at, err)
	}
	if _, _, err := audit.OpenCosigned(b, verifier(t, origin, key(1)), w); !errors.Is(err, fault.Denied) {
		t.Errorf("a checkpoint without the witness: %v", err)
	}
	// A plain signature with the witness's key is no cosignature: the two domains are apart.
	if _, err := audit.OpenCheckpoint(c, verifier(t, "acme.example/witness", key(2))); !errors.Is(err, fault.Denied) {
		t.Errorf("a cosignature passes as a log's signature: %v", err)
	}
	for name, b := range map[string][]byte{"nothing": nil, "text": []byte("a\n"), "half": []byte(origin + "\n5\n")} {
		if _, err := audit.Cosign(b, "w", key(2), t0); !errors.Is(err, fault.Invalid) {
			t.Errorf("%s: Cosign = %v", name, err)
		}
	}
	if _, err := audit.Cosign(b, "w", key(2), time.Unix(-1, 0)); !errors.Is(err, fault.Invalid) {
		t.Errorf("before 1970: %v", err)
	}
}

// A leaf is spelled as encoding/json spells it, byte for byte: roots of older builds depend on it.
func FuzzLeaf(f *testing.F) {
	f.Add("grant.add/1", "no\ngrant \xff <&> \u2028", []byte(`{"n": 1.0, "s":"<&>\u2028\ud800", "a":[ 1,2 ], "a":1E+2, "\u00e9":"\\u00E9"}`))
	f.Add("", "", []byte(` null `))
	f.Add("a/1", "x", []byte("{\"a\":\"\xff\"}"))
	f.Add("a/1", "x", []byte(`{"`))
	f.Fuzz(func(t *testing.T, kind, detail string, body []byte) {
		e := audit.Entry{At: t0, By: fleet.Local, Request: "r", Kind: kind, Fault: fault.Denied, Detail: detail, Body: body}
		clean := func(s string) string { return strings.ToValidUTF8(s, "\uFFFD") }
		w := struct {
			V          string          `json:"v"`
			At         string          `json:"at"`
			By         string          `json:"by,omitempty"`
			Request    string          `json:"request,omitempty"`
			Kind       string          `json:"kind"`
			BodyDigest fleet.Digest    `json:"body_digest,omitempty"`
			Body       json.RawMessage `json:"body,omitempty"`
			Fault      string          `json:"fault,omitempty"`
			Detail     string          `json:"detail,omitempty"`
		}{V: "demarc-entry/1", At: t0.Format(time.RFC3339Nano), By: string(fleet.Local), Request: "r", Kind: clean(kind), Fault: "denied",
			Detail: clean(detail)}
		if len(body) > 0 {
			w.BodyDigest = fleet.DigestOf(body)
			if b, err := json.Marshal(json.RawMessage(body)); err == nil && utf8.Valid(b) {
				w.Body, w.BodyDigest = b, fleet.DigestOf(b)
			}
		}
		want, err := json.Marshal(w)
		if err != nil {
			t.Fatal(err)
		}
		if got := e.Leaf(); !bytes.Equal(got, want) {
			t.Fatalf("leaf %s\nwant %s", got, want)
		}
	})
}

func FuzzParseEntry(f *testing.F) {
	f.Add(entry(1).Leaf())
	f.Add(audit.Entry{At: t0, Kind: "a/1", Fault: fault.Busy}.Leaf())
	f.Fuzz(func(t *testing.T, b []byte) {
		if e, err := audit.ParseEntry(b); err == nil && !bytes.Equal(e.Leaf(), b) {
			t.Fatalf("%q does not round-trip", b)
		}
	})
}

func FuzzOpenCheckpoint(f *testing.F) {
	b := checkpoint(f, origin, logOf(3), 3, key(1))
	f.Add(b)
	c, _ := audit.Cosign(b, "w", key(2), t0)
	f.Add(c)
	v := verifier(f, origin, key(1))
	want := logOf(3).Head(origin)
	f.Fuzz(func(t *testing.T, b []byte) {
		if h, err := audit.OpenCheckpoint(b, v); err == nil && h != want {
			t.Fatalf("opened a head that was never signed: %+v", h)
		}
		if out, err := audit.Cosign(b, "w", key(2), t0); err == nil && !bytes.HasPrefix(out, b) {
			t.Fatal("cosigning changed the checkpoint")
		}
	})
}
