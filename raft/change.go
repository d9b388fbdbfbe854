// SPDX-License-Identifier: Apache-2.0

package raft

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"sync"
	"time"

	hraft "github.com/hashicorp/raft"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/raft/forward"
	"github.com/demarc-dev/demarc/raft/transport"
)

const (
	catchUpTimeout = 20 * time.Second // for a non-voter that is promoted
	changeTimeout  = 5 * time.Second  // for the library to begin a change
	transferTries  = 3
)

// membership makes changes of the members, and does what follows from them on this node.
type membership struct {
	cfg      *Config
	lib      *consensus
	life     *lifetime
	log      *slog.Logger
	addrs    *addresses
	peers    *presence
	net      *transport.Network
	calls    *forward.Client
	snapshot func() (uint64, error) // the index of the configuration in the newest snapshot

	changing sync.Mutex // held by a change
}

// start takes the configuration that is on disk, of the index at. It warns if the list of the config differs from the log:
// no member is added or removed by editing it.
func (m *membership) start(at uint64) {
	m.addrs.committed(at)
	all := m.lib.servers()
	for _, f := range m.cfg.First {
		if _, is := find(all, f.ID); len(all) > 0 && !is {
			m.log.Warn("the list names a node that is no member: the log goes before the list", "node", f.ID, "members", ids(all))
		}
	}
	m.refresh()
}

func ids(all []hraft.Server) []string {
	var out []string
	for _, s := range all {
		out = append(out, string(s.ID))
	}
	slices.Sort(out)
	return out
}

// change is Node.Change on the leader itself.
func (m *membership) change(ctx context.Context, c Change) error {
	const op = "raft.change"
	switch {
	case m.lib.hung.Load():
		return errHung
	case !m.lib.leads():
		return errNotLeader
	case !m.changing.TryLock():
		return fault.New(op, fault.Busy, "another change of the members is under way: try again when it is done")
	}
	defer m.changing.Unlock()
	m.peers.lead(m.lib.term())
	if c.Do == Transfer {
		return m.transfer(ctx, c.ID)
	}
	all := m.lib.servers()
	was, _ := find(all, c.ID)
	next, err := plan(all, c)
	if err != nil || next == nil {
		return err
	}
	if err := m.enough(ctx, voters(next), c); err != nil {
		return err
	}
	if (c.Do == Remove || c.Do == Demote) && c.ID == m.lib.self {
		if err := m.transfer(ctx, ""); err != nil {
			return err
		}
		return errNotLeader // the next leader does it
	}
	if c.Do == Promote {
		if err := m.caughtUp(ctx, c.ID); err != nil {
			return err
		}
	}
	return m.commit(c, was)
}

// plan returns the members that there are after a change; nil if there is nothing to do.
func plan(all []hraft.Server, c Change) ([]hraft.Server, error) {
	const op = "raft.change"
	next := slices.Clone(all)
	i := slices.IndexFunc(next, func(s hraft.Server) bool { return string(s.ID) == c.ID })
	if i < 0 && c.Do != Add {
		return nil, noMember(op, c.ID)
	}
	switch c.Do {
	case Add, Move:
		return planAddress(next, i, c)
	case Promote:
		if next[i].Suffrage == hraft.Voter {
			return nil, nil
		}
		next[i].Suffrage = hraft.Voter
		return next, nil
	case Demote:
		if next[i].Suffrage != hraft.Voter {
			return nil, nil
		}
		next[i].Suffrage = hraft.Nonvoter
		return next, nil
	case Remove:
		return slices.Delete(next, i, i+1), nil
	}
	return nil, fault.New(op, fault.Invalid, "a change of the kind %q", fault.Clip(c.Do))
}

// planAddress is plan for Add and Move of the member at i, which is below 0 if it is none yet.
func planAddress(next []hraft.Server, i int, c Change) ([]hraft.Server, error) {
	const op = "raft.change"
	if c.ID == "" || c.Addr == "" {
		return nil, fault.New(op, fault.Invalid, "a member has a name and an address")
	}
	for _, s := range next {
		if string(s.Address) == c.Addr && string(s.ID) != c.ID {
			return nil, fault.New(op, fault.Conflict, "node %q is at %s already", s.ID, fault.Clip(c.Addr))
		}
	}
	switch {
	case i < 0:
		return append(next, hraft.Server{Suffrage: hraft.Nonvoter, ID: hraft.ServerID(c.ID), Address: hraft.ServerAddress(c.Addr)}), nil
	case string(next[i].Address) == c.Addr:
		return nil, nil
	case c.Do == Add:
		return nil, fault.New(op, fault.Conflict, "node %q is a member already, at %s", c.ID, next[i].Address)
	}
	next[i].Address = hraft.ServerAddress(c.Addr)
	return next, nil
}

// enough refuses a change after which the voters that are heard from are no majority.
func (m *membership) enough(ctx context.Context, after []string, c Change) error {
	const op = "raft.change"
	if c.Do == Add || c.Do == Move {
		return nil
	}
	if len(after) == 0 {
		return fault.New(op, fault.Conflict, "node %q is the only voter: promote another one first", c.ID)
	}
	silent, err := m.silent(ctx, after)
	if err != nil {
		return err
	}
	if heard := len(after) - len(silent); heard < len(after)/2+1 {
		return fault.New(op, fault.Conflict,
			"after this %d of %d voters would be in reach, and a majority is needed (out of reach: %q): "+
				"bring them back, or add and promote others first", heard, len(after), silent)
	}
	return nil
}

// silent names those of the members that the leader does not hear from. One that has just begun to lead waits until it
// has had the time to hear from them.
func (m *membership) silent(ctx context.Context, ids []string) ([]string, error) {
	for {
		since, news := m.peers.leading()
		var out []string
		for _, id := range ids {
			if !m.peers.heard(id) {
				out = append(out, id)
			}
		}
		left := m.cfg.Timing.silence() + m.cfg.Timing.Heartbeat - time.Since(since)
		if len(out) == 0 || left <= 0 || ctx.Err() != nil {
			return out, nil
		}
		t := time.NewTimer(left)
		select {
		case <-news:
		case <-t.C:
		case <-ctx.Done():
		case <-m.life.ctx.Done():
			t.Stop()
			return nil, errClosing
		}
		t.Stop()
	}
}

// caughtUp waits until a member has all that the leader had when it was called.
func (m *membership) caughtUp(ctx context.Context, id string) error {
	ctx, cancel := context.WithTimeout(ctx, catchUpTimeout)
	defer cancel()
	target := m.lib.raft.LastIndex()
	for {
		last, news := m.peers.last(id)
		if last >= target {
			return nil
		}
		select {
		case <-news:
		case <-ctx.Done():
			return forward.Permanent(fault.Because(ctx.Err(), "raft.change", fault.Unavailable,
				"node %q is %d entries behind: promote it when it has caught up (is it running, and reached at its address?)", id, target-last))
		case <-m.life.ctx.Done():
			return errClosing
		}
		if !m.lib.leads() {
			return errNotLeader
		}
	}
}

// commit hands a change to the library, and waits until a majority has it.
func (m *membership) commit(c Change, was hraft.Server) error {
	const op = "raft.change"
	id, addr, prev := hraft.ServerID(c.ID), hraft.ServerAddress(c.Addr), m.addrs.index()
	var f hraft.IndexFuture
	switch c.Do {
	case Add, Move: // the library leaves a member its role
		f = m.lib.raft.AddNonvoter(id, addr, prev, changeTimeout)
	case Promote:
		f = m.lib.raft.AddVoter(id, was.Address, prev, changeTimeout)
	case Demote:
		f = m.lib.raft.DemoteVoter(id, prev, changeTimeout)
	case Remove:
		f = m.lib.raft.RemoveServer(id, prev, changeTimeout)
	}
	switch err := f.Error(); {
	case err == nil:
	case errors.Is(err, hraft.ErrNotLeader), errors.Is(err, hraft.ErrLeadershipTransferInProgress):
		return errNotLeader
	case errors.Is(err, hraft.ErrEnqueueTimeout):
		return fault.Because(err, op, fault.Busy, "another change of the members is under way: try again when it is done")
	case errors.Is(err, hraft.ErrLeadershipLost), errors.Is(err, hraft.ErrRaftShutdown), errors.Is(err, hraft.ErrAbortedByRestore):
		return fault.Because(err, op, fault.Unsure,
			"leadership was lost while the members were changed: look at them before you do it again")
	default:
		return fault.Because(err, op, fault.Conflict, "the members were changed by somebody else meanwhile: look at them and try again")
	}
	m.log.Info("the members changed", "do", c.Do, "node", c.ID, "index", f.Index())
	m.refresh()
	if c.Do == Remove {
		m.net.Spawn(func() { m.notifyRemoved(c.ID, string(was.Address), f.Index()) })
	}
	return nil
}

// transfer hands leadership to a voter, or to any.
func (m *membership) transfer(ctx context.Context, id string) error {
	const op = "raft.transfer"
	all := m.lib.servers()
	try := func() hraft.Future { return m.lib.raft.LeadershipTransfer() }
	switch s, is := find(all, id); {
	case id == "" && len(voters(all)) < 2:
		return fault.New(op, fault.Conflict, "node %q is the only voter: there is no other to lead after it", m.lib.self)
	case id == "":
	case !is:
		return noMember(op, id)
	case s.Suffrage != hraft.Voter:
		return fault.New(op, fault.Conflict, "node %q is a non-voter, which can't lead: promote it first", id)
	case id == m.lib.self:
		return nil
	default:
		silent, err := m.silent(ctx, []string{id})
		if err != nil {
			return err
		}
		if len(silent) > 0 {
			return fault.New(op, fault.Conflict, "node %q is not in reach of the leader: it can't lead", id)
		}
		try = func() hraft.Future { return m.lib.raft.LeadershipTransferToServer(s.ID, s.Address) }
	}
	var err error
	for range transferTries { // one ends with an election timeout
		if err = try().Error(); err == nil || !m.lib.leads() {
			return nil
		}
	}
	return forward.Permanent(fault.Because(err, op, fault.Unavailable, "leadership was not handed over: %v", err))
}

// refresh follows the log: a node that is no member any more is cut off at once.
func (m *membership) refresh() {
	all := m.lib.servers()
	if len(all) == 0 {
		return
	}
	if m.addrs.index() == 0 { // they came with a snapshot
		at, err := m.snapshot()
		if err != nil {
			m.log.Warn("the members of the snapshot can't be read", "err", err)
		}
		m.addrs.committed(at)
	}
	for _, id := range m.addrs.follow(all) {
		if id != m.lib.self {
			m.log.Warn("a node is no member any more: its connections end", "node", id)
			m.net.EvictPeer(id)
			m.calls.Forget(id)
		}
	}
}

// notifyRemoved sends a node that it was removed; if it is not reached it learns it from the first peer that it calls.
func (m *membership) notifyRemoved(id, addr string, index uint64) {
	ctx, cancel := context.WithTimeout(m.life.ctx, m.cfg.Timing.callTimeout())
	defer cancel()
	c, err := m.net.DialForwardAt(ctx, id, addr)
	if err != nil {
		m.log.Info("a removed node was not notified: it is not reached", "node", id, "err", err)
		return
	}
	defer c.Abort()
	if err = forward.CallRemoved(c, index); err != nil {
		m.log.Info("a removed node did not confirm that it was notified", "node", id, "err", err)
		return
	}
	m.log.Info("a removed node was notified", "node", id)
}

// removedBy takes the word of a peer that this node is no member by the configuration of an index. An index that is not newer
// than the one that this node knows is ignored, and a node that knows none yet waits to be added.
func (m *membership) removedBy(peer string, index uint64) {
	at, all := m.addrs.index(), m.lib.servers()
	if _, is := find(all, m.lib.self); at == 0 || len(all) == 0 || is && index <= at {
		return
	}
	m.lib.fsm.fail(fault.Because(ErrRemoved, "raft.removed", fault.Denied,
		"node %q says that this node, %q, was removed from the cluster: it stops for good. Disable its unit (systemctl disable) "+
			"and wipe its directory; the machine can be added again only under another name", peer, m.lib.self))
}
