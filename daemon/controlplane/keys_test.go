// SPDX-License-Identifier: Apache-2.0

package controlplane_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/demarc-dev/demarc/api"
	controlv1 "github.com/demarc-dev/demarc/api/control/v1"
	"github.com/demarc-dev/demarc/api/control/v1/controlv1connect"
	"github.com/demarc-dev/demarc/daemon/controlplane"
	"github.com/demarc-dev/demarc/daemon/controlplane/authority"
	"github.com/demarc-dev/demarc/daemon/controlplane/book"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/identity"
	"github.com/demarc-dev/demarc/identity/identitytest"
)

// kekFile has the node of the gate tend its keys, from a file that holds the key it began with.
func (g *gate) kekFile(kek []byte) string {
	g.t.Helper()
	file := filepath.Join(g.t.TempDir(), "kek")
	ok(g.t, os.WriteFile(file, kek, 0o600))
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { _ = g.server.Authority().TendKeys(ctx, authority.KEKFiles{Current: file}) })
	g.t.Cleanup(func() { cancel(); wg.Wait() })
	return file
}

func (g *gate) until(what string, holds func(book.State) bool) {
	g.t.Helper()
	limit := time.After(20 * time.Second)
	for {
		changed := g.order.book.Changed()
		if holds(g.order.book.View()) {
			return
		}
		select {
		case <-changed:
		case <-limit:
			g.t.Fatalf("not within 20 s: %s", what)
		}
	}
}

// TestRotationNamesTheNodeWithoutTheKey: of two nodes one has the next key; nothing is sealed anew, and the other is named.
func TestRotationNamesTheNodeWithoutTheKey(t *testing.T) {
	g := newGate(t, 0)
	g.server.SetMembers([]book.Member{{Name: "cp-1"}, {Name: "cp-2"}})
	kek := bytes.Repeat([]byte{7}, 32)
	ann := g.operator("ann")
	ok(t, g.status(ann))
	wrong := bytes.Repeat([]byte{9}, 32)
	pub := g.logKey()
	file := g.kekFile(kek)
	g.until("the book keeps its secrets", func(s book.State) bool { return len(s.Secrets) == 2 && len(s.Holds("cp-1")) == 1 })
	if !bytes.Equal(g.logKey(), pub) {
		t.Fatal("the log's key changed when it was kept")
	}
	_, err := g.server.Keys().PrepareAuthority(asOperator(t), connect.NewRequest(&controlv1.PrepareAuthorityRequest{})) // a CA that does not issue has a key too
	ok(t, err)
	before := g.order.book.View()
	ok(t, os.WriteFile(file+".next", wrong, 0o600))
	g.until("the node holds both", func(s book.State) bool { return len(s.Holds("cp-1")) == 2 })
	rotate := func() error {
		_, err := controlv1connect.NewKeyServiceClient(g.caller(ann), "https://"+g.addr).RotateKey(t.Context(), connect.NewRequest(&controlv1.RotateKeyRequest{RequestId: rand.Text()}))
		return api.FromWire("test", err)
	}
	refusedWith(t, rotate(), fault.Conflict, "node cp-2")
	if err := rotate(); strings.Contains(fault.Text(err), "cp-1") {
		t.Fatalf("a node that holds it is named: %v", err)
	}
	next, err := identity.KEKID(wrong)
	ok(t, err)
	submitAs(g, book.HoldsKEK{Node: "cp-2", IDs: []string{before.KEK, next}})
	ok(t, rotate())
	after := g.order.book.View()
	if after.KEK != next || bytes.Equal(after.Slots[0].SealedKey, before.Slots[0].SealedKey) || after.Bundle() != before.Bundle() || !bytes.Equal(g.logKey(), pub) {
		t.Fatalf("%s, bundle %d, want %s and %d", after.KEK, after.Bundle(), next, before.Bundle())
	}
	for _, slot := range after.Slots {
		if _, err := identity.OpenAuthority(slot.CertDER, slot.SealedKey, wrong); err != nil {
			t.Errorf("CA %s, which is %s: %v", slot.ID().Short(), slot.Stage, err)
		}
	}
	if len(after.Slots) != 2 {
		t.Errorf("%d CAs, want one that issues and one that is prepared", len(after.Slots))
	}
	g.until("the old one is dropped", func(s book.State) bool { return slices.Equal(s.Holds("cp-1"), []string{next}) })
	m, _ := g.request(logKey(t))
	_, err = g.enrol(m) // nonces and the CA's key are as they were
	ok(t, err)
}

// logKey is the public half of the key that signs the vendor's log, as an inviter gets it.
func (g *gate) logKey() []byte {
	g.t.Helper()
	ctx := api.With(g.t.Context(), api.Who{Class: api.Operator, Rank: fleet.Admin, Principal: fleet.PrincipalOf(domain, fleet.Operator, "ann")})
	res, err := g.server.InviteOperator(ctx, connect.NewRequest(&controlv1.InviteOperatorRequest{Name: "key", Role: "viewer", Verifier: make([]byte, 32), ValidSeconds: 60}))
	ok(g.t, err)
	return res.Msg.GetLogKey()
}

// TestRotationLosesNothing: a rotation that does not seal everything anew is refused, and so is a CA that is sealed with the key
// of before.
func TestRotationLosesNothing(t *testing.T) {
	o := &order{book: book.NewBook()}
	ca, err := identity.NewCA(domain, start, rand.Reader, time.Hour)
	ok(t, err)
	slots := []identity.Slot{{Stage: identity.Active, CertDER: ca.Cert.Raw, SealedKey: []byte("k")}}
	must(t, o, book.Genesis{TrustDomain: domain, Slots: slots})
	const one, two = "0000000000000001", "0000000000000002"
	kept := []book.Secret{{Name: "log-key", Sealed: []byte("a")}, {Name: "nonce-key", Sealed: []byte("b")}}
	refused(t, o, fault.Invalid, book.KeepSecrets{KEK: one, Secrets: []book.Secret{kept[1], kept[0]}})
	must(t, o, book.KeepSecrets{KEK: one, Secrets: kept})
	must(t, o, book.KeepSecrets{KEK: two, Secrets: kept}) // of another node, later: it changes nothing
	if page := o.book.View(); page.KEK != one {
		t.Fatal(page.KEK)
	}
	rotate := func(change func(*book.RotateKEK)) book.RotateKEK {
		c := book.RotateKEK{From: one, To: two, Nodes: []string{"cp-1"}, CAs: map[fleet.Digest][]byte{slots[0].ID(): []byte("k2")},
			Secrets: []book.Secret{{Name: "log-key", Sealed: []byte("a2")}, {Name: "nonce-key", Sealed: []byte("b2")}}}
		change(&c)
		return c
	}
	whole := rotate(func(*book.RotateKEK) {})
	refused(t, o, fault.Conflict, whole)
	must(t, o, book.HoldsKEK{Node: "cp-1", IDs: []string{one, two}})
	refused(t, o, fault.Conflict, rotate(func(c *book.RotateKEK) { c.Nodes = []string{"cp-1", "cp-2"} }))
	refused(t, o, fault.Conflict, rotate(func(c *book.RotateKEK) { c.From = two }))
	refused(t, o, fault.Invalid, rotate(func(c *book.RotateKEK) { c.To = one }))
	refused(t, o, fault.Invalid, rotate(func(c *book.RotateKEK) { c.Nodes = nil }))
	refused(t, o, fault.Unavailable, rotate(func(c *book.RotateKEK) { c.CAs = nil }))
	refused(t, o, fault.Unavailable, rotate(func(c *book.RotateKEK) { c.Secrets = c.Secrets[:1] }))
	must(t, o, whole)
	second, err := identity.NewCA(domain, start, rand.Reader, time.Hour)
	ok(t, err)
	late := book.PrepareCAWith{KEK: one, PrepareCA: book.PrepareCA{Cert: second.Cert.Raw, SealedKey: []byte("k")}}
	refused(t, o, fault.Unavailable, late)
	late.KEK = two
	must(t, o, late)

	snap, err := o.book.Snapshot()
	ok(t, err)
	var file bytes.Buffer
	_, err = snap.WriteTo(&file)
	ok(t, err)
	back := book.NewBook()
	ok(t, back.Restore(&file))
	x, _ := json.Marshal(o.book.View())
	y, _ := json.Marshal(back.View())
	if !bytes.Equal(x, y) || back.View().KEK != two || !slices.Equal(back.View().Holds("cp-1"), []string{one, two}) {
		t.Fatalf("%s\n%s", x, y)
	}
	log := o.book.Log()
	for i := range log.Size() {
		if e := log.Entry(i); bytes.Contains(e, []byte(`"sealed`)) || bytes.Contains(e, []byte(`"cas"`)) {
			t.Errorf("what is sealed is in the audit log: %s", e)
		}
	}
}

// TestNoKeyIsLetGoBeforeASnapshot: the old key stays, on the disk and on record, until what the node starts from is sealed with the next
// one (FAULTS.md I14). What the node proves itself with opens with either of the two before, and with the next one alone after.
func TestNoKeyIsLetGoBeforeASnapshot(t *testing.T) {
	g := newGate(t, 0)
	g.server.SetMembers([]book.Member{{Name: "cp-1"}})
	var full atomic.Bool
	var at atomic.Uint64
	full.Store(true)
	g.server.Authority().Snapshot = func(_ context.Context, index uint64) error {
		at.Store(index)
		if full.Load() {
			return fault.New("test", fault.Unavailable, "the disk is full")
		}
		return nil
	}
	old, next := bytes.Repeat([]byte{7}, 32), bytes.Repeat([]byte{9}, 32)
	ann := g.operator("ann")
	ok(t, g.status(ann))
	ca, err := identity.NewCA(domain, time.Now(), rand.Reader, time.Hour)
	ok(t, err)
	first, err := identitytest.Leaf(ca, fleet.PrincipalOf(domain, fleet.Node, "cp-1"), time.Now(), time.Hour)
	ok(t, err)
	source, err := g.server.Authority().NewSource(first, identity.Pool(nil))
	ok(t, err)
	proof := filepath.Join(t.TempDir(), authority.CredentialsFile)
	ok(t, source.SaveAt(proof))
	opens := func(kek []byte) error {
		b, err := os.ReadFile(proof)
		ok(t, err)
		return controlplane.OpenCredentials(b, domain, kek)
	}
	file := g.kekFile(old)
	g.until("the node said what it holds", func(s book.State) bool { return len(s.Holds("cp-1")) == 1 })
	was := g.order.book.View().KEK
	ok(t, os.WriteFile(file+".next", next, 0o600))
	g.until("the node holds both", func(s book.State) bool { return len(s.Holds("cp-1")) == 2 })
	ok(t, opens(old))
	ok(t, opens(next))
	keys := controlv1connect.NewKeyServiceClient(g.caller(ann), "https://"+g.addr)
	_, err = keys.RotateKey(t.Context(), connect.NewRequest(&controlv1.RotateKeyRequest{RequestId: rand.Text()}))
	ok(t, err)
	rotated := g.order.book.Index()
	for end := time.Now().Add(time.Minute); at.Load() < rotated; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("no snapshot is asked for that has the rotation")
		}
	}
	res, err := keys.GetKeys(t.Context(), connect.NewRequest(&controlv1.GetKeysRequest{}))
	ok(t, err)
	if b, err := os.ReadFile(file); err != nil || !bytes.Equal(b, old) || !slices.Contains(g.order.book.View().Holds("cp-1"), was) || !slices.Equal(res.Msg.GetUnsettled(), []string{"cp-1"}) {
		t.Fatalf("the old key is let go without a snapshot: %v, %v may need it", err, res.Msg.GetUnsettled())
	}
	full.Store(false)
	g.until("the old key is let go", func(s book.State) bool { return slices.Equal(s.Holds("cp-1"), []string{s.KEK}) })
	if b, err := os.ReadFile(file); err != nil || !bytes.Equal(b, next) {
		t.Fatalf("kek_file is not the next key: %v", err)
	}
	ok(t, opens(next))
	if opens(old) == nil {
		t.Error("the old key opens what the node starts from")
	}
}
