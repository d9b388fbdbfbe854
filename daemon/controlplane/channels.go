// SPDX-License-Identifier: Apache-2.0

package controlplane

import (
	"crypto/tls"
	"maps"
	"slices"
	"sync"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
)

// greetingsEach is how many channels of one appliance may be open on which hello has not come yet.
const greetingsEach = 4

// channels is the live channels of this node, one an appliance.
type channels struct {
	mu      sync.Mutex
	open    map[fleet.ApplianceID]*live
	greeted map[fleet.ApplianceID][]*tls.Conn // hello has not come yet, oldest first
}

// greet counts a connection in that hello must come on, and gives the oldest where an appliance has too many of them.
func (c *channels) greet(name fleet.ApplianceID, conn *tls.Conn) (out *tls.Conn) {
	c.mu.Lock()
	defer c.mu.Unlock()
	all := append(c.greeted[name], conn)
	if len(all) > greetingsEach {
		out = all[0]
		all = slices.Delete(all, 0, 1)
	}
	c.greeted[name] = all
	return out
}

// greetedBy forgets a connection that greet counted.
func (c *channels) greetedBy(name fleet.ApplianceID, conn *tls.Conn) {
	c.mu.Lock()
	defer c.mu.Unlock()
	all := slices.DeleteFunc(c.greeted[name], func(o *tls.Conn) bool { return o == conn })
	if len(all) == 0 {
		delete(c.greeted, name)
		return
	}
	c.greeted[name] = all
}

var errReplaced = fault.New("controlplane.Channel", fault.Conflict, "a newer channel of this appliance took the place of this one")

// take makes l the appliance's channel and gives the older one.
func (c *channels) take(l *live) *live {
	c.mu.Lock()
	defer c.mu.Unlock()
	old := c.open[l.name]
	c.open[l.name] = l
	return old
}

// drop forgets l and reports whether it was still the appliance's channel.
func (c *channels) drop(l *live) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.open[l.name] != l {
		return false
	}
	delete(c.open, l.name)
	return true
}

func (c *channels) get(name fleet.ApplianceID) *live {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.open[name]
}

func (c *channels) all() []*live {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Collect(maps.Values(c.open))
}

func (c *channels) names() []fleet.ApplianceID {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Sorted(maps.Keys(c.open))
}

func (c *channels) count() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.open)
}
