// SPDX-License-Identifier: Apache-2.0

package controlplane

import (
	"crypto/tls"
	"io"
	"net"
	"os"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/demarc-dev/demarc/api/channel"
)

// TestOneLookForMany: channels that came one by one are looked at together, never before their silence ends them and hardly
// later. One that is gone is not kept for the look at it.
func TestOneLookForMany(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &Server{patience: newPatience()}
		p, wait := s.patience, channel.Patience(channel.MaxQuiet)
		var all []*live
		for range 1000 {
			time.Sleep(wait / 1000)
			l := &live{s: s, beat: channel.MaxQuiet}
			l.heard.Store(int64(p.now()))
			p.keep(l)
			all = append(all, l)
		}
		at := map[time.Duration]bool{}
		for _, l := range all {
			at[l.look] = true
			if late := l.look - l.due(); late < 0 || late > wait/coarse {
				t.Fatalf("a channel is looked at %s after its silence could end it", late)
			}
		}
		if len(at) > 2*coarse+1 {
			t.Errorf("1000 channels need %d looks", len(at))
		}
		one := all[500]
		one.expect()
		if late := one.look - p.now() - channel.Answer; late < 0 || late > channel.Answer/coarse {
			t.Errorf("one that waits for an answer is looked at %s after it could have come", late)
		}
		for _, l := range all {
			p.forget(l)
		}
		if len(p.looks) != 0 {
			t.Errorf("%d channels are kept", len(p.looks))
		}
		time.Sleep(2 * wait) // the timer finds nobody, and ends nobody
		synctest.Wait()
		if p.next != 0 {
			t.Error("the timer is set for nobody")
		}
	})
}

// fleets are those of the tables in docs/channel.md.
var fleets = []int{100, 1000, 10_000}

// promised reads a row of a table in docs/channel.md: a time for each of fleets. A row that begins with "the same" is told apart by the row before it.
func promised(t *testing.T, after, row string) []time.Duration {
	t.Helper()
	b, err := os.ReadFile("../../docs/channel.md")
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(string(b), "\n")
	i := slices.IndexFunc(lines, func(l string) bool { return strings.HasPrefix(l, "| "+after) })
	j := slices.IndexFunc(lines[max(i, 0):], func(l string) bool { return strings.HasPrefix(l, "| "+row) })
	if i < 0 || j < 0 || j > 1 {
		t.Fatalf("docs/channel.md has no row %q, or none after %q", row, after)
	}
	cells := strings.Split(strings.Trim(lines[i+j], "| "), " | ")
	if len(cells) != 2+len(fleets) {
		t.Fatalf("the row %q has %d cells", row, len(cells))
	}
	var out []time.Duration
	for _, c := range cells[2:] {
		d, err := time.ParseDuration(strings.NewReplacer(" ", "", "min", "m").Replace(c))
		if err != nil {
			t.Fatalf("the row %q: %v", row, err)
		}
		out = append(out, d)
	}
	return out
}

// TestWhatTheVendorMayExpect holds the tables of docs/channel.md: how soon a node ends the channel of an appliance whose program hangs,
// for the beats that a fleet of that size is told.
func TestWhatTheVendorMayExpect(t *testing.T) {
	const watched, unwatched = "its program hangs, nobody watches it; both kernels watch the path | the node", "host, path or program; through a proxy, the inner TLS or a tailnet | the node"
	for _, c := range []struct {
		after, row string
		quiet      time.Duration
		ordered    bool
	}{
		{watched, watched, channel.MaxQuiet, false},
		{watched, "the same, and an order waits", channel.MaxQuiet, true},
		{unwatched, unwatched, channel.KnownQuiet, false},
		{unwatched, "the same, and an order waits", channel.KnownQuiet, true},
	} {
		for i, want := range promised(t, c.after, c.row) {
			var worst time.Duration
			synctest.Test(t, func(t *testing.T) { worst = hungFor(t, beatFor(fleets[i], c.quiet), c.ordered) })
			if worst > want || worst < want-want/20-time.Second {
				t.Errorf("%s, fleet of %d: found after %s, promised are %s", c.row, fleets[i], worst, want)
			}
		}
	}
}

// hungFor is the longest time that an appliance's channel outlives its program, over many moments at which it hangs. It has just spoken, or an
// order that was waiting is written just then.
func hungFor(t *testing.T, beat time.Duration, ordered bool) (worst time.Duration) {
	s := &Server{patience: newPatience()}
	for range 64 {
		time.Sleep(beat/61 + time.Millisecond)
		here, there := net.Pipe()
		l := &live{s: s, beat: beat, conn: tls.Client(here, &tls.Config{})}
		l.mu.Lock() // somebody writes, so its end says nothing and closes after the time for that
		l.heard.Store(int64(s.patience.now()))
		s.patience.keep(l)
		hung := time.Now()
		if ordered {
			l.expect()
		}
		if _, err := there.Read(make([]byte, 1)); err != io.EOF {
			t.Fatalf("the channel ended with %v", err)
		}
		worst = max(worst, time.Since(hung)-linger)
	}
	return worst
}
