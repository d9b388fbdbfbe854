// SPDX-License-Identifier: Apache-2.0

package raft_test

import (
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/identity"
	"github.com/demarc-dev/demarc/raft"
)

// load proposes on node i from many sides until stop is called; each call must end.
func load(t testing.TB, n *raft.Node, sides int) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	for s := range sides {
		wg.Go(func() {
			for k := 0; ctx.Err() == nil; k++ {
				pctx, done := context.WithTimeout(ctx, 5*time.Second)
				_, _ = n.Propose(pctx, fmt.Appendf(nil, "load%d-%d", s, k))
				done()
			}
		})
	}
	return func() { cancel(); wg.Wait() }
}

// ends fails the test if f does not end.
func ends(t testing.TB, what string, f func()) {
	t.Helper()
	done := make(chan struct{})
	go func() { defer close(done); f() }()
	select {
	case <-done:
	case <-time.After(6 * time.Second):
		t.Fatalf("%s does not end", what)
	}
}

// A node that is closed while it writes must end: no proposal may wait for an entry that is never finished.
func TestClosingUnderLoadEnds(t *testing.T) {
	for range 8 {
		c := start(t, 1, nil)
		c.leader()
		stop := load(t, c.nodes[0], 32)
		c.propose(0, "one")
		ends(t, "Close", func() { c.stop(0) })
		ends(t, "a proposal", stop)
	}
}

// So must a node whose machine fails while others wait; what is in the log is unsure, never refused.
func TestAFailingMachineUnderLoadEnds(t *testing.T) {
	for range 8 {
		c := start(t, 1, nil)
		c.leader()
		stop := load(t, c.nodes[0], 32)
		_, err := c.nodes[0].Propose(within(t), []byte("poison"))
		if !errors.Is(err, fault.Unsure) {
			t.Fatalf("a proposal that is in the log and was not applied: %v", err)
		}
		ends(t, "Fatal", func() { <-c.nodes[0].Fatal() })
		ends(t, "Close", func() { c.stop(0) })
		ends(t, "a proposal", stop)
	}
}

// A read asks for no more time than it was given, also of a leader whose disk hangs.
func TestAReadEndsWithItsContext(t *testing.T) {
	var mu sync.Mutex
	var gate chan struct{}
	c := start(t, 1, func(i int, cfg *raft.Config) {
		cfg.Timing.DiskHang = time.Hour
		raft.SlowDisk(cfg, func() {
			mu.Lock()
			g := gate
			mu.Unlock()
			if g != nil {
				<-g
			}
		})
	})
	c.leader()
	c.propose(0, "before")
	mu.Lock()
	open := make(chan struct{})
	gate = open
	mu.Unlock()
	defer func() { mu.Lock(); gate = nil; mu.Unlock(); close(open) }()
	stuck, cancel := context.WithTimeout(context.Background(), 200*time.Millisecond)
	defer cancel()
	if _, err := c.nodes[0].Propose(stuck, []byte("stuck")); !errors.Is(err, fault.Unsure) {
		t.Fatalf("a proposal that is being written: %v", err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 200*time.Millisecond)
	defer cancel()
	ends(t, "Read", func() {
		if err := c.nodes[0].Read(ctx); !errors.Is(err, fault.Unavailable) {
			t.Errorf("a read of a leader that can't prove itself: %v", err)
		}
	})
}

// An entry that the leader wrote and no other node has heard of is unsure as soon as the lead is lost, not when the caller
// runs out of time.
func TestALostLeadIsUnsure(t *testing.T) {
	c := start(t, 3, nil)
	lead := c.leader()
	c.propose(lead, "before")
	c.nodes[(lead+1)%3].Cut(true)
	c.nodes[(lead+2)%3].Cut(true)
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	_, err := c.nodes[lead].Propose(ctx, []byte("lonely"))
	if !errors.Is(err, fault.Unsure) || ctx.Err() != nil {
		t.Fatalf("%v, context: %v", err, ctx.Err())
	}
	short, cancel := context.WithTimeout(context.Background(), 300*time.Millisecond)
	defer cancel()
	if _, err := c.nodes[lead].Propose(short, []byte("nothing")); !errors.Is(err, fault.Unavailable) {
		t.Fatalf("without a leader nothing is written: %v", err)
	}
	c.nodes[(lead+1)%3].Cut(false)
	c.nodes[(lead+2)%3].Cut(false)
	c.leader()
	c.propose(lead, "after")
	if got := c.lists[lead].all(); slices.Contains(got, "nothing") {
		t.Fatalf("%q", got)
	}
}

// What a machine cannot apply stops each node that hears of it, and nothing after it is applied or put into a snapshot.
func TestPoisonStopsAndStaysUnapplied(t *testing.T) {
	c := start(t, 3, nil)
	lead := c.leader()
	c.propose(lead, "before")
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	if _, err := c.nodes[(lead+1)%3].Propose(ctx, []byte("poison")); !errors.Is(err, fault.Unsure) {
		t.Fatalf("%v", err)
	}
	stopped := make(chan int, 3)
	for i, n := range c.nodes {
		go func() {
			select {
			case <-n.Fatal():
				stopped <- i
			case <-within(t).Done():
			}
		}()
	}
	for range 2 { // the third may never hear that the entry is committed: it has no majority any more
		ends(t, "Fatal", func() {
			i := <-stopped
			if err := c.nodes[i].Failure(); err == nil || !strings.Contains(err.Error(), "poisoned") {
				t.Errorf("node %d: %v", i, err)
			}
			if err := c.nodes[i].TakeSnapshot(); err == nil {
				t.Errorf("node %d took a snapshot of what it did not apply", i)
			}
		})
	}
	for i := range c.nodes {
		c.stop(i)
		if got := c.lists[i].all(); !slices.Equal(got, []string{"before"}) {
			t.Errorf("node %d has %q", i, got)
		}
	}
}

// A snapshot that the machine refuses must not make the node fall back to an older one.
func TestASnapshotThatIsRefusedStopsTheNode(t *testing.T) {
	c := start(t, 1, nil)
	c.leader()
	for i := range 3 {
		c.propose(0, fmt.Sprint("line", i))
		if err := c.nodes[0].TakeSnapshot(); err != nil {
			t.Fatal(err)
		}
	}
	c.stop(0)
	c.lists[0] = &list{refuse: true}
	cfg := c.config(0)
	defer cfg.Listener.Close()
	n, err := raft.Open(cfg)
	if err == nil || !strings.Contains(err.Error(), "refused") {
		t.Fatalf("%v, %v", n, err)
	}
	if got := c.lists[0].tried; got != 1 {
		t.Fatalf("%d snapshots were tried", got)
	}
}

func TestWhatCanNeverWorkIsRefused(t *testing.T) {
	c := start(t, 1, nil)
	c.leader()
	c.stop(0)
	for name, edit := range map[string]func(*raft.Config){
		"no directory":          func(c *raft.Config) { c.Dir = "" },
		"no machine":            func(c *raft.Config) { c.Machine = nil },
		"no members":            func(c *raft.Config) { c.First = nil },
		"not among them":        func(c *raft.Config) { c.Self.Addr = "127.0.0.1:1" },
		"a name twice":          func(c *raft.Config) { c.First = append(c.First, raft.Member{ID: c.Self.ID, Addr: "127.0.0.1:1"}) },
		"an address twice":      func(c *raft.Config) { c.First = append(c.First, raft.Member{ID: "x", Addr: c.Self.Addr}) },
		"no client certificate": func(c *raft.Config) { c.ServerTLS.ClientAuth = tls.VerifyClientCertIfGiven },
		"no protocols":          func(c *raft.Config) { c.ServerTLS.NextProtos = nil },
		"lease too long":        func(c *raft.Config) { c.Timing.Lease = time.Hour },
		"a file for a disk":     func(c *raft.Config) { c.Dir = file(t) },
	} {
		cfg := c.config(0)
		edit(&cfg)
		if n, err := raft.Open(cfg); err == nil {
			t.Errorf("%s: opened", name)
			_ = n.Close(within(t))
		} else if strings.Contains(fault.Text(err), c.dirs[0]) {
			t.Errorf("%s: the text names a path of the host: %s", name, fault.Text(err))
		}
		cfg.Listener.Close()
	}
	c.open(0)
}

func file(t *testing.T) string {
	p := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(p, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	return p
}

func TestADirectoryIsOpenOnce(t *testing.T) {
	c := start(t, 1, nil)
	c.leader()
	cfg := c.configAt(0, "127.0.0.1:0")
	defer cfg.Listener.Close()
	ends(t, "Open of a directory in use", func() {
		if n, err := raft.Open(cfg); !errors.Is(err, fault.Conflict) {
			t.Errorf("%v, %v", n, err)
		}
	})
}

// A member that moved is reached at the address in the list, not at that in the log.
func TestAMemberMoves(t *testing.T) {
	c := start(t, 3, nil)
	lead := c.leader()
	c.propose(lead, "before")
	for i := range 3 {
		c.stop(i)
	}
	for i := range 3 {
		c.members[i].Addr = free(t)
	}
	for i := range 3 {
		c.open(i)
	}
	c.leader()
	for _, m := range c.members {
		c.addressed(m)
	}
	c.propose(0, "after")
	c.same([]string{"before", "after"})
}

func TestMetricsComeAndGo(t *testing.T) {
	reg := prometheus.NewRegistry()
	c := start(t, 1, func(_ int, cfg *raft.Config) { cfg.Registerer = reg })
	c.leader()
	c.propose(0, "one")
	names := map[string]bool{}
	all, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range all {
		names[m.GetName()] = true
	}
	for _, want := range []string{"demarc_raft_leader", "demarc_raft_proposals_total", "demarc_raft_write_seconds", "demarc_raft_disk_hangs"} {
		if !names[want] {
			t.Errorf("%s is missing in %v", want, names)
		}
	}
	c.stop(0)
	if all, _ := reg.Gather(); len(all) > 0 {
		t.Errorf("%d metrics of a node that is gone", len(all))
	}
	c.open(0) // registers again
}

// Bytes that a member must not send end its connection, and nothing else.
func TestHostileFramesEndTheirConnection(t *testing.T) {
	c := start(t, 1, nil)
	c.leader()
	conf := identity.Client(source(t, c.ca, fleet.Node, "n9"), identity.WantNode(domain))
	conf.NextProtos = []string{raft.ProtoForward}
	frame := func(kind byte, payload ...byte) []byte {
		b := binary.BigEndian.AppendUint32(nil, uint32(9+len(payload)))
		return append(append(b, 0, 0, 0, 0, 0, 0, 0, 7, kind), payload...)
	}
	for name, tc := range map[string]struct {
		send []byte
		want string // how the answer begins; "" ends the connection
	}{
		"too short":     {[]byte{0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 1}, ""},
		"too long":      {[]byte{0xff, 0xff, 0xff, 0xff}, ""},
		"no timeout":    {frame('p', 1, 2), "finvalid"},
		"unknown kind":  {frame('x', 0, 0, 1, 0), "finvalid"},
		"a term":        {frame('t'), "a\x00\x00\x00\x00"},
		"a read":        {frame('r', 0, 0, 0x40, 0), "a\x00\x00\x00\x00"},
		"refused":       {frame('p', 0, 0, 0x40, 0, 'b', 'a', 'd'), "finvalid\nthis line is bad"},
		"taken":         {frame('p', 0, 0, 0x40, 0, 'x'), "a"},
		"much timeout":  {frame('p', 0xff, 0xff, 0xff, 0xff, 'y'), "a"},
		"no timeout ms": {frame('p', 0, 0, 0, 0, 'z'), "funavailable"},
	} {
		conn, err := tls.Dial("tcp", c.members[0].Addr, conf)
		if err != nil {
			t.Fatal(err)
		}
		_ = conn.SetDeadline(time.Now().Add(10 * time.Second))
		if _, err := conn.Write(tc.send); err != nil {
			t.Fatal(err)
		}
		head := make([]byte, 12)
		_, err = io.ReadFull(conn, head)
		if (err != nil) != (tc.want == "") {
			t.Errorf("%s: %v", name, err)
		}
		if err == nil {
			body := make([]byte, binary.BigEndian.Uint32(head)-8)
			if _, err := io.ReadFull(conn, body); err != nil || !strings.HasPrefix(string(body), tc.want) {
				t.Errorf("%s: answer %q, %v", name, body, err)
			}
		}
		conn.Close()
	}
	c.propose(0, "alive")
}

// A graceful end of the leader costs the callers of the others nothing, not even doubt. It is in fake time: on a machine that is
// busy a leader may lose the lead by itself, and then there is doubt, rightly.
func TestAGracefulEndLeavesNoCallerUnsure(t *testing.T) {
	ca, dirs := newCA(t), []string{t.TempDir(), t.TempDir(), t.TempDir()}
	synctest.Test(t, func(t *testing.T) {
		c := newFakeCluster(t, ca, dirs, nil)
		lead := c.leader()
		ctx, cancel := context.WithCancel(context.Background())
		var wg sync.WaitGroup
		var done atomic.Int64
		t.Cleanup(func() { // in this order, also if the test fails
			cancel()
			wg.Wait()
			for i := range c.nodes {
				c.stop(i)
			}
		})
		for s := range 8 {
			n := c.nodes[(lead+1+s%2)%3]
			wg.Go(func() {
				for k := 0; ctx.Err() == nil; k++ {
					call, end := context.WithTimeout(context.Background(), 20*time.Second)
					_, err := n.Propose(call, fmt.Appendf(nil, "s%d-%d", s, k))
					if end(); err != nil {
						t.Errorf("a proposal failed: %v", err)
						return
					}
					done.Add(1)
					time.Sleep(time.Duration(1+s) * time.Millisecond) // of the bubble's time, which does not move while anything runs
				}
			})
		}
		more := func(n int64) {
			t.Helper()
			for want, end := done.Load()+n, time.Now().Add(20*time.Second); done.Load() < want; time.Sleep(time.Millisecond) {
				if time.Now().After(end) {
					t.Fatal("nothing moves")
				}
			}
		}
		more(50)
		c.stop(lead)
		more(50)
	})
}
