// SPDX-License-Identifier: Apache-2.0

// Package wal is the log and the votes of one member of a cluster, on disk.
//
// # Promise
//
// What [Log.Append], [Log.Cut], [Log.Drop], [Log.Set] and [Log.Sync] answered is on disk, whatever crashes then, and so is what
// was read of a log that was opened. What they had not answered, and what [Log.Write] did, may be there or not, entry by
// entry in order. An entry that was altered on disk is refused by the name of its
// file and its index, when the log is opened and when it is read; an entry that was not written whole is no entry. The
// tests of this package crash a scripted file system at each of its steps and alter each byte of each file.
//
// # On disk
//
// Segments are files of full size that were made, zeroed and synced before they are used, so that an append is one write
// and one fdatasync of bytes whose place is known. Votes have a file of their own, of fixed size. A record is
//
//	0x02 | type, 1 byte | 0, 2 bytes | length of extensions, 4 bytes | index, 8 bytes | term, 8 bytes | Unix nanoseconds of
//	its append, 8 bytes | how much of the file was on disk then, 8 bytes | length of data, 4 bytes | CRC-32C of both, 4 bytes |
//	CRC-32C of the head up to here, 4 bytes | extensions and data, each byte XOR 0xA5 | 8 to 15 bytes of 0xE5
//
// all big endian, at multiples of 8. The mask and the last bytes are there to tell a torn write from an alteration: see
// torn.
//
// # A full disk
//
// The next segment is made while the present one is being filled. If that fails for want of space, [Log.Room] shrinks,
// and the writer can stop before it is full; what is there stays, and [Log.Prepare] tries again.
//
// # Limits
//
// A disk is believed to write sectors of 512 bytes wholly or not at all, in any order, and to keep what it synced. One
// that tears a sector makes a node refuse to start that could have; one that loses a synced sector at the very end of the
// log can't be told from one that crashed.
package wal

import (
	"errors"
	"math"
	"slices"
	"sync"

	"github.com/demarc-dev/demarc/fault"
)

// Entry is one entry of the log. Index and Term are above 0.
type Entry struct {
	Index, Term uint64
	Type        byte
	At          int64 // Unix nanoseconds, 0: unknown
	Ext, Data   []byte
}

// Options of a log. Zero means the default.
type Options struct {
	SegmentBytes int64 // 16 MiB
}

// Log is an open log. Get, First, Last, Synced, Value and Room may be called at any time; Write waits for no sync; the others
// wait for each other.
type Log struct {
	fs   Files
	size int64

	syncing sync.Mutex // held during a sync, and by what needs none to be under way; taken before write

	write  sync.Mutex // held during a change of files
	votes  *votes
	buf    []byte
	broken error // nothing more is written: what is on disk is not known

	mu    sync.RWMutex // guards what follows and the values of votes; to change it, both locks are held
	segs  []*segment   // oldest first; the last one is written to
	first uint64       // of the log: entries before it are deleted
	spare *segment
	next  uint64 // number of the next segment; guarded by write
}

var (
	// ErrNotFound is the error of Get for an index that the log does not hold.
	ErrNotFound = fault.New("wal.Get", fault.NotFound, "the log does not hold this entry")
	errClosed   = fault.New("wal", fault.Unavailable, "the log is closed")
)

// Open opens the log in a directory, or makes one if it is empty. It reads all of it.
func Open(fs Files, o Options) (*Log, error) {
	if o.SegmentBytes <= 0 {
		o.SegmentBytes = 16 << 20
	}
	l := &Log{fs: fs, size: roundUp(max(o.SegmentBytes, 4<<10))}
	if err := load(l); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return l, nil
}

// load reads what is in the directory.
func load(l *Log) error {
	// What is read here is gone by, and may be in memory only, if the process before this one was killed between a change
	// and its sync. So the directory is synced, the votes are, and the last file is; the others were when it was begun.
	err := l.fs.SyncDir()
	if err != nil {
		return err
	}
	if l.votes, err = openVotes(l.fs); err != nil {
		return err
	}
	l.first = l.votes.state.first
	f := &found{fs: l.fs, votes: l.votes}
	err = f.list()
	var drop []*segment
	if err == nil {
		drop, err = f.read()
	}
	l.segs, l.next = f.segs, f.next
	if err != nil { // nothing is removed: it may have to be examined
		for _, s := range f.unused {
			err = errors.Join(err, s.f.Close())
		}
		return err
	}
	if err := discard(l.fs, append(f.unused, drop...)); err != nil {
		return err
	}
	if n := len(l.segs); n > 0 {
		if err := l.segs[n-1].clean(); err != nil {
			return err
		}
		if err := l.segs[n-1].f.Sync(); err != nil {
			return err
		}
	}
	for _, s := range l.segs {
		s.synced = s.end
	}
	if l.votes.state.cutThrough > 0 {
		return l.ground(l.votes.state.uncut())
	}
	return nil
}

// found is the segments of a directory, as they are when it is opened.
type found struct {
	fs     Files
	votes  *votes
	segs   []*segment // that count, oldest first
	unused []*segment // made and not used, or cut off as a whole
	next   uint64     // number of the next segment
}

// list opens the segments. One that has no head was made and not used.
func (f *found) list() error {
	names, err := f.fs.List()
	if err != nil {
		return err
	}
	var seqs []uint64
	for _, name := range names {
		if seq, ok := parseName(name); ok {
			seqs = append(seqs, seq)
		}
	}
	slices.Sort(seqs)
	g := f.votes.state
	f.next = max(g.newest, g.cutThrough) + 1
	for _, seq := range seqs {
		f.next = max(f.next, seq+1)
		s, err := openSegment(f.fs, seq)
		if err != nil {
			return err
		}
		if s.end == 0 || (seq <= g.cutThrough && s.first >= g.cutFrom) {
			f.unused = append(f.unused, s)
			continue
		}
		f.segs = append(f.segs, s)
	}
	if f.votes.fresh && len(f.segs) > 0 {
		return damaged(votesName, "it is missing or empty and the log is not, so what this node voted is not known: "+
			"remove its directory and let it join again from its peers")
	}
	if g.newest > 0 && !slices.ContainsFunc(f.segs, func(s *segment) bool { return s.seq == g.newest }) {
		return damaged(segmentName(g.newest), "it is missing or empty; %s", recovery)
	}
	return nil
}

// read finds the entries of all segments, and returns the segments of which all entries are deleted.
func (f *found) read() (drop []*segment, err error) {
	g := f.votes.state
	var whole []*segment
	for i, s := range f.segs {
		if i+1 < len(f.segs) && f.segs[i+1].first <= g.first {
			drop = append(drop, s)
			continue
		}
		until := uint64(math.MaxUint64)
		if s.seq <= g.cutThrough {
			until = g.cutFrom
		}
		if err := s.scan(until); err != nil {
			return nil, err
		}
		switch {
		case s.last() < g.first && s.seq != g.newest:
			drop = append(drop, s)
			continue
		case len(whole) == 0 && s.first > g.first:
			return nil, damaged(s.name, "the log begins at entry %d and this file at entry %d: those between are missing; %s",
				g.first, s.first, recovery)
		case len(whole) > 0 && whole[len(whole)-1].last()+1 != s.first:
			before := whole[len(whole)-1]
			return nil, damaged(before.name, "entry %d at byte %d was on disk and is gone, entry %d in %s is there; %s",
				before.last()+1, before.end, s.first, s.name, recovery)
		}
		whole = append(whole, s)
	}
	f.segs = whole
	return drop, nil
}

// discard closes and removes segments.
func discard(fs Files, drop []*segment) error {
	if len(drop) == 0 {
		return nil
	}
	var errs []error
	for _, s := range drop {
		errs = append(errs, s.f.Close(), fs.Remove(s.name))
	}
	return errors.Join(append(errs, fs.SyncDir())...)
}

// Close puts on disk what was written, and closes the files.
func (l *Log) Close() error {
	l.syncing.Lock()
	defer l.syncing.Unlock()
	l.write.Lock()
	defer l.write.Unlock()
	var errs []error
	if l.broken == nil {
		errs = append(errs, l.flush())
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, s := range l.segs {
		errs = append(errs, s.f.Close())
	}
	if l.spare != nil {
		errs = append(errs, l.spare.f.Close())
	}
	if l.votes != nil && !errors.Is(l.broken, errClosed) {
		errs = append(errs, l.votes.f.Close())
	}
	l.segs, l.spare, l.broken = nil, nil, errClosed
	return errors.Join(errs...)
}

// Repaired reports whether one copy of the votes was found altered when the log was opened, and was written anew.
func (l *Log) Repaired() bool { return l.votes.repaired }

// First is the index of the first entry, 0 for an empty log.
func (l *Log) First() uint64 {
	l.mu.RLock()
	defer l.mu.RUnlock()
	if l.last() < l.first {
		return 0
	}
	return l.first
}

// Last is the index of the last entry, 0 for an empty log.
func (l *Log) Last() uint64 {
	l.mu.RLock()
	defer l.mu.RUnlock()
	if last := l.last(); last >= l.first {
		return last
	}
	return 0
}

// last is first-1 or less for an empty log. A lock is held.
func (l *Log) last() uint64 {
	if n := len(l.segs); n > 0 {
		return l.segs[n-1].last()
	}
	return l.first - 1
}

// Get reads an entry and checks it.
func (l *Log) Get(index uint64) (Entry, error) {
	l.mu.RLock()
	defer l.mu.RUnlock()
	if index < l.first || index > l.last() {
		return Entry{}, ErrNotFound
	}
	i, ok := slices.BinarySearchFunc(l.segs, index, func(s *segment, index uint64) int {
		switch {
		case s.last() < index:
			return -1
		case s.first > index:
			return 1
		}
		return 0
	})
	if !ok {
		return Entry{}, ErrNotFound
	}
	return l.segs[i].get(index)
}

func (s *segment) get(index uint64) (Entry, error) {
	off, end := s.offs[index-s.first], s.end
	if next := index - s.first + 1; next < uint64(len(s.offs)) {
		end = s.offs[next]
	}
	b := make([]byte, end-off)
	if _, err := s.f.ReadAt(b, off); err != nil {
		return Entry{}, fault.Because(err, "wal.Get", fault.Internal, "entry %d of the log's file %s can't be read", index, s.name)
	}
	r, ok := readHead(b, off)
	if !ok || r.index != index || r.size() != int64(len(b)) {
		return Entry{}, damaged(s.name, "entry %d at byte %d can't be read; %s", index, off, recovery)
	}
	ext, data, ok := r.body(b)
	if !ok {
		return Entry{}, damaged(s.name, "entry %d at byte %d does not have the checksum that it was written with; %s", index, off, recovery)
	}
	return Entry{Index: index, Term: r.term, Type: r.kind, At: r.at, Ext: ext, Data: data}, nil
}
