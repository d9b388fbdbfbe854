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
// nothing, and tries again until ctx ends.
func (n *Node) Read(ctx context.Context) error {
	const op = "raft.Read"
	var index uint64
	err := n.retry(ctx, func() error {
		var err error
		if id, ok := n.Leader(); ok && id != n.cfg.Self.ID {
			index, err = n.calls.Number(ctx, id, kindReadIndex)
			return err
		}
		index, err = n.readIndex(ctx)
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
			return fault.Because(n.fsm.failure(), op, fault.Unavailable, "this node has stopped: ask another one")
		}
	}
}

// readIndex is asked of the leader: the index that the machine of a reader must have reached.
func (n *Node) readIndex(ctx context.Context) (uint64, error) {
	switch {
	case n.hung.Load():
		return 0, errHung
	case !n.leads():
		return 0, errNotLeader
	}
	r := n.rounds.join()
	select {
	case <-r.done:
		return r.index, r.err
	case <-ctx.Done():
		return 0, fault.Because(ctx.Err(), "raft.readIndex", fault.Unavailable, "the leader could not prove in time that it leads")
	case <-n.ctx.Done():
		return 0, errClosing
	}
}

// round is one question to the members, for all reads that came before it began.
type round struct {
	done  chan struct{}
	index uint64
	err   error
}

type rounds struct {
	mu   sync.Mutex
	next *round // nil: nobody waits
	wake chan struct{}
}

func newRounds() *rounds { return &rounds{wake: make(chan struct{}, 1)} }

func (q *rounds) join() *round {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.next == nil {
		q.next = &round{done: make(chan struct{})}
		q.wake <- struct{}{} // has room: who took the round before took its wake first
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

// readRounds holds one round after another.
func (n *Node) readRounds() {
	var settled uint64 // term in which this node has committed an entry as the leader
	for {
		select {
		case <-n.ctx.Done():
			return
		case <-n.rounds.wake:
		}
		r := n.rounds.take()
		r.index, r.err = n.readRound(&settled)
		close(r.done)
	}
}

func (n *Node) readRound(settled *uint64) (uint64, error) {
	const op = "raft.readIndex"
	term := n.raft.CurrentTerm()
	if *settled != term {
		// Until a leader has committed an entry of its own term it does not know what is committed.
		if err := n.raft.Barrier(applyWait).Error(); err != nil {
			return 0, fault.Because(err, op, fault.Unavailable, "the leader has not caught up yet")
		}
		if n.raft.CurrentTerm() != term {
			return 0, errNotLeader
		}
		*settled = term
	}
	if !n.leads() {
		return 0, errNotLeader
	}
	commit := n.raft.CommitIndex()
	if err := n.stillTerm(term); err != nil {
		return 0, err
	}
	return n.lastProposals(commit)
}

// stillTerm asks the voters for their terms. It gives nil once a majority, this node included, is not beyond term: a
// vote for a later leader raises the voter's term first, so none was elected before the call.
func (n *Node) stillTerm(term uint64) error {
	const op = "raft.readIndex"
	ctx, cancel := context.WithTimeout(n.ctx, max(n.cfg.Timing.Election, 100*time.Millisecond))
	defer cancel()
	voting := voters(n.servers())
	terms := make(chan uint64, len(voting)) // 0: no answer
	asked := 0
	for _, id := range voting {
		if id == n.cfg.Self.ID {
			continue
		}
		asked++
		n.work.Go(func() {
			t, err := n.calls.Number(ctx, id, forward.Term)
			if err != nil {
				t = 0
			}
			terms <- t
		})
	}
	with, need := 0, len(voting)/2+1
	if slices.Contains(voting, n.cfg.Self.ID) && n.raft.CurrentTerm() == term {
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

// lastProposals gives the index of the last entry with proposals up to commit: no other entry moves a machine.
func (n *Node) lastProposals(commit uint64) (uint64, error) {
	for i := commit; ; i-- {
		if applied := n.fsm.index.Load(); i <= applied {
			return applied, nil
		}
		var l hraft.Log
		switch err := n.logs.GetLog(i, &l); {
		case errors.Is(err, hraft.ErrLogNotFound):
			return n.fsm.index.Load(), nil // cut off behind a snapshot, which is taken of what was applied
		case err != nil:
			return 0, fault.Because(err, "raft.readIndex", fault.Unavailable, "the leader can't read its log")
		case l.Type == hraft.LogCommand:
			return i, nil
		}
	}
}
