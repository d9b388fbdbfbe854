// SPDX-License-Identifier: Apache-2.0

// Package fleettest is a whole fleet in one process and in fake time: the vendor's real server behind real TLS 1.3 over
// wires of memory, and real appliances with real books on disk. It stands beside the house: any room's tests may use it.
//
// Call [New] inside of a bubble of testing/synctest. Time then costs nothing: 90 days pass as fast as what happens in them.
package fleettest

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/demarc-dev/demarc/api"
	controlv1 "github.com/demarc-dev/demarc/api/control/v1"
	"github.com/demarc-dev/demarc/daemon/controlplane"
	"github.com/demarc-dev/demarc/daemon/controlplane/admission"
	"github.com/demarc-dev/demarc/daemon/controlplane/book"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/identity"
	"github.com/demarc-dev/demarc/ledger"
)

// Domain is the trust domain of a fleet.
const Domain = "acme.example"

const nodeName = "cp-1"

// LeafLife is how long the fleet's certificates live.
const LeafLife = identity.DefaultLeafLife

// Fleet is a vendor with one node, and its customers' appliances.
type Fleet struct {
	// Beat is how often appliances are told to speak, from the next start of the node on; zero means as the size of the fleet says.
	Beat time.Duration

	// Evidence has both sides ask each other to countersign their logs, from the next start on.
	Evidence bool

	t        *testing.T
	kek      []byte
	first    map[string]*tls.Certificate // by node
	bundle   []byte                      // the file that customers got at the beginning
	platform *ecdsa.PrivateKey
	cluster  cluster
	log      *slog.Logger

	mu     sync.Mutex
	record [][]byte // the log of changes: what survives a crash of the node
	after  func(kind string, by fleet.Principal)
	lose   bool // of a cluster: the answer of the change that the hook sees is lost
	book   *ledger.Book[book.State]
	server *controlplane.Server
	door   *door
	conns  map[*end]*Appliance
	seq    book.Consensus // of a cluster; nil: the record is the order
	shut   bool           // whoever shows a certificate is refused
	pick   func() *door   // of a cluster: the door that the next connection of an appliance comes to; nil: door
	stop   func()
}

// New starts a vendor. The test's cleanup ends it.
func New(t *testing.T) *Fleet {
	t.Helper()
	f, slots := found(t, nodeName)
	f.StartNode()
	t.Cleanup(f.CrashNode)
	f.begin(slots)
	return f
}

// found draws what a vendor has before its first node starts: a CA, the certificates of the nodes' first start, a platform.
func found(t *testing.T, nodes ...string) (*Fleet, []identity.Slot) {
	f := &Fleet{t: t, kek: make([]byte, 32), conns: map[*end]*Appliance{},
		log: slog.New(slog.NewTextHandler(logs{t, new(atomic.Int64)}, &slog.HandlerOptions{Level: slog.LevelWarn}))}
	if !testing.Verbose() {
		f.log = slog.New(slog.DiscardHandler)
	}
	ca, err := identity.NewCA(Domain, time.Now(), rand.Reader, identity.DefaultCALife)
	f.must(err)
	sealed, err := ca.SealKey(f.kek, rand.Reader)
	f.must(err)
	slots, err := identity.Prepare(nil, ca.Cert.Raw, sealed)
	f.must(err)
	slots, err = identity.Activate(slots, slots[0].ID())
	f.must(err)
	f.bundle, err = identity.BundlePEM(slots)
	f.must(err)
	f.first = map[string]*tls.Certificate{}
	for _, name := range nodes {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		f.must(err)
		der, err := identity.NewCSR(key, rand.Reader)
		f.must(err)
		csr, err := identity.ParseCSR(der)
		f.must(err)
		leaf, err := ca.Issue(csr, fleet.PrincipalOf(Domain, fleet.Node, name), time.Now(), LeafLife, identity.IssueOptions{Rand: rand.Reader})
		f.must(err)
		f.first[name] = &tls.Certificate{Certificate: [][]byte{leaf.Raw}, PrivateKey: key, Leaf: leaf}
	}
	f.platform, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	f.must(err)
	f.cluster = cluster{signs: "k", keys: map[string]*ecdsa.PrivateKey{"k": f.platform}, shown: []string{"k"}}
	return f, slots
}

// begin makes the first changes of the book.
func (f *Fleet) begin(slots []identity.Slot) {
	f.t.Helper()
	_, err := ledger.Submit(f.t.Context(), order{f}, f.meta(), book.Genesis{TrustDomain: Domain, Slots: slots})
	f.must(err)
	_, err = ledger.Submit(f.t.Context(), order{f}, f.meta(), book.RegisterCustomer{Name: "globex"})
	f.must(err)
}

// logs is the log of a test. Months without a way are a million lines of it: of those the first are enough.
type logs struct {
	t     *testing.T
	still *atomic.Int64
}

// Write implements io.Writer.
func (l logs) Write(b []byte) (int, error) {
	if bytes.Contains(b, []byte("a route does not work")) && l.still.Add(1) > 500 {
		return len(b), nil
	}
	l.t.Logf("%s %s", time.Now().Format("01-02 15:04:05"), b)
	return len(b), nil
}

func (f *Fleet) must(err error) {
	f.t.Helper()
	if err != nil {
		f.t.Fatal(err)
	}
}

func (f *Fleet) meta() ledger.Meta {
	return ledger.Meta{At: time.Now().UTC(), By: "test", Request: fleet.RequestID(fmt.Sprint("t", time.Now().UnixNano(), f.Size()))}
}

// Size is the number of entries in the vendor's log.
func (f *Fleet) Size() int64 { return f.View().log }

type view struct {
	book.State
	log int64
}

// View is the vendor's book as it is now.
func (f *Fleet) View() view {
	f.mu.Lock()
	seq := f.seq
	f.mu.Unlock()
	if seq != nil { // a follower may be behind what it has forwarded
		_ = seq.Read(context.Background())
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	s, log := f.book.Both()
	return view{s, log.Size()}
}

// Of is what the vendor's book holds of an appliance.
func (f *Fleet) Of(name string) book.Appliance {
	f.t.Helper()
	a, err := f.View().Appliance(fleet.ApplianceID(name))
	f.must(err)
	return a
}

// Serials lists every certificate that the record gave an appliance, oldest first.
func (f *Fleet) Serials(name string) []fleet.Serial {
	f.t.Helper()
	f.mu.Lock()
	record := slices.Clone(f.record)
	f.mu.Unlock()
	var out []fleet.Serial
	for _, data := range record {
		type given struct {
			Name   string       `json:"name"`
			Serial fleet.Serial `json:"serial"`
		}
		var in struct {
			Kind string `json:"kind"`
			Body struct {
				given
				Enrol given `json:"enrol"`
			} `json:"body"`
		}
		f.must(json.Unmarshal(data, &in))
		switch kind, _, _ := strings.Cut(in.Kind, "/"); {
		case kind == "appliance.renew" && in.Body.Name == name:
			out = append(out, in.Body.Serial)
		case kind == "appliance.enrol" && in.Body.Enrol.Name == name:
			out = append(out, in.Body.Enrol.Serial)
		}
	}
	return out
}

// Admit asks the node's door about a certificate of an appliance.
func (f *Fleet) Admit(name string, serial fleet.Serial) error {
	_, s := f.operator()
	return s.Admit(fleet.PrincipalOf(Domain, fleet.Appliance, name), serial)
}

// order is the order of changes of one node, on record before it is applied.
type order struct{ f *Fleet }

// Propose implements [controlplane.Consensus].
func (o order) Propose(ctx context.Context, data []byte) ([]byte, error) {
	f := o.f
	f.mu.Lock()
	if seq := f.seq; seq != nil {
		f.mu.Unlock()
		return seq.Propose(ctx, data)
	}
	if f.stop == nil || ctx.Err() != nil {
		f.mu.Unlock()
		return nil, fault.New("fleettest.Propose", fault.Unavailable, "the node is down")
	}
	if err := f.book.DryRun(data); err != nil {
		f.mu.Unlock()
		return nil, err
	}
	f.record = append(f.record, data)
	ans, err := f.book.Apply(uint64(len(f.record)), data)
	f.mu.Unlock()
	f.told(data)
	return ans, err
}

// told calls the hook of After for a change that is on record, and says whether its answer is lost.
func (f *Fleet) told(data []byte) (lost bool) {
	f.mu.Lock()
	after := f.after
	f.mu.Unlock()
	if after == nil {
		return false
	}
	var in struct {
		Kind string      `json:"kind"`
		Meta ledger.Meta `json:"meta"`
	}
	if json.Unmarshal(data, &in) == nil {
		after(in.Kind, in.Meta.By)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	lost, f.lose = f.lose, false
	return lost
}

// Read implements [controlplane.Consensus].
func (order) Read(context.Context) error { return nil }

// Leader implements [controlplane.Consensus].
func (order) Leader() string { return nodeName }

// After has f called after each change that is on record, before its answer goes anywhere: a place to crash at.
func (f *Fleet) After(hook func(kind string, by fleet.Principal)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.after = hook
}

// StartNode starts the node from its record.
func (f *Fleet) StartNode() {
	f.t.Helper()
	stored := book.NewBook()
	f.mu.Lock()
	for i, data := range f.record {
		if _, err := stored.Apply(uint64(i+1), data); err != nil {
			f.mu.Unlock()
			f.t.Fatal(err)
		}
	}
	f.book = stored
	f.mu.Unlock()
	server, err := controlplane.NewServer(
		controlplane.Options{Name: nodeName, Book: stored, Consensus: order{f}, KEK: f.kek, LeafLife: LeafLife, Beat: f.Beat,
			Members: []book.Member{{Name: nodeName}}, Now: time.Now, Log: f.log})
	f.must(err)
	roots, err := identity.ParseBundle(f.bundle, Domain)
	f.must(err)
	source, err := server.Authority().NewSource(f.first[nodeName], identity.Pool(roots))
	f.must(err)
	ctx, cancel := context.WithCancel(context.Background())
	d := newDoor()
	var wg sync.WaitGroup
	wg.Go(func() {
		_ = server.Listener("door", d, identity.Server(source, f.admit(server), false, admission.Protocols()...), f.log).Run(ctx, func() {})
	})
	wg.Go(func() { _ = server.Follow(ctx, func() {}) })
	wg.Go(func() { _ = source.Tend(ctx) })
	if f.Evidence {
		wg.Go(func() { _ = server.Evidence().Witness(ctx, 10*time.Second) })
	}
	f.mu.Lock()
	f.server, f.door = server, d
	f.stop = func() { cancel(); wg.Wait() }
	f.mu.Unlock()
}

// Shut has the door refuse every certificate, as that of a node does which is far behind, until it is told otherwise.
func (f *Fleet) Shut(shut bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.shut = shut
}

func (f *Fleet) admit(s *controlplane.Server) func(fleet.Principal, fleet.Serial) error {
	return func(p fleet.Principal, serial fleet.Serial) error {
		f.mu.Lock()
		shut := f.shut
		f.mu.Unlock()
		if shut {
			return fault.New("fleettest.Admit", fault.Denied, "the door is shut")
		}
		return s.Admit(p, serial)
	}
}

// CrashNode ends the node: nothing that it says after the last change on record is heard.
func (f *Fleet) CrashNode() {
	f.mu.Lock()
	stop := f.stop
	f.stop = nil
	for c := range f.conns {
		_ = c.Close()
	}
	f.mu.Unlock()
	if stop != nil {
		stop()
	}
}

// dial brings an appliance to the node's door.
func (f *Fleet) dial(ctx context.Context, a *Appliance) (*end, error) {
	f.mu.Lock()
	up, d, pick := f.stop != nil && !a.cut, f.door, f.pick
	f.mu.Unlock()
	if pick != nil {
		d = pick()
	}
	if !up || d == nil {
		return nil, fault.New("fleettest.Dial", fault.Unavailable, "no way to the node")
	}
	mine, theirs := wire()
	select {
	case d.in <- theirs:
	case <-d.ended:
		return nil, fault.New("fleettest.Dial", fault.Unavailable, "the node is down")
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	for c := range f.conns { // forget those that ended
		if c.in.ended() {
			delete(f.conns, c)
		}
	}
	mine.hold(a.hung)
	f.conns[mine] = a
	return mine, nil
}

func (h *half) ended() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.closed
}

// operator is the context of an operator's call.
func (f *Fleet) operator() (context.Context, *controlplane.Server) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return api.With(context.Background(), api.Who{Class: api.Operator, Principal: fleet.PrincipalOf(Domain, fleet.Operator, "ops")}), f.server
}

// PrepareCA announces a CA and gives its id.
func (f *Fleet) PrepareCA() string {
	f.t.Helper()
	ctx, s := f.operator()
	res, err := s.Keys().PrepareAuthority(ctx, connect.NewRequest(&controlv1.PrepareAuthorityRequest{}))
	f.must(err)
	return res.Msg.GetId()
}

// ActivateCA makes it the one that issues.
func (f *Fleet) ActivateCA(id string) error {
	ctx, s := f.operator()
	_, err := s.Keys().ActivateAuthority(ctx, connect.NewRequest(&controlv1.ActivateAuthorityRequest{Id: id}))
	return err
}

// RetireCA ends the trust in it.
func (f *Fleet) RetireCA(id string, compromised bool) error {
	ctx, s := f.operator()
	_, err := s.Keys().RetireAuthority(ctx, connect.NewRequest(&controlv1.RetireAuthorityRequest{Id: id, Compromised: compromised}))
	return err
}

// CAs lists the CAs and who is missing.
func (f *Fleet) CAs() *controlv1.ListAuthoritiesResponse {
	f.t.Helper()
	ctx, s := f.operator()
	res, err := s.Keys().ListAuthorities(ctx, connect.NewRequest(&controlv1.ListAuthoritiesRequest{}))
	f.must(err)
	return res.Msg
}

// Order has the vendor give an appliance one order, which it acknowledges.
func (f *Fleet) Order(name string) {
	f.t.Helper()
	at := f.Of(name)
	_, err := ledger.Submit(f.t.Context(), order{f}, f.meta(),
		book.Ask{To: fleet.ApplianceID(name), ID: "p", First: at.OrdersSent() + 1, Count: 1})
	f.must(err)
}

// Ban bans an appliance.
func (f *Fleet) Ban(name string) {
	f.t.Helper()
	ctx, s := f.operator()
	_, err := s.BanAppliance(ctx, connect.NewRequest(&controlv1.BanApplianceRequest{Name: name, Reason: "lost"}))
	f.must(err)
}

// IssuerCA is the id of the CA that issues.
func (f *Fleet) IssuerCA() string {
	f.t.Helper()
	s, err := identity.Issuer(f.View().Slots)
	f.must(err)
	return string(s.ID())
}

// Wait passes fake time until the condition holds, and gives how long that took. It fails the test after limit.
func (f *Fleet) Wait(what string, limit time.Duration, holds func() bool) time.Duration {
	f.t.Helper()
	began := time.Now()
	for !holds() {
		if time.Since(began) > limit {
			f.t.Fatalf("after %s: not yet: %s", limit, what)
		}
		time.Sleep(min(time.Second, limit))
	}
	return time.Since(began)
}

// expect is the platform identity that the vendor registers for every appliance of a fleet.
func (f *Fleet) expect(name string) json.RawMessage {
	b, err := json.Marshal(
		identity.Expect{Kind: "kubernetes", Issuer: "https://cluster.example", JWKS: f.JWKS(), Namespace: "demarc", ServiceAccount: name})
	f.must(err)
	return b
}

// errGone is what a crashed appliance ends with.
var errGone = errors.New("crashed")
