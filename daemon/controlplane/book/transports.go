// SPDX-License-Identifier: Apache-2.0

package book

import (
	"slices"

	"github.com/demarc-dev/demarc/api/channel"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/ledger"
	"github.com/demarc-dev/demarc/mesh"
)

// Troubles takes the roads that do not work, all of them, from a status report that is not in the book yet. It is a change of its
// own, before that of the report: [Report] of older builds has no word for them.
type Troubles struct {
	Name   fleet.ApplianceID `json:"name"`
	Number uint64            `json:"number"` // of the report
	Roads  []Trouble         `json:"roads,omitempty"`
}

// Trouble is a road of a customer's list that does not work. Both words are of closed sets.
type Trouble struct {
	Kind   string      `json:"kind"`
	Reason mesh.Reason `json:"reason"`
}

// Kind names the change in the log.
func (Troubles) Kind() string { return "appliance.roads/1" }

// Apply sets them, unless the report is an old one that comes again.
func (c Troubles) Apply(s *State, _ ledger.Meta) (Nothing, error) {
	a, err := s.Appliance(c.Name)
	if err != nil {
		return Nothing{}, err
	}
	if len(c.Roads) > channel.MaxTroubles {
		return Nothing{}, fault.New("troubles", fault.Invalid, "%d roads, and %d is the most that is taken", len(c.Roads), channel.MaxTroubles)
	}
	if c.Number == a.ReportsDone+1 {
		a.Roads = c.Roads
		s.appliances = s.appliances.Set(c.Name, a)
	}
	return Nothing{}, nil
}

// AllKnow tells whether each node that the book knows of said that it knows a kind of change.
func (s State) AllKnow(kind string) bool {
	for _, p := range s.Peers() {
		if !p.Removed && !slices.Contains(p.Knows, kind) {
			return false
		}
	}
	return true
}
