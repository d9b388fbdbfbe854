// SPDX-License-Identifier: Apache-2.0

package raft_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/raft"
)

// A leader that was paused while another was elected, and took changes, is asked for a read at the moment at which it wakes.
// The library's loop is held up in a write to the disk, so that the old leader does not notice before it is asked.
func TestAWokenLeaderIsNotBelieved(t *testing.T) {
	ca, dirs := newCA(t), make([]string, 3)
	for i := range dirs {
		dirs[i] = t.TempDir()
	}
	synctest.Test(t, func(t *testing.T) {
		var mu sync.Mutex
		gates := map[int]chan struct{}{}
		c := newFakeCluster(t, ca, dirs, func(i int, cfg *raft.Config) {
			cfg.Timing.DiskHang = time.Hour // it is not noticed
			cfg.Timing.Election, cfg.Timing.Heartbeat = 5*time.Second, 5*time.Second
			raft.SlowDisk(cfg, func() {
				mu.Lock()
				g := gates[i]
				mu.Unlock()
				if g != nil {
					<-g
				}
			})
		})
		defer func() {
			for i := range c.nodes {
				c.stop(i)
			}
		}()
		old := c.leader()
		other := (old + 1) % 3
		c.propose(old, "before")
		c.same([]string{"before"}) // and so it has settled in its term
		open := make(chan struct{})
		mu.Lock()
		gates[old] = open
		mu.Unlock()
		var wg sync.WaitGroup
		wg.Go(func() {
			if _, err := c.nodes[old].Propose(within(t), []byte("stuck")); err != nil && !errors.Is(err, fault.Unsure) {
				t.Errorf("what was being written when the node was paused: %v", err)
			}
		})
		synctest.Wait()
		if !c.nodes[old].Writing() {
			t.Fatal("the leader is not held up")
		}
		c.world.cut(c.members[old].Addr, true)
		for { // the others elect
			if id, ok := c.nodes[other].Leader(); ok && id != c.members[old].ID {
				break
			}
			time.Sleep(10 * time.Millisecond) // of the bubble's time
		}
		for k := range 3 {
			c.propose(other, fmt.Sprint("new", k))
		}
		c.world.cut(c.members[old].Addr, false) // it wakes
		if c.nodes[old].State().Role != "leader" {
			t.Fatal("the old leader knows already: nothing is tested")
		}
		ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
		defer cancel()
		if err := c.nodes[old].Read(ctx); err == nil && !slices.Contains(c.lists[old].all(), "new2") {
			t.Errorf("a read sees %q: it misses what was answered before it was asked", c.lists[old].all())
		}
		mu.Lock()
		gates[old] = nil
		mu.Unlock()
		close(open)
		wg.Wait()
		if err := c.nodes[old].Read(within(t)); err != nil || !slices.Contains(c.lists[old].all(), "new2") {
			t.Errorf("later: %v, %q", err, c.lists[old].all())
		}
	})
}
