// SPDX-License-Identifier: Apache-2.0

package controlplane_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"connectrpc.com/connect"

	boundaryv1 "github.com/demarc-dev/demarc/api/boundary/v1"
	"github.com/demarc-dev/demarc/api/boundary/v1/boundaryv1connect"
	"github.com/demarc-dev/demarc/api/channel"
	"github.com/demarc-dev/demarc/daemon/controlplane"
	"github.com/demarc-dev/demarc/daemon/controlplane/book"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/identity"
	"github.com/demarc-dev/demarc/identity/identitytest"
)

// The enemies here have many sockets. Each address of 127.0.0.0/8 is a network of its own to the door.

// from dials the door from an address of loopback.
func (h *house) from(ip string) net.Conn {
	h.t.Helper()
	c, err := (&net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(ip)}}).DialContext(h.t.Context(), "tcp", h.addr)
	ok(h.t, err)
	h.t.Cleanup(func() { c.Close() })
	return c
}

func (h *house) conf(leaf *tls.Certificate, proto string) *tls.Config {
	return identity.Client(identity.Fixed(leaf, identity.Pool([]*x509.Certificate{h.ca.Cert})), identity.WantNode("acme.example"), proto)
}

// web opens a connection for calls and says the first words of HTTP/2. What closes is counted.
func (h *house) web(ip string, leaf *tls.Certificate, closed *atomic.Int32) {
	h.t.Helper()
	c := tls.Client(h.from(ip), h.conf(leaf, "h2"))
	ok(h.t, c.HandshakeContext(h.t.Context()))
	_, err := c.Write([]byte("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00"))
	ok(h.t, err)
	_, err = io.ReadFull(c, make([]byte, 9)) // the server's settings: it is served
	ok(h.t, err)
	go func() {
		_, _ = io.Copy(io.Discard, c)
		closed.Add(1)
	}()
}

func (h *house) operator() *tls.Certificate {
	h.t.Helper()
	leaf, err := identitytest.Leaf(h.ca, fleet.PrincipalOf("acme.example", fleet.Operator, "ann"), time.Now(), time.Hour)
	ok(h.t, err)
	return leaf
}

// within waits for a condition.
func within(t *testing.T, d time.Duration, what string, is func() bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), d)
	defer cancel()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !is() {
		select {
		case <-tick.C:
		case <-ctx.Done():
			t.Fatalf("after %s: %s", d, what)
		}
	}
}

// TestEnemyHoldsConnections: a stranger's idle connections give way to its newer ones, and to nobody else's loss.
func TestEnemyHoldsConnections(t *testing.T) {
	h := open(t)
	var theirs, ours atomic.Int32
	h.web("127.0.0.1", h.operator(), &ours)
	h.web("127.0.0.3", nil, &ours)
	const more = 40
	for range controlplane.GuestsEach + more {
		h.web("127.0.0.2", nil, &theirs)
	}
	within(t, 8*time.Second, "a stranger's connections over the bound stand", func() bool { return theirs.Load() >= more })
	if n := ours.Load(); n != 0 {
		t.Fatalf("%d connections of others were closed for them", n)
	}
	if n := theirs.Load(); n != more {
		t.Fatalf("%d were closed, want %d", n, more)
	}
}

// TestEnemySaysNoHello: one certificate holds a bounded number of channels on which nothing is said.
func TestEnemySaysNoHello(t *testing.T) {
	h := open(t)
	leaf := h.member("eu-1")
	const many = 20
	var closed atomic.Int32
	var wg sync.WaitGroup
	for range many {
		wg.Go(func() {
			c, err := h.dial(leaf, channel.Proto)
			if err != nil {
				closed.Add(1) // it gave way within its own handshake
				return
			}
			go func() { _, _ = io.Copy(io.Discard, c); closed.Add(1) }()
		})
	}
	wg.Wait()
	within(t, 5*time.Second, "silent channels over the bound stand", func() bool { return closed.Load() >= many-controlplane.GreetingsEach })
	if _, err := h.up(leaf); err != nil {
		t.Fatalf("the appliance itself is kept out: %v", err)
	}
}

// TestEnemyFillsTheRecord: who is refused again and again is on record, and the record does not grow with the tries.
func TestEnemyFillsTheRecord(t *testing.T) {
	var unlogged count
	h := openWith(t, func(o *controlplane.Options) { o.Unlogged = &unlogged })
	size, leaf := h.line.book.Log().Size(), h.operator()
	const tries = 40
	for range tries {
		c, err := h.dial(leaf, channel.Proto)
		ok(t, err)
		ends(t, c, "denied")
		c.Close()
	}
	grew := h.line.book.Log().Size() - size
	if grew == 0 || grew > tries/2 {
		t.Fatalf("%d tries made %d entries", tries, grew)
	}
	if n := unlogged.n.Load(); n != tries-grew {
		t.Fatalf("%d of %d tries are neither on record nor counted", tries-grew-n, tries)
	}
}

type count struct{ n atomic.Int64 }

func (c *count) Inc()          { c.n.Add(1) }
func (c *count) Add(v float64) { c.n.Add(int64(v)) }

// TestEnemyStopsAfterClientHello: more than all places are held by one network whose peers stop in the middle, and thousands
// more of it wait; who comes from elsewhere goes before them.
func TestEnemyStopsAfterClientHello(t *testing.T) {
	h := open(t)
	leaf := h.member("eu-1")
	mine, theirs := net.Pipe()
	go func() { _ = tls.Client(mine, h.conf(nil, "h2")).Handshake() }()
	hello := make([]byte, 16<<10)
	n, err := theirs.Read(hello)
	ok(t, err)
	theirs.Close()
	for range 2500 {
		_, err := h.from("127.0.0.2").Write(hello[:n])
		ok(t, err)
	}
	begun := time.Now()
	if _, err := h.up(leaf); err != nil {
		t.Fatal(err)
	}
	if took := time.Since(begun); took > 8*time.Second { // behind them all it would be refused after 10 s
		t.Fatalf("the channel came up after %s", took)
	}
}

// TestEnemyFloodsTheBootstrap: one network that asks all the time uses up its own share, and others enrol meanwhile.
func TestEnemyFloodsTheBootstrap(t *testing.T) {
	h := open(t)
	client := func(ip string) boundaryv1connect.BootstrapClient {
		d := &net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(ip)}}
		tr := &http.Transport{ForceAttemptHTTP2: true, TLSClientConfig: h.conf(nil, "h2"), DialContext: d.DialContext}
		t.Cleanup(tr.CloseIdleConnections)
		return boundaryv1connect.NewBootstrapClient(&http.Client{Transport: tr}, "https://"+h.addr)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var refused atomic.Int64
	var wg sync.WaitGroup
	flood := client("127.0.0.2")
	for range 16 {
		wg.Go(func() {
			for ctx.Err() == nil {
				if _, err := flood.Challenge(ctx, connect.NewRequest(&boundaryv1.ChallengeRequest{})); connect.CodeOf(err) == connect.CodeResourceExhausted {
					refused.Add(1)
				}
			}
		})
	}
	defer wg.Wait()
	defer cancel()
	within(t, 20*time.Second, "the flood is not refused", func() bool { return refused.Load() > 100 })
	other := client("127.0.0.3")
	for i := range 20 {
		if _, err := other.Challenge(t.Context(), connect.NewRequest(&boundaryv1.ChallengeRequest{})); err != nil {
			t.Fatalf("call %d from elsewhere: %v", i, err)
		}
	}
}

// TestARestartIsTwoEntries: a node that stops says so once, nobody is shown online meanwhile, and those that come back cost nothing.
func TestARestartIsTwoEntries(t *testing.T) {
	h := open(t)
	leaves := map[string]*tls.Certificate{}
	for _, name := range []string{"eu-1", "eu-2", "eu-3"} {
		leaves[name] = h.member(name)
		_, err := h.up(leaves[name])
		ok(t, err)
	}
	here := func() (n int) {
		page := h.line.book.View()
		for _, a := range page.Appliances() {
			if page.Here(a) {
				n++
			}
		}
		return n
	}
	if here() != 3 {
		t.Fatalf("%d are here", here())
	}
	size := h.line.book.Log().Size()
	h.server.Leave(t.Context())
	h.stop()
	if grew := h.line.book.Log().Size() - size; grew != 1 {
		t.Fatalf("a stop made %d entries, want one", grew)
	}
	if here() != 0 {
		t.Fatalf("%d are shown online at a node that stopped", here())
	}
	h.start()
	for _, name := range []string{"eu-1", "eu-2"} {
		_, err := h.up(leaves[name])
		ok(t, err)
	}
	h.server.RollCall(t.Context(), 300*time.Millisecond)
	page := h.line.book.View()
	for name, want := range map[fleet.ApplianceID]bool{"eu-1": true, "eu-2": true, "eu-3": false} {
		if a, err := page.Appliance(name); err != nil || page.Here(a) != want {
			t.Errorf("%s is shown online: %t", name, page.Here(a))
		}
	}
	grew := int64(0)
	for i := size; i < h.line.book.Log().Size(); i++ {
		if e := string(h.line.book.Log().Entry(i)); !strings.Contains(e, book.HoldsBundle{}.Kind()) {
			grew++
		}
	}
	if grew != 2 {
		t.Fatalf("a restart made %d entries, want two", grew)
	}
	if _, err := h.up(leaves["eu-3"]); err != nil || !h.online("eu-3") {
		t.Fatalf("who was missing can't come back: %v", err)
	}
}
