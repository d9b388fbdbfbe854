// SPDX-License-Identifier: Apache-2.0

package raft

import (
	"time"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/raft/clock"
)

// MaxStamp is how far a timestamp may be from what a majority of the voters' clocks says, see [Node.Judge].
const MaxStamp = clock.MaxStamp

// Judge reports whether a change with this timestamp may be put into the log by this node as the leader. A timestamp that
// is more than [MaxStamp] away from what a majority of the voters' clocks says is refused as [fault.Unavailable], and the
// sentence says whose clock is off, and against whose. It is [fault.NotLeader] while the clocks of a majority are not known.
// Each voter sends its clock in its answers; the time of the round trip is uncertain, and counts in favour of the timestamp.
// A node that is the only voter asks no other.
func (n *Node) Judge(stamp time.Time) error {
	a := n.time.agreed()
	if !a.Quorum {
		wake(n.time.probe)
	}
	return a.Judge(n.time.clocks.At("", stamp))
}

// Now is the time for new timestamps: this node's clock, or what the majority's clocks say if that is more than 30 s away.
// It is this node's clock if the majority's are not known or don't agree.
func (n *Node) Now() time.Time {
	a := n.time.agreed()
	if a.Off(n.time.own()) == 0 {
		return n.time.clocks.Now()
	}
	return a.Time(n.time.clocks.Moment())
}

// Agreed is what a majority of the voters' clocks says, and how many agree; 0 if it is not known.
func (n *Node) Agreed() (time.Time, int) {
	a := n.time.agreed()
	return a.Time(n.time.clocks.Moment()), len(a.With)
}

// Clock is nil if this node's clock is right and the voters' clocks agree, or if nothing is known of them; otherwise it is
// [fault.Unavailable], with a sentence that says whose clock is off.
func (n *Node) Clock() error {
	a := n.time.agreed()
	if err := a.Split(); err != nil {
		return err
	}
	if d := a.Off(n.time.own()); d != 0 {
		return fault.New("raft.Clock", fault.Unavailable, "the clock of this node is %s those of %s: set it right", clock.Against(d), a.Voters())
	}
	return nil
}

// timekeeper is what this node knows of the voters' clocks.
type timekeeper struct {
	lib    *consensus
	clocks *clock.Clocks
	probe  chan struct{} // holds a token while the members are to be asked at once
}

func (t *timekeeper) own() clock.Reading { return t.clocks.Own(t.lib.self) }

func (t *timekeeper) of(id string) clock.Reading {
	if id == t.lib.self {
		return t.own()
	}
	return t.clocks.Of(id)
}

// agreed is what the voters' clocks say at this moment, as far as this node has read them.
func (t *timekeeper) agreed() clock.Agreement {
	var all []clock.Reading
	for _, id := range t.lib.voters() {
		all = append(all, t.of(id))
	}
	return clock.Agree(all)
}

// offset is by how much a member's clock is ahead of the majority's; false if that is not known.
func (t *timekeeper) offset(id string) (time.Duration, bool) { return t.agreed().Offset(t.of(id)) }
