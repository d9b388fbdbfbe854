// SPDX-License-Identifier: Apache-2.0

package identity_test

import (
	"bytes"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/identity"
	"github.com/demarc-dev/demarc/identity/identitytest"
)

// devIssuer is a development key, with what signs any claims under any type with it.
func devIssuer(t *testing.T) (k identity.DevKey, e identity.Expect, mint func(typ string, claims map[string]any) string) {
	t.Helper()
	k, err := identity.NewDevKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	jwks, err := k.JWKS()
	if err != nil {
		t.Fatal(err)
	}
	private, err := k.PEM()
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(private)
	key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	keys, err := identity.ParseKeys(jwks)
	if err != nil {
		t.Fatal(err)
	}
	names, err := keys.Names()
	if err != nil {
		t.Fatal(err)
	}
	mint = func(typ string, claims map[string]any) string {
		t.Helper()
		o := &jose.SignerOptions{}
		if typ != "" {
			o = o.WithType(jose.ContentType(typ))
		}
		s, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: key, KeyID: names[0].ID}}, o)
		if err != nil {
			t.Fatal(err)
		}
		token, err := jwt.Signed(s).Claims(claims).Serialize()
		if err != nil {
			t.Fatal(err)
		}
		return token
	}
	return k, identity.Expect{Kind: identity.KindDev, JWKS: jwks, Subject: "laptop"}, mint
}

func devClaims(aud string) map[string]any {
	return map[string]any{"iss": identity.DevIssuer, "sub": "laptop", "aud": []string{aud}, "iat": now.Unix(), "nbf": now.Unix(),
		"exp": now.Add(5 * time.Minute).Unix()}
}

// FAULTS.md G2: the identity of a laptop, verified as strictly as that of a cluster.
func TestDevProof(t *testing.T) {
	k, e, mint := devIssuer(t)
	csr := newCSR(t)
	aud := audience(t, td, "n1.x", csr)
	token, err := k.Token("laptop", aud, now)
	if err != nil {
		t.Fatal(err)
	}
	p, err := e.Verify(token, aud, now)
	if err != nil || p != (identity.Proven{Kind: "dev", Issuer: identity.DevIssuer, Subject: "laptop",
		Expires: now.Add(5 * time.Minute)}) {
		t.Fatalf("%+v, %v", p, err)
	}
	private, err := k.PEM()
	if err != nil {
		t.Fatal(err)
	}
	again, err := identity.ParseDevKey(private)
	if err != nil {
		t.Fatal(err)
	}
	if token, err = again.Token("laptop", aud, now); err != nil {
		t.Fatal(err)
	}
	if _, err := e.Verify(token, aud, now); err != nil {
		t.Errorf("the key that was read again: %v", err)
	}
	_, foreign, _ := devIssuer(t)
	if _, err := foreign.Verify(token, aud, now); fault.Of(err) != fault.Denied || !strings.Contains(fault.Text(err),
		"which is not pinned") {
		t.Errorf("another issuer's key is registered: %v", err)
	}
	if _, err := e.Verify(token, "", now); fault.Of(err) != fault.Internal {
		t.Errorf("an empty audience: %v", err)
	}
	for name, tc := range map[string]struct {
		change map[string]any // nil deletes
		kind   fault.Kind
		want   string
	}{
		"another issuer": {map[string]any{"iss": "https://kubernetes.default.svc"}, fault.Denied, "was issued by"},
		"no issuer":      {map[string]any{"iss": nil}, fault.Denied, "was issued by"},
		"no audience":    {map[string]any{"aud": nil}, fault.Denied, "its audience must be"},
		"two audiences":  {map[string]any{"aud": []string{aud, "x"}}, fault.Denied, "its audience must be"},
		"another key": {map[string]any{"aud": []string{audience(t, td, "n1.x", newCSR(t))}}, fault.Denied,
			"its audience must be"},
		"another nonce": {map[string]any{"aud": []string{audience(t, td, "n1.y", csr)}}, fault.Denied, "its audience must be"},
		"another vendor": {map[string]any{"aud": []string{audience(t, "evil.example", "n1.x", csr)}}, fault.Denied,
			"its audience must be"},
		"another name": {map[string]any{"sub": "desktop"}, fault.Denied, "is registered"},
		"upper case":   {map[string]any{"sub": "Laptop"}, fault.Denied, "is registered"},
		"no name":      {map[string]any{"sub": nil}, fault.Denied, "is registered"},
		"no expiry":    {map[string]any{"exp": nil}, fault.Denied, "never expires"},
		"expired": {map[string]any{"iat": now.Add(-7 * time.Minute).Unix(), "exp": now.Add(-2 * time.Minute).Unix()},
			fault.Expired, "ran out"},
		"not yet valid":        {map[string]any{"nbf": now.Add(3 * time.Minute).Unix()}, fault.Expired, "not valid yet"},
		"issued in the future": {map[string]any{"iat": now.Add(3 * time.Minute).Unix()}, fault.Expired, "not valid yet"},
		"of no time":           {map[string]any{"iat": nil}, fault.Denied, "lives for more than"},
		"for a year":           {map[string]any{"exp": now.Add(365 * 24 * time.Hour).Unix()}, fault.Denied, "lives for more than"},
		"a second too long":    {map[string]any{"exp": now.Add(5*time.Minute + time.Second).Unix()}, fault.Denied, "lives for more than"},
		"audience of a type":   {map[string]any{"aud": 7}, fault.Denied, "claims do not parse"},
		"the good one":         {nil, "", ""},
	} {
		c := devClaims(aud)
		for k, v := range tc.change {
			if c[k] = v; v == nil {
				delete(c, k)
			}
		}
		p, err := e.Verify(mint(identity.DevTokenType, c), aud, now)
		if fault.Of(err) != tc.kind || (err != nil && !strings.Contains(fault.Text(err), tc.want)) {
			t.Errorf("%s: %v, want %q %q", name, err, tc.kind, tc.want)
		}
		if err != nil && p != (identity.Proven{}) {
			t.Errorf("%s: a refused token proves %+v", name, p)
		}
	}
	for _, typ := range []string{"", "JWT", "Demarc-dev+jwt", "application/demarc-dev+jwt"} {
		if _, err := e.Verify(mint(typ, devClaims(aud)), aud, now); fault.Of(err) != fault.Denied || !strings.Contains(fault.Text(err),
			"is of the type") {
			t.Errorf("type %q: %v", typ, err)
		}
	}
}

// FAULTS.md G2: neither kind of token is good for the other, even if the same key is registered for both.
func TestDevIsNoKubernetes(t *testing.T) {
	_, dev, mint := devIssuer(t)
	cluster := newIssuer(t)
	aud := audience(t, td, "n1.x", newCSR(t))

	asCluster := cluster.Expect("demarc", "appliance")
	asCluster.JWKS = dev.JWKS // a vendor's slip
	claims := cluster.Claims("demarc", "appliance", aud, now)
	if _, err := asCluster.Verify(mint(identity.DevTokenType, claims), aud, now); fault.Of(err) != fault.Denied ||
		!strings.Contains(fault.Text(err), "development token") {
		t.Errorf("a development token with a cluster's claims: %v", err)
	}
	if _, err := asCluster.Verify(mint("", claims), aud, now); err != nil {
		t.Errorf("without that type it is a cluster's, and the test above shows nothing: %v", err)
	}
	asCluster.Issuer = identity.DevIssuer
	if err := asCluster.Check(); fault.Of(err) != fault.Invalid || !strings.Contains(fault.Text(err), "development") {
		t.Errorf("a cluster is registered under the issuer of development: %v", err)
	}

	asDev := dev
	asDev.JWKS = cluster.JWKS()
	for name, claims := range map[string]map[string]any{"its own claims": cluster.Claims("demarc", "appliance", aud, now),
		"those of development": devClaims(aud)} {
		for _, key := range []string{identitytest.RSA, identitytest.EC} {
			token, err := cluster.Mint(key, claims)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := asDev.Verify(token, aud, now); fault.Of(err) != fault.Denied || !strings.Contains(fault.Text(err),
				"is of the type") {
				t.Errorf("a cluster's token with %s: %v", name, err)
			}
		}
	}
}

func TestDevRegistrationIsChecked(t *testing.T) {
	_, good, _ := devIssuer(t)
	if err := good.Check(); err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*identity.Expect){
		"no name":      func(e *identity.Expect) { e.Subject = "" },
		"a name":       func(e *identity.Expect) { e.Subject = "system:serviceaccount:demarc:appliance" },
		"no keys":      func(e *identity.Expect) { e.JWKS = nil },
		"no JSON":      func(e *identity.Expect) { e.JWKS = json.RawMessage("x") },
		"issuer":       func(e *identity.Expect) { e.Issuer = identity.DevIssuer },
		"discovery":    func(e *identity.Expect) { e.Discovery = true },
		"namespace":    func(e *identity.Expect) { e.Namespace = "demarc" },
		"account":      func(e *identity.Expect) { e.ServiceAccount = "appliance" },
		"another kind": func(e *identity.Expect) { e.Kind = identity.KindGCP },
	} {
		e := good
		if change(&e); fault.Of(e.Check()) != fault.Invalid {
			t.Errorf("%s: %v, want invalid", name, e.Check())
		}
	}
	i := newIssuer(t)
	e := i.Expect("demarc", "appliance")
	if e.Subject = "laptop"; fault.Of(e.Check()) != fault.Invalid {
		t.Errorf("a subject of a cluster: %v", e.Check())
	}
	k, err := identity.NewDevKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	private, err := k.PEM()
	if err != nil {
		t.Fatal(err)
	}
	for name, b := range map[string][]byte{"nothing": nil, "two": append(private, private...),
		"a key of another kind": bytes.ReplaceAll(private, []byte("DEMARC DEVELOPMENT "), nil)} {
		if _, err := identity.ParseDevKey(b); fault.Of(err) != fault.Invalid {
			t.Errorf("%s: %v, want invalid", name, err)
		}
	}
	for _, name := range []string{"", "A", "a b"} {
		if _, err := k.Token(name, "x", now); fault.Of(err) != fault.Invalid {
			t.Errorf("a token for %q: %v", name, err)
		}
	}
	if _, err := k.Token("laptop", "", now); fault.Of(err) != fault.Invalid {
		t.Errorf("a token for no audience: %v", err)
	}
}
