// SPDX-License-Identifier: Apache-2.0

package controlplane

import (
	"crypto/tls"
	"net"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/demarc-dev/demarc/daemon"
	"github.com/demarc-dev/demarc/daemon/controlplane/limit"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/identity"
)

// crowd is how many proven connections for calls are open: of one holder, and of all holders of a kind; 0 is no bound. As
// many again may be on their way out, or be told that there is no room. An idle one takes 38 KiB (docs/channel.md).
type crowd struct{ each, all int }

var (
	ofStrangers = crowd{guestsEach, 1024} // by source
	ofOperators = crowd{operatorEach, 1024}
	ofMembers   = crowd{32, 0} // of an appliance, or a node: as many as the fleet has
)

const (
	guestsEach   = 128
	operatorEach = 256

	callsIdle = 10 * time.Second // without a call, before a connection of a member gives way to another one of it
)

// guests is the connections for calls. At a bound one gives way that is idle: of the holder that is at its bound, or of the one
// of its kind that holds the most. It is ended in order, and no call is lost with it. One with a call under way is never
// ended for another one, but for a stranger's: where a member's are all in use, the newcomer is told so and goes.
type guests struct {
	mu    sync.Mutex
	of    map[net.Conn]*guest
	by    map[string]int // how many, by holder, less those on their way out
	going map[string]int // how many are on their way out, by holder
	kinds map[crowd]int  // how many, by kind, less those on their way out
}

type guest struct {
	host  string // source of a stranger, or principal behind a slash
	kind  crowd
	idle  bool
	since time.Time     // of that
	calls *daemon.Calls // nil until it is served
	goes  bool          // it was told to go elsewhere, or is told that there is no room
	gone  bool          // not even that: it is closed at once
}

func newGuests() *guests {
	return &guests{of: map[net.Conn]*guest{}, by: map[string]int{}, going: map[string]int{}, kinds: map[crowd]int{}}
}

// guestOf names who a connection for calls belongs to.
func guestOf(c *tls.Conn) *guest {
	state := c.ConnectionState()
	if len(state.PeerCertificates) > 0 {
		if p, _, err := identity.PrincipalOf(&state); err == nil {
			kind := ofMembers
			if _, role, _, _ := p.Split(); role == fleet.Operator {
				kind = ofOperators
			}
			return &guest{host: "/" + string(p), kind: kind}
		}
	}
	return &guest{host: limit.NetworkOf(c), kind: ofStrangers}
}

// enter counts a connection in, and gives the one that must go for it, nil for none. Where it is refused the error says why:
// it is there to be told that, unless it is gone.
func (g *guests) enter(c net.Conn, who *guest, idle time.Duration) (out *guest, err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	who.idle, who.since = true, time.Now()
	if from, full := g.full(who); full {
		if from != who.host || who.kind == ofStrangers {
			idle = 0
		}
		if out = g.oldest(from, who.since.Add(-idle)); out != nil && g.going[from] < who.kind.each {
			g.count(out, -1)
			out.goes = true
			g.count(out, 1)
		} else {
			who.goes, who.gone, out = true, g.going[who.host] >= who.kind.each, nil
			err = fault.New("controlplane.calls", fault.Busy, "%d connections of %s are open at this node, as many as may be, and all are in use: try again in a few seconds, and make calls over fewer connections",
				g.by[from], fault.Clip(strings.TrimPrefix(from, "/")))
			if who.gone {
				return nil, err
			}
		}
	}
	g.of[c] = who
	g.count(who, 1)
	return out, err
}

// full tells whether one must go for who, and a connection of whom.
func (g *guests) full(who *guest) (from string, is bool) {
	if g.by[who.host] >= who.kind.each {
		return who.host, true
	}
	if who.kind.all == 0 || g.kinds[who.kind] < who.kind.all {
		return "", false
	}
	most := 0
	for _, o := range g.of {
		if n := g.by[o.host]; o.kind == who.kind && n > most {
			from, most = o.host, n // whoever holds the most pays for others
		}
	}
	return from, true
}

// oldest gives the one of a holder that has been idle the longest, and since before a time; of a stranger's, where none is
// idle, the one that has been at work the longest.
func (g *guests) oldest(host string, before time.Time) (worst *guest) {
	for _, o := range g.of {
		if o.host != host || o.goes || o.calls == nil || o.kind != ofStrangers && !o.idle || o.since.After(before) {
			continue
		}
		if worst == nil || o.idle && !worst.idle || o.idle == worst.idle && o.since.Before(worst.since) {
			worst = o
		}
	}
	return worst
}

// count counts a connection, or one less.
func (g *guests) count(o *guest, n int) {
	by := g.by
	if o.goes {
		by = g.going
	} else {
		g.kinds[o.kind] += n
	}
	if by[o.host] += n; by[o.host] == 0 {
		delete(by, o.host)
	}
}

// serve notes what serves a connection.
func (g *guests) serve(c net.Conn, calls *daemon.Calls) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if o := g.of[c]; o != nil {
		o.calls = calls
	}
}

// leave ends one that gave way. A member's has no call under way but what came in this very moment, which it may end.
func (o *guest) leave() {
	if o.kind == ofStrangers {
		go o.calls.End() // one that does not read, or draws its call out, may take its time
		return
	}
	o.calls.Leave()
}

// moved takes what the HTTP server says of a connection.
func (g *guests) moved(c net.Conn, st http.ConnState) {
	g.mu.Lock()
	defer g.mu.Unlock()
	o := g.of[c]
	if o == nil {
		return
	}
	switch st {
	case http.StateClosed:
		delete(g.of, c)
		g.count(o, -1)
	case http.StateIdle, http.StateActive:
		if o.idle != (st == http.StateIdle) {
			o.idle, o.since = st == http.StateIdle, time.Now()
		}
	}
}
