// SPDX-License-Identifier: Apache-2.0

package raft

import (
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"time"

	"go.etcd.io/bbolt"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/raft/wal"
)

// Until 2026-11-25 the log and the votes were one bbolt file, log/log.db: ADR 9. It is read once, by the first start of a
// build that knows package wal. An entry of it is
//
//	1 byte, 0x01 | type, 1 byte | term, 8 bytes | Unix nanoseconds of its append, 8 bytes | length of extensions, 4 bytes | extensions | data
const (
	boltName    = "log.db"
	walName     = "wal"
	movedName   = "wal.new" // while it is being copied
	boltVersion = 0x01
	boltHead    = 22
	lockWait    = time.Second
)

// moved takes the place of log.db: an older build that met nothing there would begin with an empty log and vote again.
const moved = "This log moved to the directory wal. An older build can't read it, and must not start from an empty one:\nremove this node's directory and let it join again from its peers.\n"

// openStore opens the log of a directory, and moves an older one over first.
func openStore(dir string, o wal.Options) (store, error) {
	const op = "raft.openStore"
	path := filepath.Join(dir, walName)
	_, err := os.Stat(path)
	if errors.Is(err, os.ErrNotExist) {
		err = moveBolt(dir, o)
	}
	if err == nil {
		err = settle(dir)
	}
	if err != nil {
		return store{}, fault.Because(err, op, fault.Unavailable, "the older log can't be moved: %s", fault.Text(err))
	}
	l, err := wal.Open(wal.Dir(path), o)
	if err != nil {
		return store{}, err
	}
	return store{l}, nil
}

// moveBolt copies what log.db holds, where there is one, into a new directory that gets its name when all of it is on
// disk.
func moveBolt(dir string, o wal.Options) error {
	fresh := filepath.Join(dir, movedName)
	if err := os.RemoveAll(fresh); err != nil {
		return err
	}
	if err := os.Mkdir(fresh, 0o700); err != nil {
		return err
	}
	if old := filepath.Join(dir, boltName); isBolt(old) {
		l, err := wal.Open(wal.Dir(fresh), o)
		if err != nil {
			return err
		}
		if err := errors.Join(copyBolt(old, l), l.Close()); err != nil {
			return err
		}
	}
	if err := os.Rename(fresh, filepath.Join(dir, walName)); err != nil {
		return err
	}
	return wal.Dir(dir).SyncDir()
}

// settle leaves a note where an older build would begin an empty log.
func settle(dir string) error {
	old := filepath.Join(dir, boltName)
	if b, err := os.ReadFile(old); err == nil && string(b) == moved {
		return nil
	}
	note := old + ".new"
	f, err := os.OpenFile(note, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.WriteString(moved)
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := os.Rename(note, old); err != nil {
		return err
	}
	return wal.Dir(dir).SyncDir()
}

func isBolt(path string) bool {
	s, err := os.Stat(path)
	return err == nil && s.Size() > int64(len(moved))
}

func copyBolt(path string, to *wal.Log) error {
	const op = "raft.copyBolt"
	db, err := bbolt.Open(path, 0o600, &bbolt.Options{Timeout: lockWait, ReadOnly: true})
	if err != nil {
		return err
	}
	defer db.Close()
	return db.View(func(tx *bbolt.Tx) error {
		entries, stable := tx.Bucket([]byte("entries/1")), tx.Bucket([]byte("stable/1"))
		if entries == nil || stable == nil {
			return nil // its making was cut off
		}
		var batch []wal.Entry
		size := 0
		flush := func() error {
			err := to.Append(batch)
			batch, size = batch[:0], 0
			return err
		}
		err := entries.ForEach(func(k, v []byte) error {
			e, err := decodeBolt(k, v)
			if err != nil {
				return err
			}
			if batch, size = append(batch, e), size+len(v); size > 1<<20 {
				return flush()
			}
			return nil
		})
		if err == nil {
			err = flush()
		}
		if err != nil {
			return err
		}
		return stable.ForEach(func(k, v []byte) error { return fault.At(op, "", to.Set(string(k), v)) })
	})
}

func decodeBolt(k, b []byte) (wal.Entry, error) {
	if len(k) != 8 {
		return wal.Entry{}, fault.New("raft.decodeBolt", fault.Internal, "the log's file %s is damaged: a key of %d bytes", boltName, len(k))
	}
	index := binary.BigEndian.Uint64(k)
	if len(b) < boltHead || b[0] != boltVersion || uint64(len(b)-boltHead) < uint64(binary.BigEndian.Uint32(b[18:])) {
		return wal.Entry{}, fault.New("raft.decodeBolt", fault.Internal, "the log's file %s is damaged: entry %d can't be read", boltName, index)
	}
	ext := int(binary.BigEndian.Uint32(b[18:]))
	return wal.Entry{Index: index, Type: b[1], Term: binary.BigEndian.Uint64(b[2:]), At: int64(binary.BigEndian.Uint64(b[10:])),
		Ext: b[boltHead : boltHead+ext], Data: b[boltHead+ext:]}, nil
}
