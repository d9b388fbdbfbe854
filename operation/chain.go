// SPDX-License-Identifier: Apache-2.0

package operation

import (
	"slices"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/seal"
)

// Keys are those that the verifier pinned, by party.
type Keys struct {
	Operators, Customers, Appliance []seal.Key
	// CustomerUnknown says that the verifier knows no key of the customer, and Customers is empty. Approval and release are then
	// bound by form and digests alone: that the customer signed the approval is the word of the appliance, which signed the
	// result over it, and that the customer signed the release is nobody's.
	CustomerUnknown bool
}

// Chain is an operation whose documents were verified together.
type Chain struct {
	Request  Request
	Approval *Approval
	Result   *Result
	Release  *Release
	State    State
}

// Skew is how far the clocks of the operator, the customer and the appliance may differ. What came after what is proven
// by the digests; the times are each party's own word, and must not contradict that by more than this.
const Skew = fleet.MaxSkew

// VerifyChain verifies the documents of one operation offline, with nothing but pinned keys. A document that is not there
// yet is empty; none may be missing before one that is there. It checks each signature by the one party whose word it is,
// each digest of the document before, and that what ran is what was approved. Whether the command is what the template
// makes of the request is VerifyTemplate's, and the bytes that were let out are VerifyOutput's question.
// With an error comes no chain.
func VerifyChain(request, approval, result, release []byte, k Keys) (Chain, error) {
	if err := k.apart(); err != nil {
		return Chain{}, err
	}
	switch {
	case len(request) == 0:
		return Chain{}, broken("the request is missing: a chain begins with it")
	case len(approval) == 0 && (len(result) > 0 || len(release) > 0):
		return Chain{}, broken("there is a later document and no approval")
	case len(result) == 0 && len(release) > 0:
		return Chain{}, broken("there is a release and no result")
	}
	c := Chain{State: Requested}
	var err error
	if k.CustomerUnknown && len(k.Customers) > 0 {
		return Chain{}, broken("the customer can't be known and unknown")
	}
	if c.Request, err = opened[Request](request, k.Operators, false, "request", "an operator of the vendor"); err != nil {
		return Chain{}, err
	}
	if len(approval) > 0 {
		if err := c.approve(approval, fleet.DigestOf(request), k); err != nil {
			return Chain{}, err
		}
	}
	if len(result) > 0 {
		if err := c.finish(result, fleet.DigestOf(approval), k.Appliance); err != nil {
			return Chain{}, err
		}
	}
	if len(release) > 0 {
		if err := c.letOut(release, fleet.DigestOf(result), k); err != nil {
			return Chain{}, err
		}
	}
	return c, nil
}

func broken(format string, args ...any) error {
	return fault.New("operation.VerifyChain", fault.Denied, format, args...)
}

// apart refuses a key that would speak for two parties: then one of them could consent in the other's name.
func (k Keys) apart() error {
	owner := map[seal.KeyID]string{}
	for _, party := range []struct {
		name string
		keys []seal.Key
	}{{"an operator of the vendor", k.Operators}, {"the customer", k.Customers}, {"the appliance", k.Appliance}} {
		for _, key := range party.keys {
			own, err := seal.KeyOf(key.Public)
			if err != nil {
				return err
			}
			if o, taken := owner[own.ID]; taken && o != party.name {
				return broken("the key %s is pinned for %s and for %s: one key can't speak for both", own.ID, o, party.name)
			}
			owner[own.ID] = party.name
		}
	}
	return nil
}

func (c *Chain) approve(sealed []byte, request fleet.Digest, k Keys) error {
	a, err := opened[Approval](sealed, k.Customers, k.CustomerUnknown, "approval", "the customer")
	if err != nil {
		return err
	}
	switch {
	case a.Request != request:
		return broken("the approval is for another request")
	case a.ID != c.Request.ID:
		return broken("the approval names another operation than the request")
	case a.Appliance != c.Request.Appliance:
		return broken("the approval names another appliance than the request")
	case a.At.Before(c.Request.At.Add(-Skew)):
		return broken("the approval is older than the request")
	case a.Decision == DecisionApprove && !a.At.Before(c.Request.NotAfter):
		return broken("the request had run out when it was approved")
	}
	c.Approval, c.State = &a, Approved
	if a.Decision == DecisionReject {
		c.State = Rejected
	}
	return nil
}

func (c *Chain) finish(sealed []byte, approval fleet.Digest, keys []seal.Key) error {
	r, err := opened[Result](sealed, keys, false, "result", "the appliance")
	if err != nil {
		return err
	}
	a := c.Approval
	switch {
	case a.Decision != DecisionApprove:
		return broken("there is a result, and the customer had said no")
	case r.Request != a.Request:
		return broken("the result is of another request")
	case r.Approval != approval:
		return broken("the result is of another approval")
	case r.ID != a.ID:
		return broken("the result names another operation than the approval")
	case r.Appliance != a.Appliance:
		return broken("the result names another appliance than the approval")
	case !slices.Equal(r.Argv, a.Argv):
		return broken("what ran is not what was approved: the arguments differ")
	case r.Started.Before(a.At.Add(-Skew)):
		return broken("it began before it was approved")
	case !r.Started.Before(a.NotAfter):
		return broken("it began after the approval had run out")
	case !r.Started.Before(c.Request.NotAfter):
		return broken("it began after the request had run out")
	}
	c.Result, c.State = &r, r.State
	return nil
}

func (c *Chain) letOut(sealed []byte, result fleet.Digest, k Keys) error {
	l, err := opened[Release](sealed, k.Customers, k.CustomerUnknown, "release", "the customer")
	if err != nil {
		return err
	}
	r := c.Result
	switch {
	case l.Result != result:
		return broken("the release is of another result")
	case l.ID != r.ID:
		return broken("the release names another operation than the result")
	case l.Appliance != r.Appliance:
		return broken("the release names another appliance than the result")
	case r.State != Held:
		return broken("the release is of an operation that is %s: it has no output", r.State)
	case l.At.Before(r.Ended.Add(-Skew)):
		return broken("the release is older than the end of the operation")
	}
	c.Release, c.State = &l, Released
	if l.Decision == DecisionWithhold {
		c.State = Withheld
	}
	return nil
}

func opened[T interface {
	seal.Body
	Check() error
}](sealed []byte, keys []seal.Key, unknown bool, what, who string) (T, error) {
	const op = "operation.VerifyChain"
	var none, v T
	var err error
	if unknown {
		v, err = seal.Peek[T](sealed)
	} else {
		v, _, err = seal.Open[T](sealed, keys)
	}
	if err != nil {
		return none, fault.Because(err, op, fault.Of(err), "the %s, which %s signs: %s", what, who, fault.Text(err))
	}
	if err := v.Check(); err != nil {
		return none, fault.Because(err, op, fault.Of(err), "the %s: %s", what, fault.Text(err))
	}
	return v, nil
}

// VerifyTemplate tells whether the command of a verified chain is what this template makes of the values in the request.
func VerifyTemplate(c Chain, t Template) error {
	const op = "operation.VerifyTemplate"
	if t.Name != c.Request.Template || t.Digest() != c.Request.TemplateDigest {
		return fault.New(op, fault.Denied, "the template %q is not the one that the request binds", fault.Clip(t.Name))
	}
	argv, err := t.Argv(c.Request.Vars)
	if err != nil {
		return fault.Because(err, op, fault.Denied, "the request is not one that its template allows: %s", fault.Text(err))
	}
	if c.Approval != nil && c.Approval.Decision == DecisionApprove && !slices.Equal(argv, c.Approval.Argv) {
		return fault.New(op, fault.Denied, "what was approved is not what the template makes of the request: the arguments differ")
	}
	return nil
}

// VerifyOutput tells whether encrypted is what the customer of a verified chain let out, and whether encoded, which is
// what it decrypts to, is what the appliance signed for. It gives the output taken apart.
func VerifyOutput(c Chain, encrypted, encoded []byte) (Output, error) {
	const op = "operation.VerifyOutput"
	if c.Release == nil || c.Result == nil || c.Release.Decision != DecisionRelease {
		return Output{}, fault.New(op, fault.Denied, "the customer let no output out: the operation is %s", c.State)
	}
	if fleet.DigestOf(encrypted) != c.Release.Output {
		return Output{}, fault.New(op, fault.Denied, "the encrypted output is not the one that the customer let out")
	}
	o, err := ParseOutput(encoded)
	if err != nil {
		return Output{}, err
	}
	if err := o.Matches(*c.Result); err != nil {
		return Output{}, err
	}
	return o, nil
}
