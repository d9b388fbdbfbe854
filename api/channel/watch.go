// SPDX-License-Identifier: Apache-2.0

package channel

import (
	"sync"
	"time"
)

// Watch is how long one side of a channel waits to hear something: [Patience] after what it heard last, and no longer than
// [Answer] after the first thing that it asked since. Whatever it asks after that waits along and puts nothing off: a peer
// whose program hangs takes what is written to it, for as long as its kernel has room. The zero value waits for nothing.
//
// One goroutine reads, and calls Listen and Heard; any may call Ask. The owner of the connection tells the time.
type Watch struct {
	mu    sync.Mutex
	asked bool
	until time.Time // the deadline that was set last
}

// Deadline is what a watch needs of a connection.
type Deadline interface{ SetReadDeadline(time.Time) error }

// Listen sets the deadline of the next read. It comes before each read.
func (w *Watch) Listen(c Deadline, now time.Time, beat time.Duration) {
	w.mu.Lock()
	defer w.mu.Unlock()
	wait := Patience(beat)
	if w.asked {
		wait = min(wait, Answer)
	}
	w.set(c, now.Add(wait))
}

// Heard notes that something came: nothing is waited for any more.
func (w *Watch) Heard() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.asked = false
}

// Ask notes that something is about to be written that the other side answers. It comes before the write: the answer may
// be there before the write returns, and to wait for it after that would be to wait for a second one.
func (w *Watch) Ask(c Deadline, now time.Time) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.asked {
		return
	}
	w.asked = true
	if t := now.Add(Answer); t.Before(w.until) {
		w.set(c, t)
	}
}

func (w *Watch) set(c Deadline, t time.Time) {
	w.until = t
	_ = c.SetReadDeadline(t) // it fails where the connection is closed, and then so does the read
}
