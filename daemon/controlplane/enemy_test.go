// SPDX-License-Identifier: Apache-2.0

package controlplane_test

import (
	"bytes"
	"compress/gzip"
	"context"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"

	"github.com/demarc-dev/demarc/api"
	boundaryv1 "github.com/demarc-dev/demarc/api/boundary/v1"
	"github.com/demarc-dev/demarc/api/boundary/v1/boundaryv1connect"
	controlv1 "github.com/demarc-dev/demarc/api/control/v1"
	"github.com/demarc-dev/demarc/api/control/v1/controlv1connect"
	"github.com/demarc-dev/demarc/daemon/controlplane"
	"github.com/demarc-dev/demarc/daemon/controlplane/admission"
	"github.com/demarc-dev/demarc/daemon/controlplane/book"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/identity"
	"github.com/demarc-dev/demarc/identity/identitytest"
	"github.com/demarc-dev/demarc/ledger"
	"github.com/demarc-dev/demarc/seal"
)

// The enemies of these tests stand before the real door: TLS, HTTP/2, the handlers and the book are those of a node.

const domain = "acme.example"

// serial is an order that many may use at once.
type serialOrder struct {
	mu sync.Mutex
	order
}

func (o *serialOrder) Propose(ctx context.Context, data []byte) ([]byte, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.order.Propose(ctx, data)
}
func (o *serialOrder) Read(context.Context) error { return nil }
func (o *serialOrder) Leader() string             { return "cp-1" }

// roots is a certificate and CAs that a test may change under way.
type roots struct {
	leaf *tls.Certificate
	pool atomic.Pointer[x509.CertPool]
}

func (r *roots) Leaf() (*tls.Certificate, error) { return r.leaf, nil }
func (r *roots) Roots() *x509.CertPool           { return r.pool.Load() }

// gate is one node with its door open on loopback.
type gate struct {
	t      *testing.T
	addr   string
	ca     *identity.Authority
	own    *roots
	order  *serialOrder
	server *controlplane.Server
	issuer *identitytest.Issuer
}

func newGate(t *testing.T, wait time.Duration) *gate { return newGateFor(t, wait, false) }

// newGateFor may be a gate of a trust domain that was made for development.
func newGateFor(t *testing.T, wait time.Duration, development bool) *gate {
	t.Helper()
	g := &gate{t: t, order: &serialOrder{order: order{book: book.NewBook()}}}
	var err error
	now := time.Now()
	g.ca, err = identity.NewCA(domain, now, rand.Reader, identity.DefaultCALife)
	ok(t, err)
	kek := bytes.Repeat([]byte{7}, 32)
	sealed, err := g.ca.SealKey(kek, rand.Reader)
	ok(t, err)
	leaf, err := identitytest.Leaf(g.ca, fleet.PrincipalOf(domain, fleet.Node, "cp-1"), now, time.Hour)
	ok(t, err)
	g.own = &roots{leaf: leaf}
	g.own.pool.Store(identity.Pool([]*x509.Certificate{g.ca.Cert}))
	g.issuer, err = identitytest.NewIssuer("https://cluster.example")
	ok(t, err)
	expect, err := json.Marshal(g.issuer.Expect("demarc", "appliance"))
	ok(t, err)
	log := slog.New(slog.DiscardHandler)
	g.server, err = controlplane.NewServer(controlplane.Options{Name: "cp-1", Book: g.order.book, Consensus: g.order, KEK: kek,
		LeafLife: time.Hour, Now: time.Now, Log: log, StrangerWait: wait})
	ok(t, err)
	submitAs(g, book.Genesis{TrustDomain: domain, Development: development, Slots: []identity.Slot{{Stage: identity.Active, CertDER: g.ca.Cert.Raw, SealedKey: sealed}}})
	submitAs(g, book.RegisterCustomer{Name: "globex"})
	submitAs(g, book.RegisterAppliance{Name: "eu-1", Customer: "globex", Expect: expect})
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	ok(t, err)
	g.addr = ln.Addr().String()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	part := g.server.Listener("door", ln, identity.Server(g.own, g.server.Admit, false, admission.Protocols()...), log)
	go func() { done <- part.Run(ctx, func() {}) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return g
}

func ok(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func submitAs[R any](g *gate, c ledger.Change[book.State, R]) R {
	g.t.Helper()
	r, err := ledger.Submit(g.t.Context(), g.order, ledger.Meta{At: time.Now(), By: "test", Request: fleet.RequestID(rand.Text())}, c)
	ok(g.t, err)
	return r
}

// caller is a client of the door that shows a certificate, or none.
func (g *gate) caller(cert *tls.Certificate) *http.Client {
	conf := identity.Client(identity.Fixed(nil, identity.Pool([]*x509.Certificate{g.ca.Cert})), identity.WantNode(domain), "h2")
	if cert != nil { // crypto/tls would hold back a certificate that the door's CA list does not fit
		conf.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return cert, nil }
	}
	tr := &http.Transport{TLSClientConfig: conf, ForceAttemptHTTP2: true}
	g.t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr}
}

func (g *gate) bootstrap(c *http.Client) boundaryv1connect.BootstrapClient {
	return boundaryv1connect.NewBootstrapClient(c, "https://"+g.addr)
}

// request is a good enrolment for a fresh nonce and a fresh key.
func (g *gate) request(log ed25519.PublicKey) (*boundaryv1.EnrolRequest, *ecdsa.PrivateKey) {
	g.t.Helper()
	ch, err := g.bootstrap(g.caller(nil)).Challenge(g.t.Context(), connect.NewRequest(&boundaryv1.ChallengeRequest{}))
	ok(g.t, err)
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	ok(g.t, err)
	csr, err := identity.NewCSR(key, rand.Reader)
	ok(g.t, err)
	audience, err := identity.Audience(domain, ch.Msg.GetNonce(), csr)
	ok(g.t, err)
	token, err := g.issuer.Token("demarc", "appliance", audience, time.Now())
	ok(g.t, err)
	k, err := seal.KeyOf(log)
	ok(g.t, err)
	return &boundaryv1.EnrolRequest{Appliance: "eu-1", Nonce: ch.Msg.GetNonce(), Csr: csr, Token: token, LogKey: k.PEM()}, key
}

func (g *gate) enrol(m *boundaryv1.EnrolRequest) (*boundaryv1.EnrolResponse, error) {
	res, err := g.bootstrap(g.caller(nil)).Enrol(g.t.Context(), connect.NewRequest(m))
	if err != nil {
		return nil, api.FromWire("test", err)
	}
	return res.Msg, nil
}

// enrolled gives the certificate of a real enrolment.
func (g *gate) enrolled(log ed25519.PublicKey) *tls.Certificate {
	g.t.Helper()
	m, key := g.request(log)
	res, err := g.enrol(m)
	ok(g.t, err)
	return &tls.Certificate{Certificate: [][]byte{res.GetCertificate()}, PrivateKey: key}
}

func logKey(t *testing.T) ed25519.PublicKey {
	t.Helper()
	pub, _, err := ed25519.GenerateKey(rand.Reader)
	ok(t, err)
	return pub
}

// renews tells what a holder of the certificate gets who asks for the next one.
func (g *gate) renews(cert *tls.Certificate) error {
	g.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	ok(g.t, err)
	csr, err := identity.NewCSR(key, rand.Reader)
	ok(g.t, err)
	_, err = boundaryv1connect.NewBoundaryClient(g.caller(cert), "https://"+g.addr).Renew(g.t.Context(), connect.NewRequest(&boundaryv1.RenewRequest{Csr: csr}))
	return err
}

// knock does a handshake with a certificate and reads what the door says first: in TLS 1.3 a client learns only then that
// it was refused.
func (g *gate) knock(cert *tls.Certificate) error {
	g.t.Helper()
	conf := identity.Client(identity.Fixed(nil, identity.Pool([]*x509.Certificate{g.ca.Cert})), identity.WantNode(domain), "h2")
	conf.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return cert, nil }
	c, err := (&tls.Dialer{Config: conf}).DialContext(g.t.Context(), "tcp", g.addr)
	ok(g.t, err)
	defer c.Close()
	ok(g.t, c.SetDeadline(time.Now().Add(20*time.Second)))
	_, err = c.Read(make([]byte, 1))
	return err
}

func shut(t *testing.T, err error) {
	t.Helper()
	if err == nil || !strings.Contains(err.Error(), "remote error: tls") {
		t.Fatalf("met with %v, want the door shut in the handshake", err)
	}
}

func refusedWith(t *testing.T, err error, k fault.Kind, sentence string) {
	t.Helper()
	if fault.Of(err) != k || !strings.Contains(fault.Text(err), sentence) {
		t.Fatalf("%v (%s), want %s: %q", err, fault.Of(err), k, sentence)
	}
}

// TestEnemyReplaysANonce: of many that race with one proof one gets a certificate, and afterwards nobody does.
func TestEnemyReplaysANonce(t *testing.T) {
	g := newGate(t, 0)
	m, _ := g.request(logKey(t))
	var wg sync.WaitGroup
	var won, lost atomic.Int32
	for range 8 {
		wg.Go(func() {
			_, err := g.enrol(m)
			switch {
			case err == nil:
				won.Add(1)
			case errors.Is(err, fault.Denied) && strings.Contains(fault.Text(err), "nonce was used before"):
				lost.Add(1)
			default:
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if won.Load() != 1 || lost.Load() != 7 {
		t.Fatalf("%d won with one nonce, %d were refused", won.Load(), lost.Load())
	}
}

// TestEnemyBringsAnothersProof: a token is worth nothing with another key, another nonce or another name.
func TestEnemyBringsAnothersProof(t *testing.T) {
	g := newGate(t, 0)
	log := logKey(t)
	mine, _ := g.request(log)
	theirs, _ := g.request(log)
	for name, m := range map[string]*boundaryv1.EnrolRequest{
		"another key":   {Appliance: "eu-1", Nonce: mine.Nonce, Csr: theirs.Csr, Token: mine.Token, LogKey: mine.LogKey},
		"another nonce": {Appliance: "eu-1", Nonce: theirs.Nonce, Csr: mine.Csr, Token: mine.Token, LogKey: mine.LogKey},
	} {
		_, err := g.enrol(m)
		t.Run(name, func(t *testing.T) { refusedWith(t, err, fault.Denied, "audience") })
	}
	_, err := g.enrol(&boundaryv1.EnrolRequest{Appliance: "eu-2", Nonce: mine.Nonce, Csr: mine.Csr, Token: mine.Token, LogKey: mine.LogKey})
	refusedWith(t, err, fault.NotFound, "no appliance is registered")
	other := "A" // of the random part, so that the nonce is one of ours in every respect but who drew it
	if mine.Nonce[16:17] == other {
		other = "B"
	}
	forged := mine.Nonce[:16] + other + mine.Nonce[17:]
	_, err = g.enrol(&boundaryv1.EnrolRequest{Appliance: "eu-1", Nonce: forged, Csr: mine.Csr, Token: mine.Token, LogKey: mine.LogKey})
	refusedWith(t, err, fault.Denied, "nonce was not drawn here")
}

// TestEnemyWasBanned: its certificate opens no door, and its platform's proof gets it no other; both are told why.
func TestEnemyWasBanned(t *testing.T) {
	g := newGate(t, 0)
	log := logKey(t)
	cert := g.enrolled(log)
	ok(t, g.renews(cert))
	submitAs(g, book.Ban{Name: "eu-1", Reason: "stolen"})
	shut(t, g.knock(cert))
	m, _ := g.request(log)
	_, err := g.enrol(m)
	refusedWith(t, err, fault.Denied, "is banned")
}

// TestEnemyIsOfAnotherTrustDomain: another domain's CA, even one that this node were to trust by mistake, makes nobody here.
func TestEnemyIsOfAnotherTrustDomain(t *testing.T) {
	g := newGate(t, 0)
	g.enrolled(logKey(t))
	foreign, err := identity.NewCA("evil.example", time.Now(), rand.Reader, time.Hour)
	ok(t, err)
	cert, err := identitytest.Leaf(foreign, fleet.PrincipalOf("evil.example", fleet.Appliance, "eu-1"), time.Now(), time.Hour)
	ok(t, err)
	for _, pool := range []*x509.CertPool{identity.Pool([]*x509.Certificate{g.ca.Cert}), identity.Pool([]*x509.Certificate{g.ca.Cert, foreign.Cert})} {
		g.own.pool.Store(pool)
		shut(t, g.knock(cert))
	}
}

// TestEnemyHasTheRetiredCA: a tainted CA's certificates pass until it is retired, and then none does, however genuine.
func TestEnemyHasTheRetiredCA(t *testing.T) {
	g := newGate(t, 0)
	cert := g.enrolled(logKey(t))
	next, err := identity.NewCA(domain, time.Now(), rand.Reader, time.Hour)
	ok(t, err)
	slots, err := identity.Prepare(g.order.book.View().Slots, next.Cert.Raw, []byte("sealed"))
	ok(t, err)
	slots, err = identity.Activate(slots, slots[1].ID())
	ok(t, err)
	pool, err := identity.Bundle(slots)
	ok(t, err)
	g.own.pool.Store(pool)
	ok(t, g.knock(cert))
	ok(t, g.renews(cert))
	slots, err = identity.Retire(slots, slots[0].ID())
	ok(t, err)
	pool, err = identity.Bundle(slots)
	ok(t, err)
	g.own.pool.Store(pool)
	shut(t, g.knock(cert))
}

// endless says the same byte for ever and counts what was taken.
type endless struct{ taken atomic.Int64 }

func (e *endless) Read(b []byte) (int, error) {
	e.taken.Add(int64(len(b)))
	for i := range b {
		b[i] = 'A'
	}
	return len(b), nil
}

func (g *gate) post(body io.Reader, length int64, head ...string) (*http.Response, error) {
	req, err := http.NewRequestWithContext(g.t.Context(), http.MethodPost, "https://"+g.addr+boundaryv1connect.BootstrapEnrolProcedure, body)
	ok(g.t, err)
	req.ContentLength = length
	req.Header.Set("Content-Type", "application/proto")
	for i := 0; i+1 < len(head); i += 2 {
		req.Header.Set(head[i], head[i+1])
	}
	res, err := g.caller(nil).Do(req)
	if err == nil {
		g.t.Cleanup(func() { res.Body.Close() })
	}
	return res, err
}

// TestEnemySendsTooMuch: announced, unannounced or packed, a stranger's message ends at the same bound.
func TestEnemySendsTooMuch(t *testing.T) {
	g := newGate(t, 0)
	var packed bytes.Buffer
	z := gzip.NewWriter(&packed)
	whole, err := proto.Marshal(&boundaryv1.EnrolRequest{Nonce: strings.Repeat("A", 16<<20)}) // nothing but its size is wrong with it
	ok(t, err)
	_, err = z.Write(whole)
	ok(t, err)
	ok(t, z.Close())
	for name, tc := range map[string]struct {
		body   io.Reader
		length int64
		head   []string
	}{
		"announced":   {&endless{}, 1 << 30, nil},
		"unannounced": {&endless{}, -1, nil},
		"packed":      {bytes.NewReader(packed.Bytes()), int64(packed.Len()), []string{"Content-Encoding", "gzip"}},
	} {
		t.Run(name, func(t *testing.T) {
			res, err := g.post(tc.body, tc.length, tc.head...)
			if err == nil && res.StatusCode == http.StatusOK {
				t.Fatal("it was taken")
			}
			if name == "packed" {
				ok(t, err)
				if b, _ := io.ReadAll(res.Body); !bytes.Contains(b, []byte("resource_exhausted")) {
					t.Fatalf("%s %s: it was unpacked", res.Status, b)
				}
			}
			if e, is := tc.body.(*endless); is && e.taken.Load() > 8<<20 { // HTTP/2 windows, not the message
				t.Fatalf("%d bytes were taken", e.taken.Load())
			}
		})
	}
	if n := g.order.book.View().Appliances()[0].Status; n != book.Registered {
		t.Fatal(n)
	}
}

// TestEnemyIsSlow: who begins a message and does not end it is hung up on, and others are served meanwhile.
func TestEnemyIsSlow(t *testing.T) {
	g := newGate(t, 300*time.Millisecond)
	r, w := io.Pipe()
	defer w.Close()
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		res, err := g.post(r, 1000)
		if err == nil && res.StatusCode == http.StatusOK {
			t.Error("half a message was taken for a whole one")
		}
	}()
	_, err := w.Write([]byte("A"))
	ok(t, err)
	m, _ := g.request(logKey(t)) // another stranger is served while that one is held
	_, err = g.enrol(m)
	ok(t, err)
	select {
	case <-ended:
	case <-time.After(20 * time.Second):
		t.Fatal("a stranger who says nothing still holds its call")
	}
}

// TestNoOperatorRetiresTheirOwnCA: who calls is the one who is sure to be left, compromised or not.
func TestNoOperatorRetiresTheirOwnCA(t *testing.T) {
	g := newGate(t, 0)
	old := fleet.DigestOf(g.ca.Cert.Raw)
	next, err := identity.NewCA(domain, time.Now(), rand.Reader, time.Hour)
	ok(t, err)
	submitAs(g, book.PrepareCA{Cert: next.Cert.Raw, SealedKey: []byte("sealed")})
	submitAs(g, book.ActivateCA{ID: fleet.DigestOf(next.Cert.Raw)})
	g.own.pool.Store(identity.Pool([]*x509.Certificate{g.ca.Cert, next.Cert}))
	certs := map[*identity.Authority]*tls.Certificate{}
	for _, by := range []*identity.Authority{g.ca, next} {
		certs[by], err = identitytest.Leaf(by, fleet.PrincipalOf(domain, fleet.Operator, "ann"), time.Now(), time.Hour)
		ok(t, err)
	}
	retire := func(by *identity.Authority) error {
		_, err = controlv1connect.NewControlClient(g.caller(certs[by]), "https://"+g.addr).RetireAuthority(t.Context(),
			connect.NewRequest(&controlv1.RetireAuthorityRequest{Id: string(old), Compromised: true}))
		return api.FromWire("test", err)
	}
	refusedWith(t, retire(g.ca), fault.Conflict, "demarc operator renew")
	submitAs(g, book.RenewOperator{Name: "ann", Using: identity.SerialOf(certs[g.ca].Leaf), Serial: identity.SerialOf(certs[next].Leaf),
		Till: certs[next].Leaf.NotAfter, Issuer: fleet.DigestOf(next.Cert.Raw)})
	ok(t, retire(next))
}
