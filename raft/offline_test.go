// SPDX-License-Identifier: Apache-2.0

package raft_test

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"testing"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/raft"
)

// Of three nodes one survives: it continues alone with all that was answered, and takes others again.
func TestOneSurvivorGoesOn(t *testing.T) {
	c := start(t, 3, steady)
	lead := c.leader()
	var want []string
	for i := range 20 {
		want = append(want, fmt.Sprint("line", i))
		c.propose(lead, want[i])
		if i == 10 {
			c.must(c.nodes[lead].TakeSnapshot())
		}
	}
	c.same(want)
	for i := range 3 {
		c.stop(i)
	}
	o := raft.Offline{Dir: c.dirs[lead], Self: c.members[lead], Machine: &list{}}
	c.must(o.Recover())
	if got := o.Machine.(*list).all(); !slices.Equal(got, want) {
		t.Fatalf("recovered %q", got)
	}
	c.open(lead)
	waitFor(t, func() bool { return c.nodes[lead].State().Role == "leader" })
	c.propose(lead, "alone")
	if got, want := c.roles(lead), c.members[lead].ID+" voter"; got != want {
		t.Fatalf("%s, want %s", got, want)
	}
	i := c.join("n9")
	c.must(c.change(lead, raft.Add, "n9"))
	c.must(c.change(lead, raft.Promote, "n9"))
	c.propose(i, "with another")
	c.same(append(want, "alone", "with another"))
}

func TestRecoveryRefuses(t *testing.T) {
	c := start(t, 1, steady)
	c.leader()
	c.propose(0, "one")
	o := raft.Offline{Dir: c.dirs[0], Self: c.members[0], Machine: &list{}}
	if err := o.Recover(); !errors.Is(err, fault.Conflict) {
		t.Fatalf("while the node runs: %v", err)
	}
	if err := raft.CheckUnused(c.dirs[0]); !errors.Is(err, fault.Conflict) {
		t.Fatalf("while the node runs: %v", err)
	}
	c.stop(0)
	if err := raft.CheckUnused(c.dirs[0]); err != nil {
		t.Fatal(err)
	}
	other := o
	other.Self.ID = "other"
	if err := other.Recover(); !errors.Is(err, fault.Conflict) {
		t.Fatalf("the directory of another node: %v", err)
	}
	empty := o
	empty.Dir = t.TempDir()
	if err := empty.Recover(); !errors.Is(err, fault.NotFound) {
		t.Fatalf("an empty directory: %v", err)
	}
	if err := o.Install(7, 2, bytes.NewBufferString("x")); !errors.Is(err, fault.Conflict) {
		t.Fatalf("over a log: %v", err)
	}
	c.open(0)
	c.leader()
	c.same([]string{"one"})
}

func TestAClusterBeginsWithAState(t *testing.T) {
	c := start(t, 1, steady)
	c.leader()
	c.stop(0)
	c.dirs[0] = t.TempDir()
	o := raft.Offline{Dir: c.dirs[0], Self: c.members[0], Machine: &list{}}
	if err := o.Install(0, 1, bytes.NewBufferString("x")); !errors.Is(err, fault.Invalid) {
		t.Fatal(err)
	}
	c.must(o.Install(41, 7, bytes.NewBufferString("one\ntwo")))
	c.open(0)
	c.leader()
	if got := c.nodes[0].State(); got.Term <= 7 || got.Applied != 41 {
		t.Fatalf("%+v", got)
	}
	c.propose(0, "three")
	c.same([]string{"one", "two", "three"})
	i := c.join("n1")
	c.must(c.change(0, raft.Add, "n1"))
	c.must(c.nodes[i].Read(within(t)))
	c.same([]string{"one", "two", "three"})
}
