// SPDX-License-Identifier: Apache-2.0

package controlplane_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/demarc-dev/demarc/daemon/controlplane/book"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/identity"
	"github.com/demarc-dev/demarc/ledger"
)

var start = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

// order puts proposals straight into a book.
type order struct {
	book *ledger.Book[book.State]
	n    uint64
}

func (o *order) Propose(_ context.Context, data []byte) ([]byte, error) {
	if err := o.book.DryRun(data); err != nil {
		return nil, err
	}
	o.n++
	return o.book.Apply(o.n, data)
}

func put[R any](t *testing.T, o *order, c ledger.Change[book.State, R]) (R, error) {
	t.Helper()
	return ledger.Submit(t.Context(), o, ledger.Meta{At: start.Add(time.Duration(o.n) * time.Second), By: "test", Request: fleet.RequestID(fmt.Sprint(o.n))}, c)
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
	if after, _ := json.Marshal(o.book.View()); !bytes.Equal(before, after) {
		t.Fatalf("%s was refused and changed the book", c.Kind())
	}
}

// newBook is a book with a trust domain, a customer and the appliance eu-1.
func newBook(t *testing.T) *order {
	o := &order{book: book.NewBook()}
	must(t, o, book.Genesis{TrustDomain: "acme.example", Slots: []identity.Slot{{Stage: identity.Active, CertDER: []byte("c"), SealedKey: []byte("k")}}})
	must(t, o, book.RegisterCustomer{Name: "globex"})
	must(t, o, book.RegisterAppliance{Name: "eu-1", Customer: "globex", Expect: json.RawMessage(`{}`)})
	return o
}

func enrol(nonce, serial, key string) book.Enrol {
	return book.Enrol{Name: "eu-1", Nonce: nonce, NonceTill: start.Add(time.Hour), Serial: fleet.Serial(serial), Till: start.Add(24 * time.Hour), LogKey: []byte(key)}
}

func TestANonceIsGoodOnce(t *testing.T) {
	o := newBook(t)
	must(t, o, enrol("n1", "1", "key"))
	refused(t, o, fault.Denied, enrol("n1", "2", "key"))
	refused(t, o, fault.Denied, enrol("n2", "2", "another log key"))
	must(t, o, enrol("n3", "2", "key"))
	a, err := o.book.View().Appliance("eu-1")
	if err != nil || a.Current != "1" || a.Next != "2" {
		t.Fatalf("%+v, %v", a, err)
	}
	must(t, o, book.Edge{Name: "eu-1", Serial: "2", Online: true, Node: "cp-1"}) // the next certificate is used: it is the current one now
	refused(t, o, fault.Denied, book.Edge{Name: "eu-1", Serial: "1", Online: true, Node: "cp-1"})
	refused(t, o, fault.Denied, book.Renew{Name: "eu-1", Using: "1", Serial: "3", Till: start})
}

func TestABanIsForGood(t *testing.T) {
	o := newBook(t)
	must(t, o, enrol("n1", "1", "key"))
	must(t, o, book.Ban{Name: "eu-1", Reason: "lost"})
	refused(t, o, fault.Denied, enrol("n2", "2", "key"))
	refused(t, o, fault.Denied, book.Edge{Name: "eu-1", Serial: "1", Online: true})
	refused(t, o, fault.Denied, book.Ask{To: "eu-1", ID: "p", First: 1, Count: 1})
}

func TestNamesAreTakenOnce(t *testing.T) {
	o := newBook(t)
	refused(t, o, fault.Conflict, book.RegisterCustomer{Name: "globex"})
	refused(t, o, fault.Conflict, book.RegisterAppliance{Name: "eu-1", Customer: "globex"})
	refused(t, o, fault.NotFound, book.RegisterAppliance{Name: "us-1", Customer: "nobody"})
	refused(t, o, fault.Conflict, book.Genesis{TrustDomain: "evil.example", Slots: []identity.Slot{{}}})
	refused(t, o, fault.Invalid, book.RegisterCustomer{Name: "../x"})
}

// Orders wait until they are acknowledged; reports are taken once and in order.
func TestNothingIsLostAndNothingTwice(t *testing.T) {
	o := newBook(t)
	must(t, o, enrol("n1", "1", "key"))
	must(t, o, book.Ask{To: "eu-1", ID: "p", First: 1, Count: 5})
	must(t, o, book.OrdersDone{Name: "eu-1", Upto: 3})
	must(t, o, book.OrdersDone{Name: "eu-1", Upto: 2}) // an old one changes nothing
	refused(t, o, fault.Conflict, book.OrdersDone{Name: "eu-1", Upto: 6})
	a, _ := o.book.View().Appliance("eu-1")
	if len(a.Orders) != 2 || a.OrdersDone != 3 || a.OrdersSent() != 5 || a.Orders[0].Probe.Index != 4 {
		t.Fatalf("%+v", a)
	}
	echo := func(number, index uint64) book.Report {
		return book.Report{Name: "eu-1", Number: number, Probe: &book.ProbeIndex{ID: "p", Index: index}}
	}
	if took := must(t, o, echo(1, 1)); !took.New || took.Done != 1 {
		t.Fatalf("%+v", took)
	}
	if took := must(t, o, echo(1, 1)); took.New || took.Done != 1 {
		t.Fatalf("a report that came twice was taken twice: %+v", took)
	}
	refused(t, o, fault.Conflict, echo(3, 3))
	must(t, o, echo(2, 2))
	must(t, o, echo(3, 2)) // the same echo under a new number: that is a double
	must(t, o, echo(4, 5)) // and this one left others out
	a, _ = o.book.View().Appliance("eu-1")
	if a.Probe.Sent != 5 || a.Probe.Echoed != 3 || a.Probe.Doubled != 1 || a.Probe.OutOfOrder != 1 {
		t.Fatalf("%+v", a.Probe)
	}
	stranger := book.Report{Name: "eu-1", Number: 5, Operation: &book.OperationReport{ID: "never-asked", State: "released"}}
	if took := must(t, o, stranger); !took.New || took.Reason == "" || len(o.book.View().Operations("eu-1")) != 0 { // refused, it would come again for ever
		t.Fatalf("a report of an operation that is not in the book: %+v", took)
	}
}

func TestAReleaseIsImmutable(t *testing.T) {
	o := newBook(t)
	rel := book.Publish{Digest: fleet.DigestOf([]byte("a")), App: "notes", Version: "1", Sealed: []byte("a"), To: []fleet.ApplianceID{"eu-1"}}
	must(t, o, rel)
	rel.Digest, rel.Sealed = fleet.DigestOf([]byte("b")), []byte("b")
	refused(t, o, fault.Conflict, rel)
}

func TestASnapshotIsTheWholeBook(t *testing.T) {
	o := newBook(t)
	must(t, o, enrol("n1", "1", "key"))
	must(t, o, book.Ask{To: "eu-1", ID: "p", First: 1, Count: 5})
	must(t, o, book.RequestOperation{ID: "op-1", To: "eu-1", Sealed: []byte("x")})
	snap, err := o.book.Snapshot()
	if err != nil {
		t.Fatal(err)
	}
	var file bytes.Buffer
	if _, err := snap.WriteTo(&file); err != nil {
		t.Fatal(err)
	}
	back := book.NewBook()
	if err := back.Restore(&file); err != nil {
		t.Fatal(err)
	}
	one, _ := json.Marshal(o.book.View())
	two, _ := json.Marshal(back.View())
	if !bytes.Equal(one, two) || back.Log().Root() != o.book.Log().Root() || len(back.View().Operations("eu-1")) != 1 {
		t.Fatalf("%s\n%s", one, two)
	}
	again := &order{book: back, n: o.n}
	refused(t, again, fault.Denied, enrol("n1", "9", "key")) // the spent nonce was not forgotten
}
