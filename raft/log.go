// SPDX-License-Identifier: Apache-2.0

package raft

import (
	"encoding/binary"
	"time"

	hraft "github.com/hashicorp/raft"
	"go.etcd.io/bbolt"

	"github.com/demarc-dev/demarc/fault"
)

// boltLog is the log and the votes of a member in one bbolt file: an entry a key, each write one transaction that is
// synced. It takes the place of hashicorp/raft-wal v0.4.0, which can't be opened again after entries at the end of the log
// were replaced: it seals the shortened segment without its index ("sealed segment has no index block"). That happens
// to every follower of a leader that was cut off. TestFakeMinutesOfCutsAndCrashes finds it.
//
// An entry is
//
//	1 byte, 0x01 | type, 1 byte | term, 8 bytes | Unix nanoseconds of its append, 8 bytes | length of extensions, 4 bytes | extensions | data
type boltLog struct{ db *bbolt.DB }

const (
	entryVersion = 0x01
	entryHead    = 22
	lockWait     = time.Second // for the file; the directory's own lock comes first
)

func buckets() (entries, stable []byte) { return []byte("entries/1"), []byte("stable/1") }

func openBoltLog(path string) (*boltLog, error) {
	db, err := bbolt.Open(path, 0o600, &bbolt.Options{Timeout: lockWait, FreelistType: bbolt.FreelistMapType})
	if err != nil {
		return nil, err
	}
	err = db.Update(func(tx *bbolt.Tx) error {
		entries, stable := buckets()
		if _, err := tx.CreateBucketIfNotExists(entries); err != nil {
			return err
		}
		_, err := tx.CreateBucketIfNotExists(stable)
		return err
	})
	if err != nil {
		_ = db.Close()
		return nil, err
	}
	return &boltLog{db}, nil
}

// Close closes the file.
func (b *boltLog) Close() error { return b.db.Close() }

func indexKey(i uint64) []byte { return binary.BigEndian.AppendUint64(nil, i) }

func (b *boltLog) edge(last bool) (index uint64, err error) {
	err = b.db.View(func(tx *bbolt.Tx) error {
		entries, _ := buckets()
		c := tx.Bucket(entries).Cursor()
		k, _ := c.First()
		if last {
			k, _ = c.Last()
		}
		if k != nil {
			index = binary.BigEndian.Uint64(k)
		}
		return nil
	})
	return index, err
}

// FirstIndex implements hraft.LogStore; 0 for an empty log.
func (b *boltLog) FirstIndex() (uint64, error) { return b.edge(false) }

// LastIndex implements hraft.LogStore; 0 for an empty log.
func (b *boltLog) LastIndex() (uint64, error) { return b.edge(true) }

// GetLog implements hraft.LogStore.
func (b *boltLog) GetLog(index uint64, l *hraft.Log) error {
	return b.db.View(func(tx *bbolt.Tx) error {
		entries, _ := buckets()
		v := tx.Bucket(entries).Get(indexKey(index))
		if v == nil {
			return hraft.ErrLogNotFound
		}
		return decodeEntry(index, v, l)
	})
}

// StoreLog implements hraft.LogStore.
func (b *boltLog) StoreLog(l *hraft.Log) error { return b.StoreLogs([]*hraft.Log{l}) }

// StoreLogs implements hraft.LogStore: all of them, or none.
func (b *boltLog) StoreLogs(logs []*hraft.Log) error {
	return b.db.Update(func(tx *bbolt.Tx) error {
		entries, _ := buckets()
		bucket := tx.Bucket(entries)
		bucket.FillPercent = 0.9 // keys only grow
		for _, l := range logs {
			if err := bucket.Put(indexKey(l.Index), encodeEntry(l)); err != nil {
				return err
			}
		}
		return nil
	})
}

// DeleteRange implements hraft.LogStore; both ends belong to the range.
func (b *boltLog) DeleteRange(from, to uint64) error {
	return b.db.Update(func(tx *bbolt.Tx) error {
		entries, _ := buckets()
		c := tx.Bucket(entries).Cursor()
		for k, _ := c.Seek(indexKey(from)); k != nil && binary.BigEndian.Uint64(k) <= to; k, _ = c.Seek(indexKey(from)) {
			if err := c.Delete(); err != nil {
				return err
			}
		}
		return nil
	})
}

// Set implements hraft.StableStore.
func (b *boltLog) Set(key, value []byte) error {
	return b.db.Update(func(tx *bbolt.Tx) error {
		_, stable := buckets()
		return tx.Bucket(stable).Put(key, value)
	})
}

// Get implements hraft.StableStore; nil where there is none.
func (b *boltLog) Get(key []byte) (value []byte, err error) {
	err = b.db.View(func(tx *bbolt.Tx) error {
		_, stable := buckets()
		value = append([]byte(nil), tx.Bucket(stable).Get(key)...)
		return nil
	})
	return value, err
}

// SetUint64 implements hraft.StableStore.
func (b *boltLog) SetUint64(key []byte, v uint64) error { return b.Set(key, indexKey(v)) }

// GetUint64 implements hraft.StableStore; 0 where there is none.
func (b *boltLog) GetUint64(key []byte) (uint64, error) {
	v, err := b.Get(key)
	if err != nil || len(v) == 0 {
		return 0, err
	}
	if len(v) != 8 {
		return 0, fault.New("raft.GetUint64", fault.Invalid, "the value of %.32q is damaged", key)
	}
	return binary.BigEndian.Uint64(v), nil
}

func encodeEntry(l *hraft.Log) []byte {
	b := make([]byte, 0, entryHead+len(l.Extensions)+len(l.Data))
	b = append(b, entryVersion, byte(l.Type))
	b = binary.BigEndian.AppendUint64(b, l.Term)
	at := int64(0)
	if !l.AppendedAt.IsZero() {
		at = l.AppendedAt.UnixNano()
	}
	b = binary.BigEndian.AppendUint64(b, uint64(at))
	b = binary.BigEndian.AppendUint32(b, uint32(len(l.Extensions)))
	b = append(b, l.Extensions...)
	return append(b, l.Data...)
}

func decodeEntry(index uint64, b []byte, l *hraft.Log) error {
	if len(b) < entryHead || b[0] != entryVersion || uint64(len(b)-entryHead) < uint64(binary.BigEndian.Uint32(b[18:])) {
		return fault.New("raft.decodeEntry", fault.Invalid, "entry %d of the log is damaged", index)
	}
	ext := int(binary.BigEndian.Uint32(b[18:]))
	*l = hraft.Log{Index: index, Type: hraft.LogType(b[1]), Term: binary.BigEndian.Uint64(b[2:])}
	if at := int64(binary.BigEndian.Uint64(b[10:])); at != 0 {
		l.AppendedAt = time.Unix(0, at)
	}
	if rest := b[entryHead:]; len(rest) > 0 { // bbolt's memory ends with the transaction
		copied := append([]byte(nil), rest...)
		if ext > 0 {
			l.Extensions = copied[:ext:ext]
		}
		if len(copied) > ext {
			l.Data = copied[ext:]
		}
	}
	return nil
}
