// SPDX-License-Identifier: Apache-2.0

package appliance_test

import (
	"bytes"
	"testing"

	"github.com/demarc-dev/demarc/audit"
	"github.com/demarc-dev/demarc/daemon/appliance/book"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/ledger/ledgertest"
	"github.com/demarc-dev/demarc/operation"
)

// TestEachKindOfChangeGivesALeafThatIsVerified: FAULTS.md C1. At the bound of what a change may have, the leaf can be read.
func TestEachKindOfChangeGivesALeafThatIsVerified(t *testing.T) {
	b := book.NewBook("eu-1", "globex")
	n := ledgertest.LeavesAtTheBound(t, b)
	if n < len(b.Kinds()) {
		t.Errorf("%d entries of %d kinds", n, len(b.Kinds()))
	}
}

// TestAnOperationsOutputAtItsLimitIsVerified: FAULTS.md C1. An honest operation whose output is as large as it may be.
func TestAnOperationsOutputAtItsLimitIsVerified(t *testing.T) {
	o := deployed(t)
	must(t, o, consent(t, granted(fleet.OperateRead, 0), customer))
	take(t, o, book.Take{Operation: o.request(t, "op-1")})
	must(t, o, o.approve(t, "op-1"))
	must(t, o, book.Start{ID: "op-1"})
	out := bytes.Repeat([]byte{7}, book.MaxOutput)
	result := sealed(t, operation.Result{ID: "op-1", Appliance: "eu-1", State: operation.Held, Started: o.now(), Ended: o.now()}, thief)
	must(t, o, book.Finish{ID: "op-1", Result: result, Output: out})
	must(t, o, book.Consent{Document: sealed(t, operation.Release{ID: "op-1", Appliance: "eu-1", Result: fleet.DigestOf(result),
		Decision: operation.DecisionRelease, Output: fleet.DigestOf(out), At: o.now(), Nonce: nonce()}, customer), Output: out})
	log := o.book.Log()
	for i := range log.Size() {
		e, err := audit.ParseEntry(log.Entry(i))
		if err != nil {
			t.Fatalf("entry %d: %v", i, err)
		}
		if e.Kind == (book.Finish{}).Kind() && (!bytes.Contains(e.Body, []byte(fleet.DigestOf(out))) || len(e.Body) > 64<<10) {
			t.Errorf("the entry does not name the output: %.300s", e.Body)
		}
	}
	if x, _ := o.book.View().Operation("op-1"); x.State != operation.Released {
		t.Errorf("it is %s", x.State)
	}
	if r := o.book.View().Reports; !bytes.Equal(r[len(r)-1].Operation.Output, out) {
		t.Error("the output does not go out")
	}
}
