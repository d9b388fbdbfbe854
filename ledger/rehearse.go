// SPDX-License-Identifier: Apache-2.0

package ledger

import (
	"bytes"
	"sync"

	"github.com/demarc-dev/demarc/fault"
)

// maxAhead bounds the pages that were rehearsed and not applied. A leader has fewer on their way at any time.
const maxAhead = 4096

// ahead is what was rehearsed, each page made of the one before it, the first of the page that is published now. As long
// as the log brings the same proposals in the same order, applying one is to publish the page that its rehearsal made.
type ahead[S any] struct {
	mu   sync.Mutex
	at   *page[S] // what is published now, or what that was copied from
	list []rehearsal[S]
}

type rehearsal[S any] struct {
	base *page[S]
	data []byte
	next *page[S]
	ans  []byte
}

// DryRun makes the page that follows what was rehearsed before, or the present one. It fails only where Apply would
// stop the book: the proposal is malformed, its kind is not known, or the change panics; and with [fault.Busy] where more
// answers would have to be remembered than the book may hold. A change that would be refused passes: its refusal belongs
// on record. Whoever rehearses in the order in which he then proposes pays once: Apply takes
// the page over. The caller must not modify data afterwards.
func (b *Book[S]) DryRun(data []byte) error {
	a := &b.ahead
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.list) >= maxAhead {
		a.list = nil
	}
	base := a.at
	if n := len(a.list); n > 0 {
		base = a.list[n-1].next
	}
	next, ans, err := b.try(base, base.index, data)
	if err != nil {
		return err
	}
	if err := b.limit.allows(base.log.Size(), next.log.Size(), next.old.Len(), next.held); err != nil {
		return err
	}
	a.list = append(a.list, rehearsal[S]{base, data, next, ans})
	return nil
}

// take gives the page that a rehearsal made of the present one with the same proposal. Where there is none, what was
// rehearsed is of no use any more.
func (a *ahead[S]) take(data []byte) (*page[S], []byte, bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.list) == 0 {
		return nil, nil, false
	}
	r := a.list[0]
	if r.base != a.at || !bytes.Equal(r.data, data) {
		a.list = nil
		return nil, nil, false
	}
	a.list[0] = rehearsal[S]{}
	a.list = a.list[1:]
	return r.next, r.ans, true
}

// Apply makes the next page from one proposal and publishes it. The answer goes to whoever proposed. An error means
// that the book can't go on: the node must stop. The caller gives each position of the log once, in order; several
// proposals may share an index.
func (b *Book[S]) Apply(index uint64, data []byte) ([]byte, error) {
	if p, ans, ok := b.ahead.take(data); ok {
		n := *p // others rehearse on p
		n.index = index
		b.publish(&n, p)
		return ans, nil
	}
	p, ans, err := b.try(b.now.Load(), index, data)
	if err != nil {
		return nil, fault.At("ledger.Apply", fault.Internal, err)
	}
	b.publish(p, p)
	return ans, nil
}

// publish shows a page to readers. At is the page that it was copied from, or itself: what is rehearsed next follows it.
func (b *Book[S]) publish(p, at *page[S]) {
	b.ahead.mu.Lock()
	b.ahead.at = at
	if n := len(b.ahead.list); n > 0 && b.ahead.list[0].base != at {
		b.ahead.list = nil
	}
	b.ahead.mu.Unlock()
	b.mu.Lock()
	defer b.mu.Unlock()
	b.now.Store(p)
	close(b.changed)
	b.changed = make(chan struct{})
}
