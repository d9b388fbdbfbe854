// SPDX-License-Identifier: Apache-2.0

package operation_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"strings"
	"testing"

	"github.com/demarc-dev/demarc/operation"
)

// TestACommitmentIsTheDigestOfItsOpening: another tool can check one, with sha256sum and nothing else.
func TestACommitmentIsTheDigestOfItsOpening(t *testing.T) {
	stdout, stderr := output.Commitments()
	for want, opening := range map[string][]byte{
		string(stdout): append(append(output.StdoutSalt[:], 1), output.Stdout...),
		string(stderr): append(append(output.StderrSalt[:], 1), output.Stderr...),
	} {
		if sum := sha256.Sum256(opening); "sha256:"+hex.EncodeToString(sum[:]) != want {
			t.Errorf("%x is not %s", sum, want)
		}
	}
}

// TestLengthsOfOutputsAreFew: what is encrypted does not tell how long a short output is, and nearly nothing of a long one; and
// it is never more than 12 percent longer than it must be.
func TestLengthsOfOutputsAreFew(t *testing.T) {
	length := func(n int) int { return len(operation.Output{Stdout: make([]byte, n)}.Encode()) }
	for _, n := range []int{0, 1, 2, 3, 1000, 3900} {
		if got := length(n); got != 4096 {
			t.Errorf("%d bytes take %d", n, got)
		}
	}
	all := map[int]bool{}
	for n := 0; n < 3<<20; n += 9973 {
		got := length(n)
		if all[got] = true; n > 4096 && float64(got) > 1.12*float64(n+200) {
			t.Errorf("%d bytes take %d", n, got)
		}
	}
	if len(all) > 230 {
		t.Errorf("%d lengths up to 3 MiB", len(all))
	}
}

// TestAResultSaysNothingOfItsOutput: results of two outputs differ in their commitments alone, and these can't be tried out
// (FAULTS.md I6).
func TestAResultSaysNothingOfItsOutput(t *testing.T) {
	req, app, _, _ := chain(t)
	results := map[string]string{}
	for i, word := range []string{"yes", "no", "yes", strings.Repeat("no", 1000)} {
		o := operation.Output{Stdout: []byte(word), Stderr: []byte(word), StdoutSalt: [32]byte{byte(2 * i)}, StderrSalt: [32]byte{byte(2*i + 1)}}
		r := result(req, app)
		r.Stdout, r.Stderr = o.Commitments()
		if r.Stdout == r.Stderr {
			t.Error("two streams that are equal are seen to be equal")
		}
		b, err := r.MarshalJSON()
		if err != nil {
			t.Fatal(err)
		}
		for _, guess := range []string{"yes", "no", strings.Repeat("no", 1000), ""} {
			for _, salt := range [][]byte{nil, make([]byte, 32), append(make([]byte, 32), 0), append(make([]byte, 32), 1)} {
				sum := sha256.Sum256(append(bytes.Clone(salt), guess...))
				if i > 0 && bytes.Contains(b, []byte(hex.EncodeToString(sum[:]))) {
					t.Errorf("%q is found with the salt %x", guess, salt)
				}
			}
		}
		for _, secret := range []string{string(r.Stdout[7:]), string(r.Stderr[7:])} {
			b = bytes.ReplaceAll(b, []byte(secret), []byte("C"))
		}
		results[string(b)] = word
	}
	if len(results) != 1 {
		t.Errorf("without commitments the results are not one: %q", results)
	}
}
