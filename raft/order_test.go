// SPDX-License-Identifier: Apache-2.0

package raft_test

import (
	"cmp"
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/raft"
)

// event is a call that was answered: a write with the place that its line got, or a read with the number of lines seen.
type event struct {
	write      bool
	node       int
	begin, end time.Duration
	value      int
}

// disorder finds two events that no single order explains. Places are unique and reads see all lines up to their number,
// so it is enough to compare each event with the largest value among those that ended before it began.
func disorder(events []event) error {
	byEnd := slices.SortedFunc(slices.Values(events), func(a, b event) int { return cmp.Compare(a.end, b.end) })
	byBegin := slices.SortedFunc(slices.Values(events), func(a, b event) int { return cmp.Compare(a.begin, b.begin) })
	var latest event
	for _, e := range byBegin {
		for len(byEnd) > 0 && byEnd[0].end < e.begin {
			if byEnd[0].value > latest.value {
				latest = byEnd[0]
			}
			byEnd = byEnd[1:]
		}
		if e.value < latest.value || (e.write && e.value == latest.value) {
			return fmt.Errorf("%+v came after %+v had been answered", e, latest)
		}
	}
	return nil
}

func TestDisorderIsFound(t *testing.T) {
	for name, tc := range map[string]struct {
		events []event
		bad    bool
	}{
		"in order":          {[]event{{true, 0, 0, 1, 1}, {false, 1, 2, 3, 1}, {true, 0, 4, 5, 2}}, false},
		"at the same time":  {[]event{{true, 0, 0, 9, 2}, {true, 1, 1, 2, 1}, {false, 2, 3, 4, 2}, {false, 2, 1, 5, 0}}, false},
		"a stale read":      {[]event{{true, 0, 0, 1, 1}, {false, 1, 2, 3, 0}}, true},
		"reads go back":     {[]event{{true, 0, 0, 9, 1}, {false, 1, 1, 2, 1}, {false, 2, 3, 4, 0}}, true},
		"a write goes back": {[]event{{true, 0, 0, 1, 2}, {true, 1, 2, 3, 1}}, true},
		"seen beforehand":   {[]event{{false, 1, 0, 1, 1}, {true, 0, 2, 3, 1}}, true},
	} {
		if err := disorder(tc.events); (err != nil) != tc.bad {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// Writes and reads on all nodes, while leaders are cut off, come back, and are made to step down, have one order.
func TestOneOrderThroughCutsAndTransfers(t *testing.T) {
	c := start(t, 3, steady)
	c.leader()
	ctx, cancel := context.WithCancel(context.Background())
	var (
		mu     sync.Mutex
		events []event
		unsure int
		wg     sync.WaitGroup
	)
	t.Cleanup(func() { cancel(); wg.Wait() }) // before the nodes end, also if the test fails
	zero := time.Now()
	for s := range 9 {
		node := s % 3
		wg.Go(func() {
			for k := 0; ctx.Err() == nil; k++ {
				e := event{write: k%3 == 0, node: node, begin: time.Since(zero)}
				call, done := context.WithTimeout(context.Background(), 2*time.Second)
				var err error
				if e.write {
					var ans []byte
					if ans, err = c.nodes[node].Propose(call, fmt.Appendf(nil, "s%d-%d", s, k)); err == nil {
						place, _, _ := strings.Cut(string(ans), ":")
						e.value, err = strconv.Atoi(place)
					}
				} else if err = c.nodes[node].Read(call); err == nil {
					e.value = len(c.lists[node].all())
				}
				done()
				e.end = time.Since(zero)
				mu.Lock()
				switch k := fault.Of(err); {
				case err == nil:
					events = append(events, e)
				case e.write && k == fault.Unsure:
					unsure++
				case k != fault.Unavailable:
					t.Errorf("node %d: %v", node, err)
				}
				mu.Unlock()
			}
		})
	}
	more := func(n int) {
		count := func() int { mu.Lock(); defer mu.Unlock(); return len(events) }
		want := count() + n
		if !poll(time.Minute, func() bool { return count() >= want }) {
			t.Fatalf("nothing moves: %d of %d calls were answered, %d are unsure", count(), want, unsure)
		}
	}
	random := rand.New(rand.NewPCG(1, 2))
	for range 8 {
		more(200)
		lead := c.leader()
		switch random.IntN(3) {
		case 0: // the others must elect while the old leader still believes
			c.nodes[lead].Cut(true)
			more(200)
			c.nodes[lead].Cut(false)
		case 1: // the leader loses one follower
			c.nodes[(lead+1)%3].Cut(true)
			more(100)
			c.nodes[(lead+1)%3].Cut(false)
		default:
			_ = c.nodes[lead].StepDown()
		}
	}
	cancel()
	wg.Wait()
	if err := disorder(events); err != nil {
		t.Error(err)
	}
	c.leader()
	c.same(nil)
	lines := c.lists[0].all()
	c.same(lines)
	slices.Sort(lines)
	if len(slices.Compact(lines)) != len(c.lists[0].all()) {
		t.Error("a line is there twice")
	}
	t.Logf("%d answered, %d unsure", len(events), unsure)
}

// A leader that was held up while another was elected still believes that it leads; a read must not believe it.
func TestAReadDoesNotBelieveAnOldLeader(t *testing.T) {
	var mu sync.Mutex
	gates := map[int]chan struct{}{}
	c := start(t, 3, func(i int, cfg *raft.Config) {
		cfg.Timing.DiskHang = time.Hour // it is not noticed
		raft.SlowDisk(cfg, func() {
			mu.Lock()
			g := gates[i]
			mu.Unlock()
			if g != nil {
				<-g
			}
		})
	})
	old := c.leader()
	c.propose(old, "before")
	if err := c.nodes[old].Read(within(t)); err != nil { // it has settled in its term
		t.Fatal(err)
	}
	open := make(chan struct{})
	mu.Lock()
	gates[old] = open
	mu.Unlock()
	var wg sync.WaitGroup
	wg.Go(func() { _, _ = c.nodes[old].Propose(within(t), []byte("stuck")) })
	waitFor(t, func() bool { return c.nodes[old].Writing() })
	c.nodes[old].Cut(true)
	other := (old + 1) % 3
	waitFor(t, func() bool { id, ok := c.nodes[other].Leader(); return ok && id != c.members[old].ID })
	c.propose(other, "new")
	c.nodes[old].Cut(false)
	if c.nodes[old].State().Role != "leader" {
		t.Fatal("the old leader knows already: nothing is tested")
	}
	ctx, cancel := context.WithTimeout(context.Background(), 500*time.Millisecond)
	defer cancel()
	if err := c.nodes[old].Read(ctx); err == nil && !slices.Contains(c.lists[old].all(), "new") {
		t.Error("a read on the old leader does not see what was answered before")
	}
	mu.Lock()
	gates[old] = nil
	mu.Unlock()
	close(open)
	wg.Wait()
	c.leader()
	if err := c.nodes[old].Read(within(t)); err != nil || !slices.Contains(c.lists[old].all(), "new") {
		t.Errorf("%v, %q", err, c.lists[old].all())
	}
}

// A follower may have applied what its leader has not yet: a client that has seen it there must see it everywhere.
func TestReadsDoNotGoBack(t *testing.T) {
	c := start(t, 3, nil)
	lead := c.leader()
	c.propose(lead, "before")
	c.same([]string{"before"})
	open := make(chan struct{})
	ahead, behind := (lead+1)%3, (lead+2)%3
	for _, i := range []int{lead, behind} {
		c.lists[i].mu.Lock()
		c.lists[i].hold = func(string) { <-open }
		c.lists[i].mu.Unlock()
	}
	var wg sync.WaitGroup
	wg.Go(func() { _, _ = c.nodes[lead].Propose(within(t), []byte("new")) })
	waitFor(t, func() bool { return len(c.lists[ahead].all()) == 2 })
	if err := c.nodes[ahead].Read(within(t)); err != nil {
		t.Error(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 300*time.Millisecond)
	defer cancel()
	if err := c.nodes[behind].Read(ctx); err == nil {
		t.Errorf("a read went back to %q", c.lists[behind].all())
	}
	close(open)
	wg.Wait()
	c.same([]string{"before", "new"})
}

func waitFor(t testing.TB, is func() bool) {
	t.Helper()
	if !poll(20*time.Second, is) {
		t.Fatal("it does not come to be")
	}
}

// poll asks every millisecond, and reports whether the answer was yes in time.
func poll(limit time.Duration, is func() bool) bool {
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for end := time.Now().Add(limit); !is(); <-tick.C {
		if time.Now().After(end) {
			return false
		}
	}
	return true
}
