// SPDX-License-Identifier: Apache-2.0

package raft_test

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/demarc-dev/demarc/raft"
)

// BenchmarkPropose is three nodes in one process, mutual TLS on loopback, synced, 256 bytes a proposal.
func BenchmarkPropose(b *testing.B) {
	for _, where := range []string{"leader", "follower"} {
		for _, sides := range []int{1, 16, 64, 256} {
			b.Run(fmt.Sprintf("%s/%d", where, sides), func(b *testing.B) {
				c := start(b, 3, func(_ int, cfg *raft.Config) { cfg.Timing = raft.Timing{} })
				lead := c.leader()
				n := c.nodes[lead]
				if where == "follower" {
					n = c.nodes[(lead+1)%3]
				}
				run(b, sides, func() error {
					_, err := n.Propose(context.Background(), make([]byte, 256))
					return err
				})
			})
		}
	}
}

// BenchmarkRead reads on a follower.
func BenchmarkRead(b *testing.B) {
	for _, sides := range []int{1, 64} {
		b.Run(fmt.Sprint(sides), func(b *testing.B) {
			c := start(b, 3, func(_ int, cfg *raft.Config) { cfg.Timing = raft.Timing{} })
			n := c.nodes[(c.leader()+1)%3]
			run(b, sides, func() error { return n.Read(context.Background()) })
		})
	}
}

func run(b *testing.B, sides int, f func() error) {
	b.ResetTimer()
	var next atomic.Int64
	var wg sync.WaitGroup
	for range sides {
		wg.Go(func() {
			for next.Add(1) <= int64(b.N) {
				if err := f(); err != nil {
					b.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "answers/s")
}
