// SPDX-License-Identifier: Apache-2.0

package operation

import (
	"bytes"
	"encoding/binary"
	"slices"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/seal"
)

// Keys are those that the verifier pinned, by party.
type Keys struct{ Operators, Customers, Appliance []seal.Key }

// Chain is an operation whose documents were verified together.
type Chain struct {
	Request  Request
	Approval *Approval
	Result   *Result
	Release  *Release
	State    State
}

// VerifyChain verifies the documents of one operation offline, with nothing but pinned keys. A document that is not there
// yet is nil; none may be missing before one that is there. It checks each signature by the one party whose word it is,
// each digest of the document before, and that what ran is what was approved.
func VerifyChain(request, approval, result, release []byte, k Keys) (Chain, error) {
	const op = "operation.VerifyChain"
	c := Chain{State: Requested}
	var err error
	if c.Request, err = opened[Request](request, k.Operators, "request", "an operator of the vendor"); err != nil {
		return c, err
	}
	bad := func(format string, args ...any) (Chain, error) {
		return c, fault.New(op, fault.Denied, format, args...)
	}
	if approval == nil {
		if result != nil || release != nil {
			return bad("there is a later document and no approval")
		}
		return c, nil
	}
	a, err := opened[Approval](approval, k.Customers, "approval", "the customer")
	if err != nil {
		return c, err
	}
	switch {
	case a.Request != fleet.DigestOf(request):
		return bad("the approval is for another request")
	case a.ID != c.Request.ID || a.Appliance != c.Request.Appliance:
		return bad("the approval names another operation or appliance than the request")
	case !a.At.Before(c.Request.NotAfter) && a.Decision == DecisionApprove:
		return bad("the request had run out when it was approved")
	}
	c.Approval, c.State = &a, Approved
	if a.Decision == DecisionReject {
		c.State = Rejected
	}
	if result == nil {
		if release != nil {
			return bad("there is a release and no result")
		}
		return c, nil
	}
	r, err := opened[Result](result, k.Appliance, "result", "the appliance")
	if err != nil {
		return c, err
	}
	switch {
	case a.Decision != DecisionApprove:
		return bad("there is a result, and the customer had said no")
	case r.Request != a.Request || r.Approval != fleet.DigestOf(approval):
		return bad("the result is of another request or another approval")
	case r.ID != a.ID || r.Appliance != a.Appliance:
		return bad("the result names another operation or appliance than the approval")
	case !slices.Equal(r.Argv, a.Argv):
		return bad("what ran is not what was approved: the arguments differ")
	case !r.Started.Before(a.NotAfter):
		return bad("it began after the approval had run out")
	}
	c.Result, c.State = &r, r.State
	if release == nil {
		return c, nil
	}
	l, err := opened[Release](release, k.Customers, "release", "the customer")
	if err != nil {
		return c, err
	}
	switch {
	case l.Result != fleet.DigestOf(result):
		return bad("the release is of another result")
	case l.ID != r.ID || l.Appliance != r.Appliance:
		return bad("the release names another operation or appliance than the result")
	case r.State != Held:
		return bad("the release is of an operation that is %s: it has no output", r.State)
	}
	c.Release, c.State = &l, Released
	if l.Decision == DecisionWithhold {
		c.State = Withheld
	}
	return c, nil
}

func opened[T interface {
	seal.Body
	Check() error
}](sealed []byte, keys []seal.Key, what, who string) (T, error) {
	const op = "operation.VerifyChain"
	v, _, err := seal.Open[T](sealed, keys)
	if err != nil {
		return v, fault.Because(err, op, fault.Of(err), "the %s, which %s signs: %s", what, who, fault.Text(err))
	}
	if err := v.Check(); err != nil {
		return v, fault.Because(err, op, fault.Of(err), "the %s: %s", what, fault.Text(err))
	}
	return v, nil
}

// Output is what an operation wrote.
type Output struct{ Stdout, Stderr []byte }

// outputVersion begins an encoded output; after it stand both streams, each with its length in 4 bytes before it.
const outputVersion = "demarc-output/1\n"

// Encode spells the output in its one form.
func (o Output) Encode() []byte {
	b := make([]byte, 0, len(outputVersion)+8+len(o.Stdout)+len(o.Stderr))
	b = append(b, outputVersion...)
	b = binary.BigEndian.AppendUint32(b, uint32(len(o.Stdout)))
	b = append(b, o.Stdout...)
	b = binary.BigEndian.AppendUint32(b, uint32(len(o.Stderr)))
	return append(b, o.Stderr...)
}

// ParseOutput reads what Encode wrote.
func ParseOutput(b []byte) (Output, error) {
	rest, ok := bytes.CutPrefix(b, []byte(outputVersion))
	bad := fault.New("operation.ParseOutput", fault.Invalid, "not an output of this format, or cut off")
	if !ok || len(b) > maxOutput+64 {
		return Output{}, bad
	}
	var parts [2][]byte
	for i := range parts {
		if len(rest) < 4 || uint64(len(rest)-4) < uint64(binary.BigEndian.Uint32(rest)) {
			return Output{}, bad
		}
		n := binary.BigEndian.Uint32(rest)
		parts[i], rest = bytes.Clone(rest[4:4+n]), rest[4+n:]
	}
	if len(rest) > 0 {
		return Output{}, bad
	}
	return Output{parts[0], parts[1]}, nil
}

// Matches tells whether this is the output that the appliance signed for.
func (o Output) Matches(r Result) error {
	for _, s := range []struct {
		name string
		b    []byte
		d    fleet.Digest
		n    int64
	}{{"stdout", o.Stdout, r.Stdout, r.StdoutSize}, {"stderr", o.Stderr, r.Stderr, r.StderrSize}} {
		if fleet.DigestOf(s.b) != s.d || int64(len(s.b)) != s.n {
			return fault.New("operation.Matches", fault.Denied, "%s is not what the appliance signed for", s.name)
		}
	}
	return nil
}
