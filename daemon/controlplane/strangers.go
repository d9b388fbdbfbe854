// SPDX-License-Identifier: Apache-2.0

package controlplane

import (
	"container/list"
	"crypto/tls"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"github.com/demarc-dev/demarc/identity"
)

// Bounds for those that one source sends. Appliances behind one NAT, one proxy or one private endpoint share a source:
// they share these, and are told to come back.
const (
	sourceRate  = 20 // calls of the bootstrap service a second
	sourceBurst = 100
	sourcesMax  = 4096 // that are told apart; of the longest unheard one is forgotten what it used up

	guestsMax     = 1024 // proven connections for calls of strangers, all of them together
	guestsEach    = 128  // of one source
	memberEach    = 32   // of one appliance, operator or node
	greetingsEach = 4    // channels of one appliance on which hello has not come yet

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

// guests is the connections for calls. Those of a source, of a member, and of all strangers are bounded. The one that gives
// way is idle where one is: of the source at its bound, or of the one that holds the most.
type guests struct {
	mu   sync.Mutex
	of   map[net.Conn]*guest
	by   map[string]int // how many, by host
	many int            // of strangers
}

type guest struct {
	host     string // source of a stranger, or principal behind a slash
	stranger bool
	idle     bool
	since    time.Time // of that
}

func newGuests() *guests { return &guests{of: map[net.Conn]*guest{}, by: map[string]int{}} }

// enter counts a connection in, and gives the one that must go for it, nil for none.
func (g *guests) enter(c net.Conn, host string, stranger bool) (out net.Conn) {
	g.mu.Lock()
	defer g.mu.Unlock()
	each := memberEach
	if stranger {
		each = guestsEach
	}
	if g.by[host] >= each {
		out = g.oldest(func(o *guest) bool { return o.host == host })
	} else if stranger && g.many >= guestsMax {
		most := ""
		for _, o := range g.of {
			if o.stranger && (most == "" || g.by[o.host] > g.by[most]) {
				most = o.host
			}
		}
		out = g.oldest(func(o *guest) bool { return o.stranger && o.host == most })
	}
	if out != nil {
		g.drop(out)
	}
	g.of[c] = &guest{host: host, stranger: stranger, idle: true, since: time.Now()}
	g.by[host]++
	if stranger {
		g.many++
	}
	return out
}

// oldest gives the one that is idle the longest among those that may go, or is at work the longest where none is idle.
func (g *guests) oldest(may func(*guest) bool) (out net.Conn) {
	var worst *guest
	for c, o := range g.of {
		if may(o) && (worst == nil || o.idle && !worst.idle || o.idle == worst.idle && o.since.Before(worst.since)) {
			out, worst = c, o
		}
	}
	return out
}

// drop forgets a connection. The lock is held.
func (g *guests) drop(c net.Conn) {
	o := g.of[c]
	if o == nil {
		return
	}
	delete(g.of, c)
	if g.by[o.host]--; g.by[o.host] <= 0 {
		delete(g.by, o.host)
	}
	if o.stranger {
		g.many--
	}
}

// moved takes what the HTTP server says of a connection.
func (g *guests) moved(c net.Conn, st http.ConnState) {
	g.mu.Lock()
	defer g.mu.Unlock()
	switch st {
	case http.StateClosed, http.StateHijacked:
		g.drop(c)
	case http.StateIdle, http.StateActive:
		if o := g.of[c]; o != nil && o.idle != (st == http.StateIdle) {
			o.idle, o.since = st == http.StateIdle, time.Now()
		}
	}
}

// hostOf names who a connection for calls belongs to.
func hostOf(c *tls.Conn) (host string, stranger bool) {
	state := c.ConnectionState()
	if len(state.PeerCertificates) > 0 {
		if p, _, err := identity.PrincipalOf(&state); err == nil {
			return "/" + string(p), false
		}
	}
	return sourceOfConn(c), true
}
