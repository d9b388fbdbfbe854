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

// Troubles records all failing transports of a status report that is not in the book yet. It is a separate change, before that of the
// report, because [Report] of older builds has no field for them.
type Troubles struct {
	Name   fleet.ApplianceID `json:"name"`
	Number uint64            `json:"number"` // of the report
	Roads  []Trouble         `json:"roads,omitempty"`
}

// Trouble is a failing transport of a customer's list. The values of both fields are of closed sets.
type Trouble struct {
	Kind   string      `json:"kind"`
	Reason mesh.Reason `json:"reason"`
}

func (Troubles) Kind() string { return "appliance.roads/1" }

// Apply sets them, unless the report was recorded before.
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

// AllKnow reports whether each node in the book recorded that it knows a kind of change.
func (s State) AllKnow(kind string) bool {
	for _, p := range s.Peers() {
		if !p.Removed && !slices.Contains(p.Knows, kind) {
			return false
		}
	}
	return true
}
