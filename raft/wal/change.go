// SPDX-License-Identifier: Apache-2.0

package wal

import (
	"errors"
	"maps"
	"slices"

	"github.com/demarc-dev/demarc/fault"
)

// Append adds entries to the end of the log: their indexes follow it and each other, except that an empty log begins
// with the index of the first one. It returns when they are on disk, and all before them. If it fails because no file could be
// made nothing has happened; after another failure of the disk the log takes nothing more until it is opened again.
func (l *Log) Append(entries []Entry) error {
	l.syncing.Lock()
	defer l.syncing.Unlock()
	l.write.Lock()
	defer l.write.Unlock()
	if l.broken != nil {
		return l.broken
	}
	if len(entries) == 0 {
		return nil
	}
	if l.last() < l.first && entries[0].Index > l.first-1 && entries[0].Index != l.last()+1 {
		if err := l.restart(entries[0].Index, 0); err != nil {
			return err
		}
	}
	if err := follows(entries, l.last()+1); err != nil {
		return err
	}
	for len(entries) > 0 { // as many at a time as fit into a file
		n, err := l.append(entries)
		if err != nil {
			return err
		}
		entries = entries[n:]
	}
	return nil
}

// Write is Append that leaves them to a later [Log.Sync]: they can be read at once, and [Log.Synced] is the index up to which they are on
// disk. Until then a crash may take any number of them from the end of the log. If they need a new file they are on disk
// when it returns.
func (l *Log) Write(entries []Entry) error {
	if done, err := l.writeOnly(entries); done || err != nil {
		return err
	}
	return l.Append(entries)
}

// writeOnly does nothing if the present file can't take all of the entries.
func (l *Log) writeOnly(entries []Entry) (done bool, err error) {
	l.write.Lock()
	defer l.write.Unlock()
	n := len(l.segs)
	if l.broken != nil || n == 0 || len(entries) == 0 {
		return len(entries) == 0, l.broken
	}
	var need int64
	for i := range entries {
		need += SizeOf(entries[i])
	}
	if s := l.segs[n-1]; need > s.size-s.end {
		return false, nil
	}
	if err := follows(entries, l.last()+1); err != nil {
		return false, err
	}
	s, offs, end, err := l.put(entries)
	if err != nil {
		return false, err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	s.offs, s.end = append(s.offs, offs...), end
	return true, nil
}

// follows refuses entries that don't follow the log, whose next index is next, and each other.
func follows(entries []Entry, next uint64) error {
	const op = "wal.Append"
	for i := range entries {
		e := &entries[i]
		if e.Index != next+uint64(i) || e.Term == 0 {
			return fault.New(op, fault.Internal, "entry %d of term %d can't follow entry %d", e.Index, e.Term, next+uint64(i)-1)
		}
		if len(e.Ext) > maxBody || len(e.Data) > maxBody {
			return fault.New(op, fault.Invalid, "entry %d has %d bytes, the limit is %d", e.Index, len(e.Ext)+len(e.Data), maxBody)
		}
	}
	return nil
}

// append writes as many entries as fit into one file, and syncs.
func (l *Log) append(entries []Entry) (int, error) {
	s, offs, end, err := l.put(entries)
	if err != nil {
		return 0, err
	}
	if err := s.f.Sync(); err != nil {
		return 0, l.fail(err)
	}
	fresh := s.end == 0
	if fresh {
		g := l.votes.state
		g.newest = s.seq
		if err := l.ground(g); err != nil {
			return 0, err
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	s.offs, s.end, s.synced = append(s.offs, offs...), end, end
	if fresh {
		l.segs, l.spare = append(l.segs, s), nil
	}
	return len(offs), nil
}

// put writes as many entries as fit into one file; they don't belong to the log yet. Whoever begins a file holds both locks of
// writers: the file before it must be on disk.
func (l *Log) put(entries []Entry) (s *segment, offs []int64, end int64, err error) {
	need := SizeOf(entries[0])
	if n := len(l.segs); n > 0 && l.segs[n-1].size-l.segs[n-1].end >= need {
		s = l.segs[n-1]
	} else if s, err = l.makeSpare(roundUp(segmentHead + need)); err != nil {
		return nil, nil, 0, fault.Because(err, "wal.Append", fault.Unavailable, "the log can't grow: %s", fault.Disk(err))
	}
	start := s.end
	end = start
	l.buf = l.buf[:0]
	if start == 0 {
		if err := l.flush(); err != nil {
			return nil, nil, 0, l.fail(err)
		}
		s.first = entries[0].Index
		l.buf = append(l.buf, s.head(s.first)...)
		end = segmentHead
	}
	l.mu.RLock()
	synced := s.synced
	l.mu.RUnlock()
	for i := range entries {
		size := sizeOf(len(entries[i].Ext), len(entries[i].Data))
		if size > s.size-end {
			break
		}
		l.buf = appendRecord(l.buf, &entries[i], synced)
		offs, end = append(offs, end), end+size
	}
	if _, err := s.f.WriteAt(l.buf, start); err != nil {
		return nil, nil, 0, l.fail(err)
	}
	if cap(l.buf) > 4<<20 {
		l.buf = nil
	}
	return s, offs, end, nil
}

// Sync puts on disk what was written before the call. Writes are not held up; a sync that fails ends the log, as in
// [Log.Append].
func (l *Log) Sync() error {
	l.syncing.Lock()
	defer l.syncing.Unlock()
	err := l.flush()
	if err != nil {
		l.write.Lock()
		defer l.write.Unlock()
		return l.fail(err)
	}
	return nil
}

// flush syncs the present file; the lock of syncs is held.
func (l *Log) flush() error {
	l.mu.RLock()
	var s *segment
	var end int64
	if n := len(l.segs); n > 0 && l.segs[n-1].synced < l.segs[n-1].end {
		s, end = l.segs[n-1], l.segs[n-1].end
	}
	l.mu.RUnlock()
	if s == nil {
		return nil
	}
	if err := s.f.Sync(); err != nil {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	s.synced = end
	return nil
}

// Synced is the index up to which the log is on disk.
func (l *Log) Synced() uint64 {
	l.mu.RLock()
	defer l.mu.RUnlock()
	last := l.last()
	if n := len(l.segs); n > 0 {
		if s := l.segs[n-1]; s.synced < s.end {
			later, _ := slices.BinarySearch(s.offs, s.synced)
			last = s.first + uint64(later) - 1
		}
	}
	return last
}

// makeSpare makes sure of a spare file of at least need bytes.
func (l *Log) makeSpare(need int64) (*segment, error) {
	if l.spare != nil && l.spare.size >= need {
		return l.spare, nil
	}
	if old := l.spare; old != nil {
		l.mu.Lock()
		l.spare = nil
		l.mu.Unlock()
		if err := errors.Join(old.f.Close(), l.fs.Remove(old.name)); err != nil {
			return nil, err
		}
	}
	seq := l.next
	l.next++
	s, err := makeSegment(l.fs, seq, max(need, l.size))
	if err != nil {
		return nil, err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.spare = s
	return s, nil
}

// Prepare makes the next file, if the present one is half full and there is none. It fails if there is no space.
// One goroutine at a time may call it.
func (l *Log) Prepare() error {
	l.mu.RLock()
	n := len(l.segs)
	ready := l.spare != nil || n == 0 || l.segs[n-1].end < l.segs[n-1].size/2
	l.mu.RUnlock()
	if ready {
		return nil
	}
	l.write.Lock()
	seq, broken := l.next, l.broken
	l.next++
	l.write.Unlock()
	if broken != nil {
		return broken
	}
	s, err := makeSegment(l.fs, seq, l.size) // appends are not held up
	if err != nil {
		return fault.Because(err, "wal.Prepare", fault.Unavailable, "the log can't grow: %s", fault.Disk(err))
	}
	l.write.Lock()
	defer l.write.Unlock()
	if n := len(l.segs); l.broken != nil || l.spare != nil || (n > 0 && l.segs[n-1].seq > seq) { // a write could not wait
		return errors.Join(s.f.Close(), l.fs.Remove(s.name))
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.spare = s
	return nil
}

// Room is how many bytes the log can still take without asking for space: of the present file or of the spare one,
// whichever has more.
func (l *Log) Room() int64 {
	l.mu.RLock()
	defer l.mu.RUnlock()
	var room int64
	if n := len(l.segs); n > 0 {
		room = l.segs[n-1].size - l.segs[n-1].end
	}
	if l.spare != nil {
		room = max(room, l.spare.size-segmentHead)
	}
	return room
}

// SizeOf is what an entry takes of the room.
func SizeOf(e Entry) int64 { return sizeOf(len(e.Ext), len(e.Data)) }

// fail makes the log take nothing more.
func (l *Log) fail(err error) error {
	if l.broken == nil {
		l.broken = fault.Because(err, "wal", fault.Internal,
			"a write to the log failed, so it takes nothing more: %s. Start this node again when its disk is well", fault.Disk(err))
	}
	return l.broken
}

// Value returns a value that was set, nil if none was.
func (l *Log) Value(name string) []byte {
	l.mu.RLock()
	defer l.mu.RUnlock()
	return slices.Clone(l.votes.state.values[name])
}

// Set stores a value beside the log, as the votes are stored. All of them together have some 450 bytes.
func (l *Log) Set(name string, value []byte) error {
	l.write.Lock()
	defer l.write.Unlock()
	g := l.votes.state
	g.values = maps.Clone(g.values)
	g.values[name] = slices.Clone(value)
	return l.ground(g)
}

// ground puts the next generation of the votes on disk. The lock of writers is held, the other one is not.
func (l *Log) ground(g ground) error {
	if l.broken != nil {
		return l.broken
	}
	if _, err := g.encode(1); err != nil {
		return err
	}
	// Readers see what was, until it is on disk.
	next := *l.votes
	if err := next.write(g); err != nil {
		return l.fail(err)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	*l.votes = next
	return nil
}

// restart empties the log and makes it begin at first. Entries from cut on are deleted that are not below first; 0: none.
func (l *Log) restart(first, cut uint64) error {
	g := l.votes.state
	g.first, g.newest = first, 0
	if n := len(l.segs); cut > 0 && n > 0 {
		g.cutFrom, g.cutThrough = cut, l.segs[n-1].seq
	}
	if err := l.ground(g); err != nil {
		return err
	}
	drop := slices.Clone(l.segs)
	if l.spare != nil {
		drop = append(drop, l.spare)
	}
	l.mu.Lock()
	l.segs, l.spare, l.first = nil, nil, first
	l.mu.Unlock()
	if err := discard(l.fs, drop); err != nil {
		return l.fail(err)
	}
	if g.cutThrough > 0 {
		return l.ground(g.uncut())
	}
	return nil
}

// Drop deletes the entries up to and with index to.
func (l *Log) Drop(to uint64) error {
	l.syncing.Lock()
	defer l.syncing.Unlock()
	l.write.Lock()
	defer l.write.Unlock()
	if l.broken != nil {
		return l.broken
	}
	if err := l.flush(); err != nil {
		return l.fail(err)
	}
	if to < l.first {
		return nil
	}
	if to >= l.last() {
		return l.restart(to+1, 0)
	}
	g := l.votes.state
	g.first = to + 1
	if err := l.ground(g); err != nil {
		return err
	}
	n := 0
	for l.segs[n].last() <= to {
		n++
	}
	drop := slices.Clone(l.segs[:n])
	l.mu.Lock()
	l.first, l.segs = to+1, slices.Clone(l.segs[n:])
	l.mu.Unlock()
	if err := discard(l.fs, drop); err != nil {
		return l.fail(err)
	}
	return nil
}

// Cut deletes the entries from index from on. That they are deleted is on disk before their bytes are touched: if the
// work is interrupted, the next start ends it.
func (l *Log) Cut(from uint64) error {
	l.syncing.Lock()
	defer l.syncing.Unlock()
	l.write.Lock()
	defer l.write.Unlock()
	if l.broken != nil {
		return l.broken
	}
	if err := l.flush(); err != nil {
		return l.fail(err)
	}
	if from > l.last() {
		return nil
	}
	if from <= l.first {
		return l.restart(l.first, l.first)
	}
	n := len(l.segs)
	g := l.votes.state
	g.cutFrom, g.cutThrough = from, l.segs[n-1].seq
	for n > 1 && l.segs[n-1].first >= from {
		n--
	}
	g.newest = l.segs[n-1].seq
	if err := l.ground(g); err != nil {
		return err
	}
	s, drop := l.segs[n-1], slices.Clone(l.segs[n:])
	if l.spare != nil {
		drop = append(drop, l.spare)
	}
	l.mu.Lock()
	used := s.end
	if keep := from - s.first; keep < uint64(len(s.offs)) {
		s.end, s.offs = s.offs[keep], slices.Clone(s.offs[:keep])
		s.synced = s.end
	}
	l.segs, l.spare = slices.Clone(l.segs[:n]), nil
	l.mu.Unlock()
	if err := discard(l.fs, drop); err != nil {
		return l.fail(err)
	}
	if s.end < used {
		if err := s.zero(s.end, used); err != nil {
			return l.fail(err)
		}
	}
	return l.ground(g.uncut())
}

// Grow makes sure of room for need bytes; see [SizeOf]. It fails if there is no space.
func (l *Log) Grow(need int64) error {
	if l.Room() >= need {
		return nil
	}
	l.write.Lock()
	defer l.write.Unlock()
	if l.broken != nil {
		return l.broken
	}
	if _, err := l.makeSpare(roundUp(segmentHead + need)); err != nil {
		return fault.Because(err, "wal.Grow", fault.Unavailable, "the log can't grow: %s", fault.Disk(err))
	}
	return nil
}
