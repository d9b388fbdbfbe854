// SPDX-License-Identifier: Apache-2.0

package grant

import (
	"slices"
	"time"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/seal"
)

// State is what the customer has decided, as it stands in the customer's book. A copy by assignment is a copy: its lists
// are replaced whole, never edited. The documents were verified, and checked, before they get here.
type State struct {
	Held       []Held   `json:"held,omitempty"`
	Denies     []Denied `json:"denies,omitempty"`
	Lifted     []string `json:"lifted,omitempty"` // ids of denies that were taken back: they count no second time
	ObserveOff bool     `json:"observe_off,omitempty"`
}

// Give adds a grant. One that was there before, in whatever state, is refused. A grant is forgotten once it has run out:
// when it comes again then it gives nothing.
func (s State) Give(id string, g Grant, by []seal.KeyID, now time.Time) (State, error) {
	const op = "grant.Give"
	if err := g.Check(); err != nil {
		return s, err
	}
	if !g.Until.IsZero() && !now.Before(g.Until) {
		return s, fault.New(op, fault.Expired, "the grant ended at %s", g.Until.Format(time.RFC3339))
	}
	held := make([]Held, 0, len(s.Held)+1)
	for _, h := range s.Held {
		if h.ID == id {
			return s, fault.New(op, fault.Conflict, "this grant was given before: sign a new one")
		}
		if h.Grant.Until.IsZero() || now.Before(h.Grant.Until) {
			held = append(held, h)
		}
	}
	if len(held) >= MaxHeld {
		return s, fault.New(op, fault.Busy, "%d grants have not run out, and that is the most: give grants an end", len(held))
	}
	s.Held = append(held, Held{ID: id, Grant: g, Since: now, By: slices.Clone(by)})
	if g.Phase == fleet.Observe {
		s.ObserveOff = false
	}
	return s, nil
}

// Revoke ends grants and says which. To revoke what is not there, or is revoked, is no error: what counts is that
// afterwards it is not granted. Only a single grant must exist, so that a slip of the pen is seen.
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
		}
	}
	if r.Grant != "" && !found {
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
	if slices.Contains(s.Lifted, id) {
		return s, fault.New(op, fault.Conflict, "this deny was lifted: sign a new one")
	}
	for _, h := range s.Denies {
		if h.ID == id || h.Name == d.Name {
			return s, fault.New(op, fault.Conflict, "a deny %q is in force already", d.Name)
		}
	}
	if len(s.Denies) >= MaxDenies {
		return s, fault.New(op, fault.Busy, "%d denies are in force, and that is the most", len(s.Denies))
	}
	s.Denies = append(slices.Clone(s.Denies), Denied{id, d.Name, d.Cedar, now, slices.Clone(by)})
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
	if len(s.Lifted) >= MaxLifted {
		return s, fault.New(op, fault.Busy, "%d denies were lifted, and that is the most", len(s.Lifted))
	}
	s.Denies = slices.Delete(slices.Clone(s.Denies), i, i+1)
	s.Lifted = append(slices.Clone(s.Lifted), l.Deny)
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

// stale says why a grant gives nothing now, "" where it does.
func (h Held) stale(now time.Time) string {
	g := h.Grant
	switch {
	case !h.RevokedAt.IsZero():
		return "the customer revoked the grant at " + h.RevokedAt.UTC().Format(time.RFC3339)
	case !g.Until.IsZero() && !now.Before(g.Until):
		return "the grant ended at " + g.Until.UTC().Format(time.RFC3339)
	case now.Before(g.From):
		return "the grant begins at " + g.From.UTC().Format(time.RFC3339)
	case g.Uses > 0 && h.Used >= g.Uses:
		return "the grant's uses are spent"
	}
	return ""
}
