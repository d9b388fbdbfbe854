// SPDX-License-Identifier: Apache-2.0

package book

import (
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/ledger"
)

// NodeStops records that a node shuts down: none of its appliances counts as connected from now on, whatever its last [Edge], until the
// node has reconciled them after its restart. One entry replaces an [Edge] for each appliance.
type NodeStops struct {
	Name string `json:"name"`
}

func (NodeStops) Kind() string { return "node.stops/1" }

// Apply marks the node.
func (c NodeStops) Apply(s *State, m ledger.Meta) (Nothing, error) {
	if err := fleet.CheckName("node", c.Name); err != nil {
		return Nothing{}, err
	}
	s.stopped = s.stopped.Set(c.Name, m.At)
	return Nothing{}, nil
}

// NodeRoll records which appliances did not reconnect to a node after its start. With More, the list continues in another entry.
type NodeRoll struct {
	Name    string              `json:"name"`
	Missing []fleet.ApplianceID `json:"missing,omitempty"`
	More    bool                `json:"more,omitempty"`
}

// MaxRoll is the most names in one [NodeRoll].
const MaxRoll = 1000

func (NodeRoll) Kind() string { return "node.roll/1" }

// Apply marks those that the book has at this node as offline, and removes the mark of [NodeStops].
func (c NodeRoll) Apply(s *State, _ ledger.Meta) (Nothing, error) {
	if err := fleet.CheckName("node", c.Name); err != nil {
		return Nothing{}, err
	}
	if len(c.Missing) > MaxRoll {
		return Nothing{}, fault.New("node.roll", fault.Invalid, "a roll has at most %d names", MaxRoll)
	}
	for _, name := range c.Missing {
		if a, ok := s.appliances.Get(name); ok && a.Online && a.Node == c.Name {
			a.Online = false
			s.appliances = s.appliances.Set(name, a)
		}
	}
	if !c.More {
		s.stopped = s.stopped.Delete(c.Name)
	}
	return Nothing{}, nil
}

// Here reports whether an appliance has a channel, as far as the book knows: its last [Edge] says so, and its node did not stop since.
func (s State) Here(a Appliance) bool {
	_, stopped := s.stopped.Get(a.Node)
	return a.Online && !stopped
}
