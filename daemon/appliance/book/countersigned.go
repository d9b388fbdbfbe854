// SPDX-License-Identifier: Apache-2.0

package book

import (
	"crypto"
	"iter"
	"slices"

	"github.com/demarc-dev/demarc/audit"
	"github.com/demarc-dev/demarc/seal"
)

// CosignedHead is a head that the vendor countersigned.
type CosignedHead struct {
	audit.Head
	Note []byte
}

// VerifiedCosigned yields the vendor's countersignatures that verify, the newest first: a book may hold others.
func (s State) VerifiedCosigned(own crypto.PublicKey) iter.Seq[CosignedHead] {
	return func(yield func(CosignedHead) bool) {
		k, err := seal.ParseKey(s.VendorLogKey)
		if err != nil {
			return // the vendor was not met yet
		}
		log, err := audit.NoteVerifier(audit.CustomerOrigin(s.Site.TrustDomain, s.Appliance), own)
		if err != nil {
			return
		}
		witness, err := audit.CosignVerifier(audit.VendorOrigin(s.Site.TrustDomain), k.Public)
		if err != nil {
			return
		}
		for _, b := range slices.Backward(s.Cosigned) {
			if h, _, err := audit.OpenCosigned(b, log, witness); err == nil && !yield(CosignedHead{h, b}) {
				return
			}
		}
	}
}
