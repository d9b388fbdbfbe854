// SPDX-License-Identifier: Apache-2.0

package controlplane

import (
	"time"

	"github.com/demarc-dev/demarc/fleet"
)

// RefusesNode tells whether a certificate of a node is refused, and whether open connections with it end.
func RefusesNode(s State, name string, serial fleet.Serial, begins time.Time) (cut bool, err error) {
	return s.refusesNode("test", name, serial, begins)
}

// AtWork counts the connections for calls that have one under way.
func (s *Server) AtWork() (n int) {
	s.guests.mu.Lock()
	defer s.guests.mu.Unlock()
	for _, o := range s.guests.of {
		if !o.idle {
			n++
		}
	}
	return n
}

// What tests measure bounds against.
const (
	GuestsEach    = guestsEach
	OperatorEach  = operatorEach
	GreetingsEach = greetingsEach
)

// TroublesOf reads a status report's roads.
var TroublesOf = troublesOf

// AllKnow tells whether each node of the book knows a kind of change.
func (s State) AllKnow(kind string) bool { return s.allKnow(kind) }
