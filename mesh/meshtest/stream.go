// SPDX-License-Identifier: Apache-2.0

package meshtest

import (
	"context"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"tailscale.com/tailcfg"
	"tailscale.com/tstest/integration/testcontrol"
	"tailscale.com/types/key"
)

// SetPolicy hands new filters to all nodes. Only for a tailnet that began with a policy.
func (t *Tailnet) SetPolicy(p *Policy) {
	t.mu.Lock()
	t.policy = p
	t.mu.Unlock()
	t.notify()
}

// SetAuthKey changes what a node must show when it registers; "" for nothing.
func (t *Tailnet) SetAuthKey(k string) {
	t.keyed.Lock()
	defer t.keyed.Unlock()
	t.handler.NumNodes() // its lock orders this write after what registered before
	t.handler.RequireAuthKey = k
}

// RequireApproval keeps new nodes out until it is called with false: then all that wait are approved.
func (t *Tailnet) RequireApproval(on bool) {
	t.keyed.Lock()
	t.handler.NumNodes() // as in SetAuthKey
	t.handler.RequireMachineAuth = on
	t.keyed.Unlock()
	if on {
		return
	}
	for _, n := range t.handler.AllNodes() {
		n.MachineAuthorized = true
		t.handler.UpdateNode(n)
	}
	t.notify()
}

// Streams is how many streams of maps nodes ever opened. A node that comes back runs on the map of its last life at first;
// one more stream is its coordinator's word.
func (t *Tailnet) Streams() int64 { return t.streams.Load() }

// ExpireAll makes every node's key old, or none. A node hears of it on its open stream; one that registers while keys are old
// is told an error that real coordinators do not give.
func (t *Tailnet) ExpireAll(expired bool) {
	t.handler.SetExpireAllNodes(expired)
	t.mu.Lock()
	t.expired = expired
	t.mu.Unlock()
	t.notify()
}

// Expire makes the keys of the nodes with this host name old, and takes them out of everybody's map. A node hears of it on its open stream,
// and may register with a new key. It gives the number of nodes.
func (t *Tailnet) Expire(hostname string) int {
	n := 0
	t.mu.Lock()
	if t.old == nil {
		t.old = map[key.NodePublic]bool{}
	}
	for _, node := range t.handler.AllNodes() {
		if node.Hostinfo.Valid() && node.Hostinfo.Hostname() == hostname && !t.old[node.Key] {
			t.old[node.Key] = true
			node.KeyExpiry = time.Now().Add(-time.Minute)
			t.handler.UpdateNode(node)
			n++
		}
	}
	t.mu.Unlock()
	t.notify()
	return n
}

// renew takes the expiry off a key that replaced an old one: the library's server copies the node, its expiry too.
func (t *Tailnet) renew(k key.NodePublic) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if n := t.handler.Node(k); n != nil && !n.KeyExpiry.IsZero() && !t.old[k] {
		n.KeyExpiry = time.Time{}
		t.handler.UpdateNode(n)
	}
}

// Hide takes the node with this address out of everybody's map, or puts it back. What others send to it goes nowhere, as to a
// machine that has lost its power, but for its relay.
func (t *Tailnet) Hide(node netip.Addr, hidden bool) {
	t.mu.Lock()
	if t.hidden == nil {
		t.hidden = map[netip.Addr]bool{}
	}
	t.hidden[node] = hidden
	t.mu.Unlock()
	t.notify()
}

// seen gives the peers that are not hidden, and whose keys are not old.
func (t *Tailnet) seen(peers []*tailcfg.Node) []*tailcfg.Node {
	t.mu.Lock()
	defer t.mu.Unlock()
	return slices.DeleteFunc(peers, func(n *tailcfg.Node) bool {
		return t.old[n.Key] || slices.ContainsFunc(n.Addresses, func(p netip.Prefix) bool { return t.hidden[p.Addr()] })
	})
}

// Nodes is how many nodes were ever taken in, a new key counting as a new node.
func (t *Tailnet) Nodes() int { return t.handler.NumNodes() }

// Logless is how many nodes said that they send no logs, and how many nodes there are.
func (t *Tailnet) Logless() (quiet, all int) {
	nodes := t.handler.AllNodes()
	for _, n := range nodes {
		if n.Hostinfo.Valid() && n.Hostinfo.NoLogsNoSupport() {
			quiet++
		}
	}
	return quiet, len(nodes)
}

func (t *Tailnet) notify() {
	t.mu.Lock()
	defer t.mu.Unlock()
	close(t.changed)
	t.changed = make(chan struct{})
}

// stream answers one map request, in place of the library's own streams, which lose the wish to wake a node whose former
// stream is still open: with the whole map, and again at each change where the node wants to be kept informed.
func (t *Tailnet) stream(ctx context.Context, w testcontrol.MapStreamWriter, req *tailcfg.MapRequest) {
	if t.handler.Node(req.NodeKey) == nil {
		return
	}
	t.renew(req.NodeKey)
	t.learn(req)
	t.notify()
	if req.Stream {
		t.streams.Add(1)
	}
	alive := time.NewTicker(50 * time.Second)
	defer alive.Stop()
	for {
		t.mu.Lock()
		changed, policy, expired, q, plan := t.changed, t.policy, t.expired, t.question, t.plan
		t.mu.Unlock()
		res, err := t.handler.MapResponse(req)
		if err != nil || res == nil {
			return
		}
		res.Peers = t.seen(res.Peers)
		if expired {
			res.Node.KeyExpiry = time.Now().Add(-time.Minute)
		}
		if policy != nil { // all the filters that a node had give way, so that an empty list is a list too
			res.PacketFilter = nil
			res.PacketFilters = map[string][]tailcfg.FilterRule{"*": nil, "base": policy.filter(res.Node, t.handler.AllNodes())}
		}
		if plan.IsValid() {
			res.ControlDialPlan = &tailcfg.ControlDialPlan{Candidates: []tailcfg.ControlIPCandidate{{IP: plan, DialTimeoutSec: 5}}}
		}
		if q != nil && req.Stream {
			res.PingRequest = &q.ping
		}
		if w.SendMapMessage(res) != nil || !req.Stream {
			return
		}
		if q != nil {
			q.asked.Add(1)
		}
		for again := false; !again; {
			select {
			case <-ctx.Done():
				return
			case <-changed:
				again = true
			case <-alive.C:
				if w.SendMapMessage(&tailcfg.MapResponse{KeepAlive: true}) != nil {
					return
				}
			}
		}
	}
}

// learn keeps what a node says of itself. A streaming request says nothing.
func (t *Tailnet) learn(req *tailcfg.MapRequest) {
	if req.Stream {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	n := t.handler.Node(req.NodeKey)
	if n == nil {
		return
	}
	n.DiscoKey, n.Cap, n.Endpoints = req.DiscoKey, req.Version, nil
	for _, e := range req.Endpoints {
		if e.Addr().Zone() == "" && !e.Addr().IsLinkLocalUnicast() {
			n.Endpoints = append(n.Endpoints, e)
		}
	}
	if req.Hostinfo != nil {
		n.Hostinfo = req.Hostinfo.View()
		if req.Hostinfo.NetInfo != nil && req.Hostinfo.NetInfo.PreferredDERP != 0 {
			n.HomeDERP = req.Hostinfo.NetInfo.PreferredDERP
		}
	}
	t.handler.UpdateNode(n)
}

// Ask asks the nodes something of the process that they run in, as a coordinator can (the library's c2n), until ctx ends. It counts
// how often it asked and how many answers came.
func (t *Tailnet) Ask(ctx context.Context, path string) (asked, answered int64) {
	token := "ask" + strings.ReplaceAll(path, "/", "-")
	var came atomic.Int64
	t.handler.C2NResponses.Store(token, func(*http.Response) { came.Add(1) })
	q := &question{ping: tailcfg.PingRequest{URL: "https://unused/c2n/" + token, Types: "c2n",
		Payload: []byte("GET " + path + " HTTP/1.1\r\nHost: node\r\n\r\n")}}
	t.mu.Lock()
	t.question = q
	t.mu.Unlock()
	t.notify()
	<-ctx.Done()
	t.mu.Lock()
	t.question = nil
	t.mu.Unlock()
	return q.asked.Load(), came.Load()
}

// Plan tells the nodes to ask for the coordinator at this address before all others.
func (t *Tailnet) Plan(at netip.Addr) {
	t.mu.Lock()
	t.plan = at
	t.mu.Unlock()
	t.notify()
}

// Ping has the nodes send something to a URL, as a coordinator can, until ctx ends: HEAD, or with types POST of how the ping of ip went. It
// counts how often it asked.
func (t *Tailnet) Ping(ctx context.Context, url, types string, ip netip.Addr) (asked int64) {
	return t.ping(ctx, tailcfg.PingRequest{URL: url, Types: types, IP: ip})
}

// PingByNoise is Ping, by the library's client for the protocol between a node and its coordinator.
func (t *Tailnet) PingByNoise(ctx context.Context, url, types string, ip netip.Addr) (asked int64) {
	return t.ping(ctx, tailcfg.PingRequest{URL: url, Types: types, IP: ip, URLIsNoise: true})
}

func (t *Tailnet) ping(ctx context.Context, r tailcfg.PingRequest) (asked int64) {
	q := &question{ping: r}
	t.mu.Lock()
	t.question = q
	t.mu.Unlock()
	t.notify()
	<-ctx.Done()
	t.mu.Lock()
	t.question = nil
	t.mu.Unlock()
	return q.asked.Load()
}

type question struct {
	ping  tailcfg.PingRequest
	asked atomic.Int64
}
