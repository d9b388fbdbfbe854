// SPDX-License-Identifier: Apache-2.0

package raft

import (
	"time"

	hraft "github.com/hashicorp/raft"
)

// SlowDisk makes writes of the node wait for gate where it is not nil.
func SlowDisk(cfg *Config, gate func()) {
	cfg.wrap = func(s hraft.LogStore) hraft.LogStore { return slow{s, gate} }
}

type slow struct {
	hraft.LogStore
	gate func()
}

func (s slow) StoreLogs(l []*hraft.Log) error {
	s.gate()
	return s.LogStore.StoreLogs(l)
}

// EncodePack and the others are the formats, for fuzzing.
var (
	EncodePack = encodePack
	DecodePack = decodePack
	ReadFrame  = readFrame
)

// TakeSnapshot makes the node take one now.
func (n *Node) TakeSnapshot() error { return n.raft.Snapshot().Error() }

// StepDown makes the leader hand leadership over.
func (n *Node) StepDown() error { return n.raft.LeadershipTransfer().Error() }

// Cut cuts the node off from its peers.
func (n *Node) Cut(on bool) { n.net.cut(on) }

// Writing tells whether the node is writing to its disk.
func (n *Node) Writing() bool { return !n.store.since().IsZero() }

// Fast is timing for tests.
func Fast() Timing {
	return Timing{Heartbeat: 150 * time.Millisecond, Election: 150 * time.Millisecond, Lease: 100 * time.Millisecond, Commit: 5 * time.Millisecond,
		SnapshotEvery: time.Hour, SnapshotThreshold: 1 << 40, Trailing: 8, DiskHang: 300 * time.Millisecond}
}
