// SPDX-License-Identifier: Apache-2.0

package raft

import (
	"context"
	"errors"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	hraft "github.com/hashicorp/raft"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/raft/forward"
)

// waiting is a proposal on its way into the log.
type waiting struct {
	data   []byte
	taken  atomic.Bool // into an entry, or given up: whoever sets it first decides
	answer chan result
}

type result struct {
	ans []byte
	err error
}

// queue holds proposals while an entry is being written. What is over the limit is told to come back.
type queue struct {
	mu     sync.Mutex
	list   []*waiting
	bytes  int
	busy   int           // packs that are being written
	wake   chan struct{} // something waits
	quiet  chan struct{} // closed, and made anew, when nothing waits and nothing is being written
	closed bool
}

const (
	queueBytes = 64 << 20
	queueCount = 16 << 10
	// packers is how many entries are on their way at once: while one is replicated the next is written.
	packers = 2
)

func newQueue() *queue { return &queue{wake: make(chan struct{}, 1), quiet: make(chan struct{})} }

func (q *queue) put(w *waiting) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.closed {
		return errClosing
	}
	if q.bytes+len(w.data) > queueBytes || len(q.list) >= queueCount {
		return fault.New("raft.Propose", fault.Busy, "%d proposals of %d bytes wait already: try again in a moment", len(q.list), q.bytes)
	}
	q.list, q.bytes = append(q.list, w), q.bytes+len(w.data)
	select {
	case q.wake <- struct{}{}:
	default:
	}
	return nil
}

// take gives the next pack, nil where nothing waits. Who gets one says done.
func (q *queue) take() []*waiting {
	q.mu.Lock()
	defer q.mu.Unlock()
	var out []*waiting
	size := 0
	for len(q.list) > 0 && len(out) < packCount {
		w := q.list[0]
		if len(out) > 0 && size+len(w.data) > packBytes {
			break
		}
		q.list[0] = nil
		q.list, q.bytes = q.list[1:], q.bytes-len(w.data)
		if w.taken.CompareAndSwap(false, true) {
			out, size = append(out, w), size+len(w.data)
		}
	}
	if len(q.list) > 0 {
		select {
		case q.wake <- struct{}{}:
		default:
		}
	}
	if len(out) > 0 {
		q.busy++
	}
	q.settle()
	return out
}

func (q *queue) done() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.busy--
	q.settle()
}

// settle tells those that wait for quiet. The lock is held.
func (q *queue) settle() {
	if q.busy == 0 && len(q.list) == 0 {
		close(q.quiet)
		q.quiet = make(chan struct{})
	}
}

// idle waits until nothing waits and nothing is being written.
func (q *queue) idle(ctx context.Context) error {
	for {
		q.mu.Lock()
		quiet, done := q.quiet, q.busy == 0 && len(q.list) == 0
		q.mu.Unlock()
		if done {
			return nil
		}
		select {
		case <-quiet:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// refuse answers all that wait.
func (q *queue) refuse(err error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for _, w := range q.list {
		if w.taken.CompareAndSwap(false, true) {
			w.answer <- result{err: err}
		}
	}
	q.list, q.bytes = nil, 0
	q.settle()
}

func (q *queue) close() {
	q.mu.Lock()
	q.closed = true
	q.mu.Unlock()
	q.refuse(errClosing)
}

var (
	errClosing   = fault.New("raft.Propose", fault.Unavailable, "this node is stopping: ask another one")
	errHung      = fault.New("raft.Propose", fault.Unavailable, "the disk of this node hangs: the others elect another leader")
	errNotLeader = fault.New("raft.Propose", fault.NotLeader, "this node does not lead")
)

// pack writes one entry after another, each of all that waited while the ones before were written.
func (n *Node) pack() {
	for {
		if batch := n.queue.take(); len(batch) > 0 {
			n.write(batch)
			n.queue.done()
			continue
		}
		select {
		case <-n.ctx.Done():
			return
		case <-n.queue.wake:
		}
	}
}

// write rehearses a pack, puts it into the log as one entry, and answers each proposal.
func (n *Node) write(batch []*waiting) {
	kept, entry := n.begin(batch)
	if len(kept) == 0 {
		return
	}
	out, err := n.applied(entry)
	for i, w := range kept {
		switch {
		case err != nil:
			w.answer <- result{err: err}
		case len(out) == len(kept):
			w.answer <- out[i]
		case len(out) == 1:
			w.answer <- out[0]
		default:
			w.answer <- result{err: fault.New("raft.write", fault.Unsure, "this is in the log, and its answer was lost")}
		}
	}
}

// begin rehearses a pack and gives what is kept of it to the library. One pack at a time: so entries come into the log in
// the order in which they were rehearsed, and the machine can take its rehearsals over.
func (n *Node) begin(batch []*waiting) (kept []*waiting, entry hraft.ApplyFuture) {
	n.order.Lock()
	defer n.order.Unlock()
	proposals := make([][]byte, 0, len(batch))
	kept = batch[:0]
	for _, w := range batch {
		if !n.leads() {
			w.answer <- result{err: errNotLeader}
			continue
		}
		if err := n.cfg.Machine.Rehearse(w.data); err != nil {
			w.answer <- result{err: refusal(err)}
			continue
		}
		kept, proposals = append(kept, w), append(proposals, w.data)
	}
	if len(kept) == 0 {
		return nil, nil
	}
	pack := encodePack(proposals)
	if err := n.room(len(pack)); err != nil {
		for _, w := range kept {
			w.answer <- result{err: err}
		}
		return nil, nil
	}
	n.meters.packs.Observe(float64(len(kept)))
	return kept, n.raft.Apply(pack, applyWait)
}

// applied waits for one entry and gives the machine's answers. Only the errors that the library gives before it
// writes mean that nothing was written.
func (n *Node) applied(entry hraft.ApplyFuture) ([]result, error) {
	const op = "raft.write"
	err := entry.Error()
	switch {
	case err == nil:
		out, _ := entry.Response().([]result)
		return out, nil
	case errors.Is(err, hraft.ErrNotLeader), errors.Is(err, hraft.ErrLeadershipTransferInProgress):
		return nil, fault.Because(err, op, fault.NotLeader, "this node does not lead")
	case errors.Is(err, hraft.ErrEnqueueTimeout):
		return nil, fault.Because(err, op, fault.Unavailable, "the leader could not begin to write in time")
	}
	return nil, fault.Because(err, op, fault.Unsure, "leadership was lost while this was being written: it may have happened, propose the same again with the same request id")
}

// Propose puts data into the log, from any node, and gives the machine's answer. It looks for a leader until ctx ends.
// [fault.Unsure] means that it may have happened; it is never tried again by itself.
func (n *Node) Propose(ctx context.Context, data []byte) ([]byte, error) {
	const op = "raft.Propose"
	if len(data) > MaxProposal {
		return nil, fault.New(op, fault.Invalid, "the proposal has %d bytes, the limit is %d", len(data), MaxProposal)
	}
	var ans []byte
	err := n.retry(ctx, func() (err error) {
		if id, ok := n.Leader(); ok && id != n.cfg.Self.ID {
			ans, err = n.calls.Call(ctx, id, kindPropose, data)
			return err
		}
		ans, err = n.propose(ctx, data)
		return err
	})
	n.meters.answered(err)
	return ans, fault.At(op, "", err)
}

// retry does f again while it fails without having done anything, until ctx ends.
func (n *Node) retry(ctx context.Context, f func() error) error {
	wait := 10 * time.Millisecond
	for {
		err := f()
		k := fault.Of(err)
		if k != fault.NotLeader && k != fault.Unavailable || forward.IsPermanent(err) || errors.Is(err, errClosing) || errors.Is(err, forward.ErrClosed) {
			return err
		}
		t := time.NewTimer(wait/2 + rand.N(wait))
		select {
		case <-ctx.Done():
			t.Stop()
			return fault.Because(errors.Join(ctx.Err(), err), "raft.retry", fault.Unavailable, "no leader was found in time: a majority of the nodes must be up and reach each other")
		case <-n.closing:
			t.Stop()
			return errClosing
		case <-t.C:
		}
		wait = min(2*wait, 200*time.Millisecond)
	}
}

// propose is Propose on the leader itself.
func (n *Node) propose(ctx context.Context, data []byte) ([]byte, error) {
	switch {
	case n.hung.Load():
		return nil, errHung
	case !n.leads():
		return nil, errNotLeader
	case ctx.Err() != nil:
		return nil, fault.Because(ctx.Err(), "raft.propose", fault.Unavailable, "the time was up before it was written")
	}
	w := &waiting{data: data, answer: make(chan result, 1)}
	if err := n.queue.put(w); err != nil {
		return nil, err
	}
	if n.hung.Load() { // since the question above: whoever refused what waits may not have seen this
		n.queue.refuse(errHung)
	}
	select {
	case r := <-w.answer: // the queue is refused, and packs are answered, before the node ends
		return r.ans, r.err
	case <-ctx.Done():
	}
	if w.taken.CompareAndSwap(false, true) {
		return nil, fault.Because(ctx.Err(), "raft.propose", fault.Unavailable, "the time was up before it was written")
	}
	select {
	case r := <-w.answer: // just in time
		return r.ans, r.err
	default:
		return nil, fault.Because(ctx.Err(), "raft.propose", fault.Unsure, "the time was up while it was being written: it may happen, propose the same again with the same request id")
	}
}
