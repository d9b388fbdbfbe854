// SPDX-License-Identifier: Apache-2.0

package controlplane

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ed25519"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	boundaryv1 "github.com/demarc-dev/demarc/api/boundary/v1"
	"github.com/demarc-dev/demarc/audit"
	"github.com/demarc-dev/demarc/daemon/controlplane/book"
	"github.com/demarc-dev/demarc/daemon/controlplane/evidence"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/seal"
)

// customer is the log of an appliance that a test writes.
type customer struct {
	t    *testing.T
	s    *Server
	name fleet.ApplianceID
	key  ed25519.PrivateKey
	l    *live
	n    uint64 // of its newest report
}

// watched is a vendor with two appliances whose logs have keys.
func watched(t *testing.T) (s *Server, bad, good *customer) {
	t.Helper()
	s, _ = begun(t)
	both := make([]*customer, 2)
	for i, name := range []fleet.ApplianceID{"bad", "good"} {
		c := &customer{t: t, s: s, name: name, key: ed25519.NewKeyFromSeed(bytes.Repeat([]byte{byte(i + 1)}, 32))}
		c.l = &live{s: s, name: name, by: fleet.PrincipalOf(innerDomain, fleet.Appliance, string(name))}
		k, err := seal.KeyOf(c.key.Public())
		if err != nil {
			t.Fatal(err)
		}
		tell(t, s, book.RegisterAppliance{Name: name, Customer: "globex", Expect: []byte(`{}`)})
		till := time.Now().Add(time.Hour)
		tell(t, s, book.Enrol{Name: name, Nonce: string(name), NonceTill: till, Serial: "s-" + fleet.Serial(name), Till: till, LogKey: k.PEM()})
		c.l.busy.Store(again) // nobody writes to it
		both[i] = c
	}
	return s, both[0], both[1]
}

func (c *customer) of() book.Appliance {
	c.t.Helper()
	a, err := c.s.replica.View().Appliance(c.name)
	if err != nil {
		c.t.Fatal(err)
	}
	return a
}

// says reports over the channel.
func (c *customer) says(r *boundaryv1.Report) {
	c.t.Helper()
	c.n++
	r.Number = c.n
	if err := c.s.hear(c.t.Context(), c.l, &boundaryv1.Up{Body: &boundaryv1.Up_Report{Report: r}}); err != nil {
		c.t.Fatalf("the channel ends: %v", err)
	}
	if done := c.of().ReportsDone; done != c.n {
		c.t.Fatalf("report %d waits behind %d", c.n, done)
	}
}

func (c *customer) answers(b []byte) {
	c.t.Helper()
	c.says(&boundaryv1.Report{Body: &boundaryv1.Report_Cosigned{Cosigned: b}})
}

// asked is the head that waits for this appliance's line, asked for now; the order is acknowledged.
func (c *customer) asked() []byte {
	c.t.Helper()
	if _, err := c.s.evidence.Ask(c.t.Context(), c.name, c.s.replica.Log().Size()); err != nil {
		c.t.Fatal(err)
	}
	a := c.of()
	if len(a.Orders) == 0 || a.Orders[len(a.Orders)-1].Checkpoint == nil {
		c.t.Fatalf("%s was not asked", c.name)
	}
	cp := a.Orders[len(a.Orders)-1].Checkpoint
	tell(c.t, c.s, book.OrdersDone{Name: c.name, Upto: a.OrdersSent()})
	return cp.Note
}

func (c *customer) cosigns(cp []byte) []byte {
	c.t.Helper()
	b, err := audit.Cosign(cp, audit.CustomerOrigin(innerDomain, c.name), c.key, time.Now())
	if err != nil {
		c.t.Fatal(err)
	}
	return b
}

// TestOneCustomersRubbishIsNobodysEvidence: what is no countersignature of this appliance over a head that it was asked about
// is refused with its size and digest, the channel and the asking go on, and what others signed stays good (FAULTS.md I4).
func TestOneCustomersRubbishIsNobodysEvidence(t *testing.T) {
	s, bad, good := watched(t)
	good.answers(good.cosigns(good.asked()))
	others := good.cosigns(good.asked())
	question := bad.asked()
	rubbish := strings.Repeat("rubbish", 500)
	for name, b := range map[string][]byte{
		"rubbish": []byte(rubbish), "nothing": {}, "the question": question, "another customer's": others,
		"another customer's line": good.cosigns(question), "two lines": good.cosigns(bad.cosigns(question)),
	} {
		bad.answers(b)
		leaf := string(s.replica.Log().Entry(s.replica.Log().Size() - 1))
		if !strings.Contains(leaf, fmt.Sprintf("%d bytes with the digest %s", len(b), fleet.DigestOf(b))) || len(leaf) > 1024 {
			t.Errorf("%s, on record: %s", name, leaf)
		}
		if len(bad.of().Cosigned) != 0 {
			t.Fatalf("%s is kept", name)
		}
	}
	good.answers(others)
	if n := len(good.of().Cosigned); n != 2 {
		t.Errorf("of the other customer %d are kept, want 2", n)
	}
	verifies := func(want int) {
		t.Helper()
		b, err := s.evidence.Bundle()
		if err != nil {
			t.Fatal(err)
		}
		key, err := s.authority.LogSigner()
		if err != nil {
			t.Fatal(err)
		}
		origin := audit.VendorOrigin(innerDomain)
		file, err := b.Encode()
		if err != nil {
			t.Fatal(err)
		}
		r, err := audit.Verify(file, audit.Pins{NeedWitness: true, Logs: map[string]crypto.PublicKey{origin: key.Public()},
			Witnesses: map[string]crypto.PublicKey{audit.CustomerOrigin(innerDomain, good.name): good.key.Public()}})
		if err != nil || len(b.Logs[0].Cosignatures) != want {
			t.Errorf("%d countersignatures of the vendor's log, want %d; %+v, %v", len(b.Logs[0].Cosignatures), want, r, err)
		}
	}
	verifies(2)
	bad.answers(bad.cosigns(bad.asked())) // it behaves again: nothing stands in its way
	if n := len(bad.of().Cosigned); n != 1 {
		t.Errorf("%d are kept once it behaves, want 1", n)
	}
	verifies(3)
	for range 2 * book.MaxAsked {
		bad.asked()
	}
	if n := len(bad.of().Asked); n != book.MaxAsked {
		t.Errorf("%d questions are kept, want %d", n, book.MaxAsked)
	}
}

// TestRubbishIsNoNews: a log at rest stays at rest beside an appliance that answers each question with rubbish.
func TestRubbishIsNoNews(t *testing.T) {
	s, bad, _ := watched(t)
	var n evidence.Growth
	n.Read(s.replica.Log())
	upto := n.Upto
	bad.asked()
	bad.answers([]byte("rubbish"))
	if n.Read(s.replica.Log()); n.Upto != upto {
		t.Errorf("news up to %d, before the rubbish %d", n.Upto, upto)
	}
}

// TestTheVendorsLogIsCountersignedAgain (MUTANTS daemon/controlplane/evidence.go:205): each time that the log has news, and
// from the last head on.
func TestTheVendorsLogIsCountersignedAgain(t *testing.T) {
	s, _, good := watched(t)
	s.channels.open[good.name] = good.l
	synctest.Test(t, func(t *testing.T) {
		done := make(chan error, 1)
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		go func() { done <- s.evidence.Witness(ctx, time.Second) }()
		var last int64
		for round := range 3 {
			tell(t, s, book.RegisterCustomer{Name: fleet.CustomerID(fmt.Sprint("initech-", round))}) // news
			time.Sleep(2500 * time.Millisecond)
			synctest.Wait()
			a := good.of()
			if len(a.Orders) != 1 || a.Orders[0].Checkpoint == nil {
				t.Fatalf("round %d: orders %+v", round, a.Orders)
			}
			cp := a.Orders[0].Checkpoint
			if cp.From != last {
				t.Errorf("round %d: proven from %d, want %d", round, cp.From, last)
			}
			tell(t, s, book.OrdersDone{Name: good.name, Upto: a.OrdersSent()})
			good.answers(good.cosigns(cp.Note))
			a = good.of()
			if len(a.Cosigned) != round+1 {
				t.Fatalf("round %d: %d are kept", round, len(a.Cosigned))
			}
			v, err := evidence.Verifier(audit.VendorOrigin(innerDomain), s.authority.LogPublicKey())
			if err != nil {
				t.Fatal(err)
			}
			h, err := audit.OpenCheckpoint(a.Cosigned[round], v)
			if err != nil || h.Size <= last {
				t.Fatalf("round %d: a head of %d entries, before %d: %v", round, h.Size, last, err)
			}
			last = h.Size
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// reports sends a head of the customer's log, proven to continue its first entries.
func (c *customer) reports(log audit.Log, from int64, by ed25519.PrivateKey) {
	c.t.Helper()
	origin := audit.CustomerOrigin(innerDomain, c.name)
	signer, err := audit.NoteSigner(origin, by)
	if err != nil {
		c.t.Fatal(err)
	}
	cp, err := audit.Checkpoint(origin, log.Size(), log.Root(), signer)
	if err != nil {
		c.t.Fatal(err)
	}
	proof, err := log.Consistency(from, log.Size())
	if err != nil {
		c.t.Fatal(err)
	}
	m := &boundaryv1.Checkpoint{Note: cp, From: from}
	for _, p := range proof {
		m.Proof = append(m.Proof, bytes.Clone(p[:]))
	}
	c.says(&boundaryv1.Report{Body: &boundaryv1.Report_Checkpoint{Checkpoint: m}})
}

// TestAForkOfACustomersLogIsNotCountersigned (MUTANTS daemon/controlplane/evidence.go:70): nothing but a head that continues
// the last one that was countersigned is; a fork is on record, and is no reason to stop listening.
func TestAForkOfACustomersLogIsNotCountersigned(t *testing.T) {
	s, _, c := watched(t)
	written := func(n int, story string, l audit.Log) audit.Log {
		for range n {
			l = l.Append(audit.Entry{At: time.Unix(1_700_000_000, 0), By: "local", Kind: "test/1", Detail: story})
		}
		return l
	}
	so := written(3, "so it was", audit.Log{})
	c.reports(so, 0, c.key)
	if n := len(c.of().Witnessed); n != 1 {
		t.Fatalf("the first head: %d are kept", n)
	}
	forks := 0
	onRecord := func() (n int) {
		for i := range s.replica.Log().Size() {
			if strings.Contains(string(s.replica.Log().Entry(i)), `"what":"checkpoint"`) {
				n++
			}
		}
		return n
	}
	for name, log := range map[string]audit.Log{
		"another history":          written(5, "otherwise", audit.Log{}),
		"another of the same size": written(3, "otherwise", audit.Log{}),
	} {
		c.reports(log, 3, c.key)
		if forks++; len(c.of().Witnessed) != 1 || onRecord() != forks {
			t.Errorf("%s: %d are countersigned, %d on record", name, len(c.of().Witnessed), onRecord())
		}
	}
	c.reports(written(2, "and on", so), 3, ed25519.NewKeyFromSeed(bytes.Repeat([]byte{9}, 32)))
	if n := len(c.of().Witnessed); n != 1 {
		t.Errorf("another key: %d are countersigned", n)
	}
	// An appliance that did not take our line proves from an older head: it gets the line again, and no second one.
	tell(t, s, book.OrdersDone{Name: c.name, Upto: c.of().OrdersSent()})
	c.reports(written(2, "and on", so), 0, c.key)
	if a := c.of(); len(a.Witnessed) != 1 || len(a.Orders) != 1 || !bytes.Equal(a.Orders[0].Cosigned, a.Witnessed[0]) {
		t.Errorf("%d are countersigned, %d orders", len(a.Witnessed), len(a.Orders))
	}
	c.reports(written(2, "and on", so), 3, c.key)
	if n := len(c.of().Witnessed); n != 2 {
		t.Errorf("what continues the last one: %d are countersigned", n)
	}
}
