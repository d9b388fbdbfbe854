// SPDX-License-Identifier: Apache-2.0

package controlplane_test

import (
	"testing"
	"time"

	"github.com/demarc-dev/demarc/daemon/controlplane"
	"github.com/demarc-dev/demarc/daemon/controlplane/book"
	"github.com/demarc-dev/demarc/fault"
)

// TestWhoGoesOnIsAlone: the nodes that were lost when an epoch began are removed for good, so that none writes the forgotten history over
// the new one (FAULTS.md I3; with whole processes: docs/runbook-disaster.md).
func TestWhoGoesOnIsAlone(t *testing.T) {
	o := newBook(t)
	for _, n := range []string{"cp-1", "cp-2", "cp-3"} {
		must(t, o, book.AddNode{Name: n, Raft: n + ":1", API: n + ":2", Voter: true})
	}
	c, err := controlplane.DrawEpoch(o.book, book.ByRecover, time.Now(), 0)
	if err != nil {
		t.Fatal(err)
	}
	c.Alone = "cp-2"
	must(t, o, c)
	for _, p := range o.book.View().Peers() {
		if p.Removed != (p.Name != "cp-2") {
			t.Errorf("%s: removed %v", p.Name, p.Removed)
		}
	}
	refused(t, o, fault.Denied, book.AddNode{Name: "cp-1", Raft: "cp-1:1", API: "cp-1:2"})
	must(t, o, book.AddNode{Name: "cp-4", Raft: "cp-4:1", API: "cp-4:2"})
}
