// SPDX-License-Identifier: Apache-2.0

package controlplane_test

import (
	"testing"

	"github.com/demarc-dev/demarc/daemon/controlplane/book"
	"github.com/demarc-dev/demarc/ledger/ledgertest"
)

// TestEachKindOfChangeGivesALeafThatIsVerified: FAULTS.md C1, of the vendor's book.
func TestEachKindOfChangeGivesALeafThatIsVerified(t *testing.T) {
	book := book.NewBook()
	n := ledgertest.LeavesAtTheBound(t, book)
	if n < len(book.Kinds()) {
		t.Errorf("%d entries of %d kinds", n, len(book.Kinds()))
	}
}
