// SPDX-License-Identifier: Apache-2.0

package main

import (
	"slices"
	"time"

	"github.com/demarc-dev/demarc/fleettest/caller"
)

// crew is a caller of the nodes that are there: nodes come and go.
type crew struct {
	run  *run
	turn int
	v    *caller.Vendor
}

// refresh makes another caller where the nodes are others since. It keeps the old one where that fails.
func (c *crew) refresh() error {
	c.run.mu.Lock()
	turn, nodes := c.run.turn, slices.Clone(c.run.nodes)
	c.run.mu.Unlock()
	if c.v != nil && turn == c.turn {
		return nil
	}
	v, err := c.run.only(12*time.Second, nodes...)
	if err != nil {
		return err
	}
	if c.v != nil {
		v.At = c.v.At % len(v.Clients)
		c.v.Close()
	}
	c.v, c.turn = v, turn
	return nil
}

func (c *crew) close() { c.v.Close() }
