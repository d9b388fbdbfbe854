// SPDX-License-Identifier: Apache-2.0

package book

import (
	"slices"

	"golang.org/x/mod/sumdb/note"

	"github.com/demarc-dev/demarc/audit"
)

// Vouched lists the countersignatures of an appliance that verify; the book may contain others.
func (a Appliance) Vouched(domain string, own note.Verifier) [][]byte {
	w, err := a.witness(domain)
	if err != nil {
		return nil // it never enrolled
	}
	return slices.DeleteFunc(slices.Clone(a.Cosigned), func(b []byte) bool {
		_, _, err := audit.OpenCosigned(b, own, w)
		return err != nil
	})
}

// NewestVouched is the head of the newest countersignature that verifies; ok is false if there is none.
func (a Appliance) NewestVouched(domain string, own note.Verifier) (head audit.Head, ok bool) {
	w, err := a.witness(domain)
	if err != nil {
		return audit.Head{}, false
	}
	for _, b := range slices.Backward(a.Cosigned) {
		if h, _, err := audit.OpenCosigned(b, own, w); err == nil {
			return h, true
		}
	}
	return audit.Head{}, false
}
