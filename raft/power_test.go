// SPDX-License-Identifier: Apache-2.0

package raft_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/identity"
	"github.com/demarc-dev/demarc/raft"
	"github.com/demarc-dev/demarc/raft/wal/waltest"
)

// Machines lose power in the midst of changes, one at a time or all at once, and with it any sectors that were not synced. Every
// other cluster has entries so large, and snapshots so often, that files of the log are begun and dropped meanwhile. Each answer
// that was given before holds on every node, once and in one order.
func TestFakeMinutesOfPowerFailures(t *testing.T) {
	seeds := 4
	if s := os.Getenv("DEMARC_CRASH_SEEDS"); s != "" {
		var err error
		if seeds, err = strconv.Atoi(s); err != nil {
			t.Fatal(err)
		}
	}
	for seed := range uint64(seeds) {
		t.Run(fmt.Sprint("seed ", seed), func(t *testing.T) {
			ca := newCA(t)
			dirs := []string{t.TempDir(), t.TempDir(), t.TempDir()}
			synctest.Test(t, func(t *testing.T) { newPowered(t, ca, dirs, seed).run() })
		})
	}
}

// powered is a cluster of machines that lose power.
type powered struct {
	*fakeCluster
	disks []*waltest.Script
	r     *rand.Rand

	mu    sync.Mutex
	wide  int             // bytes of a third of the proposals, and twice as many of another third
	life  []int           // of each machine
	sure  map[string]bool // answered, by a machine that had power
	tried []string
	lost  int // proposals that were on their way when their machine lost power
}

func newPowered(t *testing.T, ca *identity.Authority, dirs []string, seed uint64) *powered {
	p := &powered{disks: []*waltest.Script{waltest.New(), waltest.New(), waltest.New()}, r: rand.New(rand.NewPCG(seed, 11)),
		life: make([]int, 3), sure: map[string]bool{}}
	slow := rand.New(rand.NewPCG(seed, 12))
	if seed%2 == 1 {
		p.wide = 90_000
	}
	p.fakeCluster = newFakeCluster(t, ca, dirs, func(i int, cfg *raft.Config) {
		raft.SmallLog(cfg, 2<<20)
		raft.DiskOf(cfg, p.disks[i])
		if p.wide > 0 {
			cfg.Timing.SnapshotThreshold, cfg.Timing.SnapshotEvery, cfg.Timing.Trailing = 20, time.Second, 5
		}
		raft.AsyncDisk(cfg, func() {
			p.mu.Lock()
			wait := time.Duration(slow.IntN(80)) * time.Millisecond
			p.mu.Unlock()
			time.Sleep(wait) // in a bubble
		})
	})
	p.t = t
	return p
}

// propose does not wait.
func (p *powered) propose(wg *sync.WaitGroup, i int, line string) {
	p.mu.Lock()
	life := p.life[i]
	n := p.nodes[i]
	p.tried = append(p.tried, line)
	p.mu.Unlock()
	wg.Go(func() {
		ctx, cancel := context.WithTimeout(p.t.Context(), 5*time.Second)
		defer cancel()
		_, err := n.Propose(ctx, []byte(line))
		p.mu.Lock()
		defer p.mu.Unlock()
		switch k := fault.Of(err); {
		case p.life[i] != life: // the answer is lost
			p.lost++
		case err == nil:
			p.sure[line] = true
		case k != fault.Unsure && k != fault.Unavailable && k != fault.NotLeader:
			p.t.Errorf("%.12s: %v", line, err)
		}
	})
}

// fail takes the power of machines away, and restores it.
func (p *powered) fail(which ...int) {
	for _, i := range which {
		p.world.cut(p.members[i].Addr, true)
		p.mu.Lock()
		p.life[i]++
		image := p.disks[i].Crash(p.r)
		p.mu.Unlock()
		gone, stop := context.WithCancel(context.Background())
		stop()
		if err := p.nodes[i].Close(gone); err != nil { // what it does from here on has no effect
			p.t.Fatal(err)
		}
		p.disks[i] = image
	}
	for _, i := range which {
		p.world.cut(p.members[i].Addr, false)
		p.up(i)
	}
}

func (p *powered) run() {
	t := p.t
	var wg sync.WaitGroup
	p.lead()
	line := 0
	for range 60 {
		for range 1 + p.r.IntN(6) {
			p.propose(&wg, p.r.IntN(3), fmt.Sprint("line", line, strings.Repeat("x", p.r.IntN(3)*p.wide)))
			line++
			if p.r.IntN(2) == 0 {
				time.Sleep(time.Duration(p.r.IntN(60)) * time.Millisecond)
			}
		}
		switch p.r.IntN(6) {
		case 0:
			p.fail(0, 1, 2)
		case 1, 2:
			p.fail(p.r.IntN(3))
		case 3:
			if id, ok := p.nodes[0].Leader(); ok { // and a follower
				lead := slices.IndexFunc(p.members, func(m raft.Member) bool { return m.ID == id })
				p.fail(lead, (lead+1)%3)
			}
		default:
			time.Sleep(time.Duration(p.r.IntN(4000)) * time.Millisecond)
		}
	}
	wg.Wait()
	for i := range p.nodes {
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
		if err := p.nodes[i].Read(ctx); err != nil {
			t.Fatal(err)
		}
		cancel()
	}
	base := p.lists[0].all()
	for i := range p.lists {
		if got := p.lists[i].all(); !slices.Equal(got, base) {
			t.Errorf("n%d has %d lines, n0 has %d, or in another order", i, len(got), len(base))
		}
	}
	for line := range p.sure {
		if !slices.Contains(base, line) {
			t.Errorf("%.12q was answered and is lost", line)
		}
	}
	for i, line := range base {
		if !slices.Contains(p.tried, line) || slices.Contains(base[:i], line) {
			t.Errorf("%.12q is there twice, or was never proposed", line)
		}
	}
	if len(p.sure) < 40 || p.lost == 0 {
		t.Errorf("%d of %d were answered, %d were cut off: the cluster hardly lived", len(p.sure), len(p.tried), p.lost)
	}
	t.Logf("%d of %d answered, %d cut off by a power failure", len(p.sure), len(p.tried), p.lost)
	for i := range p.nodes {
		p.stop(i)
	}
}
