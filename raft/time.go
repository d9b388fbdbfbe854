// SPDX-License-Identifier: Apache-2.0

package raft

import (
	"time"

	hraft "github.com/hashicorp/raft"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/raft/clock"
)

// MaxStamp is how far a timestamp may be from what a majority of the voters' clocks says, see [Node.Judge].
const MaxStamp = clock.MaxStamp

const (
	clockEvery  = 5 * time.Second // how often a node that does not lead asks for the others' clocks
	clockRounds = 3               // rounds in which a leader's own clock is off before it hands leadership over
)

func (n *Node) clockOf(id string) clock.Reading {
	if id == n.cfg.Self.ID {
		return n.clocks.Own(id)
	}
	return n.clocks.Of(id)
}

// agreed is what the voters' clocks say at this moment, as far as this node has read them.
func (n *Node) agreed() clock.Agreement {
	var all []clock.Reading
	for _, id := range voters(n.servers()) {
		all = append(all, n.clockOf(id))
	}
	return clock.Agree(all)
}

// Judge reports whether a change with this timestamp may be put into the log by this node as the leader. A timestamp that
// is more than [MaxStamp] away from what a majority of the voters' clocks says is refused as [fault.Unavailable], and the
// sentence says whose clock is off, and against whose. It is [fault.NotLeader] while the clocks of a majority are not known.
// Each voter sends its clock in its answers; the time of the round trip is uncertain, and counts in favour of the timestamp.
// A node that is the only voter asks no other.
func (n *Node) Judge(stamp time.Time) error {
	a := n.agreed()
	if !a.Quorum {
		wake(n.probe)
	}
	return a.Judge(n.clocks.At("", stamp))
}

// Now is the time for new timestamps: this node's clock, or what the majority's clocks say if that is more than 30 s away.
// It is this node's clock if the majority's are not known or don't agree.
func (n *Node) Now() time.Time {
	a := n.agreed()
	if a.Off(n.clocks.Own(n.cfg.Self.ID)) == 0 {
		return n.clocks.Now()
	}
	return a.Time(n.clocks.Moment())
}

// Agreed is what a majority of the voters' clocks says, and how many agree; 0 if it is not known.
func (n *Node) Agreed() (time.Time, int) {
	a := n.agreed()
	return a.Time(n.clocks.Moment()), len(a.With)
}

// Clock is nil if this node's clock is right and the voters' clocks agree, or if nothing is known of them; otherwise it is
// [fault.Unavailable], with a sentence that says whose clock is off.
func (n *Node) Clock() error {
	a := n.agreed()
	if err := a.Split(); err != nil {
		return err
	}
	if d := a.Off(n.clocks.Own(n.cfg.Self.ID)); d != 0 {
		return fault.New("raft.Clock", fault.Unavailable, "the clock of this node is %s those of %s: set it right", clock.Against(d), a.Voters())
	}
	return nil
}

// yieldLeadership makes a voter lead whose clock is right and that is heard from, if this leader's own clock has been off for
// several rounds.
func (n *Node) yieldLeadership() {
	a := n.agreed()
	d := a.Off(n.clocks.Own(n.cfg.Self.ID))
	if d == 0 {
		n.clockOff = 0
		return
	}
	if n.clockOff++; n.clockOff < clockRounds {
		return
	}
	for _, id := range a.With {
		if s, is := find(n.servers(), id); !is || s.Suffrage != hraft.Voter || id == n.cfg.Self.ID || !n.watch.heard(n, id) {
			continue
		}
		n.clockOff = 0
		n.log.Warn("the clock of this node is off: it hands leadership over", "clock", clock.Against(d), "against", a.Voters(), "to", id)
		n.work.Go(func() {
			if err := n.change(n.ctx, Change{Do: Transfer, ID: id}); err != nil {
				n.log.Warn("leadership was not handed over", "err", fault.Text(err))
			}
		})
		return
	}
}

// wake puts a token into a channel that has room for one.
func wake(c chan<- struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}
