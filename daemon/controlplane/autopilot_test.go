// SPDX-License-Identifier: Apache-2.0

package controlplane_test

import (
	"strings"
	"testing"
	"time"

	"github.com/demarc-dev/demarc/daemon/controlplane"
	"github.com/demarc-dev/demarc/daemon/controlplane/book"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/raft"
)

// seen spells members: "a! b c- d? n:e n:f-" is the leader a, the voter b, the voter c that was silent for two days, the
// voter d that was silent for an hour, a stable non-voter e, a non-voter f that is silent, and n:g+ one that has just come.
func seen(text string) raft.Cluster {
	out := raft.Cluster{Leads: (100 * time.Hour).Milliseconds()}
	for word := range strings.FieldsSeq(text) {
		m := raft.MemberState{Role: raft.Voter, Silent: 10, Stable: time.Hour.Milliseconds()}
		if rest, ok := strings.CutPrefix(word, "n:"); ok {
			word, m.Role = rest, raft.NonVoter
		}
		switch m.ID = strings.TrimRight(word, "!-?+*"); word[len(word)-1] {
		case '!':
			out.Leader = m.ID
		case '-':
			m.Silent, m.Stable = (48 * time.Hour).Milliseconds(), 0
		case '?':
			m.Silent, m.Stable = time.Hour.Milliseconds(), 0
		case '+':
			m.Stable = 10
		case '*':
			m.Lag = 100_000
		}
		out.Members = append(out.Members, m)
	}
	return out
}

func TestAutopilotKeepsItsFloor(t *testing.T) {
	both := book.Autopilot{RemoveDead: true, PromoteStable: true}
	remove := book.Autopilot{RemoveDead: true}
	alone := book.Autopilot{RemoveDead: true, WithoutReplacement: true, Floor: 1}
	for _, c := range []struct {
		name   string
		policy book.Autopilot
		seen   string
		want   string
	}{
		{"off by default", book.Autopilot{}, "a! b c d e- n:f", ""},
		{"all is well", both, "a! b c", ""},
		{"the floor holds", remove, "a! b c-", ""},
		{"the floor holds with a replacement that is not promoted", remove, "a! b c- n:d", ""},
		{"a replacement is promoted first", both, "a! b c- n:d", "promote d"},
		{"then the dead one goes", both, "a! b c- d", "remove c"},
		{"dead above the floor", remove, "a! b c d e-", "remove e"},
		{"silent for an hour is not dead", remove, "a! b c d e?", ""},
		{"one at a time", remove, "a! b c d- e-", "remove d"},
		{"no majority, no change", both, "a! b c- d- e- n:f", ""},
		{"a majority that is silent, and not dead yet", remove, "a! b? c? d-", ""},
		{"fewer alive than the floor, nobody ready", remove, "a! b c? d-", ""},
		{"the same, and the operator does without", book.Autopilot{RemoveDead: true, WithoutReplacement: true}, "a! b c? d- e", "remove d"},
		{"a lower floor", alone, "a! b c-", "remove c"},
		{"an even number is made odd", both, "a! b n:c", "promote c"},
		{"an odd number is left", both, "a! b c n:d", ""},
		{"below the floor", both, "a! n:b", "promote b"},
		{"not stable yet", both, "a! b c- n:d+", ""},
		{"behind", both, "a! b c- n:d*", ""},
		{"silent itself", both, "a! b c- n:d-", ""},
		{"not wanted as a voter", both, "a! b c- n:edge", ""},
		{"promotion is off", remove, "a! b n:c", ""},
	} {
		p := c.policy
		if p.DeadAfter == 0 {
			p.DeadAfter = 24 * time.Hour
		}
		if p.Floor == 0 {
			p.Floor = 3
		}
		if p.Stabilization == 0 {
			p.Stabilization = 10 * time.Second
		}
		got := controlplane.Decide(p, seen(c.seen), func(id string) bool { return id != "edge" })
		if g := strings.TrimSpace(got.Do + " " + got.ID); g != c.want {
			t.Errorf("%s: %s: %q, want %q", c.name, c.seen, g, c.want)
		}
	}
	// One that this leader never heard counts from the beginning of the lead.
	young := seen("a! b c d e-")
	young.Leads, young.Members[4].Silent = time.Minute.Milliseconds(), -1
	if got := controlplane.Decide(book.Autopilot{RemoveDead: true, DeadAfter: time.Hour, Floor: 3}, young, nil); got.Do != "" {
		t.Errorf("a new leader removes at once: %+v", got)
	}
	young.Leads = (2 * time.Hour).Milliseconds()
	if got := controlplane.Decide(book.Autopilot{RemoveDead: true, DeadAfter: time.Hour, Floor: 3}, young, nil); got.Do != raft.Remove || got.ID != "e" {
		t.Errorf("%+v", got)
	}
}

func TestAutopilotIsOffAndBounded(t *testing.T) {
	o := newBook(t)
	if p := o.book.View().Pilot(); p.RemoveDead || p.PromoteStable || p.DeadAfter != 24*time.Hour || p.Floor != 3 || p.Stabilization != 10*time.Second {
		t.Fatalf("%+v", p)
	}
	for _, p := range []book.Autopilot{{DeadAfter: time.Second}, {DeadAfter: -time.Hour}, {Floor: -1}, {Floor: 1000}, {Stabilization: -1}} {
		refused(t, o, fault.Invalid, book.SetAutopilot{Autopilot: p})
	}
	must(t, o, book.SetAutopilot{Autopilot: book.Autopilot{RemoveDead: true, DeadAfter: time.Hour}})
	if p := o.book.View().Pilot(); !p.RemoveDead || p.DeadAfter != time.Hour || p.Floor != 3 {
		t.Fatalf("%+v", p)
	}
}

func TestARemovedNodeNeverComesBack(t *testing.T) {
	o := newBook(t)
	must(t, o, book.AddNode{Name: "cp-4", Raft: "10.0.0.4:1", API: "10.0.0.4:2", Voter: true})
	must(t, o, book.AddNode{Name: "cp-4", Raft: "10.0.0.5:1", API: "10.0.0.5:2"}) // its addresses may change
	if p, _ := o.book.View().Peer("cp-4"); p.Raft != "10.0.0.5:1" || p.Voter {
		t.Fatalf("%+v", p)
	}
	must(t, o, book.NodeBundle{Name: "cp-4", Number: 1})
	must(t, o, book.RemoveNode{Name: "cp-4", Reason: "gone"})
	must(t, o, book.RemoveNode{Name: "cp-4", Reason: "again"})
	must(t, o, book.RemoveNode{Name: "cp-1", Reason: "one of the first, which never said anything"})
	for _, name := range []string{"cp-1", "cp-4"} {
		refused(t, o, fault.Denied, book.AddNode{Name: name, Raft: "10.0.0.4:1", API: "10.0.0.4:2"})
		if p, _ := o.book.View().Peer(name); !p.Removed || p.Reason == "again" {
			t.Fatalf("%+v", p)
		}
	}
	refused(t, o, fault.Invalid, book.AddNode{Name: "cp-5", Raft: "10.0.0.4:1"})
	refused(t, o, fault.Invalid, book.AddNode{Name: "../x", Raft: "10.0.0.4:1", API: "10.0.0.4:2"})
	refused(t, o, fault.Denied, book.NodeIs{Name: "cp-5"}) // said by somebody else
}
