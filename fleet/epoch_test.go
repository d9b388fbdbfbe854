// SPDX-License-Identifier: Apache-2.0

package fleet_test

import (
	"math"
	"strings"
	"testing"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
)

// TestEpochsFollowEachOther: an older one, a twin and one that would use the numbers up are refused; from wherever an enemy got to, there
// is a next one. FAULTS.md I3.
func TestEpochsFollowEachOther(t *testing.T) {
	id := strings.Repeat("a", 32)
	at := func(n uint64) fleet.Epoch { return fleet.Epoch{Number: n, ID: id} }
	twin := fleet.Epoch{Number: 7, ID: strings.Repeat("b", 32)}
	for what, tc := range map[string]struct {
		last, next fleet.Epoch
		want       fault.Kind
	}{
		"the first restore":          {fleet.Epoch{}, at(1_790_000_000), ""},
		"the next":                   {at(7), at(8), ""},
		"the same again":             {at(7), at(7), fault.Conflict},
		"a twin":                     {at(7), twin, fault.Conflict},
		"an older one":               {at(7), at(6), fault.Conflict},
		"back to the first":          {at(7), fleet.Epoch{}, fault.Conflict},
		"as far as is free":          {at(7), at(fleet.EpochFree), ""},
		"too far":                    {at(7), at(fleet.EpochFree + 1), fault.Conflict},
		"the greatest number":        {at(fleet.EpochFree), at(math.MaxUint64), fault.Conflict},
		"a step beyond what is free": {at(fleet.EpochFree), at(fleet.EpochFree + fleet.EpochStep), ""},
		"too great a step":           {at(fleet.EpochFree), at(fleet.EpochFree + fleet.EpochStep + 1), fault.Conflict},
		"no id":                      {at(7), fleet.Epoch{Number: 8}, fault.Invalid},
		"no number":                  {at(7), fleet.Epoch{ID: id}, fault.Invalid},
		"an id that is no digits":    {at(7), fleet.Epoch{Number: 8, ID: strings.Repeat("G", 32)}, fault.Invalid},
	} {
		if got := fault.Of(tc.last.CheckNext(tc.next)); got != tc.want {
			t.Errorf("%s: %q, want %q", what, got, tc.want)
		}
	}
	for from, want := range map[uint64]uint64{1: 3, 3: 1, 4: 0, 5: 0, 0: 0} {
		if got := fleet.SpanOf(from, 3).Len(); got != want {
			t.Errorf("from %d to 3: %d numbers, want %d", from, got, want)
		}
	}
}
