// SPDX-License-Identifier: Apache-2.0

package controlplane

// What tests measure bounds against.
const (
	GuestsEach    = guestsEach
	OperatorEach  = operatorEach
	GreetingsEach = greetingsEach
)
