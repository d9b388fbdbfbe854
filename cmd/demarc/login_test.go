// SPDX-License-Identifier: Apache-2.0

package main

import (
	"crypto/tls"
	"io"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/demarc-dev/demarc/daemon/controlplane"
	"github.com/demarc-dev/demarc/daemon/controlplane/book"
	"github.com/demarc-dev/demarc/daemon/controlplane/login"
	"github.com/demarc-dev/demarc/daemon/controlplane/login/logintest"
	"github.com/demarc-dev/demarc/fleet"
)

// browser opens the address that it reads on standard error, as a person does who is logged in at the issuer already.
type browser struct {
	t      *testing.T
	client *http.Client
	before func(authorize *url.URL) // what else comes first
	opened chan struct{}
}

var address = regexp.MustCompile(`https://\S+/authorize\?\S+`)

func (b *browser) Write(text []byte) (int, error) {
	if at := address.Find(text); at != nil {
		u, err := url.Parse(string(at))
		if err != nil {
			b.t.Error(err)
			return len(text), nil
		}
		go func() {
			defer close(b.opened)
			if b.before != nil {
				b.before(u)
			}
			res, err := b.client.Get(u.String())
			if err != nil {
				b.t.Error(err)
				return
			}
			defer res.Body.Close()
			if page, _ := io.ReadAll(res.Body); !strings.Contains(string(page), "You may close this page") {
				b.t.Errorf("%d: %s", res.StatusCode, page)
			}
		}()
	}
	return len(text), nil
}

// TestLoginByCommand types the whole of a login against a real issuer over HTTPS and a real listener, twice.
func TestLoginByCommand(t *testing.T) {
	p, err := logintest.NewProvider("demarc")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Close)
	p.Claims = map[string]any{"sub": "42", "email": "ben@acme.example", "email_verified": true, "groups": []string{"support"}}
	v := login.New(login.Options{Issuer: p.URL, ClientID: "demarc", Roots: p.Pool, NameClaim: "email", Domains: []string{"acme.example"},
		GroupsClaim: "groups",
		Roles:       []login.Role{{Group: "support", Rank: fleet.Operate}}, Now: time.Now})
	t.Cleanup(v.Close)
	e := newDomainWith(t, func(o *controlplane.Options) {
		o.Login = &controlplane.Login{Verifier: v, Scopes: []string{"email"}, Life: time.Hour}
	})
	ann, door, ca, me := filepath.Join(e.dir, "operator", "operator.yaml"), filepath.Join(e.dir, "door.yaml"), filepath.Join(e.dir,
		"issuer.pem"), filepath.Join(e.dir, "me.yaml")
	for file, b := range map[string][]byte{door: []byte(e.as(ann, 0, "operator", "door")), ca: p.CA} {
		if err := os.WriteFile(file, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: p.Pool, MinVersion: tls.VersionTLS12}}}
	t.Cleanup(client.CloseIdleConnections)
	types := func(exit int, before func(*url.URL)) string {
		t.Helper()
		var out strings.Builder
		b := &browser{t: t, client: client, before: before, opened: make(chan struct{})}
		if got := run(t.Context(), []string{"operator", "login", door, "--out", me, "--issuer-ca", ca}, strings.NewReader(""), &out,
			b); got != exit {
			t.Fatalf("exit %d, want %d\n%s", got, exit, &out)
		}
		select {
		case <-b.opened:
		case <-time.After(20 * time.Second):
			t.Fatal("no browser was opened")
		}
		return out.String()
	}
	// Somebody else on this machine comes to the loopback port first, and ends nothing.
	forged := func(u *url.URL) {
		for _, q := range []string{"code=x", "code=x&state=guessed", "error=access_denied"} {
			res, err := client.Get(u.Query().Get("redirect_uri") + "?" + q)
			if err != nil {
				t.Error(err)
				return
			}
			_ = res.Body.Close()
			if res.StatusCode != http.StatusBadRequest {
				t.Errorf("%s: %d", q, res.StatusCode)
			}
		}
	}
	if got := types(0, forged); !strings.Contains(got, "with the role operator until") {
		t.Fatal(got)
	}
	e.as(me, 0, "customer", "add", "globex")
	signing, err := os.ReadFile(filepath.Join(e.dir, "me.signing.key"))
	if err != nil {
		t.Fatal(err)
	}
	types(0, nil) // again, in the place of the first
	e.as(me, 0, "customer", "add", "initech")
	if now, err := os.ReadFile(filepath.Join(e.dir, "me.signing.key")); err != nil || string(now) != string(signing) {
		t.Fatal("the signing key, which customers pinned, changed at a login")
	}
	if got := e.as(me, 3, "operator", "renew"); !strings.Contains(got, "log in again") {
		t.Fatal(got)
	}
	if all := e.one.book.View().Operators(); len(all) != 2 || all[1].Via != book.ViaOIDC {
		t.Fatalf("%+v", all)
	}
}
