// SPDX-License-Identifier: Apache-2.0

package controlplane_test

import (
	"slices"
	"strings"
	"testing"

	boundaryv1 "github.com/demarc-dev/demarc/api/boundary/v1"
	"github.com/demarc-dev/demarc/daemon/controlplane"
	"github.com/demarc-dev/demarc/daemon/controlplane/book"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/ledger"
	"github.com/demarc-dev/demarc/mesh"
)

// TestTroublesOfRoads: they are those of the newest report, an old one that comes again changes nothing, and nothing but words of the
// closed sets is kept, whatever an appliance sends.
func TestTroublesOfRoads(t *testing.T) {
	o := newBook(t)
	must(t, o, enrol("n1", "1", "key"))
	key, away := book.Trouble{Kind: "tailscale", Reason: mesh.TailnetKey}, book.Trouble{Kind: "https", Reason: mesh.Unreached}
	holds := func(want ...book.Trouble) {
		t.Helper()
		a, err := o.book.View().Appliance("eu-1")
		if err != nil || !slices.Equal(a.Roads, want) {
			t.Errorf("%v, %v, want %v", a.Roads, err, want)
		}
	}
	status := func(n uint64) book.Report {
		return book.Report{Name: "eu-1", Number: n, Status: &book.Status{}}
	}
	must(t, o, book.Troubles{Name: "eu-1", Number: 1, Roads: []book.Trouble{key}})
	must(t, o, status(1))
	holds(key)
	must(t, o, book.Troubles{Name: "eu-1", Number: 1})
	must(t, o, book.Troubles{Name: "eu-1", Number: 3})
	holds(key)
	must(t, o, book.Troubles{Name: "eu-1", Number: 2, Roads: []book.Trouble{away}})
	must(t, o, status(2))
	holds(away)
	must(t, o, book.Troubles{Name: "eu-1", Number: 3})
	holds()
	refused(t, o, fault.NotFound, book.Troubles{Name: "eu-9", Number: 1})
	refused(t, o, fault.Invalid, book.Troubles{Name: "eu-1", Number: 3, Roads: make([]book.Trouble, 33)})

	got := controlplane.TroublesOf([]*boundaryv1.RoadTrouble{{Kind: "tailscale", Reason: "tailnet_key"}, {Kind: "https", Reason: strings.Repeat("x", 1<<20)},
		{Kind: "carrier pigeon", Reason: "other"}, {Kind: "https", Reason: "also new"}, nil})
	if want := []book.Trouble{key, {Kind: "https", Reason: mesh.Other}}; !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
}

// TestTroublesWaitForEachNode: while one node of the cluster runs a build that does not know the change, it is not proposed.
func TestTroublesWaitForEachNode(t *testing.T) {
	o := newBook(t)
	kind := book.Troubles{}.Kind()
	if slices.Contains(book.FirstKinds(), kind) {
		t.Errorf("%s came later", kind)
	}
	knows := func(want bool) {
		t.Helper()
		if got := o.book.View().AllKnow(kind); got != want {
			t.Errorf("all know it: %t, want %t", got, want)
		}
	}
	is := func(name string, kinds ...string) {
		t.Helper()
		by := fleet.PrincipalOf("acme.example", fleet.Node, name)
		if _, err := ledger.Submit(t.Context(), o, ledger.Meta{At: start, By: by, Request: fleet.RequestID(name)}, book.NodeIs{Name: name, Build: "b", Knows: kinds}); err != nil {
			t.Fatal(err)
		}
	}
	is("cp-1", kind)
	knows(true)
	is("cp-2", "report/1")
	knows(false)
	must(t, o, book.RemoveNode{Name: "cp-2", Reason: "old"})
	knows(true)
}
