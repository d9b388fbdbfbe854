// SPDX-License-Identifier: Apache-2.0

package appliance_test

import (
	"context"
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/demarc-dev/demarc/daemon/appliance/book"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/grant"
	"github.com/demarc-dev/demarc/ledger"
	"github.com/demarc-dev/demarc/manifest"
	"github.com/demarc-dev/demarc/mesh"
	"github.com/demarc-dev/demarc/operation"
	"github.com/demarc-dev/demarc/seal"
)

var start = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

func key(b byte) ed25519.PrivateKey {
	return ed25519.NewKeyFromSeed([]byte(strings.Repeat(string(rune('a'+b)), 32)))
}

// vendor signs vendor, ann and ben ask for operations.
var vendor, customer, thief, ann, ben = key(0), key(1), key(2), key(3), key(4)

func pem(t *testing.T, k ed25519.PrivateKey) []byte {
	t.Helper()
	p, err := seal.KeyOf(k.Public())
	if err != nil {
		t.Fatal(err)
	}
	return p.PEM()
}

func sealed[T seal.Body](t *testing.T, v T, by ed25519.PrivateKey) []byte {
	t.Helper()
	b, err := seal.Seal(v, by)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// order puts changes into a book: straight, or through what has the book, if to is set.
type order struct {
	book *ledger.Book[book.State]
	on   ledger.Proposer // nil: only memory
	n    uint64
	sent uint64 // orders of the vendor

	to    ledger.Proposer  // nil: the book itself
	past  time.Duration    // that a test let pass
	still bool             // no time passes by itself
	clock func() time.Time // nil: a second for each change since start
}

func (o *order) Propose(ctx context.Context, data []byte) ([]byte, error) {
	if o.to != nil {
		o.n++
		return o.to.Propose(ctx, data)
	}
	if err := o.book.DryRun(data); err != nil {
		return nil, err
	}
	o.n++
	if o.on != nil {
		return o.on.Propose(context.Background(), data)
	}
	return o.book.Apply(o.n, data)
}

func (o *order) now() time.Time {
	if o.clock != nil {
		return o.clock().UTC()
	}
	return o.at(o.past)
}

// at is when it is, if so much passed that is not a second for each change.
func (o *order) at(past time.Duration) time.Time {
	if !o.still {
		past += time.Duration(o.n) * time.Second
	}
	return start.Add(past)
}

func put[R any](t *testing.T, o *order, c ledger.Change[book.State, R]) (R, error) {
	t.Helper()
	return ledger.Submit(t.Context(), o, ledger.Meta{At: o.now(), By: fleet.Local, Request: fleet.RequestID(fmt.Sprint(o.n))}, c)
}

func must[R any](t *testing.T, o *order, c ledger.Change[book.State, R]) R {
	t.Helper()
	r, err := put(t, o, c)
	if err != nil {
		t.Fatalf("%s: %v", c.Kind(), err)
	}
	return r
}

func refused[R any](t *testing.T, o *order, k fault.Kind, c ledger.Change[book.State, R]) {
	t.Helper()
	before, _ := json.Marshal(o.book.View())
	if _, err := put(t, o, c); !errors.Is(err, k) {
		t.Fatalf("%s: %v, want %s", c.Kind(), err, k)
	}
	if after, _ := json.Marshal(o.book.View()); string(before) != string(after) {
		t.Fatalf("%s was refused and changed the book", c.Kind())
	}
}

// take is an order of the vendor; it says why nothing came of it.
func take(t *testing.T, o *order, c book.Take) string {
	t.Helper()
	o.sent++
	c.Number = o.sent
	return must(t, o, c).Reason
}

// newBook is a book whose file trusts the vendor's keys; nobody is pinned and nothing is granted.
func newBook(t *testing.T) *order {
	return newBookOn(t, func(*ledger.Book[book.State]) ledger.Proposer { return nil })
}

func newBookOn(t *testing.T, on func(*ledger.Book[book.State]) ledger.Proposer) *order {
	o := &order{book: book.NewBook("eu-1", "globex")}
	o.on = on(o.book)
	must(t, o, book.SetSite{Site: fileOf(t)})
	return o
}

// fileOf is a file that trusts the vendor's keys, each for its own purpose.
func fileOf(t *testing.T) book.Site {
	t.Helper()
	return book.Site{TrustDomain: "acme.example", Runtime: fleet.RuntimeProcess, ReleaseKeys: [][]byte{pem(t, vendor)},
		Operators: []book.Operator{{Name: "ann", Keys: [][]byte{pem(t, ann)}}, {Name: "ben", Keys: [][]byte{pem(t, ben)}}}}
}

func release(t *testing.T, version string) manifest.Release {
	t.Helper()
	sample := filepath.Join("..", "..", "demo", "sample")
	compose, err := os.ReadFile(filepath.Join(sample, "compose.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	state, err := os.ReadFile(filepath.Join(sample, "operations", "state.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	return manifest.Release{App: "notes", Version: version, Compose: strings.Replace(string(compose), "1.0.0", version, 1),
		Templates: map[string]string{"state": string(state)},
		Artifacts: map[string]fleet.Digest{"web": fleet.DigestOf([]byte("web" + version)), "store": fleet.DigestOf([]byte("store"))}}
}

var nonces int

func nonce() string { nonces++; return fmt.Sprintf("nonce-%016d", nonces) }

func (o *order) approval(t *testing.T, d fleet.Digest) operation.PlanApproval {
	t.Helper()
	plan, _, offer, err := o.book.View().Plan(d)
	if err != nil {
		t.Fatal(err)
	}
	return operation.PlanApproval{Appliance: "eu-1", Release: offer.Digest, Plan: plan.Digest(),
		Phases: []fleet.Phase{fleet.Install, fleet.Deploy}, At: o.now(), NotAfter: o.now().Add(time.Hour), Nonce: nonce()}
}

func consent[T seal.Body](t *testing.T, v T, by ed25519.PrivateKey) book.Consent {
	return book.Consent{Document: sealed(t, v, by)}
}

func granted(p fleet.Phase, uses int) grant.Grant {
	return grant.Grant{Appliance: "eu-1", Phase: p, From: start.Add(-time.Hour), Until: start.Add(30 * 24 * time.Hour),
		Uses: grant.Count(uses), Nonce: nonce()}
}

func TestNothingRunsUnapproved(t *testing.T) {
	o := newBook(t)
	if why := take(t, o, book.Take{Release: sealed(t, release(t, "1.0.0"), thief)}); why == "" || len(o.book.View().Offers) != 0 {
		t.Fatal("a release of an unknown key is on offer")
	}
	if why := take(t, o, book.Take{Release: sealed(t, release(t, "1.0.0"), vendor)}); why != "" {
		t.Fatal(why)
	}
	a := o.approval(t, "")
	refused(t, o, fault.Denied, consent(t, a, customer)) // nobody is pinned
	must(t, o, book.Pin{Public: pem(t, customer)})
	refused(t, o, fault.Denied, book.Pin{Public: pem(t, thief)}) // a second key needs the first
	for _, by := range []ed25519.PrivateKey{vendor, thief} {
		refused(t, o, fault.Denied, consent(t, a, by))
		refused(t, o, fault.Denied, consent(t, granted(fleet.Deploy, 0), by))
	}
	for name, edit := range map[string]func(*operation.PlanApproval){
		"another plan":      func(a *operation.PlanApproval) { a.Plan = fleet.DigestOf([]byte("x")) },
		"another appliance": func(a *operation.PlanApproval) { a.Appliance = "us-1" },
		"out of time":       func(a *operation.PlanApproval) { a.At, a.NotAfter = start.Add(-2*time.Hour), start.Add(-time.Hour) },
		"another release":   func(a *operation.PlanApproval) { a.Release = fleet.DigestOf([]byte("x")) },
		"too few phases":    func(a *operation.PlanApproval) { a.Phases = []fleet.Phase{fleet.Deploy} },
	} {
		bad := o.approval(t, "")
		edit(&bad)
		if _, err := put(t, o, consent(t, bad, customer)); err == nil || o.book.View().Approved.ID != "" {
			t.Fatalf("%s: %v", name, err)
		}
	}
	signed := consent(t, a, customer)
	id := must(t, o, signed).ID
	refused(t, o, fault.Conflict, signed) // the same paper twice
	refused(t, o, fault.Denied, book.BeginDeploy{Approval: id})
	must(t, o, consent(t, granted(fleet.Install, 1), customer))
	refused(t, o, fault.Denied, book.BeginDeploy{Approval: id})
	must(t, o, consent(t, granted(fleet.Deploy, 1), customer))
	must(t, o, book.BeginDeploy{Approval: id})
	must(t, o, book.EndDeploy{Approval: id, State: fleet.StateDeployed})
	if d := o.book.View().Deploy; d.State != fleet.StateDeployed || d.Version != "1.0.0" {
		t.Fatalf("%+v", d)
	}
	// The one use of the grant is spent: the next release waits for another.
	take(t, o, book.Take{Release: sealed(t, release(t, "1.1.0"), vendor)})
	next := must(t, o, consent(t, o.approval(t, ""), customer)).ID
	refused(t, o, fault.Denied, book.BeginDeploy{Approval: next})
}

// deployed is a book in which version 1.0.0 runs.
func deployed(t *testing.T) *order {
	o := newBook(t)
	must(t, o, book.Pin{Public: pem(t, customer)})
	take(t, o, book.Take{Release: sealed(t, release(t, "1.0.0"), vendor)})
	must(t, o, consent(t, granted(fleet.Install, 0), customer))
	must(t, o, consent(t, granted(fleet.Deploy, 0), customer))
	id := must(t, o, consent(t, o.approval(t, ""), customer)).ID
	must(t, o, book.BeginDeploy{Approval: id})
	must(t, o, book.EndDeploy{Approval: id, State: fleet.StateDeployed})
	return o
}

func (o *order) request(t *testing.T, id string) []byte {
	t.Helper()
	tpl, err := operation.ParseTemplate([]byte(o.template(t)))
	if err != nil {
		t.Fatal(err)
	}
	return sealed(t, operation.Request{ID: id, Appliance: "eu-1", Operator: fleet.PrincipalOf("acme.example", fleet.Operator, "ann"),
		Template: "state", TemplateDigest: tpl.Digest(),
		Release: o.book.View().Good.Release, Vars: map[string]string{"section": "summary"}, Recipient: "age1ql3z7hjy54pw3hyww5ayyfg7zqgvc7w3j2elw8zmrj2kg5sfn9aqmcac8p",
		At: o.now(), NotAfter: o.now().Add(time.Hour), Nonce: nonce()}, ann)
}

// template is the sample's, as it is in the release that runs.
func (o *order) template(t *testing.T) string {
	t.Helper()
	offer, err := o.book.View().Offer(o.book.View().Good.Release)
	if err != nil {
		t.Fatal(err)
	}
	r, err := seal.Peek[manifest.Release](offer.Sealed)
	if err != nil {
		t.Fatal(err)
	}
	return r.Templates["state"]
}

func (o *order) approve(t *testing.T, id string) book.Consent {
	t.Helper()
	x, err := o.book.View().Operation(id)
	if err != nil {
		t.Fatal(err)
	}
	return consent(t, operation.Approval{ID: id, Appliance: "eu-1", Request: fleet.DigestOf(x.Request), Decision: operation.DecisionApprove,
		Argv: x.Argv, At: o.now(), NotAfter: o.now().Add(time.Hour), Nonce: nonce()}, customer)
}

func (o *order) state(t *testing.T, id string) operation.State {
	t.Helper()
	x, err := o.book.View().Operation(id)
	if err != nil {
		t.Fatal(err)
	}
	return x.State
}

func TestAnOperationNeedsAGrantAndAnApproval(t *testing.T) {
	o := deployed(t)
	if why := take(t, o, book.Take{Operation: o.request(t, "op-1")}); why == "" || o.state(t, "op-1") != operation.Rejected {
		t.Fatalf("without a grant: %q, %s", why, o.state(t, "op-1"))
	}
	must(t, o, consent(t, granted(fleet.OperateRead, 1), customer))
	for _, id := range []string{"op-2", "op-3"} {
		if why := take(t, o, book.Take{Operation: o.request(t, id)}); why != "" {
			t.Fatal(why)
		}
		refused(t, o, fault.Conflict, book.Start{ID: id}) // not approved
		must(t, o, o.approve(t, id))
	}
	if s := must(t, o, book.Start{ID: "op-2"}); s != operation.Running {
		t.Fatal(s)
	}
	if s := must(t, o, book.Start{ID: "op-3"}); s == operation.Running {
		t.Fatal("two operations took the last use")
	}
	// An unrelated revocation leaves what runs alone; that of its own grant ends it, in the same change.
	if done := must(t, o, consent(t, grant.Revoke{Appliance: "eu-1", Phase: fleet.OperateAdmin, At: start, Nonce: nonce()},
		customer)); len(done.Stopped) != 0 || o.state(t, "op-2") != operation.Running {
		t.Fatalf("%+v", done)
	}
	done := must(t, o, consent(t, grant.Revoke{Appliance: "eu-1", Phase: fleet.OperateRead, At: start, Nonce: nonce()}, customer))
	if len(done.Stopped) != 1 || done.Stopped[0] != "op-2" || o.state(t, "op-2") != operation.Cancelled {
		t.Fatalf("%+v, %s", done, o.state(t, "op-2"))
	}
	take(t, o, book.Take{Operation: o.request(t, "op-4")})
	if o.state(t, "op-4") != operation.Rejected {
		t.Fatal("after the revocation")
	}
}

func TestOrdersAreTakenOnceAndInOrder(t *testing.T) {
	o := newBook(t)
	take(t, o, book.Take{Probe: &book.ProbeIndex{ID: "p", Index: 1}})
	if took := must(t, o, book.Take{Number: 1, Probe: &book.ProbeIndex{ID: "p", Index: 1}}); took.Done != 1 {
		t.Fatalf("%+v", took)
	}
	refused(t, o, fault.Conflict, book.Take{Number: 3, Probe: &book.ProbeIndex{ID: "p", Index: 3}})
	if s := o.book.View(); s.ProbesSeen != 1 || len(s.Reports) != 1 {
		t.Fatalf("%d probes, %d reports", s.ProbesSeen, len(s.Reports))
	}
	must(t, o, book.ReportsDone{Upto: 1})
	refused(t, o, fault.Conflict, book.ReportsDone{Upto: 2})
	if s := o.book.View(); len(s.Reports) != 0 || s.ReportsSent() != 1 {
		t.Fatalf("%+v", s.Reports)
	}
}

func TestObservingCanBeSwitchedOff(t *testing.T) {
	o := deployed(t)
	must(t, o, consent(t, grant.Revoke{Appliance: "eu-1", Phase: fleet.Observe, At: start, Nonce: nonce()}, customer))
	before := o.book.View().ReportsSent()
	must(t, o, book.Observe{Status: book.Status{Posture: fleet.Public}})
	must(t, o, book.ObserveTransports{Status: book.Status{Transports: []book.TransportFailure{{Kind: "tailscale", Reason: mesh.TailnetKey}}}})
	// Edges of the deployment are on record all the same (MUTANTS.md: acts.go:96).
	must(t, o, book.EndDeploy{Approval: o.book.View().Good.ID, State: fleet.StateDegraded, Reason: "service web is not healthy"})
	take(t, o, book.Take{Release: sealed(t, release(t, "1.1.0"), vendor)})
	id := must(t, o, consent(t, o.approval(t, ""), customer)).ID
	must(t, o, book.BeginDeploy{Approval: id})
	must(t, o, book.EndDeploy{Approval: id, State: fleet.StateDeployed})
	if d := o.book.View().Deploy; d.Version != "1.1.0" || d.State != fleet.StateDeployed {
		t.Errorf("on record: %+v", d)
	}
	if after := o.book.View().ReportsSent(); after != before {
		t.Fatal("the vendor was told")
	}
	must(t, o, consent(t, granted(fleet.Observe, 0), customer))
	must(t, o, book.EndDeploy{Approval: id, State: fleet.StateDegraded})
	if after := o.book.View().ReportsSent(); after != before+2 {
		t.Fatalf("%d reports after observing is granted again, want 2: where the deployment stands, and its next edge", after-before)
	}
}
