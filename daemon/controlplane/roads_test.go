// SPDX-License-Identifier: Apache-2.0

package controlplane

import (
	"testing"

	boundaryv1 "github.com/demarc-dev/demarc/api/boundary/v1"
	"github.com/demarc-dev/demarc/daemon/controlplane/book"
	"github.com/demarc-dev/demarc/fleet"
)

// TestTroublesAreProposedWhereTheySayNews: nothing of roads enters the log while a node does not know the change, for a report that is in
// the book already, and where the book says it already.
func TestTroublesAreProposedWhereTheySayNews(t *testing.T) {
	s, _ := begun(t)
	l := &live{s: s, name: "eu-1", by: fleet.PrincipalOf(innerDomain, fleet.Appliance, "eu-1")}
	is := func(name string, kinds ...string) {
		t.Helper()
		if _, err := book.Submit(t.Context(), s.replica, fleet.PrincipalOf(innerDomain, fleet.Node, name), "", book.NodeIs{Name: name, Build: "b", Knows: kinds}); err != nil {
			t.Fatal(err)
		}
	}
	away := []*boundaryv1.RoadTrouble{{Kind: "https", Reason: "unreached"}}
	says := func(what string, number uint64, roads []*boundaryv1.RoadTrouble, want int64) {
		t.Helper()
		size := s.replica.Log().Size()
		if err := s.troubles(t.Context(), l, number, roads); err != nil {
			t.Fatal(err)
		}
		if grew := s.replica.Log().Size() - size; grew != want {
			t.Errorf("%s: %d entries, want %d", what, grew, want)
		}
	}
	is("cp-1", book.Troubles{}.Kind())
	is("cp-2", "report/1")
	says("one node is of an older build", 1, away, 0)
	is("cp-2", book.Troubles{}.Kind())
	says("each node knows it", 1, away, 1)
	says("the book says it already", 1, away, 0)
	tell(t, s, book.Report{Name: "eu-1", Number: 1, Status: &book.Status{}})
	says("the report comes again, with other words", 1, nil, 0)
	says("the next report", 2, nil, 1)
}
