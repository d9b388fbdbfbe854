// SPDX-License-Identifier: Apache-2.0

package controlplane_test

import (
	"encoding/json"
	"fmt"
	"reflect"
	"testing"
	"time"

	"github.com/demarc-dev/demarc/daemon/controlplane"
	"github.com/demarc-dev/demarc/daemon/controlplane/book"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/ledger"
)

// TestCertificatesOfANodeLaws: the one in use passes and the one before it, older ones are refused; after a certify nothing from
// before passes, and open connections with it end; nobody speaks for another node, and restarts do not fill the book.
func TestCertificatesOfANodeLaws(t *testing.T) {
	o := newBook(t)
	issuer := o.book.View().Slots[0].ID()
	till := start.Add(30 * 24 * time.Hour)
	n := 0
	leaf := func(name, serial, file string) error {
		n++
		c := book.NodeLeaf{Name: name, Leaf: book.NodeCert{Serial: fleet.Serial(serial), Till: till}}
		if file != "" {
			c.File = book.NodeCert{Serial: fleet.Serial(file), Till: till.AddDate(1, 0, 0)}
		}
		_, err := ledger.Submit(t.Context(), o, ledger.Meta{At: start.Add(time.Duration(o.n) * time.Second), By: fleet.PrincipalOf("acme.example", fleet.Node, "cp-1"), Request: fleet.RequestID(fmt.Sprint("leaf", n))}, c)
		return err
	}
	begins := start
	state := func(want map[string]string) {
		t.Helper()
		for serial, is := range want {
			cut, err := controlplane.RefusesNode(o.book.View(), "cp-1", fleet.Serial(serial), begins)
			got := "passes"
			if err != nil {
				got = "refused"
			}
			if cut {
				got = "cut"
			}
			if got != is {
				t.Errorf("certificate %s %s, want %s", serial, got, is)
			}
		}
	}
	if err := leaf("cp-2", "x", ""); fault.Of(err) != fault.Denied {
		t.Fatalf("a node speaks for another: %v", err)
	}
	ok(t, leaf("cp-1", "a", "file"))
	state(map[string]string{"file": "passes", "a": "passes", "unheard": "passes"})
	ok(t, leaf("cp-1", "a", "file")) // the same again
	state(map[string]string{"file": "passes", "a": "passes"})
	ok(t, leaf("cp-1", "b", "file"))
	state(map[string]string{"file": "refused", "a": "passes", "b": "passes"})
	ok(t, leaf("cp-1", "c", "file"))
	state(map[string]string{"file": "refused", "a": "refused", "b": "passes", "c": "passes"})
	if err := leaf("cp-1", "a", ""); fault.Of(err) != fault.Denied {
		t.Fatalf("a refused certificate is put on record again: %v", err)
	}
	refused(t, o, fault.Unavailable, book.CertifyNode{Name: "cp-1", Serial: "new", From: start, Till: till, Issuer: "sha256:" + fleet.Digest(fmt.Sprintf("%064d", 1))})
	refused(t, o, fault.Denied, book.CertifyNode{Name: "cp-1", Serial: "a", From: start, Till: till, Issuer: issuer})
	refused(t, o, fault.Invalid, book.CertifyNode{Name: "cp-1", From: start, Till: till, Issuer: issuer})
	must(t, o, book.CertifyNode{Name: "cp-1", Serial: "new", From: start, Till: till, Issuer: issuer})
	state(map[string]string{"file": "cut", "a": "cut", "b": "cut", "c": "cut", "new": "passes", "unheard": "passes"})
	begins = start.Add(-time.Second) // one from before, that was never on record
	state(map[string]string{"new": "passes", "unheard": "cut"})
	begins = start
	ok(t, leaf("cp-1", "d", "new"))
	state(map[string]string{"new": "passes", "d": "passes", "c": "cut"})

	for i := range 200 {
		ok(t, leaf("cp-1", fmt.Sprint("restart-", i), "new"))
	}
	certs, _ := o.book.View().Certs("cp-1")
	if len(certs.Refused) > 64 {
		t.Fatalf("%d refused serials are kept after 200 restarts", len(certs.Refused))
	}
	state(map[string]string{"file": "cut", "new": "refused", "restart-197": "refused", "restart-198": "passes", "restart-199": "passes"})

	b, err := json.Marshal(o.book.View())
	ok(t, err)
	var again book.State
	ok(t, json.Unmarshal(b, &again))
	if got, _ := again.Certs("cp-1"); !reflect.DeepEqual(got, certs) {
		t.Fatalf("%+v, want %+v", got, certs)
	}
	must(t, o, book.RemoveNode{Name: "cp-1", Reason: "gone"})
	refused(t, o, fault.Denied, book.CertifyNode{Name: "cp-1", Serial: "late", From: start, Till: till, Issuer: issuer})
	state(map[string]string{"restart-199": "cut", "unheard": "cut"})
}

// TestWhatRanOutIsForgotten: a refused serial is kept for as long as its certificate would be good.
func TestWhatRanOutIsForgotten(t *testing.T) {
	o := newBook(t)
	issuer := o.book.View().Slots[0].ID()
	must(t, o, book.CertifyNode{Name: "cp-1", Serial: "short", From: start, Till: start.Add(time.Minute), Issuer: issuer})
	must(t, o, book.CertifyNode{Name: "cp-1", Serial: "long", From: start, Till: start.Add(24 * time.Hour), Issuer: issuer})
	if c, _ := o.book.View().Certs("cp-1"); len(c.Refused) != 1 {
		t.Fatalf("%+v", c)
	}
	o.n += 3600 // an hour on
	must(t, o, book.CertifyNode{Name: "cp-1", Serial: "next", From: start, Till: start.Add(24 * time.Hour), Issuer: issuer})
	if c, _ := o.book.View().Certs("cp-1"); len(c.Refused) != 1 || c.Refused[0].Serial != "long" {
		t.Fatalf("%+v", c)
	}
}
