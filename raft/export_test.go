// SPDX-License-Identifier: Apache-2.0

package raft

import (
	"errors"
	"time"

	hraft "github.com/hashicorp/raft"

	"github.com/demarc-dev/demarc/raft/store"
	"github.com/demarc-dev/demarc/raft/wal"
)

// SlowDisk makes each write and sync of the node wait for gate.
func SlowDisk(cfg *Config, gate func()) {
	cfg.wrap = func(s store.BufferedLog) store.BufferedLog { return slow{s, gate, gate} }
}

// AsyncDisk makes only the background syncs of a leader wait for gate.
func AsyncDisk(cfg *Config, gate func()) {
	cfg.wrap = func(s store.BufferedLog) store.BufferedLog { return slow{s, func() {}, gate} }
}

// DiskOf puts the log and the votes of the node on another file system.
func DiskOf(cfg *Config, fs wal.Files) { cfg.Files = fs }

type slow struct {
	store.BufferedLog
	write, sync func()
}

func (s slow) StoreLogs(l []*hraft.Log) error {
	s.write()
	return s.BufferedLog.StoreLogs(l)
}

func (s slow) WriteLogs(l []*hraft.Log) error {
	s.write()
	return s.BufferedLog.WriteLogs(l)
}

func (s slow) Sync() error {
	s.sync()
	return s.BufferedLog.Sync()
}

// EncodePack and the others are the formats, for fuzzing.
var (
	EncodePack = encodePack
	DecodePack = decodePack
)

// TakeSnapshot makes the node take one now.
func (n *Node) TakeSnapshot() error { return n.lib.raft.Snapshot().Error() }

// StepDown makes the leader hand leadership over.
func (n *Node) StepDown() error { return n.lib.raft.LeadershipTransfer().Error() }

// Cut cuts the node off from its peers.
func (n *Node) Cut(on bool) { n.net.SetCut(on) }

// Writing reports whether the node is writing to its disk.
func (n *Node) Writing() bool { return !n.disk.logs.BusySince().IsZero() }

// Synced is the index up to which the node's log is on disk.
func (n *Node) Synced() uint64 { return n.disk.logs.Synced() }

// Fast is timing for tests.
func Fast() Timing {
	return Timing{Heartbeat: 150 * time.Millisecond, Election: 150 * time.Millisecond, Lease: 100 * time.Millisecond,
		Commit:        5 * time.Millisecond,
		SnapshotEvery: time.Hour, SnapshotThreshold: 1 << 40, Trailing: 8, DiskHang: 300 * time.Millisecond}
}

// SmallLog makes the files of the log this large.
func SmallLog(cfg *Config, bytes int64) { cfg.Log = wal.Options{SegmentBytes: bytes} }

// Lose takes the entries from an index on from the log of a member that is closed, as a crash does that were not synced.
func Lose(dir string, from uint64) error {
	l, err := wal.Open(wal.Dir(store.WALDir(dir)), wal.Options{})
	if err != nil {
		return err
	}
	return errors.Join(l.Cut(from), l.Close())
}

// RemovedBy tells a node, as a peer does, that it was removed by the configuration of an index.
func (n *Node) RemovedBy(by string, index uint64) { n.members.removedBy(by, index) }

// ConfigurationIndex is that of the newest configuration that the node knows the index of.
func (n *Node) ConfigurationIndex() uint64 { return n.members.addrs.index() }

// Ends reports whether the node takes no more questions of its peers.
func (n *Node) Ends() bool { return n.life.ctx.Err() != nil }
