// SPDX-License-Identifier: Apache-2.0

package raft

import (
	"encoding/binary"
	"time"

	hraft "github.com/hashicorp/raft"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/raft/wal"
)

// store is the log and the votes of a member, as hashicorp/raft wants them. See [wal] for what is on disk.
type store struct{ *wal.Log }

// FirstIndex implements hraft.LogStore; 0 for an empty log.
func (s store) FirstIndex() (uint64, error) { return s.First(), nil }

// LastIndex implements hraft.LogStore; 0 for an empty log.
func (s store) LastIndex() (uint64, error) { return s.Last(), nil }

// GetLog implements hraft.LogStore.
func (s store) GetLog(index uint64, l *hraft.Log) error {
	e, err := s.Log.Get(index)
	switch {
	case fault.Of(err) == fault.NotFound:
		return hraft.ErrLogNotFound
	case err != nil:
		return err
	}
	*l = hraft.Log{Index: e.Index, Term: e.Term, Type: hraft.LogType(e.Type)}
	if e.At != 0 {
		l.AppendedAt = time.Unix(0, e.At)
	}
	if len(e.Ext) > 0 {
		l.Extensions = e.Ext
	}
	if len(e.Data) > 0 {
		l.Data = e.Data
	}
	return nil
}

// StoreLog implements hraft.LogStore.
func (s store) StoreLog(l *hraft.Log) error { return s.StoreLogs([]*hraft.Log{l}) }

// StoreLogs implements hraft.LogStore. Entries with proposals leave the last of the room to those of elections.
func (s store) StoreLogs(logs []*hraft.Log) error { return s.add(logs, s.Append) }

// WriteLogs implements diskLog.
func (s store) WriteLogs(logs []*hraft.Log) error { return s.add(logs, s.Write) }

func (s store) add(logs []*hraft.Log, to func([]wal.Entry) error) error {
	entries := make([]wal.Entry, len(logs))
	need, proposals := int64(0), false
	for i, l := range logs {
		entries[i] = entryOf(l)
		need, proposals = need+wal.SizeOf(entries[i]), proposals || l.Type == hraft.LogCommand
	}
	if proposals && s.Room() < need+reserve {
		if err := s.Grow(need + reserve); err != nil {
			return err
		}
	}
	return to(entries)
}

func entryOf(l *hraft.Log) wal.Entry {
	e := wal.Entry{Index: l.Index, Term: l.Term, Type: byte(l.Type), Ext: l.Extensions, Data: l.Data}
	if !l.AppendedAt.IsZero() {
		e.At = l.AppendedAt.UnixNano()
	}
	return e
}

// DeleteRange implements hraft.LogStore; both ends belong to the range, which reaches an end of the log.
func (s store) DeleteRange(from, to uint64) error {
	first, last := s.First(), s.Last()
	switch {
	case from <= first:
		return s.Drop(min(to, last))
	case to >= last:
		return s.Cut(from)
	}
	return fault.New("raft.DeleteRange", fault.Internal, "entries %d to %d are in the middle of the log", from, to)
}

// Get implements hraft.StableStore; nil where there is none.
func (s store) Get(key []byte) ([]byte, error) { return s.Value(string(key)), nil }

// Set implements hraft.StableStore.
func (s store) Set(key, value []byte) error { return s.Log.Set(string(key), value) }

// SetUint64 implements hraft.StableStore.
func (s store) SetUint64(key []byte, v uint64) error {
	return s.Set(key, binary.BigEndian.AppendUint64(nil, v))
}

// GetUint64 implements hraft.StableStore; 0 where there is none.
func (s store) GetUint64(key []byte) (uint64, error) {
	v, _ := s.Get(key)
	switch len(v) {
	case 0:
		return 0, nil
	case 8:
		return binary.BigEndian.Uint64(v), nil
	}
	return 0, fault.New("raft.GetUint64", fault.Invalid, "the value of %.32q is damaged", key)
}
