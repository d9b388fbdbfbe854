// SPDX-License-Identifier: Apache-2.0

package appliance

import (
	"bytes"
	"crypto/ed25519"
	"io"
	"slices"
	"testing"
	"time"

	"filippo.io/age"

	"github.com/demarc-dev/demarc/daemon/appliance/book"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/operation"
	"github.com/demarc-dev/demarc/seal"
	"github.com/demarc-dev/demarc/workload"
)

// TestAHeldOutputCantBeGuessed: the vendor knows that an operation writes "yes" or "no", and has its result. With the same
// output two results differ, of two outputs neither fits better, and what is encrypted has one length (FAULTS.md I6).
func TestAHeldOutputCantBeGuessed(t *testing.T) {
	a := asker(t)
	own, err := seal.KeyOf(a.signer.Public())
	if err != nil {
		t.Fatal(err)
	}
	reader, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	pin, err := seal.KeyOf(ed25519.NewKeyFromSeed(bytes.Repeat([]byte{1}, 32)).Public())
	if err != nil {
		t.Fatal(err)
	}
	puts(t, a, 1, book.Pin{Public: pin.PEM(), Recipient: reader.Recipient().String()})
	now := time.Unix(1_700_000_000, 0)
	base := operation.Result{ID: "op-1", Appliance: "eu-1", Request: fleet.DigestOf([]byte("q")), Approval: fleet.DigestOf([]byte("a")),
		Argv:  []string{"x"},
		State: operation.Held, Started: now, Ended: now}
	var said []fleet.Digest
	var lengths []int
	for _, word := range []string{"yes\n", "no\n", "yes\n", "no\n"} {
		sealed, hidden, _, err := a.result(base, workload.ExecResult{Stdout: []byte(word), Stderr: []byte(word)})
		if err != nil {
			t.Fatal(err)
		}
		r, _, err := seal.Open[operation.Result](sealed, []seal.Key{own})
		if err != nil {
			t.Fatal(err)
		}
		if err := r.Check(); err != nil {
			t.Fatal(err)
		}
		said, lengths = append(said, r.Stdout, r.Stderr), append(lengths, len(hidden))
		for _, guess := range []string{"yes\n", "no\n"} {
			if (operation.Output{Stdout: []byte(guess), Stderr: []byte(guess)}).Matches(r) == nil || r.Stdout == fleet.DigestOf([]byte(guess)) {
				t.Errorf("%q is found without a salt", guess)
			}
		}
		r.Stdout, r.Stderr = "", ""
		if want := base; !bytes.Equal(text(t, r), text(t, want)) {
			t.Errorf("but for commitments the result says %s", text(t, r))
		}
		plain, err := age.Decrypt(bytes.NewReader(hidden), reader)
		if err != nil {
			t.Fatal(err)
		}
		encoded, err := io.ReadAll(plain)
		if err != nil {
			t.Fatal(err)
		}
		out, err := operation.ParseOutput(encoded)
		if err != nil || string(out.Stdout) != word {
			t.Errorf("the customer reads %q: %v", out.Stdout, err)
		}
	}
	slices.Sort(said)
	if n := len(slices.Compact(said)); n != 8 {
		t.Errorf("8 commitments, %d of them different", n)
	}
	if n := len(slices.Compact(lengths)); n != 1 {
		t.Errorf("encrypted they have the lengths %v", lengths)
	}
}

func text(t *testing.T, r operation.Result) []byte {
	t.Helper()
	b, err := r.MarshalJSON()
	if err != nil {
		t.Fatal(err)
	}
	return b
}
