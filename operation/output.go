// SPDX-License-Identifier: Apache-2.0

package operation

import (
	"bytes"
	"encoding/binary"
	"math/bits"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
)

// SaltSize is how many random bytes hide one stream of an output in its commitment.
const SaltSize = 32

// Output is what an operation wrote, at most 64 MiB together, with the salts of its commitments. The result, which crosses to
// the vendor at once, has the commitments alone: without the salts nobody can try out what an output may have been, however
// short the list is. The salts go where the output goes: to the customer at once, and to the operator who asked if it is
// released.
type Output struct {
	Stdout, Stderr []byte
	Truncated      bool // the limit cut something off
	// Drawn anew for each output and each stream, by whoever made the output: this package has no randomness.
	StdoutSalt, StderrSalt [SaltSize]byte
}

// Commitments are what the result says of the output: for each stream the SHA-256 of its opening, which is the salt, one byte
// that is 1 if the output was cut off and 0 if not, and the stream. sha256sum over an opening gives it too.
func (o Output) Commitments() (stdout, stderr fleet.Digest) {
	return commit(o.StdoutSalt, o.Truncated, o.Stdout), commit(o.StderrSalt, o.Truncated, o.Stderr)
}

func commit(salt [SaltSize]byte, cut bool, stream []byte) fleet.Digest {
	opening := append(salt[:len(salt):len(salt)], flag(cut))
	return fleet.DigestOf(append(opening, stream...))
}

func flag(set bool) byte {
	if set {
		return 1
	}
	return 0
}

// outputVersion begins an encoded output. After it stand the byte that says whether it was cut off, both salts, both streams,
// each with its length in 4 bytes before it, and zeros: what is encrypted has one of few lengths, so that the length of the
// encrypted form does not tell that of the output.
const outputVersion = "demarc-output/1\n"

const outputHead = len(outputVersion) + 1 + 2*SaltSize + 4 + 4

// padded is the length that n bytes are padded to: 4 KiB, and above that the least of the lengths of Padme (PURBs, 2019), which
// add at most 12 percent.
func padded(n int) int {
	const least = 4 << 10
	if n <= least {
		return least
	}
	exponent := bits.Len(uint(n)) - 1
	mask := 1<<(exponent-bits.Len(uint(exponent))) - 1
	return (n + mask) &^ mask
}

// Encode spells the output in its one form.
func (o Output) Encode() []byte {
	b := make([]byte, 0, padded(outputHead+len(o.Stdout)+len(o.Stderr)))
	b = append(append(b, outputVersion...), flag(o.Truncated))
	b = append(append(b, o.StdoutSalt[:]...), o.StderrSalt[:]...)
	b = append(binary.BigEndian.AppendUint32(b, uint32(len(o.Stdout))), o.Stdout...)
	b = append(binary.BigEndian.AppendUint32(b, uint32(len(o.Stderr))), o.Stderr...)
	return b[:cap(b)]
}

// ParseOutput reads what Encode wrote.
func ParseOutput(b []byte) (Output, error) {
	rest, ok := bytes.CutPrefix(b, []byte(outputVersion))
	bad := fault.New("operation.ParseOutput", fault.Invalid, "not an output of this format, or cut off")
	if !ok || len(rest) < 1+2*SaltSize || rest[0] > 1 {
		return Output{}, bad
	}
	o := Output{Truncated: rest[0] == 1}
	rest = rest[1:]
	rest = rest[copy(o.StdoutSalt[:], rest):]
	rest = rest[copy(o.StderrSalt[:], rest):]
	total := 0
	for _, stream := range []*[]byte{&o.Stdout, &o.Stderr} {
		if len(rest) < 4 || uint64(len(rest)-4) < uint64(binary.BigEndian.Uint32(rest)) {
			return Output{}, bad
		}
		n := int(binary.BigEndian.Uint32(rest))
		if total += n; total > maxOutput {
			return Output{}, bad
		}
		*stream, rest = bytes.Clone(rest[4:4+n]), rest[4+n:]
	}
	if len(b) != padded(outputHead+total) || len(bytes.Trim(rest, "\x00")) > 0 {
		return Output{}, bad
	}
	return o, nil
}

// Matches reports whether this is the output that the appliance signed for: nil, or fault.Denied.
func (o Output) Matches(r Result) error {
	stdout, stderr := o.Commitments()
	for _, s := range []struct {
		name      string
		got, want fleet.Digest
	}{{"stdout", stdout, r.Stdout}, {"stderr", stderr, r.Stderr}} {
		if s.got != s.want {
			return fault.New("operation.Matches", fault.Denied, "%s is not what the appliance signed for", s.name)
		}
	}
	return nil
}
