// SPDX-License-Identifier: Apache-2.0

package fleet

import (
	"fmt"
	"time"

	"github.com/demarc-dev/demarc/fault"
)

// Epoch names one history of the vendor's book. The zero value is the history that init began. Restoring a snapshot, or going on with one
// node after a majority is lost, begins another one. Of two epochs the one with the greater number is the later.
type Epoch struct {
	Number uint64 `json:"number"`       // seconds from 1970 to when it began, or one more than that of the epoch before
	ID     string `json:"id,omitempty"` // 32 lower-case hexadecimal digits, drawn at random; "" for the first
}

// Bounds on the number of an epoch, so that nobody can use the numbers up. Below EpochFree a number is taken as it comes; beyond that it is
// at most EpochStep greater than the last one.
const (
	EpochFree = 1 << 38 // the year 10680, in seconds from 1970
	EpochStep = 1 << 20
)

// Check tells whether e is spelled as an epoch.
func (e Epoch) Check() error {
	hex := len(e.ID) == 32
	for _, c := range e.ID {
		hex = hex && (c >= '0' && c <= '9' || c >= 'a' && c <= 'f')
	}
	if e == (Epoch{}) || e.Number > 0 && hex {
		return nil
	}
	return fault.New("fleet.Epoch", fault.Invalid, "an epoch has a number and an id of 32 hexadecimal digits, or neither")
}

// CheckNext returns a [fault.Conflict] if next may not follow e.
func (e Epoch) CheckNext(next Epoch) error {
	const op = "fleet.Epoch"
	if err := next.Check(); err != nil {
		return err
	}
	switch {
	case next.Number < e.Number:
		return fault.New(op, fault.Conflict, "%s is over: %s has taken its place", next, e)
	case next.Number == e.Number:
		return fault.New(op, fault.Conflict, "%s and %s have one number: only one of them counts, the one that was met first", next, e)
	case next.Number > EpochFree && next.Number-e.Number > EpochStep:
		return fault.New(op, fault.Conflict, "the number of %s is too far above that of %s", next, e)
	}
	return nil
}

// String spells an epoch for people.
func (e Epoch) String() string {
	if e == (Epoch{}) {
		return "the first epoch of the vendor's book"
	}
	id := e.ID
	if len(id) > 8 {
		id = id[:8]
	}
	if e.Number > EpochFree {
		return fmt.Sprintf("epoch %d (%s)", e.Number, id)
	}
	return fmt.Sprintf("epoch %d (%s, of %s)", e.Number, id, time.Unix(int64(e.Number), 0).UTC().Format(time.RFC3339))
}

// Span is a stretch of numbers, both ends included. The zero value is empty: numbers begin with 1.
type Span struct {
	From uint64 `json:"from"`
	To   uint64 `json:"to"`
}

// SpanOf is the stretch from one number to another, empty where there is none between.
func SpanOf(from, to uint64) Span {
	if to < from || from == 0 {
		return Span{}
	}
	return Span{from, to}
}

// Len is how many numbers it has.
func (s Span) Len() uint64 {
	if s.From == 0 {
		return 0
	}
	return s.To - s.From + 1
}

// String spells it for people.
func (s Span) String() string {
	if s.From == s.To {
		return fmt.Sprint(s.From)
	}
	return fmt.Sprintf("%d to %d", s.From, s.To)
}
