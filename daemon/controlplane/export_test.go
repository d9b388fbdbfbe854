// SPDX-License-Identifier: Apache-2.0

package controlplane

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
