// SPDX-License-Identifier: Apache-2.0

package transport

import (
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"
)

// Bounds of the listener. Connections whose peer has proven its identity do not count among the handshakes.
const (
	maxHandshakes      = 128 // under way
	maxSourceHandshake = 32  // of one source
	maxPeerConns       = 64  // connections with one member, in either direction; the oldest is evicted

	refusalBurst = 5                // lines of the log about refused callers
	refusalEvery = 10 * time.Second // and one more in this time; each says how many were left out
)

// handshakes are those under way at the listener. A new one always gets in: at a bound another one is evicted, of the source
// that is at its own bound, else of the one that has the most; one that has sent nothing before one that has, and the oldest
// of those. So silent connections keep no node out, however many they are, and a peer's handshake, which takes some
// milliseconds, is not evicted for them.
type handshakes struct {
	anonymous, proven logLimit

	mu   sync.Mutex
	seq  uint64
	all  map[*handshake]struct{}
	from map[string]int // by source
}

// handshake is a connection whose handshake is not done.
type handshake struct {
	net.Conn
	source string
	seq    uint64 // in the order of arrival
	spoke  atomic.Bool
}

// logLimit bounds what the log says of refused callers of one kind, so that anonymous ones do not hide what members do.
type logLimit struct {
	lim     *rate.Limiter
	skipped int
}

func newHandshakes() *handshakes {
	limit := func() logLimit { return logLimit{lim: rate.NewLimiter(rate.Every(refusalEvery), refusalBurst)} }
	return &handshakes{anonymous: limit(), proven: limit(), all: map[*handshake]struct{}{}, from: map[string]int{}}
}

// Read implements net.Conn.
func (g *handshake) Read(b []byte) (int, error) {
	n, err := g.Conn.Read(b)
	if n > 0 && !g.spoke.Load() {
		g.spoke.Store(true)
	}
	return n, err
}

// NetConn is the connection beneath.
func (g *handshake) NetConn() net.Conn { return g.Conn }

// admit counts a new one in, and ends the one that is evicted for it.
func (h *handshakes) admit(c net.Conn) *handshake {
	g := &handshake{Conn: c, source: sourceOf(c)}
	h.mu.Lock()
	var out *handshake
	switch {
	case h.from[g.source] >= maxSourceHandshake:
		out = h.victim(g.source)
	case len(h.all) >= maxHandshakes:
		most := ""
		for from, n := range h.from {
			if n > h.from[most] {
				most = from
			}
		}
		out = h.victim(most)
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

// victim is the one of a source that is evicted next. The lock is held.
func (h *handshakes) victim(source string) (out *handshake) {
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

// done takes one out whose handshake is over. It may be called again.
func (h *handshakes) done(g *handshake) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.drop(g)
}

func (h *handshakes) drop(g *handshake) {
	if _, ok := h.all[g]; !ok {
		return
	}
	delete(h.all, g)
	if h.from[g.source]--; h.from[g.source] == 0 {
		delete(h.from, g.source)
	}
}

// logsRefusal reports whether a refused caller is logged, and how many of its kind before it were not.
func (h *handshakes) logsRefusal(proven bool) (now bool, skipped int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	l := &h.anonymous
	if proven {
		l = &h.proven
	}
	if !l.lim.Allow() {
		l.skipped++
		return false, 0
	}
	skipped, l.skipped = l.skipped, 0
	return true, skipped
}

// sourceOf is the network that a caller comes from: an IPv4 address, or 64 bits of an IPv6 one; "" if that is not known.
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
