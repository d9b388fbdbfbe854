// SPDX-License-Identifier: Apache-2.0

package controlplane_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/tls"
	"os"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/demarc-dev/demarc/api"
	controlv1 "github.com/demarc-dev/demarc/api/control/v1"
	"github.com/demarc-dev/demarc/api/control/v1/controlv1connect"
	"github.com/demarc-dev/demarc/daemon/controlplane/book"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/identity"
)

// seed opens the log's key in the gate's book, as one can who has the kek and the data of a node.
func (g *gate) seed(kek []byte) []byte {
	g.t.Helper()
	for _, one := range g.order.book.View().Secrets {
		if one.Name == book.SecretLogKey {
			seed, err := identity.OpenSecret(one.Name, one.Sealed, kek)
			ok(g.t, err)
			return seed
		}
	}
	g.t.Fatal("the book has no log key")
	return nil
}

// recovery is a good request for a key.
func (g *gate) recovery(name string, seed, kek []byte, key *ecdsa.PrivateKey) *controlv1.RecoverAdminRequest {
	g.t.Helper()
	signer, err := identity.RecoveryKey(seed, kek)
	ok(g.t, err)
	csr, err := identity.NewCSR(key, rand.Reader)
	ok(g.t, err)
	r := identity.Recovery{TrustDomain: domain, Name: name, Node: "cp-1", Nonce: g.nonce(), CSR: csr}
	return &controlv1.RecoverAdminRequest{Name: name, Node: "cp-1", Nonce: r.Nonce, Csr: csr, Proof: r.Sign(signer)}
}

func (g *gate) recovers(m *controlv1.RecoverAdminRequest) (*controlv1.RecoverAdminResponse, error) {
	res, err := controlv1connect.NewOperatorBootstrapClient(g.caller(nil), "https://"+g.addr).RecoverAdmin(g.t.Context(), connect.NewRequest(m))
	if err != nil {
		return nil, api.FromWire("test", err)
	}
	return res.Msg, nil
}

// TestEnemyRecoversNoAdmin: without both the key-encryption key in use and the sealed keys, with a proof of something else, or with
// one that was used, nobody becomes an admin; and each try is on record.
func TestEnemyRecoversNoAdmin(t *testing.T) {
	g := newGate(t, 0)
	g.server.SetMembers([]book.Member{{Name: "cp-1"}})
	g.follow()
	kek := bytes.Repeat([]byte{7}, 32)
	ann := g.operator("ann")
	ok(t, g.status(ann))
	ben := g.joins(ann, "ben", fleet.Viewer)
	_, err := g.operators(ann).BanOperator(t.Context(), connect.NewRequest(&controlv1.BanOperatorRequest{RequestId: rand.Text(), Name: "ben"}))
	ok(t, err)
	file := g.kekFile(kek)
	g.until("the book keeps its secrets", func(s book.State) bool { return len(s.Secrets) == 2 && len(s.Holds("cp-1")) == 1 })
	seed := g.seed(kek)
	good := func() *controlv1.RecoverAdminRequest { return g.recovery("cat", seed, kek, newKey(t)) }
	for name, c := range map[string]struct {
		m    *controlv1.RecoverAdminRequest
		kind fault.Kind
		why  string
	}{
		"the kek alone":     {g.recovery("cat", make([]byte, 32), kek, newKey(t)), fault.Denied, "the proof is not made"},
		"the data alone":    {g.recovery("cat", seed, make([]byte, 32), newKey(t)), fault.Denied, "the proof is not made"},
		"another name":      {with(good(), func(m *controlv1.RecoverAdminRequest) { m.Name = "dan" }), fault.Denied, "the proof is not made"},
		"another node":      {with(good(), func(m *controlv1.RecoverAdminRequest) { m.Node = "cp-2" }), fault.Denied, "the proof is not made"},
		"another nonce":     {with(good(), func(m *controlv1.RecoverAdminRequest) { m.Nonce = g.nonce() }), fault.Denied, "the proof is not made"},
		"another key":       {with(good(), func(m *controlv1.RecoverAdminRequest) { m.Csr = good().Csr }), fault.Denied, "the proof is not made"},
		"a nonce of nobody": {with(good(), func(m *controlv1.RecoverAdminRequest) { m.Nonce = "x" }), "", "nonce"},
		"no proof":          {with(good(), func(m *controlv1.RecoverAdminRequest) { m.Proof = nil }), fault.Denied, "the proof is not made"},
		"the invitation's": {with(good(), func(m *controlv1.RecoverAdminRequest) {
			_, k, _ := ed25519.GenerateKey(nil)
			m.Proof = identity.SignInvite(k, domain, "cat", m.Csr)
		}), fault.Denied, "the proof is not made"},
		"the name of a ban":   {g.recovery("ben", seed, kek, newKey(t)), fault.Conflict, "is banned"},
		"a name that is none": {g.recovery("Cat!", seed, kek, newKey(t)), fault.Invalid, "Cat!"},
	} {
		_, err := g.recovers(c.m)
		if err == nil || c.kind != "" && fault.Of(err) != c.kind || !strings.Contains(fault.Text(err), c.why) {
			t.Errorf("%s: %v", name, err)
		}
		if _, err := g.order.book.View().Operator(c.m.GetName()); err == nil && c.m.GetName() != "ben" {
			t.Errorf("%s: there is an operator %q", name, c.m.GetName())
		}
		if last := g.last(); !strings.Contains(last, "operator.recover") || !strings.Contains(last, `"refused/1"`) {
			t.Errorf("%s is not on record: %s", name, last)
		}
	}
	if err := g.status(ben); err == nil {
		t.Error("the banned one is in again")
	}
	m := good()
	_, err = g.recovers(m)
	ok(t, err)
	_, err = g.recovers(m)
	refusedWith(t, err, fault.Denied, "this nonce was used before")

	// The kek is rotated: what was copied before, the old kek included, is of no use.
	next := bytes.Repeat([]byte{9}, 32)
	ok(t, os.WriteFile(file+".next", next, 0o600))
	g.until("the node holds both", func(s book.State) bool { return len(s.Holds("cp-1")) == 2 })
	_, err = controlv1connect.NewKeyServiceClient(g.caller(ann), "https://"+g.addr).RotateKey(t.Context(), connect.NewRequest(&controlv1.RotateKeyRequest{RequestId: rand.Text()}))
	ok(t, err)
	_, err = g.recovers(g.recovery("dan", seed, kek, newKey(t)))
	refusedWith(t, err, fault.Denied, "the proof is not made")
	_, err = g.recovers(g.recovery("dan", seed, next, newKey(t)))
	ok(t, err)
}

func with[M any](m *M, change func(*M)) *M { change(m); return m }

// TestAnAdminIsRecovered: the only admin's certificate is gone. With the kek and the data of a node the same name is an admin again,
// what it had before passes no more, and who did it, for which name and at which node is in the log.
func TestAnAdminIsRecovered(t *testing.T) {
	g := newGate(t, 0)
	g.follow()
	kek := bytes.Repeat([]byte{7}, 32)
	ann := g.operator("ann")
	ok(t, g.status(ann))
	g.kekFile(kek)
	g.until("the book keeps its secrets", func(s book.State) bool { return len(s.Secrets) == 2 })
	key := newKey(t)
	res, err := g.recovers(g.recovery("ann", g.seed(kek), kek, key))
	ok(t, err)
	if last := g.last(); !strings.Contains(last, `"operator.recover/1"`) || !strings.Contains(last, `"name":"ann"`) || !strings.Contains(last, `"node":"cp-1"`) || !strings.Contains(last, string(fleet.PrincipalOf(domain, fleet.Operator, "ann"))) {
		t.Fatalf("not on record: %s", last)
	}
	again := &tls.Certificate{Certificate: [][]byte{res.GetCertificate()}, PrivateKey: key}
	ok(t, g.adds(again, "initech"))
	_ = g.joins(again, "eve", fleet.Viewer) // an admin's act
	if err := g.knock(ann); err == nil {
		t.Fatal("the lost certificate passes")
	}
	if r := g.record("ann"); r.Via != book.ViaRecovery || r.Role != fleet.Admin || r.CurrentTill.Before(time.Now()) {
		t.Fatalf("%+v", r)
	}
}
