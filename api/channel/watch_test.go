// SPDX-License-Identifier: Apache-2.0

package channel_test

import (
	"testing"
	"time"

	"github.com/demarc-dev/demarc/api/channel"
)

// dial keeps the deadline that was set last.
type dial struct{ at time.Time }

func (d *dial) SetReadDeadline(t time.Time) error { d.at = t; return nil }

func TestWatch(t *testing.T) {
	began := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	at := func(s int) time.Time { return began.Add(time.Duration(s) * time.Second) }
	type step struct {
		do   string // listen, heard or ask
		now  int    // seconds
		till int    // the deadline after it
	}
	for name, c := range map[string]struct {
		beat  time.Duration
		steps []step
	}{
		"silence":                   {15 * time.Minute, []step{{"listen", 0, 960}, {"heard", 100, 960}, {"listen", 100, 1060}}},
		"who asks waits a minute":   {15 * time.Minute, []step{{"listen", 0, 960}, {"ask", 10, 70}}},
		"more questions wait along": {15 * time.Minute, []step{{"listen", 0, 960}, {"ask", 10, 70}, {"ask", 30, 70}, {"ask", 69, 70}}},
		"an answer begins anew": {15 * time.Minute,
			[]step{{"listen", 0, 960}, {"ask", 10, 70}, {"heard", 20, 70}, {"listen", 20, 980}, {"ask", 30, 90}}},
		"no deadline is put off":  {25 * time.Second, []step{{"listen", 0, 75}, {"ask", 20, 75}, {"ask", 40, 75}, {"ask", 60, 75}}},
		"asked before it listens": {15 * time.Minute, []step{{"ask", 0, 60}, {"listen", 5, 65}}},
		"a small fleet":           {5 * time.Second, []step{{"listen", 0, 15}, {"ask", 4, 15}, {"heard", 5, 15}, {"listen", 5, 20}}},
		"asked between two reads": {15 * time.Minute, []step{{"listen", 0, 960}, {"heard", 10, 960}, {"ask", 11, 71}, {"listen", 12, 72}}},
	} {
		t.Run(name, func(t *testing.T) {
			var w channel.Watch
			d := &dial{at(60)}
			for i, s := range c.steps {
				switch s.do {
				case "listen":
					w.Listen(d, at(s.now), c.beat)
				case "heard":
					w.Heard()
				case "ask":
					w.Ask(d, at(s.now))
				}
				if !d.at.Equal(at(s.till)) {
					t.Fatalf("step %d, %s at %d s: the deadline is at %s, want %d s", i, s.do, s.now, d.at.Sub(began), s.till)
				}
			}
		})
	}
}
