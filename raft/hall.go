// SPDX-License-Identifier: Apache-2.0

package raft

import (
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"
)

// Bounds of the listener. Who has proven who it is does not count among the greetings.
const (
	greetingsMax  = 128 // handshakes under way
	greetingsEach = 32  // of one source
	peerConns     = 64  // connections with one member, in either direction; the oldest gives way

	refusalBurst = 5                // lines of the log about refused callers
	refusalEvery = 10 * time.Second // and one more in this time; each tells how many were left out
)

// hall is the handshakes under way at the listener. A newcomer always gets in: at a bound one gives way, of the source that is at
// its own, else of the one that has the most; one that has said nothing before one that spoke, and the oldest of those. So those
// who say nothing keep nobody out, however many they are, and a peer's handshake, which takes some milliseconds, is not cut off for
// those of others.
type hall struct {
	strange, proven lines

	mu   sync.Mutex
	seq  uint64
	all  map[*greeting]struct{}
	from map[string]int
}

// greeting is a connection whose handshake is not done.
type greeting struct {
	net.Conn
	source string
	seq    uint64 // in the order of arrival
	spoke  atomic.Bool
}

// lines bounds what the log says of refused callers of one kind, so that strangers do not hide what members do.
type lines struct {
	lim  *rate.Limiter
	left int
}

func newHall() *hall {
	r := func() lines { return lines{lim: rate.NewLimiter(rate.Every(refusalEvery), refusalBurst)} }
	return &hall{strange: r(), proven: r(), all: map[*greeting]struct{}{}, from: map[string]int{}}
}

// Read implements net.Conn.
func (g *greeting) Read(b []byte) (int, error) {
	n, err := g.Conn.Read(b)
	if n > 0 && !g.spoke.Load() {
		g.spoke.Store(true)
	}
	return n, err
}

// NetConn gives the connection beneath.
func (g *greeting) NetConn() net.Conn { return g.Conn }

// enter counts a newcomer in, and ends the one that gives way.
func (h *hall) enter(c net.Conn) *greeting {
	g := &greeting{Conn: c, source: sourceOf(c)}
	h.mu.Lock()
	var out *greeting
	switch {
	case h.from[g.source] >= greetingsEach:
		out = h.worst(g.source)
	case len(h.all) >= greetingsMax:
		most := ""
		for from, n := range h.from {
			if n > h.from[most] {
				most = from
			}
		}
		out = h.worst(most)
	}
	if out != nil {
		h.drop(out)
	}
	h.seq++
	g.seq = h.seq
	h.all[g] = struct{}{}
	h.from[g.source]++
	h.mu.Unlock()
	if out != nil {
		_ = out.Close()
	}
	return g
}

// worst is the one of a source that gives way. The lock is held.
func (h *hall) worst(source string) (out *greeting) {
	for g := range h.all {
		if g.source != source {
			continue
		}
		if out == nil || out.spoke.Load() && !g.spoke.Load() || out.spoke.Load() == g.spoke.Load() && g.seq < out.seq {
			out = g
		}
	}
	return out
}

// leave takes one out whose handshake is over. It may be called again.
func (h *hall) leave(g *greeting) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.drop(g)
}

func (h *hall) drop(g *greeting) {
	if _, ok := h.all[g]; !ok {
		return
	}
	delete(h.all, g)
	if h.from[g.source]--; h.from[g.source] == 0 {
		delete(h.from, g.source)
	}
}

// refuses reports whether a lines is logged now, and how many of its kind before it were not.
func (h *hall) refuses(proven bool) (now bool, left int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	r := &h.strange
	if proven {
		r = &h.proven
	}
	if !r.lim.Allow() {
		r.left++
		return false, 0
	}
	left, r.left = r.left, 0
	return true, left
}

// sourceOf is the network that a caller comes from: an IPv4 address, or 64 bits of an IPv6 one; "" where that is not known.
func sourceOf(c net.Conn) string {
	a := c.RemoteAddr()
	if a == nil {
		return ""
	}
	at, err := netip.ParseAddrPort(a.String())
	if err != nil {
		return ""
	}
	bits := 64
	ip := at.Addr().Unmap().WithZone("")
	if ip.Is4() {
		bits = 32
	}
	p, err := ip.Prefix(bits)
	if err != nil {
		return ""
	}
	return p.String()
}
