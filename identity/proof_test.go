// SPDX-License-Identifier: Apache-2.0

package identity_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/hmac"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/json"
	"maps"
	"math/big"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/identity"
	"github.com/demarc-dev/demarc/identity/identitytest"
)

var issuer = sync.OnceValues(func() (*identitytest.Issuer, error) {
	return identitytest.NewIssuer("https://kubernetes.default.svc.cluster.local")
})

func newIssuer(t testing.TB) *identitytest.Issuer {
	t.Helper()
	i, err := issuer()
	if err != nil {
		t.Fatal(err)
	}
	return i
}

func newCSR(t testing.TB) []byte {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := identity.NewCSR(key, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

func audience(t testing.TB, domain, nonce string, csr []byte) string {
	t.Helper()
	a, err := identity.Audience(domain, nonce, csr)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

var nonceKey = []byte("0123456789abcdef0123456789abcdef")

func TestKubernetesProof(t *testing.T) {
	i := newIssuer(t)
	csr := newCSR(t)
	nonce, err := identity.NewNonce(nonceKey, now, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	aud := audience(t, td, nonce, csr)
	e := i.Expect("demarc", "appliance")
	for _, key := range []string{identitytest.RSA, identitytest.EC} {
		token, err := i.Mint(key, i.Claims("demarc", "appliance", aud, now))
		if err != nil {
			t.Fatal(err)
		}
		p, err := e.Verify(token, aud, now)
		if err != nil || p.Subject != "system:serviceaccount:demarc:appliance" || p.Issuer != i.URL || p.Pod != "appliance-0" || p.UID == "" ||
			!p.Expires.Equal(now.Add(10*time.Minute)) {
			t.Fatalf("%s: %+v, %v", key, p, err)
		}
	}
	for name, tc := range map[string]struct {
		change map[string]any // nil deletes
		kind   fault.Kind
		want   string
	}{
		"wrong issuer":        {map[string]any{"iss": "https://evil.example"}, fault.Denied, "was issued by"},
		"issuer with a slash": {map[string]any{"iss": i.URL + "/"}, fault.Denied, "was issued by"},
		"no issuer":           {map[string]any{"iss": nil}, fault.Denied, "was issued by"},
		"no audience":         {map[string]any{"aud": nil}, fault.Denied, "its audience must be"},
		"empty audience":      {map[string]any{"aud": []string{}}, fault.Denied, "its audience must be"},
		"the API's audience":  {map[string]any{"aud": []string{i.URL}}, fault.Denied, "its audience must be"},
		"two audiences":       {map[string]any{"aud": []string{aud, i.URL}}, fault.Denied, "its audience must be"},
		"another key":         {map[string]any{"aud": []string{audience(t, td, nonce, newCSR(t))}}, fault.Denied, "its audience must be"},
		"another nonce":       {map[string]any{"aud": []string{audience(t, td, nonce+"x", csr)}}, fault.Denied, "its audience must be"},
		"another vendor": {map[string]any{"aud": []string{audience(t, "evil.example", nonce, csr)}}, fault.Denied,
			"its audience must be"},
		"a prefix of it":       {map[string]any{"aud": []string{aud[:len(aud)-1]}}, fault.Denied, "its audience must be"},
		"another account":      {map[string]any{"sub": "system:serviceaccount:demarc:default"}, fault.Denied, "is registered"},
		"another namespace":    {map[string]any{"sub": "system:serviceaccount:other:appliance"}, fault.Denied, "is registered"},
		"a user":               {map[string]any{"sub": "demarc:appliance"}, fault.Denied, "is registered"},
		"no subject":           {map[string]any{"sub": nil}, fault.Denied, "is registered"},
		"upper case":           {map[string]any{"sub": "system:serviceaccount:demarc:Appliance"}, fault.Denied, "is registered"},
		"contradiction":        {map[string]any{"kubernetes.io": map[string]any{"namespace": "other"}}, fault.Denied, "contradicts itself"},
		"no expiry":            {map[string]any{"exp": nil}, fault.Denied, "never expires"},
		"expired":              {map[string]any{"exp": now.Add(-2*time.Minute - time.Second).Unix()}, fault.Expired, "ran out"},
		"expired, at the skew": {map[string]any{"exp": now.Add(-2 * time.Minute).Unix()}, fault.Expired, "ran out"},
		"not yet valid":        {map[string]any{"nbf": now.Add(3 * time.Minute).Unix()}, fault.Expired, "not valid yet"},
		"issued in the future": {map[string]any{"iat": now.Add(3 * time.Minute).Unix()}, fault.Expired, "not valid yet"},
		"audience of a type":   {map[string]any{"aud": 7}, fault.Denied, "claims do not parse"},
		"a uid of 1 KiB": {map[string]any{
			"kubernetes.io": map[string]any{"serviceaccount": map[string]any{"uid": strings.Repeat("u", 1<<10)}}}, fault.Denied, "more than"},
		"expiry of a type":       {map[string]any{"exp": "tomorrow"}, fault.Denied, "claims do not parse"},
		"within skew, slow":      {map[string]any{"nbf": now.Add(time.Minute).Unix(), "iat": now.Add(time.Minute).Unix()}, "", ""},
		"within skew, fast":      {map[string]any{"exp": now.Add(-time.Minute).Unix()}, "", ""},
		"audience as one string": {map[string]any{"aud": aud}, "", ""},
	} {
		t.Run(name, func(t *testing.T) {
			c := maps.Clone(i.Claims("demarc", "appliance", aud, now))
			for k, v := range tc.change {
				if c[k] = v; v == nil {
					delete(c, k)
				}
			}
			token, err := i.Mint(identitytest.RSA, c)
			if err != nil {
				t.Fatal(err)
			}
			p, err := e.Verify(token, aud, now)
			if fault.Of(err) != tc.kind || (err != nil && !strings.Contains(fault.Text(err), tc.want)) {
				t.Errorf("%v, want %q %q", err, tc.kind, tc.want)
			}
			if err != nil && p != (identity.Proven{}) {
				t.Errorf("a refused token proves %+v", p)
			}
		})
	}
	token, err := i.Token("demarc", "appliance", aud, now)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := e.Verify(token, "", now); fault.Of(err) != fault.Internal {
		t.Errorf("an empty audience: %v", err)
	}
}

// TestKubernetesForgery alters tokens below the level of claims.
func TestKubernetesForgery(t *testing.T) {
	i := newIssuer(t)
	other, err := identitytest.NewIssuer(i.URL)
	if err != nil {
		t.Fatal(err)
	}
	aud := audience(t, td, "n1.x", newCSR(t))
	e := i.Expect("demarc", "appliance")
	good, err := i.Token("demarc", "appliance", aud, now)
	if err != nil {
		t.Fatal(err)
	}
	b64 := base64.RawURLEncoding.EncodeToString
	parts := strings.Split(good, ".")
	head := func(h string) string { return b64([]byte(h)) + "." + parts[1] }
	var set struct{ Keys []json.RawMessage }
	if err := json.Unmarshal(i.JWKS(), &set); err != nil {
		t.Fatal(err)
	}
	// Algorithm confusion: an HMAC whose key is the pinned public key, in each form that a library might take it.
	hs := func(key []byte) string {
		in := head(`{"alg":"HS256","kid":"rsa-1","typ":"JWT"}`)
		m := hmac.New(sha256.New, key)
		m.Write([]byte(in))
		return in + "." + b64(m.Sum(nil))
	}
	var rsaJWK jose.JSONWebKey
	if err := rsaJWK.UnmarshalJSON(set.Keys[0]); err != nil {
		t.Fatal(err)
	}
	spki, err := x509.MarshalPKIXPublicKey(rsaJWK.Key)
	if err != nil {
		t.Fatal(err)
	}
	foreign, err := other.Token("demarc", "appliance", aud, now)
	if err != nil {
		t.Fatal(err)
	}
	// A token signed by the attacker's key, which its own header brings along.
	mine, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.RS256, Key: jose.JSONWebKey{Key: mine, KeyID: identitytest.RSA}},
		(&jose.SignerOptions{EmbedJWK: true}).WithHeader("kid", identitytest.RSA))
	if err != nil {
		t.Fatal(err)
	}
	embedded, err := jwt.Signed(signer).Claims(i.Claims("demarc", "appliance", aud, now)).Serialize()
	if err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		token string
		kind  fault.Kind
	}{
		"empty":                 {"", fault.Invalid},
		"noise":                 {"a.b.c", fault.Invalid},
		"alg none":              {head(`{"alg":"none","kid":"rsa-1"}`) + ".", fault.Invalid},
		"alg None":              {head(`{"alg":"None","kid":"rsa-1"}`) + "." + parts[2], fault.Invalid},
		"no alg":                {head(`{"kid":"rsa-1"}`) + "." + parts[2], fault.Invalid},
		"HS256 over the JWK":    {hs(set.Keys[0]), fault.Invalid},
		"HS256 over the PKIX":   {hs(spki), fault.Invalid},
		"RS512":                 {head(`{"alg":"RS512","kid":"rsa-1"}`) + "." + parts[2], fault.Invalid},
		"ES256 on the RSA key":  {head(`{"alg":"ES256","kid":"rsa-1"}`) + "." + parts[2], fault.Denied},
		"RS256 on the EC key":   {head(`{"alg":"RS256","kid":"ec-1"}`) + "." + parts[2], fault.Denied},
		"no kid":                {head(`{"alg":"RS256"}`) + "." + parts[2], fault.Denied},
		"another kid":           {head(`{"alg":"RS256","kid":"rsa-2"}`) + "." + parts[2], fault.Denied},
		"unknown crit":          {head(`{"alg":"RS256","kid":"rsa-1","crit":["x"],"x":1}`) + "." + parts[2], fault.Denied},
		"no signature":          {parts[0] + "." + parts[1] + ".", fault.Denied},
		"another's signature":   {foreign, fault.Denied},
		"a key of its own":      {embedded, fault.Denied},
		"claims altered":        {parts[0] + "." + b64([]byte(`{"iss":"x"}`)) + "." + parts[2], fault.Denied},
		"four parts":            {good + ".x", fault.Invalid},
		"oversize":              {good + strings.Repeat("A", identity.MaxToken), fault.Invalid},
		"JSON serialisation":    {`{"payload":"` + parts[1] + `","protected":"` + parts[0] + `","signature":"` + parts[2] + `"}`, fault.Invalid},
		"the good one unharmed": {good, ""},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := e.Verify(tc.token, aud, now)
			if fault.Of(err) != tc.kind {
				t.Errorf("%v, want %q", err, tc.kind)
			}
			if strings.HasSuffix(name, " kid") && !strings.Contains(fault.Text(err), "which is not pinned") {
				t.Errorf("%v: a key is looked for by its name alone", err)
			}
			if strings.Contains(name, " on the ") && !strings.Contains(fault.Text(err), "its key is for") {
				t.Errorf("%v: it is the pinned key, not the token, that says the algorithm", err)
			}
		})
	}
}

func TestRegistrationIsChecked(t *testing.T) {
	i := newIssuer(t)
	jwks := func(keys ...jose.JSONWebKey) json.RawMessage {
		b, err := json.Marshal(jose.JSONWebKeySet{Keys: keys})
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	small, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	p256, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	ok := jose.JSONWebKey{Key: &p256.PublicKey, KeyID: "a"}
	modulus := func(bits uint) jose.JSONWebKey { // it is odd, and of exactly so many bits
		n := new(big.Int).Lsh(big.NewInt(1), bits-1)
		return jose.JSONWebKey{Key: &rsa.PublicKey{N: n.SetBit(n, 0, 1), E: 65537}, KeyID: "a"}
	}
	many := make([]jose.JSONWebKey, 17)
	for n := range many {
		many[n] = jose.JSONWebKey{Key: &p256.PublicKey, KeyID: strconv.Itoa(n)}
	}
	for what, set := range map[string]json.RawMessage{"16 keys": jwks(many[:16]...), "2048 bits": jwks(modulus(2048)),
		"4096 bits": jwks(modulus(4096))} {
		e := i.Expect("demarc", "appliance")
		if e.JWKS = set; e.Check() != nil {
			t.Errorf("%s: %v", what, e.Check())
		}
	}
	for name, change := range map[string]func(*identity.Expect){
		"kind":            func(e *identity.Expect) { e.Kind = "aws" },
		"issuer":          func(e *identity.Expect) { e.Issuer = "" },
		"namespace":       func(e *identity.Expect) { e.Namespace = "a:b" },
		"account":         func(e *identity.Expect) { e.ServiceAccount = "a:b" },
		"account dots":    func(e *identity.Expect) { e.ServiceAccount = "a..b" },
		"no keys":         func(e *identity.Expect) { e.JWKS = jwks() },
		"not JSON":        func(e *identity.Expect) { e.JWKS = json.RawMessage("x") },
		"trailing":        func(e *identity.Expect) { e.JWKS = append(i.JWKS(), '{') },
		"private key":     func(e *identity.Expect) { e.JWKS = jwks(jose.JSONWebKey{Key: p256, KeyID: "a"}) },
		"symmetric key":   func(e *identity.Expect) { e.JWKS = jwks(jose.JSONWebKey{Key: nonceKey, KeyID: "a"}) },
		"P-384":           func(e *identity.Expect) { e.JWKS = jwks(jose.JSONWebKey{Key: &small.PublicKey, KeyID: "a"}) },
		"encryption":      func(e *identity.Expect) { k := ok; k.Use = "enc"; e.JWKS = jwks(k) },
		"other algorithm": func(e *identity.Expect) { k := ok; k.Algorithm = "HS256"; e.JWKS = jwks(k) },
		"no kid":          func(e *identity.Expect) { k := ok; k.KeyID = ""; e.JWKS = jwks(k) },
		"kid twice":       func(e *identity.Expect) { e.JWKS = jwks(ok, ok) },
		"too large":       func(e *identity.Expect) { e.JWKS = append(i.JWKS(), strings.Repeat(" ", identity.MaxJWKS)...) },
		"17 keys":         func(e *identity.Expect) { e.JWKS = jwks(many...) },
		"RSA, 2047 bits":  func(e *identity.Expect) { e.JWKS = jwks(modulus(2047)) },
		"RSA, 4097 bits":  func(e *identity.Expect) { e.JWKS = jwks(modulus(4097)) },
	} {
		e := i.Expect("demarc", "appliance")
		if err := e.Check(); err != nil {
			t.Fatal(err)
		}
		if change(&e); fault.Of(e.Check()) != fault.Invalid {
			t.Errorf("%s: %v, want invalid", name, e.Check())
		}
		if _, err := e.Verify("a.b.c", "x", now); err == nil {
			t.Errorf("%s: Verify goes on", name)
		}
	}
}

func TestNonce(t *testing.T) {
	n, err := identity.NewNonce(nonceKey, now, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	until, err := identity.CheckNonce(nonceKey, n, now.Add(identity.NonceLife-time.Second))
	if err != nil || !until.Equal(now.Add(identity.NonceLife)) {
		t.Fatal(until, err)
	}
	if m, err := identity.NewNonce(nonceKey, now, rand.Reader); err != nil || m == n {
		t.Fatalf("two nonces are equal, %v", err)
	}
	other := []byte("another key of 32 bytes or more!")
	flip := []byte(n)
	if flip[10]++; flip[10] == 'Z'+1 || flip[10] == 'z'+1 || flip[10] == '9'+1 || flip[10] == '-'+1 || flip[10] == '_'+1 {
		flip[10] = 'Q' // within the expiry, and another letter still
	}
	for name, tc := range map[string]struct {
		key   []byte
		nonce string
		at    time.Time
		kind  fault.Kind
	}{
		"expired":         {nonceKey, n, now.Add(identity.NonceLife), fault.Expired},
		"another key":     {other, n, now, fault.Denied},
		"another expiry":  {nonceKey, string(flip), now, fault.Denied},
		"empty":           {nonceKey, "", now, fault.Invalid},
		"a line end":      {nonceKey, n[:20] + "\n" + n[20:], now, fault.Invalid},
		"a line end, cut": {nonceKey, n[:20] + "\n" + n[20:len(n)-1], now, fault.Invalid},
		"padded":          {nonceKey, n + "=", now, fault.Invalid},
		"cut":             {nonceKey, n[:len(n)-1], now, fault.Invalid},
		"no version":      {nonceKey, n[3:], now, fault.Invalid},
		"long":            {nonceKey, n + strings.Repeat("A", 1<<16), now, fault.Invalid},
		"short key":       {nonceKey[:31], n, now, fault.Internal},
	} {
		if _, err := identity.CheckNonce(tc.key, tc.nonce, tc.at); fault.Of(err) != tc.kind {
			t.Errorf("%s: %v, want %q", name, err, tc.kind)
		}
	}
	// Every other last letter decodes to other bytes or to none: one nonce, one spelling, so that "used" is exact.
	for _, c := range "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_" {
		if m := n[:len(n)-1] + string(c); m != n {
			if _, err := identity.CheckNonce(nonceKey, m, now); err == nil {
				t.Errorf("%q passes for %q", m, n)
			}
		}
	}
}

func TestAudience(t *testing.T) {
	csr := newCSR(t)
	a := audience(t, td, "n1.x&key=y", csr)
	if !strings.HasPrefix(a, "demarc://acme.example/enrol?nonce=n1.x%26key%3Dy&key=") ||
		len(a) != len("demarc://acme.example/enrol?nonce=n1.x%26key%3Dy&key=")+43 {
		t.Errorf("audience %q", a)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	large, err := x509.CreateCertificateRequest(rand.Reader,
		&x509.CertificateRequest{Subject: pkix.Name{CommonName: strings.Repeat("n", identity.MaxCSR)}}, key)
	if err != nil {
		t.Fatal(err)
	}
	broken := append([]byte{}, csr...)
	broken[len(broken)-1] ^= 1
	for name, err := range map[string]error{
		"bad signature": second(identity.Audience(td, "n", broken)),
		"no CSR":        second(identity.Audience(td, "n", nil)),
		"no nonce":      second(identity.Audience(td, "", csr)),
		"domain":        second(identity.Audience("acme.example/enrol?", "n", csr)),
		"full ID":       second(identity.Audience("spiffe://acme.example", "n", csr)),
		"oversize":      second(identity.Audience(td, "n", large)),
	} {
		if err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func FuzzVerify(f *testing.F) {
	i := newIssuer(f)
	good, err := i.Token("demarc", "appliance", "aud", now)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add("eyJhbGciOiJub25lIn0.e30.")
	e := i.Expect("demarc", "appliance")
	f.Fuzz(func(t *testing.T, token string) {
		p, err := e.Verify(token, "aud", now)
		if (err == nil) != (p != identity.Proven{}) {
			t.Fatal(p, err)
		}
		if err == nil && !strings.HasPrefix(token, good[:strings.LastIndexByte(good, '.')]) && !strings.Contains(token, "\n") {
			t.Fatalf("a token that was not minted passes: %q", token)
		}
	})
}

func FuzzNonce(f *testing.F) {
	good, err := identity.NewNonce(nonceKey, now, strings.NewReader("sixteen bytes ok")) // the same in each fuzzing process
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add("n1.")
	f.Fuzz(func(t *testing.T, n string) {
		if _, err := identity.CheckNonce(nonceKey, n, now); err == nil && n != good {
			t.Fatalf("%q passes", n)
		}
	})
}
