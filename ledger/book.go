// SPDX-License-Identifier: Apache-2.0

// Package ledger is a book: state, a closed set of versioned changes, an ordered log; pure Apply; the audit leaf is part
// of the same step.
//
// A [Book] is made of bytes in one order, and of nothing else: no clock, no randomness, no I/O. Two books that were given
// the same bytes have the same state and the same audit root. What gives the order is [Local] for a book of one copy, or
// a cluster for a replicated one; the book does not know.
//
// A proposal is one JSON object and its answer another, the same whether it was made here or sent to a leader:
//
//	{"kind":"appliance.enrol/1","meta":{"at":"2026-01-02T15:04:05.000000006Z","by":"spiffe://...","request":"..."},"body":{...}}
//	{"fault":"","detail":"","result":{...}}
//
// The rules of a book:
//
//  1. A kind is never edited and never reused: a change of meaning is a new version.
//  2. A change that is refused alters nothing and leaves its record: the audit leaf names the fault.
//  3. Same principal, same request id, same kind and body: the same answer again, and no second leaf. Another body is
//     [fault.Conflict]. Answers are remembered for [Remember] of the book's own time, never of a clock, and none is
//     forgotten earlier: while there are more than a book may hold, [Book.DryRun] keeps new changes out.
//  4. The book's time never goes back: an earlier stamp is lifted to the last one. The one exception is [SetTime].
//  5. A kind that is met in the log and not known, or a change that panics, stops the book: carrying on would make it
//     differ from the others. [Book.DryRun] keeps both from getting into the log.
package ledger

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/benbjohnson/immutable"

	"github.com/demarc-dev/demarc/audit"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/seal"
)

// Bounds.
const (
	MaxChange  = 8 << 20 // bytes of a proposal
	MaxRequest = 64      // bytes of a request id
	maxBy      = 1 << 10 // bytes of a principal
	Remember   = 10 * time.Minute
)

// Meta is stamped once, by whoever proposes: Apply has no other source of time or name.
type Meta struct {
	At      time.Time       `json:"at"`
	By      fleet.Principal `json:"by"`
	Request fleet.RequestID `json:"request"`
}

// Change is one kind of change of a state S with an answer R. Its fields are its body, in JSON. Apply must be pure: it
// may use s, its own fields and the meta, and it must not keep or alter anything that s shares with an earlier page.
// A change that also has Private() bool, and returns true, has its body kept out of the audit leaf; its digest is there. One
// that has Record() any is shown by what that returns, which must be pure: with a [Cut] in the place of what is large, or nil for
// the body itself. A body
// with which the leaf would be larger than [audit.MaxLeaf] is left out in any case, with its digest in its place.
type Change[S, R any] interface {
	Kind() string
	Apply(s *S, m Meta) (R, error)
}

// Learned is a kind of change that a book knows. [Learn] makes it.
type Learned[S any] struct {
	kind  string
	empty func() any
	apply func(s *S, m Meta, body []byte) (result []byte, in leaf, err error)
}

// leaf is how a change stands in the audit log.
type leaf struct {
	private bool   // its digest alone
	record  []byte // in the place of its body, nil for the body itself
}

// Learn makes a book know the change C. S and R are inferred: Learn[Enrol]().
func Learn[C Change[S, R], S, R any]() Learned[S] {
	var zero C
	return Learned[S]{zero.Kind(), func() any { return new(C) }, func(s *S, m Meta, body []byte) ([]byte, leaf, error) {
		var c C
		var in leaf
		if err := seal.StrictJSON(body, &c); err != nil {
			return nil, in, malformed{err}
		}
		if p, ok := any(c).(interface{ Private() bool }); ok {
			in.private = p.Private()
		}
		if p, ok := any(c).(interface{ Record() any }); ok {
			if r := p.Record(); r != nil {
				var err error
				if in.record, err = seal.JSON(r); err != nil {
					return nil, in, malformed{err}
				}
			}
		}
		r, err := c.Apply(s, m)
		if err != nil {
			return nil, in, err
		}
		b, err := seal.JSON(r)
		if err != nil {
			return nil, in, malformed{err}
		}
		return b, in, nil
	}}
}

// Cut stands in the audit log for bytes that would make a leaf too large for whoever verifies it.
type Cut struct {
	Digest fleet.Digest `json:"digest"`
	Size   int          `json:"size"` // bytes
}

// CutOf names bytes by their digest; none are nil.
func CutOf(b []byte) *Cut {
	if len(b) == 0 {
		return nil
	}
	return &Cut{fleet.DigestOf(b), len(b)}
}

// malformed marks what can't be applied at all, as against what is refused.
type malformed struct{ error }

type proposal struct {
	Kind string          `json:"kind"`
	Meta Meta            `json:"meta"`
	Body json.RawMessage `json:"body"`
}

type answer struct {
	Fault  fault.Kind      `json:"fault"`
	Detail string          `json:"detail"`
	Result json.RawMessage `json:"result,omitempty"`
}

// remembered is an answer that was given. Its key in the page is the principal and the request id.
type remembered struct {
	At     time.Time `json:"at"`
	Key    string    `json:"key"`
	Sum    []byte    `json:"sum"` // SHA-256 of kind and body
	Answer []byte    `json:"answer"`
}

// page is one moment of a book. It is never modified once it is published.
type page[S any] struct {
	state S
	log   audit.Log
	index uint64 // of the last log entry that was applied
	at    time.Time
	seen  *immutable.Map[string, remembered]
	old   *immutable.List[string] // keys of seen, oldest first
	held  int64                   // bytes of seen
}

// Book holds a state. Readers never block and always see one whole moment. Apply, Restore and Snapshot may be called
// from one goroutine at a time; View, Log, Index, Changed and DryRun from any.
type Book[S any] struct {
	kinds   map[string]Learned[S]
	limit   limit
	now     atomic.Pointer[page[S]]
	ahead   ahead[S]
	mu      sync.Mutex // guards changed
	changed chan struct{}
}

// NewBook makes a book with its first page. A copy of S by assignment must be a copy: build S of persistent maps. S is
// written to snapshots as JSON. Two changes of one kind are a programmer's mistake: it panics.
func NewBook[S any](first S, learned ...Learned[S]) *Book[S] {
	b := &Book[S]{kinds: map[string]Learned[S]{}, limit: limit{MaxRemembered, MaxRememberedBytes}, changed: make(chan struct{})}
	for _, l := range learned {
		if _, twice := b.kinds[l.kind]; twice || l.kind == "" {
			panic(fmt.Sprintf("ledger: the kind %q is learned twice or has no name", l.kind))
		}
		b.kinds[l.kind] = l
	}
	p := &page[S]{state: first, seen: immutable.NewMap[string, remembered](nil), old: immutable.NewList[string]()}
	b.publish(p, p)
	return b
}

// View gives the state at this moment. It must not be modified.
func (b *Book[S]) View() S { return b.now.Load().state }

// Log gives the audit log at this moment.
func (b *Book[S]) Log() audit.Log { return b.now.Load().log }

// Both gives state and log of one moment.
func (b *Book[S]) Both() (S, audit.Log) {
	p := b.now.Load()
	return p.state, p.log
}

// Index is that of the last log entry that was applied.
func (b *Book[S]) Index() uint64 { return b.now.Load().index }

// Knows tells whether the book has learned a kind of change.
func (b *Book[S]) Knows(kind string) bool {
	_, ok := b.kinds[kind]
	return ok
}

// Kinds lists what the book has learned, sorted.
func (b *Book[S]) Kinds() []string { return slices.Sorted(maps.Keys(b.kinds)) }

// Empty returns a pointer to a new change of a kind, without anything in it, or nil if the kind is not known.
func (b *Book[S]) Empty(kind string) any {
	if k, ok := b.kinds[kind]; ok {
		return k.empty()
	}
	return nil
}

// Changed gives a channel that is closed when the next page is published. Take it before View, so as to miss nothing.
func (b *Book[S]) Changed() <-chan struct{} {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.changed
}

// try makes the page that follows p.
func (b *Book[S]) try(p *page[S], index uint64, data []byte) (next *page[S], ans []byte, err error) {
	const op = "ledger.try"
	if len(data) > MaxChange {
		return nil, nil, fault.New(op, fault.Invalid, "the change has %d bytes, the limit is %d", len(data), MaxChange)
	}
	var in proposal
	if err := seal.StrictJSON(data, &in); err != nil {
		return nil, nil, fault.At(op, fault.Invalid, err)
	}
	if in.Meta.By == "" || len(in.Meta.By) > maxBy || in.Meta.Request == "" || len(in.Meta.Request) > MaxRequest || in.Meta.At.IsZero() {
		return nil, nil, fault.New(op, fault.Invalid, "a change says when, by whom, and carries a request id of 1 to %d bytes", MaxRequest)
	}
	kind, ok := b.kinds[in.Kind]
	if !ok {
		return nil, nil, fault.New(op, fault.Invalid, "this build does not know the change %q: it must not go on without it", fault.Clip(in.Kind))
	}
	key := string(in.Meta.By) + "\n" + string(in.Meta.Request)
	sum := sha256.Sum256(append([]byte(in.Kind+"\n"), in.Body...))
	if had, ok := p.seen.Get(key); ok {
		n := *p
		n.index = index
		if bytes.Equal(had.Sum, sum[:]) {
			return &n, had.Answer, nil
		}
		return &n, encode(answer{Fault: fault.Conflict, Detail: "this request id was used for another request: draw a new one"}), nil
	}
	n := *p
	if in.Meta.At = in.Meta.At.UTC(); in.Kind == setTimeKind {
		n.turnBack(&in)
	}
	if in.Meta.At.Before(n.at) {
		in.Meta.At = n.at
	}
	n.index, n.at = index, in.Meta.At
	out, shown, err := b.run(kind, &n, in)
	if err != nil {
		return nil, nil, err
	}
	entry := audit.Entry{At: in.Meta.At, By: in.Meta.By, Request: in.Meta.Request, Kind: in.Kind, Fault: out.Fault, Detail: out.Detail}
	entry.Body = in.Body
	if shown.record != nil {
		entry.Body = shown.record
	}
	if shown.private || tooLarge(entry) {
		entry.BodyDigest, entry.Body = fleet.DigestOf(in.Body), nil
	}
	n.log = n.log.Append(entry)
	ans = encode(out)
	n.remember(remembered{At: in.Meta.At, Key: key, Sum: sum[:], Answer: ans})
	return &n, ans, nil
}

// tooLarge reports whether nobody could verify the entry with its body.
func tooLarge(e audit.Entry) bool {
	const worst = 6 // bytes of a leaf for one of a body, where each is escaped
	return len(e.Body) > audit.MaxLeaf/(2*worst) && len(e.Leaf()) > audit.MaxLeaf
}

// maxDetail bounds the sentence of a refusal, in bytes.
const maxDetail = 4 << 10

// run applies the change to the page's state, or to none of it.
func (b *Book[S]) run(kind Learned[S], n *page[S], in proposal) (out answer, shown leaf, err error) {
	defer func() {
		if v := recover(); v != nil {
			err = fault.New("ledger.run", fault.Internal, "the change %q panics: %v", in.Kind, v)
		}
	}()
	state := n.state
	result, shown, refused := kind.apply(&state, in.Meta, in.Body)
	if bad := (malformed{}); errors.As(refused, &bad) {
		return answer{}, leaf{}, fault.Because(bad.error, "ledger.run", fault.Invalid, "the body of the change %q: %s", in.Kind,
			fault.Text(bad.error))
	}
	if refused != nil {
		return answer{Fault: fault.Of(refused), Detail: fault.ClipTo(fault.Text(refused), maxDetail)}, shown, nil
	}
	n.state = state
	return answer{Result: result}, shown, nil
}

// remember keeps an answer and forgets those that are too old, by the book's own time.
func (n *page[S]) remember(r remembered) {
	if count := n.old.Len(); count > 0 {
		if last, ok := n.seen.Get(n.old.Get(count - 1)); ok && n.at.Sub(last.At) >= Remember { // all at once: there can be many
			n.seen, n.old, n.held = immutable.NewMap[string, remembered](nil), immutable.NewList[string](), 0
		}
	}
	n.seen, n.old, n.held = n.seen.Set(r.Key, r), n.old.Append(r.Key), n.held+r.bytes()
	for n.old.Len() > 0 {
		first, ok := n.seen.Get(n.old.Get(0))
		if ok && n.at.Sub(first.At) < Remember {
			return
		}
		n.held -= first.bytes()
		n.seen = n.seen.Delete(n.old.Get(0))
		n.old = n.old.Slice(1, n.old.Len())
	}
}

func encode(a answer) []byte {
	b, err := seal.JSON(a)
	if err != nil { // two strings and JSON that was made before
		return []byte(`{"fault":"internal","detail":"the answer has no JSON form"}`)
	}
	return b
}
