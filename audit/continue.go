// SPDX-License-Identifier: Apache-2.0

package audit

import (
	"golang.org/x/mod/sumdb/note"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
)

// VendorOrigin names the log of a control plane in its checkpoints.
func VendorOrigin(trustDomain string) string { return trustDomain + "/control-plane" }

// CustomerOrigin names the log of an appliance in its checkpoints.
func CustomerOrigin(trustDomain string, a fleet.ApplianceID) string {
	return trustDomain + "/appliance/" + string(a)
}

// Continues is what a witness asks before it countersigns: next is signed by the log that v verifies, and the proof shows
// that the log only grew since last, the newest checkpoint that this witness countersigned. last is nil for the first one.
func Continues(next []byte, proof [][]byte, v note.Verifier, last []byte) (Head, error) {
	const op = "audit.Continues"
	head, err := OpenCheckpoint(next, v)
	if err != nil {
		return head, err
	}
	if head.Origin != v.Name() {
		return head, fault.New(op, fault.Denied, "the checkpoint is of log %.128q, and %q was wanted", head.Origin, v.Name())
	}
	if last == nil {
		return head, nil
	}
	old, err := OpenCheckpoint(last, v)
	if err != nil {
		return head, fault.At(op, fault.Internal, err)
	}
	hashes := make([][32]byte, len(proof))
	for i, h := range proof {
		if len(h) != 32 {
			return head, fault.New(op, fault.Invalid, "hash %d of the proof is not of 32 bytes", i)
		}
		copy(hashes[i][:], h)
	}
	return head, Grown(old, head, hashes)
}
