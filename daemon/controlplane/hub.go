// SPDX-License-Identifier: Apache-2.0

package controlplane

import (
	"context"
	"time"

	"github.com/benbjohnson/immutable"

	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/identity"
)

// Follow wakes the channels of those appliances that the book changed, and closes the connections of operators whose
// certificate passes no more, until ctx ends. One goroutine follows the book
// for all channels of the node: a change of one appliance costs nothing to the others.
func (s *Server) Follow(ctx context.Context, ready func()) error {
	var at *touch
	var slots *identity.Slot
	var operators *immutable.SortedMap[string, Operator]
	ready()
	for {
		changed := s.book.Changed()
		page := s.book.View()
		names, ok := page.appliances.since(at)
		at = page.appliances.last
		var now *identity.Slot // the slots are replaced whole, so another first one is another list
		if len(page.Slots) > 0 {
			now = &page.Slots[0]
		}
		if !ok || now != slots {
			for _, l := range s.channels.all() {
				s.look(page, l)
			}
		} else {
			for _, name := range names {
				if l := s.channels.get(name); l != nil {
					s.look(page, l)
				}
			}
		}
		slots = now
		if page.operators != operators { // the map is another one after each change
			s.sessions.end(func(p fleet.Principal, serial fleet.Serial) error { return page.passes(p, serial) })
			operators = page.operators
		}
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		}
	}
}

// look acts on what a page says of an appliance that has a channel here. It never waits.
func (s *Server) look(page State, l *live) {
	a, err := page.Appliance(l.name)
	if err == nil {
		err = a.admits(l.serial)
	}
	if err != nil {
		go l.end(err)
		return
	}
	if !a.Online { // the edge of an older channel came late
		go s.assert(l, a.Route)
	}
	l.wake()
}

// assert repeats that an appliance is here, as long as it is.
func (s *Server) assert(l *live, route string) {
	ctx, cancel := context.WithTimeout(context.Background(), submitFor)
	defer cancel()
	if s.channels.get(l.name) != l || l.ended.Load() != nil {
		return
	}
	if err := s.came(ctx, l, route); err != nil {
		s.log.Warn("could not record that an appliance is here", "appliance", l.name, "error", err)
	}
}

// absentAfter is how long after its start a node takes those for gone that it held before and that did not come back.
const absentAfter = 90 * time.Second

// RollCall puts on record, once after a start, which of the appliances that the book shows here did not come back.
func (s *Server) RollCall(ctx context.Context, after time.Duration) error {
	select {
	case <-ctx.Done():
		return nil
	case <-time.After(after):
	}
	var missing []fleet.ApplianceID
	for _, a := range s.book.View().Appliances() {
		if a.Online && a.Node == s.name && s.channels.get(a.Name) == nil {
			missing = append(missing, a.Name)
		}
	}
	if len(missing) > 0 {
		s.log.Info("appliances did not come back after the start", "count", len(missing))
	}
	for _, name := range missing {
		if ctx.Err() != nil {
			return nil
		}
		if s.channels.get(name) == nil {
			s.gone(name)
		}
	}
	return nil
}
