// SPDX-License-Identifier: Apache-2.0

package raft

import (
	"context"
	"errors"
	"sync"

	hraft "github.com/hashicorp/raft"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/raft/forward"
)

// packers is how many entries are on their way at once: while one is replicated the next is written.
const packers = 2

var (
	errClosing   = fault.New("raft.Propose", fault.Unavailable, "this node is stopping: ask another one")
	errHung      = fault.New("raft.Propose", fault.Unavailable, "the disk of this node hangs: the others elect another leader")
	errNotLeader = fault.New("raft.Propose", fault.NotLeader, "this node does not lead")
)

// Propose puts data into the log, from any node, and returns the machine's answer. It looks for a leader until ctx ends.
// [fault.Unsure] means that it may have happened; it is never retried here.
func (n *Node) Propose(ctx context.Context, data []byte) ([]byte, error) {
	const op = "raft.Propose"
	if len(data) > MaxProposal {
		return nil, fault.New(op, fault.Invalid, "the proposal has %d bytes, the limit is %d", len(data), MaxProposal)
	}
	var ans []byte
	err := n.life.retry(ctx, func() (err error) {
		if id, ok := n.lib.other(); ok {
			ans, err = n.calls.Call(ctx, id, kindPropose, data)
			return err
		}
		ans, err = n.proposals.propose(ctx, data)
		return err
	})
	n.meters.answered(err)
	return ans, fault.At(op, "", err)
}

// proposer puts proposals into the log of a leader.
type proposer struct {
	lib    *consensus
	life   *lifetime
	disk   *diskGuard
	dryRun func(data []byte) error
	packs  prometheus.Histogram

	queue *queue
	order sync.Mutex // of packs, from their dry run until the library has them
}

// run writes one entry after another, each of all that waited while the ones before were written.
func (p *proposer) run() {
	for {
		if batch := p.queue.take(); len(batch) > 0 {
			p.write(batch)
			p.queue.done()
			continue
		}
		select {
		case <-p.life.ctx.Done():
			return
		case <-p.queue.wake:
		}
	}
}

// write checks a pack, puts it into the log as one entry, and answers each proposal.
func (p *proposer) write(batch []*proposal) {
	accepted, entry := p.submit(batch)
	if len(accepted) == 0 {
		return
	}
	out, err := answersOf(entry)
	for i, w := range accepted {
		switch {
		case err != nil:
			w.answer <- result{err: err}
		case len(out) == len(accepted):
			w.answer <- out[i]
		case len(out) == 1:
			w.answer <- out[0]
		default:
			w.answer <- result{err: fault.New("raft.write", fault.Unsure, "this is in the log, and its answer was lost")}
		}
	}
}

// submit checks a pack and hands what is accepted to the library. One pack at a time: so entries come into the log in the
// order in which they were checked, and the machine can reuse the result of its dry run.
func (p *proposer) submit(batch []*proposal) (accepted []*proposal, entry hraft.ApplyFuture) {
	p.order.Lock()
	defer p.order.Unlock()
	data := make([][]byte, 0, len(batch))
	accepted = batch[:0]
	for _, w := range batch {
		if !p.lib.leads() {
			w.answer <- result{err: errNotLeader}
			continue
		}
		if err := p.dryRun(w.data); err != nil {
			w.answer <- result{err: refusal(err)}
			continue
		}
		accepted, data = append(accepted, w), append(data, w.data)
	}
	if len(accepted) == 0 {
		return nil, nil
	}
	pack := encodePack(data)
	if err := p.disk.ensureRoom(len(pack)); err != nil {
		for _, w := range accepted {
			w.answer <- result{err: err}
		}
		return nil, nil
	}
	p.packs.Observe(float64(len(accepted)))
	return accepted, p.lib.raft.Apply(pack, applyTimeout)
}

// refusal is the error of a proposal that the machine refused.
func refusal(err error) error {
	switch fault.Of(err) {
	case fault.Unavailable: // not yet, and not soon
		return forward.Permanent(err)
	case fault.Busy, fault.NotLeader:
		return err
	}
	return fault.At("raft.Propose", fault.Invalid, err)
}

// answersOf waits for one entry and returns the machine's answers. Only the errors that the library returns before it writes
// mean that nothing was written.
func answersOf(entry hraft.ApplyFuture) ([]result, error) {
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
	return nil, fault.Because(err, op, fault.Unsure,
		"leadership was lost while this was being written: it may have happened, propose the same again with the same request id")
}

// propose is Node.Propose on the leader itself.
func (p *proposer) propose(ctx context.Context, data []byte) ([]byte, error) {
	const op = "raft.propose"
	switch {
	case p.lib.hung.Load():
		return nil, errHung
	case !p.lib.leads():
		return nil, errNotLeader
	case ctx.Err() != nil:
		return nil, fault.Because(ctx.Err(), op, fault.Unavailable, "the time was up before it was written")
	}
	w := &proposal{data: data, answer: make(chan result, 1)}
	if err := p.queue.put(w); err != nil {
		return nil, err
	}
	if p.lib.hung.Load() { // since the check above: the refusal of what waits may have come before this
		p.queue.refuse(errHung)
	}
	select {
	case r := <-w.answer: // the queue is refused, and packs are answered, before the node ends
		return r.ans, r.err
	case <-ctx.Done():
	}
	if w.taken.CompareAndSwap(false, true) {
		return nil, fault.Because(ctx.Err(), op, fault.Unavailable, "the time was up before it was written")
	}
	select {
	case r := <-w.answer: // just in time
		return r.ans, r.err
	default:
		return nil, fault.Because(ctx.Err(), op, fault.Unsure,
			"the time was up while it was being written: it may happen, propose the same again with the same request id")
	}
}
