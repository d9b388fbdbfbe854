// SPDX-License-Identifier: Apache-2.0

package controlplane_test

import (
	"bytes"
	"crypto/rand"
	"encoding/json"
	"testing"
	"time"

	"github.com/demarc-dev/demarc/daemon/controlplane/book"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/identity"
	"github.com/demarc-dev/demarc/ledger"
)

// TestOldLogTakesOperators: on what an older build wrote, log or snapshot, operators come to be as they do in a new book.
func TestOldLogTakesOperators(t *testing.T) {
	o := replay(t)
	adopt := book.AdoptOperator{FirstOperator: book.FirstOperator{Name: "ann", Serial: "1", Till: start.Add(time.Hour), Issuer: o.book.View().Slots[0].ID()}}
	submit := func(p fleet.Principal) error {
		_, err := ledger.Submit(t.Context(), o, ledger.Meta{At: start.Add(time.Minute), By: p, Request: fleet.RequestID(rand.Text())}, adopt)
		return err
	}
	if err := submit("test"); fault.Of(err) != fault.Invalid {
		t.Fatalf("adopted by somebody else: %v", err)
	}
	ok(t, submit(fleet.PrincipalOf("acme.example", fleet.Operator, "ann")))
	adopt.Name = "ben"
	if err := submit(fleet.PrincipalOf("acme.example", fleet.Operator, "ben")); fault.Of(err) != fault.Denied {
		t.Fatalf("a second one was adopted: %v", err)
	}
}

// TestTheLastAdminStays: neither role, ban nor removal leaves a book without somebody who can admit others.
func TestTheLastAdminStays(t *testing.T) {
	o := &order{book: book.NewBook()}
	slots := []identity.Slot{{Stage: identity.Active, CertDER: []byte("c"), SealedKey: []byte("k")}}
	first := book.FirstOperator{Name: "ann", Serial: "1", Till: start.Add(time.Hour), Issuer: slots[0].ID()}
	genesis := book.GenesisWith{Genesis: book.Genesis{TrustDomain: domain, Slots: slots}, Operator: first}
	must(t, o, genesis)
	must(t, o, genesis) // of the second node
	last := func() {
		t.Helper()
		refused(t, o, fault.Conflict, book.SetOperatorRole{Name: "ann", Role: fleet.Operate})
		refused(t, o, fault.Conflict, book.BanOperator{Name: "ann"})
		refused(t, o, fault.Conflict, book.RemoveOperator{Name: "ann"})
	}
	last()
	key := fleet.DigestOf([]byte("key"))
	must(t, o, book.InviteOperator{Name: "ben", Role: fleet.Admin, Verifier: key, Till: start.Add(2 * time.Hour)})
	last() // an invitation is not an admin
	must(t, o, book.EnrolOperator{Name: "ben", Verifier: key, Key: key, Serial: "2", Till: start, Issuer: slots[0].ID()})
	last() // nor is one whose certificate ran out
	must(t, o, book.RenewOperator{Name: "ben", Using: "2", Serial: "3", Till: start.Add(time.Hour), Issuer: slots[0].ID()})
	must(t, o, book.SetOperatorRole{Name: "ann", Role: fleet.Viewer})
	must(t, o, book.SetOperatorRole{Name: "ann", Role: fleet.Admin})
	must(t, o, book.BanOperator{Name: "ann", Reason: "left"})
	refused(t, o, fault.Conflict, book.SetOperatorRole{Name: "ann", Role: fleet.Admin})
	refused(t, o, fault.Conflict, book.InviteOperator{Name: "ann", Role: fleet.Viewer, Verifier: key, Till: start.Add(2 * time.Hour)})
	refused(t, o, fault.Denied, book.RenewOperator{Name: "ann", Using: "1", Serial: "4", Till: start.Add(time.Hour), Issuer: slots[0].ID()})
	refused(t, o, fault.Denied, book.EnrolOperator{Name: "ann", Verifier: "", Key: key, Serial: "5", Till: start, Issuer: slots[0].ID()})
	must(t, o, book.RemoveOperator{Name: "ann"})
	soon := book.InviteOperator{Name: "cat", Role: fleet.Viewer, Verifier: key, Till: start.Add(time.Duration(o.n)*time.Second + time.Millisecond)}
	must(t, o, soon)
	refused(t, o, fault.Expired, book.EnrolOperator{Name: "cat", Verifier: key, Key: key, Serial: "6", Till: start.Add(time.Hour), Issuer: slots[0].ID()})
	refused(t, o, fault.Invalid, soon)
	must(t, o, book.RemoveOperator{Name: "cat"})
	refused(t, o, fault.NotFound, book.BanOperator{Name: "ann"})

	snap, err := o.book.Snapshot()
	ok(t, err)
	var file bytes.Buffer
	_, err = snap.WriteTo(&file)
	ok(t, err)
	back := book.NewBook()
	ok(t, back.Restore(&file))
	one, _ := json.Marshal(o.book.View())
	two, _ := json.Marshal(back.View())
	if !bytes.Equal(one, two) || len(back.View().Operators()) != 1 {
		t.Fatalf("%s\n%s", one, two)
	}
}
