// SPDX-License-Identifier: Apache-2.0

package raft_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/identity"
	"github.com/demarc-dev/demarc/raft"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestAnyNodeTakesProposals(t *testing.T) {
	c := start(t, 3, nil)
	c.leader()
	var want []string
	for i := range 9 {
		line := fmt.Sprint("line", i)
		want = append(want, line)
		if got := c.propose(i%3, line); got != fmt.Sprintf("%d:%s", i+1, line) {
			t.Fatalf("answer %q", got)
		}
		if err := c.nodes[(i+1)%3].Read(within(t)); err != nil {
			t.Fatal(err)
		}
		if got := c.lists[(i+1)%3].all(); len(got) != i+1 {
			t.Fatalf("a read after the answer sees %d lines, want %d", len(got), i+1)
		}
	}
	c.same(want)
}

func TestTheDryRunKeepsBadLinesOut(t *testing.T) {
	c := start(t, 3, nil)
	lead := c.leader()
	for i := range 3 {
		if _, err := c.nodes[i].Propose(within(t), []byte("bad")); !errors.Is(err, fault.Invalid) || !strings.Contains(fault.Text(err), "bad") {
			t.Fatalf("node %d (leader %d): %v", i, lead, err)
		}
		if _, err := c.nodes[i].Propose(within(t), []byte("full")); !errors.Is(err, fault.Busy) || !strings.Contains(fault.Text(err), "no room") {
			t.Fatalf("node %d (leader %d): %v", i, lead, err)
		}
	}
	c.propose(0, "good")
	c.same([]string{"good"})
}

// Proposals continue while leaders are killed; each that was answered is there once, those that were unsure at most once.
func TestKillingLeadersLosesNothing(t *testing.T) {
	c := start(t, 3, nil)
	c.leader()
	ctx, cancel := context.WithCancel(context.Background())
	var mu sync.Mutex
	sure, unsure := map[string]bool{}, map[string]bool{}
	var wg sync.WaitGroup
	var gate sync.RWMutex // nodes come and go under it
	for w := range 4 {
		wg.Go(func() {
			for k := 0; ctx.Err() == nil; k++ {
				line := fmt.Sprintf("w%d-%d", w, k)
				gate.RLock()
				n := c.nodes[(w+k)%3]
				gate.RUnlock()
				if n == nil {
					k--
					runtime.Gosched()
					continue
				}
				pctx, stop := context.WithTimeout(context.Background(), 10*time.Second)
				_, err := n.Propose(pctx, []byte(line))
				stop()
				mu.Lock()
				switch {
				case err == nil:
					sure[line] = true
				case errors.Is(err, fault.Unsure):
					unsure[line] = true
				}
				mu.Unlock()
			}
		})
	}
	count := func() int { mu.Lock(); defer mu.Unlock(); return len(sure) }
	for range 3 {
		until := count() + 50
		waitFor(t, func() bool { return count() >= until })
		lead := c.leader()
		gate.Lock()
		n := c.nodes[lead]
		c.nodes[lead] = nil
		gate.Unlock()
		gone, stop := context.WithCancel(context.Background())
		stop() // no time to hand over
		if err := n.Close(gone); err != nil {
			t.Error(err)
		}
		gate.Lock()
		c.open(lead)
		gate.Unlock()
	}
	cancel()
	wg.Wait()
	c.leader()
	c.same(nil)
	base := c.lists[0].all()
	c.same(base)
	seen := map[string]int{}
	for _, l := range base {
		seen[l]++
	}
	for line, times := range seen {
		if times != 1 || (!sure[line] && !unsure[line]) {
			t.Errorf("%q is there %d times, sure %v, unsure %v", line, times, sure[line], unsure[line])
		}
	}
	for line := range sure {
		if seen[line] != 1 {
			t.Errorf("%q was answered and is lost", line)
		}
	}
	t.Logf("%d answered, %d unsure", len(sure), len(unsure))
}

func TestClosingHandsLeadershipOver(t *testing.T) {
	c := start(t, 3, nil)
	lead := c.leader()
	c.propose(lead, "before")
	c.stop(lead)
	began := time.Now()
	c.propose((lead+1)%3, "after")
	t.Logf("the next answer came after %s", time.Since(began))
	c.open(lead)
	c.leader()
	c.same([]string{"before", "after"})
}

func TestSnapshotAndTheTail(t *testing.T) {
	c := start(t, 3, nil)
	lead := c.leader()
	away := (lead + 1) % 3
	c.propose(lead, "first")
	c.stop(away)
	want := []string{"first"}
	for i := range 50 {
		line := fmt.Sprint("line", i)
		c.propose(lead, line)
		want = append(want, line)
	}
	for i := range 3 {
		if i != away {
			if err := c.nodes[i].TakeSnapshot(); err != nil {
				t.Fatal(err)
			}
		}
	}
	c.propose(lead, "tail")
	want = append(want, "tail")
	c.open(away) // its log ends before what the others still have: it needs the snapshot
	c.leader()
	c.same(want)
	for i := range 3 {
		c.stop(i)
	}
	for i := range 3 {
		c.open(i)
	}
	c.leader()
	c.same(want)
	if c.propose(away, "last") != fmt.Sprintf("%d:last", len(want)+1) {
		t.Fatal("the numbering was lost")
	}
}

func TestWaitingProposalsShareAnEntry(t *testing.T) {
	c := start(t, 3, nil)
	lead := c.leader()
	before := c.nodes[lead].State().Last
	const n = 400
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() {
			line := fmt.Sprint("line", i)
			ans, err := c.nodes[lead].Propose(within(t), []byte(line))
			if err != nil || !strings.HasSuffix(string(ans), ":"+line) {
				t.Errorf("%s, %v", ans, err)
			}
		})
	}
	wg.Wait()
	entries := c.nodes[lead].State().Last - before
	if got := len(c.lists[lead].all()); got != n || entries > n/2 {
		t.Fatalf("%d lines in %d entries", got, entries)
	}
}

func TestAMajorityIsNeeded(t *testing.T) {
	c := start(t, 3, nil)
	lead := c.leader()
	c.propose(lead, "before")
	c.nodes[(lead+1)%3].Cut(true)
	c.nodes[(lead+2)%3].Cut(true)
	ctx, cancel := context.WithTimeout(context.Background(), 1500*time.Millisecond)
	defer cancel()
	_, err := c.nodes[lead].Propose(ctx, []byte("lonely"))
	if !errors.Is(err, fault.Unsure) && !errors.Is(err, fault.Unavailable) {
		t.Fatalf("a lonely leader answers: %v", err)
	}
	if err := c.nodes[lead].Read(ctx); err == nil {
		t.Fatal("a lonely leader reads")
	}
	c.nodes[(lead+1)%3].Cut(false)
	c.nodes[(lead+2)%3].Cut(false)
	c.leader()
	c.propose(lead, "after")
	c.same(nil)
	got := c.lists[lead].all()
	if got[0] != "before" || got[len(got)-1] != "after" {
		t.Fatalf("%q", got)
	}
}

func TestALeaderWhoseDiskHangsIsReplaced(t *testing.T) {
	var mu sync.Mutex
	gates := map[int]chan struct{}{}
	c := start(t, 3, func(i int, cfg *raft.Config) {
		raft.SlowDisk(cfg, func() {
			mu.Lock()
			g := gates[i]
			mu.Unlock()
			if g != nil {
				<-g
			}
		})
	})
	lead := c.leader()
	c.propose(lead, "before")
	open := make(chan struct{})
	mu.Lock()
	gates[lead] = open
	mu.Unlock()
	done := make(chan error, 1)
	go func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		_, err := c.nodes[lead].Propose(ctx, []byte("stuck"))
		done <- err
	}()
	other := (lead + 1) % 3
	if !poll(15*time.Second, func() bool { id, ok := c.nodes[other].Leader(); return ok && id != c.members[lead].ID }) {
		t.Fatal("a leader whose disk hangs still leads")
	}
	c.propose(other, "meanwhile")
	mu.Lock()
	gates[lead] = nil
	mu.Unlock()
	close(open)
	if err := <-done; err != nil && !errors.Is(err, fault.Unsure) && !errors.Is(err, fault.Unavailable) {
		t.Errorf("the stuck proposal: %v", err)
	}
	c.leader()
	c.same(nil)
	if got := c.lists[lead].all(); !slices.Contains(got, "meanwhile") {
		t.Fatalf("the node did not come back: %q", got)
	}
}

func TestAMachineThatFailsStopsItsNode(t *testing.T) {
	c := start(t, 1, nil)
	c.leader()
	if _, err := c.nodes[0].Propose(within(t), []byte("poison")); err == nil {
		t.Fatal("answered")
	}
	select {
	case <-c.nodes[0].Fatal():
	case <-within(t).Done():
		t.Fatal("the node runs on")
	}
	if err := c.nodes[0].Failure(); err == nil || !strings.Contains(err.Error(), "poisoned") {
		t.Fatal(err)
	}
}

func TestADirectoryBelongsToOneNode(t *testing.T) {
	c := start(t, 1, nil)
	c.stop(0)
	cfg := c.config(0)
	cfg.Self.ID = "other"
	cfg.First = []raft.Member{cfg.Self}
	if n, err := raft.Open(cfg); !errors.Is(err, fault.Conflict) {
		t.Fatalf("%v, %v", n, err)
	}
	cfg.Listener.Close() // Open failed: it is still ours
	c.open(0)
}

func TestAnonymousCallersAreRefused(t *testing.T) {
	c := start(t, 1, nil)
	c.leader()
	try := func(conf *tls.Config, proto string) error {
		conf = conf.Clone()
		conf.NextProtos = []string{proto}
		conn, err := tls.Dial("tcp", c.members[0].Addr, conf)
		if err != nil {
			return err
		}
		defer conn.Close()
		_ = conn.SetDeadline(time.Now().Add(5 * time.Second))
		if _, err = conn.Write([]byte{0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0, 1, 'r'}); err != nil {
			return err
		}
		_, err = io.ReadFull(conn, make([]byte, 4))
		return err
	}
	want := identity.WantNode(domain)
	if err := try(identity.Client(source(t, c.ca, fleet.Node, "n9"), want), raft.ProtoForward); err != nil {
		t.Fatalf("a node is refused: %v", err)
	}
	for name, conf := range map[string]*tls.Config{
		"an appliance":   identity.Client(source(t, c.ca, fleet.Appliance, "eu-1"), want),
		"an operator":    identity.Client(source(t, c.ca, fleet.Operator, "ann"), want),
		"no certificate": identity.Client(identity.Fixed(nil, identity.Pool([]*x509.Certificate{c.ca.Cert})), want),
	} {
		for _, proto := range []string{raft.ProtoForward, raft.ProtoRaft} {
			if err := try(conf, proto); err == nil {
				t.Errorf("%s is let in by %s", name, proto)
			}
		}
	}
	foreign := newCA(t)
	mine := source(t, foreign, fleet.Node, "n0")
	leaf, _ := mine.Leaf()
	if err := try(identity.Client(identity.Fixed(leaf, identity.Pool([]*x509.Certificate{c.ca.Cert})), want), raft.ProtoForward); err == nil {
		t.Error("a node of another authority is let in")
	}
}

func FuzzPacks(f *testing.F) {
	f.Add([]byte{1, 0, 0, 0, 1, 'x'})
	f.Fuzz(func(t *testing.T, entry []byte) {
		pack, err := raft.DecodePack(entry)
		if err == nil && !bytes.Equal(raft.EncodePack(pack), entry) {
			t.Fatal("two spellings of one pack")
		}
	})
}
