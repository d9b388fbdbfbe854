// SPDX-License-Identifier: Apache-2.0

package controlplane_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"encoding/json"
	"net/http"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/go-jose/go-jose/v4"

	"github.com/demarc-dev/demarc/api"
	boundaryv1 "github.com/demarc-dev/demarc/api/boundary/v1"
	"github.com/demarc-dev/demarc/api/boundary/v1/boundaryv1connect"
	controlv1 "github.com/demarc-dev/demarc/api/control/v1"
	"github.com/demarc-dev/demarc/api/control/v1/controlv1connect"
	"github.com/demarc-dev/demarc/daemon/controlplane/book"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/identity"
	"github.com/demarc-dev/demarc/identity/identitytest"
)

// clusterSigner is the keys of a cluster by their IDs.
type clusterSigner map[string]*ecdsa.PrivateKey

func newRing(t *testing.T, ids ...string) clusterSigner {
	t.Helper()
	r := clusterSigner{}
	for _, id := range ids {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		ok(t, err)
		r[id] = key
	}
	return r
}

func (r clusterSigner) jwks(t *testing.T, ids ...string) []byte {
	t.Helper()
	var set jose.JSONWebKeySet
	for _, id := range ids {
		set.Keys = append(set.Keys, jose.JSONWebKey{Key: r[id].Public(), KeyID: id, Algorithm: "ES256", Use: "sig"})
	}
	b, err := json.Marshal(set)
	ok(t, err)
	return b
}

// token is one of the namespace demarc and the account appliance, signed with the key of this ID.
func (r clusterSigner) token(t *testing.T, i *identitytest.Issuer, id, audience string) string {
	t.Helper()
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: r[id], KeyID: id}}, nil)
	ok(t, err)
	b, err := json.Marshal(i.Claims("demarc", "appliance", audience, time.Now()))
	ok(t, err)
	o, err := signer.Sign(b)
	ok(t, err)
	s, err := o.CompactSerialize()
	ok(t, err)
	return s
}

func (g *gate) nonce() string {
	g.t.Helper()
	ch, err := g.bootstrap(g.caller(nil)).Challenge(g.t.Context(), connect.NewRequest(&boundaryv1.ChallengeRequest{}))
	ok(g.t, err)
	return ch.Msg.GetNonce()
}

func (g *gate) rolls(cert *tls.Certificate, jwks []byte, token, nonce string) (waiting bool, err error) {
	g.t.Helper()
	res, err := boundaryv1connect.NewBoundaryClient(g.caller(cert), "https://"+g.addr).RollKeys(g.t.Context(), connect.NewRequest(&boundaryv1.RollKeysRequest{Jwks: jwks, Token: token, Nonce: nonce}))
	if err != nil {
		return false, api.FromWire("test", err)
	}
	return res.Msg.GetWaiting(), nil
}

// tells reports keys with a token of one of the ring, made out as it must be.
func (g *gate) tells(cert *tls.Certificate, r clusterSigner, signs string, ids ...string) (waiting bool, err error) {
	g.t.Helper()
	nonce, jwks := g.nonce(), r.jwks(g.t, ids...)
	audience, err := identity.KeysAudience(domain, nonce, jwks)
	ok(g.t, err)
	return g.rolls(cert, jwks, r.token(g.t, g.issuer, signs, audience), nonce)
}

// enrols tells whether a token of one of the ring gets a certificate.
func (g *gate) enrols(r clusterSigner, signs string, log []byte) error {
	g.t.Helper()
	m, _ := g.request(logKey(g.t))
	audience, err := identity.Audience(domain, m.GetNonce(), m.GetCsr())
	ok(g.t, err)
	m.LogKey, m.Token = log, r.token(g.t, g.issuer, signs, audience)
	_, err = g.enrol(m)
	return err
}

// pinned is an appliance that enrolled with a cluster whose key "one" is pinned.
func pinned(t *testing.T) (g *gate, r clusterSigner, cert *tls.Certificate, log []byte) {
	t.Helper()
	g, r = newGate(t, time.Minute), newRing(t, "one", "two", "three")
	e := g.issuer.Expect("demarc", "appliance")
	e.JWKS = r.jwks(t, "one")
	g.expects(e)
	m, key := g.request(logKey(t))
	audience, err := identity.Audience(domain, m.GetNonce(), m.GetCsr())
	ok(t, err)
	m.Token = r.token(t, g.issuer, "one", audience)
	res, err := g.enrol(m)
	ok(t, err)
	return g, r, &tls.Certificate{Certificate: [][]byte{res.GetCertificate()}, PrivateKey: key}, m.GetLogKey()
}

func (g *gate) eu1() book.Appliance {
	g.t.Helper()
	a, err := g.order.book.View().Appliance("eu-1")
	ok(g.t, err)
	return a
}

// TestRollKeys rolls keys over at the real door, each step vouched for by a key of the step before.
func TestRollKeys(t *testing.T) {
	g, r, cert, log := pinned(t)
	registered := g.eu1().Expect
	for _, step := range []struct {
		signs string
		ids   []string
	}{{"one", []string{"one", "two"}}, {"two", []string{"two"}}, {"two", []string{"two", "three"}}} {
		if waiting, err := g.tells(cert, r, step.signs, step.ids...); err != nil || waiting {
			t.Fatalf("%v: waiting %v, %v", step, waiting, err)
		}
		ok(t, g.enrols(r, step.signs, log))
	}
	refusedWith(t, g.enrols(r, "one", log), fault.Denied, "not pinned")
	ok(t, g.enrols(r, "three", log))
	if !bytes.Equal(g.eu1().Expect, registered) {
		t.Error("what the vendor registered was replaced")
	}
	size := g.order.book.Log().Size()
	if _, err := g.rolls(cert, r.jwks(t, "two", "three"), "no token is looked at", ""); err != nil {
		t.Fatal(err)
	}
	if n := g.order.book.Log().Size(); n != size {
		t.Errorf("the same keys again made %d entries", n-size)
	}
	submitAs(g, book.ForgetKeys{Name: "eu-1"})
	refusedWith(t, g.enrols(r, "two", log), fault.Denied, "not pinned")
	ok(t, g.enrols(r, "one", log))
}

// TestRollKeysRefuses is who may not, and with what.
func TestRollKeysRefuses(t *testing.T) {
	g, r, cert, _ := pinned(t)
	nonce, jwks := g.nonce(), r.jwks(t, "one", "two")
	audience, err := identity.KeysAudience(domain, nonce, jwks)
	ok(t, err)
	good := r.token(t, g.issuer, "one", audience)
	refused := func(token, nonce string, jwks []byte, k fault.Kind, sentence string) {
		t.Helper()
		_, err := g.rolls(cert, jwks, token, nonce)
		refusedWith(t, err, k, sentence)
	}
	other, err := identity.KeysAudience(domain, nonce, r.jwks(t, "two"))
	ok(t, err)
	refused(r.token(t, g.issuer, "one", other), nonce, jwks, fault.Denied, "its audience must be")
	refused(good, g.nonce(), jwks, fault.Denied, "its audience must be")
	refused(good, "", jwks, fault.Invalid, "this is no nonce")
	refused(good, nonce, []byte(`{"keys":[]}`), fault.Invalid, "0 keys")
	without, err := identity.KeysAudience(domain, nonce, r.jwks(t, "two"))
	ok(t, err)
	refused(r.token(t, g.issuer, "one", without), nonce, r.jwks(t, "two"), fault.Denied, "not pinned") // the key that signs now is not among them
	if _, err := g.rolls(nil, jwks, good, nonce); fault.Of(err) != fault.Denied {
		t.Fatalf("a stranger: %v", err)
	}
	if _, err := g.rolls(cert, jwks, good, nonce); err != nil {
		t.Fatal(err)
	}
	submitAs(g, book.ForgetKeys{Name: "eu-1"})
	refused(good, nonce, jwks, fault.Denied, "used before")
}

// TestThiefOfACertificatePlantsNoKeys has a thief with the appliance's certificate and its key, and nothing else, tell keys
// of the thief's own: they prove nothing, before a ban and after it.
func TestThiefOfACertificatePlantsNoKeys(t *testing.T) {
	g, r, cert, log := pinned(t)
	thief := newRing(t, "one", "two", "evil")
	for name, ids := range map[string][]string{"another": {"evil"}, "the ID of the pinned one": {"one"}, "both": {"evil", "one"}} {
		if waiting, err := g.tells(cert, thief, ids[0], ids...); err != nil || !waiting {
			t.Fatalf("%s: waiting %v, %v", name, waiting, err)
		}
		refusedWith(t, g.enrols(thief, ids[0], log), fault.Denied, "pinned")
		ok(t, g.enrols(r, "one", log))
	}
	submitAs(g, book.Edge{Name: "eu-1", Serial: g.eu1().Next, Online: true, Node: "cp-1"}) // the appliance moves on; the thief's copy is out
	if _, err := g.tells(cert, thief, "evil", "evil"); err == nil {
		t.Error("a certificate that is no longer the current one may tell keys")
	}
	if len(g.eu1().Reported) == 0 {
		t.Fatal("nothing waits")
	}
	submitAs(g, book.Ban{Name: "eu-1", Reason: "stolen"})
	if a := g.eu1(); len(a.Reported) > 0 || len(a.Rolled) > 0 {
		t.Error("a ban leaves the thief's keys")
	}
	for _, signs := range []string{"evil", "one"} {
		if err := g.enrols(thief, signs, log); fault.Of(err) != fault.Denied {
			t.Errorf("after the ban: %v", err)
		}
	}
}

// TestOperatorSeesAndConfirmsKeys is the operator's side, over the real door and on record.
func TestOperatorSeesAndConfirmsKeys(t *testing.T) {
	g, r, cert, log := pinned(t)
	if waiting, err := g.tells(cert, r, "two", "two", "one"); err != nil || !waiting {
		t.Fatalf("waiting %v, %v", waiting, err)
	}
	refusedWith(t, g.enrols(r, "two", log), fault.Denied, "not pinned")
	own, err := identitytest.Leaf(g.ca, fleet.PrincipalOf(domain, fleet.Operator, "ops"), time.Now(), time.Hour)
	ok(t, err)
	client := func(c *http.Client) controlv1connect.IssuerKeysClient {
		return controlv1connect.NewIssuerKeysClient(c, "https://"+g.addr)
	}
	if _, err := client(g.caller(cert)).GetExpect(t.Context(), connect.NewRequest(&controlv1.GetExpectRequest{Name: "eu-1"})); connect.CodeOf(err) != connect.CodePermissionDenied {
		t.Errorf("an appliance asks: %v", err)
	}
	ops := client(g.caller(own))
	res, err := ops.GetExpect(t.Context(), connect.NewRequest(&controlv1.GetExpectRequest{Name: "eu-1"}))
	ok(t, err)
	if m := res.Msg; !bytes.Equal(m.GetReported(), r.jwks(t, "two", "one")) || len(m.GetInUse()) > 0 || m.GetDigest() != string(fleet.DigestOf(m.GetReported())) {
		t.Fatalf("%+v", m)
	}
	_, err = ops.ConfirmKeys(t.Context(), connect.NewRequest(&controlv1.ConfirmKeysRequest{Name: "eu-1", Digest: res.Msg.GetDigest()}))
	ok(t, err)
	ok(t, g.enrols(r, "two", log))
	_, err = ops.ForgetKeys(t.Context(), connect.NewRequest(&controlv1.ForgetKeysRequest{Name: "eu-1"}))
	ok(t, err)
	refusedWith(t, g.enrols(r, "two", log), fault.Denied, "not pinned")
	var kinds []string
	for i := range g.order.book.Log().Size() {
		var e struct {
			Kind string `json:"kind"`
			By   string `json:"by"`
		}
		ok(t, json.Unmarshal(g.order.book.Log().Entry(i), &e))
		switch e.Kind {
		case "appliance.keys/2", "appliance.keys.confirm/1", "appliance.keys.forget/1":
			kinds = append(kinds, e.Kind+" "+e.By)
		}
	}
	want := []string{"appliance.keys/2 " + string(fleet.PrincipalOf(domain, fleet.Appliance, "eu-1")),
		"appliance.keys.confirm/1 " + string(fleet.PrincipalOf(domain, fleet.Operator, "ops")), "appliance.keys.forget/1 " + string(fleet.PrincipalOf(domain, fleet.Operator, "ops"))}
	if len(kinds) != len(want) || kinds[0] != want[0] || kinds[1] != want[1] || kinds[2] != want[2] {
		t.Errorf("on record: %q, want %q", kinds, want)
	}
}
