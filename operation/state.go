// SPDX-License-Identifier: Apache-2.0

package operation

import "github.com/demarc-dev/demarc/fault"

// State is where an operation stands.
type State string

// The closed set of states.
const (
	Requested State = "requested" // the vendor asked
	Approved  State = "approved"  // the customer said yes, it has not begun
	Rejected  State = "rejected"  // the customer said no
	Expired   State = "expired"   // its time ran out before it began
	Cancelled State = "cancelled" // called off by either side, killed where it ran
	Running   State = "running"
	Held      State = "held"     // done; the output waits for the customer
	Released  State = "released" // the output went to the vendor
	Withheld  State = "withheld" // the output stays
	Failed    State = "failed"   // it could not be run to its end; there is no output to release
)

// States lists every state.
func States() []State {
	return []State{Requested, Approved, Rejected, Expired, Cancelled, Running, Held, Released, Withheld, Failed}
}

// Event moves an operation from one state to the next.
type Event string

// The closed set of events.
const (
	Approve  Event = "approve"
	Reject   Event = "reject"
	Expire   Event = "expire"
	Stop     Event = "cancel"
	Start    Event = "start"
	Finish   Event = "finish"
	Fail     Event = "fail"
	LetOut   Event = "release"
	Withhold Event = "withhold"
)

// Events lists every event.
func Events() []Event {
	return []Event{Approve, Reject, Expire, Stop, Start, Finish, Fail, LetOut, Withhold}
}

// Final reports whether nothing can happen any more.
func (s State) Final() bool {
	switch s {
	case Requested, Approved, Running, Held:
		return false
	}
	return true
}

// Next is the state machine. A move that is not in it is fault.Conflict, an unknown word fault.Invalid.
func Next(s State, e Event) (State, error) {
	const op = "operation.Next"
	var to map[Event]State
	switch s {
	case Requested:
		to = map[Event]State{Approve: Approved, Reject: Rejected, Expire: Expired, Stop: Cancelled}
	case Approved:
		to = map[Event]State{Start: Running, Expire: Expired, Stop: Cancelled}
	case Running:
		to = map[Event]State{Finish: Held, Fail: Failed, Stop: Cancelled}
	case Held:
		to = map[Event]State{LetOut: Released, Withhold: Withheld}
	case Rejected, Expired, Cancelled, Released, Withheld, Failed:
	default:
		return "", fault.New(op, fault.Invalid, "%q is not a state of an operation", fault.Clip(string(s)))
	}
	if n, ok := to[e]; ok {
		return n, nil
	}
	for _, known := range Events() {
		if e == known {
			return "", fault.New(op, fault.Conflict, "the operation is %s: it can't %s any more, or not yet", s, e)
		}
	}
	return "", fault.New(op, fault.Invalid, "%q is not an event of an operation", fault.Clip(string(e)))
}
