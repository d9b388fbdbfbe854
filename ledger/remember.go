// SPDX-License-Identifier: Apache-2.0

package ledger

import (
	"time"

	"github.com/benbjohnson/immutable"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/seal"
)

// What a book remembers of the answers of the last [Remember]. An answer is never forgotten earlier, for then a repeated
// request would be applied twice: while more would have to be remembered than this, new changes are told [fault.Busy] and
// stay out of the log. A repeated request is answered all the same. The bounds may be passed by what is on its way into
// the log when they are reached.
//
// On average over 10 minutes they allow 1,747 changes a second. The figures in memory are in docs/time.md.
const (
	MaxRemembered      = 1 << 20
	MaxRememberedBytes = 512 << 20 // of the keys, digests and answers, and answerCost for each
	answerCost         = 256       // bytes that the maps take for one answer, and more
)

// limit is how much a book remembers.
type limit struct {
	count int
	bytes int64
}

// Limit sets how many answers the book remembers, and how many bytes of them, in place of [MaxRemembered] and
// [MaxRememberedBytes]. It must be called before the book is used. All copies of a book should have the same: it is
// the leader's that counts.
func (b *Book[S]) Limit(count int, bytes int64) { b.limit = limit{count, bytes} }

// allows judges a change that makes the audit log grow from was to is, after which count answers would be remembered. A
// repeated request makes nothing grow.
func (l limit) allows(was, is int64, count int, bytes int64) error {
	if was == is || count <= l.count && bytes <= l.bytes {
		return nil
	}
	return fault.New("ledger.DryRun", fault.Busy,
		"the answers to %d changes of the last %s (%d MiB) are remembered, so that none is made twice, and there is no room for more: try "+
			"again in a moment", count-1, Remember, bytes>>20)
}

// Remembered tells how many answers the book remembers at this moment, and how many bytes they are counted as.
func (b *Book[S]) Remembered() (count int, bytes int64) {
	p := b.now.Load()
	return p.old.Len(), p.held
}

func (r remembered) bytes() int64 {
	return int64(len(r.Key)+len(r.Sum)+len(r.Answer)) + answerCost
}

// At is the book's time: the stamp of the last change, or of an earlier one that was later.
func (b *Book[S]) At() time.Time { return b.now.Load().at }

const setTimeKind = "book.time/1"

// SetTime sets a book's time back from one that was wrong: a node whose clock was ahead had stamped a change, and from
// then on every stamp was lifted to that one. It is on record like any change, with the time that it sets. What is
// remembered keeps its age. Where the book's time is another than From it is refused.
type SetTime[S any] struct {
	From time.Time `json:"from"`
	To   time.Time `json:"to"`
}

// Kind implements [Change].
func (SetTime[S]) Kind() string { return setTimeKind }

// Apply implements [Change]. The time itself is the book's and not of its state: see turnBack, which was here before.
func (c SetTime[S]) Apply(_ *S, m Meta) (struct{}, error) {
	if !m.At.Equal(c.To) || !c.To.Before(c.From) {
		return struct{}{}, fault.New("ledger.SetTime", fault.Conflict, "the book's time is not set back from %s to %s: it is another by now",
			c.From.UTC().Format(time.RFC3339), c.To.UTC().Format(time.RFC3339))
	}
	return struct{}{}, nil
}

// turnBack sets the page's time to that of a [SetTime], where it may be, and lets the change have it for its stamp.
func (n *page[S]) turnBack(in *proposal) {
	var c SetTime[S]
	if seal.StrictJSON(in.Body, &c) != nil || !c.From.Equal(n.at) || !c.To.Before(n.at) {
		return
	}
	by := n.at.Sub(c.To)
	seen, old := n.seen, n.old
	n.seen, n.old, n.held = immutable.NewMap[string, remembered](nil), immutable.NewList[string](), 0
	for it := old.Iterator(); !it.Done(); {
		_, key := it.Next()
		r, _ := seen.Get(key)
		r.At = r.At.Add(-by)
		n.seen, n.old, n.held = n.seen.Set(key, r), n.old.Append(key), n.held+r.bytes()
	}
	n.at = c.To.UTC()
	in.Meta.At = n.at
}

// Meta stamps the change with the time that it sets.
func (c SetTime[S]) Meta(by fleet.Principal, id fleet.RequestID) Meta {
	return Meta{c.To.UTC(), by, id}
}
