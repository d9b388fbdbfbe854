// SPDX-License-Identifier: Apache-2.0

package store

import (
	"encoding/binary"
	"time"

	hraft "github.com/hashicorp/raft"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/raft/wal"
)

// Reserve is the room, in bytes, that entries with proposals leave for those of elections. Votes have their place already.
const Reserve = 256 << 10

// Log is the log and the votes of a member: hraft's LogStore and StableStore on a [wal.Log].
type Log struct{ *wal.Log }

// FirstIndex implements hraft.LogStore; 0 for an empty log.
func (l Log) FirstIndex() (uint64, error) { return l.First(), nil }

// LastIndex implements hraft.LogStore; 0 for an empty log.
func (l Log) LastIndex() (uint64, error) { return l.Last(), nil }

// GetLog implements hraft.LogStore.
func (l Log) GetLog(index uint64, to *hraft.Log) error {
	e, err := l.Log.Get(index)
	switch {
	case fault.Of(err) == fault.NotFound:
		return hraft.ErrLogNotFound
	case err != nil:
		return err
	}
	*to = hraft.Log{Index: e.Index, Term: e.Term, Type: hraft.LogType(e.Type)}
	if e.At != 0 {
		to.AppendedAt = time.Unix(0, e.At)
	}
	if len(e.Ext) > 0 {
		to.Extensions = e.Ext
	}
	if len(e.Data) > 0 {
		to.Data = e.Data
	}
	return nil
}

// StoreLog implements hraft.LogStore.
func (l Log) StoreLog(entry *hraft.Log) error { return l.StoreLogs([]*hraft.Log{entry}) }

// StoreLogs implements hraft.LogStore. Entries with proposals leave [Reserve] to those of elections.
func (l Log) StoreLogs(entries []*hraft.Log) error { return l.add(entries, l.Append) }

// WriteLogs implements [BufferedLog].
func (l Log) WriteLogs(entries []*hraft.Log) error { return l.add(entries, l.Write) }

func (l Log) add(entries []*hraft.Log, to func([]wal.Entry) error) error {
	add := make([]wal.Entry, len(entries))
	need, proposals := int64(0), false
	for i, e := range entries {
		add[i] = entryOf(e)
		need, proposals = need+wal.SizeOf(add[i]), proposals || e.Type == hraft.LogCommand
	}
	if proposals && l.Room() < need+Reserve {
		if err := l.Grow(need + Reserve); err != nil {
			return err
		}
	}
	return to(add)
}

func entryOf(l *hraft.Log) wal.Entry {
	e := wal.Entry{Index: l.Index, Term: l.Term, Type: byte(l.Type), Ext: l.Extensions, Data: l.Data}
	if !l.AppendedAt.IsZero() {
		e.At = l.AppendedAt.UnixNano()
	}
	return e
}

// DeleteRange implements hraft.LogStore; both ends belong to the range, which reaches an end of the log.
func (l Log) DeleteRange(from, to uint64) error {
	first, last := l.First(), l.Last()
	switch {
	case from <= first:
		return l.Drop(min(to, last))
	case to >= last:
		return l.Cut(from)
	}
	return fault.New("store.DeleteRange", fault.Internal, "entries %d to %d are in the middle of the log", from, to)
}

// Get implements hraft.StableStore; nil if there is none.
func (l Log) Get(key []byte) ([]byte, error) { return l.Value(string(key)), nil }

// Set implements hraft.StableStore.
func (l Log) Set(key, value []byte) error { return l.Log.Set(string(key), value) }

// SetUint64 implements hraft.StableStore.
func (l Log) SetUint64(key []byte, v uint64) error {
	return l.Set(key, binary.BigEndian.AppendUint64(nil, v))
}

// GetUint64 implements hraft.StableStore; 0 if there is none.
func (l Log) GetUint64(key []byte) (uint64, error) {
	v, _ := l.Get(key)
	switch len(v) {
	case 0:
		return 0, nil
	case 8:
		return binary.BigEndian.Uint64(v), nil
	}
	return 0, fault.New("store.GetUint64", fault.Invalid, "the value of %.32q is damaged", key)
}
