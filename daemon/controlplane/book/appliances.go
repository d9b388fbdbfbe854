// SPDX-License-Identifier: Apache-2.0

package book

import (
	"iter"
	"sync"
	"time"

	"github.com/benbjohnson/immutable"

	"github.com/demarc-dev/demarc/fleet"
)

// applianceIndex is the appliances of one page, by name, and which of them changed last: whoever follows the book then looks at
// those alone, and not at all of them. It is a value like the maps of the page: Set gives another one. It holds pointers,
// to what is never modified: the map copies 32 values for each that is set.
type applianceIndex struct {
	by   *immutable.SortedMap[fleet.ApplianceID, *Appliance]
	last *change
}

// change is one step of the trail of changes. It is not part of the state: a restored page begins a new trail.
type change struct {
	name fleet.ApplianceID
	n    uint64
	prev *change // nil at every trailCut-th step, so that old steps can be freed
}

// trailCut bounds the trail, in steps. A follower that fell behind the cut looks at everything once.
const trailCut = 4096

func newApplianceIndex() applianceIndex {
	return applianceIndex{by: sorted[fleet.ApplianceID, *Appliance]()}
}

// Len is how many there are.
func (r applianceIndex) Len() int { return r.by.Len() }

// Get looks one up.
func (r applianceIndex) Get(name fleet.ApplianceID) (Appliance, bool) {
	if a, ok := r.by.Get(name); ok {
		return *a, true
	}
	return Appliance{}, false
}

// all goes through them by name.
func (r applianceIndex) all() iter.Seq[Appliance] {
	return func(yield func(Appliance) bool) {
		for it := r.by.Iterator(); !it.Done(); {
			if _, a, _ := it.Next(); !yield(*a) {
				return
			}
		}
	}
}

// Set gives the roll with a in it.
func (r applianceIndex) Set(name fleet.ApplianceID, a Appliance) applianceIndex {
	t := &change{name: name, n: 1}
	if r.last != nil {
		if t.n = r.last.n + 1; t.n%trailCut != 0 {
			t.prev = r.last
		}
	}
	return applianceIndex{r.by.Set(name, &a), t}
}

// since tells which appliances changed after the step from, newest first and perhaps several times over. ok is false
// where the trail does not reach back that far: then any of them may have changed.
func (r applianceIndex) since(from *change) (names []fleet.ApplianceID, ok bool) {
	for t := r.last; t != from; t = t.prev {
		if t == nil {
			return nil, false
		}
		names = append(names, t.name)
	}
	return names, true
}

// TotalsCache counts the appliances of a page. It looks at them again only when one of them, or a node, changed: one walk serves all
// that a scrape reads.
type TotalsCache struct {
	mu    sync.Mutex
	known bool
	at    *change
	stops *immutable.SortedMap[string, time.Time]
	Totals
}

type Totals struct {
	Status         map[string]int
	Online, Orders int
}

func (t *TotalsCache) Of(page State) Totals {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.known && t.at == page.appliances.last && t.stops == page.stopped {
		return t.Totals
	}
	t.known, t.at, t.stops = true, page.appliances.last, page.stopped
	t.Totals = Totals{Status: map[string]int{}}
	for a := range page.appliances.all() {
		t.Status[a.Status]++
		t.Orders += len(a.Orders)
		if page.Here(a) {
			t.Online++
		}
	}
	return t.Totals
}
