// SPDX-License-Identifier: Apache-2.0

package controlplane_test

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/demarc-dev/demarc/api"
	boundaryv1 "github.com/demarc-dev/demarc/api/boundary/v1"
	controlv1 "github.com/demarc-dev/demarc/api/control/v1"
	"github.com/demarc-dev/demarc/daemon/controlplane/book"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/identity"
	"github.com/demarc-dev/demarc/ledger"
)

// laptop is a development key, and the registration of the name laptop with it.
func laptop(t *testing.T) (identity.DevKey, []byte) {
	t.Helper()
	k, err := identity.NewDevKey(rand.Reader)
	ok(t, err)
	jwks, err := k.JWKS()
	ok(t, err)
	b, err := json.Marshal(identity.Expect{Kind: identity.KindDev, JWKS: jwks, Subject: "laptop"})
	ok(t, err)
	return k, b
}

// devRequest is an enrolment of eu-1 with a development token; change alters what the token is made of.
func (g *gate) devRequest(k identity.DevKey, change func(name, audience *string, at *time.Time)) *boundaryv1.EnrolRequest {
	g.t.Helper()
	m, _ := g.request(logKey(g.t))
	audience, err := identity.Audience(domain, m.GetNonce(), m.GetCsr())
	ok(g.t, err)
	name, at := "laptop", time.Now()
	if change != nil {
		change(&name, &audience, &at)
	}
	m.Token, err = k.Token(name, audience, at)
	ok(g.t, err)
	return m
}

func (g *gate) register(name string, expect []byte) error {
	ann := api.With(g.t.Context(), api.Who{Class: api.Operator, Principal: fleet.PrincipalOf(domain, fleet.Operator, "ann")})
	_, err := g.server.RegisterAppliance(ann, connect.NewRequest(&controlv1.RegisterApplianceRequest{RequestId: rand.Text(), Name: name,
		Customer: "globex", Expect: expect}))
	return err
}

func (g *gate) reExpect(name string, expect []byte) error {
	ann := api.With(g.t.Context(), api.Who{Class: api.Operator, Principal: fleet.PrincipalOf(domain, fleet.Operator, "ann")})
	_, err := g.server.SetExpect(ann, connect.NewRequest(&controlv1.SetExpectRequest{RequestId: rand.Text(), Name: name, Expect: expect}))
	return err
}

// FAULTS.md G2: a laptop enrols where the trust domain was made for it, by its own token alone, once.
func TestADevelopmentIdentityEnrols(t *testing.T) {
	g := newGateFor(t, time.Minute, true)
	k, expect := laptop(t)
	ok(t, g.reExpect("eu-1", expect))
	other, _ := laptop(t)
	for name, tc := range map[string]struct {
		request *boundaryv1.EnrolRequest
		kind    fault.Kind
		want    string
	}{
		"another key": {g.devRequest(other, nil), fault.Denied, "which is not pinned"},
		"another audience": {g.devRequest(k, func(_, audience *string, _ *time.Time) { *audience += "x" }), fault.Denied,
			"its audience must be"},
		"another name": {g.devRequest(k, func(name, _ *string, _ *time.Time) { *name = "desktop" }), fault.Denied, "is registered"},
		"expired": {g.devRequest(k, func(_, _ *string, at *time.Time) { *at = at.Add(-8 * time.Minute) }), fault.Expired,
			"ran out"},
		"of the future": {g.devRequest(k, func(_, _ *string, at *time.Time) { *at = at.Add(5 * time.Minute) }), fault.Expired,
			"not valid yet"},
		"a cluster's": {func() *boundaryv1.EnrolRequest {
			m, _ := g.request(logKey(t))
			return m
		}(), fault.Denied, "is of the type"},
	} {
		if _, err := g.enrol(tc.request); fault.Of(err) != tc.kind || !strings.Contains(fault.Text(err), tc.want) {
			t.Errorf("%s: %v, want %s %q", name, err, tc.kind, tc.want)
		}
	}
	m := g.devRequest(k, nil)
	if _, err := g.enrol(m); err != nil {
		t.Fatal(err)
	}
	if _, err := g.enrol(m); fault.Of(err) != fault.Denied || !strings.Contains(fault.Text(err), "used before") {
		t.Errorf("the same a second time: %v", err)
	}
	list, err := g.server.ListAppliances(t.Context(), connect.NewRequest(&controlv1.ListAppliancesRequest{}))
	ok(t, err)
	if a := list.Msg.GetAppliances()[0]; a.GetPlatform() != "dev" || a.GetStatus() != book.Enrolled {
		t.Errorf("the vendor sees %v", a)
	}
	status, err := g.server.Status(t.Context(), connect.NewRequest(&controlv1.StatusRequest{}))
	if ok(t, err); !status.Msg.GetDevelopment() {
		t.Error("the status does not say that the trust domain is for development")
	}
	ok(t, g.register("eu-2", expect))

	// What a development key signs is no cluster's token, for whatever registration.
	kube, err := json.Marshal(g.issuer.Expect("demarc", "appliance"))
	ok(t, err)
	ok(t, g.reExpect("eu-1", kube))
	if _, err := g.enrol(g.devRequest(k, nil)); fault.Of(err) != fault.Denied || !strings.Contains(fault.Text(err), "development token") {
		t.Errorf("a development token for a cluster's appliance: %v", err)
	}
}

// FAULTS.md G2: a trust domain that was not made for it refuses registration and enrolment, at the door and in the book.
func TestADevelopmentIdentityIsRefusedElsewhere(t *testing.T) {
	g := newGate(t, time.Minute)
	k, expect := laptop(t)
	want := func(what string, err error) {
		t.Helper()
		if fault.Of(err) != fault.Denied || !strings.Contains(fault.Text(err), "was not made for development") {
			t.Errorf("%s: %v", what, err)
		}
	}
	want("registration", g.register("laptop", expect))
	want("another registration", g.reExpect("eu-1", expect))
	state := g.order.book.View()
	_, err := book.RegisterAppliance{Name: "laptop", Customer: "globex", Expect: expect}.Apply(&state, meta("1"))
	want("registration, in the book", err)
	_, err = book.SetExpect{Name: "eu-1", Expect: expect}.Apply(&state, meta("2"))
	want("another registration, in the book", err)

	// The switch can't be thrown later: not by another genesis, and the node's file has none.
	submitAs(g, book.Genesis{TrustDomain: domain, Slots: state.Slots, Development: true})
	want("registration after a second genesis", g.register("laptop", expect))

	// A book that came to hold such an appliance all the same lets it in nowhere.
	made := newGateFor(t, time.Minute, true)
	ok(t, made.reExpect("eu-1", expect))
	if _, err := made.enrol(made.devRequest(k, nil)); err != nil {
		t.Fatal("it is refused where it is let in: ", err)
	}
	made.edit(`"development":true,`, "")
	_, err = made.enrol(made.devRequest(k, nil))
	want("enrolment", err)
	state = made.order.book.View()
	_, err = book.Enrol{Name: "eu-1", Nonce: "n", NonceTill: start.Add(time.Hour), Serial: "s", Till: start.Add(time.Hour),
		LogKey: []byte("k")}.Apply(&state, meta("3"))
	want("enrolment, in the book", err)
}

// A snapshot holds the switch, and so does a page that is read again.
func TestTheSwitchIsInTheSnapshot(t *testing.T) {
	g := newGateFor(t, time.Minute, true)
	g.edit("", "")
	if !g.order.book.View().Development {
		t.Error("a restored book has lost it")
	}
	_, expect := laptop(t)
	ok(t, g.register("laptop", expect))
}

// edit has the book restored from its own snapshot, in whose state a text is another.
func (g *gate) edit(from, to string) {
	g.t.Helper()
	snap, err := g.order.book.Snapshot()
	ok(g.t, err)
	var b bytes.Buffer
	_, err = snap.WriteTo(&b)
	ok(g.t, err)
	lines := bytes.SplitAfter(b.Bytes(), []byte("\n"))
	if !bytes.Contains(lines[2], []byte(from)) {
		g.t.Fatalf("the state has no %q: %.300s", from, lines[2])
	}
	lines[2] = bytes.Replace(lines[2], []byte(from), []byte(to), 1)
	body := bytes.Join(lines[:len(lines)-2], nil)
	ok(g.t, g.order.book.Restore(bytes.NewReader(fmt.Appendf(body, "sha256:%x\n", sha256.Sum256(body)))))
}

func meta(id fleet.RequestID) ledger.Meta { return ledger.Meta{At: start, By: "test", Request: id} }
