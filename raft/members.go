// SPDX-License-Identifier: Apache-2.0

package raft

import (
	"context"
	"encoding/json"
	"slices"

	"github.com/demarc-dev/demarc/fault"
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
	Last    uint64 `json:"last"`    // index of its last entry, by its latest status
	Applied uint64 `json:"applied"` // index of the last entry that it applied, likewise
	Lag     uint64 `json:"lag"`     // entries of the leader's log that it does not have
	Silent  int64  `json:"silent"`  // ms since the leader heard of it; -1: never since it leads
	Stable  int64  `json:"stable"`  // ms for which the leader has heard of it without a break
	About   []byte `json:"about"`   // what [Config.About] of that member returns; nil if it is not known
	// ClockOffset is the ms by which its clock is ahead of what the majority's say; nil if that is not known.
	ClockOffset *int64 `json:"clock_offset"`
}

// Heard reports whether the leader hears from the member.
func (m MemberState) Heard() bool { return m.Silent >= 0 && m.Stable > 0 }

// Cluster is the configuration in the log, with what the leader knows of each member.
type Cluster struct {
	Leader  string        `json:"leader"`
	Term    uint64        `json:"term"`
	Leads   int64         `json:"leads"` // ms for which it has led
	Members []MemberState `json:"members"`
}

// Change is one change of the members, or of the leader.
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
	Transfer = "transfer" // leadership to this voter; to any, if there is no id
)

// IDs lists the members in this node's log, by id. It is empty on a node that waits to be added.
func (n *Node) IDs() []string { return ids(n.lib.servers()) }

// Voters lists the voters of this node's log, by id.
func (n *Node) Voters() []string { return n.lib.voters() }

// About is what a member said about itself since this node leads; nil if it said nothing, or this node does not lead.
func (n *Node) About(id string) []byte { return n.status.about(id) }

// Members asks the leader, from any node, for the members and what it knows of them.
func (n *Node) Members(ctx context.Context) (Cluster, error) {
	const op = "raft.Members"
	var out Cluster
	err := n.life.retry(ctx, func() error {
		id, ok := n.lib.other()
		if !ok {
			var err error
			out, err = n.status.cluster()
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

// Change makes one change of the members, from any node, and returns when a majority has it. It is refused if it would
// leave fewer voters in reach than a majority, and while another change is under way. A change that removes or demotes the
// leader hands leadership over first. [fault.Unsure] means that it may have happened: look at [Node.Members].
func (n *Node) Change(ctx context.Context, c Change) error {
	const op = "raft.Change"
	request, err := json.Marshal(c)
	if err != nil {
		return fault.At(op, fault.Internal, err)
	}
	err = n.life.retry(ctx, func() error {
		if id, ok := n.lib.other(); ok {
			_, err := n.calls.Call(ctx, id, kindChange, request)
			return err
		}
		return n.members.change(ctx, c)
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
