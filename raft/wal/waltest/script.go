// SPDX-License-Identifier: Apache-2.0

// Package waltest crashes a log store at each step of a schedule, on a scripted file system, and checks what is left. It
// serves the tests of package wal and the comparison of log stores in bench/logstores.
package waltest

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

// Sector is what a disk writes wholly or not at all, in bytes.
const Sector = 512

// ErrOff is what everything answers once the machine is off.
var ErrOff = errors.New("the machine is off")

// Script is a file system that crashes at a step, counted over writes, syncs and changes of the directory. What a sync
// answered is durable; of the rest any sector of any write may be there or not, in any order, and so may any change of
// the directory.
type Script struct {
	Left   int  // steps until the crash; below 0: none
	Full   bool // nothing new can be made
	Broken bool // syncs fail

	mu      sync.Mutex
	off     bool
	names   map[string]*inode   // as programs see them
	durable map[string]*inode   // as they are on disk
	changes []map[string]*inode // of the directory since its last sync: nil is a removal
}

type inode struct {
	now, disk []byte
	dirty     map[int64][][]byte // versions of a sector since the last sync, oldest first
}

// New returns an empty one that does not crash.
func New() *Script {
	return &Script{Left: -1, names: map[string]*inode{}, durable: map[string]*inode{}}
}

// Off reports whether the machine has crashed.
func (s *Script) Off() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.off
}

// Bytes are those of a file, to be altered; nil if there is none.
func (s *Script) Bytes(name string) []byte {
	if n := s.names[name]; n != nil {
		return n.now
	}
	return nil
}

// Put makes or replaces a file, as if it had always been there.
func (s *Script) Put(name string, b []byte) {
	n := &inode{now: b, disk: slices.Clone(b), dirty: map[int64][][]byte{}}
	s.names[name], s.durable[name] = n, n
}

// Gone removes a file, as if it had never been there.
func (s *Script) Gone(name string) {
	delete(s.names, name)
	delete(s.durable, name)
}

// step counts, and reports whether the machine is still on. The step at which it crashes has begun.
func (s *Script) step() error {
	if s.Left == 0 {
		s.off = true
		return ErrOff
	}
	if s.Left > 0 {
		s.Left--
	}
	return nil
}

// List implements wal.Files.
func (s *Script) List() ([]string, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Sorted(maps.Keys(s.names)), nil
}

// Open implements wal.Files.
func (s *Script) Open(name string) (wal.File, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := s.names[name]
	if n == nil {
		return nil, os.ErrNotExist
	}
	return &handle{s, n}, nil
}

// Create implements wal.Files.
func (s *Script) Create(name string) (wal.File, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.Full {
		return nil, syscall.ENOSPC
	}
	n := &inode{dirty: map[int64][][]byte{}}
	s.names[name] = n
	s.changes = append(s.changes, map[string]*inode{name: n})
	return &handle{s, n}, s.step()
}

// Remove implements wal.Files.
func (s *Script) Remove(name string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.names, name)
	s.changes = append(s.changes, map[string]*inode{name: nil})
	return s.step()
}

// SyncDir implements wal.Files.
func (s *Script) SyncDir() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.step(); err != nil {
		return err
	}
	s.durable, s.changes = maps.Clone(s.names), nil
	return nil
}

// Crash returns the file system that is there after the machine is on again, if it were to crash now.
func (s *Script) Crash(r *rand.Rand) *Script {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := New()
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
			if end := sec*Sector + int64(len(take)); int64(len(b)) < end {
				b = append(b, make([]byte, end-int64(len(b)))...)
			}
			copy(b[sec*Sector:], take)
		}
		out.names[name] = &inode{now: b, disk: slices.Clone(b), dirty: map[int64][][]byte{}}
	}
	out.durable = maps.Clone(out.names)
	return out
}

// Again returns the file system that a new process finds on the machine that stayed on: what was not synced is there, and may
// be lost in a crash to come.
func (s *Script) Again() *Script {
	out, of := New(), map[*inode]*inode{nil: nil}
	twin := func(n *inode) *inode {
		if of[n] == nil && n != nil {
			t := &inode{now: slices.Clone(n.now), disk: slices.Clone(n.disk), dirty: map[int64][][]byte{}}
			for sec, versions := range n.dirty {
				t.dirty[sec] = slices.Clone(versions)
			}
			of[n] = t
		}
		return of[n]
	}
	for name, n := range s.names {
		out.names[name] = twin(n)
	}
	for name, n := range s.durable {
		out.durable[name] = twin(n)
	}
	for _, c := range s.changes {
		d := map[string]*inode{}
		for name, n := range c {
			d[name] = twin(n)
		}
		out.changes = append(out.changes, d)
	}
	return out
}

// Clone returns an independent copy, as if all were synced.
func (s *Script) Clone() *Script {
	out := New()
	for name, n := range s.names {
		out.names[name] = &inode{now: slices.Clone(n.now), disk: slices.Clone(n.now), dirty: map[int64][][]byte{}}
	}
	out.durable = maps.Clone(out.names)
	return out
}

type handle struct {
	s *Script
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
	if h.s.Full && off+int64(len(b)) > int64(len(h.n.now)) {
		return 0, syscall.ENOSPC
	}
	if end := off + int64(len(b)); end > int64(len(h.n.now)) {
		h.n.now = append(h.n.now, make([]byte, end-int64(len(h.n.now)))...)
	}
	copy(h.n.now[off:], b)
	for sec := off / Sector; sec*Sector < off+int64(len(b)); sec++ {
		h.n.dirty[sec] = append(h.n.dirty[sec], slices.Clone(h.n.now[sec*Sector:min((sec+1)*Sector, int64(len(h.n.now)))]))
	}
	return len(b), h.s.step()
}

func (h *handle) Sync() error {
	h.s.mu.Lock()
	defer h.s.mu.Unlock()
	if err := h.s.step(); err != nil {
		return err
	}
	if h.s.Broken {
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
