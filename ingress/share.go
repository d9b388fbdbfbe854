// SPDX-License-Identifier: Apache-2.0

package ingress

import (
	"log/slog"
	"net/netip"
	"sync"
	"time"
)

// Refusal is why a gate turned away somebody whom the plan admits. The set is closed.
type Refusal string

// The refusals.
const (
	SourceConnections Refusal = "source_connections" // one source holds as many connections as it may
	SourceRequests    Refusal = "source_requests"    // one source has as many requests under way as it may
	AllConnections    Refusal = "connections"        // all sources together hold as many connections as there may be
	AllRequests       Refusal = "requests"           // all sources together have as many requests under way as there may be
)

// Refusals lists the closed set.
func Refusals() []Refusal {
	return []Refusal{SourceConnections, SourceRequests, AllConnections, AllRequests}
}

// share bounds how much of one kind all sources hold at once, and how much of it each. A source is an IPv4 address, or the 64 bits of
// an IPv6 address that a provider hands to one customer; the 48 bits of a site may hold twice as much. Safe for concurrent use.
type share struct {
	most, each int

	mu   sync.Mutex
	all  int
	held map[netip.Prefix]int
}

func newShare(most, each int) *share {
	return &share{most: most, each: min(each, most), held: map[netip.Prefix]int{}}
}

// bound is a network and how much it may hold.
type bound struct {
	network netip.Prefix
	most    int
}

func (s *share) bounds(source netip.Addr) []bound {
	source = source.Unmap().WithZone("")
	if source.Is4() {
		return []bound{{netip.PrefixFrom(source, 32), s.each}}
	}
	site, _ := source.Prefix(48) // both fail for an invalid address only, which is a source of its own
	lan, _ := source.Prefix(64)
	return []bound{{lan, s.each}, {site, 2 * s.each}}
}

// take counts one more of a source. It reports whether all together hold as much as they may (full), or the source does (mine): then
// nothing is counted.
func (s *share) take(source netip.Addr) (full, mine bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.all >= s.most {
		return true, false
	}
	if !s.add(source) {
		return false, true
	}
	s.all++
	return false, false
}

// takeUnnamed counts one more whose source is not known yet. It reports whether there is room.
func (s *share) takeUnnamed() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.all >= s.most {
		return false
	}
	s.all++
	return true
}

// name counts one that was taken unnamed as its source's. It reports whether the source may hold it.
func (s *share) name(source netip.Addr) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.add(source)
}

func (s *share) add(source netip.Addr) bool {
	bounds := s.bounds(source)
	for _, b := range bounds {
		if s.held[b.network] >= b.most {
			return false
		}
	}
	for _, b := range bounds {
		s.held[b.network]++
	}
	return true
}

// drop takes one of a source off the count.
func (s *share) drop(source netip.Addr) {
	s.dropUnnamed()
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, b := range s.bounds(source) {
		if s.held[b.network]--; s.held[b.network] <= 0 {
			delete(s.held, b.network)
		}
	}
}

// dropUnnamed takes one off the count that was never named.
func (s *share) dropUnnamed() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.all--
}

// noticeEvery is how long a line of the log is not repeated.
const noticeEvery = time.Minute

// notices writes a line of each kind at most once in [noticeEvery], with how many were left out since the last. What strangers do at a door
// fills no log. Safe for concurrent use.
type notices struct {
	log *slog.Logger

	mu   sync.Mutex
	last map[string]*notice
}

type notice struct {
	at   time.Time
	left int
}

// warn writes a line, or counts it. The messages are few: they are constants of this package.
func (n *notices) warn(message string, args ...any) {
	now := time.Now()
	n.mu.Lock()
	if n.last == nil {
		n.last = map[string]*notice{}
	}
	one := n.last[message]
	if one != nil && now.Sub(one.at) < noticeEvery {
		one.left++
		n.mu.Unlock()
		return
	}
	left := 0
	if one != nil {
		left = one.left
	}
	n.last[message] = &notice{at: now}
	n.mu.Unlock()
	if left > 0 {
		args = append(args, "not_logged", left)
	}
	n.log.Warn(message, args...)
}

// refused counts a refusal and says it.
func (g *Gate) refused(why Refusal, door string, source netip.Addr) {
	if g.cfg.Refused != nil {
		g.cfg.Refused(why)
	}
	switch why {
	case SourceConnections:
		g.notices.warn("a source holds as many connections as one may: more are closed at accept",
			"door", door, "source", source, "most", g.conned.each)
	case SourceRequests:
		g.notices.warn("a source has as many requests under way as one may: more are told to come back",
			"door", door, "source", source, "most", g.asked.each)
	case AllConnections:
		g.notices.warn("the doors hold as many connections as they may: more are closed at accept", "door", door, "most", g.conned.most)
	case AllRequests:
		g.notices.warn("the doors have as many requests under way as they may: more are told to come back", "door", door, "most", g.asked.most)
	}
}
