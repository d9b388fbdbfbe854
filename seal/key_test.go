// SPDX-License-Identifier: Apache-2.0

package seal_test

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"reflect"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/seal"
)

func TestKeyPEM(t *testing.T) {
	for _, s := range []crypto.Signer{edKey(1), ecKey(t)} {
		k := keyOf(t, s)
		got, err := seal.ParseKey(k.PEM())
		if err != nil || got.ID != k.ID {
			t.Errorf("ParseKey(PEM) = %v, %v; want %v", got.ID, err, k.ID)
		}
		if !strings.HasPrefix(string(k.ID), "SHA256:") || len(k.ID) != 7+43 {
			t.Errorf("key id %q", k.ID)
		}
	}
	if (seal.Key{}).PEM() != nil {
		t.Error("the zero key has a PEM form")
	}
	if _, err := seal.KeyOf(&ecdsa.PublicKey{}); !errors.Is(err, fault.Invalid) {
		t.Errorf("KeyOf(zero ecdsa) = %v", err)
	}
}

func pemOf(t testing.TB, typ string, key any) []byte {
	t.Helper()
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: typ, Bytes: der})
}

func TestParseKeyRefuses(t *testing.T) {
	good := keyOf(t, edKey(1)).PEM()
	r, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	der, _ := x509.MarshalPKIXPublicKey(&r.PublicKey)
	for name, b := range map[string][]byte{
		"empty": nil, "text": []byte("hello"), "two": append(bytes.Clone(good), good...), "before": append([]byte("x\n"), good...),
		"after": append(bytes.Clone(good), 'x'), "private": pemOf(t, "PRIVATE KEY", edKey(1)), "long": bytes.Repeat([]byte("\n"), 5000),
		"rsa":     pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}),
		"garbage": pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: []byte("x")}),
		"headers": pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Headers: map[string]string{"a": "b"}, Bytes: der}),
	} {
		if _, err := seal.ParseKey(b); !errors.Is(err, fault.Invalid) {
			t.Errorf("%s: ParseKey = %v, want invalid", name, err)
		}
	}
}

const quick = 4 // a work factor for tests

func TestKeyFile(t *testing.T) {
	pass := []byte("correct horse")
	for _, s := range []crypto.Signer{edKey(1), ecKey(t)} {
		file, err := seal.EncryptKeyAt(s, pass, quick)
		if err != nil {
			t.Fatal(err)
		}
		if seal.LooksReadable(file) {
			t.Error("an encrypted key looks readable")
		}
		got, err := seal.DecryptKey(file, pass)
		if err != nil || keyOf(t, got).ID != keyOf(t, s).ID {
			t.Fatalf("DecryptKey = %v", err)
		}
		if _, err := seal.DecryptKey(file, []byte("wrong")); !errors.Is(err, fault.Denied) {
			t.Errorf("wrong passphrase: %v, want denied", err)
		}
		bad := bytes.Clone(file)
		bad[len(bad)/2] ^= 1
		if _, err := seal.DecryptKey(bad, pass); err == nil {
			t.Error("a damaged file is opened")
		}
		if _, err := seal.DecryptKey(pemOf(t, "PRIVATE KEY", s), pass); !errors.Is(err, fault.Invalid) {
			t.Errorf("a readable key: %v, want invalid", err)
		}
	}
	for name, err := range map[string]error{
		"no passphrase": second(seal.EncryptKeyAt(edKey(1), nil, quick)),
		"work factor":   second(seal.EncryptKeyAt(edKey(1), pass, 31)),
		"nil key":       second(seal.EncryptKeyAt(nil, pass, quick)),
		"device":        second(seal.EncryptKeyAt(opaque{edKey(1)}, pass, quick)),
	} {
		if !errors.Is(err, fault.Invalid) {
			t.Errorf("%s: %v, want invalid", name, err)
		}
	}
}

func second[T any](_ T, err error) error { return err }

// TestKeyFileBoundsWork: a file can't make its reader work for minutes.
func TestKeyFileBoundsWork(t *testing.T) {
	file := "age-encryption.org/v1\n-> scrypt rF0/NwblUHHTpgQgRpe5CQ 30\ngUjEymFKMVXQEKdMMHL24oYexjE3TIC0O0zGSqJ2aUY\n--- " +
		"IOXAh1fYkS0AfxRCYuFyqwbPqNXCGWuJ3JcXRoNvPe4\n"
	armored := "-----BEGIN AGE ENCRYPTED FILE-----\n" + wrap64(file) + "-----END AGE ENCRYPTED FILE-----\n"
	if _, err := seal.DecryptKey([]byte(armored), []byte("x")); !errors.Is(err, fault.Invalid) {
		t.Errorf("DecryptKey = %v, want invalid", err)
	}
}

func wrap64(s string) string {
	b := pem.EncodeToMemory(&pem.Block{Type: "X", Bytes: []byte(s)})
	lines := strings.Split(strings.TrimSpace(string(b)), "\n")
	return strings.Join(lines[1:len(lines)-1], "\n") + "\n"
}

func TestLooksReadable(t *testing.T) {
	open, err := ssh.MarshalPrivateKey(edKey(1), "")
	if err != nil {
		t.Fatal(err)
	}
	locked, err := ssh.MarshalPrivateKeyWithPassphrase(edKey(1), "", []byte("x"))
	if err != nil {
		t.Fatal(err)
	}
	p8 := pemOf(t, "PRIVATE KEY", edKey(1))
	der, _ := x509.MarshalPKCS8PrivateKey(edKey(1))
	ecder, _ := x509.MarshalECPrivateKey(ecKey(t))
	enc := pem.EncodeToMemory(&pem.Block{Type: "ENCRYPTED PRIVATE KEY", Bytes: []byte("x")})
	for name, tc := range map[string]struct {
		file []byte
		want bool
	}{
		"nothing":          {nil, false},
		"public":           {keyOf(t, edKey(1)).PEM(), false},
		"pkcs8":            {p8, true},
		"pkcs8 der":        {der, true},
		"ec der":           {ecder, true},
		"ec":               {pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: ecder}), true},
		"indented":         {bytes.ReplaceAll(append([]byte("  "), p8...), []byte("\n"), []byte("\n  ")), true},
		"cut off":          {p8[:40], true},
		"openssh":          {pem.EncodeToMemory(open), true},
		"openssh locked":   {pem.EncodeToMemory(locked), false},
		"encrypted":        {enc, false},
		"encrypted + open": {append(bytes.Clone(enc), p8...), true},
		"legacy encrypted": {
			pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Headers: map[string]string{"Proc-Type": "4,ENCRYPTED"}, Bytes: []byte("x")}),
			false},
		"jwk":        {[]byte(`{"kty":"OKP","d":"x"}`), true},
		"public jwk": {[]byte(`{"kty":"OKP","x":"x"}`), false},
	} {
		if got := seal.LooksReadable(tc.file); got != tc.want {
			t.Errorf("%s: LooksReadable = %v, want %v", name, got, tc.want)
		}
	}
}

func TestStrictJSON(t *testing.T) {
	type inner struct {
		N int `json:"n"`
	}
	type doc struct {
		A  string           `json:"a"`
		In []inner          `json:"in"`
		M  map[string]inner `json:"m"`
	}
	for in, want := range map[string]string{
		`{"a":"x","in":[{"n":1},{"n":2}],"m":{"p":{"n":1},"q":{"n":1}}}`: "",
		` {} ` + "\n":                    "",
		``:                               "line 1, column 1: not JSON",
		`{`:                              "not JSON",
		`{"a":"x"} {}`:                   "data after the end",
		`{"a":"x"}]`:                     "line 1",
		"{\n  \"b\": 1}":                 "unknown field",
		`{"a":"x","a":"y"}`:              "line 1, column 13: the key \"a\" is given twice",
		`{"m":{"p":{"n":1},"p":{}}}`:     "given twice",
		`{"in":[{"n":1,"n":2}]}`:         "given twice",
		`{"a":"x","\u0061":"y"}`:         "given twice",
		`{"in":[{"n":"x"}]}`:             `field "in.n" can't hold a JSON string`,
		strings.Repeat(`{"m":`, 80):      "deeper",
		"{\"a\":\"\xc3\x28\"}":           "UTF-8",
		`{"a":tru}`:                      "line 1",
		`[1,2`:                           "line 1",
		`{"a" "b"}`:                      "line 1",
		`{"in":[],"in":[]}`:              "given twice",
		`{"in":[[]],"m":{}, "m":{}}`:     "given twice",
		`{"a":"x","in":null,"m":null}`:   "",
		`{"A":"x"}`:                      "upper and lower case", // FAULTS.md C7: doubled keys in any case
		`{"a":"x","A":"y"}`:              "upper and lower case",
		`{"A":"x","a":"y"}`:              "upper and lower case",
		`{"in":[{"n":1,"N":2}]}`:         "upper and lower case",
		`{"m":{"p":{"n":1},"P":{}}}`:     "", // keys of a map are the writer's own
		`{"m":{"p":{"N":1}}}`:            "upper and lower case",
		`{"a":"x","in":[],"m":{}, "z":0`: "line 1",
	} {
		var d doc
		err := seal.StrictJSON([]byte(in), &d)
		if (want == "") != (err == nil) || !strings.Contains(fault.Text(err), want) {
			t.Errorf("StrictJSON(%.40q) = %v, want %q", in, err, want)
		}
		if err != nil && !errors.Is(err, fault.Invalid) {
			t.Errorf("StrictJSON(%.40q) is %q, want invalid", in, fault.Of(err))
		}
	}
}

// digest reads itself, and says in a fault of its own what is wrong.
type digest string

func (d *digest) UnmarshalJSON(b []byte) error {
	if !bytes.HasPrefix(b, []byte(`"sha256:`)) {
		return fault.New("digest", fault.Invalid, "a digest begins with sha256:")
	}
	*d = digest(bytes.Trim(b, `"`))
	return nil
}

// shaped has a field of each sort that documents have.
type shaped struct {
	A  string            `json:"a"`
	N  int64             `json:"n,omitempty"`
	F  float64           `json:"f,omitempty"`
	B  []byte            `json:"b,omitempty"`
	T  time.Time         `json:"t"`
	P  *shaped           `json:"p,omitempty"`
	L  []shaped          `json:"l,omitempty"`
	M  map[string]string `json:"m,omitempty"`
	R  json.RawMessage   `json:"r,omitempty"`
	D  digest            `json:"d,omitempty"`
	OK bool
}

// same reads a document as StrictJSON does and in the two slow passes: both accept it or none does, and with the same value.
func same(t *testing.T, b []byte, fast, slow any) {
	t.Helper()
	err, want := seal.StrictJSON(b, fast), seal.Placed(b, slow)
	if (err == nil) != (want == nil) || err != nil && fault.Text(err) != fault.Text(want) {
		t.Fatalf("%q: in one pass %v, in two %v", b, err, want)
	}
	if err == nil && !reflect.DeepEqual(fast, slow) {
		t.Fatalf("%q: in one pass %+v, in two %+v", b, fast, slow)
	}
	if err != nil && !errors.Is(err, fault.Invalid) {
		t.Fatalf("kind %q", fault.Of(err))
	}
}

func FuzzStrictJSON(f *testing.F) {
	for _, s := range []string{
		`{"a":"x","n":1,"f":1e3,"b":"AQI=","t":"2026-01-02T15:04:05Z","p":{"a":"y"},` +
			`"l":[{"a":null},{}],"m":{"k":"v"},"r":{"x": [1]},"d":"sha256:00","ok":true,"OK":false}`,
		`{"A":"x"}`, `{"A":"x","a":"y"}`, `{"n":1.0}`, `{"n":9223372036854775808}`, `{"b":"A"}`, `{"b":[1,2]}`,
		`{"b":null,"m":null,"r":null,"p":null}`, `{"t":"x"}`, `{"p":{"p":{"p":1}}}`,
		`{"a":"\ud800"}`, `{"l":{}}`, `{"m":{"a":"1","a":"2"}}`, `{"f":1e999}`, `null`, `{"r":{"a":1,"a":2}}`,
		`{"a":[1,{"b":null}],"c":{"d":"e"}}`, `{"a":1,"a":2}`, `[]`, `"x" y`, `{"a":{"a":{}},"b":[[]]}`} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		same(t, b, new(any), new(any))
		same(t, b, new(shaped), new(shaped))
		same(t, b, &shaped{A: "was", P: &shaped{N: 7}}, &shaped{A: "was", P: &shaped{N: 7}})
	})
}

func FuzzParseKey(f *testing.F) {
	f.Add(keyOf(f, edKey(1)).PEM())
	f.Add(pemOf(f, "PRIVATE KEY", ed25519.PrivateKey(edKey(1))))
	f.Fuzz(func(t *testing.T, b []byte) {
		k, err := seal.ParseKey(b)
		if err != nil {
			return
		}
		if again, err := seal.ParseKey(k.PEM()); err != nil || again.ID != k.ID {
			t.Fatalf("%v: %v", again.ID, err)
		}
		seal.LooksReadable(b)
	})
}
