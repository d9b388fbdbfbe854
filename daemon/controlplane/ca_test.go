// SPDX-License-Identifier: Apache-2.0

package controlplane_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"log/slog"
	"net"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/demarc-dev/demarc/api"
	controlv1 "github.com/demarc-dev/demarc/api/control/v1"
	"github.com/demarc-dev/demarc/daemon/controlplane"
	"github.com/demarc-dev/demarc/daemon/controlplane/admission"
	"github.com/demarc-dev/demarc/daemon/controlplane/authority"
	"github.com/demarc-dev/demarc/daemon/controlplane/book"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/identity"
	"github.com/demarc-dev/demarc/identity/identitytest"
)

// tape is the order of one node, which another can play.
type tape struct {
	order
	log  [][]byte
	lead string
	mute bool // its leader is heard, and answers nothing
}

func (o *tape) Propose(ctx context.Context, data []byte) ([]byte, error) {
	ans, err := o.order.Propose(ctx, data)
	if err == nil {
		o.log = append(o.log, data)
	}
	return ans, err
}
func (o *tape) Read(context.Context) error {
	if o.mute {
		return fault.New("controlplane_test.Read", fault.NotLeader, "the leader does not answer")
	}
	return nil
}
func (o *tape) Leader() string { return o.lead }

// play gives a node what another has on record.
func (o *tape) play(t *testing.T, log [][]byte) {
	t.Helper()
	for _, data := range log[len(o.log):] {
		if _, err := o.Propose(t.Context(), data); err != nil {
			t.Fatal(err)
		}
	}
}

// cnode is a node of a control plane whose order is a tape.
type cnode struct {
	*controlplane.Server
	*tape
	source *authority.Source
	given  *tls.Certificate // of its file
}

func newNode(t *testing.T, name string, ca *identity.Authority, change func(*controlplane.Options)) cnode {
	t.Helper()
	return nodeOf(t, name, ca, fileOf(t, name, ca), change)
}

// fileOf is the certificate of a node's file, which stays the same when the node is started again.
func fileOf(t *testing.T, name string, ca *identity.Authority) *tls.Certificate {
	t.Helper()
	leaf, err := identitytest.Leaf(ca, fleet.PrincipalOf(domain, fleet.Node, name), time.Now(), time.Hour)
	ok(t, err)
	return leaf
}

// nodeOf starts a node with the certificate of its file.
func nodeOf(t *testing.T, name string, ca *identity.Authority, leaf *tls.Certificate, change func(*controlplane.Options)) cnode {
	t.Helper()
	o := &tape{order: order{book: book.NewBook()}, lead: "cp-1"}
	opts := controlplane.Options{Name: name, Book: o.book, Consensus: o, KEK: make([]byte, 32), LeafLife: 30 * 24 * time.Hour, Now: time.Now, Log: slog.New(slog.DiscardHandler)}
	if change != nil {
		change(&opts)
	}
	s, err := controlplane.NewServer(opts)
	ok(t, err)
	source, err := s.Authority().NewSource(leaf, identity.Pool([]*x509.Certificate{ca.Cert}))
	ok(t, err)
	return cnode{s, o, source, leaf}
}

func firstCA(t *testing.T) (*identity.Authority, book.Genesis) {
	t.Helper()
	ca, err := identity.NewCA(domain, time.Now(), rand.Reader, identity.DefaultCALife)
	ok(t, err)
	sealed, err := ca.SealKey(make([]byte, 32), rand.Reader)
	ok(t, err)
	return ca, book.Genesis{TrustDomain: domain, Slots: []identity.Slot{{Stage: identity.Active, CertDER: ca.Cert.Raw, SealedKey: sealed}}}
}

func asOperator(t *testing.T) context.Context {
	return api.With(t.Context(), api.Who{Class: api.Operator, Principal: fleet.PrincipalOf(domain, fleet.Operator, "ops")})
}

// prepared announces a CA.
func prepared(t *testing.T, n cnode) string {
	t.Helper()
	res, err := n.Keys().PrepareAuthority(asOperator(t), connect.NewRequest(&controlv1.PrepareAuthorityRequest{}))
	ok(t, err)
	return res.Msg.GetId()
}

// TestANodeThatMissedARetirementComesBack: a node goes down after it was told of a new CA, the new one is activated and the
// old one, whose key is known to others, retired at once. The node makes the right certificate by what the others signed.
func TestANodeThatMissedARetirementComesBack(t *testing.T) {
	ca, genesis := firstCA(t)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	ok(t, err)
	members := func(o *controlplane.Options) {
		o.Members = []book.Member{{Name: "cp-1", API: ln.Addr().String()}, {Name: "cp-2"}}
	}
	up, down := newNode(t, "cp-1", ca, members), newNode(t, "cp-2", ca, members)
	must(t, &up.order, genesis) // in the book of both, under the tape
	must(t, &down.order, genesis)
	old := string(fleet.DigestOf(ca.Cert.Raw))
	id := prepared(t, up)
	down.play(t, up.log)
	for _, name := range []string{"cp-1", "cp-2"} {
		must(t, &up.order, book.NodeBundle{Name: name, Number: 2})
	}
	_, err = up.Keys().ActivateAuthority(asOperator(t), connect.NewRequest(&controlv1.ActivateAuthorityRequest{Id: id}))
	ok(t, err)
	_, err = up.Keys().RetireAuthority(asOperator(t), connect.NewRequest(&controlv1.RetireAuthorityRequest{Id: old}))
	if fault.Of(err) != fault.Conflict || !bytes.Contains([]byte(fault.Text(err)), []byte("node cp-2")) {
		t.Fatalf("retired under a node that is down: %v", err)
	}
	_, err = up.Keys().RetireAuthority(asOperator(t), connect.NewRequest(&controlv1.RetireAuthorityRequest{Id: old, Compromised: true}))
	ok(t, err)

	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 2)
	go func() {
		done <- up.Listener("door", ln, identity.Server(up.source, up.Admit, false, admission.Protocols()...), slog.New(slog.DiscardHandler)).Run(ctx, func() {})
	}()
	calls := func() error { // as raft does: each proves the other
		c, err := (&tls.Dialer{Config: identity.Client(down.source, identity.WantNode(domain, "cp-1"), "h2")}).DialContext(t.Context(), "tcp", ln.Addr().String())
		if err != nil {
			return err
		}
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(20 * time.Second))
		_, err = c.Read(make([]byte, 1)) // of the server's settings: it has taken our certificate
		return err
	}
	if calls() == nil {
		t.Fatal("the two know each other, and nothing is to be shown")
	}
	down.lead = ""
	go func() { done <- down.source.CatchUp(ctx, 10*time.Millisecond) }()
	end := time.Now().Add(30 * time.Second)
	for calls() != nil {
		if time.Now().After(end) {
			t.Fatal("it does not come back")
		}
		time.Sleep(10 * time.Millisecond)
	}
	leaf, err := down.source.Leaf()
	ok(t, err)
	next, err := x509.ParseCertificate(up.book.View().Slots[1].CertDER)
	ok(t, err)
	if leaf.Leaf.CheckSignatureFrom(next) != nil {
		t.Error("its certificate is not of the CA that issues")
	}
	if _, err := ca.Cert.Verify(x509.VerifyOptions{Roots: down.source.Roots(), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}); err == nil {
		t.Error("it still trusts the CA that is known to others")
	}
	cancel()
	for range 2 {
		ok(t, <-done)
	}
}

// TestTheSameRequestGetsTheSameAnswer: who asks again, of whichever node, because an answer was lost, is answered as before.
func TestTheSameRequestGetsTheSameAnswer(t *testing.T) {
	ca, genesis := firstCA(t)
	one := newNode(t, "cp-1", ca, func(o *controlplane.Options) {
		o.Members = []book.Member{{Name: "cp-1"}, {Name: "cp-2"}}
	})
	two := newNode(t, "cp-2", ca, func(o *controlplane.Options) {
		o.Members = []book.Member{{Name: "cp-2"}, {Name: "cp-1"}}
		o.Book, o.Consensus = one.book, one.tape
	})
	must(t, &one.order, genesis)
	prepare := func(n cnode, id string, life int64) (*controlv1.PrepareAuthorityResponse, error) {
		res, err := n.Keys().PrepareAuthority(asOperator(t), connect.NewRequest(&controlv1.PrepareAuthorityRequest{RequestId: id, LifeSeconds: life}))
		if err != nil {
			return nil, err
		}
		return res.Msg, nil
	}
	first, err := prepare(one, "r1", 0)
	ok(t, err)
	again, err := prepare(two, "r1", 0)
	ok(t, err)
	if first.GetId() == "" || first.GetId() != again.GetId() || first.GetBundleNumber() != again.GetBundleNumber() {
		t.Errorf("%v, and then %v", first, again)
	}
	if _, err := prepare(one, "r1", 3600); fault.Of(err) != fault.Conflict {
		t.Errorf("another life under the same request: %v", err)
	}
	if _, err := prepare(one, "r2", 0); fault.Of(err) != fault.Conflict {
		t.Errorf("a second prepared CA: %v", err)
	}
	for _, name := range []string{"cp-1", "cp-2"} {
		must(t, &one.order, book.NodeBundle{Name: name, Number: 2})
	}
	for _, n := range []cnode{one, two, one} {
		_, err := n.Keys().ActivateAuthority(asOperator(t), connect.NewRequest(&controlv1.ActivateAuthorityRequest{RequestId: "r3", Id: first.GetId()}))
		ok(t, err)
	}
	if again, err = prepare(two, "r1", 0); err != nil || again.GetId() != first.GetId() || again.GetBundleNumber() != 2 {
		t.Errorf("after it was activated: %v, %v", again, err)
	}
}

// TestOperatorsRenewalIsOnRecord: who was given a certificate, which, until when; and that one was refused.
func TestOperatorsRenewalIsOnRecord(t *testing.T) {
	ca, genesis := firstCA(t)
	n := newNode(t, "cp-1", ca, func(o *controlplane.Options) { o.Backdate = time.Hour })
	must(t, &n.order, book.GenesisWith{Genesis: genesis, Operator: book.FirstOperator{Name: "ops", Serial: "1", Till: time.Now().Add(time.Hour), Issuer: fleet.DigestOf(ca.Cert.Raw)}})
	ops := api.With(t.Context(), api.Who{Class: api.Operator, Rank: fleet.Admin, Serial: "1", Principal: fleet.PrincipalOf(domain, fleet.Operator, "ops")})
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	ok(t, err)
	csr, err := identity.NewCSR(key, rand.Reader)
	ok(t, err)
	res, err := n.RenewOperator(ops, connect.NewRequest(&controlv1.RenewOperatorRequest{Csr: csr}))
	ok(t, err)
	leaf, err := x509.ParseCertificate(res.Msg.GetCertificate())
	ok(t, err)
	last := func(into any) string {
		var e struct {
			Kind, By string
			Body     json.RawMessage
		}
		ok(t, json.Unmarshal(n.book.Log().Entry(n.book.Log().Size()-1), &e))
		ok(t, json.Unmarshal(e.Body, into))
		return e.Kind + " by " + e.By
	}
	var given book.RenewOperator
	if got := last(&given); got != "operator.renew/1 by "+string(fleet.PrincipalOf(domain, fleet.Operator, "ops")) || given.Name != "ops" || given.Serial != identity.SerialOf(leaf) ||
		!given.Till.Equal(leaf.NotAfter) || given.Issuer != fleet.DigestOf(ca.Cert.Raw) {
		t.Errorf("%s: %+v", got, given)
	}
	if back := time.Since(leaf.NotBefore); back < time.Hour || back > time.Hour+time.Minute {
		t.Errorf("backdated by %s, and the file says an hour", back)
	}
	if own, err := n.source.Leaf(); err != nil || time.Since(own.Leaf.NotBefore) > time.Hour+time.Minute {
		t.Errorf("the node's own certificate is backdated by %s: %v", time.Since(own.Leaf.NotBefore), err)
	}
	if _, err := n.RenewOperator(ops, connect.NewRequest(&controlv1.RenewOperatorRequest{Csr: []byte("none")})); err == nil {
		t.Fatal("a request that is none is granted")
	}
	var no book.Refuse
	if got := last(&no); got != "refused/1 by "+string(fleet.PrincipalOf(domain, fleet.Operator, "ops")) || no.What != "operator.renew" || no.Name != "ops" || no.Reason == "" {
		t.Errorf("%s: %+v", got, no)
	}
}
