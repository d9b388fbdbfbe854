// SPDX-License-Identifier: Apache-2.0

package book

import (
	"iter"
	"sync"
	"time"

	"github.com/benbjohnson/immutable"

	"github.com/demarc-dev/demarc/fleet"
)

// applianceIndex is the appliances of one state, by name, and which of them changed last, so that a follower of the book reads only
// those. It is persistent like the maps of the state: Set returns another one. It holds pointers to values that are never modified, since
// the map copies 32 values for each Set.
type applianceIndex struct {
	by   *immutable.SortedMap[fleet.ApplianceID, *Appliance]
	last *change
}

// change is one step of the trail of changes. It is not part of the state: a restored state begins a new trail.
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

// Len is the number of appliances.
func (r applianceIndex) Len() int { return r.by.Len() }

// Get returns an appliance by name.
func (r applianceIndex) Get(name fleet.ApplianceID) (Appliance, bool) {
	if a, ok := r.by.Get(name); ok {
		return *a, true
	}
	return Appliance{}, false
}

// all iterates over the appliances by name.
func (r applianceIndex) all() iter.Seq[Appliance] {
	return func(yield func(Appliance) bool) {
		for it := r.by.Iterator(); !it.Done(); {
			if _, a, _ := it.Next(); !yield(*a) {
				return
			}
		}
	}
}

// Set returns the index with a in it.
func (r applianceIndex) Set(name fleet.ApplianceID, a Appliance) applianceIndex {
	t := &change{name: name, n: 1}
	if r.last != nil {
		if t.n = r.last.n + 1; t.n%trailCut != 0 {
			t.prev = r.last
		}
	}
	return applianceIndex{r.by.Set(name, &a), t}
}

// since returns the appliances that changed after the step from, newest first, possibly repeated. ok is false if the trail does not reach
// back that far: then any of them may have changed.
func (r applianceIndex) since(from *change) (names []fleet.ApplianceID, ok bool) {
	for t := r.last; t != from; t = t.prev {
		if t == nil {
			return nil, false
		}
		names = append(names, t.name)
	}
	return names, true
}

// TotalsCache counts the appliances of a state. It counts again only if an appliance or a node changed, so that one walk serves a whole
// scrape.
type TotalsCache struct {
	mu    sync.Mutex
	known bool
	at    *change
	stops *immutable.SortedMap[string, time.Time]
	Totals
}

// Totals counts appliances.
type Totals struct {
	Status         map[string]int
	Online, Orders int
}

// Of returns the totals of a state. It may be called concurrently.
func (t *TotalsCache) Of(st State) Totals {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.known && t.at == st.appliances.last && t.stops == st.stopped {
		return t.Totals
	}
	t.known, t.at, t.stops = true, st.appliances.last, st.stopped
	t.Totals = Totals{Status: map[string]int{}}
	for a := range st.appliances.all() {
		t.Status[a.Status]++
		t.Orders += len(a.Orders)
		if st.Here(a) {
			t.Online++
		}
	}
	return t.Totals
}
