// SPDX-License-Identifier: Apache-2.0

package controlplane

import (
	"context"
	"time"

	"github.com/demarc-dev/demarc/daemon/controlplane/book"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/raft"
)

// pilotEvery is how often the leader looks at its members.
const pilotEvery = 10 * time.Second

// Next is the one thing that autopilot does now, none where Do is empty.
type Next struct{ Do, ID, Why string }

// Decide says what the policy asks for, given what the leader sees. It removes a dead voter only where a majority of all
// voters is heard from, at least the floor's number of voters stays, and a stable non-voter stands ready to take the place,
// unless the operator does without. One step at a time: a stable non-voter that is wanted as a voter is promoted first.
func Decide(p book.Autopilot, all raft.Cluster, wanted func(id string) bool) Next {
	var voters, heard int
	var dead []raft.MemberState
	var ready []raft.MemberState
	for _, m := range all.Members {
		alive := m.ID == all.Leader || m.Heard()
		switch {
		case m.Role == raft.Voter:
			voters++
			if alive {
				heard++
			} else if silentTooLong(p, m, all) {
				dead = append(dead, m)
			}
		case alive && wanted(m.ID) && m.Lag <= maxLag && time.Duration(m.Stable)*time.Millisecond >= p.Stabilization:
			ready = append(ready, m)
		}
	}
	if heard < voters/2+1 {
		return Next{}
	}
	// A voter more than an even number makes the cluster bear more; in the place of a dead one it is wanted anyway.
	if p.PromoteStable && len(ready) > 0 && (len(dead) > 0 || voters%2 == 0 || voters < p.Floor) {
		return Next{raft.Promote, ready[0].ID, "it is stable, and wanted as a voter"}
	}
	if !p.RemoveDead || len(dead) == 0 {
		return Next{}
	}
	replaced := len(ready) > 0 || heard >= p.Floor
	if voters-1 < p.Floor || heard < (voters-1)/2+1 || !replaced && !p.WithoutReplacement {
		return Next{}
	}
	return Next{raft.Remove, dead[0].ID, "it has been silent for too long"}
}

// maxLag is how many entries a member may be behind that counts as caught up.
const maxLag = 256

// silentTooLong reports whether a member has been silent for too long. One that was never heard counts from the beginning of the lead.
func silentTooLong(p book.Autopilot, m raft.MemberState, all raft.Cluster) bool {
	silent := m.Silent
	if silent < 0 {
		silent = all.Leads
	}
	return time.Duration(silent)*time.Millisecond >= p.DeadAfter
}

// Pilot does what the policy asks for while this node leads, until ctx ends.
func (s *Server) Pilot(ctx context.Context) error {
	m, err := s.membership()
	if err != nil {
		return err
	}
	tick := time.NewTicker(pilotEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		if policy := s.replica.View().Pilot(); s.replica.Leader() == s.replica.Node && (policy.RemoveDead || policy.PromoteStable) {
			if err := s.steer(ctx, m, policy); err != nil && ctx.Err() == nil {
				s.log.Warn("autopilot could not do what it is told to", "err", fault.Text(err))
			}
		}
	}
}

func (s *Server) steer(ctx context.Context, m Membership, policy book.Autopilot) error {
	ctx, cancel := context.WithTimeout(ctx, pilotEvery)
	defer cancel()
	all, err := m.Members(ctx)
	if err != nil {
		return err
	}
	page := s.replica.View()
	next := Decide(policy, all, func(id string) bool {
		p, ok := page.Peer(id)
		return ok && p.Voter && !p.Removed && page.ReadyToVote(id) == nil
	})
	if next.Do == "" || all.Leader != s.replica.Node {
		return nil
	}
	s.log.Warn("autopilot changes the members", "do", next.Do, "node", next.ID, "why", next.Why)
	if err := m.Change(ctx, raft.Change{Do: next.Do, ID: next.ID}); err != nil {
		return err
	}
	if next.Do == raft.Remove {
		_, err = book.Submit(ctx, s.replica, s.replica.Self(), "", s.replica.View().RemoveNode(book.RemoveNode{Name: next.ID, Reason: "autopilot: " + next.Why}))
		return err
	}
	_, err = book.Submit(ctx, s.replica, s.replica.Self(), "", book.NodeChanged{Do: "autopilot " + next.Do, Name: next.ID})
	return err
}
