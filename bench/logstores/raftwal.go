// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"io"
	"time"

	"github.com/hashicorp/go-hclog"
	hraft "github.com/hashicorp/raft"
	raftwal "github.com/hashicorp/raft-wal"
	"github.com/hashicorp/raft-wal/segment"
	"github.com/hashicorp/raft-wal/types"

	"github.com/demarc-dev/demarc/raft/wal"
	"github.com/demarc-dev/demarc/raft/wal/waltest"
)

// meta is a meta store that never fails. What it holds is found again by a file that is copied with its file system.
type meta struct {
	s *waltest.Script
	c *content
}

type content struct {
	state  types.PersistentState
	values map[string][]byte
}

// contentOf finds what the meta store of a file system holds: it is known by the bytes of a file that is copied with it.
func contentOf(s *waltest.Script) *content {
	b := s.Bytes("meta")
	if len(b) == 8 {
		id := int(b[0]) | int(b[1])<<8 | int(b[2])<<16 | int(b[3])<<24
		if id < len(all) {
			c := all[id]
			return &c
		}
	}
	return &content{values: map[string][]byte{}}
}

var all []content

func (m meta) save() {
	c := content{state: m.c.state, values: map[string][]byte{}}
	c.state.Segments = append([]types.SegmentInfo(nil), c.state.Segments...)
	for k, v := range m.c.values {
		c.values[k] = v
	}
	all = append(all, c)
	id := len(all) - 1
	m.s.Put("meta", []byte{byte(id), byte(id >> 8), byte(id >> 16), byte(id >> 24), 0, 0, 0, 0})
}

func (m meta) Load(string) (types.PersistentState, error) { return m.c.state, nil }
func (m meta) CommitState(p types.PersistentState) error {
	if m.s.Off() {
		return waltest.ErrOff
	}
	m.c.state = p
	m.save()
	return nil
}
func (m meta) GetStable(k []byte) ([]byte, error) { return m.c.values[string(k)], nil }
func (m meta) SetStable(k, v []byte) error {
	if m.s.Off() {
		return waltest.ErrOff
	}
	m.c.values[string(k)] = append([]byte(nil), v...)
	m.save()
	return nil
}
func (m meta) Close() error { return nil }

// vfs is the file system as raft-wal wants it.
type vfs struct{ s *waltest.Script }

func (v vfs) ListDir(string) ([]string, error) {
	names, err := v.s.List()
	var out []string
	for _, n := range names {
		if n != "meta" {
			out = append(out, n)
		}
	}
	return out, err
}

func (v vfs) Create(_, name string, size uint64) (types.WritableFile, error) {
	f, err := v.s.Create(name)
	if err != nil {
		return nil, err
	}
	if _, err := f.WriteAt(make([]byte, size), 0); err != nil {
		return nil, err
	}
	if err := f.Sync(); err != nil {
		return nil, err
	}
	return f, v.s.SyncDir()
}

func (v vfs) Delete(_, name string) error {
	if err := v.s.Remove(name); err != nil {
		return err
	}
	return v.s.SyncDir()
}
func (v vfs) OpenReader(_, name string) (types.ReadableFile, error) { return v.s.Open(name) }
func (v vfs) OpenWriter(_, name string) (types.WritableFile, error) { return v.s.Open(name) }

type raftWAL struct{ *raftwal.WAL }

func openRaftWAL(s *waltest.Script) (waltest.Store, error) {
	l, err := raftwal.Open("scripted", raftwal.WithMetaStore(meta{s, contentOf(s)}),
		raftwal.WithSegmentFiler(segment.NewFiler("scripted", vfs{s})),
		raftwal.WithSegmentSize(8<<10), raftwal.WithLogger(hclog.New(&hclog.LoggerOptions{Output: io.Discard})))
	if err != nil {
		return nil, err
	}
	return raftWAL{l}, nil
}

func (w raftWAL) Append(list []wal.Entry) error {
	var logs []*hraft.Log
	for _, e := range list {
		l := &hraft.Log{Index: e.Index, Term: e.Term, Type: hraft.LogType(e.Type), Data: e.Data, Extensions: e.Ext}
		if e.At != 0 {
			l.AppendedAt = time.Unix(0, e.At)
		}
		logs = append(logs, l)
	}
	return w.StoreLogs(logs)
}

func (w raftWAL) Cut(from uint64) error {
	last := w.Last()
	if from > last || last == 0 {
		return nil
	}
	return w.DeleteRange(from, last)
}

func (w raftWAL) Drop(to uint64) error {
	first, last := w.First(), w.Last()
	if first == 0 || to < first {
		return nil
	}
	return w.DeleteRange(first, min(to, last))
}

func (w raftWAL) Set(name string, v []byte) error { return w.WAL.Set([]byte(name), v) }

func (w raftWAL) First() uint64 { i, _ := w.FirstIndex(); return i }
func (w raftWAL) Last() uint64  { i, _ := w.LastIndex(); return i }

func (w raftWAL) Get(i uint64) (wal.Entry, error) {
	var l hraft.Log
	if err := w.GetLog(i, &l); err != nil {
		return wal.Entry{}, err
	}
	e := wal.Entry{Index: l.Index, Term: l.Term, Type: byte(l.Type), Data: l.Data, Ext: l.Extensions}
	if !l.AppendedAt.IsZero() && l.AppendedAt.UnixNano() != 0 {
		e.At = l.AppendedAt.UnixNano()
	}
	return e, nil
}

func (w raftWAL) Value(name string) []byte {
	v, err := w.WAL.Get([]byte(name))
	if errors.Is(err, io.EOF) || len(v) == 0 {
		return nil
	}
	return v
}
