// SPDX-License-Identifier: Apache-2.0

package audit

import (
	"bytes"
	"crypto/ed25519"
	"slices"

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

// Countersigned checks what a witness sent back: one of the checkpoints that were sent to it, byte for byte, and below it the
// line of this witness and nothing else. It returns the head and which of sent it is over. sent is ours: it is not verified.
// Anything else is fault.Denied, and the sentence has the size and digest of the bytes in place of the bytes.
func Countersigned(b []byte, sent [][]byte, witness note.Verifier) (Head, int, error) {
	const op = "audit.Countersigned"
	refuse := func(why string) (Head, int, error) {
		return Head{}, 0, fault.New(op, fault.Denied, "%d bytes with the digest %s are no countersignature of %q: %s",
			len(b), fleet.DigestOf(b), fault.Clip(witness.Name()), why)
	}
	if len(b) > maxCheckpoint {
		return refuse("they are too many")
	}
	for i, s := range slices.Backward(sent) {
		line, ok := bytes.CutPrefix(b, s)
		if !ok || len(s) == 0 {
			continue
		}
		if bytes.IndexByte(line, '\n') != len(line)-1 {
			return refuse("one line is expected below the checkpoint that was sent")
		}
		n, err := openNote(op, b, witness)
		if err != nil {
			return refuse(fault.Text(err))
		}
		if len(signature(n, witness)) != 8+ed25519.SignatureSize {
			return refuse("its line is not a cosignature/v1")
		}
		h, err := parseHead(op, n.Text)
		if err != nil {
			return Head{}, 0, fault.At(op, fault.Internal, err)
		}
		return h, i, nil
	}
	return refuse("they are not over a checkpoint that was sent to it and waits for an answer")
}
