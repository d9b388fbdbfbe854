// SPDX-License-Identifier: Apache-2.0

package raft

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"slices"
	"sync"
	"time"

	hraft "github.com/hashicorp/raft"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/raft/forward"
)

// weather is what a member says of itself when it is asked, and what who asks says of itself.
type weather struct {
	Addr    string `json:"addr"`
	Last    uint64 `json:"last"`
	Applied uint64 `json:"applied"`
	About   []byte `json:"about,omitempty"`
	Clock   int64  `json:"clock,omitempty"` // ns since 1970, in an answer
}

const (
	maxAbout   = 64 << 10 // bytes of what a member says about itself
	maxAddr    = 512      // bytes of an address
	helloEvery = 2        // heartbeats between the questions of a node that knows no leader
)

// watch is what a leader knows of its members. It is weather: in memory, and forgotten with the lead.
type watch struct {
	mu    sync.Mutex
	term  uint64
	since time.Time // of the lead
	seen  map[string]*sight
	moved chan struct{} // closed when a member said something new
}

type sight struct {
	weather
	heard, stable time.Time // last, and the first without a gap
	asking        bool
}

func newWatch() *watch { return &watch{seen: map[string]*sight{}, moved: make(chan struct{})} }

// gap is how long a member may be silent and still is heard from.
func (n *Node) gap() time.Duration { return max(4*n.cfg.Timing.Heartbeat, time.Second) }

func (w *watch) heard(n *Node, id string) bool {
	if id == n.cfg.Self.ID {
		return true
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	s := w.seen[id]
	return s != nil && !s.heard.IsZero() && time.Since(s.heard) < n.gap()
}

func (w *watch) last(id string) (uint64, <-chan struct{}) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if s := w.seen[id]; s != nil {
		return s.Last, w.moved
	}
	return 0, w.moved
}

// began forgets what an earlier lead knew.
func (w *watch) began(term uint64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.term != term {
		w.term, w.since, w.seen = term, time.Now(), map[string]*sight{}
	}
}

func (w *watch) begun() (time.Time, <-chan struct{}) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.since, w.moved
}

// begin tells whether a member may be asked now: one question at a time.
func (w *watch) begin(id string) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	s := w.seen[id]
	if s == nil {
		s = &sight{}
		w.seen[id] = s
	}
	if s.asking {
		return false
	}
	s.asking = true
	return true
}

func (w *watch) end(id string, said weather, err error, gap time.Duration) {
	w.mu.Lock()
	defer w.mu.Unlock()
	s := w.seen[id]
	if s == nil {
		return // of an earlier lead
	}
	s.asking = false
	if err != nil {
		return
	}
	now := time.Now()
	if s.heard.IsZero() || now.Sub(s.heard) > gap {
		s.stable = now
	}
	s.weather, s.heard = said, now
	close(w.moved)
	w.moved = make(chan struct{})
}

func (w *watch) cluster(n *Node) Cluster {
	all, last, clocks := n.servers(), n.raft.LastIndex(), n.agreed()
	w.mu.Lock()
	defer w.mu.Unlock()
	now := time.Now()
	out := Cluster{Leader: n.cfg.Self.ID, Term: n.raft.CurrentTerm(), Leads: now.Sub(w.since).Milliseconds()}
	for _, srv := range all {
		m := MemberState{Member: Member{string(srv.ID), string(srv.Address)}, Role: roleOfServer(srv), Silent: -1}
		if m.ID == n.cfg.Self.ID {
			own := n.weather()
			m.Last, m.Applied, m.About, m.Silent, m.Stable = own.Last, own.Applied, own.About, 0, out.Leads
		} else if s := w.seen[m.ID]; s != nil && !s.heard.IsZero() {
			m.Last, m.Applied, m.About, m.Silent = s.Last, s.Applied, s.About, now.Sub(s.heard).Milliseconds()
			if now.Sub(s.heard) < n.gap() {
				m.Stable = max(1, s.heard.Sub(s.stable).Milliseconds())
			}
		}
		if d, known := clocks.Offset(n.clockOf(m.ID)); known {
			ms := d.Milliseconds()
			m.ClockOffset = &ms
		}
		if last > m.Last {
			m.Lag = last - m.Last
		}
		out.Members = append(out.Members, m)
	}
	slices.SortFunc(out.Members, func(a, b MemberState) int { return compareIDs(a.ID, b.ID) })
	return out
}

func compareIDs(a, b string) int {
	switch {
	case a < b:
		return -1
	case a > b:
		return 1
	}
	return 0
}

func roleOfServer(s hraft.Server) Role {
	if s.Suffrage == hraft.Voter {
		return Voter
	}
	return NonVoter
}

func (n *Node) weather() weather {
	w := weather{Addr: n.cfg.Self.Addr, Last: n.raft.LastIndex(), Applied: n.fsm.index.Load(), Clock: n.clocks.Now().UnixNano()}
	if n.cfg.About != nil {
		if w.About = n.cfg.About(); len(w.About) > maxAbout {
			w.About = nil
		}
	}
	return w
}

// watchMembers asks the members how they are while this node leads, and tells them where it is while it knows no leader. All
// nodes ask for the clocks of the others, so that who begins to lead knows them.
func (n *Node) watchMembers() {
	tick := time.NewTicker(n.cfg.Timing.Heartbeat)
	defer tick.Stop()
	var looked time.Time
	for alone := 0; ; {
		select {
		case <-n.ctx.Done():
			return
		case <-tick.C:
		case <-n.probe:
			n.watch.began(n.raft.CurrentTerm())
			n.look()
			continue
		case <-n.fsm.configured:
			n.refresh()
			continue
		}
		n.refresh()
		id, known := n.Leader()
		switch {
		case n.leads():
			alone = 0
			n.watch.began(n.raft.CurrentTerm())
			n.look()
			n.yieldLeadership()
			looked = time.Now()
		case known && id != n.cfg.Self.ID:
			alone = 0
			if !n.agreed().Quorum || time.Since(looked) >= clockEvery {
				n.hello()
				looked = time.Now()
			}
		default:
			if alone++; alone%helloEvery == 0 || alone == 1 && !n.agreed().Quorum {
				n.hello()
			}
		}
	}
}

// look asks each member, and puts into the log where it is, if that changed.
func (n *Node) look() {
	for _, s := range n.servers() {
		id := string(s.ID)
		if id == n.cfg.Self.ID {
			if string(s.Address) != n.cfg.Self.Addr {
				n.work.Go(func() { n.moves(id, n.cfg.Self.Addr) })
			}
			continue
		}
		if !n.watch.begin(id) {
			continue
		}
		n.work.Go(func() {
			said, err := n.weatherOf(n.ctx, id)
			n.watch.end(id, said, err, n.gap())
			if err == nil && said.Addr != "" && said.Addr != string(s.Address) && n.leads() {
				n.moves(id, said.Addr)
			}
		})
	}
}

// moves records the address that a member gave. That it can't be recorded now is mended at the next look.
func (n *Node) moves(id, addr string) {
	if err := n.change(n.ctx, Change{Do: Move, ID: id, Addr: addr}); err != nil && fault.Of(err) != fault.Busy {
		n.log.Warn("the new address of a member is not in the log yet", "node", id, "addr", addr, "err", err)
	}
}

// hello lets the other members know where this node is.
func (n *Node) hello() {
	for _, id := range n.others() {
		if n.watch.begin(id) {
			n.work.Go(func() {
				said, err := n.weatherOf(n.ctx, id)
				n.watch.end(id, said, err, n.gap())
			})
		}
	}
}

// others are the members that this node knows of, itself excepted.
func (n *Node) others() []string {
	var out []string
	for _, s := range n.servers() {
		if string(s.ID) != n.cfg.Self.ID {
			out = append(out, string(s.ID))
		}
	}
	if len(out) == 0 {
		for _, m := range n.cfg.First {
			if m.ID != n.cfg.Self.ID {
				out = append(out, m.ID)
			}
		}
	}
	return out
}

// weather asks a member how it is.
func (n *Node) weatherOf(ctx context.Context, id string) (weather, error) {
	const op = "raft.weather"
	ctx, cancel := context.WithTimeout(ctx, max(time.Second, 2*n.cfg.Timing.Heartbeat))
	defer cancel()
	var out weather
	own, err := json.Marshal(weather{Addr: n.cfg.Self.Addr})
	if err != nil {
		return out, fault.At(op, fault.Internal, err)
	}
	asked := n.clocks.Moment()
	b, err := n.calls.Call(ctx, id, kindStatus, own)
	if err != nil {
		return out, err
	}
	if err := json.Unmarshal(b, &out); err != nil {
		return out, fault.At(op, fault.Internal, err)
	}
	n.clocks.Record(id, out.Clock, asked)
	return out, nil
}

// members is where members are, and which are gone. It follows the log.
type members struct {
	mu     sync.Mutex
	file   map[string]string // the list of the config
	hints  map[string]string // where a member itself said that it is
	at     uint64            // index of the newest committed configuration that this node knows the index of
	known  map[string]bool   // in the newest configuration
	logged map[string]string // where that says they are
	gone   map[string]bool   // were in an earlier one of this process, and are not in the newest
}

func newMembers(first []Member) *members {
	m := &members{file: map[string]string{}, hints: map[string]string{}, known: map[string]bool{}, gone: map[string]bool{}}
	for _, f := range first {
		m.file[f.ID] = f.Addr
	}
	return m
}

func (m *members) index() uint64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.at
}

func (m *members) passed(index uint64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.at = max(m.at, index)
}

func (m *members) hint(id, addr string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if _, known := m.file[id]; known || m.known[id] {
		m.hints[id] = addr
	}
}

func (m *members) isGone(id string) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.gone[id]
}

// follow takes the newest configuration, and tells who is gone by it.
func (m *members) follow(all []hraft.Server) (left []string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	is := map[string]bool{}
	for _, s := range all {
		is[string(s.ID)] = true
		delete(m.gone, string(s.ID))
	}
	for id := range m.known {
		if !is[id] {
			m.gone[id] = true
			delete(m.hints, id)
			left = append(left, id)
		}
	}
	m.known, m.logged = is, map[string]string{}
	for _, s := range all {
		m.logged[string(s.ID)] = string(s.Address)
	}
	return left
}

// refresh follows the log: whoever is no member any more is cut off at once.
func (n *Node) refresh() {
	all := n.servers()
	if len(all) == 0 {
		return
	}
	if n.members.index() == 0 { // they came with a snapshot
		at, err := n.disk.Snapshots.ConfigurationIndex()
		if err != nil {
			n.log.Warn("the members of the snapshot can't be read", "err", err)
		}
		n.members.passed(at)
	}
	for _, id := range n.members.follow(all) {
		if id != n.cfg.Self.ID {
			n.log.Warn("a node is no member any more: its connections end", "node", id)
			n.net.kick(id)
			n.calls.Forget(id)
		}
	}
}

// where lists the addresses at which a member may be, the likeliest first.
func (n *Node) where(id string) []string {
	var out []string
	n.members.mu.Lock()
	hint, file := n.members.hints[id], n.members.file[id]
	logged := n.members.logged[id]
	n.members.mu.Unlock()
	for _, a := range []string{hint, logged, file} {
		if a != "" && !slices.Contains(out, a) {
			out = append(out, a)
		}
	}
	return out
}

// tellGone tells a node that it was removed; where it can't be told it learns it from the first peer that it calls.
func (n *Node) tellGone(id, addr string, index uint64) {
	ctx, cancel := context.WithTimeout(n.ctx, max(time.Second, 2*n.cfg.Timing.Election))
	defer cancel()
	c, err := n.net.dial(ctx, id, addr, ProtoForward)
	if err != nil {
		n.log.Info("a removed node was not told: it is not reached", "node", id, "err", err)
		return
	}
	defer c.Abort()
	err = forward.CallRemoved(c, index)
	n.log.Info("a removed node was told", "node", id, "err", err)
}

// serveMembers answers the questions about members.
func (n *Node) serveMembers(ctx context.Context, by string, kind forward.Kind, payload []byte) ([]byte, error) {
	const op = "raft.serve"
	switch kind {
	case kindStatus:
		var said weather
		if err := json.Unmarshal(payload, &said); err != nil || len(said.Addr) > maxAddr {
			return nil, fault.New(op, fault.Invalid, "a member that says where it is in no way that this build understands")
		}
		if by != "" && said.Addr != "" {
			n.members.hint(by, said.Addr)
		}
		return json.Marshal(n.weather())
	case kindMembers:
		c, err := n.cluster()
		if err != nil {
			return nil, err
		}
		return json.Marshal(c)
	case kindChange:
		var c Change
		if err := json.Unmarshal(payload, &c); err != nil || len(c.Addr) > maxAddr {
			return nil, fault.New(op, fault.Invalid, "a change of the members that this build does not understand")
		}
		return nil, n.change(ctx, c)
	}
	if len(payload) != 8 {
		return nil, fault.New(op, fault.Invalid, "a removal without its index")
	}
	n.told(by, binary.BigEndian.Uint64(payload))
	return nil, nil
}

// told takes the word of a peer that this node is no member by the configuration of an index. An older one than that
// which this node knows says nothing, and a node that knows none yet waits to be added.
func (n *Node) told(by string, index uint64) {
	at, all := n.members.index(), n.servers()
	if _, is := find(all, n.cfg.Self.ID); at == 0 || len(all) == 0 || is && index <= at {
		return
	}
	n.fsm.fail(fault.Because(ErrGone, "raft.removed", fault.Denied, "node %q says that this node, %q, was removed from the cluster: it stops for good. Disable its unit (systemctl disable) and wipe its directory; the machine can be added again only under another name", by, n.cfg.Self.ID))
}
