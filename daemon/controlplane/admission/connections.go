// SPDX-License-Identifier: Apache-2.0

package admission

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

// connQuota is how many proven connections for calls are open: of one holder, and of all holders of a kind; 0 is no bound. As
// many again may be on their way out, or be told that there is no room. An idle one takes 38 KiB (docs/channel.md).
type connQuota struct{ each, all int }

var (
	anonymousQuota = connQuota{AnonymousEach, 1024} // by source
	operatorQuota  = connQuota{OperatorEach, 1024}
	memberQuota    = connQuota{32, 0} // of an appliance, or a node: as many as the fleet has
)

const (
	AnonymousEach = 128
	OperatorEach  = 256

	callsIdle = 10 * time.Second // without a call, before a connection of a member gives way to another one of it
)

// connTable is the connections for calls. At a bound one gives way that is idle: of the holder that is at its bound, or of the one
// of its kind that holds the most. It is ended in order, and no call is lost with it. One with a call under way is never
// ended for another one, but for a stranger's: where a member's are all in use, the newcomer is told so and goes.
type connTable struct {
	mu       sync.Mutex
	of       map[net.Conn]*callConn
	by       map[string]int    // how many, by holder, less those on their way out
	draining map[string]int    // how many are on their way out, by holder
	kinds    map[connQuota]int // how many, by kind, less those on their way out
}

type callConn struct {
	owner    string // source of a stranger, or principal behind a slash
	kind     connQuota
	idle     bool
	since    time.Time     // of that
	calls    *daemon.Calls // nil until it is served
	draining bool          // it was told to go elsewhere, or is told that there is no room
	refused  bool          // not even that: it is closed at once
}

func newConnTable() *connTable {
	return &connTable{of: map[net.Conn]*callConn{}, by: map[string]int{}, draining: map[string]int{}, kinds: map[connQuota]int{}}
}

// ownerOf names who a connection for calls belongs to.
func ownerOf(c *tls.Conn) *callConn {
	state := c.ConnectionState()
	if len(state.PeerCertificates) > 0 {
		if p, _, err := identity.PrincipalOf(&state); err == nil {
			kind := memberQuota
			if _, role, _, _ := p.Split(); role == fleet.Operator {
				kind = operatorQuota
			}
			return &callConn{owner: "/" + string(p), kind: kind}
		}
	}
	return &callConn{owner: limit.NetworkOf(c), kind: anonymousQuota}
}

// enter counts a connection in, and gives the one that must go for it, nil for none. Where it is refused the error says why:
// it is there to be told that, unless it is gone.
func (g *connTable) enter(c net.Conn, who *callConn, idle time.Duration) (out *callConn, err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	who.idle, who.since = true, time.Now()
	if from, full := g.full(who); full {
		if from != who.owner || who.kind == anonymousQuota {
			idle = 0
		}
		if out = g.oldest(from, who.since.Add(-idle)); out != nil && g.draining[from] < who.kind.each {
			g.count(out, -1)
			out.draining = true
			g.count(out, 1)
		} else {
			who.draining, who.refused, out = true, g.draining[who.owner] >= who.kind.each, nil
			err = fault.New("controlplane.calls", fault.Busy, "%d connections of %s are open at this node, as many as may be, and all are in use: try again in a few seconds, and make calls over fewer connections",
				g.by[from], fault.Clip(strings.TrimPrefix(from, "/")))
			if who.refused {
				return nil, err
			}
		}
	}
	g.of[c] = who
	g.count(who, 1)
	return out, err
}

// full tells whether one must go for who, and a connection of whom.
func (g *connTable) full(who *callConn) (from string, is bool) {
	if g.by[who.owner] >= who.kind.each {
		return who.owner, true
	}
	if who.kind.all == 0 || g.kinds[who.kind] < who.kind.all {
		return "", false
	}
	most := 0
	for _, o := range g.of {
		if n := g.by[o.owner]; o.kind == who.kind && n > most {
			from, most = o.owner, n // whoever holds the most pays for others
		}
	}
	return from, true
}

// oldest gives the one of a holder that has been idle the longest, and since before a time; of a stranger's, where none is
// idle, the one that has been at work the longest.
func (g *connTable) oldest(host string, before time.Time) (worst *callConn) {
	for _, o := range g.of {
		if o.owner != host || o.draining || o.calls == nil || o.kind != anonymousQuota && !o.idle || o.since.After(before) {
			continue
		}
		if worst == nil || o.idle && !worst.idle || o.idle == worst.idle && o.since.Before(worst.since) {
			worst = o
		}
	}
	return worst
}

// count counts a connection, or one less.
func (g *connTable) count(o *callConn, n int) {
	by := g.by
	if o.draining {
		by = g.draining
	} else {
		g.kinds[o.kind] += n
	}
	if by[o.owner] += n; by[o.owner] == 0 {
		delete(by, o.owner)
	}
}

// serve notes what serves a connection.
func (g *connTable) serve(c net.Conn, calls *daemon.Calls) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if o := g.of[c]; o != nil {
		o.calls = calls
	}
}

// leave ends one that gave way. A member's has no call under way but what came in this very moment, which it may end.
func (o *callConn) leave() {
	if o.kind == anonymousQuota {
		go o.calls.End() // one that does not read, or draws its call out, may take its time
		return
	}
	o.calls.Leave()
}

// stateChanged takes what the HTTP server says of a connection.
func (g *connTable) stateChanged(c net.Conn, st http.ConnState) {
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
