// SPDX-License-Identifier: Apache-2.0

package raft

import (
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"time"

	hraft "github.com/hashicorp/raft"
	"go.etcd.io/bbolt"

	"github.com/demarc-dev/demarc/raft/wal"
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

// SmallLog makes the files of the log this large.
func SmallLog(cfg *Config, bytes int64) { cfg.wal = wal.Options{SegmentBytes: bytes} }

// ToBolt turns the log of a member that is closed into one of the older format, as a build before 2026-11-25 left it.
func ToBolt(dir string) error {
	logs := filepath.Join(dir, "log")
	l, err := wal.Open(wal.Dir(filepath.Join(logs, walName)), wal.Options{})
	if err != nil {
		return err
	}
	if err := os.Remove(filepath.Join(logs, boltName)); err != nil {
		return err
	}
	db, err := bbolt.Open(filepath.Join(logs, boltName), 0o600, nil)
	if err != nil {
		return err
	}
	err = db.Update(func(tx *bbolt.Tx) error {
		entries, err := tx.CreateBucket([]byte("entries/1"))
		if err != nil {
			return err
		}
		for i := l.First(); i > 0 && i <= l.Last(); i++ {
			e, err := l.Get(i)
			if err != nil {
				return err
			}
			b := append([]byte{boltVersion, e.Type}, binary.BigEndian.AppendUint64(nil, e.Term)...)
			b = binary.BigEndian.AppendUint64(b, uint64(e.At))
			b = binary.BigEndian.AppendUint32(b, uint32(len(e.Ext)))
			if err := entries.Put(binary.BigEndian.AppendUint64(nil, i), append(append(b, e.Ext...), e.Data...)); err != nil {
				return err
			}
		}
		stable, err := tx.CreateBucket([]byte("stable/1"))
		if err != nil {
			return err
		}
		for _, k := range []string{"CurrentTerm", "LastVoteTerm", "LastVoteCand", "demarc-self"} {
			if err := stable.Put([]byte(k), l.Value(k)); err != nil {
				return err
			}
		}
		return nil
	})
	return errors.Join(err, db.Close(), l.Close(), os.RemoveAll(filepath.Join(logs, walName)))
}

// FlipBolt alters what the older log says of an entry.
func FlipBolt(dir string, index uint64) error {
	db, err := bbolt.Open(filepath.Join(dir, "log", boltName), 0o600, nil)
	if err != nil {
		return err
	}
	return errors.Join(db.Update(func(tx *bbolt.Tx) error {
		return tx.Bucket([]byte("entries/1")).Put(binary.BigEndian.AppendUint64(nil, index), []byte{boltVersion, 0})
	}), db.Close())
}
