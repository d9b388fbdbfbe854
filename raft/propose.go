// SPDX-License-Identifier: Apache-2.0

package raft

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"time"

	hraft "github.com/hashicorp/raft"

	"github.com/demarc-dev/demarc/fault"
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
	wake   chan struct{}
	closed bool
}

const queueBytes = 64 << 20

func newQueue() *queue { return &queue{wake: make(chan struct{}, 1)} }

func (q *queue) put(w *waiting) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.closed {
		return errClosing
	}
	if q.bytes+len(w.data) > queueBytes {
		return fault.New("raft.Propose", fault.Busy, "proposals of %d bytes wait already: try again in a moment", q.bytes)
	}
	q.list, q.bytes = append(q.list, w), q.bytes+len(w.data)
	select {
	case q.wake <- struct{}{}:
	default:
	}
	return nil
}

// take gives the next pack, nil where nothing waits.
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
	return out
}

func (q *queue) close() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.closed = true
	for _, w := range q.list {
		if w.taken.CompareAndSwap(false, true) {
			w.answer <- result{err: errClosing}
		}
	}
	q.list = nil
}

var errClosing = fault.New("raft.Propose", fault.Unavailable, "this node is stopping: ask another one")

// pack writes one entry after another, each of all that waited while the one before was written.
func (n *Node) pack() {
	for {
		select {
		case <-n.ctx.Done():
			return
		case <-n.queue.wake:
		}
		batch := n.queue.take()
		proposals := make([][]byte, 0, len(batch))
		kept := batch[:0]
		for _, w := range batch {
			if err := n.cfg.Machine.Rehearse(w.data); err != nil {
				w.answer <- result{err: fault.At("raft.Propose", fault.Invalid, err)}
				continue
			}
			kept, proposals = append(kept, w), append(proposals, w.data)
		}
		if len(kept) == 0 {
			continue
		}
		out, err := n.write(encodePack(proposals))
		for i, w := range kept {
			switch {
			case err != nil:
				w.answer <- result{err: err}
			case i < len(out):
				w.answer <- result{ans: out[i]}
			default:
				w.answer <- result{err: fault.New("raft.Propose", fault.Unsure, "the machine stopped")}
			}
		}
	}
}

// write puts one entry into the log and gives the machine's answers.
func (n *Node) write(entry []byte) ([][]byte, error) {
	const op = "raft.write"
	f := n.raft.Apply(entry, applyWait)
	err := f.Error()
	switch {
	case err == nil:
		a, ok := f.Response().(answers)
		if !ok {
			return nil, fault.New(op, fault.Internal, "the machine gave no answer")
		}
		return a.each, a.err
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
			ans, err = n.forward.ask(ctx, id, askPropose, data)
			return err
		}
		ans, err = n.propose(ctx, data)
		return err
	})
	return ans, fault.At(op, "", err)
}

// retry does f again while it fails without having done anything, until ctx ends.
func (n *Node) retry(ctx context.Context, f func() error) error {
	wait := 10 * time.Millisecond
	for {
		err := f()
		if k := fault.Of(err); err == nil || (k != fault.NotLeader && k != fault.Unavailable) || errors.Is(err, errClosing) {
			return err
		}
		t := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			t.Stop()
			return fault.Because(errors.Join(ctx.Err(), err), "raft.retry", fault.Unavailable, "no leader was found in time: a majority of the nodes must be up and reach each other")
		case <-n.ctx.Done():
			t.Stop()
			return errClosing
		case <-t.C:
		}
		wait = min(2*wait, 200*time.Millisecond)
	}
}

// propose is Propose on the leader itself.
func (n *Node) propose(ctx context.Context, data []byte) ([]byte, error) {
	if n.raft.State() != hraft.Leader {
		return nil, fault.New("raft.propose", fault.NotLeader, "this node does not lead")
	}
	w := &waiting{data: data, answer: make(chan result, 1)}
	if err := n.queue.put(w); err != nil {
		return nil, err
	}
	select {
	case r := <-w.answer:
		return r.ans, r.err
	case <-ctx.Done():
		if w.taken.CompareAndSwap(false, true) {
			return nil, fault.Because(ctx.Err(), "raft.propose", fault.Unavailable, "the time was up before it was written")
		}
		return nil, fault.Because(ctx.Err(), "raft.propose", fault.Unsure, "the time was up while it was being written: it may happen, propose the same again with the same request id")
	case <-n.ctx.Done():
		if w.taken.CompareAndSwap(false, true) {
			return nil, errClosing
		}
		return nil, fault.New("raft.propose", fault.Unsure, "this node stopped while it was being written: propose the same again with the same request id")
	}
}

// Read returns once the machine of this node has everything that was answered, by any node, before the call.
func (n *Node) Read(ctx context.Context) error {
	const op = "raft.Read"
	var index uint64
	err := n.retry(ctx, func() error {
		var err error
		if id, ok := n.Leader(); ok && id != n.cfg.Self.ID {
			index, err = n.forward.readIndex(ctx, id)
			return err
		}
		index, err = n.readIndex()
		return err
	})
	if err != nil {
		return fault.At(op, "", err)
	}
	for {
		moved := n.fsm.changed()
		if n.fsm.index.Load() >= index {
			return nil
		}
		select {
		case <-moved:
		case <-ctx.Done():
			return fault.Because(ctx.Err(), op, fault.Unavailable, "this node is behind and did not catch up in time")
		case <-n.ctx.Done():
			return fault.At(op, "", errClosing)
		case <-n.fsm.dead:
			return fault.At(op, "", n.fsm.failure())
		}
	}
}

// readIndex is asked of the leader. What it answered itself it has applied itself; what an earlier leader answered it has
// after one barrier in its own term; and that nobody else leads by now a majority confirms afterwards.
func (n *Node) readIndex() (uint64, error) {
	const op = "raft.readIndex"
	if n.raft.State() != hraft.Leader {
		return 0, fault.New(op, fault.NotLeader, "this node does not lead")
	}
	if term := n.raft.CurrentTerm(); n.barrier.Load() != term {
		if err := n.raft.Barrier(applyWait).Error(); err != nil {
			return 0, fault.Because(err, op, fault.Unavailable, "the leader has not caught up yet")
		}
		if n.raft.CurrentTerm() == term {
			n.barrier.Store(term)
		}
	}
	index := n.fsm.index.Load()
	if err := n.raft.VerifyLeader().Error(); err != nil {
		return 0, fault.Because(err, op, fault.NotLeader, "this node does not lead any more")
	}
	return index, nil
}
