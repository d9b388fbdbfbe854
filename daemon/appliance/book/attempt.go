// SPDX-License-Identifier: Apache-2.0

package book

import (
	"context"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/ledger"
)

// Refusals of repeated tries of this program or the vendor: each kind is recorded once, others at this rate.
const (
	refusalEvery = time.Minute
	refusalBurst = 16
	maxRefusals  = 1024 // that are stored
)

// refusals stores which refusals are on record.
type refusals struct {
	mu     sync.Mutex
	known  map[string]bool // by kind, id and sentence
	pace   *rate.Limiter
	unsaid uint64 // since the last one that was recorded
}

// news reports whether a refusal is to be recorded, and how many were not since the last one.
func (r *refusals) news(key string) (bool, uint64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.pace == nil {
		r.known, r.pace = map[string]bool{}, rate.NewLimiter(rate.Every(refusalEvery), refusalBurst)
	}
	if r.known[key] || !r.pace.Allow() {
		r.unsaid++
		return false, 0
	}
	if len(r.known) >= maxRefusals {
		clear(r.known)
	}
	r.known[key] = true
	unsaid := r.unsaid
	r.unsaid = 0
	return true, unsaid
}

// Attempt is [Submit] for a change that is tried until it is taken. What the book would refuse is written once, and not at each try: an
// entry wakes whoever watches the book, and so the next try. What was left out is counted, and recorded with the next refusal of another
// kind.
func Attempt[R any](ctx context.Context, s *Store, c ledger.Change[State, R]) (R, error) {
	out, refused := DryRun(s, c)
	if refused == nil {
		return Submit(ctx, s, c)
	}
	now, unsaid := s.refused.news(c.Kind() + "\n" + string(fault.Of(refused)) + "\n" + fault.Text(refused))
	if !now {
		return out, refused
	}
	if unsaid > 0 {
		if _, err := Submit(ctx, s, Unsaid{Count: unsaid}); err != nil {
			return out, err
		}
	}
	return Submit(ctx, s, c)
}

// DryRun returns what the book would answer to a change of the appliance itself.
func DryRun[R any](s *Store, c ledger.Change[State, R]) (R, error) {
	return ledger.Foresee(s.book, s.Meta(drawID()), c)
}

// Unsaid records how many refusals were not written one by one, since they were as the ones before them or too many.
type Unsaid struct {
	Count uint64 `json:"count"`
}

// Kind names the change in the log.
func (Unsaid) Kind() string { return "refusals.unsaid/1" }

// Apply changes nothing: the entry is what counts.
func (c Unsaid) Apply(*State, ledger.Meta) (none, error) { return none{}, nil }
