// SPDX-License-Identifier: Apache-2.0

package raft

import (
	"context"
	"errors"
	"slices"
	"sync"
	"time"

	hraft "github.com/hashicorp/raft"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/raft/forward"
)

// Read returns once the machine of this node has everything that was answered, by any node, before the call. It writes
// nothing, and retries until ctx ends.
func (n *Node) Read(ctx context.Context) error {
	const op = "raft.Read"
	var index uint64
	err := n.life.retry(ctx, func() (err error) {
		if id, ok := n.lib.other(); ok {
			index, err = n.calls.Number(ctx, id, kindReadIndex)
			return err
		}
		index, err = n.reads.index(ctx)
		return err
	})
	if err != nil {
		return fault.At(op, "", err)
	}
	for {
		advanced := n.lib.fsm.changed()
		if n.lib.fsm.index.Load() >= index {
			return nil
		}
		select {
		case <-advanced:
		case <-ctx.Done():
			return fault.Because(ctx.Err(), op, fault.Unavailable, "this node is behind and did not catch up in time")
		case <-n.life.ctx.Done():
			return fault.At(op, "", errClosing)
		case <-n.lib.fsm.failed:
			return fault.Because(n.lib.fsm.failure(), op, fault.Unavailable, "this node has stopped: ask another one")
		}
	}
}

// reader finds the read index of a leader.
type reader struct {
	lib     *consensus
	life    *lifetime
	calls   *forward.Client
	rounds  *rounds
	timeout time.Duration // of one round
}

// index is asked of the leader: the index that the machine of a reader must have reached.
func (r *reader) index(ctx context.Context) (uint64, error) {
	switch {
	case r.lib.hung.Load():
		return 0, errHung
	case !r.lib.leads():
		return 0, errNotLeader
	}
	next := r.rounds.join()
	select {
	case <-next.done:
		return next.index, next.err
	case <-ctx.Done():
		return 0, fault.Because(ctx.Err(), "raft.readIndex", fault.Unavailable, "the leader could not prove in time that it leads")
	case <-r.life.ctx.Done():
		return 0, errClosing
	}
}

// round is one question to the members, for all reads that came before it began. It is no singleflight: a read that comes
// while a round is under way must not share it.
type round struct {
	done  chan struct{}
	index uint64
	err   error
}

type rounds struct {
	mu   sync.Mutex
	next *round // nil: no read waits
	wake chan struct{}
}

func newRounds() *rounds { return &rounds{wake: make(chan struct{}, 1)} }

func (q *rounds) join() *round {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.next == nil {
		q.next = &round{done: make(chan struct{})}
		q.wake <- struct{}{} // has room: the token of the round before was taken first
	}
	return q.next
}

func (q *rounds) take() *round {
	q.mu.Lock()
	defer q.mu.Unlock()
	r := q.next
	q.next = nil
	return r
}

// run holds one round after another.
func (r *reader) run() {
	var settled uint64 // term in which this node has committed an entry as the leader
	for {
		select {
		case <-r.life.ctx.Done():
			return
		case <-r.rounds.wake:
		}
		next := r.rounds.take()
		next.index, next.err = r.round(&settled)
		close(next.done)
	}
}

func (r *reader) round(settled *uint64) (uint64, error) {
	const op = "raft.readIndex"
	term := r.lib.term()
	if *settled != term {
		// Until a leader has committed an entry of its own term it does not know what is committed.
		if err := r.lib.raft.Barrier(applyTimeout).Error(); err != nil {
			return 0, fault.Because(err, op, fault.Unavailable, "the leader has not caught up yet")
		}
		if r.lib.term() != term {
			return 0, errNotLeader
		}
		*settled = term
	}
	if !r.lib.leads() {
		return 0, errNotLeader
	}
	commit := r.lib.raft.CommitIndex()
	if err := r.confirm(term); err != nil {
		return 0, err
	}
	return r.lastProposals(commit)
}

// confirm asks the voters for their terms. It returns nil once a majority, this node included, is not beyond term: a vote
// for a later leader raises the voter's term first, so none was elected before the call.
func (r *reader) confirm(term uint64) error {
	const op = "raft.readIndex"
	ctx, cancel := context.WithTimeout(r.life.ctx, r.timeout)
	defer cancel()
	voting := r.lib.voters()
	terms := make(chan uint64, len(voting)) // 0: no answer
	asked := 0
	for _, id := range voting {
		if id == r.lib.self {
			continue
		}
		asked++
		r.life.work.Go(func() {
			t, err := r.calls.Number(ctx, id, forward.Term)
			if err != nil {
				t = 0
			}
			terms <- t
		})
	}
	with, need := 0, len(voting)/2+1
	if slices.Contains(voting, r.lib.self) && r.lib.term() == term {
		with++
	}
	for ; asked > 0 && with < need; asked-- {
		switch t := <-terms; {
		case t > term:
			return errNotLeader
		case t > 0:
			with++
		}
	}
	if with < need {
		return fault.New(op, fault.Unavailable, "the leader reaches %d of %d voters: a majority is needed", with, len(voting))
	}
	return nil
}

// lastProposals is the index of the last entry with proposals up to commit: no other entry changes a machine.
func (r *reader) lastProposals(commit uint64) (uint64, error) {
	for i := commit; ; i-- {
		if applied := r.lib.fsm.index.Load(); i <= applied {
			return applied, nil
		}
		var l hraft.Log
		switch err := r.lib.logs.GetLog(i, &l); {
		case errors.Is(err, hraft.ErrLogNotFound):
			return r.lib.fsm.index.Load(), nil // cut off behind a snapshot, which is taken of what was applied
		case err != nil:
			return 0, fault.Because(err, "raft.readIndex", fault.Unavailable, "the leader can't read its log")
		case l.Type == hraft.LogCommand:
			return i, nil
		}
	}
}
