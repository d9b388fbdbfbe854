// SPDX-License-Identifier: Apache-2.0

package appliance

import (
	"context"
	"slices"
	"sync"
	"time"
)

// checkEvery bounds how late a step of the host's clock is noticed while an act runs.
const checkEvery = time.Second

// while derives the context of an act that was counted on grants. It ends, with the error as its cause, as soon as may returns
// one: may is asked at each change of the book, when the first of the grants ends, and each second, because the host's clock can
// be set. The end of a grant counts on the monotonic clock too, whichever comes first: to set the clock back gives nobody more
// time. The caller must call stop, which waits for the goroutine that watches.
func (a *Appliance) while(ctx context.Context, grants []string, may func(now time.Time) error) (_ context.Context, stop func()) {
	ctx, cancel := context.WithCancelCause(ctx)
	end, until := a.firstEnd(grants)
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			changed := a.book.Changed()
			now := a.book.Now()
			if !end.IsZero() && !time.Now().Before(end) && now.Before(until) {
				now = until // the host's clock was set back
			}
			if err := may(now); err != nil {
				cancel(err)
				return
			}
			wait := checkEvery
			if !end.IsZero() {
				wait = min(wait, max(0, min(until.Sub(now), time.Until(end))))
			}
			t := time.NewTimer(wait)
			select {
			case <-changed:
			case <-t.C:
			case <-ctx.Done():
				t.Stop()
				return
			}
			t.Stop()
		}
	})
	return ctx, func() {
		cancel(nil)
		wg.Wait()
	}
}

// firstEnd is when the first of these grants ends: end on the monotonic clock, until by the host's; zero if none has an end.
func (a *Appliance) firstEnd(grants []string) (end, until time.Time) {
	for _, h := range a.book.View().Grants.Held {
		if u := h.Grant.Until; slices.Contains(grants, h.ID) && !u.IsZero() && (until.IsZero() || u.Before(until)) {
			until = u
		}
	}
	if until.IsZero() {
		return time.Time{}, until
	}
	return time.Now().Add(until.Sub(a.book.Now())), until
}
