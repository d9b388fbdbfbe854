// SPDX-License-Identifier: Apache-2.0

package grant_test

import (
	"crypto/ed25519"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/grant"
	"github.com/demarc-dev/demarc/seal"
)

// TestAGrantEnds (FAULTS.md A11): no grant is without an end, none ends before it begins or absurdly late, and a number of
// uses is not zero.
func TestAGrantEnds(t *testing.T) {
	year := func(y int) time.Time { return time.Date(y, 1, 1, 0, 0, 0, 0, time.UTC) }
	for name, c := range map[string]struct {
		phase fleet.Phase
		edit  func(*grant.Grant)
		want  string // "" where it is taken
	}{
		"90 days":                 {fleet.Deploy, func(g *grant.Grant) { g.Until = start.Add(90 * 24 * time.Hour) }, ""},
		"no end":                  {fleet.Deploy, func(g *grant.Grant) { g.Until = time.Time{} }, "until: is missing"},
		"ends as it begins":       {fleet.Deploy, func(g *grant.Grant) { g.Until = g.From }, "later than from"},
		"ends before it begins":   {fleet.Deploy, func(g *grant.Grant) { g.Until = g.From.Add(-time.Hour) }, "later than from"},
		"91 days":                 {fleet.Deploy, func(g *grant.Grant) { g.Until = start.Add(91 * 24 * time.Hour) }, "90 days"},
		"the year 9999":           {fleet.Deploy, func(g *grant.Grant) { g.Until = year(9999) }, "90 days"},
		"from the year 1 to 9999": {fleet.Deploy, func(g *grant.Grant) { g.From, g.Until = year(1).Add(time.Second), year(9999) }, "90 days"},
		"far ahead, short": {fleet.Deploy, func(g *grant.Grant) { g.From, g.Until = year(9000), year(9000).Add(time.Hour) },
			"from now"},
		"begins in 60, ends in 120": {
			fleet.Deploy, func(g *grant.Grant) { g.From, g.Until = start.Add(60*24*time.Hour), start.Add(120*24*time.Hour) }, "from now"},
		"negative uses":              {fleet.Deploy, func(g *grant.Grant) { g.Uses = -1 }, "uses"},
		"too many uses":              {fleet.Deploy, func(g *grant.Grant) { g.Uses = grant.MaxCount + 1 }, "uses"},
		"observe, without end":       {fleet.Observe, func(*grant.Grant) {}, ""},
		"observe, counted, no end":   {fleet.Observe, func(g *grant.Grant) { g.Uses, g.Until = 1, time.Time{} }, "until: is missing"},
		"observe, the year 9999":     {fleet.Observe, func(g *grant.Grant) { g.Until = year(9999) }, "90 days"},
		"operate.admin, without end": {fleet.OperateAdmin, func(g *grant.Grant) { g.Until = time.Time{} }, "until: is missing"},
	} {
		one := g(c.phase)
		c.edit(&one)
		_, err := grant.State{}.Give("g", one, nil, start)
		if c.want == "" && err != nil || c.want != "" && (!errors.Is(err, fault.Invalid) || !strings.Contains(fault.Text(err), c.want)) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
	}
}

// written is a document whose bytes a test chooses.
type written string

func (written) PayloadType() string { return grant.Grant{}.PayloadType() }

func (w written) MarshalJSON() ([]byte, error) { return []byte(w), nil }

func (w *written) UnmarshalJSON(b []byte) error { *w = written(b); return nil }

// TestZeroIsNotAbsent (FAULTS.md A11): a signed document that says 0 uses is not one without a limit.
func TestZeroIsNotAbsent(t *testing.T) {
	key := ed25519.NewKeyFromSeed([]byte(strings.Repeat("k", 32)))
	pub, err := seal.KeyOf(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	for uses, want := range map[string]grant.Count{"": 0, `"uses":1,`: 1, `"uses":1000000,`: grant.MaxCount,
		`"uses":0,`: -1, `"uses":-1,`: -1, `"uses":null,`: -1, `"uses":1.5,`: -1, `"uses":1000001,`: -1, `"uses":4294967297,`: -1,
		`"uses":1e0,`: -1, `"uses":"1",`: -1} {
		sealed, err := seal.Seal(
			written(
				fmt.Sprintf(
					`{"appliance":"eu-1","phase":"deploy","scope":{},"from":"2026-03-01T12:00:00Z","until":"2026-03-02T12:00:00Z",%s"nonce":%q}`, uses,
					nonce)), key)
		if err != nil {
			t.Fatal(uses, err)
		}
		got, _, err := seal.Open[grant.Grant](sealed, []seal.Key{pub})
		if (err != nil) != (want < 0) || err == nil && got.Uses != want {
			t.Errorf("%q: %d, %v, want %d", uses, got.Uses, err, want)
		}
	}
}

// TestEndedGrantsStayRefused: an ended grant makes way only if there is no more room, and does not come back with its uses,
// even if the book's clock, which was ahead, is set back before its end.
func TestEndedGrantsStayRefused(t *testing.T) {
	short := g(fleet.Deploy, func(x *grant.Grant) { x.Until, x.Uses = start.Add(time.Hour), 1 })
	s, err := grant.State{}.Give("short", short, nil, start)
	if err != nil {
		t.Fatal(err)
	}
	if s, err = s.Use("short", start); err != nil {
		t.Fatal(err)
	}
	later := start.Add(24 * time.Hour)
	for i := range grant.MaxHeld {
		if s, err = s.Give(fmt.Sprint("g", i), g(fleet.Install, func(x *grant.Grant) { x.From = later }), nil, later); err != nil {
			t.Fatal(i, err)
		}
	}
	if len(s.Held) != grant.MaxHeld || s.Held[0].ID != "g0" {
		t.Fatalf("%d grants, the first is %s", len(s.Held), s.Held[0].ID)
	}
	if _, err := s.Give("short", short, nil, start); !errors.Is(err, fault.Conflict) {
		t.Fatalf("a grant that had been used up came back: %v", err)
	}
}
