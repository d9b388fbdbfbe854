// SPDX-License-Identifier: Apache-2.0

// Package clock decides what time it is from the clocks of several machines, of which some may be wrong.
//
// Each machine reads its own clock when it is asked, and the answer is stored against the monotonic clock of the process
// that asked, so that it counts for [fresh] after the answer. What a majority of the voters' clocks says, within
// [MaxOffset] of each other, is the time. If no majority agrees there is no time, and a timestamp can't be judged.
//
// The package sends nothing: its user asks the other machines and calls [Clocks.Record] with their answers.
package clock

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/demarc-dev/demarc/fault"
)

// Bounds of clocks, each against the majority's time.
const (
	// MaxStamp is how far a timestamp may be off. It allows for a clock that is off by MaxOffset and for the wait of a proposal.
	MaxStamp = time.Minute
	// MaxOffset is how far a clock may be off before its machine uses the majority's time instead, and reports it.
	MaxOffset = 30 * time.Second

	fresh = 30 * time.Second // how long a reading counts
)

// Reading is what is known of one clock: at the moment m of this process's monotonic clock it shows between m+lo and
// m+hi. The clock was read between request and answer, so lo and hi are as far apart as that round trip took.
type Reading struct {
	id     string
	lo, hi int64 // ns
	known  bool
}

// Between is a reading of a clock that shows between lo and hi at the moment 0.
func Between(id string, lo, hi time.Duration) Reading { return Reading{id, int64(lo), int64(hi), true} }

// Unknown is a clock of which there is no fresh reading.
func Unknown(id string) Reading { return Reading{id: id} }

// apart is by how much two clocks differ at the least, in ns; more than 0 if r is ahead of o.
func (r Reading) apart(o Reading) int64 {
	switch {
	case r.lo > o.hi:
		return r.lo - o.hi
	case o.lo > r.hi:
		return r.hi - o.lo
	}
	return 0
}

// Ahead is by how much r is ahead of o, at the least and at the most.
func (r Reading) Ahead(o Reading) (least, most time.Duration) {
	return time.Duration(r.lo - o.hi), time.Duration(r.hi - o.lo)
}

func (r Reading) mid() int64 { return r.lo + (r.hi-r.lo)/2 }

func within(d int64, bound time.Duration) bool {
	return d <= int64(bound) && d >= -int64(bound)
}

// Agreement is what the voters' clocks say together.
type Agreement struct {
	Quorum bool     // the clocks of a majority of the voters are known
	OK     bool     // and those of a majority agree
	With   []string // whose clocks agree, by id; nil if OK is false

	median Reading   // of those that agree; the zero value if OK is false
	all    []Reading // those that are known, by what they show
}

// Agree finds the largest set of clocks that are within MaxOffset of one of them. It counts if it is a majority of the
// voters. Of two sets of one size the one that is closest together is taken.
func Agree(voters []Reading) Agreement {
	var out Agreement
	for _, v := range voters {
		if v.known {
			out.all = append(out.all, v)
		}
	}
	need := len(voters)/2 + 1
	slices.SortFunc(out.all, func(a, b Reading) int { return cmp.Or(cmp.Compare(a.mid(), b.mid()), cmp.Compare(a.id, b.id)) })
	if out.Quorum = len(out.all) >= need; !out.Quorum {
		return out
	}
	var best []Reading
	for _, c := range out.all {
		var set []Reading
		for _, o := range out.all {
			if within(c.apart(o), MaxOffset) {
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
	out.OK, out.median = true, best[(len(best)-1)/2]
	for _, b := range best {
		out.With = append(out.With, b.id)
	}
	slices.Sort(out.With)
	return out
}

func spread(sorted []Reading) int64 { return sorted[len(sorted)-1].mid() - sorted[0].mid() }

// Voters spells With for people.
func (a Agreement) Voters() string { return strings.Join(a.With, ", ") }

// Time is what the majority's clocks show at a moment of this process's monotonic clock; Unix time 0 and the moment if OK
// is false.
func (a Agreement) Time(moment time.Duration) time.Time {
	return time.Unix(0, a.median.mid()+int64(moment))
}

// Off is by how much a clock is off, more than 0 if it is ahead; 0 if it is within MaxOffset of the majority's or OK is
// false.
func (a Agreement) Off(r Reading) time.Duration { return a.beyond(r, MaxOffset) }

func (a Agreement) beyond(r Reading, bound time.Duration) time.Duration {
	if d := r.apart(a.median); a.OK && !within(d, bound) {
		return time.Duration(d)
	}
	return 0
}

// Offset is by how much a clock is ahead of the majority's; false if one of them is not known.
func (a Agreement) Offset(r Reading) (time.Duration, bool) {
	if !a.OK || !r.known {
		return 0, false
	}
	return time.Duration(r.mid() - a.median.mid()), true
}

// Against spells an offset for people.
func Against(d time.Duration) string {
	if d < 0 {
		return fmt.Sprintf("%s behind", (-d).Round(time.Second))
	}
	return fmt.Sprintf("%s ahead of", d.Round(time.Second))
}

// Split is the error, [fault.Unavailable], that says how the clocks differ if the clocks of a majority are known and don't
// agree; nil otherwise.
func (a Agreement) Split() error {
	if !a.Quorum || a.OK {
		return nil
	}
	var s []string
	for _, r := range a.all[1:] {
		d := time.Duration(r.mid() - a.all[0].mid())
		s = append(s, fmt.Sprintf("that of node %q is %s that of %q", r.id, Against(d), a.all[0].id))
	}
	return fault.New("clock.Split", fault.Unavailable,
		"no majority of the voters' clocks agrees, so that nothing can be changed: %s; set the clock right that is wrong", strings.Join(s, ", "))
}

// Judge refuses a timestamp that is more than MaxStamp off the majority's time: [fault.Unavailable], with a sentence that
// says whose clock is off, and against whose. It is [fault.NotLeader] while the clocks of a majority are not known.
func (a Agreement) Judge(stamp Reading) error {
	const op = "clock.Judge"
	switch {
	case !a.Quorum:
		return fault.New(op, fault.NotLeader, "the leader has not heard the clocks of a majority of the voters yet")
	case !a.OK:
		return a.Split()
	}
	d := a.beyond(stamp, MaxStamp)
	if d == 0 {
		return nil
	}
	for _, r := range a.all {
		if a.Off(r) != 0 && within(stamp.apart(r), MaxStamp) {
			return fault.New(op, fault.Unavailable,
				"the clock of node %q, by which this was stamped, is %s those of %s: set it right, or ask another node",
				r.id, Against(d), a.Voters())
		}
	}
	return fault.New(op, fault.Unavailable,
		"this was stamped %s the clocks of %s: set the clock right of the node that was asked, or ask another one",
		Against(d), a.Voters())
}

// Clocks is the latest reading of each machine's clock. Its methods may be called concurrently.
type Clocks struct {
	now     func() time.Time
	started time.Time

	mu       sync.Mutex
	readings map[string]Reading
	at       map[string]time.Duration // when they were made
}

// New returns an empty table. now reads this machine's own clock, which may be wrong; nil means time.Now.
func New(now func() time.Time) *Clocks {
	if now == nil {
		now = time.Now
	}
	return &Clocks{now: now, started: time.Now(), readings: map[string]Reading{}, at: map[string]time.Duration{}}
}

// Now is what this machine's own clock shows.
func (c *Clocks) Now() time.Time { return c.now() }

// Moment is the time since New, by the monotonic clock, whatever the other one does.
func (c *Clocks) Moment() time.Duration { return time.Since(c.started) }

// Record takes what a machine's clock showed, in ns since 1970, in answer to a request of the moment asked.
func (c *Clocks) Record(id string, unixNano int64, asked time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := c.Moment()
	c.readings[id] = Reading{id: id, lo: unixNano - int64(now), hi: unixNano - int64(asked), known: true}
	c.at[id] = now
}

// Of is the reading of a machine's clock, unknown if there is no fresh one.
func (c *Clocks) Of(id string) Reading {
	c.mu.Lock()
	defer c.mu.Unlock()
	r, ok := c.readings[id]
	if !ok || c.Moment()-c.at[id] > fresh {
		return Unknown(id)
	}
	return r
}

// Own is the reading of this machine's clock.
func (c *Clocks) Own(id string) Reading { return c.At(id, c.now()) }

// At is a reading of a clock that shows this time now.
func (c *Clocks) At(id string, shows time.Time) Reading {
	ns := shows.UnixNano() - int64(c.Moment())
	return Reading{id: id, lo: ns, hi: ns, known: true}
}
