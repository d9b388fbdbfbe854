// SPDX-License-Identifier: Apache-2.0

package appliance

import (
	"bytes"
	"crypto/ed25519"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	boundaryv1 "github.com/demarc-dev/demarc/api/boundary/v1"
	"github.com/demarc-dev/demarc/audit"
	"github.com/demarc-dev/demarc/daemon/appliance/book"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/ledger"
	"github.com/demarc-dev/demarc/seal"
)

// history is a log of the vendor's that a test writes.
type history struct {
	key ed25519.PrivateKey
	log audit.Log
}

func (h history) grown(n int, story string) history {
	for range n {
		body := json.RawMessage(fmt.Sprintf("%q", story))
		h.log = h.log.Append(audit.Entry{At: time.Unix(1_700_000_000, 0), By: "vendor", Kind: "test/1", Body: body})
	}
	return h
}

// asks is an order to countersign the head, proven to continue its first entries.
func (h history) asks(t *testing.T, from int64) *boundaryv1.Order {
	t.Helper()
	origin := audit.VendorOrigin(vendorDomain)
	signer, err := audit.NoteSigner(origin, h.key)
	if err != nil {
		t.Fatal(err)
	}
	cp, err := audit.Checkpoint(origin, h.log.Size(), h.log.Root(), signer)
	if err != nil {
		t.Fatal(err)
	}
	c := &boundaryv1.Checkpoint{Note: cp, From: from}
	proof, err := h.log.Consistency(from, h.log.Size())
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range proof {
		c.Proof = append(c.Proof, bytes.Clone(p[:]))
	}
	return &boundaryv1.Order{Body: &boundaryv1.Order_Checkpoint{Checkpoint: c}}
}

// puts puts a change straight into the book.
func puts[R any](t *testing.T, a *Appliance, n uint64, c ledger.Change[book.State, R]) {
	t.Helper()
	data, err := ledger.Encode(ledger.Meta{At: time.Unix(1_700_000_000, 0), By: fleet.Local, Request: fleet.RequestID(fmt.Sprint(n))}, c)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := a.book.Book().Apply(n, data); err != nil {
		t.Fatal(err)
	}
}

// watches is an appliance that met the vendor whose log this is.
func watches(t *testing.T, h history) (*Appliance, func(*boundaryv1.Order) book.Take) {
	t.Helper()
	a := asker(t)
	k, err := seal.KeyOf(h.key.Public())
	if err != nil {
		t.Fatal(err)
	}
	n, orders := uint64(0), uint64(0)
	next := func() uint64 { n++; return n }
	puts(t, a, next(), book.SetSite{Site: book.Site{TrustDomain: vendorDomain}})
	puts(t, a, next(), book.MeetVendor{LogKey: k.PEM()})
	return a, func(o *boundaryv1.Order) book.Take {
		t.Helper()
		orders++
		o.Number = orders
		take := a.take(o)
		puts(t, a, next(), take)
		return take
	}
}

// TestAForkOfTheVendorsLogIsNotCountersigned (MUTANTS daemon/appliance/channel.go:335): nothing but a head that continues the
// last one that was countersigned is.
func TestAForkOfTheVendorsLogIsNotCountersigned(t *testing.T) {
	h := history{key: ed25519.NewKeyFromSeed(bytes.Repeat([]byte{3}, 32))}.grown(3, "so it was")
	a, take := watches(t, h)
	if got := take(h.asks(t, 0)); got.Witnessed == nil {
		t.Fatalf("the first head: %s", got.Refused)
	}
	forged := h
	forged.key = ed25519.NewKeyFromSeed(bytes.Repeat([]byte{4}, 32))
	for name, o := range map[string]*boundaryv1.Order{
		"another history":          history{key: h.key}.grown(5, "it was otherwise").asks(t, 3),
		"another of the same size": history{key: h.key}.grown(3, "it was otherwise").asks(t, 3),
		"a shorter one":            history{key: h.key}.grown(2, "so it was").asks(t, 2),
		"another key":              forged.grown(2, "so it was").asks(t, 3),
	} {
		got := take(o)
		if kept := a.book.View().Witnessed; len(kept) != 1 || (got.Witnessed != nil && !bytes.Equal(got.Witnessed, kept[0])) {
			t.Errorf("%s: it was countersigned", name)
		}
	}
	// A vendor that did not take our line proves from an older head: it gets the line again, and no second one.
	if got := take(h.grown(4, "and on").asks(t, 0)); !slices.EqualFunc(a.book.View().Witnessed, [][]byte{got.Witnessed}, bytes.Equal) {
		t.Errorf("%q", got.Witnessed)
	}
	if got := take(h.grown(4, "and on").asks(t, 3)); got.Witnessed == nil || len(a.book.View().Witnessed) != 2 {
		t.Errorf("what continues the last one: %s", got.Refused)
	}
}

// TestRubbishInPlaceOfACountersignatureStaysOutOfTheLog: size and digest of it are on record, its bytes are not (FAULTS.md C2).
func TestRubbishInPlaceOfACountersignatureStaysOutOfTheLog(t *testing.T) {
	a, take := watches(t, history{key: ed25519.NewKeyFromSeed(bytes.Repeat([]byte{3}, 32))})
	rubbish := []byte(strings.Repeat("rubbish", 700))
	for _, b := range [][]byte{rubbish, rubbish[:7], {}} {
		take(&boundaryv1.Order{Body: &boundaryv1.Order_Cosigned{Cosigned: b}})
		leaf := string(a.book.Log().Entry(a.book.Log().Size() - 1))
		if !strings.Contains(leaf, fmt.Sprintf("%d bytes with the digest %s", len(b), fleet.DigestOf(b))) || len(leaf) > 1024 {
			t.Errorf("on record: %s", leaf)
		}
	}
	if s := a.book.View(); s.OrdersDone != 3 || len(s.Cosigned) != 0 {
		t.Errorf("%d orders are done, %d countersignatures are kept", s.OrdersDone, len(s.Cosigned))
	}
}

// TestUnansweredQuestionsBecomeRarer: each costs entries of both logs, so a vendor that never answers is asked less and less.
func TestUnansweredQuestionsBecomeRarer(t *testing.T) {
	var p backoff
	now, asked := time.Unix(0, 0), 0
	for range 24 * 360 { // a day of ticks
		if p.due(now, 0) {
			asked++
		}
		now = now.Add(witnessEvery)
	}
	if asked < 24 || asked > 40 {
		t.Errorf("asked %d times in a day without an answer", asked)
	}
	if !p.due(now, 5) || p.due(now, 5) || !p.due(now.Add(witnessEvery), 5) {
		t.Error("after an answer the next question waits")
	}
}

// TestALogAtRestIsNotAskedFor: what countersigning adds itself is no news, and one entry of anything else is.
func TestALogAtRestIsNotAskedFor(t *testing.T) {
	a, take := watches(t, history{key: ed25519.NewKeyFromSeed(bytes.Repeat([]byte{3}, 32))}.grown(1, "so it was"))
	from := a.book.Log().Size()
	h := history{key: ed25519.NewKeyFromSeed(bytes.Repeat([]byte{3}, 32))}.grown(1, "so it was")
	take(h.asks(t, 0))
	take(&boundaryv1.Order{Body: &boundaryv1.Order_Cosigned{Cosigned: []byte("rubbish")}})
	n := a.book.View().OrdersDone + 2
	puts(t, a, n+1, book.Checkpointed{Checkpoint: book.Checkpoint{Note: []byte("a head")}})
	puts(t, a, n+2, book.ReportsDone{Upto: 1})
	if news(a.book.Log(), from) {
		t.Error("countersigning is news to itself")
	}
	puts(t, a, n+3, book.Take{Number: n - 1, Probe: &book.ProbeIndex{ID: "p", Index: 1}})
	if !news(a.book.Log(), from) || news(a.book.Log(), a.book.Log().Size()) {
		t.Error("a probe is no news, or an empty stretch is")
	}
}
