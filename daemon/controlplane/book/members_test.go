// SPDX-License-Identifier: Apache-2.0

package book

import (
	"fmt"
	"testing"
	"time"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/ledger"
)

// tries applies a change to a state as the book does: what is refused changes nothing.
func tries(s *State, c ledger.Change[State, Nothing]) error {
	next := *s
	_, err := c.Apply(&next, ledger.Meta{At: time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC), By: "test"})
	if err == nil {
		*s = next
	}
	return err
}

// TestAClusterOutlivesItsNodes: nodes are replaced a thousand times, and each removed name stays removed. What is kept of one is
// little; how many nodes there are at a time, and how many names there ever were, has a bound.
func TestAClusterOutlivesItsNodes(t *testing.T) {
	s := NewState()
	add := func(name string) ledger.Change[State, Nothing] {
		return s.AddNode(AddNode{Name: name, Raft: "10.0.0.4:7444", API: "cp.acme.example:7443", Voter: true})
	}
	must := func(c ledger.Change[State, Nothing]) {
		t.Helper()
		if err := tries(&s, c); err != nil {
			t.Fatalf("%T with %d names: %v", c, s.peers.Len(), err)
		}
	}
	for i := range 3 {
		must(add(fmt.Sprint("cp-", i)))
	}
	for i := 3; i < maxNames; i++ {
		must(add(fmt.Sprint("cp-", i)))
		must(s.RemoveNode(RemoveNode{Name: fmt.Sprint("cp-", i-3), Reason: "its time has come"}))
	}
	if n := s.peers.Len(); n != maxNames {
		t.Fatalf("%d names are known, want %d", n, maxNames)
	}
	for i := range maxNames - 3 {
		name := fmt.Sprint("cp-", i)
		if err := tries(&s, add(name)); fault.Of(err) != fault.Denied {
			t.Fatalf("the removed %s is added again: %v", name, err)
		}
		if p, _ := s.Peer(name); !p.Removed || i >= MaxPeers && (p.Raft != "" || p.API != "") {
			t.Fatalf("of a removed node is kept %+v", p)
		}
	}
	for _, c := range []ledger.Change[State, Nothing]{add("new"), s.RemoveNode(RemoveNode{Name: "unknown"})} {
		if err := tries(&s, c); fault.Of(err) != fault.Conflict {
			t.Errorf("%T past the bound of names: %v", c, err)
		}
	}
	must(s.RemoveNode(RemoveNode{Name: "cp-1023", Reason: "a known one can always be removed"}))
}

// TestNodesAtATimeAreBounded: what counts is how many there are.
func TestNodesAtATimeAreBounded(t *testing.T) {
	s := NewState()
	for i := range MaxPeers {
		if err := tries(&s, s.AddNode(AddNode{Name: fmt.Sprint("cp-", i), Raft: "a:1", API: "a:2"})); err != nil {
			t.Fatal(err)
		}
	}
	another := AddNode{Name: "another", Raft: "a:1", API: "a:2"}
	if err := tries(&s, s.AddNode(another)); fault.Of(err) != fault.Conflict {
		t.Fatalf("node %d is added: %v", MaxPeers+1, err)
	}
	if err := tries(&s, s.RemoveNode(RemoveNode{Name: "cp-7"})); err != nil {
		t.Fatal(err)
	}
	if err := tries(&s, s.AddNode(another)); err != nil {
		t.Fatalf("one was removed, and there is no room: %v", err)
	}
}

// TestTheFirstKindsOfMembersMeanWhatTheyMeant: an old log replays to what it replayed to, and a book with room makes no change that
// an older build does not know. A repeated request is of the kind that it was.
func TestTheFirstKindsOfMembersMeanWhatTheyMeant(t *testing.T) {
	s := NewState()
	for i := range 64 { // never another number: this is what the first kinds mean
		name := fmt.Sprint("cp-", i)
		for range 2 { // the second is a repetition
			if c := s.AddNode(AddNode{Name: name, Raft: "a:1", API: "a:2"}); c.Kind() != "node.add/1" {
				t.Fatalf("%s is added by %s", name, c.Kind())
			} else if err := tries(&s, c); err != nil {
				t.Fatal(err)
			}
		}
		for range 2 {
			if c := s.RemoveNode(RemoveNode{Name: name}); c.Kind() != "node.remove/1" {
				t.Fatalf("%s is removed by %s", name, c.Kind())
			} else if err := tries(&s, c); err != nil {
				t.Fatal(err)
			}
		}
		if p, _ := s.Peer(name); p.Raft != "a:1" {
			t.Fatalf("of %s is kept %+v", name, p)
		}
	}
	for _, c := range []ledger.Change[State, Nothing]{AddNode{Name: "more", Raft: "a:1", API: "a:2"}, RemoveNode{Name: "more"}} {
		if err := tries(&s, c); fault.Of(err) != fault.Conflict {
			t.Errorf("%s takes one more than it took: %v", c.Kind(), err)
		}
	}
	for range 2 {
		if c := s.AddNode(AddNode{Name: "more", Raft: "a:1", API: "a:2"}); c.Kind() != "node.add/2" {
			t.Fatalf("added by %s", c.Kind())
		} else if err := tries(&s, c); err != nil {
			t.Fatal(err)
		}
	}
	for range 2 {
		if c := s.RemoveNode(RemoveNode{Name: "more"}); c.Kind() != "node.remove/2" {
			t.Fatalf("removed by %s", c.Kind())
		} else if err := tries(&s, c); err != nil {
			t.Fatal(err)
		}
	}
}
