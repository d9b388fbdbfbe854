// SPDX-License-Identifier: Apache-2.0

package raft

import (
	"context"
	"encoding/json"
	"errors"
	"slices"
	"time"

	hraft "github.com/hashicorp/raft"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/raft/forward"
)

// Role is what a member does: a voter elects and commits; a non-voter has the same log, forwards proposals and reads.
type Role string

// The closed set of roles.
const (
	Voter    Role = "voter"
	NonVoter Role = "non-voter"
)

// MemberState is one member, as the leader sees it at this moment.
type MemberState struct {
	Member         // its address is that of the log
	Role    Role   `json:"role"`
	Last    uint64 `json:"last"`    // index of its last entry, as it said last
	Applied uint64 `json:"applied"` // likewise
	Lag     uint64 `json:"lag"`     // entries of the leader's log that it does not have
	Silent  int64  `json:"silent"`  // ms since the leader heard of it; -1: never since it leads
	Stable  int64  `json:"stable"`  // ms for which the leader has heard of it without a gap
	// ClockOffset is the ms by which its clock is ahead of what the majority's say; nil if that is not known.
	ClockOffset *int64 `json:"clock_offset"`
	About       []byte `json:"about"` // what [Config.About] of that member gives; nil where it is not known
}

// Heard tells whether the leader hears from the member.
func (m MemberState) Heard() bool { return m.Silent >= 0 && m.Stable > 0 }

// Cluster is the configuration in the log, with what the leader knows of each member.
type Cluster struct {
	Leader  string        `json:"leader"`
	Term    uint64        `json:"term"`
	Leads   int64         `json:"leads"` // ms for which it has led
	Members []MemberState `json:"members"`
}

// Change is one change of the members, or of who leads.
type Change struct {
	Do   string `json:"do"` // one of the verbs below
	ID   string `json:"id"`
	Addr string `json:"addr,omitempty"` // of add and move
}

// The verbs of a change.
const (
	Add      = "add"      // as a non-voter
	Promote  = "promote"  // a non-voter that has caught up
	Demote   = "demote"   // to non-voter
	Remove   = "remove"   //
	Move     = "move"     // to another address
	Transfer = "transfer" // leadership to this voter; to any, where there is no id
)

const (
	catchUp    = 20 * time.Second // for a non-voter that is promoted
	changeWait = 5 * time.Second  // for the library to begin a change

	transferTries = 3
)

// servers is the newest configuration in this node's log, committed or not.
func (n *Node) servers() []hraft.Server {
	return n.raft.GetConfiguration().Configuration().Servers
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

// IDs lists the members in this node's log, by id. It is empty on a node that waits to be added.
func (n *Node) IDs() []string {
	var out []string
	for _, s := range n.servers() {
		out = append(out, string(s.ID))
	}
	slices.Sort(out)
	return out
}

// Members asks the leader, from any node, for the members and what it knows of them.
func (n *Node) Members(ctx context.Context) (Cluster, error) {
	const op = "raft.Members"
	var out Cluster
	err := n.retry(ctx, func() error {
		id, ok := n.Leader()
		if !ok || id == n.cfg.Self.ID {
			var err error
			out, err = n.cluster()
			return err
		}
		b, err := n.calls.Call(ctx, id, kindMembers, nil)
		if fault.Of(err) == fault.Unsure {
			return fault.At(op, fault.Unavailable, err) // to ask again is safe
		}
		if err == nil {
			err = fault.At(op, fault.Internal, json.Unmarshal(b, &out))
		}
		return err
	})
	return out, fault.At(op, "", err)
}

// cluster is Members on the leader itself.
func (n *Node) cluster() (Cluster, error) {
	if !n.leads() {
		return Cluster{}, errNotLeader
	}
	return n.watch.cluster(n), nil
}

// Change makes one change of the members, from any node, and returns when a majority has it. It is refused where it would
// leave fewer voters in reach than a majority, and while another change is under way. A change that removes or demotes the
// leader hands leadership over first. [fault.Unsure] means that it may have happened: look at [Node.Members].
func (n *Node) Change(ctx context.Context, c Change) error {
	const op = "raft.Change"
	ask, err := json.Marshal(c)
	if err != nil {
		return fault.At(op, fault.Internal, err)
	}
	err = n.retry(ctx, func() error {
		if id, ok := n.Leader(); ok && id != n.cfg.Self.ID {
			_, err := n.calls.Call(ctx, id, kindChange, ask)
			return err
		}
		return n.change(ctx, c)
	})
	return fault.At(op, "", err)
}

// Replace makes a non-voter that has caught up take the place of a voter: it is promoted, and then the old one removed.
func (n *Node) Replace(ctx context.Context, old, by string) error {
	const op = "raft.Replace"
	if old == by {
		return fault.New(op, fault.Invalid, "node %q can't take its own place", old)
	}
	all, err := n.Members(ctx)
	if err != nil {
		return err
	}
	for _, id := range []string{old, by} {
		if !slices.ContainsFunc(all.Members, func(m MemberState) bool { return m.ID == id }) {
			return noMember(op, id)
		}
	}
	if err := n.Change(ctx, Change{Do: Promote, ID: by}); err != nil {
		return err
	}
	return n.Change(ctx, Change{Do: Remove, ID: old})
}

func noMember(op, id string) error {
	return fault.New(op, fault.NotFound, "no node %q is a member: list them with demarc control-plane members", fault.Clip(id))
}

// change is Change on the leader itself.
func (n *Node) change(ctx context.Context, c Change) error {
	const op = "raft.change"
	switch {
	case n.hung.Load():
		return errHung
	case !n.leads():
		return errNotLeader
	case !n.changing.TryLock():
		return fault.New(op, fault.Busy, "another change of the members is under way: try again when it is done")
	}
	defer n.changing.Unlock()
	n.watch.began(n.raft.CurrentTerm())
	if c.Do == Transfer {
		return n.transfer(ctx, c.ID)
	}
	all := n.servers()
	was, is := find(all, c.ID)
	next, err := n.plan(all, was, is, c)
	if err != nil || next == nil {
		return err
	}
	if err := n.enough(ctx, voters(next), c); err != nil {
		return err
	}
	if (c.Do == Remove || c.Do == Demote) && c.ID == n.cfg.Self.ID {
		if err := n.transfer(ctx, ""); err != nil {
			return err
		}
		return errNotLeader // whoever leads now does it
	}
	if c.Do == Promote {
		if err := n.caughtUp(ctx, c.ID); err != nil {
			return err
		}
	}
	return n.commit(c, was)
}

// plan tells which members there are after a change; nil where there is nothing to do.
func (n *Node) plan(all []hraft.Server, was hraft.Server, is bool, c Change) ([]hraft.Server, error) {
	const op = "raft.change"
	if !is && c.Do != Add {
		return nil, noMember(op, c.ID)
	}
	next := slices.Clone(all)
	i := slices.IndexFunc(next, func(s hraft.Server) bool { return string(s.ID) == c.ID })
	switch c.Do {
	case Add, Move:
		if c.ID == "" || c.Addr == "" {
			return nil, fault.New(op, fault.Invalid, "a member has a name and an address")
		}
		for _, s := range all {
			if string(s.Address) == c.Addr && string(s.ID) != c.ID {
				return nil, fault.New(op, fault.Conflict, "node %q is at %s already", s.ID, fault.Clip(c.Addr))
			}
		}
		switch {
		case !is:
			return append(next, hraft.Server{Suffrage: hraft.Nonvoter, ID: hraft.ServerID(c.ID), Address: hraft.ServerAddress(c.Addr)}), nil
		case string(was.Address) == c.Addr:
			return nil, nil
		case c.Do == Add:
			return nil, fault.New(op, fault.Conflict, "node %q is a member already, at %s", c.ID, was.Address)
		}
		next[i].Address = hraft.ServerAddress(c.Addr)
		return next, nil
	case Promote:
		if was.Suffrage == hraft.Voter {
			return nil, nil
		}
		next[i].Suffrage = hraft.Voter
		return next, nil
	case Demote:
		if was.Suffrage != hraft.Voter {
			return nil, nil
		}
		next[i].Suffrage = hraft.Nonvoter
		return next, nil
	case Remove:
		return slices.Delete(next, i, i+1), nil
	}
	return nil, fault.New(op, fault.Invalid, "a change of the kind %q", fault.Clip(c.Do))
}

// enough refuses a change after which the voters that are heard from are no majority.
func (n *Node) enough(ctx context.Context, after []string, c Change) error {
	const op = "raft.change"
	if c.Do == Add || c.Do == Move {
		return nil
	}
	if len(after) == 0 {
		return fault.New(op, fault.Conflict, "node %q is the only voter: promote another one first", c.ID)
	}
	silent, err := n.silents(ctx, after)
	if err != nil {
		return err
	}
	if heard := len(after) - len(silent); heard < len(after)/2+1 {
		return fault.New(op, fault.Conflict, "after this %d of %d voters would be in reach, and a majority is needed (out of reach: %q): bring them back, or add and promote others first", heard, len(after), silent)
	}
	return nil
}

// silents names those of the members that the leader does not hear from. One that has just begun to lead waits until it
// has had the time to hear from them.
func (n *Node) silents(ctx context.Context, ids []string) ([]string, error) {
	for {
		since, moved := n.watch.begun()
		var out []string
		for _, id := range ids {
			if !n.watch.heard(n, id) {
				out = append(out, id)
			}
		}
		left := n.gap() + n.cfg.Timing.Heartbeat - time.Since(since)
		if len(out) == 0 || left <= 0 || ctx.Err() != nil {
			return out, nil
		}
		t := time.NewTimer(left)
		select {
		case <-moved:
		case <-t.C:
		case <-ctx.Done():
		case <-n.ctx.Done():
			t.Stop()
			return nil, errClosing
		}
		t.Stop()
	}
}

// caughtUp waits until a member has all that the leader had when it was called.
func (n *Node) caughtUp(ctx context.Context, id string) error {
	ctx, cancel := context.WithTimeout(ctx, catchUp)
	defer cancel()
	target := n.raft.LastIndex()
	for {
		last, moved := n.watch.last(id)
		if last >= target {
			return nil
		}
		select {
		case <-moved:
		case <-ctx.Done():
			return forward.Permanent(fault.Because(ctx.Err(), "raft.change", fault.Unavailable, "node %q is %d entries behind: promote it when it has caught up (is it running, and reached at its address?)", id, target-last))
		case <-n.ctx.Done():
			return errClosing
		}
		if !n.leads() {
			return errNotLeader
		}
	}
}

// commit gives a change to the library, and waits until a majority has it.
func (n *Node) commit(c Change, was hraft.Server) error {
	const op = "raft.change"
	id, addr, prev := hraft.ServerID(c.ID), hraft.ServerAddress(c.Addr), n.members.index()
	var f hraft.IndexFuture
	switch c.Do {
	case Add:
		f = n.raft.AddNonvoter(id, addr, prev, changeWait)
	case Move: // the library keeps the role of whom it knows
		f = n.raft.AddNonvoter(id, addr, prev, changeWait)
	case Promote:
		f = n.raft.AddVoter(id, was.Address, prev, changeWait)
	case Demote:
		f = n.raft.DemoteVoter(id, prev, changeWait)
	case Remove:
		f = n.raft.RemoveServer(id, prev, changeWait)
	}
	switch err := f.Error(); {
	case err == nil:
	case errors.Is(err, hraft.ErrNotLeader), errors.Is(err, hraft.ErrLeadershipTransferInProgress):
		return errNotLeader
	case errors.Is(err, hraft.ErrEnqueueTimeout):
		return fault.Because(err, op, fault.Busy, "another change of the members is under way: try again when it is done")
	case errors.Is(err, hraft.ErrLeadershipLost), errors.Is(err, hraft.ErrRaftShutdown), errors.Is(err, hraft.ErrAbortedByRestore):
		return fault.Because(err, op, fault.Unsure, "leadership was lost while the members were changed: look at them before you do it again")
	default:
		return fault.Because(err, op, fault.Conflict, "the members were changed by somebody else meanwhile: look at them and try again")
	}
	n.log.Info("the members changed", "do", c.Do, "node", c.ID, "index", f.Index())
	n.refresh()
	if c.Do == Remove {
		n.net.spawn(func() { n.tellGone(c.ID, string(was.Address), f.Index()) })
	}
	return nil
}

// transfer hands leadership to a voter, or to any.
func (n *Node) transfer(ctx context.Context, id string) error {
	const op = "raft.transfer"
	all := n.servers()
	try := func() hraft.Future { return n.raft.LeadershipTransfer() }
	switch s, is := find(all, id); {
	case id == "" && len(voters(all)) < 2:
		return fault.New(op, fault.Conflict, "node %q is the only voter: there is nobody to lead after it", n.cfg.Self.ID)
	case id == "":
	case !is:
		return noMember(op, id)
	case s.Suffrage != hraft.Voter:
		return fault.New(op, fault.Conflict, "node %q is a non-voter, which can't lead: promote it first", id)
	case id == n.cfg.Self.ID:
		return nil
	default:
		silent, err := n.silents(ctx, []string{id})
		if err != nil {
			return err
		}
		if len(silent) > 0 {
			return fault.New(op, fault.Conflict, "node %q is not in reach of the leader: it can't lead", id)
		}
		try = func() hraft.Future { return n.raft.LeadershipTransferToServer(s.ID, s.Address) }
	}
	var err error
	for range transferTries { // one ends with an election timeout
		if err = try().Error(); err == nil || !n.leads() {
			return nil
		}
	}
	return forward.Permanent(fault.Because(err, op, fault.Unavailable, "leadership was not handed over: %v", err))
}

// refusal is what a proposer is told that the machine kept out.
func refusal(err error) error {
	switch fault.Of(err) {
	case fault.Unavailable: // not yet, and not soon
		return forward.Permanent(err)
	case fault.Busy, fault.NotLeader:
		return err
	}
	return fault.At("raft.Propose", fault.Invalid, err)
}

// Voters lists those who vote by this node's log, by id.
func (n *Node) Voters() []string { return voters(n.servers()) }

// About gives what a member said about itself since this node leads; nil where it said nothing, or this node does not lead.
func (n *Node) About(id string) []byte {
	if id == n.cfg.Self.ID && n.cfg.About != nil {
		return n.cfg.About()
	}
	if !n.leads() {
		return nil
	}
	n.watch.mu.Lock()
	defer n.watch.mu.Unlock()
	if s := n.watch.seen[id]; s != nil && n.watch.term == n.raft.CurrentTerm() {
		return s.About
	}
	return nil
}
