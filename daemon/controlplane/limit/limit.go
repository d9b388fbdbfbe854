// SPDX-License-Identifier: Apache-2.0

// Package limit bounds how often each of many keys may do something, and finds the network of a peer.
package limit

import (
	"container/list"
	"net"
	"net/netip"
	"sync"

	"golang.org/x/time/rate"
)

// Network returns the network of a peer at addr (host:port): its IPv4 address, the first 64 bits of an IPv6 one, or "" if addr is
// neither.
func Network(addr string) string {
	host, _, err := net.SplitHostPort(addr)
	if err != nil {
		return ""
	}
	ip, err := netip.ParseAddr(host)
	if err != nil {
		return ""
	}
	ip = ip.Unmap().WithZone("")
	if ip.Is4() {
		return ip.String()
	}
	p, err := ip.Prefix(64)
	if err != nil {
		return ""
	}
	return p.String()
}

// NetworkOf is [Network] of the peer of a connection.
func NetworkOf(c net.Conn) string {
	if a := c.RemoteAddr(); a != nil {
		return Network(a.String())
	}
	return ""
}

// Limiter bounds how often each of many keys may do something. It stores at most a fixed number of keys, and evicts the one used least
// recently. Its methods may be called concurrently.
type Limiter struct {
	max int

	mu   sync.Mutex
	By   map[string]*list.Element
	Used *list.List // of *entry, the most recently used one first
}

// Rate is a token bucket: so many a second, and so many at once.
type Rate struct {
	PerSecond rate.Limit
	Burst     int
}

type entry struct {
	key     string
	lim     *rate.Limiter
	refused int // since it was last allowed
}

// NewLimiter makes a limiter that stores at most so many keys.
func NewLimiter(most int) *Limiter {
	return &Limiter{max: most, By: map[string]*list.Element{}, Used: list.New()}
}

// Allow reports whether key who may act now, and how often it was refused since it was last allowed. It is refused if its own rate or the
// common limit, which may be nil, is exhausted.
func (b *Limiter) Allow(who string, a Rate, common *rate.Limiter) (ok bool, refused int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	e, known := b.By[who]
	if !known {
		if b.Used.Len() >= b.max {
			last := b.Used.Back()
			delete(b.By, b.Used.Remove(last).(*entry).key)
		}
		e = b.Used.PushFront(&entry{key: who, lim: rate.NewLimiter(a.PerSecond, a.Burst)})
		b.By[who] = e
	}
	b.Used.MoveToFront(e)
	one := e.Value.(*entry)
	if !one.lim.Allow() || common != nil && !common.Allow() {
		one.refused++
		return false, 0
	}
	refused, one.refused = one.refused, 0
	return true, refused
}
