// SPDX-License-Identifier: Apache-2.0

package book

import (
	"slices"
	"time"

	"github.com/demarc-dev/demarc/api/channel"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/ledger"
)

// ReadyToVote returns nil if a node acknowledged that it has the newest CAs and their keys on its disk, and the key-encryption key that
// opens them, else fault.Unavailable.
func (s State) ReadyToVote(name string) error {
	const op = "controlplane.Promote"
	if has, _ := s.nodes.Get(name); has < s.Bundle() {
		return fault.New(op, fault.Unavailable, "node %q does not have the newest CAs on its disk yet: start it, and try again", fault.Clip(name))
	}
	if s.KEK != "" && !slices.Contains(s.Holds(name), s.KEK) {
		return fault.New(op, fault.Unavailable,
			"node %q did not say yet that it holds the key that seals the vendor's keys: start it with that kek, and try again", fault.Clip(name))
	}
	return nil
}

// Peer is what the book knows of a node of the control plane: its addresses, its build, and whether it was removed. Membership and votes
// are in the configuration of the raft log, and nowhere else.
type Peer struct {
	Name    string    `json:"name"`
	Raft    string    `json:"raft,omitempty"`
	API     string    `json:"api,omitempty"`
	Voter   bool      `json:"voter,omitempty"`   // wanted as a voter
	Build   string    `json:"build,omitempty"`   // as the node reports it
	Knows   []string  `json:"knows,omitempty"`   // kinds of changes that its build knows, sorted; replaced whole
	Removed bool      `json:"removed,omitempty"` // permanently: its name is never used again
	Reason  string    `json:"reason,omitempty"`
	Since   time.Time `json:"since"`
}

// Peers lists the nodes that the book knows of, by name, removed ones included.
func (s State) Peers() []Peer { return values(s.peers) }

// Peer returns a node by name.
func (s State) Peer(name string) (Peer, bool) { return s.peers.Get(name) }

// Autopilot is what the leader may do with members without an operator. The zero value does nothing.
type Autopilot struct {
	RemoveDead         bool          `json:"remove_dead,omitempty"`
	DeadAfter          time.Duration `json:"dead_after,omitempty"`     // of silence; zero: 24 h
	Floor              int           `json:"floor,omitempty"`          // fewest voters that remain; zero: 3
	PromoteStable      bool          `json:"promote_stable,omitempty"` // non-voters that are wanted as voters
	Stabilization      time.Duration `json:"stabilization,omitempty"`  // healthy without interruption before it is promoted; zero: 10 s
	WithoutReplacement bool          `json:"without_replacement,omitempty"`
}

// Pilot is the policy with its defaults.
func (s State) Pilot() Autopilot {
	p := s.pilot
	if p.DeadAfter == 0 {
		p.DeadAfter = 24 * time.Hour
	}
	if p.Floor == 0 {
		p.Floor = 3
	}
	if p.Stabilization == 0 {
		p.Stabilization = 10 * time.Second
	}
	return p
}

// Bounds of what a node reports about itself.
const (
	MaxPeers = 64   // nodes; for the first kinds of changes, removed ones included
	maxNames = 1024 // of nodes, removed ones included: a removed name is stored permanently, in about 300 bytes
	maxKinds = 1024
	MaxText  = 512 // bytes of an address, a build, a kind
)

// AddNode adds a node. Its name is stable: an address may change, a removed name is never used again.
type AddNode struct {
	Name  string `json:"name"`
	Raft  string `json:"raft"`
	API   string `json:"api"`
	Voter bool   `json:"voter"`
}

func (AddNode) Kind() string { return "node.add/1" }

// Apply refuses the name of a removed node.
func (c AddNode) Apply(s *State, m ledger.Meta) (Nothing, error) { return c.apply(s, m, s.firstRoom) }

func (c AddNode) apply(s *State, m ledger.Meta, room func(op string) error) (Nothing, error) {
	const op = "node.add"
	if err := fleet.CheckName("node", c.Name); err != nil {
		return Nothing{}, err
	}
	if c.Raft == "" || c.API == "" || len(c.Raft) > MaxText || len(c.API) > MaxText {
		return Nothing{}, fault.New(op, fault.Invalid, "node %q needs an address for its peers and one for operators and appliances", c.Name)
	}
	was, is := s.peers.Get(c.Name)
	switch {
	case was.Removed:
		return Nothing{}, removedNode(op, c.Name)
	case !is:
		if err := room(op); err != nil {
			return Nothing{}, err
		}
	}
	was.Name, was.Raft, was.API, was.Voter = c.Name, c.Raft, c.API, c.Voter
	if !is {
		was.Since = m.At
	}
	s.peers = s.peers.Set(c.Name, was)
	return Nothing{}, nil
}

func removedNode(op, name string) error {
	return fault.New(op, fault.Denied,
		"node %q was removed from this control plane: a removed name is never used again, add the machine under another one", fault.Clip(name))
}

// NodeIs is what a node reports about itself.
type NodeIs struct {
	Name  string   `json:"name"`
	Raft  string   `json:"raft"`
	API   string   `json:"api"`
	Voter bool     `json:"voter"`
	Build string   `json:"build"`
	Knows []string `json:"knows"`
}

func (NodeIs) Kind() string { return "node.is/1" }

// Apply accepts it only from the node itself, unless it was removed.
func (c NodeIs) Apply(s *State, m ledger.Meta) (Nothing, error) {
	const op = "node.is"
	if m.By != fleet.PrincipalOf(s.TrustDomain, fleet.Node, c.Name) {
		return Nothing{}, fault.New(op, fault.Denied, "%s speaks for node %q", fault.Clip(string(m.By)), fault.Clip(c.Name))
	}
	was, is := s.peers.Get(c.Name)
	switch {
	case was.Removed:
		return Nothing{}, removedNode(op, c.Name)
	case !is && s.peers.Len() >= MaxPeers:
		return Nothing{}, fault.New(op, fault.Conflict, "the book knows %d nodes already", s.peers.Len())
	case len(c.Raft) > MaxText || len(c.API) > MaxText || len(c.Build) > MaxText || len(c.Knows) > maxKinds ||
		slices.ContainsFunc(c.Knows, func(k string) bool { return len(k) > MaxText }):
		return Nothing{}, fault.New(op, fault.Invalid, "node %q says too much about itself", c.Name)
	}
	if !is {
		was.Since = m.At
	}
	was.Name, was.Raft, was.API, was.Voter, was.Build, was.Knows = c.Name, c.Raft, c.API, c.Voter, c.Build, c.Knows
	s.peers = s.peers.Set(c.Name, was)
	return Nothing{}, nil
}

// RemoveNode invalidates every certificate of a node, permanently.
type RemoveNode struct {
	Name   string `json:"name"`
	Reason string `json:"reason"`
}

func (RemoveNode) Kind() string { return "node.remove/1" }

// Apply stores the name as that of a removed node.
func (c RemoveNode) Apply(s *State, m ledger.Meta) (Nothing, error) {
	return c.apply(s, m, s.firstRoom)
}

func (c RemoveNode) apply(s *State, m ledger.Meta, room func(op string) error) (Nothing, error) {
	if err := fleet.CheckName("node", c.Name); err != nil {
		return Nothing{}, err
	}
	was, is := s.peers.Get(c.Name)
	if !is {
		if err := room("node.remove"); err != nil {
			return Nothing{}, err
		}
	}
	if was.Removed {
		return Nothing{}, nil
	}
	s.markRemoved(c.Name, c.Reason, m.At)
	return Nothing{}, nil
}

// markRemoved makes the name one of a removed node.
func (s *State) markRemoved(name, reason string, at time.Time) {
	was, is := s.peers.Get(name)
	if !is {
		was.Since = at
	}
	was.Name, was.Removed, was.Reason, was.Knows = name, true, reason, nil
	s.peers = s.peers.Set(name, was)
	s.nodes, s.keks, s.certs = s.nodes.Delete(name), s.keks.Delete(name), s.certs.Delete(name)
	s.stopped = s.stopped.Set(name, at) // its channels ended with it
}

// AddAnother is [AddNode] in a book with 64 other names: it counts the nodes that exist, without the removed ones.
type AddAnother struct{ AddNode }

func (AddAnother) Kind() string { return "node.add/2" }

// Apply is that of [AddNode], with the larger bound for names.
func (c AddAnother) Apply(s *State, m ledger.Meta) (Nothing, error) {
	return c.apply(s, m, s.roomForAnother)
}

// RemoveAnother is [RemoveNode] in a book with 64 other names.
type RemoveAnother struct{ RemoveNode }

func (RemoveAnother) Kind() string { return "node.remove/2" }

// Apply is that of [RemoveNode], with the larger bound for names. It stores only what a removed name needs.
func (c RemoveAnother) Apply(s *State, m ledger.Meta) (Nothing, error) {
	if len(c.Reason) > channel.MaxSentence {
		return Nothing{}, fault.New("node.remove", fault.Invalid, "the reason has more than %d bytes", channel.MaxSentence)
	}
	if _, err := c.apply(s, m, s.roomForName); err != nil {
		return Nothing{}, err
	}
	p, _ := s.peers.Get(c.Name)
	s.peers = s.peers.Set(c.Name, Peer{Name: p.Name, Removed: true, Reason: p.Reason, Since: p.Since})
	return Nothing{}, nil
}

func (s *State) firstRoom(op string) error {
	if s.peers.Len() >= MaxPeers {
		return fault.New(op, fault.Conflict, "the book knows %d nodes already", s.peers.Len())
	}
	return nil
}

func (s *State) roomForName(op string) error {
	if s.peers.Len() >= maxNames {
		return fault.New(op, fault.Conflict,
			"the book knows the names of %d nodes already, most of them removed: there is room for no other", s.peers.Len())
	}
	return nil
}

func (s *State) roomForAnother(op string) error {
	there := 0
	for _, p := range s.Peers() {
		if !p.Removed {
			there++
		}
	}
	if there >= MaxPeers {
		return fault.New(op, fault.Conflict, "the book knows %d nodes already: remove one that is gone (demarc control-plane members)", there)
	}
	return s.roomForName(op)
}

// crowded reports whether a change of this node needs the second kinds, because of the number of other names. The node's own name does
// not count, so that a repeated request is of the same kind.
func (s State) crowded(name string) bool {
	others := s.peers.Len()
	if _, is := s.peers.Get(name); is {
		others--
	}
	return others >= MaxPeers
}

// AddNode is the change that adds a node to this book.
func (s State) AddNode(c AddNode) ledger.Change[State, Nothing] {
	if s.crowded(c.Name) {
		return AddAnother{c}
	}
	return c
}

// RemoveNode is the change that removes a node from this book.
func (s State) RemoveNode(c RemoveNode) ledger.Change[State, Nothing] {
	if s.crowded(c.Name) {
		return RemoveAnother{c}
	}
	return c
}

// NodeChanged records what was done with a member: the configuration itself is not in the book.
type NodeChanged struct {
	Do   string `json:"do"` // add promote demote remove transfer, or autopilot's word
	Name string `json:"name"`
}

func (NodeChanged) Kind() string { return "node.changed/1" }

// Apply changes nothing: the record is the entry in the audit log.
func (NodeChanged) Apply(*State, ledger.Meta) (Nothing, error) { return Nothing{}, nil }

// SetAutopilot sets what the leader may do without an operator.
type SetAutopilot struct {
	Autopilot Autopilot `json:"autopilot"`
}

func (SetAutopilot) Kind() string { return "autopilot.set/1" }

// Apply refuses values out of range.
func (c SetAutopilot) Apply(s *State, _ ledger.Meta) (Nothing, error) {
	const op = "autopilot.set"
	p := c.Autopilot
	switch {
	case p.DeadAfter != 0 && (p.DeadAfter < time.Minute || p.DeadAfter > 366*24*time.Hour):
		return Nothing{}, fault.New(op, fault.Invalid, "dead after %s: use a minute to a year", p.DeadAfter)
	case p.Stabilization < 0 || p.Stabilization > 24*time.Hour:
		return Nothing{}, fault.New(op, fault.Invalid, "stable after %s: use at most a day", p.Stabilization)
	case p.Floor < 0 || p.Floor > MaxPeers:
		return Nothing{}, fault.New(op, fault.Invalid, "a floor of %d voters: use 1 to %d", p.Floor, MaxPeers)
	}
	s.pilot = p
	return Nothing{}, nil
}
