// SPDX-License-Identifier: Apache-2.0

package login_test

import (
	"crypto/hmac"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/demarc-dev/demarc/daemon/controlplane/login"
	"github.com/demarc-dev/demarc/daemon/controlplane/login/logintest"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/identity/identitytest"
)

const nonce = "the-nonce-of-the-key"

func ok(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func provider(t *testing.T) *logintest.Provider {
	t.Helper()
	before := goleak.IgnoreCurrent()
	t.Cleanup(func() { goleak.VerifyNone(t, before) })
	p, err := logintest.NewProvider("demarc")
	ok(t, err)
	t.Cleanup(p.Close)
	p.Claims = map[string]any{"sub": "42", "email": "Ben.Smith@acme.example", "email_verified": true, "groups": []string{"all", "support"}}
	return p
}

func verifier(t *testing.T, p *logintest.Provider, change func(*login.Options)) *login.Verifier {
	t.Helper()
	o := login.Options{Issuer: p.URL, ClientID: "demarc", Roots: p.Pool, NameClaim: "email", Domains: []string{"acme.example"}, GroupsClaim: "groups",
		Roles: []login.Role{{Group: "support", Rank: fleet.Operate}, {Group: "readers", Rank: fleet.Viewer}, {Group: "platform", Rank: fleet.Admin}}, Now: time.Now}
	if change != nil {
		change(&o)
	}
	v := login.New(o)
	t.Cleanup(v.Close)
	return v
}

func refusedWith(t *testing.T, err error, k fault.Kind, sentence string) {
	t.Helper()
	if fault.Of(err) != k || !strings.Contains(fault.Text(err), sentence) {
		t.Fatalf("%v (%s), want %s: %q", err, fault.Of(err), k, sentence)
	}
}

func TestTokenIsTraded(t *testing.T) {
	p := provider(t)
	v := verifier(t, p, nil)
	for _, key := range []string{identitytest.RSA, identitytest.EC} {
		token, err := p.Mint(key, p.Person(nonce, time.Now()))
		ok(t, err)
		got, err := v.Verify(t.Context(), token, nonce)
		ok(t, err)
		if got.Rank != fleet.Operate || !strings.HasPrefix(got.Name, "ben-smith-") || fleet.CheckName("operator", got.Name) != nil || got.Claim != "Ben.Smith@acme.example" {
			t.Fatalf("%+v", got)
		}
	}
	if n := p.Asked("/keys"); n != 1 {
		t.Errorf("keys were fetched %d times", n)
	}
	other := p.Person(nonce, time.Now()) // another person with the same address
	other["sub"], other["groups"] = "43", "platform"
	token, err := p.Mint(identitytest.RSA, other)
	ok(t, err)
	got, err := v.Verify(t.Context(), token, nonce)
	ok(t, err)
	if first, _ := v.Verify(t.Context(), mint(t, p, nil), nonce); got.Name == first.Name || got.Subject == first.Subject || got.Rank != fleet.Admin {
		t.Fatalf("%+v and %+v", got, first)
	}
	audiences := p.Person(nonce, time.Now())
	audiences["aud"], audiences["azp"] = []string{"demarc", "other"}, "demarc"
	token, err = p.Mint(identitytest.RSA, audiences)
	ok(t, err)
	_, err = v.Verify(t.Context(), token, nonce)
	ok(t, err)
}

func mint(t *testing.T, p *logintest.Provider, change func(map[string]any)) string {
	t.Helper()
	c := p.Person(nonce, time.Now())
	if change != nil {
		change(c)
	}
	token, err := p.Mint(identitytest.RSA, c)
	ok(t, err)
	return token
}

// raw builds a token by hand.
func raw(t *testing.T, head, claims map[string]any, sign func(string) []byte) string {
	t.Helper()
	h, err := json.Marshal(head)
	ok(t, err)
	c, err := json.Marshal(claims)
	ok(t, err)
	s := base64.RawURLEncoding.EncodeToString(h) + "." + base64.RawURLEncoding.EncodeToString(c)
	return s + "." + base64.RawURLEncoding.EncodeToString(sign(s))
}

// TestEnemyToken: what an enemy can show in the place of a good token.
func TestEnemyToken(t *testing.T) {
	p := provider(t)
	v := verifier(t, p, nil)
	foreign, err := identitytest.NewIssuer(p.URL) // the same name, other keys under the same ids
	ok(t, err)
	forged, err := foreign.Mint(identitytest.RSA, p.Person(nonce, time.Now()))
	ok(t, err)
	set := func(k string, val any) func(map[string]any) { return func(c map[string]any) { c[k] = val } }
	drop := func(k string) func(map[string]any) { return func(c map[string]any) { delete(c, k) } }
	hmacWith := func(key []byte) func(string) []byte {
		return func(s string) []byte { m := hmac.New(sha256.New, key); m.Write([]byte(s)); return m.Sum(nil) }
	}
	var jwks struct{ Keys []json.RawMessage }
	ok(t, json.Unmarshal(p.JWKS(), &jwks))
	good := mint(t, p, nil)
	parts := strings.Split(good, ".")
	person := p.Person(nonce, time.Now())
	elder := time.Now().Add(-20 * time.Minute)
	for name, tc := range map[string]struct {
		token string
		kind  fault.Kind
		want  string
	}{
		"another issuer":             {mint(t, p, set("iss", "https://evil.example")), fault.Denied, "not one of the issuer"},
		"the issuer and a slash":     {mint(t, p, set("iss", p.URL+"/")), fault.Denied, "not one of the issuer"},
		"another audience":           {mint(t, p, set("aud", "other")), fault.Denied, "not one of the issuer for this client"},
		"no audience":                {mint(t, p, drop("aud")), fault.Denied, "not one of the issuer for this client"},
		"audiences and no azp":       {mint(t, p, set("aud", []string{"demarc", "other"})), fault.Denied, "another client"},
		"azp of another client":      {mint(t, p, set("azp", "other")), fault.Denied, "another client"},
		"another nonce":              {mint(t, p, set("nonce", "other")), fault.Denied, "nonce"},
		"no nonce":                   {mint(t, p, drop("nonce")), fault.Denied, "nonce"},
		"a nonce that is a list":     {mint(t, p, set("nonce", []string{nonce})), fault.Denied, ""},
		"expired":                    {mint(t, p, set("exp", time.Now().Add(-time.Minute).Unix())), fault.Expired, "ran out"},
		"no expiry":                  {mint(t, p, drop("exp")), fault.Expired, "ran out"},
		"not yet":                    {mint(t, p, set("nbf", time.Now().Add(time.Hour).Unix())), fault.Denied, ""},
		"old":                        {mint(t, p, set("iat", elder.Unix())), fault.Expired, "log in again"},
		"no time of issue":           {mint(t, p, drop("iat")), fault.Expired, "log in again"},
		"of the future":              {mint(t, p, set("iat", time.Now().Add(time.Hour).Unix())), fault.Denied, "in the future"},
		"no subject":                 {mint(t, p, drop("sub")), fault.Denied, "names nobody"},
		"no address":                 {mint(t, p, drop("email")), fault.Denied, `no claim "email"`},
		"address not verified":       {mint(t, p, set("email_verified", false)), fault.Denied, "not verified"},
		"nothing of verification":    {mint(t, p, drop("email_verified")), fault.Denied, "not verified"},
		"verified in words":          {mint(t, p, set("email_verified", "true")), fault.Denied, ""},
		"another domain":             {mint(t, p, set("email", "ben@evil.example")), fault.Denied, "not let in"},
		"a subdomain":                {mint(t, p, set("email", "ben@eu.acme.example")), fault.Denied, "not let in"},
		"a domain that ends alike":   {mint(t, p, set("email", "ben@evilacme.example")), fault.Denied, "not let in"},
		"a domain that begins alike": {mint(t, p, set("email", "ben@acme.example.evil.example")), fault.Denied, "not let in"},
		"two at signs":               {mint(t, p, set("email", "ben@acme.example@evil.example")), fault.Denied, "not let in"},
		"a group without a role":     {mint(t, p, set("groups", []string{"all", "Support", "support "})), fault.Denied, "none of your groups"},
		"no groups":                  {mint(t, p, drop("groups")), fault.Denied, "none of your groups"},
		"groups that are a map":      {mint(t, p, set("groups", map[string]any{"support": true})), fault.Denied, "none of your groups"},
		"other keys":                 {forged, fault.Denied, "signature"},
		"none":                       {raw(t, map[string]any{"alg": "none"}, person, func(string) []byte { return nil }), fault.Denied, ""},
		"None with a kid":            {raw(t, map[string]any{"alg": "None", "kid": identitytest.RSA}, person, func(string) []byte { return []byte("x") }), fault.Denied, ""},
		"HS256 with the public key":  {raw(t, map[string]any{"alg": "HS256", "kid": identitytest.RSA}, person, hmacWith(jwks.Keys[0])), fault.Denied, ""},
		"HS256 with the key set":     {raw(t, map[string]any{"alg": "HS256"}, person, hmacWith(p.JWKS())), fault.Denied, ""},
		"a kid that is unknown":      {raw(t, map[string]any{"alg": "RS256", "kid": "other"}, person, func(string) []byte { return make([]byte, 256) }), fault.Denied, "signature"},
		"its own key in the header":  {raw(t, map[string]any{"alg": "RS256", "kid": "own", "jwk": jwks.Keys[0], "jku": "https://evil.example/keys"}, person, func(string) []byte { return make([]byte, 256) }), fault.Denied, "signature"},
		"signature cut off":          {parts[0] + "." + parts[1] + ".", fault.Denied, ""},
		"another payload":            {parts[0] + "." + base64.RawURLEncoding.EncodeToString([]byte(`{"sub":"1"}`)) + "." + parts[2], fault.Denied, ""},
		"empty":                      {"", fault.Denied, ""},
		"long":                       {strings.Repeat("A", login.MaxToken+1), fault.Invalid, "limit"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := v.Verify(t.Context(), tc.token, nonce)
			refusedWith(t, err, tc.kind, tc.want)
		})
	}
	_, err = v.Verify(t.Context(), good, nonce)
	ok(t, err)
}

// TestEnemyIssuer: the issuer's documents, or one who speaks in its place, want to send us elsewhere. Elsewhere is a host whose certificate
// is trusted and whose documents and keys are good: whoever went there would take the token.
func TestEnemyIssuer(t *testing.T) {
	var elsewhere atomic.Int64
	var speaks atomic.Pointer[logintest.Provider]
	other := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		elsewhere.Add(1)
		p := speaks.Load()
		if r.URL.Path == "/keys" {
			_, _ = w.Write(p.JWKS())
			return
		}
		fmt.Fprintf(w, `{"issuer":%q,"jwks_uri":%q}`, p.URL, p.URL+"/keys")
	}))
	defer other.Close()
	discovery := "/.well-known/openid-configuration"
	for name, tc := range map[string]struct {
		serve  func(p *logintest.Provider) func(w http.ResponseWriter, r *http.Request) bool
		change func(*login.Options)
		kind   fault.Kind
		want   string
	}{
		"another CA": {nil, func(o *login.Options) { o.Roots = x509.NewCertPool() }, fault.Unavailable, "does not say"},
		"redirect of the document": {func(*logintest.Provider) func(http.ResponseWriter, *http.Request) bool {
			return func(w http.ResponseWriter, r *http.Request) bool {
				http.Redirect(w, r, other.URL+discovery, http.StatusFound)
				return true
			}
		}, nil, fault.Unavailable, "does not say"},
		"redirect of the keys": {func(*logintest.Provider) func(http.ResponseWriter, *http.Request) bool {
			return func(w http.ResponseWriter, r *http.Request) bool {
				if r.URL.Path != "/keys" {
					return false
				}
				http.Redirect(w, r, other.URL+"/keys", http.StatusTemporaryRedirect)
				return true
			}
		}, nil, fault.Denied, ""},
		"keys on another host": {func(p *logintest.Provider) func(http.ResponseWriter, *http.Request) bool {
			return func(w http.ResponseWriter, r *http.Request) bool {
				fmt.Fprintf(w, `{"issuer":%q,"jwks_uri":%q}`, p.URL, other.URL+"/keys")
				return true
			}
		}, nil, fault.Denied, "key_hosts"},
		"keys over http": {func(p *logintest.Provider) func(http.ResponseWriter, *http.Request) bool {
			return func(w http.ResponseWriter, r *http.Request) bool {
				fmt.Fprintf(w, `{"issuer":%q,"jwks_uri":%q}`, p.URL, strings.Replace(p.URL, "https:", "http:", 1)+"/keys")
				return true
			}
		}, nil, fault.Denied, "key_hosts"},
		"speaks for another": {func(p *logintest.Provider) func(http.ResponseWriter, *http.Request) bool {
			return func(w http.ResponseWriter, r *http.Request) bool {
				fmt.Fprintf(w, `{"issuer":"https://evil.example","jwks_uri":%q}`, p.URL+"/keys")
				return true
			}
		}, nil, fault.Unavailable, "does not say"},
		"endless document": {func(*logintest.Provider) func(http.ResponseWriter, *http.Request) bool {
			return func(w http.ResponseWriter, r *http.Request) bool {
				for b := []byte(strings.Repeat(" ", 64<<10)); r.Context().Err() == nil; {
					if _, err := w.Write(b); err != nil {
						break
					}
				}
				return true
			}
		}, nil, fault.Unavailable, "does not say"},
	} {
		t.Run(name, func(t *testing.T) {
			p := provider(t)
			if tc.serve != nil {
				p.Serve = tc.serve(p)
			}
			speaks.Store(p)
			v := verifier(t, p, func(o *login.Options) {
				o.Roots = p.Pool.Clone()
				o.Roots.AddCert(other.Certificate())
				if tc.change != nil {
					tc.change(o)
				}
			})
			_, err := v.Verify(t.Context(), mint(t, p, nil), nonce)
			refusedWith(t, err, tc.kind, tc.want)
		})
	}
	t.Run("elsewhere is believed where the file names it", func(t *testing.T) { // or the rows above would show nothing
		p := provider(t)
		speaks.Store(p)
		p.Serve = func(w http.ResponseWriter, r *http.Request) bool {
			fmt.Fprintf(w, `{"issuer":%q,"jwks_uri":%q}`, p.URL, other.URL+"/keys")
			return true
		}
		before := elsewhere.Load()
		v := verifier(t, p, func(o *login.Options) {
			o.Roots, o.KeyHosts = p.Pool.Clone(), []string{strings.TrimPrefix(other.URL, "https://")}
			o.Roots.AddCert(other.Certificate())
		})
		_, err := v.Verify(t.Context(), mint(t, p, nil), nonce)
		ok(t, err)
		if elsewhere.Load() == before {
			t.Error("nobody was asked elsewhere")
		}
		elsewhere.Store(before)
	})
	if n := elsewhere.Load(); n > 0 {
		t.Errorf("the control plane called elsewhere %d times", n)
	}
}
