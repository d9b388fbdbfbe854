// SPDX-License-Identifier: Apache-2.0

package controlplane_test

import (
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/demarc-dev/demarc/api"
	controlv1 "github.com/demarc-dev/demarc/api/control/v1"
	"github.com/demarc-dev/demarc/api/control/v1/controlv1connect"
	"github.com/demarc-dev/demarc/daemon/controlplane"
	"github.com/demarc-dev/demarc/daemon/controlplane/book"
	"github.com/demarc-dev/demarc/daemon/controlplane/login"
	"github.com/demarc-dev/demarc/daemon/controlplane/login/logintest"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/identity"
	"github.com/demarc-dev/demarc/identity/identitytest"
)

// withLogin opens the second door of a gate.
func withLogin(t *testing.T) (*gate, *logintest.Provider) {
	t.Helper()
	g := newGate(t, 0)
	p, err := logintest.NewProvider("demarc")
	ok(t, err)
	t.Cleanup(p.Close)
	p.Claims = map[string]any{"sub": "42", "email": "ben@acme.example", "email_verified": true, "groups": []string{"support"}}
	v := login.New(login.Options{Issuer: p.URL, ClientID: "demarc", Roots: p.Pool, NameClaim: "email", Domains: []string{"acme.example"}, GroupsClaim: "groups",
		Roles: []login.Role{{Group: "support", Rank: fleet.Operate}, {Group: "platform", Rank: fleet.Admin}}, Now: time.Now})
	t.Cleanup(v.Close)
	g.server.Login = &controlplane.Login{Verifier: v, Life: time.Hour}
	ok(t, g.status(g.operator("ann")))
	return g, p
}

// loginRequest is a good one for a key.
func loginRequest(t *testing.T, p *logintest.Provider, key *ecdsa.PrivateKey) *controlv1.LoginRequest {
	t.Helper()
	csr, err := identity.NewCSR(key, rand.Reader)
	ok(t, err)
	spki, err := x509.MarshalPKIXPublicKey(key.Public())
	ok(t, err)
	token, err := p.Mint(identitytest.EC, p.Person(login.Nonce(spki), time.Now()))
	ok(t, err)
	return &controlv1.LoginRequest{Csr: csr, IdToken: token}
}

func (g *gate) logsIn(m *controlv1.LoginRequest) (*controlv1.LoginResponse, error) {
	res, err := controlv1connect.NewOperatorBootstrapClient(g.caller(nil), "https://"+g.addr).Login(g.t.Context(), connect.NewRequest(m))
	if err != nil {
		return nil, api.FromWire("test", err)
	}
	return res.Msg, nil
}

// TestLoginGivesAnHour: a token is traded once, for the key that its nonce names; the role is that of the groups at each login; a
// ban holds against the issuer; nothing makes the certificate live longer.
func TestLoginGivesAnHour(t *testing.T) {
	g, p := withLogin(t)
	key := newKey(t)
	m := loginRequest(t, p, key)
	res, err := g.logsIn(m)
	ok(t, err)
	cert := &tls.Certificate{Certificate: [][]byte{res.GetCertificate()}, PrivateKey: key}
	ok(t, g.adds(cert, "initech"))
	o := g.record(res.GetName())
	if o.Via != book.ViaOIDC || o.Role != fleet.Operate || o.Claim != "ben@acme.example" || time.Until(o.CurrentTill) > time.Hour || !strings.Contains(g.last(), res.GetName()) {
		t.Fatalf("%+v", o)
	}
	_, err = g.logsIn(m)
	refusedWith(t, err, fault.Denied, "used before")
	stolen := loginRequest(t, p, newKey(t)) // a token of this person, shown with another key
	theirs := newKey(t)
	stolen.Csr, err = identity.NewCSR(theirs, rand.Reader)
	ok(t, err)
	_, err = g.logsIn(stolen)
	refusedWith(t, err, fault.Denied, "not made for this key")
	if !strings.Contains(g.last(), "operator.login") {
		t.Fatalf("the refusal is not on record: %s", g.last())
	}
	csr, err := identity.NewCSR(newKey(t), rand.Reader)
	ok(t, err)
	_, err = g.control(cert).RenewOperator(t.Context(), connect.NewRequest(&controlv1.RenewOperatorRequest{Csr: csr}))
	refusedWith(t, api.FromWire("test", err), fault.Denied, "log in again")

	p.Claims["groups"] = []string{"platform"}
	key = newKey(t)
	res, err = g.logsIn(loginRequest(t, p, key))
	ok(t, err)
	again := &tls.Certificate{Certificate: [][]byte{res.GetCertificate()}, PrivateKey: key}
	ok(t, g.status(again))
	shut(t, g.knock(cert)) // the newest login is the one that counts
	if now := g.record(o.Name); now.Role != fleet.Admin {
		t.Fatalf("%+v", now)
	}
	submitAs(g, book.BanOperator{Name: o.Name, Reason: "left"})
	shut(t, g.knock(again))
	_, err = g.logsIn(loginRequest(t, p, newKey(t)))
	refusedWith(t, err, fault.Denied, "is banned")
}

// TestNoAdminByLoginAlone: one who logs in as admin does not count as the last admin, and takes nobody's name.
func TestNoAdminByLoginAlone(t *testing.T) {
	g, p := withLogin(t)
	p.Claims["groups"] = []string{"platform"}
	res, err := g.logsIn(loginRequest(t, p, newKey(t)))
	ok(t, err)
	_, err = g.order.book.View().Operator(res.GetName())
	ok(t, err)
	o := &g.order.order
	refused(t, o, fault.Conflict, book.RemoveOperator{Name: "ann"})
	refused(t, o, fault.Conflict, book.SetOperatorRole{Name: res.GetName(), Role: fleet.Viewer})
	d := fleet.DigestOf([]byte("x"))
	refused(t, o, fault.Conflict, book.LoginOperator{Name: "ann", Role: fleet.Admin, Subject: d, Token: d, TokenTill: time.Now().Add(time.Hour),
		Serial: "1", Till: time.Now().Add(time.Hour), Issuer: g.order.book.View().Slots[0].ID()})
	if _, err := newGate(t, 0).logsIn(loginRequest(t, p, newKey(t))); fault.Of(err) != fault.NotFound {
		t.Fatalf("a control plane without an issuer: %v", err)
	}
}

// TestABanHoldsForThePerson (FAULTS.md I8): whoever was banned stays out under each name that the issuer gives them, before and after
// another person took the name; and who is not banned keeps the name of the first login, and one record.
func TestABanHoldsForThePerson(t *testing.T) {
	g, p := withLogin(t)
	first, err := g.logsIn(loginRequest(t, p, newKey(t)))
	ok(t, err)
	p.Claims["email"] = "benjamin@acme.example" // the person was renamed
	again, err := g.logsIn(loginRequest(t, p, newKey(t)))
	ok(t, err)
	if again.GetName() != first.GetName() || g.record(first.GetName()).Claim != "benjamin@acme.example" {
		t.Errorf("operator %q is %q after another claim: %+v", first.GetName(), again.GetName(), g.record(first.GetName()))
	}
	if n := len(g.order.book.View().Operators()); n != 2 {
		t.Errorf("%d operators, want ann and one who logged in twice", n)
	}
	submitAs(g, book.BanOperator{Name: first.GetName(), Reason: "left"})
	for _, claim := range []string{"ben@acme.example", "benjamin@acme.example", "b.smith@acme.example"} {
		p.Claims["email"] = claim
		size := g.order.book.Log().Size()
		_, err := g.logsIn(loginRequest(t, p, newKey(t)))
		refusedWith(t, err, fault.Denied, "is banned")
		if g.order.book.Log().Size() != size+1 || !strings.Contains(g.last(), first.GetName()) {
			t.Errorf("%s: the refusal is not on record under the name that was banned: %s", claim, g.last())
		}
	}
	d := fleet.DigestOf([]byte("another token"))
	refused(t, &g.order.order, fault.Denied, book.LoginOperator{Name: "other", Role: fleet.Admin, Subject: g.record(first.GetName()).Subject, Token: d,
		TokenTill: time.Now().Add(time.Hour), Serial: "1", Till: time.Now().Add(time.Hour), Issuer: g.order.book.View().Slots[0].ID()}) // the law itself
	p.Claims["sub"], p.Claims["email"] = "43", "ben@acme.example" // another person, who got the address
	other, err := g.logsIn(loginRequest(t, p, newKey(t)))
	ok(t, err)
	if other.GetName() == first.GetName() {
		t.Errorf("another person is operator %q", other.GetName())
	}
}
