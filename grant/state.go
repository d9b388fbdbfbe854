// SPDX-License-Identifier: Apache-2.0

package grant

import (
	"cmp"
	"slices"
	"time"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/seal"
)

// State is what the customer has decided, as it stands in the customer's book. A copy by assignment is a copy: its lists
// are replaced whole, never edited. The documents were verified, and checked, before they get here.
type State struct {
	Held       []Held    `json:"held,omitempty"`
	Denies     []Denied  `json:"denies,omitempty"`
	ObserveOff bool      `json:"observe_off,omitempty"`
	Gone       []Gone    `json:"gone,omitempty"` // ended, and not in the lists above any more; oldest first
	Floor      time.Time `json:"floor,omitzero"` // what is dated at or before it may have been here, and be forgotten
}

// known says whether a document that bears this time may have been here before.
func (s State) known(id string, at time.Time) bool {
	return !s.Floor.IsZero() && !at.After(s.Floor) || slices.ContainsFunc(s.Gone, func(g Gone) bool { return g.ID == id })
}

// forget remembers of a document only that it must not come back. Where that is too many, the oldest make way, and
// nothing as old as they is accepted from then on: the memory is bounded, and a replay is still refused.
func (s State) forget(id string, at time.Time) State {
	i, _ := slices.BinarySearchFunc(s.Gone, at, func(g Gone, at time.Time) int { return g.At.Compare(at) })
	gone := make([]Gone, 0, len(s.Gone)+1)
	gone = append(append(append(gone, s.Gone[:i]...), Gone{id, at}), s.Gone[i:]...)
	if over := len(gone) - MaxGone; over > 0 {
		if last := gone[over-1].At; last.After(s.Floor) {
			s.Floor = last
		}
		gone = gone[over:]
	}
	s.Gone = gone
	return s
}

// Give adds a grant. One that was there before, in whatever state, is refused. If the list is full, one that can't be used
// any more makes way: of the ended, else of the revoked, else of the spent, the one that was given first.
func (s State) Give(id string, g Grant, by []seal.KeyID, now time.Time) (State, error) {
	const op = "grant.Give"
	if err := g.Check(); err != nil {
		return s, err
	}
	if !g.Until.IsZero() && !now.Before(g.Until) {
		return s, fault.New(op, fault.Expired, "the grant ended at %s", g.Until.Format(time.RFC3339))
	}
	if !g.Until.IsZero() && g.Until.After(now.Add(fleet.MaxConsent+fleet.MaxSkew)) {
		return s, fault.New(op, fault.Invalid, "the grant ends at %s, more than %s from now: sign one that ends sooner",
			g.Until.Format(time.RFC3339), days(fleet.MaxConsent))
	}
	if s.known(id, g.From) || slices.ContainsFunc(s.Held, func(h Held) bool { return h.ID == id }) {
		return s, fault.New(op, fault.Conflict, "this grant was given before, or is older than all that is remembered: sign a new one that "+
			"begins now")
	}
	out := s
	out.Held = append(make([]Held, 0, len(s.Held)+1), s.Held...)
	if len(out.Held) >= MaxHeld {
		i := oldestOver(out.Held, now)
		if i < 0 {
			return s, fault.New(op, fault.Busy, "%d grants are in force, and that is the most: revoke some first", len(out.Held))
		}
		out = out.forget(out.Held[i].ID, out.Held[i].Grant.From)
		out.Held = slices.Delete(out.Held, i, i+1)
	}
	out.Held = append(out.Held, Held{ID: id, Grant: g, Since: now, By: slices.Clone(by)})
	if g.plainObserve() && !now.Before(g.From) {
		out.ObserveOff = false
	}
	return out, nil
}

// oldestOver finds the grant that can make way, -1 if each can still be used.
func oldestOver(held []Held, now time.Time) int {
	rank := func(h Held) int {
		switch {
		case h.ended(now):
			return 0
		case !h.RevokedAt.IsZero():
			return 1
		case h.spent():
			return 2
		}
		return 3
	}
	best := -1
	for i, h := range held {
		if rank(h) == 3 {
			continue
		}
		if best < 0 || cmp.Or(cmp.Compare(rank(h), rank(held[best])), h.Since.Compare(held[best].Since)) < 0 {
			best = i
		}
	}
	return best
}

// plainObserve says whether the grant is the default itself, given back: observe without an end and without a number.
// One with limits leaves the switch alone and gives what it says.
func (g Grant) plainObserve() bool {
	return g.Phase == fleet.Observe && g.Until.IsZero() && g.Uses == 0
}

// Revoke ends grants and says which. To revoke what is not there, or is revoked, is no error: what counts is that
// afterwards it is not granted. Only a single grant must exist, so that a slip of the pen is seen. To revoke observe, all,
// or a grant that had switched observe on again, switches it off.
func (s State) Revoke(_ string, r Revoke, now time.Time) (State, []string, error) {
	const op = "grant.Revoke"
	if err := r.Check(); err != nil {
		return s, nil, err
	}
	held := slices.Clone(s.Held)
	var ended []string
	found := false
	for i, h := range held {
		if !(r.All || h.Grant.Phase == r.Phase || h.ID == r.Grant) {
			continue
		}
		found = true
		if h.RevokedAt.IsZero() {
			held[i].RevokedAt = now
			ended = append(ended, h.ID)
			s.ObserveOff = s.ObserveOff || h.Grant.plainObserve()
		}
	}
	if r.Grant != "" && !found && !slices.ContainsFunc(s.Gone, func(g Gone) bool { return g.ID == r.Grant }) {
		return s, nil, fault.New(op, fault.NotFound, "no grant %.64q: demarc local access lists them", r.Grant)
	}
	s.Held = held
	if r.All || r.Phase == fleet.Observe {
		s.ObserveOff = true
	}
	return s, ended, nil
}

// Forbid adds a deny.
func (s State) Forbid(id string, d Deny, by []seal.KeyID, now time.Time) (State, error) {
	const op = "grant.Forbid"
	if err := d.Check(); err != nil {
		return s, err
	}
	if s.known(id, d.At) {
		return s, fault.New(op, fault.Conflict, "this deny was lifted, or is older than all that is remembered: sign a new one")
	}
	size := len(d.Cedar)
	for _, h := range s.Denies {
		if h.ID == id || h.Name == d.Name {
			return s, fault.New(op, fault.Conflict, "a deny %q is in force already: lift it first, or choose another name", d.Name)
		}
		size += len(h.Cedar)
	}
	if size > MaxText {
		return s, fault.New(op, fault.Busy, "the denies in force would have %d bytes, the limit is %d: lift one first", size, MaxText)
	}
	if len(s.Denies) >= MaxDenies {
		return s, fault.New(op, fault.Busy, "%d denies are in force, and that is the most: lift one first", len(s.Denies))
	}
	s.Denies = append(slices.Clone(s.Denies), Denied{ID: id, Name: d.Name, Cedar: d.Cedar, At: d.At, Since: now, By: slices.Clone(by)})
	return s, nil
}

// Lift takes back a deny.
func (s State) Lift(_ string, l Lift, _ time.Time) (State, error) {
	const op = "grant.Lift"
	if err := l.Check(); err != nil {
		return s, err
	}
	i := slices.IndexFunc(s.Denies, func(d Denied) bool { return d.ID == l.Deny })
	if i < 0 {
		return s, fault.New(op, fault.NotFound, "no deny %.64q is in force", l.Deny)
	}
	s = s.forget(s.Denies[i].ID, s.Denies[i].At)
	s.Denies = slices.Delete(slices.Clone(s.Denies), i, i+1)
	return s, nil
}

// Use counts one use of a grant. The empty id, that of what is allowed without a grant, counts nothing.
func (s State) Use(id string, now time.Time) (State, error) {
	const op = "grant.Use"
	if id == "" {
		return s, nil
	}
	for i, h := range s.Held {
		if h.ID != id {
			continue
		}
		if why := h.stale(now); why != "" {
			return s, fault.New(op, fault.Denied, "%s", why)
		}
		s.Held = slices.Clone(s.Held)
		s.Held[i].Used++
		return s, nil
	}
	return s, fault.New(op, fault.NotFound, "no grant %.64q", id)
}

// left is how many uses remain, -1 for any number.
func (h Held) left() int {
	if h.Grant.Uses == 0 {
		return -1
	}
	return max(0, int(h.Grant.Uses)-h.Used)
}

func (h Held) ended(now time.Time) bool {
	return !h.Grant.Until.IsZero() && !now.Before(h.Grant.Until)
}

func (h Held) spent() bool { return h.left() == 0 }

// stale says why a grant gives nothing now, "" where it does.
func (h Held) stale(now time.Time) string {
	g := h.Grant
	switch {
	case !h.RevokedAt.IsZero():
		return "the customer revoked the grant at " + h.RevokedAt.UTC().Format(time.RFC3339)
	case h.ended(now):
		return "the grant ended at " + g.Until.UTC().Format(time.RFC3339)
	case now.Before(g.From):
		return "the grant begins at " + g.From.UTC().Format(time.RFC3339)
	case h.spent():
		return "the grant's uses are spent"
	}
	return ""
}
