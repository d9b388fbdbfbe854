// SPDX-License-Identifier: Apache-2.0

package appliance

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

// bookDisk is what the parts of an appliance know of the disk under the book. The zero value is ready for use.
type bookDisk struct {
	mu      sync.Mutex
	failing chan struct{} // closed when the book takes changes again; nil while it does
	since   time.Time
	wake    chan struct{} // holds a token while there is a failure to look at
	site    *Site         // of the file, while the disk has not taken it
}

// failed notes that the book takes no changes.
func (d *bookDisk) failed(at time.Time) {
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

// healed wakes who waits.
func (d *bookDisk) healed() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.failing != nil {
		close(d.failing)
		d.failing = nil
	}
}

// failedSince returns when it began.
func (d *bookDisk) failedSince() time.Time {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.since
}

// wait returns a channel that is closed when the book takes changes, nil if it does now.
func (d *bookDisk) wait() <-chan struct{} {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.failing
}

// tendBook closes the book at the end. Until then it probes a book that takes no changes: what waits goes on by itself when
// there is space, and nobody has to start this process again.
func (a *Appliance) tendBook(ctx context.Context, ready func()) error {
	ready()
	wait := probeFirst
	for ctx.Err() == nil {
		select {
		case <-ctx.Done():
			continue
		case <-a.disk.wake:
		}
		if err := a.local.Failed(); err != nil {
			a.log.Error("the book takes no changes: the application and its doors go on, the vendor can start nothing, and it goes on by itself", "err", err)
		}
		for wait = probeFirst; ctx.Err() == nil; wait = min(2*wait, probeLast) {
			if a.local.Probe() == nil && a.settle(ctx) == nil {
				a.log.Warn("the book takes changes again")
				a.disk.healed()
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
	stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopWait)
	defer cancel()
	a.Close(stop)
	return nil
}

// settle puts the file's decisions into the book, if the disk did not take them at the start: before anything else, since
// what comes after is decided by them.
func (a *Appliance) settle(ctx context.Context) error {
	a.disk.mu.Lock()
	site := a.disk.site
	a.disk.mu.Unlock()
	if site == nil {
		return nil
	}
	// A file that the book refuses is told to whoever starts this program, again and again perhaps, and is no entry.
	if _, err := foresee(a, SetSite{Site: *site}); err != nil {
		return err
	}
	if _, err := ledger.Submit(context.WithoutCancel(ctx), a.local, a.meta(drawID()), SetSite{Site: *site}); err != nil {
		return err
	}
	a.disk.mu.Lock()
	a.disk.site = nil
	a.disk.mu.Unlock()
	return nil
}

// persist submits a change that must not be lost: while the book's disk takes nothing, it waits.
func persist[R any](ctx context.Context, a *Appliance, c ledger.Change[State, R]) (R, error) {
	id := drawID()
	for {
		r, err := submitAs(ctx, a, id, c)
		if err == nil || a.local.Failed() == nil {
			return r, err
		}
		if healed := a.disk.wait(); healed != nil {
			select {
			case <-ctx.Done():
				return r, err
			case <-healed:
			}
		}
	}
}

// odd reports whether an error of a part's own loop is news: neither the end, nor a book that takes no changes, of which
// tendBook tells once.
func (a *Appliance) odd(ctx context.Context, err error) bool {
	return err != nil && ctx.Err() == nil && a.local.Failed() == nil
}
