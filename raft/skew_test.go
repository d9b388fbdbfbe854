// SPDX-License-Identifier: Apache-2.0

package raft_test

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/raft"
)

// skewed is a cluster in a bubble in which each node has a clock of its own, and whose machines judge stamps as the
// control plane's do: a proposal is the time that it was stamped with.
type skewed struct {
	*fakeCluster
	skew []atomic.Int64
}

// stamped lets in what the leader's judgement lets in.
type stamped struct {
	*list
	node func() *raft.Node
}

func (m stamped) DryRun(data []byte) error {
	at, err := time.Parse(time.RFC3339Nano, string(data))
	if err != nil {
		return fault.At("test", fault.Invalid, err)
	}
	return m.node().Judge(at)
}

func playSkewed(t *testing.T, nodes int, play func(t *testing.T, c *skewed)) {
	ca, dirs := newCA(t), make([]string, nodes)
	for i := range dirs {
		dirs[i] = t.TempDir()
	}
	synctest.Test(t, func(t *testing.T) {
		c := &skewed{skew: make([]atomic.Int64, nodes)}
		boot := make(chan struct{})
		c.fakeCluster = newFakeCluster(t, ca, dirs, func(i int, cfg *raft.Config) {
			cfg.Now = func() time.Time { return time.Now().Add(time.Duration(c.skew[i].Load())) }
			cfg.Machine = stamped{cfg.Machine.(*list), func() *raft.Node { <-boot; return c.nodes[i] }}
		})
		close(boot)
		defer func() {
			for i := range c.nodes {
				c.stop(i)
			}
		}()
		c.lead()
		play(t, c)
	})
}

// lead waits for a leader that all know, and that has read the clocks.
func (c *skewed) lead() int {
	c.t.Helper()
	var lead int
	c.until("a leader that knows the clocks", time.Minute, func() bool {
		id, ok := c.nodes[0].Leader()
		lead = slices.IndexFunc(c.members, func(m raft.Member) bool { return m.ID == id })
		if !ok || lead < 0 || c.nodes[lead].State().Role != "leader" {
			return false
		}
		for _, n := range c.nodes {
			if other, ok := n.Leader(); !ok || other != id {
				return false
			}
		}
		_, by := c.nodes[lead].Agreed()
		return by > 0
	})
	return lead
}

func (c *skewed) until(what string, limit time.Duration, is func() bool) time.Duration {
	c.t.Helper()
	began := time.Now()
	for !is() {
		if time.Since(began) > limit {
			c.t.Fatalf("after %s: not yet: %s", limit, what)
		}
		time.Sleep(50 * time.Millisecond) // of the bubble's time
	}
	return time.Since(began)
}

// stamp proposes a change by the clock of a node, as it is or as the node corrects it.
func (c *skewed) stamp(i int, at time.Time) error {
	_, err := c.nodes[i].Propose(within(c.t), []byte(at.Format(time.RFC3339Nano)))
	return err
}

func (c *skewed) own(i int) time.Time { return time.Now().Add(time.Duration(c.skew[i].Load())) }

// book is the latest stamp that any node has applied.
func (c *skewed) book() time.Time {
	c.t.Helper()
	var last time.Time
	for i, l := range c.lists {
		if err := c.nodes[i].Read(within(c.t)); err != nil {
			c.t.Fatal(err)
		}
		for _, s := range l.all() {
			at, err := time.Parse(time.RFC3339Nano, s)
			if err != nil {
				c.t.Fatal(err)
			}
			if at.After(last) {
				last = at
			}
		}
	}
	return last
}

// A node whose clock jumps, the leader or another one: what it stamps by its own clock is refused and named, what it stamps by
// the majority's is taken, it says that its clock is off, and a leader hands leadership over. Then the clock is set right.
func TestAClockThatJumps(t *testing.T) {
	for _, who := range []string{"the leader's", "a follower's"} {
		for _, by := range []time.Duration{90 * time.Second, time.Hour, 10 * time.Hour, -90 * time.Second, -time.Hour, -10 * time.Hour} {
			t.Run(fmt.Sprint(who, " by ", by), func(t *testing.T) {
				playSkewed(t, 3, func(t *testing.T, c *skewed) {
					lead := c.lead()
					if err := c.stamp(lead, c.nodes[lead].Now()); err != nil {
						t.Fatal(err)
					}
					bad := lead
					if who != "the leader's" {
						bad = (lead + 1) % 3
					}
					c.skew[bad].Store(int64(by))
					if err := c.stamp(bad, c.own(bad)); !errors.Is(err, fault.Unavailable) || !strings.Contains(fault.Text(err), "clock") {
						t.Fatalf("at once: %v", err)
					}
					if d := time.Until(c.nodes[bad].Now()); d.Abs() > time.Second {
						t.Errorf("the node stamps %s off", d)
					}
					if err := c.nodes[bad].Clock(); !errors.Is(err, fault.Unavailable) || !strings.Contains(fault.Text(err), "the clock of this node is") {
						t.Errorf("the node says of its clock: %v", err)
					}
					took := c.until("a leader whose clock is right", 10*time.Second, func() bool { return c.nodes[bad].State().Role != "leader" })
					if took > 5*time.Second {
						t.Errorf("leadership was handed over after %s", took)
					}
					lead = c.lead()
					c.until("the leader knows", 10*time.Second, func() bool {
						err := c.stamp(bad, c.own(bad))
						return errors.Is(err, fault.Unavailable) && strings.Contains(fault.Text(err), fmt.Sprintf("the clock of node %q", c.members[bad].ID))
					})
					for i := range 3 {
						if err := c.stamp(i, c.nodes[i].Now()); err != nil {
							t.Errorf("node %d: %v", i, err)
						}
					}
					if err := c.nodes[(bad+1)%3].Clock(); err != nil {
						t.Errorf("a node whose clock is right: %v", err)
					}
					all, err := c.nodes[bad].Members(within(t))
					c.must(err)
					for i, m := range all.Members {
						want := time.Duration(0)
						if i == bad {
							want = by
						}
						if m.ClockOffset == nil || (time.Duration(*m.ClockOffset)*time.Millisecond-want).Abs() > time.Second {
							t.Errorf("the members say that the clock of %s is %v ahead, want %s", m.ID, m.ClockOffset, want)
						}
					}
					if d := time.Until(c.book()); d > time.Second {
						t.Errorf("the last stamp is %s ahead", d)
					}
					c.skew[bad].Store(0)
					c.until("all is well", 10*time.Second, func() bool { return c.nodes[bad].Clock() == nil && c.stamp(bad, c.own(bad)) == nil })
					time.Sleep(10 * time.Second) // no leadership is handed over now
					if now := c.lead(); now != lead {
						t.Errorf("leadership moved, from %d to %d", lead, now)
					}
				})
			})
		}
	}
}

// The leader's clock is wrong, and so is another voter's: leadership goes to one of the three whose clocks are right, and the
// other wrong one does not lead in between, whichever comes first by name.
func TestLeadershipGoesToARightClock(t *testing.T) {
	for _, by := range []time.Duration{time.Hour, -time.Hour} { // as the leader's, and another way
		for _, last := range []bool{false, true} {
			t.Run(fmt.Sprint("the other is off by ", by, ", last by name ", last), func(t *testing.T) {
				playSkewed(t, 5, func(t *testing.T, c *skewed) {
					lead := c.lead()
					var others []int
					for i := range c.nodes {
						if i != lead {
							others = append(others, i)
						}
					}
					other := others[0]
					if last {
						other = others[len(others)-1]
					}
					c.skew[other].Store(int64(by))
					c.until("the leader knows the other's clock", 20*time.Second, func() bool {
						_, agree := c.nodes[lead].Agreed()
						return agree == 4
					})
					c.skew[lead].Store(int64(time.Hour))
					c.until("leadership is handed over", 20*time.Second, func() bool {
						if c.nodes[other].State().Role == "leader" {
							t.Fatal("it was handed to a node whose clock is wrong")
						}
						return c.nodes[lead].State().Role != "leader" && c.nodes[c.lead()].Clock() == nil
					})
					to := c.lead()
					for range 200 { // and it stays there
						time.Sleep(50 * time.Millisecond) // of the bubble's time
						if c.nodes[to].State().Role != "leader" || c.nodes[to].Clock() != nil {
							t.Fatalf("node %d no longer leads, or has a wrong clock", to)
						}
					}
				})
			})
		}
	}
}

// Two voters that differ stop changes, and both say so; reads are answered. So do all three apart.
func TestNoMajorityOfClocks(t *testing.T) {
	for nodes, skew := range map[int][]time.Duration{2: {0, time.Hour}, 3: {0, time.Hour, -time.Hour}} {
		t.Run(fmt.Sprint(nodes, " nodes"), func(t *testing.T) {
			playSkewed(t, nodes, func(t *testing.T, c *skewed) {
				for i, by := range skew {
					c.skew[i].Store(int64(by))
				}
				c.until("it is seen", 20*time.Second, func() bool {
					for _, n := range c.nodes {
						if !strings.HasPrefix(fault.Text(n.Clock()), "no majority") {
							return false
						}
					}
					return true
				})
				for i, n := range c.nodes {
					err := c.stamp(i, n.Now())
					if !errors.Is(err, fault.Unavailable) || !strings.Contains(fault.Text(err), "no majority of the voters' clocks agrees") {
						t.Errorf("node %d: %v", i, err)
					}
					if err := n.Read(within(t)); err != nil {
						t.Error(err)
					}
				}
				for i := range skew {
					c.skew[i].Store(0)
				}
				c.until("all is well", 20*time.Second, func() bool { return c.stamp(0, c.own(0)) == nil })
			})
		})
	}
}

// A node that has just begun to lead judges at once: it read the clocks before. A change is not held up by that.
func TestANewLeaderKnowsTheClocks(t *testing.T) {
	playSkewed(t, 3, func(t *testing.T, c *skewed) {
		time.Sleep(20 * time.Second)
		for range 3 {
			lead := c.lead()
			if err := c.nodes[lead].StepDown(); err != nil {
				t.Fatal(err)
			}
			began := time.Now()
			for i := range 3 {
				if err := c.stamp(i, c.own(i)); err != nil {
					t.Fatal(err)
				}
			}
			if took := time.Since(began); took > time.Second {
				t.Errorf("the first changes of a new leader took %s", took)
			}
		}
	})
}

// With one voter down the other two decide, also when it comes back with another time; alone, a node has no time.
func TestClocksOfTwoOfThree(t *testing.T) {
	playSkewed(t, 3, func(t *testing.T, c *skewed) {
		lead := c.lead()
		away := (lead + 1) % 3
		c.world.cut(c.members[away].Addr, true)
		c.skew[away].Store(int64(time.Hour))
		time.Sleep(2 * time.Minute)
		lead = c.leadBut(away)
		if err := c.stamp(lead, c.own(lead)); err != nil {
			t.Fatal(err)
		}
		if _, by := c.nodes[away].Agreed(); by != 0 {
			t.Error("a node that hears of no other knows the majority's time")
		}
		c.world.cut(c.members[away].Addr, false)
		c.until("it says that it is off", time.Minute, func() bool {
			// With one other alone it is not known whose is off.
			return strings.HasPrefix(fault.Text(c.nodes[away].Clock()), "the clock of this node is")
		})
		if err := c.stamp(away, c.nodes[away].Now()); err != nil {
			t.Fatal(err)
		}
	})
}

// leadBut is the leader that all but one agree upon.
func (c *skewed) leadBut(but int) int {
	c.t.Helper()
	lead := -1
	c.until("a leader of the others", time.Minute, func() bool {
		for i, n := range c.nodes {
			if i != but && n.State().Role == "leader" {
				lead = i
				_, by := n.Agreed()
				return by > 0
			}
		}
		return false
	})
	return lead
}
