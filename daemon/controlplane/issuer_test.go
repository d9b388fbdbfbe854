// SPDX-License-Identifier: Apache-2.0

package controlplane_test

import (
	"bytes"
	"crypto/x509"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/demarc-dev/demarc/configs"
	"github.com/demarc-dev/demarc/daemon/controlplane/platform"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/identity"
	"github.com/demarc-dev/demarc/identity/identitytest"
)

// google is a metadata server and the place of Google's keys.
func google(t *testing.T, claims func(map[string]any)) (*gate, *identitytest.Issuer, *atomic.Int64) {
	t.Helper()
	g := newGate(t, time.Minute)
	i, err := identitytest.NewIssuer(identity.GoogleIssuer)
	ok(t, err)
	fetched := new(atomic.Int64)
	addr, roots := serveTLS(t, []string{"www.googleapis.com"}, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fetched.Add(1)
		_, _ = w.Write(i.JWKS())
	}))
	g.asks(platform.Options{Roots: roots, Now: time.Now, Dial: to(addr)})
	g.expects(identity.Expect{Kind: identity.KindGCP, Project: "acme-prod", ServiceAccount: "appliance@acme-prod.iam.gserviceaccount.com"})
	meta := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Metadata-Flavor") != "Google" || r.URL.Path != "/computeMetadata/v1/instance/service-accounts/default/identity" || r.FormValue("format") != "full" {
			w.WriteHeader(http.StatusForbidden)
			return
		}
		now := time.Now()
		c := map[string]any{"iss": identity.GoogleIssuer, "aud": r.FormValue("audience"), "sub": "112233445566778899001", "azp": "112233445566778899001",
			"email": "appliance@acme-prod.iam.gserviceaccount.com", "email_verified": true, "iat": now.Unix(), "exp": now.Add(time.Hour).Unix(),
			"google": map[string]any{"compute_engine": map[string]any{"project_id": "acme-prod", "project_number": 1, "zone": "europe-west3-a", "instance_id": "7", "instance_name": "vm-1"}}}
		if claims != nil {
			claims(c)
		}
		token, err := i.Mint(identitytest.RSA, c)
		if err != nil {
			w.WriteHeader(http.StatusInternalServerError)
			return
		}
		w.Header().Set("Metadata-Flavor", "Google")
		fmt.Fprint(w, token)
	}))
	t.Cleanup(meta.Close)
	t.Setenv("GCE_METADATA_HOST", strings.TrimPrefix(meta.URL, "http://"))
	return g, i, fetched
}

var gcpProof = configs.Proof{Kind: configs.ProofGCP}

func TestGCPProves(t *testing.T) {
	g, _, fetched := google(t, nil)
	m, err := g.proof(gcpProof, nil)
	ok(t, err)
	_, err = g.enrol(m)
	ok(t, err)
	ok(t, g.proves(gcpProof, m.GetLogKey(), nil))
	if n := fetched.Load(); n != 1 {
		t.Errorf("keys were fetched %d times", n)
	}
	if a, _ := g.order.book.View().Appliance("eu-1"); a.UID != "112233445566778899001" {
		t.Errorf("%+v", a)
	}
}

func TestGCPRefuses(t *testing.T) {
	for name, tc := range map[string]struct {
		change func(c map[string]any)
		want   string
	}{
		"another account": {func(c map[string]any) { c["email"] = "evil@acme-prod.iam.gserviceaccount.com" }, "is registered"},
		"no email":        {func(c map[string]any) { delete(c, "email") }, "is registered"},
		"not verified":    {func(c map[string]any) { c["email_verified"] = false }, "does not vouch"},
		"another project": {func(c map[string]any) {
			c["google"].(map[string]any)["compute_engine"].(map[string]any)["project_id"] = "evil"
		}, `of the project "evil"`},
		"format standard":    {func(c map[string]any) { delete(c, "google") }, "names no project"},
		"another issuer":     {func(c map[string]any) { c["iss"] = "accounts.google.com" }, "was issued by"},
		"another audience":   {func(c map[string]any) { c["aud"] = "https://evil.example" }, "its audience must be"},
		"audience and more":  {func(c map[string]any) { c["aud"] = []any{c["aud"], "x"} }, "its audience must be"},
		"a subject of 1 KiB": {func(c map[string]any) { c["sub"] = strings.Repeat("1", 1<<10) }, "unique id"},
		"no subject":         {func(c map[string]any) { delete(c, "sub") }, "unique id"},
	} {
		t.Run(name, func(t *testing.T) {
			g, _, _ := google(t, tc.change)
			refusedWith(t, g.proves(gcpProof, nil, nil), fault.Denied, tc.want)
		})
	}
}

// issuerAt is a cluster on loopback that publishes its keys, as the discovery document says.
func issuerAt(t *testing.T, h func(w http.ResponseWriter, r *http.Request, base string) bool) (*identitytest.Issuer, *x509.CertPool) {
	t.Helper()
	var i *identitytest.Issuer
	addr, roots := serveTLS(t, []string{"localhost"}, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if h != nil && h(w, r, i.URL) {
			return
		}
		switch r.URL.Path {
		case "/.well-known/openid-configuration":
			fmt.Fprintf(w, `{"issuer":%q,"jwks_uri":%q}`, i.URL, i.URL+"/openid/v1/jwks")
		case "/openid/v1/jwks":
			_, _ = w.Write(i.JWKS())
		default:
			w.WriteHeader(http.StatusNotFound)
		}
	}))
	_, port, err := net.SplitHostPort(addr)
	ok(t, err)
	i, err = identitytest.NewIssuer("https://localhost:" + port)
	ok(t, err)
	return i, roots
}

func discovers(g *gate, i *identitytest.Issuer) error {
	g.t.Helper()
	g.issuer = i
	g.expects(identity.Expect{Kind: identity.KindKubernetes, Issuer: i.URL, Discovery: true, Namespace: "demarc", ServiceAccount: "appliance"})
	m, _ := g.request(logKey(g.t))
	_, err := g.enrol(m)
	return err
}

func TestDiscovery(t *testing.T) {
	g := newGate(t, time.Minute)
	i, roots := issuerAt(t, nil)
	g.asks(platform.Options{Now: time.Now, Issuers: []platform.Issuer{{URL: i.URL, Roots: roots, PrivateHost: "localhost"}}})
	ok(t, discovers(g, i))
}

// TestEnemyIssuer is an issuer, or one who registered it, that wants the control plane to call elsewhere.
func TestEnemyIssuer(t *testing.T) {
	var elsewhere, endless atomic.Int64
	inside, _ := serveTLS(t, []string{"localhost"}, http.HandlerFunc(func(http.ResponseWriter, *http.Request) { elsewhere.Add(1) }))
	for name, tc := range map[string]struct {
		h      func(w http.ResponseWriter, r *http.Request, base string) bool
		listed func(platform.Issuer) []platform.Issuer
		kind   fault.Kind
		want   string
	}{
		"not listed":              {nil, func(platform.Issuer) []platform.Issuer { return nil }, fault.Denied, "not listed"},
		"name of a loopback host": {nil, func(i platform.Issuer) []platform.Issuer { i.PrivateHost = ""; return []platform.Issuer{i} }, fault.Denied, "not a public one"},
		"listed with a slash":     {nil, func(i platform.Issuer) []platform.Issuer { i.URL += "/"; return []platform.Issuer{i} }, fault.Denied, "not listed"},
		"another CA":              {nil, func(i platform.Issuer) []platform.Issuer { i.Roots = x509.NewCertPool(); return []platform.Issuer{i} }, fault.Unavailable, "can't fetch"},
		"keys elsewhere": {func(w http.ResponseWriter, r *http.Request, base string) bool {
			fmt.Fprintf(w, `{"issuer":%q,"jwks_uri":"https://%s/keys"}`, base, inside)
			return true
		}, nil, fault.Denied, "issuer's own host"},
		"keys over http": {func(w http.ResponseWriter, r *http.Request, base string) bool {
			fmt.Fprintf(w, `{"issuer":%q,"jwks_uri":%q}`, base, strings.Replace(base, "https:", "http:", 1)+"/openid/v1/jwks")
			return true
		}, nil, fault.Denied, "over https"},
		"speaks for another": {func(w http.ResponseWriter, r *http.Request, base string) bool {
			fmt.Fprintf(w, `{"issuer":"https://other.example","jwks_uri":%q}`, base+"/openid/v1/jwks")
			return true
		}, nil, fault.Denied, "is that of"},
		"redirect of the document": {func(w http.ResponseWriter, r *http.Request, _ string) bool {
			http.Redirect(w, r, "https://"+inside+"/", http.StatusFound)
			return true
		}, nil, fault.Unavailable, "answers 302"},
		"redirect of the keys": {func(w http.ResponseWriter, r *http.Request, _ string) bool {
			if r.URL.Path != "/openid/v1/jwks" {
				return false
			}
			http.Redirect(w, r, "https://"+inside+"/", http.StatusTemporaryRedirect)
			return true
		}, nil, fault.Unavailable, "answers 307"},
		"endless keys": {func(w http.ResponseWriter, r *http.Request, _ string) bool {
			if r.URL.Path != "/openid/v1/jwks" {
				return false
			}
			for b := bytes.Repeat([]byte{' '}, 64<<10); r.Context().Err() == nil; {
				if n, err := w.Write(b); endless.Add(int64(n)) > 0 && err != nil {
					break
				}
			}
			return true
		}, nil, fault.Unavailable, "more than"},
	} {
		t.Run(name, func(t *testing.T) {
			g := newGate(t, time.Minute)
			i, roots := issuerAt(t, tc.h)
			list := []platform.Issuer{{URL: i.URL, Roots: roots, PrivateHost: "localhost"}}
			if tc.listed != nil {
				list = tc.listed(list[0])
			}
			g.asks(platform.Options{Now: time.Now, Issuers: list})
			refusedWith(t, discovers(g, i), tc.kind, tc.want)
		})
	}
	if n := elsewhere.Load(); n > 0 {
		t.Errorf("the control plane called elsewhere %d times", n)
	}
	if n := endless.Load(); n == 0 || n > 16<<20 { // what the kernel takes is more than what is read
		t.Errorf("%d bytes of an endless answer were taken", n)
	}
}
