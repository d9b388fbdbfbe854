// SPDX-License-Identifier: Apache-2.0

package controlplane_test

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"

	boundaryv1 "github.com/demarc-dev/demarc/api/boundary/v1"
	"github.com/demarc-dev/demarc/api/boundary/v1/boundaryv1connect"
	"github.com/demarc-dev/demarc/api/channel"
	"github.com/demarc-dev/demarc/daemon/controlplane"
	"github.com/demarc-dev/demarc/daemon/controlplane/admission"
	"github.com/demarc-dev/demarc/daemon/controlplane/book"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/identity"
	"github.com/demarc-dev/demarc/identity/identitytest"
	"github.com/demarc-dev/demarc/ledger"
)

// line is an order for a server: one proposal at a time.
type line struct {
	mu sync.Mutex
	order
}

func (l *line) Propose(ctx context.Context, data []byte) ([]byte, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.order.Propose(ctx, data)
}
func (*line) Read(context.Context) error { return nil }
func (*line) Leader() string             { return "cp-1" }

// house is a server with one open door.
type house struct {
	t    *testing.T
	ca   *identity.Authority
	line *line
	addr string // of the present node

	set    func(*controlplane.Options)
	server *controlplane.Server
	end    func()
}

func open(t *testing.T) *house {
	t.Helper()
	return openWith(t, func(*controlplane.Options) {})
}

func openWith(t *testing.T, set func(*controlplane.Options)) *house {
	t.Helper()
	now := time.Now()
	ca, err := identity.NewCA("acme.example", now, rand.Reader, identity.DefaultCALife)
	if err != nil {
		t.Fatal(err)
	}
	h := &house{t: t, ca: ca, line: &line{order: order{book: book.NewBook()}}}
	submitTo(t, h, book.Genesis{TrustDomain: "acme.example", Slots: []identity.Slot{{Stage: identity.Active, CertDER: ca.Cert.Raw, SealedKey: []byte("k")}}})
	submitTo(t, h, book.RegisterCustomer{Name: "globex"})
	h.set = set
	h.start()
	t.Cleanup(func() { h.stop() })
	return h
}

// start opens the door of a node, at another address each time.
func (h *house) start() {
	t := h.t
	t.Helper()
	log := slog.New(slog.DiscardHandler)
	o := controlplane.Options{Name: "cp-1", Book: h.line.book, Consensus: h.line, KEK: make([]byte, 32), LeafLife: time.Hour, Now: time.Now, Log: log}
	h.set(&o)
	s, err := controlplane.NewServer(o)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := identitytest.Leaf(h.ca, fleet.PrincipalOf("acme.example", fleet.Node, "cp-1"), time.Now(), time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	h.addr, h.server = ln.Addr().String(), s
	source := identity.Fixed(leaf, identity.Pool([]*x509.Certificate{h.ca.Cert}))
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { _ = s.Follow(ctx, func() {}) })
	wg.Go(func() {
		if err := s.Listener("door", ln, identity.Server(source, s.Admit, false, admission.Protocols()...), log).Run(ctx, func() {}); err != nil {
			t.Error(err)
		}
	})
	h.end = func() { cancel(); wg.Wait() }
}

// stop ends the node, once.
func (h *house) stop() {
	h.end()
	h.end = func() {}
}

func submitTo[R any](t *testing.T, h *house, c ledger.Change[book.State, R]) {
	t.Helper()
	h.line.mu.Lock()
	defer h.line.mu.Unlock()
	must(t, &h.line.order, c)
}

// member enrols an appliance in the book and gives its certificate.
func (h *house) member(name string) *tls.Certificate {
	h.t.Helper()
	leaf, err := identitytest.Leaf(h.ca, fleet.PrincipalOf("acme.example", fleet.Appliance, name), time.Now(), time.Hour)
	if err != nil {
		h.t.Fatal(err)
	}
	submitTo(h.t, h, book.RegisterAppliance{Name: fleet.ApplianceID(name), Customer: "globex", Expect: []byte(`{}`)})
	submitTo(h.t, h, book.Enrol{Name: fleet.ApplianceID(name), Nonce: name, NonceTill: time.Now().Add(time.Hour), Serial: identity.SerialOf(leaf.Leaf), Till: time.Now().Add(time.Hour), LogKey: []byte("k")})
	return leaf
}

func (h *house) dial(leaf *tls.Certificate, proto string) (*tls.Conn, error) {
	raw, err := net.Dial("tcp", h.addr)
	if err != nil {
		return nil, err
	}
	h.t.Cleanup(func() { raw.Close() })
	_ = raw.SetDeadline(time.Now().Add(20 * time.Second))
	c := tls.Client(raw, identity.Client(identity.Fixed(leaf, identity.Pool([]*x509.Certificate{h.ca.Cert})), identity.WantNode("acme.example"), proto))
	return c, c.Handshake()
}

// up opens a channel.
func (h *house) up(leaf *tls.Certificate) (*tls.Conn, error) {
	c, err := h.dial(leaf, channel.Proto)
	if err != nil {
		return nil, err
	}
	if err := channel.Write(c, &boundaryv1.Up{Body: &boundaryv1.Up_Hello{Hello: &boundaryv1.Hello{Route: "https"}}}, channel.MaxHello); err != nil {
		return nil, err
	}
	var down boundaryv1.Down
	if err := channel.Read(c, &down, channel.MaxDown); err != nil {
		return nil, err
	}
	if w := down.GetWelcome(); w == nil || w.GetBeatMs() == 0 || w.GetReconnectSpreadMs() == 0 {
		return nil, errors.New(down.String())
	}
	return c, nil
}

// ends reads until the reason comes.
func ends(t *testing.T, c *tls.Conn, want fault.Kind) {
	t.Helper()
	for {
		var down boundaryv1.Down
		if err := channel.Read(c, &down, channel.MaxDown); err != nil {
			t.Fatalf("the channel ended without a reason: %v, want %s", err, want)
		}
		if r := down.GetClosed(); r != nil {
			if r.GetKind() != string(want) {
				t.Fatalf("closed: %v, want %s", r, want)
			}
			return
		}
	}
}

func TestTheNewestChannelStaysAndABanEndsIt(t *testing.T) {
	h := open(t)
	leaf := h.member("eu-1")
	one, err := h.up(leaf)
	if err != nil {
		t.Fatal(err)
	}
	two, err := h.up(leaf)
	if err != nil {
		t.Fatal(err)
	}
	ends(t, one, fault.Conflict)
	submitTo(t, h, book.Ask{To: "eu-1", ID: "p", First: 1, Count: 3})
	for want := uint64(1); want <= 3; want++ {
		down := &boundaryv1.Down{Body: &boundaryv1.Down_Bundle{}}
		for down.GetOrder() == nil { // the bundle of CAs comes as soon as it may
			down.Reset()
			if err := channel.Read(two, down, channel.MaxDown); err != nil {
				t.Fatalf("order %d: %v", want, err)
			}
		}
		if down.GetOrder().GetNumber() != want {
			t.Fatalf("order %d: %v", want, down)
		}
	}
	submitTo(t, h, book.Ban{Name: "eu-1", Reason: "lost"})
	ends(t, two, fault.Denied)
}

func TestWhoMayHaveNoChannel(t *testing.T) {
	h := open(t)
	stranger, err := h.dial(nil, channel.Proto)
	if err != nil {
		t.Fatal(err)
	}
	ends(t, stranger, fault.Denied) // nothing was said yet
	operator, err := identitytest.Leaf(h.ca, fleet.PrincipalOf("acme.example", fleet.Operator, "ann"), time.Now(), time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	size := h.line.book.Log().Size()
	c, err := h.dial(operator, channel.Proto)
	if err != nil {
		t.Fatal(err)
	}
	ends(t, c, fault.Denied)
	if h.line.book.Log().Size() != size+1 {
		t.Fatal("the refusal is not on record")
	}
}

func TestGarbageAndHugeLengthsEndTheChannel(t *testing.T) {
	h := open(t)
	leaf := h.member("eu-1")
	for _, first := range [][]byte{binary.BigEndian.AppendUint32(nil, channel.MaxHello+1), {0, 0, 0, 2, 0xff, 0xff}, {0, 0, 0, 0}} {
		c, err := h.dial(leaf, channel.Proto)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.Write(first); err != nil {
			t.Fatal(err)
		}
		ends(t, c, fault.Invalid)
	}
	c, err := h.up(leaf)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Write(binary.BigEndian.AppendUint32(nil, 1<<31)); err != nil {
		t.Fatal(err)
	}
	ends(t, c, fault.Invalid)
}

func TestStrangersStillGetAChallengeOverHTTP2(t *testing.T) {
	h := open(t)
	tr := &http.Transport{ForceAttemptHTTP2: true, TLSClientConfig: identity.Client(identity.Fixed(nil, identity.Pool([]*x509.Certificate{h.ca.Cert})), identity.WantNode("acme.example"), "h2")}
	defer tr.CloseIdleConnections()
	client := boundaryv1connect.NewBootstrapClient(&http.Client{Transport: tr}, "https://"+h.addr)
	res, err := client.Challenge(t.Context(), connect.NewRequest(&boundaryv1.ChallengeRequest{}))
	if err != nil || res.Msg.GetTrustDomain() != "acme.example" {
		t.Fatalf("%v, %v", res, err)
	}
}

// A storm: 300 appliances come at once, among connections that never say a word. All get their channel.
func TestAStormStarvesNobody(t *testing.T) {
	h := open(t)
	for range 50 {
		silent, err := net.Dial("tcp", h.addr)
		if err != nil {
			t.Fatal(err)
		}
		defer silent.Close()
	}
	const n = 300
	leaves := make([]*tls.Certificate, n)
	for i := range leaves {
		leaves[i] = h.member("a-" + string(rune('a'+i/26)) + string(rune('a'+i%26)))
	}
	var wg sync.WaitGroup
	for _, leaf := range leaves {
		wg.Go(func() {
			if _, err := h.up(leaf); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	online := 0
	for _, a := range h.line.book.View().Appliances() {
		if a.Online {
			online++
		}
	}
	if online != n {
		t.Fatalf("%d of %d are online", online, n)
	}
}

// Those who say nothing hold no place for long while others wait: a stranger's sockets keep no appliance out.
func TestSilentStrangersKeepNobodyOut(t *testing.T) {
	h := open(t)
	leaf := h.member("eu-1")
	for range 700 { // more than there are places
		silent, err := net.Dial("tcp", h.addr)
		if err != nil {
			t.Fatal(err)
		}
		defer silent.Close()
	}
	begun := time.Now()
	if _, err := h.up(leaf); err != nil {
		t.Fatal(err)
	}
	if took := time.Since(begun); took > 6*time.Second { // a handshake may take 10 s
		t.Errorf("the channel came up after %s", took)
	}
}
