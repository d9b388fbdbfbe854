// SPDX-License-Identifier: Apache-2.0

package book

import (
	"encoding/json"
	"sync"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/manifest"
)

// maxPlans is how many compiled plans are cached: the last good one, the approved one, and those under review.
const maxPlans = 8

// Plans is a cache of compiled plans. A release is named by its digest, so its plan never changes. The loops need it every few seconds,
// and reading a Compose file takes milliseconds.
type Plans struct {
	mu sync.Mutex
	of map[planKey]manifest.Plan
}

type planKey struct {
	release fleet.Digest
	choices string // as JSON, which sorts the keys of maps
}

// Plan is [State.Plan], and caches what it compiled. Callers must not change the plan. It may be called concurrently.
func (c *Plans) Plan(st State, d fleet.Digest) (manifest.Plan, manifest.Release, Offer, error) {
	rel, o, err := st.release(d)
	if err != nil {
		return manifest.Plan{}, rel, o, err
	}
	chosen := st.choices()
	text, err := json.Marshal(chosen)
	if err != nil {
		return manifest.Plan{}, rel, o, fault.At("appliance.plan", fault.Internal, err)
	}
	key := planKey{o.Digest, string(text)}
	c.mu.Lock()
	defer c.mu.Unlock()
	if p, ok := c.of[key]; ok {
		return p, rel, o, nil
	}
	p, err := manifest.Compile(rel, chosen)
	if err != nil {
		return p, rel, o, err
	}
	if c.of == nil || len(c.of) >= maxPlans {
		c.of = map[planKey]manifest.Plan{}
	}
	c.of[key] = p
	return p, rel, o, nil
}
