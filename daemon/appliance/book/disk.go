// SPDX-License-Identifier: Apache-2.0

package book

import (
	"context"
	"sync"
	"time"

	"github.com/demarc-dev/demarc/ledger"
)

// How often a book that takes no changes is probed.
const (
	probeFirst = 500 * time.Millisecond // doubles
	probeLast  = 5 * time.Second
)

// diskState is what the parts of an appliance know of the disk under the book. The zero value is ready for use.
type diskState struct {
	mu      sync.Mutex
	failing chan struct{} // closed when the book takes changes again; nil while it does
	since   time.Time
	wake    chan struct{} // holds a token while there is a failure to look at
	site    *Site         // of the file, while the disk has not taken it
}

// failed records that the book takes no changes.
func (d *diskState) failed(at time.Time) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.failing == nil {
		d.failing, d.since = make(chan struct{}), at
	}
	select {
	case d.wake <- struct{}{}:
	default:
	}
}

// healed wakes those that wait.
func (d *diskState) healed() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.failing != nil {
		close(d.failing)
		d.failing = nil
	}
}

// failedSince returns when it began.
func (d *diskState) failedSince() time.Time {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.since
}

// wait returns a channel that is closed when the book takes changes, nil if it does now.
func (d *diskState) wait() <-chan struct{} {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.failing
}

// Tend probes a book that takes no changes, until ctx ends: what waits continues by itself when there is space, without a restart of this
// process.
func (s *Store) Tend(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-s.disk.wake:
		}
		if err := s.local.Failed(); err != nil {
			s.log.Error("the book takes no changes: the application and its doors stay as they are, the vendor can start nothing, "+
				"and the book takes changes again by itself", "err", err)
		}
		for wait := probeFirst; ctx.Err() == nil; wait = min(2*wait, probeLast) {
			if s.local.Probe() == nil && s.settle(ctx) == nil {
				s.log.Warn("the book takes changes again")
				s.disk.healed()
				break
			}
			t := time.NewTimer(wait)
			select {
			case <-ctx.Done():
			case <-t.C:
			}
			t.Stop()
		}
	}
}

// settle puts the file's decisions into the book, if the disk did not take them at the start: before anything else, since
// what comes after is decided by them.
func (s *Store) settle(ctx context.Context) error {
	s.disk.mu.Lock()
	site := s.disk.site
	s.disk.mu.Unlock()
	if site == nil {
		return nil
	}
	// A file that the book refuses is an error at each start of this program, and no entry.
	if _, err := DryRun(s, SetSite{Site: *site}); err != nil {
		return err
	}
	if _, err := ledger.Submit(context.WithoutCancel(ctx), s.local, s.Meta(drawID()), SetSite{Site: *site}); err != nil {
		return err
	}
	s.disk.mu.Lock()
	s.disk.site = nil
	s.disk.mu.Unlock()
	return nil
}

// Persist submits a change that must not be lost: while the book's disk takes nothing, it waits.
func Persist[R any](ctx context.Context, s *Store, c ledger.Change[State, R]) (R, error) {
	id := drawID()
	for {
		r, err := SubmitAs(ctx, s, id, c)
		if err == nil || s.local.Failed() == nil {
			return r, err
		}
		if healed := s.disk.wait(); healed != nil {
			select {
			case <-ctx.Done():
				return r, err
			case <-healed:
			}
		}
	}
}

// Reportable reports whether an error of a loop is news: neither the end of its context, nor a book that takes no changes, which
// [Store.Tend] logs once.
func (s *Store) Reportable(ctx context.Context, err error) bool {
	return err != nil && ctx.Err() == nil && s.local.Failed() == nil
}
