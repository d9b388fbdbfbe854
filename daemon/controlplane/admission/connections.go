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

// connQuota is how many connections for calls may be open after their handshake: of one owner, and of all owners of a kind; 0 is no
// bound. Up to as many again may be draining or being refused. An idle one takes 38 KiB (docs/channel.md).
type connQuota struct{ each, all int }

var (
	anonymousQuota = connQuota{AnonymousEach, 1024} // by source
	operatorQuota  = connQuota{OperatorEach, 1024}
	memberQuota    = connQuota{32, 0} // of an appliance, or a node: as many as the fleet has
)

const (
	AnonymousEach = 128 // connections of one source without a certificate
	OperatorEach  = 256 // connections of one operator

	callsIdle = 10 * time.Second // without a call, before a connection of a member may be closed for another one of it
)

// connTable is the connections for calls. At a bound, an idle one is closed: of the owner at its bound, or of the owner of the kind that
// has the most. It is drained, and no call is lost. Connections with a call in flight are never evicted, except anonymous ones: if all of
// a member's are in use, the new one is refused.
type connTable struct {
	mu       sync.Mutex
	of       map[net.Conn]*callConn
	by       map[string]int    // number by owner, without draining ones
	draining map[string]int    // number of draining ones by owner
	kinds    map[connQuota]int // number by kind, without draining ones
}

type callConn struct {
	owner    string // source of an anonymous caller, or principal behind a slash
	kind     connQuota
	idle     bool
	since    time.Time     // when idle changed
	calls    *daemon.Calls // nil until it is served
	draining bool          // it is being closed for another one, or refused
	refused  bool          // it is closed at once, without an answer
}

func newConnTable() *connTable {
	return &connTable{of: map[net.Conn]*callConn{}, by: map[string]int{}, draining: map[string]int{}, kinds: map[connQuota]int{}}
}

// ownerOf returns the owner of a connection for calls.
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

// enter adds a connection, and returns the one to close for it, nil for none. The error is why the connection is refused: it stays open
// for that answer, unless who.refused is set.
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
			err = fault.New("controlplane.calls", fault.Busy, "%d connections of %s are open at this node, as many as may be, and all are "+
				"in use: try again in a few seconds, and make calls over fewer connections",
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

// full reports whether a connection must be closed for who, and of which owner.
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
			from, most = o.owner, n // the owner with the most pays for others
		}
	}
	return from, true
}

// oldest returns the connection of an owner that has been idle the longest, since before a time; if an anonymous owner has no idle one,
// the one that has been in use the longest.
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

// count adds n to the numbers that a connection counts for.
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

// serve sets what serves a connection.
func (g *connTable) serve(c net.Conn, calls *daemon.Calls) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if o := g.of[c]; o != nil {
		o.calls = calls
	}
}

// leave drains an evicted connection. That of a member is idle, and may finish a call that arrived at this moment.
func (o *callConn) leave() {
	if o.kind == anonymousQuota {
		go o.calls.End() // may block: the peer may not read, or prolong its call
		return
	}
	o.calls.Leave()
}

// stateChanged handles a state change that the HTTP server reports.
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
