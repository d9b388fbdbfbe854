// SPDX-License-Identifier: Apache-2.0

package raft_test

import (
	"context"
	"fmt"
	"os"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/raft"
)

// held is a disk whose background syncs wait while it is shut.
type held struct {
	mu   sync.Mutex
	open chan struct{}
}

func (h *held) gate() {
	h.mu.Lock()
	open := h.open
	h.mu.Unlock()
	if open != nil {
		<-open
	}
}

func (h *held) shut() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.open = make(chan struct{})
}

func (h *held) release() {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.open != nil {
		close(h.open)
	}
	h.open = nil
}

// asyncCluster is three nodes in fake time whose background syncs can be held, and the one that leads.
func asyncCluster(t *testing.T, do func(c *fakeCluster, disks []*held, lead int)) {
	ca := newCA(t)
	dirs := []string{t.TempDir(), t.TempDir(), t.TempDir()}
	synctest.Test(t, func(t *testing.T) {
		disks := []*held{{}, {}, {}}
		c := newFakeCluster(t, ca, dirs, func(i int, cfg *raft.Config) {
			cfg.Timing.DiskHang = 24 * time.Hour // not what this is about
			raft.AsyncDisk(cfg, disks[i].gate)
		})
		c.t = t
		defer c.end(disks)
		lead := c.lead()
		c.propose(lead, "first")
		do(c, disks, lead)
	})
}

func (f *fakeCluster) end(disks []*held) {
	for _, d := range disks {
		d.release()
	}
	for i := range f.nodes {
		f.stop(i)
	}
}

// lead waits for a leader.
func (f *fakeCluster) lead() int {
	f.t.Helper()
	for range 600 {
		for i, n := range f.nodes {
			if n != nil && n.State().Role == "leader" {
				return i
			}
		}
		time.Sleep(100 * time.Millisecond) // in a bubble
	}
	f.t.Fatal("no leader in a minute")
	return -1
}

// answer is what a proposal came to.
type answer struct {
	mu   sync.Mutex
	done bool
	err  error
}

func (f *fakeCluster) begin(i int, line string, timeout time.Duration) *answer {
	a := &answer{}
	go func() {
		ctx, cancel := context.WithTimeout(context.Background(), timeout)
		defer cancel()
		_, err := f.nodes[i].Propose(ctx, []byte(line))
		a.mu.Lock()
		defer a.mu.Unlock()
		a.done, a.err = true, err
	}()
	return a
}

func (a *answer) get() (bool, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.done, a.err
}

// crash takes the machine of a node away while its disk is held: what comes back is its directory at this moment, without the
// entries from an index on. What the process does after this moment has no effect.
func (f *fakeCluster) crash(i int, disk *held, from uint64) {
	f.t.Helper()
	f.world.cut(f.members[i].Addr, true)
	image := f.t.TempDir()
	if err := os.CopyFS(image, os.DirFS(f.dirs[i])); err != nil {
		f.t.Fatal(err)
	}
	if err := raft.Lose(image, from); err != nil {
		f.t.Fatal(err)
	}
	disk.release()
	f.stop(i)
	f.dirs[i] = image
	f.world.cut(f.members[i].Addr, false)
}

// A change that all followers have on disk and the leader has not is neither answered nor applied by any node, however long
// that takes, also by one that comes back meanwhile. It is when the leader has it.
func TestNothingIsAnsweredBeforeTheLeadersDiskHasIt(t *testing.T) {
	for _, away := range []bool{false, true} {
		t.Run(fmt.Sprint("one was away ", away), func(t *testing.T) {
			asyncCluster(t, func(c *fakeCluster, disks []*held, lead int) {
				other := (lead + 1) % 3
				c.world.cut(c.members[other].Addr, away)
				disks[lead].shut()
				a := c.begin(lead, "second", time.Hour)
				time.Sleep(5 * time.Second) // in a bubble
				c.world.cut(c.members[other].Addr, false)
				time.Sleep(10 * time.Second)
				synctest.Wait()
				last := c.nodes[lead].State().Last
				for i, n := range c.nodes {
					if s := n.State(); s.Last != last {
						t.Errorf("n%d has entries up to %d, the leader up to %d: they don't write at the same time", i, s.Last, last)
					}
					if got := c.lists[i].all(); !slices.Equal(got, []string{"first"}) {
						t.Errorf("n%d applied %q, and the leader's disk has not got it", i, got)
					}
				}
				if done, err := a.get(); done {
					t.Errorf("answered (%v), and the leader's disk has not got it", err)
				}
				if c.nodes[lead].State().Role != "leader" {
					t.Error("it leads no more")
				}
				disks[lead].release()
				synctest.Wait()
				if done, err := a.get(); !done || err != nil {
					t.Errorf("done %t: %v", done, err)
				}
				c.same([]string{"first", "second"})
			})
		})
	}
}

// Only a leader's proposals are written asynchronously. What a follower acknowledged, an election and a change of members are on disk
// before anything follows from it.
func TestOnlyTheLeadersProposalsAreAsync(t *testing.T) {
	asyncCluster(t, func(c *fakeCluster, disks []*held, lead int) {
		onDisk := func(i int) {
			t.Helper()
			if n := c.nodes[i]; n.Synced() != n.State().Last {
				t.Errorf("n%d has entries up to %d, and up to %d on disk", i, n.State().Last, n.Synced())
			}
		}
		next := (lead + 1) % 3
		disks[next].shut()
		c.propose(lead, "second")
		onDisk(next)
		c.must(c.nodes[lead].StepDown())
		for _, d := range disks {
			d.release()
			d.shut()
		}
		lead = c.lead()
		c.must(c.nodes[lead].Read(within(c.t))) // after its first entry
		onDisk(lead)
		c.must(c.change(lead, raft.Demote, c.members[(lead+1)%3].ID))
		onDisk(lead)
	})
}

// The leader and one follower crash when that follower alone has a change on disk. What the other two agree upon then holds,
// and the change was nowhere taken for more than it was. Both ends are tried: that the copy is found again, and that not.
func TestWhatOneFollowerHasIsNotCommitted(t *testing.T) {
	for _, found := range []bool{true, false} {
		t.Run(fmt.Sprint("found ", found), func(t *testing.T) {
			asyncCluster(t, func(c *fakeCluster, disks []*held, lead int) {
				has, other := (lead+1)%3, (lead+2)%3
				c.world.cut(c.members[other].Addr, true)
				c.propose(lead, "while two")
				disks[lead].shut()
				before := c.nodes[lead].State().Last
				a := c.begin(lead, "lost", time.Hour)
				time.Sleep(10 * time.Second) // in a bubble
				synctest.Wait()
				if s := c.nodes[has].State(); s.Last != before+1 || slices.Contains(c.lists[has].all(), "lost") {
					t.Fatalf("the follower has entries up to %d, want %d, and applied %q", s.Last, before+1, c.lists[has].all())
				}
				if done, err := a.get(); done {
					t.Fatalf("answered: %v", err)
				}
				c.crash(lead, disks[lead], before+1)
				c.world.cut(c.members[has].Addr, true)
				want := []string{"first", "while two"}
				if found {
					c.world.cut(c.members[has].Addr, false)
					want = append(want, "lost")
				}
				c.world.cut(c.members[other].Addr, false)
				if !found {
					c.up(lead)
				}
				c.lead()
				c.propose(other, "after")
				if found {
					c.up(lead)
				} else {
					c.world.cut(c.members[has].Addr, false)
				}
				c.lead()
				c.propose(has, "end")
				c.same(append(want, "after", "end"))
			})
		})
	}
}

// A leader whose disk does not return from a background sync is cut off like one that does not return from a write: another one
// leads, and no node loses what was written.
func TestABackgroundSyncThatHangsIsNoticed(t *testing.T) {
	ca := newCA(t)
	dirs := []string{t.TempDir(), t.TempDir(), t.TempDir()}
	synctest.Test(t, func(t *testing.T) {
		disks := []*held{{}, {}, {}}
		c := newFakeCluster(t, ca, dirs, func(i int, cfg *raft.Config) { raft.AsyncDisk(cfg, disks[i].gate) })
		c.t = t
		defer c.end(disks)
		lead := c.lead()
		c.propose(lead, "first")
		disks[lead].shut()
		a := c.begin(lead, "second", time.Hour)
		time.Sleep(time.Minute) // in a bubble
		synctest.Wait()
		if id, ok := c.nodes[(lead+1)%3].Leader(); !ok || id == c.members[lead].ID {
			t.Fatalf("after a minute %q leads", id)
		}
		c.propose((lead+1)%3, "third")
		disks[lead].release()
		c.same([]string{"first", "second", "third"})
		if done, err := a.get(); !done || err != nil && fault.Of(err) != fault.Unsure {
			t.Errorf("done %t: %v", done, err)
		}
	})
}
