// SPDX-License-Identifier: Apache-2.0

package fleettest

import (
	"bytes"
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"connectrpc.com/connect"

	controlv1 "github.com/demarc-dev/demarc/api/control/v1"
	"github.com/demarc-dev/demarc/daemon/controlplane"
	"github.com/demarc-dev/demarc/daemon/controlplane/book"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
)

const oneDay = 24 * time.Hour

// spread has the appliances come to all nodes in turn, as an address list does, and not to the front.
func (c *trio) spread() {
	c.Fleet.mu.Lock()
	defer c.Fleet.mu.Unlock()
	c.pick = func() *door {
		c.mu.Lock()
		defer c.mu.Unlock()
		for range c.members {
			c.turn++
			if p := c.peers[c.members[c.turn%len(c.members)].Name]; p != nil {
				return p.api
			}
		}
		return nil
	}
}

func (c *trio) running() []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	var out []string
	for name := range c.peers {
		out = append(out, name)
	}
	slices.Sort(out)
	return out
}

// leader waits until a node that runs leads, and names it.
func (c *trio) leader() string {
	c.t.Helper()
	var name string
	c.Wait("a node leads", 2*time.Minute, func() bool {
		for _, n := range c.running() {
			c.mu.Lock()
			p := c.peers[n]
			c.mu.Unlock()
			if p != nil && p.raft.State().Role == "leader" {
				name = n
				return true
			}
		}
		return false
	})
	return name
}

// follower names a node that runs and does not lead.
func (c *trio) follower() string {
	c.t.Helper()
	lead := c.leader()
	for _, n := range c.running() {
		if n != lead {
			return n
		}
	}
	c.t.Fatal("no node follows")
	return ""
}

// crash ends a node, and has the operator ask another one.
func (c *trio) crash(name string) {
	for _, n := range c.running() {
		if n != name {
			c.front(n)
			break
		}
	}
	c.stopNode(name)
}

// crashAt has the leader crash once the change of that kind is on record, and its answer go nowhere. What it gives names
// the leader that crashed; after back it starts again, where that is not 0.
func (c *trio) crashAt(kind string, back time.Duration) (gone func() string) {
	ch := make(chan string, 1)
	var once sync.Once
	c.After(func(k string, _ fleet.Principal) {
		if k != kind {
			return
		}
		once.Do(func() {
			c.After(nil)
			c.Fleet.mu.Lock()
			c.lose = true
			c.Fleet.mu.Unlock()
			go func() {
				name := c.leader()
				c.crash(name)
				if back > 0 {
					time.Sleep(back)
					c.startNode(name)
				}
				ch <- name
			}()
		})
	})
	return func() (name string) {
		c.t.Helper()
		select {
		case name = <-ch:
		case <-time.After(10 * time.Minute):
			c.t.Fatalf("no %s came on record: nothing crashed", kind)
		}
		return name
	}
}

// ask has an operator make a request until it is answered, with one request id: who asked a node that crashed asks another.
func (c *trio) ask(request string, call func(ctx context.Context, s *controlplane.Server, id string) error) error {
	c.t.Helper()
	var err error
	c.Wait("the request "+request+" is answered", 5*time.Minute, func() bool {
		ctx, s := c.operator()
		err = call(ctx, s, request)
		switch fault.Of(err) {
		case fault.Unavailable, fault.Unsure, fault.NotLeader, fault.Busy:
			return false
		}
		return true
	})
	return err
}

func (c *trio) prepare(request string) string {
	c.t.Helper()
	var id string
	c.must(c.ask(request, func(ctx context.Context, s *controlplane.Server, request string) error {
		res, err := s.Keys().PrepareAuthority(ctx, connect.NewRequest(&controlv1.PrepareAuthorityRequest{RequestId: request}))
		if err == nil {
			id = res.Msg.GetId()
		}
		return err
	}))
	return id
}

func (c *trio) activate(request, id string) error {
	c.t.Helper()
	return c.ask(request, func(ctx context.Context, s *controlplane.Server, request string) error {
		_, err := s.Keys().ActivateAuthority(ctx, connect.NewRequest(&controlv1.ActivateAuthorityRequest{Id: id, RequestId: request}))
		return err
	})
}

func (c *trio) retire(request, id string, compromised bool) error {
	c.t.Helper()
	return c.ask(request, func(ctx context.Context, s *controlplane.Server, request string) error {
		_, err := s.Keys().RetireAuthority(ctx,
			connect.NewRequest(&controlv1.RetireAuthorityRequest{Id: id, RequestId: request, Compromised: compromised}))
		return err
	})
}

// missing is the named list: who does not hold the newest bundle, in order. Who is offline has a star.
func (c *trio) missing() string {
	c.t.Helper()
	var names []string
	c.must(c.ask("", func(context.Context, *controlplane.Server, string) error {
		ctx, s := c.operator()
		res, err := s.Keys().ListAuthorities(ctx, connect.NewRequest(&controlv1.ListAuthoritiesRequest{}))
		if err != nil {
			return err
		}
		names = nil
		for _, m := range res.Msg.GetMissing() {
			name := m.GetName()
			if !m.GetOnline() {
				name += "*"
			}
			names = append(names, name)
		}
		return nil
	}))
	slices.Sort(names)
	return strings.Join(names, " ")
}

// named asserts that a refusal names these and none of the others.
func named(t *testing.T, what string, err error, all []string, want ...string) {
	t.Helper()
	if fault.Of(err) != fault.Conflict {
		t.Fatalf("%s: %v, want a conflict that names %v", what, err, want)
	}
	for _, name := range all {
		if got := strings.Contains(err.Error(), name); got != slices.Contains(want, name) {
			t.Errorf("%s: %v, want %v named and no other", what, err, want)
		}
	}
}

// lags tells whether a node that crashed as the leader is among the missing. It crashes right after a change that makes another
// bundle, and may have put on record before that it serves it.
func (c *trio) lags(node string) bool {
	c.t.Helper()
	return slices.Contains(strings.Fields(c.missing()), node)
}

// pause lets time pass with all of it dark: no node runs, and none of these appliances. An hour of three idle nodes is not
// free, even in fake time.
func (c *trio) pause(d time.Duration, running ...*Appliance) {
	for _, a := range running {
		a.Stop()
	}
	for name := range c.dirs {
		c.stopNode(name)
	}
	time.Sleep(d)
	for _, m := range c.members {
		c.startNode(m.Name)
	}
	c.front(c.members[0].Name)
	c.leader()
	for _, a := range running {
		a.Start()
	}
}

// agree waits until the books of the three nodes are one.
func (c *trio) agree() {
	c.t.Helper()
	c.Wait("three nodes have one book", 2*time.Minute, func() bool {
		var at string
		c.mu.Lock()
		defer c.mu.Unlock()
		for _, p := range c.peers {
			_, log := p.book.Both()
			now := fmt.Sprintf("%d %x", log.Size(), log.Root())
			if at != "" && at != now {
				return false
			}
			at = now
		}
		return len(c.peers) == len(c.members)
	})
}

// issuedBy tells whether the appliance is up with a certificate of that CA.
func (c *trio) issuedBy(a *Appliance, id string) func() bool {
	return func() bool { return string(c.Of(a.Name).CurrentIssuer) == id && a.Up() }
}

// TestThreeNodesRollOver changes the CA of a vendor with three nodes, and the leader is taken down at each step, right
// after the step is on record. Two appliances are connected all the time. One sleeps through all of it, one through the
// activation. Nobody does anything for an appliance.
func TestThreeNodesRollOver(t *testing.T) {
	for _, compromised := range []bool{false, true} {
		t.Run(fmt.Sprint("compromised ", compromised), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { rollOver(t, newTrio(t, unhurried), compromised) })
		})
	}
}

func rollOver(t *testing.T, c *trio, compromised bool) {
	c.spread()
	old := c.IssuerCA()
	var all []*Appliance
	names := []string{"cp-1", "cp-2", "cp-3"}
	for _, name := range []string{"eu-1", "eu-2", "us-1", "us-2"} {
		a := c.AddAppliance(name)
		a.Start()
		a.WaitUp(5 * time.Minute)
		all, names = append(all, a), append(names, name)
	}
	stays, sleeps, dozes := all[:2], all[2], all[3]
	first := map[string]book.Appliance{}
	for _, a := range all {
		first[a.Name] = c.Of(a.Name)
	}
	left := func(a *Appliance) {
		a.Stop()
		c.Wait(a.Name+" left", 5*time.Minute, func() bool { return !c.Of(a.Name).Online })
	}
	left(sleeps)
	c.pause(20*oneDay, all[0], all[1], dozes)
	for _, a := range append(stays, dozes) { // past half of its life each is renewed; the one that sleeps has 10 days left
		c.Wait(a.Name+" was renewed", time.Hour, func() bool { return c.Of(a.Name).Current != first[a.Name].Current && a.Up() })
	}

	gone := c.crashAt("ca.prepare/2", 0)
	id := c.prepare("p")
	down := gone()
	c.Wait("the connected hold the bundle", 10*time.Minute, func() bool { return strings.TrimPrefix(c.missing(), down+" ") == "us-1*" })
	if c.lags(down) {
		named(t, "activated while a node is down", c.activate("a", id), names, down)
	}
	c.startNode(down)
	c.Wait("the node that was down holds it too", 10*time.Minute, func() bool { return c.missing() == "us-1*" })

	left(dozes)      // it holds the bundle, and will not see that the CA issues
	if compromised { // a node that follows is down until all is over: its book will not tell it which CA issues
		down = c.follower()
		c.crash(down)
		gone = c.crashAt("ca.activate/1", 30*time.Second)
		c.must(c.activate("a2", id))
		gone()
	} else {
		gone = c.crashAt("ca.activate/1", 0)
		c.must(c.activate("a2", id))
		down = gone()
	}
	for _, a := range stays {
		c.Wait(a.Name+" is renewed by the new CA", 30*time.Minute, c.issuedBy(a, id))
	}
	if compromised {
		gone = c.crashAt("ca.retire/1", 30*time.Second)
		c.must(c.retire("r", old, true))
		gone()
		c.startNode(down) // the certificate that its book tells it to make is one that nobody trusts
		c.Wait("only those who sleep are missing", 10*time.Minute, func() bool { return c.missing() == "us-1* us-2*" })
		sleeps.Start()
		dozes.Start()
	} else {
		users := []string{"us-1", "us-2"}
		if c.lags(down) {
			users = append(users, down)
		}
		named(t, "retired under those who use it", c.retire("r", old, false), names, users...)
		c.startNode(down)
		c.Wait("the nodes have the newest", 10*time.Minute, func() bool { return c.missing() == "us-1* us-2*" })
		dozes.Start()
		c.Wait("us-2 is renewed by the new CA", 30*time.Minute, c.issuedBy(dozes, id))
		named(t, "retired under the one that sleeps", c.retire("r2", old, false), names, "us-1")
		c.pause(11*oneDay, all[0], all[1], dozes)
		gone = c.crashAt("ca.retire/1", 0)
		c.must(c.retire("r3", old, false))
		down = gone()
		sleeps.Start()
		c.Wait("it is back with one node down", 5*time.Minute, c.issuedBy(sleeps, id))
		c.startNode(down)
	}
	for _, a := range all {
		c.Wait(a.Name+" is there by the new CA", 10*time.Minute, c.issuedBy(a, id))
		at, was, want := c.Of(a.Name), first[a.Name], 1
		if a == sleeps || (a == dozes && compromised) {
			want = 2 // its certificate ran out, or is of the CA that nobody trusts
		}
		if !bytes.Equal(at.LogKey, was.LogKey) || !at.Since.Equal(was.Since) || a.Proofs() != want {
			t.Errorf("%s: another one, or %d proofs where %d are wanted: %+v", a.Name, a.Proofs(), want, at)
		}
	}
	c.Wait("nobody is missing", 10*time.Minute, func() bool { return c.missing() == "" })
	c.agree()
	if got := c.IssuerCA(); got != id {
		t.Errorf("CA %s issues, want %s", got, id)
	}
}
