// SPDX-License-Identifier: Apache-2.0

package seal_test

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"encoding/asn1"
	"encoding/base64"
	"encoding/json"
	"errors"
	"math/big"
	"strings"
	"testing"

	"github.com/secure-systems-lab/go-securesystemslib/dsse"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/seal"
)

type note struct {
	Say  string            `json:"say"`
	Tags map[string]string `json:"tags,omitempty"`
}

func (note) PayloadType() string { return "application/vnd.demarc.note+json;v=1" }

type other struct {
	Say string `json:"say"`
}

func (other) PayloadType() string { return "application/vnd.demarc.other+json;v=1" }

func edKey(n byte) ed25519.PrivateKey {
	return ed25519.NewKeyFromSeed(bytes.Repeat([]byte{n}, ed25519.SeedSize))
}

func ecKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func keyOf(t testing.TB, s crypto.Signer) seal.Key {
	t.Helper()
	k, err := seal.KeyOf(s.Public())
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func must(t testing.TB, v note, by ...crypto.Signer) []byte {
	t.Helper()
	b, err := seal.Seal(v, by...)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// opaque hides the type of a key, as a device does.
type opaque struct{ crypto.Signer }

func TestRoundTrip(t *testing.T) {
	ed, ec := edKey(1), ecKey(t)
	v := note{Say: "<hello> & \u2028 ü", Tags: map[string]string{"b": "2", "a": "1"}}
	for name, by := range map[string][]crypto.Signer{"ed25519": {ed}, "ecdsa": {ec}, "device": {opaque{ec}}, "both": {ed, ec}} {
		t.Run(name, func(t *testing.T) {
			sealed := must(t, v, by...)
			var trusted []seal.Key
			for _, s := range by {
				trusted = append(trusted, keyOf(t, s))
			}
			got, keys, err := seal.Open[note](sealed, trusted)
			if err != nil {
				t.Fatal(err)
			}
			if got.Say != v.Say || got.Tags["a"] != "1" || len(keys) != len(by) {
				t.Errorf("Open = %+v by %d keys", got, len(keys))
			}
			if p, err := seal.Peek[note](sealed); err != nil || p.Say != v.Say {
				t.Errorf("Peek = %+v, %v", p, err)
			}
			typ, keys, err := seal.Verify(sealed, trusted)
			if err != nil || typ != v.PayloadType() || len(keys) != len(by) {
				t.Errorf("Verify = %q, %d keys, %v", typ, len(keys), err)
			}
		})
	}
	if !bytes.Equal(must(t, v, ec), must(t, v, ec)) {
		t.Error("the same document, key and bytes give two envelopes: ECDSA of a software key must be deterministic")
	}
}

// TestPAE checks the envelope with nothing of ours but the key.
func TestPAE(t *testing.T) {
	k := edKey(1)
	var env dsse.Envelope
	if err := json.Unmarshal(must(t, note{Say: "x"}, k), &env); err != nil {
		t.Fatal(err)
	}
	sig, _ := base64.StdEncoding.DecodeString(env.Signatures[0].Sig)
	pae := "DSSEv1 36 application/vnd.demarc.note+json;v=1 11 " + `{"say":"x"}`
	if !ed25519.Verify(k.Public().(ed25519.PublicKey), []byte(pae), sig) {
		t.Errorf("the signature is not over %q", pae)
	}
}

func TestWhoSigned(t *testing.T) {
	a, b, c := edKey(1), edKey(2), edKey(3)
	ka, kb, kc := keyOf(t, a), keyOf(t, b), keyOf(t, c)
	sealed := must(t, note{Say: "x"}, a, b)
	renamed := kb
	renamed.ID = "SHA256:another"
	for name, tc := range map[string]struct {
		trusted []seal.Key
		want    int
		kind    fault.Kind
	}{
		"both":                   {[]seal.Key{ka, kb, kc}, 2, ""},
		"one":                    {[]seal.Key{kb}, 1, ""},
		"one listed twice":       {[]seal.Key{kb, kb}, 1, ""},
		"one under two names":    {[]seal.Key{kb, renamed}, 1, ""},
		"nobody":                 {[]seal.Key{kc}, 0, fault.Denied},
		"nothing trusted":        {nil, 0, fault.Denied},
		"a key that is no key":   {[]seal.Key{{ID: "x"}}, 0, fault.Invalid},
		"the right id, no match": {[]seal.Key{{ID: ka.ID, Public: c.Public()}}, 0, fault.Denied},
	} {
		t.Run(name, func(t *testing.T) {
			_, keys, err := seal.Open[note](sealed, tc.trusted)
			if len(keys) != tc.want || fault.Of(err) != tc.kind {
				t.Errorf("Open = %d keys, %v; want %d, %q", len(keys), err, tc.want, tc.kind)
			}
		})
	}
}

// edit changes the parsed envelope and encodes it canonically again.
func edit(t testing.TB, sealed []byte, f func(*dsse.Envelope)) []byte {
	t.Helper()
	var e dsse.Envelope
	if err := json.Unmarshal(sealed, &e); err != nil {
		t.Fatal(err)
	}
	f(&e)
	b, err := json.Marshal(e)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestOneSignatureIsNotTwo(t *testing.T) {
	a := edKey(1)
	sealed := edit(t, must(t, note{Say: "x"}, a), func(e *dsse.Envelope) {
		again := e.Signatures[0]
		again.KeyID = ""
		e.Signatures = append(e.Signatures, e.Signatures[0], again)
	})
	if _, keys, err := seal.Open[note](sealed, []seal.Key{keyOf(t, a), keyOf(t, edKey(2))}); err != nil || len(keys) != 1 {
		t.Errorf("three copies of one signature count as %d keys (%v), want 1", len(keys), err)
	}
}

func TestRefused(t *testing.T) {
	k := edKey(1)
	good := must(t, note{Say: "x"}, k)
	payload := base64.StdEncoding.EncodeToString([]byte(`{"say":"x"}`))
	// resign signs any payload bytes, to reach the parser behind the signature.
	resign := func(p string) []byte {
		sig := ed25519.Sign(k, dsse.PAE(note{}.PayloadType(), []byte(p)))
		return edit(t, good, func(e *dsse.Envelope) {
			e.Payload = base64.StdEncoding.EncodeToString([]byte(p))
			e.Signatures[0].Sig = base64.StdEncoding.EncodeToString(sig)
		})
	}
	for name, tc := range map[string]struct {
		sealed []byte
		kind   fault.Kind
		text   string
	}{
		"empty":            {nil, fault.Invalid, "not JSON"},
		"too long":         {bytes.Repeat([]byte(" "), seal.MaxSealed+1), fault.Invalid, "at most"},
		"trailing":         {append(bytes.Clone(good), "{}"...), fault.Invalid, "after the end"},
		"trailing newline": {append(bytes.Clone(good), '\n'), fault.Invalid, "canonical"},
		"white space":      {bytes.Replace(good, []byte(`","payload"`), []byte(`", "payload"`), 1), fault.Invalid, "canonical"},
		"unknown field": {bytes.Replace(good, []byte(`{"payloadType"`), []byte(`{"x":1,"payloadType"`), 1), fault.Invalid,
			"unknown field"},
		"two payloads": {bytes.Replace(good, []byte(`"payload":`), []byte(`"payload":"e30=","payload":`), 1), fault.Invalid, "twice"},
		"case":         {bytes.Replace(good, []byte(`"payload":`), []byte(`"Payload":`), 1), fault.Invalid, "upper and lower case"},
		"no signature": {edit(t, good, func(e *dsse.Envelope) { e.Signatures = nil }), fault.Invalid, "0 signatures"},
		"many signatures": {edit(t, good, func(e *dsse.Envelope) { e.Signatures = make([]dsse.Signature, 33) }), fault.Invalid,
			"33 signatures"},
		"other type": {edit(t, good, func(e *dsse.Envelope) { e.PayloadType = "text/plain" }), fault.Invalid, "expected"},
		"payload edited": {edit(t, good, func(e *dsse.Envelope) { e.Payload = base64.StdEncoding.EncodeToString([]byte(`{"say":"y"}`)) }),
			fault.Denied, "not signed"},
		"payload url base64":   {edit(t, good, func(e *dsse.Envelope) { e.Payload = strings.TrimRight(payload, "=") }), fault.Invalid, "base64"},
		"payload line break":   {edit(t, good, func(e *dsse.Envelope) { e.Payload = payload[:4] + "\n" + payload[4:] }), fault.Invalid, "base64"},
		"signature not base64": {edit(t, good, func(e *dsse.Envelope) { e.Signatures[0].Sig = "!" }), fault.Invalid, "base64"},
		"signature empty":      {edit(t, good, func(e *dsse.Envelope) { e.Signatures[0].Sig = "" }), fault.Invalid, "base64"},
		"signature short":      {edit(t, good, func(e *dsse.Envelope) { e.Signatures[0].Sig = "AAAA" }), fault.Denied, "not signed"},
		"signed, not json":     {resign(`say`), fault.Invalid, "malformed"},
		"signed, unknown":      {resign(`{"say":"x","more":1}`), fault.Invalid, "unknown field"},
		"signed, twice":        {resign(`{"say":"y","say":"x"}`), fault.Invalid, "twice"},
		"signed, two spaces":   {resign(`{"say": "x"}`), fault.Invalid, "canonical"},
		"signed, other case":   {resign(`{"Say":"x"}`), fault.Invalid, "upper and lower case"},
		"signed, not utf-8":    {resign("{\"say\":\"\xff\"}"), fault.Invalid, "UTF-8"},
		"signed, deep":         {resign(strings.Repeat("[", 100)), fault.Invalid, "deeper"},
	} {
		t.Run(name, func(t *testing.T) {
			v, keys, err := seal.Open[note](tc.sealed, []seal.Key{keyOf(t, k)})
			if fault.Of(err) != tc.kind || !strings.Contains(fault.Text(err), tc.text) {
				t.Errorf("Open: %v; want %q with %q", err, tc.kind, tc.text)
			}
			if v.Say != "" || keys != nil {
				t.Errorf("a refused document came out: %+v %v", v, keys)
			}
		})
	}
	if _, _, err := seal.Open[other](good, []seal.Key{keyOf(t, k)}); !errors.Is(err, fault.Invalid) {
		t.Errorf("a note opened as another document: %v", err)
	}
}

// TestTypeIsSigned moves a signature to another document type with the same fields.
func TestTypeIsSigned(t *testing.T) {
	k := edKey(1)
	moved := edit(t, must(t, note{Say: "x"}, k), func(e *dsse.Envelope) { e.PayloadType = other{}.PayloadType() })
	if _, _, err := seal.Open[other](moved, []seal.Key{keyOf(t, k)}); !errors.Is(err, fault.Denied) {
		t.Errorf("Open = %v, want denied", err)
	}
}

// TestIdentity: whoever changes the envelope around a document can't make it a second document.
func TestIdentity(t *testing.T) {
	k := ecKey(t)
	sealed := must(t, note{Say: "x"}, k)
	twin := edit(t, sealed, func(e *dsse.Envelope) {
		raw, _ := base64.StdEncoding.DecodeString(e.Signatures[0].Sig)
		var rs struct{ R, S *big.Int }
		if _, err := asn1.Unmarshal(raw, &rs); err != nil {
			t.Fatal(err)
		}
		rs.S.Sub(elliptic.P256().Params().N, rs.S)
		raw, _ = asn1.Marshal(rs)
		e.Signatures[0].Sig = base64.StdEncoding.EncodeToString(raw)
	})
	if _, _, err := seal.Open[note](twin, []seal.Key{keyOf(t, k)}); err != nil {
		t.Fatalf("the twin signature does not verify: the test shows nothing: %v", err)
	}
	if bytes.Equal(sealed, twin) {
		t.Fatal("the twin has the same bytes: the test shows nothing")
	}
	a, err := seal.Identity(sealed)
	if err != nil {
		t.Fatal(err)
	}
	if b, err := seal.Identity(twin); err != nil || a != b {
		t.Errorf("Identity = %s and %s (%v), want the same", a, b, err)
	}
	if c, _ := seal.Identity(must(t, note{Say: "y"}, k)); c == a {
		t.Error("two documents have one identity")
	}
}

func TestSealRefuses(t *testing.T) {
	a := edKey(1)
	weak, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	for name, by := range map[string][]crypto.Signer{"nobody": nil, "nil": {nil}, "twice": {a, a}, "rsa": {weak}, "p384": {p384}} {
		if _, err := seal.Seal(note{}, by...); !errors.Is(err, fault.Invalid) {
			t.Errorf("%s: Seal = %v, want invalid", name, err)
		}
	}
	if _, err := seal.Seal(note{Say: strings.Repeat("x", seal.MaxSealed)}, a); !errors.Is(err, fault.Invalid) {
		t.Errorf("too long: Seal = %v, want invalid", err)
	}
	if _, err := seal.Seal(&note{}, a); !errors.Is(err, fault.Internal) {
		t.Errorf("pointer: Seal = %v, want internal", err)
	}
}

func FuzzOpen(f *testing.F) {
	k := edKey(1)
	trusted := []seal.Key{keyOf(f, k)}
	good := must(f, note{Say: "x", Tags: map[string]string{"a": "b"}}, k)
	f.Add(good)
	f.Add([]byte(`{"payloadType":"","payload":"","signatures":[]}`))
	want, _ := seal.Identity(good)
	f.Fuzz(func(t *testing.T, b []byte) {
		if _, keys, err := seal.Open[note](b, trusted); err == nil {
			if got, _ := seal.Identity(b); len(keys) != 1 || got != want {
				t.Fatalf("a document that the key never signed was opened: %q", b)
			}
		}
		if v, err := seal.Peek[note](b); err == nil {
			if _, err := json.Marshal(v); err != nil {
				t.Fatal(err)
			}
		}
	})
}
