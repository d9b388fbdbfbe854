// SPDX-License-Identifier: Apache-2.0

package clock_test

import (
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/raft/clock"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func at(id string, shows time.Duration) clock.Reading { return clock.Between(id, shows, shows) }

// What a majority of the clocks shows is the time.
func TestAMajorityDecidesTheTime(t *testing.T) {
	const s, m, h = time.Second, time.Minute, time.Hour
	for _, tc := range []struct {
		name   string
		clocks []clock.Reading
		quorum bool
		with   string // "": no majority agrees
		by     time.Duration
	}{
		{"one voter", []clock.Reading{at("a", h)}, true, "a", h},
		{"three alike", []clock.Reading{at("a", 0), at("b", s), at("c", -s)}, true, "a b c", 0},
		{"one ahead", []clock.Reading{at("a", h), at("b", 0), at("c", s)}, true, "b c", 0},
		{"one behind", []clock.Reading{at("a", 0), at("b", -10*h), at("c", s)}, true, "a c", 0},
		{"the asker itself", []clock.Reading{at("a", 10*h), at("b", 0), at("c", 0)}, true, "b c", 0},
		{"all three apart", []clock.Reading{at("a", 0), at("b", m), at("c", 2*m)}, true, "", 0},
		{"two that differ", []clock.Reading{at("a", 0), at("b", m)}, true, "", 0},
		{"two alike", []clock.Reading{at("a", 0), at("b", 20*s)}, true, "a b", 0},
		{"two of three, one silent", []clock.Reading{at("a", 0), at("b", s), clock.Unknown("c")}, true, "a b", 0},
		{"two of three that differ", []clock.Reading{at("a", 0), at("b", h), clock.Unknown("c")}, true, "", 0},
		{"one of three", []clock.Reading{at("a", 0), clock.Unknown("b"), clock.Unknown("c")}, false, "", 0},
		{"two pairs", []clock.Reading{at("a", 0), at("b", 0), at("c", h), at("d", h)}, true, "", 0},
		{"three of five", []clock.Reading{at("a", 0), at("b", h), at("c", s), at("d", 2*s), at("e", -h)}, true, "a c d", s},
		{"two of five", []clock.Reading{at("a", 0), at("b", h), at("c", s), at("d", 2*h), at("e", -h)}, true, "", 0},
		{"a bridge between two ends", []clock.Reading{at("a", 0), at("b", 25*s), at("c", 50*s)}, true, "a b c", 25 * s},
		{"the closer of two pairs of three", []clock.Reading{at("a", 0), at("b", 29*s), at("c", 60*s)}, true, "a b", 0},
		{"a slow answer hides a difference", []clock.Reading{at("a", 0), clock.Between("b", 29*s, 31*s)}, true, "a b", 0},
		{"a slow answer does not hide an hour", []clock.Reading{at("a", 0), clock.Between("b", h-s, h+s)}, true, "", 0},
	} {
		t.Run(tc.name, func(t *testing.T) {
			for range len(tc.clocks) { // in whatever order
				tc.clocks = append(tc.clocks[1:], tc.clocks[0])
				a := clock.Agree(tc.clocks)
				by := a.Time(0).Sub(time.Unix(0, 0))
				if a.Quorum != tc.quorum || strings.Join(a.With, " ") != tc.with || a.OK != (tc.with != "") || a.OK && by != tc.by {
					t.Fatalf("quorum %v, by %s, with %q; want %v, %s, %q", a.Quorum, by, a.With, tc.quorum, tc.by, tc.with)
				}
			}
		})
	}
}

func TestStampsAreJudged(t *testing.T) {
	const s, h = time.Second, time.Hour
	three := []clock.Reading{at("a", 0), at("b", 0), at("c", 0)}
	off := []clock.Reading{at("a", 0), at("b", h), at("c", 0)}
	for _, tc := range []struct {
		name   string
		stamp  time.Duration
		clocks []clock.Reading
		kind   fault.Kind
		says   string
	}{
		{"now", 0, three, "", ""},
		{"a minute ahead", 60 * s, three, "", ""},
		{"a minute behind", -60 * s, three, "", ""},
		{"more ahead", 61 * s, three, fault.Unavailable, "1m1s ahead of the clocks of a, b, c"},
		{"more behind", -61 * s, three, fault.Unavailable, "1m1s behind the clocks of a, b, c"},
		{"by a clock that is off", h, off, fault.Unavailable,
			`the clock of node "b", by which this was stamped, is 1h0m0s ahead of those of a, c`},
		{"by the others", 0, off, "", ""},
		{"two that differ", 0, off[:2], fault.Unavailable,
			`no majority of the voters' clocks agrees, so that nothing can be changed: that of node "b" is 1h0m0s ahead of that of "a"`},
		{"not heard yet", 0, []clock.Reading{at("a", 0), clock.Unknown("b"), clock.Unknown("c")}, fault.NotLeader, "has not heard"},
		{"a single node has no other to ask", 10 * h, []clock.Reading{at("a", 10*h)}, "", ""},
		{"a majority that is wrong alike", h, []clock.Reading{at("a", h), at("b", h), at("c", 0)}, "", ""},
		{"what the round trip took", 62 * s, []clock.Reading{at("a", 0), clock.Between("b", -s, 3*s), clock.Between("c", 2*s, 4*s)}, "", ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			err := clock.Agree(tc.clocks).Judge(clock.Between("", tc.stamp, tc.stamp))
			if fault.Of(err) != tc.kind || !strings.Contains(fault.Text(err), tc.says) {
				t.Fatalf("%v, want %q %q", err, tc.kind, tc.says)
			}
		})
	}
}

// The time that request and answer took is uncertain: the clock may have been read at its beginning or at its end.
func TestTheRoundTripIsConsidered(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := clock.New(nil)
		asked := c.Moment()
		shows := time.Now().Add(time.Hour)
		time.Sleep(4 * time.Second) // in a bubble
		c.Record("n", shows.UnixNano(), asked)
		least, most := c.Of("n").Ahead(c.Own(""))
		if least != time.Hour-4*time.Second || most != time.Hour {
			t.Fatalf("ahead by %s to %s", least, most)
		}
	})
}
