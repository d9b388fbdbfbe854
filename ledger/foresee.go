// SPDX-License-Identifier: Apache-2.0

package ledger

import (
	"encoding/json"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/seal"
)

// Foresee returns what the book would answer to a change now, or the fault with which it would refuse it. Nothing is written
// and nothing is remembered. Who tries again and again asks this first: a refusal goes on record, the record wakes whoever
// watches the book, and one that is woken by its own refusal never rests. By the time of the change itself the answer may be
// another one. It may be called from any goroutine.
func Foresee[S, R any](b *Book[S], m Meta, c Change[S, R]) (R, error) {
	const op = "ledger.Foresee"
	var none R
	data, err := Encode(m, c)
	if err != nil {
		return none, err
	}
	_, ans, err := b.try(b.now.Load(), 0, data)
	if err != nil {
		return none, fault.At(op, "", err)
	}
	return decode[R](op, c.Kind(), ans)
}

// decode reads an answer, or the fault in it.
func decode[R any](op, kind string, ans []byte) (R, error) {
	var out R
	var a answer
	if err := seal.StrictJSON(ans, &a); err != nil {
		return out, fault.At(op, fault.Internal, err)
	}
	if a.Fault != "" {
		return out, fault.New(kind, a.Fault, "%s", a.Detail)
	}
	if err := json.Unmarshal(a.Result, &out); err != nil {
		return out, fault.At(op, fault.Internal, err)
	}
	return out, nil
}
