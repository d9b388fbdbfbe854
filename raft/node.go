// SPDX-License-Identifier: Apache-2.0

package raft

import (
	"context"
	"errors"
	"sync"
	"time"

	hraft "github.com/hashicorp/raft"

	"github.com/demarc-dev/demarc/fault"
)

// Leader names the leader, as far as this node knows. A leader whose disk hangs does not call itself one.
func (n *Node) Leader() (string, bool) {
	_, id := n.raft.LeaderWithID()
	if string(id) == n.cfg.Self.ID && n.hung.Load() {
		return "", false
	}
	return string(id), id != ""
}

// State is for people and for metrics.
type State struct {
	Role      string // leader, follower, candidate, shutdown
	Term      uint64
	Applied   uint64 // index of the last entry that the machine has
	Last      uint64 // index of the last entry in the log
	Leader    string
	Voters    int // in the configuration that this node knows
	Reachable int // voters that this node, as the leader, hears from, itself included; 0 where it does not lead
}

// State tells what this node is at this moment.
func (n *Node) State() State {
	id, _ := n.Leader()
	s := State{Role: roleOf(n.raft.State()), Term: n.raft.CurrentTerm(), Applied: n.fsm.index.Load(), Last: n.raft.LastIndex(), Leader: id}
	s.Voters, _ = n.voting()
	if n.raft.State() == hraft.Leader {
		_, s.Reachable = n.voting()
	}
	return s
}

func roleOf(s hraft.RaftState) string {
	switch s {
	case hraft.Leader:
		return "leader"
	case hraft.Candidate:
		return "candidate"
	case hraft.Shutdown:
		return "shutdown"
	}
	return "follower"
}

// observe notes which members a leader hears from.
func (n *Node) observe() {
	ch := make(chan hraft.Observation, 64)
	n.raft.RegisterObserver(hraft.NewObserver(ch, false, func(o *hraft.Observation) bool {
		switch o.Data.(type) {
		case hraft.FailedHeartbeatObservation, hraft.ResumedHeartbeatObservation, hraft.RaftState:
			return true
		}
		return false
	}))
	n.wg.Go(func() {
		for {
			select {
			case <-n.ctx.Done():
				return
			case o := <-ch:
				n.silent.note(o.Data)
			}
		}
	})
}

// silent are the members whose heartbeats fail.
type silent struct {
	mu     sync.Mutex
	failed map[hraft.ServerID]bool
}

func (s *silent) note(seen any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch d := seen.(type) {
	case hraft.FailedHeartbeatObservation:
		s.failed[d.PeerID] = true
	case hraft.ResumedHeartbeatObservation:
		delete(s.failed, d.PeerID)
	case hraft.RaftState:
		clear(s.failed)
	}
}

// voting counts the voters and those of them that are heard from.
func (n *Node) voting() (all, reachable int) {
	n.silent.mu.Lock()
	defer n.silent.mu.Unlock()
	for _, id := range voters(n.servers()) {
		all++
		if !n.silent.failed[hraft.ServerID(id)] {
			reachable++
		}
	}
	return all, reachable
}

// SnapshotAt returns once a snapshot that has all entries up to index is on disk, and takes one if there is none yet. The node
// must have applied them. It is [fault.Unavailable] if none can be taken now.
func (n *Node) SnapshotAt(index uint64) error {
	const op = "raft.SnapshotAt"
	for tried := false; ; tried = true {
		list, err := n.disk.Snapshots.List()
		switch {
		case err != nil:
			return fault.Because(err, op, fault.Unavailable, "the snapshots can't be listed")
		case len(list) > 0 && list[0].Index >= index:
			return nil
		case tried:
			return fault.New(op, fault.Unavailable, "this node has not applied entry %d yet", index)
		}
		if err := n.raft.Snapshot().Error(); err != nil && !errors.Is(err, hraft.ErrNothingNewToSnapshot) {
			return fault.Because(err, op, fault.Unavailable, "a snapshot can't be taken")
		}
	}
}

// Fatal is closed when the machine could not apply an entry, or this node was removed: it has stopped, and [Node.Failure] says why.
func (n *Node) Fatal() <-chan struct{} { return n.fsm.dead }

// Failure tells why the node stopped by itself, nil while it has not.
func (n *Node) Failure() error { return n.fsm.failure() }

// run waits for the end of the node and brings it about.
func (n *Node) run() {
	select {
	case <-n.closing:
	case <-n.fsm.dead:
		n.log.Error("this node stops", "err", n.fsm.failure())
		n.queue.close()
		n.handOver(context.Background())
		n.shut()
	}
	n.end()
}

// end is the hard half of Close. The library answers all that it was given only while it runs.
func (n *Node) end() {
	n.queue.close()
	n.stop()
	n.work.Wait()
	n.net.drain()
	down := n.raft.Shutdown()
	n.net.close(true) // the library waits for calls to peers, which end with their connections
	err := errors.Join(down.Error(), n.trans.Close())
	n.wg.Wait()
	n.net.wg.Wait()
	n.calls.Close()
	n.store.Close()
	n.meters.unregister(n.cfg.Registerer)
	if err = errors.Join(err, n.disk.Close()); err != nil {
		n.closed = fault.At("raft.Close", fault.Internal, err)
	}
	close(n.gone)
}

// shut makes the node take nothing new, and end.
func (n *Node) shut() { n.once.Do(func() { close(n.closing) }) }

// Close lets what is being written end, hands leadership over where it can, stops the node, and leaves no goroutine
// behind. Ctx bounds the polite half; the rest is quick unless the disk or the machine hangs, for which Close waits 5 s
// more at most. It may be called again, and waits for the same end.
func (n *Node) Close(ctx context.Context) error {
	n.queue.close()
	n.handOver(ctx)
	n.shut()
	select {
	case <-n.gone:
		return n.closed
	case <-ctx.Done():
	}
	t := time.NewTimer(closeWait)
	defer t.Stop()
	select {
	case <-n.gone:
		return n.closed
	case <-t.C:
		return fault.New("raft.Close", fault.Unavailable, "the disk or the machine does not answer: the node ends when it does, or with the process")
	}
}

// handOver lets proposals end and makes another member lead, as far as ctx allows.
func (n *Node) handOver(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, 3*n.cfg.Timing.Election)
	defer cancel()
	if !n.leads() || n.queue.idle(ctx) != nil || len(voters(n.servers())) < 2 {
		return
	}
	changed := n.raft.LeaderCh()
	n.raft.LeadershipTransfer()
	for n.leads() {
		select {
		case <-changed:
		case <-n.gone:
			return
		case <-ctx.Done():
			n.log.Warn("leadership was not handed over in time: the others elect")
			return
		}
	}
	// The others learn of it within a heartbeat. Until then they still ask here: they are told to ask again, and not left
	// with a line that breaks under their question.
	t := time.NewTimer(n.cfg.Timing.Heartbeat)
	defer t.Stop()
	select {
	case <-t.C:
	case <-n.gone:
	case <-ctx.Done():
	}
}

// leads tells whether this node can take a proposal.
func (n *Node) leads() bool { return n.raft.State() == hraft.Leader && !n.hung.Load() }

// watchDisk cuts the node off while a write to its disk hangs.
func (n *Node) watchDisk() {
	tick := time.NewTicker(max(n.cfg.Timing.DiskHang/4, time.Millisecond))
	defer tick.Stop()
	for {
		select {
		case <-n.ctx.Done():
			return
		case <-tick.C:
		}
		since := n.store.BusySince()
		hangs := !since.IsZero() && time.Since(since) > n.cfg.Timing.DiskHang
		if hangs == n.hung.Load() {
			continue
		}
		n.hung.Store(hangs)
		n.net.cut(hangs)
		if hangs {
			n.log.Error("a write to the disk hangs: this node is cut off from its peers until it returns", "since", since)
			n.queue.refuse(errHung)
		} else {
			n.log.Warn("the disk writes again: this node is back")
		}
	}
}

// byID has the library call members by their id: where they are is found when they are dialled.
type byID struct{}

// ServerAddr implements hraft.ServerAddressProvider.
func (byID) ServerAddr(id hraft.ServerID) (hraft.ServerAddress, error) {
	return hraft.ServerAddress(id), nil
}
