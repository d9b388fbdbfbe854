// SPDX-License-Identifier: Apache-2.0

package raft

import (
	"sync"
	"time"
)

// peerStatus is what members send each other of themselves. A request carries Addr only.
type peerStatus struct {
	Addr    string `json:"addr"`
	Last    uint64 `json:"last"`
	Applied uint64 `json:"applied"`
	About   []byte `json:"about,omitempty"`
	Clock   int64  `json:"clock,omitempty"` // ns since 1970
}

// presence is what a leader knows of its members. It is in memory, and is dropped when leadership is lost.
type presence struct {
	self    string
	silence time.Duration // how long a member may say nothing and still counts as heard from

	mu    sync.Mutex
	term  uint64
	since time.Time // of this leadership
	seen  map[string]*peer
	news  chan struct{} // closed when a member has answered
}

// peer is one member.
type peer struct {
	peerStatus
	heard  time.Time // last; zero: never
	stable time.Time // since when it has been heard from without a break
	asking bool
}

func newPresence(self string, silence time.Duration) *presence {
	return &presence{self: self, silence: silence, seen: map[string]*peer{}, news: make(chan struct{})}
}

// heard reports whether a member has answered lately.
func (p *presence) heard(id string) bool {
	if id == p.self {
		return true
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	s := p.seen[id]
	return s != nil && !s.heard.IsZero() && time.Since(s.heard) < p.silence
}

// last is the index of a member's last entry, and a channel that is closed at the next news.
func (p *presence) last(id string) (uint64, <-chan struct{}) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if s := p.seen[id]; s != nil {
		return s.Last, p.news
	}
	return 0, p.news
}

// about is what a member said about itself in a term; nil if it said nothing.
func (p *presence) about(id string, term uint64) []byte {
	p.mu.Lock()
	defer p.mu.Unlock()
	if s := p.seen[id]; s != nil && p.term == term {
		return s.About
	}
	return nil
}

// lead drops what was known in an earlier term.
func (p *presence) lead(term uint64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.term != term {
		p.term, p.since, p.seen = term, time.Now(), map[string]*peer{}
	}
}

// leading is since when this node has led, and a channel that is closed at the next news.
func (p *presence) leading() (time.Time, <-chan struct{}) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.since, p.news
}

// begin reports whether a member may be asked now: one request at a time.
func (p *presence) begin(id string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	s := p.seen[id]
	if s == nil {
		s = &peer{}
		p.seen[id] = s
	}
	if s.asking {
		return false
	}
	s.asking = true
	return true
}

// end takes the answer of a member, or that there was none.
func (p *presence) end(id string, status peerStatus, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	s := p.seen[id]
	if s == nil {
		return // of an earlier term
	}
	s.asking = false
	if err != nil {
		return
	}
	now := time.Now()
	if s.heard.IsZero() || now.Sub(s.heard) > p.silence {
		s.stable = now
	}
	s.peerStatus, s.heard = status, now
	close(p.news)
	p.news = make(chan struct{})
}

// describe fills in what is known of a member, but for this node itself, and returns since when this node has led.
func (p *presence) describe(members []MemberState) (since time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Now()
	for i := range members {
		m := &members[i]
		s := p.seen[m.ID]
		if m.ID == p.self || s == nil || s.heard.IsZero() {
			continue
		}
		m.Last, m.Applied, m.About, m.Silent = s.Last, s.Applied, s.About, now.Sub(s.heard).Milliseconds()
		if now.Sub(s.heard) < p.silence {
			m.Stable = max(1, s.heard.Sub(s.stable).Milliseconds())
		}
	}
	return p.since
}
