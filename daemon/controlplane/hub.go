// SPDX-License-Identifier: Apache-2.0

package controlplane

import (
	"context"
	"time"

	"github.com/demarc-dev/demarc/daemon/controlplane/book"
	"github.com/demarc-dev/demarc/fleet"
)

// Follow wakes the channels of those appliances that the book changed, and closes the connections whose peer's certificate passes no
// more, or is of a CA that was retired, until ctx ends. One goroutine follows the book
// for all channels of the node: a change of one appliance costs nothing to the others.
func (s *Server) Follow(ctx context.Context, ready func()) error {
	var at book.ApplianceVersion
	var cas, passes book.Version
	ready()
	for {
		changed := s.replica.Changed()
		page := s.replica.View()
		names, ok := page.ChangedSince(at)
		at = page.ApplianceVersion()
		now := page.CAVersion()
		if !ok || now != cas {
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
		cas = now
		if now := page.PassesVersion(); now != passes {
			s.sessions.end(page.StillAccepts)
			passes = now
		}
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		}
	}
}

// look acts on what a page says of an appliance that has a channel here. It never waits.
func (s *Server) look(page book.State, l *live) {
	a, err := l.admitted(page)
	if err != nil {
		go l.end(err)
		return
	}
	s.owed(page, l)
	if !a.Online { // the edge of an older channel came late
		go s.assert(l, a.Route)
	}
	l.wake()
}

// assert repeats that an appliance is here, as long as it is.
func (s *Server) assert(l *live, route string) {
	ctx, cancel := context.WithTimeout(l.life, submitFor)
	defer cancel()
	if s.channels.get(l.name) != l || l.ended.Load() != nil {
		return
	}
	if err := s.came(ctx, l, route); err != nil && l.life.Err() == nil {
		s.log.Warn("could not record that an appliance is here", "appliance", l.name, "error", err)
	}
}

// absentAfter is how long after its start a node takes those for gone that it held before and that did not come back.
const absentAfter = 90 * time.Second

// leaveWait bounds the word of a node that it stops.
const leaveWait = 2 * time.Second

// rollEvery is how often it is looked whether all are back.
const rollEvery = time.Second

// RollCall puts on record, once after a start, which of the appliances that the book shows here did not come back: as soon
// as all are back, and then there are none, or after that time. A restart that everybody survived costs the entry by which
// the node said that it stops, and one here.
func (s *Server) RollCall(ctx context.Context, after time.Duration) {
	tick := time.NewTicker(min(rollEvery, after))
	defer tick.Stop()
	missing, stopped := s.missing()
	for till := time.Now().Add(after); len(missing) > 0 && time.Now().Before(till); missing, stopped = s.missing() {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
	if len(missing) > 0 {
		s.log.Info("appliances did not come back after the start", "count", len(missing))
	}
	for stopped || len(missing) > 0 {
		n := min(len(missing), book.MaxRoll)
		if ctx.Err() != nil || !s.roll(ctx, book.NodeRoll{Name: s.replica.Node, Missing: missing[:n], More: n < len(missing)}) {
			return
		}
		missing = missing[n:]
		stopped = false
	}
}

// missing lists the appliances that the book shows here and that have no channel, and tells whether the book says that this
// node stopped.
func (s *Server) missing() (out []fleet.ApplianceID, stopped bool) {
	page := s.replica.View()
	for _, a := range page.Appliances() {
		if a.Online && a.Node == s.replica.Node && s.channels.get(a.Name) == nil {
			out = append(out, a.Name)
		}
	}
	stopped = page.Stopped(s.replica.Node)
	return out, stopped
}

// roll submits until it is on record or ctx ends.
func (s *Server) roll(ctx context.Context, c book.NodeRoll) bool {
	id := book.DrawRequestID()
	for wait := time.Second; ; wait = min(2*wait, time.Minute) {
		_, err := book.Submit(ctx, s.replica, s.replica.Self(), id, c)
		if err == nil {
			return true
		}
		if ctx.Err() == nil {
			s.log.Warn("the roll of this node is not on record yet", "error", err)
		}
		select {
		case <-ctx.Done():
			return false
		case <-time.After(wait):
		}
	}
}

// Leave puts on record that this node stops. It is called before the doors end, so that the end of each channel needs no
// entry of its own; where it can't be recorded, each gets one.
func (s *Server) Leave(ctx context.Context) {
	if _, err := book.Submit(ctx, s.replica, s.replica.Self(), "", book.NodeStops{Name: s.replica.Node}); err != nil {
		s.log.Warn("could not record that this node stops", "error", err)
		return
	}
	s.leaving.Store(true)
}

// here tells whether an appliance has a channel. A node knows its own better than the book while it calls the roll.
func (s *Server) here(page book.State, a book.Appliance) bool {
	if a.Node == s.replica.Node && !s.leaving.Load() {
		return a.Online && s.channels.get(a.Name) != nil
	}
	return page.Here(a)
}
