// SPDX-License-Identifier: Apache-2.0

package raft_test

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/demarc-dev/demarc/raft"
)

// anonymous opens n silent connections to a node, and opens them again as soon as one of them is ended.
func (f *fakeNet) anonymous(ctx context.Context, addr string, n int, say []byte) (held *atomic.Int32, came *atomic.Int64, wait func()) {
	held, came = new(atomic.Int32), new(atomic.Int64)
	var wg sync.WaitGroup
	for range n {
		wg.Go(func() {
			for ctx.Err() == nil {
				f.mu.Lock()
				d := f.doors[addr]
				f.mu.Unlock()
				here, there := net.Pipe()
				select {
				case d.in <- there:
					came.Add(1)
					held.Add(1)
					stop := context.AfterFunc(ctx, func() { here.Close() })
					if len(say) > 0 {
						_, _ = here.Write(say)
					}
					_, _ = here.Read(make([]byte, 1)) // until it is ended
					stop()
					held.Add(-1)
				case <-d.ended:
				case <-ctx.Done():
				}
				here.Close()
				there.Close()
				select {
				case <-ctx.Done():
				case <-time.After(2 * time.Second):
				}
			}
		})
	}
	return held, came, wg.Wait
}

// TestSilentConnectionsKeepNoNodeOut (FAULTS.md I13): 200 connections of one anonymous source, silent or with half a hello, are open at the
// listener of each node, while a node is restarted and another one is asked to lead: the node joins, and a leader is found, as soon as
// without them. Little of it is in the log.
func TestSilentConnectionsKeepNoNodeOut(t *testing.T) {
	for name, say := range map[string][]byte{"nothing is said": nil, "half a hello of TLS": {22, 3, 1, 2, 0, 1}} {
		t.Run(name, func(t *testing.T) {
			ca, dirs := newCA(t), []string{t.TempDir(), t.TempDir(), t.TempDir()}
			synctest.Test(t, func(t *testing.T) {
				var mu sync.Mutex
				var log bytes.Buffer
				c := newFakeCluster(t, ca, dirs, func(_ int, cfg *raft.Config) {
					cfg.Logger = slog.New(slog.NewTextHandler(locked{&mu, &log}, nil))
				})
				c.leader()
				c.propose(0, "before")
				ctx, cancel := context.WithCancel(context.Background())
				var held []*atomic.Int32
				var came []*atomic.Int64
				var waits []func()
				for _, m := range c.members {
					h, n, wait := c.world.anonymous(ctx, m.Addr, 200, say)
					held, came, waits = append(held, h), append(came, n), append(waits, wait)
				}
				t.Cleanup(func() {
					cancel()
					for _, wait := range waits {
						wait()
					}
					for i := range c.nodes {
						c.stop(i)
					}
				})
				time.Sleep(15 * time.Second)
				for round := range 2 {
					lead := c.leader()
					gone, stop := context.WithCancel(t.Context())
					stop() // a crash: nothing is handed over
					if err := c.nodes[lead].Close(gone); err != nil {
						t.Fatal(err)
					}
					began := time.Now()
					c.up(lead)
					line := fmt.Sprint("round", round)
					want := append(slices.Clone(c.lists[(lead+1)%3].all()), line)
					c.propose(lead, line) // by the node that was restarted: it has joined, and knows the leader
					if took := time.Since(began); took > 8*time.Second {
						t.Errorf("round %d: the node had joined after %s", round, took)
					}
					c.same(want)
				}
				for i := range held {
					for end := time.Now().Add(time.Minute); held[i].Load() < 20; time.Sleep(10 * time.Millisecond) {
						if time.Now().After(end) {
							t.Fatalf("%d anonymous connections are open at node %d, and %d came: this test shows nothing", held[i].Load(), i, came[i].Load())
						}
					}
				}
				mu.Lock()
				defer mu.Unlock()
				if n := bytes.Count(log.Bytes(), []byte("a peer was refused")); n == 0 || n > 100 {
					t.Errorf("%d refusals are in the log, of %d connections", n, came[0].Load()+came[1].Load()+came[2].Load())
				}
			})
		})
	}
}

type locked struct {
	mu *sync.Mutex
	b  *bytes.Buffer
}

func (l locked) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}
