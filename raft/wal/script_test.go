// SPDX-License-Identifier: Apache-2.0

package wal_test

import (
	"errors"
	"io"
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"sync"
	"syscall"

	"github.com/demarc-dev/demarc/raft/wal"
)

const sector = 512

var errCrash = errors.New("the machine is off")

// script is a file system that crashes at a step, counted over writes, syncs and changes of the directory. What a sync
// answered is durable; of the rest any sector of any write may be there or not, in any order, and so may any change of
// the directory.
type script struct {
	mu      sync.Mutex
	left    int // steps until the crash; below 0: none
	steps   int
	full    bool                // nothing new can be made
	broken  bool                // syncs fail
	names   map[string]*inode   // as programs see them
	durable map[string]*inode   // as they are on disk
	changes []map[string]*inode // of the directory since its last sync: nil is a removal
}

type inode struct {
	now, disk []byte
	dirty     map[int64][][]byte // versions of a sector since the last sync, oldest first
}

func newScript() *script {
	return &script{left: -1, names: map[string]*inode{}, durable: map[string]*inode{}}
}

// step counts, and tells whether the machine is still on. The step at which it crashes has begun.
func (s *script) step() error {
	s.steps++
	if s.left == 0 {
		return errCrash
	}
	if s.left > 0 {
		s.left--
	}
	return nil
}

func (s *script) List() ([]string, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Sorted(maps.Keys(s.names)), nil
}

func (s *script) Open(name string) (wal.File, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := s.names[name]
	if n == nil {
		return nil, os.ErrNotExist
	}
	return &handle{s, n}, nil
}

func (s *script) Create(name string) (wal.File, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.full {
		return nil, syscall.ENOSPC
	}
	n := &inode{dirty: map[int64][][]byte{}}
	s.names[name] = n
	s.changes = append(s.changes, map[string]*inode{name: n})
	return &handle{s, n}, s.step()
}

func (s *script) Remove(name string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.names, name)
	s.changes = append(s.changes, map[string]*inode{name: nil})
	return s.step()
}

func (s *script) SyncDir() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.step(); err != nil {
		return err
	}
	s.durable, s.changes = maps.Clone(s.names), nil
	return nil
}

// crash gives the file system that is there after the machine is on again.
func (s *script) crash(r *rand.Rand) *script {
	out := newScript()
	odds := []float64{0, 1, r.Float64()}[r.IntN(3)] // nothing of what was not synced is there, all, or some
	names := maps.Clone(s.durable)
	for _, c := range s.changes {
		for name, n := range c {
			if r.Float64() >= odds {
				continue
			}
			if n == nil {
				delete(names, name)
			} else {
				names[name] = n
			}
		}
	}
	for name, n := range names {
		b := slices.Clone(n.disk)
		for _, sec := range slices.Sorted(maps.Keys(n.dirty)) {
			if r.Float64() >= odds {
				continue
			}
			v := n.dirty[sec]
			take := v[len(v)-1]
			if odds < 1 {
				take = v[r.IntN(len(v))]
			}
			if end := sec*sector + int64(len(take)); int64(len(b)) < end {
				b = append(b, make([]byte, end-int64(len(b)))...)
			}
			copy(b[sec*sector:], take)
		}
		out.names[name] = &inode{now: b, disk: slices.Clone(b), dirty: map[int64][][]byte{}}
	}
	out.durable = maps.Clone(out.names)
	return out
}

// clone gives an independent copy, as if all were synced.
func (s *script) clone() *script {
	out := newScript()
	for name, n := range s.names {
		out.names[name] = &inode{now: slices.Clone(n.now), disk: slices.Clone(n.now), dirty: map[int64][][]byte{}}
	}
	out.durable = maps.Clone(out.names)
	return out
}

type handle struct {
	s *script
	n *inode
}

func (h *handle) ReadAt(b []byte, off int64) (int, error) {
	h.s.mu.Lock()
	defer h.s.mu.Unlock()
	if off >= int64(len(h.n.now)) {
		return 0, io.EOF
	}
	n := copy(b, h.n.now[off:])
	if n < len(b) {
		return n, io.EOF
	}
	return n, nil
}

func (h *handle) WriteAt(b []byte, off int64) (int, error) {
	h.s.mu.Lock()
	defer h.s.mu.Unlock()
	if h.s.full && off+int64(len(b)) > int64(len(h.n.now)) {
		return 0, syscall.ENOSPC
	}
	if end := off + int64(len(b)); end > int64(len(h.n.now)) {
		h.n.now = append(h.n.now, make([]byte, end-int64(len(h.n.now)))...)
	}
	copy(h.n.now[off:], b)
	for sec := off / sector; sec*sector < off+int64(len(b)); sec++ {
		h.n.dirty[sec] = append(h.n.dirty[sec], slices.Clone(h.n.now[sec*sector:min((sec+1)*sector, int64(len(h.n.now)))]))
	}
	return len(b), h.s.step()
}

func (h *handle) Sync() error {
	h.s.mu.Lock()
	defer h.s.mu.Unlock()
	if err := h.s.step(); err != nil {
		return err
	}
	if h.s.broken {
		return syscall.EIO
	}
	h.n.disk, h.n.dirty = slices.Clone(h.n.now), map[int64][][]byte{}
	return nil
}

func (h *handle) Size() (int64, error) {
	h.s.mu.Lock()
	defer h.s.mu.Unlock()
	return int64(len(h.n.now)), nil
}

func (h *handle) Close() error { return nil }
