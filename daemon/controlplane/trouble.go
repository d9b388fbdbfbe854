// SPDX-License-Identifier: Apache-2.0

package controlplane

import (
	"context"
	"slices"

	boundaryv1 "github.com/demarc-dev/demarc/api/boundary/v1"
	"github.com/demarc-dev/demarc/configs"
	"github.com/demarc-dev/demarc/daemon/controlplane/book"
	"github.com/demarc-dev/demarc/mesh"
)

// troublesOf keeps the words that are known: a kind that is not is left out, a reason that is not becomes other.
func troublesOf(roads []*boundaryv1.RoadTrouble) []book.Trouble {
	var out []book.Trouble
	for _, r := range roads {
		t := book.Trouble{Kind: r.GetKind(), Reason: mesh.Reason(r.GetReason())}
		if !slices.Contains([]string{configs.HTTPS, configs.PrivateLink, configs.Tailscale}, t.Kind) {
			continue
		}
		if !t.Reason.Known() {
			t.Reason = mesh.Other
		}
		if !slices.Contains(out, t) {
			out = append(out, t)
		}
	}
	return out
}

// troubles puts what a status report says of roads on record, where it says something new and each node of the cluster knows the
// change. Where one does not, it is left out: the next status report says it again.
func (s *Server) troubles(ctx context.Context, l *live, number uint64, roads []*boundaryv1.RoadTrouble) error {
	now := troublesOf(roads)
	page := s.replica.View()
	a, err := page.Appliance(l.name)
	if err != nil || number <= a.ReportsDone || slices.Equal(now, a.Roads) || !page.AllKnow(book.Troubles{}.Kind()) {
		return err
	}
	_, err = book.Submit(ctx, s.replica, l.by, "", book.Troubles{Name: l.name, Number: number, Roads: now})
	return err
}
