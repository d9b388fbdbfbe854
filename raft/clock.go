// SPDX-License-Identifier: Apache-2.0

package raft

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	hraft "github.com/hashicorp/raft"

	"github.com/demarc-dev/demarc/fault"
)

// Bounds of clocks. What they are against is what a majority of the voters' clocks says, see [Node.Judge].
const (
	// MaxStamp is how far from that a stamp may be. It bears clocks that are as far off as maxClock, and the wait of a proposal.
	MaxStamp = time.Minute
	// maxClock is how far a clock may be off before its node goes by the majority's, says so, and leads no longer.
	maxClock = 30 * time.Second

	clockFresh = 30 * time.Second // how long what a node said of its clock counts
	clockEvery = 5 * time.Second  // how often a node that does not lead asks
	clockLooks = 3                // looks of a leader at a clock of its own that is off, before it gives the lead away
)

// reading is what is known of a clock, against the moments that this process counts: at the moment m it shows between m+lo
// and m+hi. The clock was read while the question was on its way, so they are as far apart as question and answer took.
type reading struct {
	id     string
	lo, hi int64 // ns
	known  bool
	mute   bool // of an older build, which does not tell
}

// apart is by how much two clocks differ at the least, in ns; more than 0 where r is ahead of o.
func (r reading) apart(o reading) int64 {
	switch {
	case r.lo > o.hi:
		return r.lo - o.hi
	case o.lo > r.hi:
		return r.hi - o.lo
	}
	return 0
}

func (r reading) mid() int64 { return r.lo + (r.hi-r.lo)/2 }

func within(d int64, bound time.Duration) bool {
	return d <= int64(bound) && d >= -int64(bound)
}

// agreement is what the voters' clocks say together.
type agreement struct {
	told bool    // by as many as a majority is
	ok   bool    // a majority is of one mind
	by   reading // the clock in the middle of that majority; its id is empty where ok is false
	with []string
	all  []reading // of those who told
}

// agree finds the largest set of clocks that are within maxClock of one of them. It counts where it is a majority of the
// voters; those who run a build that does not tell are left out. Sets of one size: the one that is closest together.
func agree(voters []reading) agreement {
	var out agreement
	tell := 0
	for _, v := range voters {
		if !v.mute {
			tell++
		}
		if v.known && !v.mute {
			out.all = append(out.all, v)
		}
	}
	need := tell/2 + 1
	slices.SortFunc(out.all, func(a, b reading) int { return cmp.Or(cmp.Compare(a.mid(), b.mid()), cmp.Compare(a.id, b.id)) })
	if out.told = len(out.all) >= need; !out.told {
		return out
	}
	var best []reading
	for _, c := range out.all {
		var set []reading
		for _, o := range out.all {
			if within(c.apart(o), maxClock) {
				set = append(set, o)
			}
		}
		if len(set) > len(best) || len(set) == len(best) && spread(set) < spread(best) {
			best = set
		}
	}
	if len(best) < need {
		return out
	}
	out.ok, out.by = true, best[(len(best)-1)/2]
	for _, b := range best {
		out.with = append(out.with, b.id)
	}
	slices.Sort(out.with)
	return out
}

func spread(sorted []reading) int64 { return sorted[len(sorted)-1].mid() - sorted[0].mid() }

// off tells by how much a clock is off, 0 where it is within bound of the majority's or nothing is agreed.
func (a agreement) off(r reading, bound time.Duration) time.Duration {
	if d := r.apart(a.by); a.ok && !within(d, bound) {
		return time.Duration(d)
	}
	return 0
}

// against says by how much something differs, for people.
func against(d time.Duration) string {
	if d < 0 {
		return fmt.Sprintf("%s behind", (-d).Round(time.Second))
	}
	return fmt.Sprintf("%s ahead of", d.Round(time.Second))
}

// split says how the clocks differ of voters of which no majority is of one mind.
func (a agreement) split() error {
	var s []string
	for _, r := range a.all[1:] {
		s = append(s, fmt.Sprintf("that of node %q is %s that of %q", r.id, against(time.Duration(r.mid()-a.all[0].mid())), a.all[0].id))
	}
	return fault.New("raft.Clock", fault.Unavailable, "no majority of the voters' clocks agrees, so that nothing can be changed: %s; set the clock right that is wrong", strings.Join(s, ", "))
}

// judge refuses a stamp that is off.
func (a agreement) judge(stamp reading) error {
	const op = "raft.Judge"
	switch {
	case !a.told:
		return fault.New(op, fault.NotLeader, "the leader has not heard the clocks of a majority of the voters yet")
	case !a.ok:
		return a.split()
	}
	d := a.off(stamp, MaxStamp)
	if d == 0 {
		return nil
	}
	for _, r := range a.all {
		if a.off(r, maxClock) != 0 && within(stamp.apart(r), MaxStamp) {
			return fault.New(op, fault.Unavailable, "the clock of node %q, by which this was stamped, is %s those of %s: set it right, or ask another node", r.id, against(d), strings.Join(a.with, ", "))
		}
	}
	return fault.New(op, fault.Unavailable, "this was stamped %s the clocks of %s: set the clock right of the node that was asked, or ask another one", against(d), strings.Join(a.with, ", "))
}

// clocks is what was read of the members' clocks. It outlives a lead: who begins to lead knows what it read before.
type clocks struct {
	now  func() time.Time
	born time.Time

	mu   sync.Mutex
	read map[string]reading
	at   map[string]time.Duration
	bad  int // looks of the leader, without a break, at which its own clock was off; of watchMembers alone
}

func newClocks(now func() time.Time) *clocks {
	if now == nil {
		now = time.Now
	}
	return &clocks{now: now, born: time.Now(), read: map[string]reading{}, at: map[string]time.Duration{}}
}

// moment is counted by the clock that only runs forward, whatever the other one does.
func (c *clocks) moment() time.Duration { return time.Since(c.born) }

// heard takes what a member said of its clock, in ns since 1970, in answer to a question of the moment asked.
func (c *clocks) heard(id string, said int64, asked time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := c.moment()
	c.read[id], c.at[id] = reading{id: id, lo: said - int64(now), hi: said - int64(asked), known: true, mute: said == 0}, now
}

// of gives what is known of a clock now.
func (c *clocks) of(id string) reading {
	c.mu.Lock()
	defer c.mu.Unlock()
	r, ok := c.read[id]
	if !ok || c.moment()-c.at[id] > clockFresh {
		return reading{id: id, mute: r.mute}
	}
	return r
}

func (c *clocks) own(id string) reading { return c.stamp(id, c.now()) }

// stamp is a time as if a clock showed it now.
func (c *clocks) stamp(id string, at time.Time) reading {
	ns := at.UnixNano() - int64(c.moment())
	return reading{id: id, lo: ns, hi: ns, known: true}
}

func (n *Node) clockOf(id string) reading {
	if id == n.cfg.Self.ID {
		return n.clocks.own(id)
	}
	return n.clocks.of(id)
}

// agreed is what the voters' clocks say at this moment, as far as this node has read them.
func (n *Node) agreed() agreement {
	var all []reading
	for _, id := range voters(n.servers()) {
		all = append(all, n.clockOf(id))
	}
	return agree(all)
}

// Judge tells whether a change that bears this stamp may be put into the log by this node as the leader. A stamp is off
// where it is more than [MaxStamp] away from what a majority of the voters' clocks says: [fault.Unavailable], and the
// sentence says whose clock is off, and against whose. It is [fault.NotLeader] for the moment in which the clocks of a majority
// are not known yet. Each voter tells its clock in its answers; what the way took is uncertain, and is in the stamp's favour. A
// node that is the only voter has nobody to ask.
func (n *Node) Judge(stamp time.Time) error {
	a := n.agreed()
	if !a.told {
		select {
		case n.peek <- struct{}{}: // so that they are asked now
		default:
		}
	}
	return a.judge(n.clocks.stamp("", stamp))
}

// Now is the time to stamp with: this node's clock, or what the majority's says where that is more than 30 s away. It is
// this node's where the majority's are not known, or of two minds.
func (n *Node) Now() time.Time {
	a, own := n.agreed(), n.clocks.own(n.cfg.Self.ID)
	if a.off(own, maxClock) == 0 {
		return n.clocks.now()
	}
	return time.Unix(0, a.by.mid()+int64(n.clocks.moment()))
}

// Agreed is what a majority of the voters' clocks says, and how many agree; 0 where it is not known.
func (n *Node) Agreed() (time.Time, int) {
	a := n.agreed()
	return time.Unix(0, a.by.mid()+int64(n.clocks.moment())), len(a.with)
}

// Clock tells how this node's clock stands, and whether the voters' clocks agree: nil where all is well or nothing is known.
func (n *Node) Clock() error {
	a := n.agreed()
	if a.told && !a.ok {
		return a.split()
	}
	if d := a.off(n.clocks.own(n.cfg.Self.ID), maxClock); d != 0 {
		return fault.New("raft.Clock", fault.Unavailable, "the clock of this node is %s those of %s: set it right", against(d), strings.Join(a.with, ", "))
	}
	return nil
}

// ahead is by how much a member's clock is ahead of the majority's.
func (n *Node) ahead(a agreement, id string) (time.Duration, bool) {
	r := n.clockOf(id)
	if !a.ok || !r.known || r.mute {
		return 0, false
	}
	return time.Duration(r.mid() - a.by.mid()), true
}

// steer gives the lead away where the own clock has been off at several looks: to a voter whose clock is right and that
// is heard from.
func (n *Node) steer() {
	a := n.agreed()
	d := a.off(n.clocks.own(n.cfg.Self.ID), maxClock)
	if d == 0 {
		n.clocks.bad = 0
		return
	}
	if n.clocks.bad++; n.clocks.bad < clockLooks {
		return
	}
	for _, id := range a.with {
		if s, is := find(n.servers(), id); !is || s.Suffrage != hraft.Voter || id == n.cfg.Self.ID || !n.watch.heard(n, id) {
			continue
		}
		n.clocks.bad = 0
		n.log.Warn("the clock of this node is off: it gives the lead away", "clock", against(d), "those of", a.with, "to", id)
		n.work.Go(func() {
			if err := n.change(n.ctx, Change{Do: Transfer, ID: id}); err != nil {
				n.log.Warn("the lead was not given away", "err", fault.Text(err))
			}
		})
		return
	}
}
