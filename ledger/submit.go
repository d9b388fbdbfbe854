// SPDX-License-Identifier: Apache-2.0

package ledger

import (
	"context"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/seal"
)

// Proposer puts bytes into one order, applies them, and gives the answer. [fault.Unsure] means that it may have
// happened: propose the same bytes again, the book answers a repeated request without doing it twice.
type Proposer interface {
	Propose(ctx context.Context, data []byte) ([]byte, error)
}

// Encode spells a proposal.
func Encode[S, R any](m Meta, c Change[S, R]) ([]byte, error) {
	const op = "ledger.Encode"
	body, err := seal.JSON(c)
	if err != nil {
		return nil, fault.At(op, fault.Internal, err)
	}
	data, err := seal.JSON(proposal{c.Kind(), m, body})
	if err != nil {
		return nil, fault.At(op, fault.Internal, err)
	}
	if len(data) > MaxChange {
		return nil, fault.New(op, fault.Invalid, "the change %s has %d bytes, the limit is %d", c.Kind(), len(data), MaxChange)
	}
	return data, nil
}

// Submit proposes a change and gives its typed answer, or the fault with which the book refused it.
func Submit[S, R any](ctx context.Context, p Proposer, m Meta, c Change[S, R]) (R, error) {
	const op = "ledger.Submit"
	var out R
	data, err := Encode(m, c)
	if err != nil {
		return out, err
	}
	b, err := p.Propose(ctx, data)
	if err != nil {
		return out, fault.At(op, "", err)
	}
	return decode[R](op, c.Kind(), b)
}
