// SPDX-License-Identifier: Apache-2.0

package raft

import (
	"slices"
	"sync"
	"sync/atomic"

	hraft "github.com/hashicorp/raft"
)

// consensus is hashicorp/raft, and what the other parts of a node ask of it.
type consensus struct {
	self      string
	raft      *hraft.Raft // set before any goroutine of the node starts
	fsm       *machine
	logs      hraft.LogStore // behind a cache
	hung      atomic.Bool    // the node is cut off while its disk hangs
	heartbeat heartbeats
}

// leads reports whether this node can take a proposal.
func (c *consensus) leads() bool { return c.raft.State() == hraft.Leader && !c.hung.Load() }

// leader is the leader as far as this node knows. A leader whose disk hangs does not call itself one.
func (c *consensus) leader() (string, bool) {
	_, id := c.raft.LeaderWithID()
	if string(id) == c.self && c.hung.Load() {
		return "", false
	}
	return string(id), id != ""
}

// other is the leader if it is another node.
func (c *consensus) other() (string, bool) {
	id, ok := c.leader()
	return id, ok && id != c.self
}

func (c *consensus) term() uint64 { return c.raft.CurrentTerm() }

// servers is the newest configuration in this node's log, committed or not.
func (c *consensus) servers() []hraft.Server {
	return c.raft.GetConfiguration().Configuration().Servers
}

func (c *consensus) voters() []string { return voters(c.servers()) }

// reachable counts the voters, and those of them whose heartbeats this leader hears.
func (c *consensus) reachable() (all, heard int) {
	return c.heartbeat.count(c.voters())
}

func voters(all []hraft.Server) []string {
	var out []string
	for _, s := range all {
		if s.Suffrage == hraft.Voter {
			out = append(out, string(s.ID))
		}
	}
	return out
}

func find(all []hraft.Server, id string) (hraft.Server, bool) {
	i := slices.IndexFunc(all, func(s hraft.Server) bool { return string(s.ID) == id })
	if i < 0 {
		return hraft.Server{}, false
	}
	return all[i], true
}

// observe notes which members a leader hears from, until ctx ends.
func (c *consensus) observe(life *lifetime) {
	ch := make(chan hraft.Observation, 64)
	c.raft.RegisterObserver(hraft.NewObserver(ch, false, func(o *hraft.Observation) bool {
		switch o.Data.(type) {
		case hraft.FailedHeartbeatObservation, hraft.ResumedHeartbeatObservation, hraft.RaftState:
			return true
		}
		return false
	}))
	life.tasks.Go(func() {
		for {
			select {
			case <-life.ctx.Done():
				return
			case o := <-ch:
				c.heartbeat.note(o.Data)
			}
		}
	})
}

// heartbeats are the members whose heartbeats fail.
type heartbeats struct {
	mu     sync.Mutex
	failed map[hraft.ServerID]bool
}

func (h *heartbeats) note(seen any) {
	h.mu.Lock()
	defer h.mu.Unlock()
	switch d := seen.(type) {
	case hraft.FailedHeartbeatObservation:
		if h.failed == nil {
			h.failed = map[hraft.ServerID]bool{}
		}
		h.failed[d.PeerID] = true
	case hraft.ResumedHeartbeatObservation:
		delete(h.failed, d.PeerID)
	case hraft.RaftState:
		clear(h.failed)
	}
}

func (h *heartbeats) count(ids []string) (all, heard int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, id := range ids {
		all++
		if !h.failed[hraft.ServerID(id)] {
			heard++
		}
	}
	return all, heard
}

// byID has the library call members by their id: their addresses are looked up when they are dialled.
type byID struct{}

// ServerAddr implements hraft.ServerAddressProvider.
func (byID) ServerAddr(id hraft.ServerID) (hraft.ServerAddress, error) {
	return hraft.ServerAddress(id), nil
}
