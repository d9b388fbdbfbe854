// SPDX-License-Identifier: Apache-2.0

package controlplane

import (
	"container/list"
	"net"
	"net/netip"
	"sync"

	"golang.org/x/time/rate"
)

// Bounds for those that one source sends. Appliances behind one NAT, one proxy or one private endpoint share a source:
// they share these, and are told to come back.
const (
	sourceRate  = 20 // calls of the bootstrap service a second
	sourceBurst = 100
	sourcesMax  = 4096 // that are told apart; of the longest unheard one is forgotten what it used up

	greetingsEach = 4 // channels of one appliance on which hello has not come yet

	refusalRate  = 1 // refusals a second that are logged and put on record; the rest is counted
	refusalBurst = 20
)

// sourceOf is what stands for the network that a peer comes from: an IPv4 address, the first 64 bits of an IPv6 one, or ""
// for all whose address is not known.
func sourceOf(addr string) string {
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

func sourceOfConn(c net.Conn) string {
	if a := c.RemoteAddr(); a != nil {
		return sourceOf(a.String())
	}
	return ""
}

// budget bounds how often each of many may do something. It keeps a bounded number apart.
type budget struct {
	rate  rate.Limit
	burst int
	max   int

	mu   sync.Mutex
	by   map[string]*list.Element
	used *list.List // of *share, the one that was used last in front
}

type share struct {
	who string
	lim *rate.Limiter
}

func newBudget(r rate.Limit, burst, most int) *budget {
	return &budget{rate: r, burst: burst, max: most, by: map[string]*list.Element{}, used: list.New()}
}

func (b *budget) allow(who string) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	e, ok := b.by[who]
	if !ok {
		if b.used.Len() >= b.max {
			last := b.used.Back()
			delete(b.by, b.used.Remove(last).(*share).who)
		}
		e = b.used.PushFront(&share{who, rate.NewLimiter(b.rate, b.burst)})
		b.by[who] = e
	}
	b.used.MoveToFront(e)
	return e.Value.(*share).lim.Allow()
}

// heard tells whether a stranger at addr may be heard now. Its own network's share is asked first, so that who floods
// uses up what is its own and not what is everyone's.
func (s *Server) heard(addr string) bool {
	return s.sources.allow(sourceOf(addr)) && s.strangers.Allow()
}
