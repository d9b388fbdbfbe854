// SPDX-License-Identifier: Apache-2.0

package controlplane_test

import (
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"io"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/net/http2"

	"github.com/demarc-dev/demarc/api"
	boundaryv1 "github.com/demarc-dev/demarc/api/boundary/v1"
	"github.com/demarc-dev/demarc/api/channel"
	controlv1 "github.com/demarc-dev/demarc/api/control/v1"
	"github.com/demarc-dev/demarc/daemon/controlplane"
	"github.com/demarc-dev/demarc/daemon/controlplane/book"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/identity"
	"github.com/demarc-dev/demarc/identity/identitytest"
)

// forged is what one makes who has the key of a CA and has seen a certificate: the same in all, its serial number included, but for the
// key, which is their own.
func forged(t *testing.T, ca *identity.Authority, of *tls.Certificate) *tls.Certificate {
	t.Helper()
	like, err := x509.ParseCertificate(of.Certificate[0])
	ok(t, err)
	key := newKey(t)
	der, err := x509.CreateCertificate(rand.Reader, like, ca.Cert, &key.PublicKey, ca.Key)
	ok(t, err)
	return &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// holds opens a connection with a certificate, for calls or for a channel, and reads it until it ends.
func (g *gate) holds(cert *tls.Certificate, proto string) (ended chan struct{}) {
	g.t.Helper()
	conf := identity.Client(identity.Fixed(nil, identity.Pool([]*x509.Certificate{g.ca.Cert})), identity.WantNode(domain), proto)
	conf.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return cert, nil }
	c, err := (&tls.Dialer{Config: conf}).DialContext(g.t.Context(), "tcp", g.addr)
	ok(g.t, err)
	g.t.Cleanup(func() { _ = c.Close() })
	if proto == channel.Proto {
		ok(g.t, channel.Write(c, &boundaryv1.Up{Body: &boundaryv1.Up_Hello{Hello: &boundaryv1.Hello{Route: "https"}}}, channel.MaxHello))
		var down boundaryv1.Down
		ok(g.t, channel.Read(c, &down, channel.MaxDown))
		if down.GetWelcome() == nil {
			g.t.Fatalf("the channel begins with %v", &down)
		}
		ended = make(chan struct{})
		go func() { defer close(ended); _, _ = io.Copy(io.Discard, c) }()
		return ended
	}
	w := &closing{Conn: c, closed: make(chan struct{})}
	h, err := (&http2.Transport{}).NewClientConn(w) // it answers pings: the connection stays as long as the server lets it
	ok(g.t, err)
	ok(g.t, h.Ping(g.t.Context()))
	return w.closed
}

// turnCA prepares another CA and has it issue.
func (g *gate) turnCA(by *tls.Certificate) {
	g.t.Helper()
	res, err := g.control(by).PrepareAuthority(g.t.Context(), connect.NewRequest(&controlv1.PrepareAuthorityRequest{}))
	ok(g.t, err)
	g.trusts()
	c := book.ActivateCA{ID: fleet.Digest(res.Msg.GetId())}
	for _, o := range g.order.book.View().Operators() {
		c.Without = append(c.Without, o.Name)
	}
	submitAs(g, c)
	g.trusts()
}

// trusts has the door trust the CAs of the book, as a node's does.
func (g *gate) trusts() {
	g.t.Helper()
	pool, err := identity.Bundle(g.order.book.View().Slots)
	ok(g.t, err)
	g.own.pool.Store(pool)
}

// TestACompromisedCAEndsWhatIsOpen (FAULTS.md I2): at once, of each kind, whoever holds it; and nothing of its issue is renewed. Whoever
// has the key of that CA and no more could never be an operator or an appliance, since a certificate counts for its key.
func TestACompromisedCAEndsWhatIsOpen(t *testing.T) {
	g := newGate(t, 0)
	g.follow()
	first := g.operator("ann")
	ben, cat := g.joins(first, "ben", fleet.Admin), g.joins(first, "cat", fleet.Viewer)
	eu1 := g.enrolled(logKey(t))
	old := fleet.DigestOf(g.ca.Cert.Raw)
	g.turnCA(first)
	ann, _ := g.renewsOperator(first)
	ok(t, g.status(ann))
	node, err := identitytest.Leaf(g.ca, fleet.PrincipalOf(domain, fleet.Node, "cp-2"), time.Now(), time.Hour) // of no node that there is
	ok(t, err)

	for name, cert := range map[string]*tls.Certificate{"operator": forged(t, g.ca, ben), "renewed operator": forged(t, g.ca, ann), "appliance": forged(t, g.ca, eu1)} {
		t.Run("forged "+name, func(t *testing.T) { shut(t, g.knock(cert)) })
	}
	open := map[string]chan struct{}{"operator": g.holds(ben, "h2"), "node": g.holds(node, "h2"), "appliance's calls": g.holds(eu1, "h2"), "appliance's channel": g.holds(eu1, channel.Proto)}
	renewed := g.holds(ann, "h2")
	for name, ended := range open {
		select {
		case <-ended:
			t.Fatalf("%s: ended before the CA was retired", name)
		default:
		}
	}
	_, err = g.control(ann).RetireAuthority(t.Context(), connect.NewRequest(&controlv1.RetireAuthorityRequest{Id: string(old), Compromised: true}))
	ok(t, err)
	g.trusts()
	for name, ended := range open {
		select {
		case <-ended:
		case <-time.After(20 * time.Second):
			t.Errorf("%s: the connection is still open", name)
		}
	}
	select {
	case <-renewed:
		t.Error("the connection of an operator whose certificate is of the new CA was ended")
	default:
	}
	for _, cert := range []*tls.Certificate{ben, cat, node, eu1} {
		shut(t, g.knock(cert))
	}

	// On a connection that is not ended yet, too, nothing more is given.
	csr, err := identity.NewCSR(newKey(t), rand.Reader)
	ok(t, err)
	as := func(role fleet.Role, name string, cert *tls.Certificate) api.Who {
		leaf, err := x509.ParseCertificate(cert.Certificate[0])
		ok(t, err)
		p := fleet.PrincipalOf(domain, role, name)
		return api.Who{Class: api.ClassOf(p), Principal: p, Serial: identity.SerialOf(leaf), Issuer: old, Rank: fleet.Admin}
	}
	_, err = g.server.RenewOperator(api.With(t.Context(), as(fleet.Operator, "ben", ben)), connect.NewRequest(&controlv1.RenewOperatorRequest{Csr: csr}))
	refusedWith(t, err, fault.Denied, "retired")
	_, err = g.server.Renew(api.With(t.Context(), as(fleet.Appliance, "eu-1", eu1)), connect.NewRequest(&boundaryv1.RenewRequest{Csr: csr}))
	refusedWith(t, err, fault.Denied, "")

	// The way back of each: another proof, under the same name.
	if o := g.record("ben"); o.Current != "" || o.Next != "" || o.Role != fleet.Admin {
		t.Errorf("%+v", o)
	}
	again := g.joins(ann, "ben", fleet.Admin)
	ok(t, g.status(again))
	log, err := g.order.book.View().Appliance("eu-1")
	ok(t, err)
	if log.Current != "" || log.Status != book.Enrolled {
		t.Errorf("%+v", log)
	}
}

// TestACAIsRetiredForOpenConnectionsOfNodesToo: the rule by which connections between nodes are looked at, in either direction.
func TestACAIsRetiredForOpenConnectionsOfNodesToo(t *testing.T) {
	g := newGate(t, 0)
	ann := g.operator("ann")
	ok(t, g.status(ann))
	leaf, err := identitytest.Leaf(g.ca, fleet.PrincipalOf(domain, fleet.Node, "cp-2"), time.Now(), time.Hour)
	ok(t, err)
	g.turnCA(ann)
	ok(t, controlplane.RetiredLeaf(g.order.book.View(), leaf.Leaf))
	submitAs(g, book.RetireCA{ID: fleet.DigestOf(g.ca.Cert.Raw), Compromised: true})
	refusedWith(t, controlplane.RetiredLeaf(g.order.book.View(), leaf.Leaf), fault.Denied, "retired")
	other, err := identity.NewCA(domain, time.Now(), rand.Reader, time.Hour)
	ok(t, err)
	leaf, err = identitytest.Leaf(other, fleet.PrincipalOf(domain, fleet.Node, "cp-2"), time.Now(), time.Hour)
	ok(t, err)
	ok(t, controlplane.RetiredLeaf(g.order.book.View(), leaf.Leaf)) // this node may be behind
}

// TestSerialNamesTheKey: two certificates of one serial number are not one certificate.
func TestSerialNamesTheKey(t *testing.T) {
	ca, _ := firstCA(t)
	one, err := identitytest.Leaf(ca, fleet.PrincipalOf(domain, fleet.Operator, "ann"), time.Now(), time.Hour)
	ok(t, err)
	two, err := x509.ParseCertificate(forged(t, ca, one).Certificate[0])
	ok(t, err)
	if one.Leaf.SerialNumber.Cmp(two.SerialNumber) != 0 || one.Leaf.PublicKey.(*ecdsa.PublicKey).Equal(two.PublicKey) {
		t.Fatal("the second is not what one forges who has the CA's key")
	}
	a, b := identity.SerialOf(one.Leaf), identity.SerialOf(two)
	if a == b || !strings.HasPrefix(string(a), one.Leaf.SerialNumber.Text(16)+".") || len(a) > 80 {
		t.Errorf("%q and %q", a, b)
	}
}
