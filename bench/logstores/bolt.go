// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"unsafe"

	"go.etcd.io/bbolt"

	"github.com/demarc-dev/demarc/raft/wal"
	"github.com/demarc-dev/demarc/raft/wal/waltest"
)

// bolt is an entry a key in one bbolt file. bbolt writes to a real file, which it also maps; each of its writes is told to
// the scripted file first.
type bolt struct {
	db  *bbolt.DB
	dir string
}

func openBolt(s *waltest.Script) (waltest.Store, error) {
	dir, err := os.MkdirTemp("", "logstores-")
	if err != nil {
		return nil, err
	}
	path := filepath.Join(dir, "log.db")
	fresh := len(s.Bytes("log.db")) == 0
	if !fresh {
		if err := os.WriteFile(path, s.Bytes("log.db"), 0o600); err != nil {
			return nil, err
		}
	}
	db, err := bbolt.Open(path, 0o600, &bbolt.Options{FreelistType: bbolt.FreelistMapType, NoSync: true, InitialMmapSize: 1 << 20})
	if err != nil {
		return nil, errors.Join(err, os.RemoveAll(dir))
	}
	if fresh { // the making of the file is not crashed
		err = db.Update(func(tx *bbolt.Tx) error {
			_, err := tx.CreateBucketIfNotExists([]byte("entries"))
			if err == nil {
				_, err = tx.CreateBucketIfNotExists([]byte("stable"))
			}
			return err
		})
		b, e := os.ReadFile(path)
		if err = errors.Join(err, e); err != nil {
			return nil, err
		}
		s.Put("log.db", b)
	}
	file, err := s.Open("log.db")
	if err != nil {
		return nil, err
	}
	page := int64(db.Info().PageSize)
	// The hook is a private field: func(b []byte, off int64) (int, error).
	field := reflect.ValueOf(db).Elem().FieldByName("ops").FieldByName("writeAt")
	write := (*func([]byte, int64) (int, error))(unsafe.Pointer(field.UnsafeAddr()))
	real := *write
	*write = func(b []byte, off int64) (int, error) {
		meta := off < 2*page
		if meta {
			if err := file.Sync(); err != nil {
				return 0, err
			}
		}
		if _, err := file.WriteAt(b, off); err != nil {
			return 0, err
		}
		if meta {
			if err := file.Sync(); err != nil {
				return 0, err
			}
		}
		return real(b, off)
	}
	return &bolt{db, dir}, nil
}

func (b *bolt) Close() error { return errors.Join(b.db.Close(), os.RemoveAll(b.dir)) }

func key(i uint64) []byte { return binary.BigEndian.AppendUint64(nil, i) }

func (b *bolt) Append(list []wal.Entry) error {
	return b.db.Update(func(tx *bbolt.Tx) error {
		for _, e := range list {
			v := append([]byte{1, e.Type}, key(e.Term)...)
			v = append(v, key(uint64(e.At))...)
			v = binary.BigEndian.AppendUint32(v, uint32(len(e.Ext)))
			if err := tx.Bucket([]byte("entries")).Put(key(e.Index), append(append(v, e.Ext...), e.Data...)); err != nil {
				return err
			}
		}
		return nil
	})
}

func (b *bolt) remove(from, to uint64) error {
	return b.db.Update(func(tx *bbolt.Tx) error {
		c := tx.Bucket([]byte("entries")).Cursor()
		for k, _ := c.Seek(key(from)); k != nil && binary.BigEndian.Uint64(k) <= to; k, _ = c.Seek(key(from)) {
			if err := c.Delete(); err != nil {
				return err
			}
		}
		return nil
	})
}

func (b *bolt) Cut(from uint64) error { return b.remove(from, ^uint64(0)) }
func (b *bolt) Drop(to uint64) error  { return b.remove(0, to) }

func (b *bolt) Set(name string, v []byte) error {
	return b.db.Update(func(tx *bbolt.Tx) error { return tx.Bucket([]byte("stable")).Put([]byte(name), v) })
}

func (b *bolt) edge(first bool) (i uint64) {
	_ = b.db.View(func(tx *bbolt.Tx) error {
		k, _ := tx.Bucket([]byte("entries")).Cursor().Last()
		if first {
			k, _ = tx.Bucket([]byte("entries")).Cursor().First()
		}
		if len(k) == 8 {
			i = binary.BigEndian.Uint64(k)
		}
		return nil
	})
	return i
}

func (b *bolt) First() uint64 { return b.edge(true) }
func (b *bolt) Last() uint64  { return b.edge(false) }

func (b *bolt) Get(i uint64) (e wal.Entry, err error) {
	err = b.db.View(func(tx *bbolt.Tx) error {
		v := tx.Bucket([]byte("entries")).Get(key(i))
		if len(v) < 22 || v[0] != 1 || uint64(len(v)-22) < uint64(binary.BigEndian.Uint32(v[18:])) {
			return errors.New("the entry can't be read")
		}
		ext := int(binary.BigEndian.Uint32(v[18:]))
		rest := append([]byte(nil), v[22:]...)
		e = wal.Entry{Index: i, Type: v[1], Term: binary.BigEndian.Uint64(v[2:]), At: int64(binary.BigEndian.Uint64(v[10:])), Ext: rest[:ext],
			Data: rest[ext:]}
		return nil
	})
	return e, err
}

func (b *bolt) Value(name string) (v []byte) {
	_ = b.db.View(func(tx *bbolt.Tx) error {
		if got := tx.Bucket([]byte("stable")).Get([]byte(name)); got != nil {
			v = append([]byte{}, got...)
		}
		return nil
	})
	return v
}
