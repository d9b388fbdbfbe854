// SPDX-License-Identifier: Apache-2.0

package controlplane_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"net"
	"net/http"
	"strings"
	"sync"
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
	"github.com/demarc-dev/demarc/identity/identitytest"
)

// follow has the node of the gate follow its book, as a running one does.
func (g *gate) follow() {
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { _ = g.server.Follow(ctx, func() {}) })
	g.t.Cleanup(func() { cancel(); wg.Wait() })
}

func (g *gate) operator(name string) *tls.Certificate {
	g.t.Helper()
	cert, err := identitytest.Leaf(g.ca, fleet.PrincipalOf(domain, fleet.Operator, name), time.Now(), time.Hour)
	ok(g.t, err)
	return cert
}

func (g *gate) operators(cert *tls.Certificate) controlv1connect.OperatorServiceClient {
	return controlv1connect.NewOperatorServiceClient(g.caller(cert), "https://"+g.addr)
}

func (g *gate) control(cert *tls.Certificate) controlv1connect.ControlClient {
	return controlv1connect.NewControlClient(g.caller(cert), "https://"+g.addr)
}

func (g *gate) status(cert *tls.Certificate) error {
	_, err := g.control(cert).Status(g.t.Context(), connect.NewRequest(&controlv1.StatusRequest{}))
	if err != nil {
		return api.FromWire("test", err)
	}
	return nil
}

func (g *gate) adds(cert *tls.Certificate, customer string) error {
	_, err := g.control(cert).RegisterCustomer(g.t.Context(), connect.NewRequest(&controlv1.RegisterCustomerRequest{RequestId: rand.Text(), Name: customer}))
	if err != nil {
		return api.FromWire("test", err)
	}
	return nil
}

// invited is an invitation as its holder has it.
type invited struct {
	name string
	key  ed25519.PrivateKey
}

func (g *gate) invite(by *tls.Certificate, name string, role fleet.Rank, valid time.Duration) (invited, error) {
	g.t.Helper()
	pub, priv, err := ed25519.GenerateKey(rand.Reader)
	ok(g.t, err)
	res, err := g.operators(by).InviteOperator(g.t.Context(), connect.NewRequest(&controlv1.InviteOperatorRequest{RequestId: rand.Text(), Name: name, Role: string(role),
		Verifier: pub, ValidSeconds: int64(valid / time.Second)}))
	if err != nil {
		return invited{}, api.FromWire("test", err)
	}
	if res.Msg.GetTrustDomain() != domain || !bytes.Contains(res.Msg.GetLogKey(), []byte("PUBLIC KEY")) {
		g.t.Fatalf("%+v", res.Msg)
	}
	return invited{name, priv}, nil
}

// request is a good acceptance with a key.
func (i invited) request(t *testing.T, key *ecdsa.PrivateKey) *controlv1.AcceptInvitationRequest {
	t.Helper()
	csr, err := identity.NewCSR(key, rand.Reader)
	ok(t, err)
	return &controlv1.AcceptInvitationRequest{Name: i.name, Csr: csr, Verifier: i.key.Public().(ed25519.PublicKey), Proof: identity.SignInvite(i.key, domain, i.name, csr)}
}

func newKey(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	ok(t, err)
	return key
}

func (g *gate) accept(m *controlv1.AcceptInvitationRequest) (*controlv1.AcceptInvitationResponse, error) {
	res, err := controlv1connect.NewOperatorBootstrapClient(g.caller(nil), "https://"+g.addr).AcceptInvitation(g.t.Context(), connect.NewRequest(m))
	if err != nil {
		return nil, api.FromWire("test", err)
	}
	return res.Msg, nil
}

// joins invites and accepts.
func (g *gate) joins(by *tls.Certificate, name string, role fleet.Rank) *tls.Certificate {
	g.t.Helper()
	i, err := g.invite(by, name, role, time.Hour)
	ok(g.t, err)
	key := newKey(g.t)
	res, err := g.accept(i.request(g.t, key))
	ok(g.t, err)
	if res.GetRole() != string(role) {
		g.t.Fatalf("role %q, want %q", res.GetRole(), role)
	}
	return &tls.Certificate{Certificate: [][]byte{res.GetCertificate()}, PrivateKey: key}
}

func (g *gate) record(name string) book.Operator {
	g.t.Helper()
	o, err := g.order.book.View().Operator(name)
	ok(g.t, err)
	return o
}

// last is the newest entry of the audit log.
func (g *gate) last() string {
	log := g.order.book.Log()
	return string(log.Entry(log.Size() - 1))
}

// TestOperatorOfAnOlderBookIsAdopted: a book that an older build began has no operators. The one that it was made with goes
// on as admin; nobody comes in beside it.
func TestOperatorOfAnOlderBookIsAdopted(t *testing.T) {
	g := newGate(t, 0)
	ann := g.operator("ann")
	ok(t, g.knock(ann)) // a handshake adopts nobody
	if n := len(g.order.book.View().Operators()); n != 0 {
		t.Fatalf("%d operators after a handshake", n)
	}
	ok(t, g.adds(ann, "initech"))
	if o := g.record("ann"); o.Role != fleet.Admin || o.Via != book.ViaAdopted || o.Current != identity.SerialOf(ann.Leaf) || o.CurrentIssuer != fleet.DigestOf(g.ca.Cert.Raw) {
		t.Fatalf("%+v", o)
	}
	shut(t, g.knock(g.operator("ben"))) // genuine, of the same CA, and not on record
	shut(t, g.knock(g.operator("ann"))) // so is this, and its serial is not
	ok(t, g.adds(ann, "umbrella"))
}

func TestInvitationMakesAnOperator(t *testing.T) {
	g := newGate(t, 0)
	ann := g.operator("ann")
	ben := g.joins(ann, "ben", fleet.Viewer)
	ok(t, g.status(ben))
	size := g.order.book.Log().Size()
	refusedWith(t, g.adds(ben, "initech"), fault.Denied, "needs the role operator, and yours is viewer")
	if g.order.book.Log().Size() != size+1 || !strings.Contains(g.last(), "operator/ben") || !strings.Contains(g.last(), "RegisterCustomer") {
		t.Fatalf("the refusal is not on record: %s", g.last())
	}
	_, err := g.invite(ben, "eve", fleet.Admin, time.Hour)
	refusedWith(t, err, fault.Denied, "needs the role admin")
	_, err = g.operators(ann).SetOperatorRole(t.Context(), connect.NewRequest(&controlv1.SetOperatorRoleRequest{Name: "ben", Role: "operator"}))
	ok(t, err)
	ok(t, g.adds(ben, "initech")) // from the next call on, over the same certificate
	if !strings.Contains(g.last(), "operator/ben") {
		t.Fatalf("who did it is not on record: %s", g.last())
	}
	res, err := g.operators(ben).ListOperators(t.Context(), connect.NewRequest(&controlv1.ListOperatorsRequest{}))
	ok(t, err)
	if all := res.Msg.GetOperators(); len(all) != 2 || all[1].GetName() != "ben" || all[1].GetStatus() != "active" || all[1].GetBy() != "spiffe://acme.example/operator/ann" || all[1].GetExpiresUnix() == 0 {
		t.Fatalf("%v", all)
	}
}

// TestEnemyHoldsNoInvitation: what a stranger can send in the place of a good acceptance gets it nothing, and is on record.
func TestEnemyHoldsNoInvitation(t *testing.T) {
	g := newGate(t, 0)
	ann := g.operator("ann")
	good, err := g.invite(ann, "ben", fleet.Admin, time.Hour)
	ok(t, err)
	other, err := g.invite(ann, "cat", fleet.Viewer, time.Hour)
	ok(t, err)
	wrong := func(name string) invited {
		_, priv, err := ed25519.GenerateKey(rand.Reader)
		ok(t, err)
		return invited{name, priv}
	}
	with := func(i invited, change func(m *controlv1.AcceptInvitationRequest)) *controlv1.AcceptInvitationRequest {
		m := i.request(t, newKey(t))
		change(m)
		return m
	}
	same := func(*controlv1.AcceptInvitationRequest) {}
	for name, tc := range map[string]struct {
		m    *controlv1.AcceptInvitationRequest
		kind fault.Kind
		want string
	}{
		"another secret":                 {with(wrong("ben"), same), fault.Denied, "no such invitation"},
		"unknown name":                   {with(wrong("eve"), same), fault.Denied, "no such invitation"},
		"an operator with no invitation": {with(wrong("ann"), same), fault.Denied, "no such invitation"},
		"another's invitation":           {with(invited{"ben", other.key}, same), fault.Denied, "no such invitation"},
		"proof of another name":          {with(other, func(m *controlv1.AcceptInvitationRequest) { m.Name = "ben" }), fault.Denied, "not of this invitation"},
		"proof of another key":           {with(good, func(m *controlv1.AcceptInvitationRequest) { m.Csr = good.request(t, newKey(t)).Csr }), fault.Denied, "not of this invitation"},
		"verifier of ben, proof of cat": {with(other, func(m *controlv1.AcceptInvitationRequest) {
			m.Name, m.Verifier = "ben", good.key.Public().(ed25519.PublicKey)
		}), fault.Denied, "not of this invitation"},
		"no proof":      {with(good, func(m *controlv1.AcceptInvitationRequest) { m.Proof = nil }), fault.Invalid, "not that of an invitation"},
		"no verifier":   {with(good, func(m *controlv1.AcceptInvitationRequest) { m.Verifier = nil }), fault.Invalid, "not that of an invitation"},
		"zero verifier": {with(good, func(m *controlv1.AcceptInvitationRequest) { m.Verifier, m.Proof = make([]byte, 32), make([]byte, 64) }), fault.Denied, ""},
		"a CSR that is none": {with(good, func(m *controlv1.AcceptInvitationRequest) {
			m.Csr = []byte("csr")
			m.Proof = identity.SignInvite(good.key, domain, "ben", m.Csr)
		}), fault.Invalid, "not PKCS #10"},
	} {
		t.Run(name, func(t *testing.T) {
			size := g.order.book.Log().Size()
			_, err := g.accept(tc.m)
			refusedWith(t, err, tc.kind, tc.want)
			if g.order.book.Log().Size() != size+1 || !strings.Contains(g.last(), "operator.accept") {
				t.Fatalf("not on record: %s", g.last())
			}
		})
	}
	if o := g.record("ben"); o.Status != book.Invited || o.Current != "" {
		t.Fatalf("%+v", o)
	}
	if _, err := g.accept(&controlv1.AcceptInvitationRequest{Name: "ben", Csr: make([]byte, 40<<10)}); err == nil {
		t.Fatal("more than a stranger may send was taken")
	}
	key := newKey(t)
	_, err = g.accept(good.request(t, key))
	ok(t, err)
}

// TestInvitationIsGoodForOneKey: of many that race with one invitation one gets in; that one may ask again for a lost answer,
// and nobody else, until it renews.
func TestInvitationIsGoodForOneKey(t *testing.T) {
	g := newGate(t, 0)
	ann := g.operator("ann")
	i, err := g.invite(ann, "ben", fleet.Deployer, time.Hour)
	ok(t, err)
	var mu sync.Mutex
	var winner *ecdsa.PrivateKey
	lost := 0
	var wg sync.WaitGroup
	for range 8 {
		key := newKey(t)
		m := i.request(t, key)
		wg.Go(func() {
			_, err := g.accept(m)
			mu.Lock()
			defer mu.Unlock()
			switch {
			case err == nil && winner == nil:
				winner = key
			case errors.Is(err, fault.Denied) && strings.Contains(fault.Text(err), "accepted already"):
				lost++
			default:
				t.Errorf("%v, and somebody won before: %v", err, winner != nil)
			}
		})
	}
	wg.Wait()
	if winner == nil || lost != 7 {
		t.Fatalf("won %v, lost %d", winner != nil, lost)
	}
	first := g.record("ben").Current
	res, err := g.accept(i.request(t, winner))
	ok(t, err)
	cert := &tls.Certificate{Certificate: [][]byte{res.GetCertificate()}, PrivateKey: winner}
	ok(t, g.status(cert))
	if now := g.record("ben").Current; now == first {
		t.Fatal("the certificate of the lost answer still passes")
	}
	_, key := g.renewsOperator(cert)
	if key == nil {
		t.Fatal("no renewal")
	}
	_, err = g.accept(i.request(t, winner))
	refusedWith(t, err, fault.Denied, "no such invitation")
}

// renewsOperator renews over the door.
func (g *gate) renewsOperator(cert *tls.Certificate) (*tls.Certificate, *ecdsa.PrivateKey) {
	g.t.Helper()
	key := newKey(g.t)
	csr, err := identity.NewCSR(key, rand.Reader)
	ok(g.t, err)
	res, err := g.control(cert).RenewOperator(g.t.Context(), connect.NewRequest(&controlv1.RenewOperatorRequest{Csr: csr}))
	ok(g.t, err)
	return &tls.Certificate{Certificate: [][]byte{res.Msg.GetCertificate()}, PrivateKey: key}, key
}

func TestInvitationEnds(t *testing.T) {
	g := newGate(t, 0)
	ann := g.operator("ann")
	for _, valid := range []time.Duration{0, -time.Hour, identity.MaxInviteLife + time.Second} {
		_, err := g.invite(ann, "ben", fleet.Viewer, valid)
		refusedWith(t, err, fault.Invalid, "an invitation")
	}
	i, err := g.invite(ann, "ben", fleet.Viewer, time.Hour)
	ok(t, err)
	again, err := g.invite(ann, "ben", fleet.Viewer, time.Hour) // takes the place of the first
	ok(t, err)
	_, err = g.accept(i.request(t, newKey(t)))
	refusedWith(t, err, fault.Denied, "no such invitation")
	_, err = g.operators(ann).RemoveOperator(t.Context(), connect.NewRequest(&controlv1.RemoveOperatorRequest{Name: "ben"}))
	ok(t, err)
	_, err = g.accept(again.request(t, newKey(t)))
	refusedWith(t, err, fault.Denied, "no such invitation")
}

// TestRenewedOperator: the old certificate passes until the new one is used, and not after.
func TestRenewedOperator(t *testing.T) {
	g := newGate(t, 0)
	g.follow()
	ann := g.operator("ann")
	ok(t, g.status(ann))
	next, _ := g.renewsOperator(ann)
	ok(t, g.status(ann)) // the answer might have been lost
	ok(t, g.knock(next)) // a handshake is not a use
	ok(t, g.status(ann))
	ok(t, g.status(next))
	shut(t, g.knock(ann))
	ok(t, g.status(next))
	if o := g.record("ann"); o.Next != "" || o.Current == identity.SerialOf(ann.Leaf) {
		t.Fatalf("%+v", o)
	}
}

// closing tells when the other side closes.
type closing struct {
	net.Conn
	once   sync.Once
	closed chan struct{}
}

func (c *closing) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	if err != nil {
		c.once.Do(func() { close(c.closed) })
	}
	return n, err
}

// TestBannedOperatorIsCutOff: a ban closes the connection that is open, and no other comes up; others are left alone.
func TestBannedOperatorIsCutOff(t *testing.T) {
	g := newGate(t, 0)
	g.follow()
	ann := g.operator("ann")
	ben, cat := g.joins(ann, "ben", fleet.Admin), g.joins(ann, "cat", fleet.Viewer)
	connected := func(cert *tls.Certificate) *closing {
		c := &closing{closed: make(chan struct{})}
		client := g.caller(cert)
		client.Transport.(*http.Transport).DialContext = func(ctx context.Context, network, addr string) (net.Conn, error) {
			conn, err := new(net.Dialer).DialContext(ctx, network, addr)
			c.Conn = conn
			return c, err
		}
		_, err := controlv1connect.NewControlClient(client, "https://"+g.addr).Status(t.Context(), connect.NewRequest(&controlv1.StatusRequest{}))
		ok(t, err)
		return c
	}
	bens, cats := connected(ben), connected(cat)
	_, err := g.operators(ann).BanOperator(t.Context(), connect.NewRequest(&controlv1.BanOperatorRequest{Name: "ben", Reason: "laptop stolen"}))
	ok(t, err)
	select {
	case <-bens.closed:
	case <-time.After(20 * time.Second):
		t.Fatal("the banned operator's connection is still open")
	}
	select {
	case <-cats.closed:
		t.Fatal("another operator was cut off")
	default:
	}
	shut(t, g.knock(ben))
	ok(t, g.status(cat))
	_, err = g.invite(ann, "ben", fleet.Admin, time.Hour)
	refusedWith(t, err, fault.Conflict, "banned: remove it first")
}

// TestRefusalsDoNotFillTheLog: who is refused over and over gets a bounded place in the log.
func TestRefusalsDoNotFillTheLog(t *testing.T) {
	g := newGate(t, 0)
	ann := g.operator("ann")
	ben := g.joins(ann, "ben", fleet.Viewer)
	size, began := g.order.book.Log().Size(), time.Now()
	c := g.control(ben)
	for range 300 {
		_, err := c.RegisterCustomer(t.Context(), connect.NewRequest(&controlv1.RegisterCustomerRequest{Name: "initech"}))
		refusedWith(t, api.FromWire("test", err), fault.Denied, "needs the role")
	}
	most := 5 + int64(time.Since(began)/(4*time.Second)) + 1
	if n := g.order.book.Log().Size() - size; n < 5 || n > most {
		t.Fatalf("300 refusals made %d entries, want 5 to %d", n, most)
	}
	for !strings.Contains(g.last(), "refusals before this one") {
		if time.Since(began) > time.Minute {
			t.Fatalf("what was left out is not counted: %s", g.last())
		}
		_, err := c.RegisterCustomer(t.Context(), connect.NewRequest(&controlv1.RegisterCustomerRequest{Name: "initech"}))
		refusedWith(t, api.FromWire("test", err), fault.Denied, "needs the role")
	}
	ok(t, g.adds(ann, "initech")) // and nobody else is held up
}

// TestWhoIsNobodyDoesNotFillTheLog: nor does one whose invitation is refused, or whose certificate is worth nothing any more.
func TestWhoIsNobodyDoesNotFillTheLog(t *testing.T) {
	g := newGate(t, 0)
	ann := g.operator("ann")
	ben := g.joins(ann, "ben", fleet.Viewer)
	_, err := g.operators(ann).BanOperator(t.Context(), connect.NewRequest(&controlv1.BanOperatorRequest{Name: "ben", Reason: "laptop stolen"}))
	ok(t, err)
	for name, c := range map[string]struct {
		try         func()
		burst, each int64 // so many entries at once, and one more in so many seconds
	}{
		"refused invitation": {func() {
			if _, err := g.accept(&controlv1.AcceptInvitationRequest{Name: "cat"}); fault.Of(err) != fault.Invalid {
				t.Fatalf("an empty request is answered with %v", err)
			}
		}, 64, 1},
		"banned operator": {func() { shut(t, g.knock(ben)) }, 5, 4},
	} {
		t.Run(name, func(t *testing.T) {
			size, began := g.order.book.Log().Size(), time.Now()
			for range 90 {
				c.try()
			}
			most := c.burst + int64(time.Since(began)/time.Second)/c.each + 1
			if n := g.order.book.Log().Size() - size; n == 0 || n > most {
				t.Fatalf("90 tries made %d entries, want at most %d", n, most)
			}
		})
	}
}

// TestRetiringACANamesItsOperators: a CA is not retired under operators who use its certificates.
func TestRetiringACANamesItsOperators(t *testing.T) {
	g := newGate(t, 0)
	ann := g.operator("ann")
	g.joins(ann, "ben", fleet.Viewer)
	old := fleet.DigestOf(g.ca.Cert.Raw)
	res, err := g.control(ann).PrepareAuthority(t.Context(), connect.NewRequest(&controlv1.PrepareAuthorityRequest{}))
	ok(t, err)
	submitAs(g, book.ActivateCA{ID: fleet.Digest(res.Msg.GetId()), Without: []string{"ann", "ben"}})
	pool, err := identity.Bundle(g.order.book.View().Slots)
	ok(t, err)
	g.own.pool.Store(pool)
	next, _ := g.renewsOperator(ann)
	ok(t, g.status(next))
	_, err = g.control(next).RetireAuthority(t.Context(), connect.NewRequest(&controlv1.RetireAuthorityRequest{Id: string(old)}))
	refusedWith(t, api.FromWire("test", err), fault.Conflict, "1 still use certificates of CA "+old.Short()+": operator ben; wait")
	_, err = g.control(next).RetireAuthority(t.Context(), connect.NewRequest(&controlv1.RetireAuthorityRequest{Id: string(old), Compromised: true}))
	ok(t, err)
}
