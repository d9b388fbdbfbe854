// SPDX-License-Identifier: Apache-2.0

package raft_test

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/raft"
)

// steady is timing that tolerates a busy machine: speed is not what is tested here.
func steady(_ int, cfg *raft.Config) {
	cfg.Timing.Heartbeat, cfg.Timing.Election, cfg.Timing.Lease = 500*time.Millisecond, 500*time.Millisecond, 450*time.Millisecond
}

// join starts a node that waits to be added.
func (c *cluster) join(id string) int {
	c.t.Helper()
	i := len(c.nodes)
	c.members = append(slices.Clip(c.members), raft.Member{ID: id, Addr: free(c.t)})
	c.dirs = append(c.dirs, filepath.Join(c.t.TempDir(), id))
	c.lists, c.nodes = append(c.lists, nil), append(c.nodes, nil)
	was := c.edit
	c.edit = func(k int, cfg *raft.Config) {
		if was != nil {
			was(k, cfg)
		}
		if k == i {
			cfg.Join, cfg.First = true, nil
		}
	}
	c.open(i)
	return i
}

func (c *cluster) change(by int, do, id string) error {
	c.t.Helper()
	ch := raft.Change{Do: do, ID: id}
	for _, m := range c.members {
		if do == raft.Add && m.ID == id {
			ch.Addr = m.Addr
		}
	}
	return c.nodes[by].Change(within(c.t), ch)
}

func (c *cluster) must(err error) {
	c.t.Helper()
	if err != nil {
		c.t.Fatal(err)
	}
}

// roles spells the members as the leader reports them.
func (c *cluster) roles(by int) string {
	c.t.Helper()
	all, err := c.nodes[by].Members(within(c.t))
	c.must(err)
	var out []string
	for _, m := range all.Members {
		out = append(out, m.ID+" "+string(m.Role))
	}
	return strings.Join(out, ", ")
}

// gone waits until a node has stopped because it was removed.
func (c *cluster) gone(i int) {
	c.t.Helper()
	ends(c.t, "a removed node", func() { <-c.nodes[i].Fatal() })
	err := c.nodes[i].Failure()
	if !errors.Is(err, fault.Denied) || !errors.Is(err, raft.ErrRemoved) || !strings.Contains(err.Error(), "was removed") {
		c.t.Fatalf("it stopped with %v", err)
	}
	c.stop(i)
}

func TestANonVoterBecomesAVoter(t *testing.T) {
	c := start(t, 3, steady)
	lead := c.leader()
	for i := range 20 {
		c.propose(lead, fmt.Sprint("line", i))
	}
	c.must(c.nodes[lead].TakeSnapshot())
	i := c.join("n3")
	other := (lead + 1) % 3
	c.must(c.change(other, raft.Add, "n3"))
	c.must(c.change(other, raft.Add, "n3")) // the same again is done already
	c.propose(i, "by the non-voter")        // forwarded
	if err := c.nodes[i].Read(within(t)); err != nil {
		t.Fatal(err)
	}
	if got := c.lists[i].all(); len(got) != 21 || got[20] != "by the non-voter" {
		t.Fatalf("the non-voter has %q", got)
	}
	if got := c.nodes[i].State(); got.Voters != 3 {
		t.Fatalf("%+v", got)
	}
	if got, want := c.roles(i), "n0 voter, n1 voter, n2 voter, n3 non-voter"; got != want {
		t.Fatalf("%s, want %s", got, want)
	}
	c.must(c.change(i, raft.Promote, "n3"))
	if got, want := c.roles(0), "n0 voter, n1 voter, n2 voter, n3 voter"; got != want {
		t.Fatalf("%s, want %s", got, want)
	}
	c.must(c.change(i, raft.Demote, "n3"))
	c.must(c.change(i, raft.Demote, "n3"))
	if got, want := c.roles(0), "n0 voter, n1 voter, n2 voter, n3 non-voter"; got != want {
		t.Fatalf("%s, want %s", got, want)
	}
	// A non-voter counts for no majority: with two of three voters down nothing is decided.
	c.stop((lead + 1) % 3)
	c.stop((lead + 2) % 3)
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	if _, err := c.nodes[i].Propose(ctx, []byte("nothing")); err == nil {
		t.Fatal("a leader and a non-voter decided something")
	}
}

func TestMembersTellHowFarTheyAre(t *testing.T) {
	c := start(t, 3, func(i int, cfg *raft.Config) {
		steady(i, cfg)
		cfg.About = func() []byte { return []byte(cfg.Self.ID) }
	})
	lead := c.leader()
	c.propose(lead, "one")
	waitFor(t, func() bool {
		all, err := c.nodes[(lead+1)%3].Members(within(t))
		c.must(err)
		ok := all.Leader == c.members[lead].ID && len(all.Members) == 3
		for _, m := range all.Members {
			ok = ok && m.Heard() && m.Lag == 0 && string(m.About) == m.ID
		}
		return ok
	})
	down := (lead + 1) % 3
	c.stop(down)
	c.propose(lead, "two")
	waitFor(t, func() bool {
		all, err := c.nodes[lead].Members(within(t))
		c.must(err)
		i := slices.IndexFunc(all.Members, func(m raft.MemberState) bool { return m.ID == c.members[down].ID })
		return !all.Members[i].Heard() && all.Members[i].Lag > 0 && all.Members[i].Silent > 0
	})
}

func TestARemovedNodeIsCutOffAndStops(t *testing.T) {
	c := start(t, 3, steady)
	lead := c.leader()
	out, by := (lead+1)%3, (lead+2)%3
	c.must(c.change(by, raft.Remove, c.members[out].ID))
	c.gone(out)
	if err := c.change(by, raft.Remove, c.members[out].ID); !errors.Is(err, fault.NotFound) {
		t.Fatalf("removed twice: %v", err)
	}
	c.propose(by, "without it")
}

// A peer that knows less than the node itself is not believed: it may not have heard of the node yet.
func TestOnlyANewerIndexIsBelieved(t *testing.T) {
	c := start(t, 1, steady)
	c.leader()
	c.propose(0, "one")
	at := c.nodes[0].ConfigurationIndex()
	c.nodes[0].RemovedBy("n9", at)
	c.nodes[0].RemovedBy("n9", 0)
	c.propose(0, "two")
	i := c.join("n1")
	c.nodes[i].RemovedBy("n9", 1000) // it waits to be added, and knows of no configuration
	c.must(c.change(0, raft.Add, "n1"))
	c.must(c.nodes[i].Read(within(t)))
	c.nodes[0].RemovedBy("n9", at+100)
	c.gone(0)
}

// A node that was down when it was removed learns it from the first peer that it calls.
func TestARemovedNodeThatWasDownLearnsIt(t *testing.T) {
	c := start(t, 3, steady)
	lead := c.leader()
	out := (lead + 1) % 3
	c.stop(out)
	c.must(c.change(lead, raft.Remove, c.members[out].ID))
	c.open(out)
	c.gone(out)
	c.propose(lead, "without it")
}

func TestTheLeaderIsRemovedByAnyNode(t *testing.T) {
	c := start(t, 3, steady)
	lead := c.leader()
	c.propose(lead, "before")
	by := (lead + 1) % 3
	c.must(c.change(by, raft.Remove, c.members[lead].ID))
	c.gone(lead)
	c.propose(by, "after")
	c.same([]string{"before", "after"})
}

func TestANodeIsReplaced(t *testing.T) {
	c := start(t, 3, steady)
	lead := c.leader()
	c.propose(lead, "before")
	dead := (lead + 1) % 3
	c.stop(dead)
	i := c.join("n9")
	c.must(c.change(lead, raft.Add, "n9"))
	c.must(c.nodes[i].Replace(within(t), c.members[dead].ID, "n9"))
	if all := c.nodes[lead].IDs(); slices.Contains(all, c.members[dead].ID) || !slices.Contains(all, "n9") {
		t.Fatal(all)
	}
	c.propose(i, "after")
	c.same([]string{"before", "after"})
	if err := c.nodes[i].Replace(within(t), "n9", "absent"); !errors.Is(err, fault.NotFound) {
		t.Fatal(err)
	}
}

func TestNoChangeLosesTheMajority(t *testing.T) {
	c := start(t, 3, steady)
	lead := c.leader()
	dead, other := (lead+1)%3, (lead+2)%3
	c.stop(dead)
	waitFor(t, func() bool {
		all, err := c.nodes[lead].Members(within(t))
		c.must(err)
		return slices.ContainsFunc(all.Members, func(m raft.MemberState) bool { return m.ID == c.members[dead].ID && !m.Heard() })
	})
	for _, do := range []string{raft.Remove, raft.Demote} {
		if err := c.change(lead, do, c.members[other].ID); !errors.Is(err, fault.Conflict) || !strings.Contains(err.Error(), c.members[dead].ID) {
			t.Fatalf("%s: %v", do, err)
		}
	}
	if err := c.change(lead, raft.Transfer, c.members[dead].ID); !errors.Is(err, fault.Conflict) {
		t.Fatal(err)
	}
	c.must(c.change(lead, raft.Remove, c.members[dead].ID))
	c.must(c.change(lead, raft.Remove, c.members[other].ID))
	c.gone(other)
	err := c.change(lead, raft.Remove, c.members[lead].ID)
	if !errors.Is(err, fault.Conflict) || !strings.Contains(err.Error(), "only voter") {
		t.Fatal(err)
	}
	c.propose(lead, "alone")
}

func TestChangesThatMakeNoSense(t *testing.T) {
	c := start(t, 1, steady)
	c.leader()
	for _, x := range []struct {
		c    raft.Change
		want fault.Kind
	}{
		{raft.Change{Do: raft.Promote, ID: "absent"}, fault.NotFound},
		{raft.Change{Do: raft.Remove, ID: "absent"}, fault.NotFound},
		{raft.Change{Do: raft.Transfer, ID: "absent"}, fault.NotFound},
		{raft.Change{Do: raft.Transfer}, fault.Conflict},
		{raft.Change{Do: raft.Demote, ID: "n0"}, fault.Conflict},
		{raft.Change{Do: raft.Add, ID: "n1"}, fault.Invalid},
		{raft.Change{Do: raft.Add, Addr: "127.0.0.1:1"}, fault.Invalid},
		{raft.Change{Do: raft.Add, ID: "n1", Addr: c.members[0].Addr}, fault.Conflict},
		{raft.Change{Do: raft.Add, ID: "n0", Addr: "127.0.0.1:1"}, fault.Conflict},
		{raft.Change{Do: "bless", ID: "n0"}, fault.Invalid},
	} {
		if err := c.nodes[0].Change(within(t), x.c); !errors.Is(err, x.want) {
			t.Errorf("%+v: %v, want %s", x.c, err, x.want)
		}
	}
	if got, want := c.roles(0), "n0 voter"; got != want {
		t.Fatalf("%s, want %s", got, want)
	}
}

func TestOneThatIsNotThereIsNotPromoted(t *testing.T) {
	c := start(t, 1, steady)
	c.leader()
	c.must(c.nodes[0].Change(within(t), raft.Change{Do: raft.Add, ID: "n1", Addr: free(t)}))
	if err := c.change(0, raft.Promote, "n1"); !errors.Is(err, fault.Conflict) {
		t.Fatal(err) // of two voters one would be in reach
	}
	c.propose(0, "it continues")
}

func TestLeadershipIsTransferred(t *testing.T) {
	c := start(t, 3, steady)
	lead := c.leader()
	to := (lead + 1) % 3
	c.must(c.change((lead+2)%3, raft.Transfer, c.members[to].ID))
	waitFor(t, func() bool { return c.nodes[to].State().Role == "leader" })
	c.must(c.nodes[lead].Change(within(t), raft.Change{Do: raft.Transfer}))
	waitFor(t, func() bool { return c.nodes[to].State().Role != "leader" })
	c.join("n3")
	c.must(c.change(to, raft.Add, "n3"))
	if err := c.change(to, raft.Transfer, "n3"); !errors.Is(err, fault.Conflict) {
		t.Fatalf("a non-voter leads: %v", err)
	}
}

// A node that moved says so itself: no other node's list is edited, and the log has the new address.
func TestANodeThatMovesIsFound(t *testing.T) {
	c := start(t, 3, steady)
	moved := (c.leader() + 1) % 3
	c.stop(moved)
	c.members = slices.Clone(c.members) // the lists of the others do not change
	c.members[moved].Addr = free(t)
	c.open(moved)
	c.addressed(c.members[moved])
	c.propose(moved, "from elsewhere")
	c.same([]string{"from elsewhere"})
}

// addressed waits until the log has a member's address. While the library (v1.8.0) takes an address it writes what its own reader of
// answers reads (raft.go:625 and replication.go:660; the bytes are the same), which the race detector has seen once in TestAMemberMoves: so
// tests let no proposals be on their way then.
func (c *cluster) addressed(m raft.Member) {
	c.t.Helper()
	waitFor(c.t, func() bool {
		all, err := c.nodes[0].Members(within(c.t))
		return err == nil && slices.ContainsFunc(all.Members, func(s raft.MemberState) bool { return s.Member == m })
	})
}

// A list that names others than the log adds and removes no member.
func TestTheLogGoesBeforeTheList(t *testing.T) {
	c := start(t, 1, steady)
	c.leader()
	c.propose(0, "before")
	c.stop(0)
	c.edit = func(i int, cfg *raft.Config) {
		steady(i, cfg)
		cfg.First = append(slices.Clone(cfg.First), raft.Member{ID: "x", Addr: "127.0.0.1:1"}, raft.Member{ID: "y", Addr: "127.0.0.1:2"})
	}
	c.open(0)
	c.leader()
	c.propose(0, "after")
	if got, want := c.roles(0), "n0 voter"; got != want {
		t.Fatalf("%s, want %s", got, want)
	}
}
