// SPDX-License-Identifier: Apache-2.0

package raft

import (
	"cmp"
	"context"
	"encoding/json"
	"log/slog"
	"slices"
	"time"

	hraft "github.com/hashicorp/raft"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/raft/clock"
	"github.com/demarc-dev/demarc/raft/forward"
)

const (
	maxAbout       = 64 << 10        // bytes of what a member says about itself
	advertiseEvery = 2               // heartbeats between the requests of a node that knows no leader
	clockEvery     = 5 * time.Second // how often a node that does not lead asks for the others' clocks
	clockRounds    = 3               // rounds in which a leader's own clock is off before it hands leadership over
)

// monitor exchanges status with the other members.
type monitor struct {
	cfg     *Config
	lib     *consensus
	life    *lifetime
	log     *slog.Logger
	calls   *forward.Client
	time    *timekeeper
	peers   *presence
	members *membership

	clockOff int // rounds, without a break, in which this leader's own clock was off; of run alone
}

// own is this node's status.
func (m *monitor) own() peerStatus {
	s := peerStatus{Addr: m.cfg.Self.Addr, Last: m.lib.raft.LastIndex(), Applied: m.lib.fsm.index.Load(),
		Clock: m.time.clocks.Now().UnixNano()}
	if m.cfg.About != nil {
		if s.About = m.cfg.About(); len(s.About) > maxAbout {
			s.About = nil
		}
	}
	return s
}

// run asks the members for their status while this node leads, and advertises this node's address while it knows no leader.
// All nodes ask for the clocks of the others, so that a node that begins to lead knows them.
func (m *monitor) run() {
	tick := time.NewTicker(m.cfg.Timing.Heartbeat)
	defer tick.Stop()
	var asked time.Time
	for alone := 0; ; {
		select {
		case <-m.life.ctx.Done():
			return
		case <-tick.C:
		case <-m.time.probe:
			m.peers.lead(m.lib.term())
			m.poll()
			continue
		case <-m.lib.fsm.configured:
			m.members.refresh()
			continue
		}
		m.members.refresh()
		_, followed := m.lib.other()
		switch {
		case m.lib.leads():
			alone = 0
			m.peers.lead(m.lib.term())
			m.poll()
			m.yieldLeadership()
			asked = time.Now()
		case followed:
			alone = 0
			if !m.time.agreed().Quorum || time.Since(asked) >= clockEvery {
				m.advertise()
				asked = time.Now()
			}
		default:
			if alone++; alone%advertiseEvery == 0 || alone == 1 && !m.time.agreed().Quorum {
				m.advertise()
			}
		}
	}
}

// poll asks each member for its status, and puts its address into the log if that changed.
func (m *monitor) poll() {
	for _, s := range m.lib.servers() {
		id := string(s.ID)
		if id == m.lib.self {
			if string(s.Address) != m.cfg.Self.Addr {
				m.life.work.Go(func() { m.recordAddress(id, m.cfg.Self.Addr) })
			}
			continue
		}
		if !m.peers.begin(id) {
			continue
		}
		m.life.work.Go(func() {
			status, err := m.query(m.life.ctx, id)
			m.peers.end(id, status, err)
			if err == nil && status.Addr != "" && status.Addr != string(s.Address) && m.lib.leads() {
				m.recordAddress(id, status.Addr)
			}
		})
	}
}

// recordAddress puts the address of a member into the log. If that fails the next round does it.
func (m *monitor) recordAddress(id, addr string) {
	err := m.members.change(m.life.ctx, Change{Do: Move, ID: id, Addr: addr})
	if err != nil && fault.Of(err) != fault.Busy {
		m.log.Warn("the new address of a member is not in the log yet", "node", id, "addr", addr, "err", err)
	}
}

// advertise tells the other members the address of this node, and reads their clocks.
func (m *monitor) advertise() {
	for _, id := range m.others() {
		if m.peers.begin(id) {
			m.life.work.Go(func() {
				status, err := m.query(m.life.ctx, id)
				m.peers.end(id, status, err)
			})
		}
	}
}

// others are the members of which this node knows, itself excepted.
func (m *monitor) others() []string {
	var out []string
	for _, s := range m.lib.servers() {
		if string(s.ID) != m.lib.self {
			out = append(out, string(s.ID))
		}
	}
	if len(out) == 0 {
		for _, f := range m.cfg.First {
			if f.ID != m.lib.self {
				out = append(out, f.ID)
			}
		}
	}
	return out
}

// query asks a member for its status.
func (m *monitor) query(ctx context.Context, id string) (peerStatus, error) {
	const op = "raft.status"
	ctx, cancel := context.WithTimeout(ctx, max(time.Second, 2*m.cfg.Timing.Heartbeat))
	defer cancel()
	var out peerStatus
	own, err := json.Marshal(peerStatus{Addr: m.cfg.Self.Addr})
	if err != nil {
		return out, fault.At(op, fault.Internal, err)
	}
	asked := m.time.clocks.Moment()
	b, err := m.calls.Call(ctx, id, kindStatus, own)
	if err != nil {
		return out, err
	}
	if err := json.Unmarshal(b, &out); err != nil {
		return out, fault.At(op, fault.Internal, err)
	}
	m.time.clocks.Record(id, out.Clock, asked)
	return out, nil
}

// cluster is Node.Members on the leader itself.
func (m *monitor) cluster() (Cluster, error) {
	if !m.lib.leads() {
		return Cluster{}, errNotLeader
	}
	last, clocks := m.lib.raft.LastIndex(), m.time.agreed()
	out := Cluster{Leader: m.lib.self, Term: m.lib.term()}
	for _, srv := range m.lib.servers() {
		out.Members = append(out.Members, MemberState{Member: Member{string(srv.ID), string(srv.Address)}, Role: roleOfServer(srv), Silent: -1})
	}
	out.Leads = time.Since(m.peers.describe(out.Members)).Milliseconds()
	for i := range out.Members {
		s := &out.Members[i]
		if s.ID == m.lib.self {
			own := m.own()
			s.Last, s.Applied, s.About, s.Silent, s.Stable = own.Last, own.Applied, own.About, 0, out.Leads
		}
		if d, known := clocks.Offset(m.time.of(s.ID)); known {
			ms := d.Milliseconds()
			s.ClockOffset = &ms
		}
		if last > s.Last {
			s.Lag = last - s.Last
		}
	}
	slices.SortFunc(out.Members, func(a, b MemberState) int { return cmp.Compare(a.ID, b.ID) })
	return out, nil
}

func roleOfServer(s hraft.Server) Role {
	if s.Suffrage == hraft.Voter {
		return Voter
	}
	return NonVoter
}

// about is what a member said about itself since this node leads; nil if it said nothing, or this node does not lead.
func (m *monitor) about(id string) []byte {
	if id == m.lib.self && m.cfg.About != nil {
		return m.cfg.About()
	}
	if !m.lib.leads() {
		return nil
	}
	return m.peers.about(id, m.lib.term())
}

// yieldLeadership makes a voter lead whose clock is right and that is heard from, if this leader's own clock has been off for
// several rounds.
func (m *monitor) yieldLeadership() {
	a := m.time.agreed()
	d := a.Off(m.time.own())
	if d == 0 {
		m.clockOff = 0
		return
	}
	if m.clockOff++; m.clockOff < clockRounds {
		return
	}
	for _, id := range a.With {
		if s, is := find(m.lib.servers(), id); !is || s.Suffrage != hraft.Voter || id == m.lib.self || !m.peers.heard(id) {
			continue
		}
		m.clockOff = 0
		m.log.Warn("the clock of this node is off: it hands leadership over", "clock", clock.Against(d), "against", a.Voters(), "to", id)
		m.life.work.Go(func() {
			if err := m.members.change(m.life.ctx, Change{Do: Transfer, ID: id}); err != nil {
				m.log.Warn("leadership was not handed over", "err", err)
			}
		})
		return
	}
}
