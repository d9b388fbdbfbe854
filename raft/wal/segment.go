// SPDX-License-Identifier: Apache-2.0

package wal

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"slices"
)

// segment is one file of entries. It is made of full size, all zeros and synced, before it is needed; its head is written
// with its first entries.
//
//	"dmlog/2\n" | number, 8 bytes | index of its first entry, 8 bytes | CRC-32C of these, 4 bytes | 36 bytes of padding | records
type segment struct {
	f      File
	name   string
	seq    uint64
	first  uint64  // index of its first entry
	offs   []int64 // of its entries
	end    int64   // of the last one; 0: its head is not written
	synced int64   // how much of it is on disk: the end of an entry, or 0
	size   int64   // of the file
}

const (
	segmentMagic = "dmlog/2\n"
	segmentHead  = 64
	suffix       = ".segment"
)

func segmentName(seq uint64) string { return fmt.Sprintf("%016x%s", seq, suffix) }

func parseName(name string) (uint64, bool) {
	var seq uint64
	_, err := fmt.Sscanf(name, "%016x"+suffix, &seq)
	return seq, err == nil && seq > 0 && name == segmentName(seq)
}

func (s *segment) last() uint64 { return s.first + uint64(len(s.offs)) - 1 } // first-1 if it is empty

func (s *segment) head(first uint64) []byte {
	b := append(make([]byte, 0, segmentHead), segmentMagic...)
	b = binary.BigEndian.AppendUint64(b, s.seq)
	b = binary.BigEndian.AppendUint64(b, first)
	b = binary.BigEndian.AppendUint32(b, crc32.Checksum(b, castagnoli))
	for len(b) < segmentHead {
		b = append(b, padding)
	}
	return b
}

// makeSegment makes a file of size zeros. What is left of one that could not be made is removed.
func makeSegment(fs Files, seq uint64, size int64) (*segment, error) {
	s := &segment{name: segmentName(seq), seq: seq, size: size}
	var err error
	if s.f, err = fs.Create(s.name); err != nil {
		return nil, err
	}
	if err = s.zero(0, size); err == nil {
		err = fs.SyncDir()
	}
	if err != nil {
		return nil, errors.Join(err, s.f.Close(), fs.Remove(s.name))
	}
	return s, nil
}

// zero fills a part of the file with zeros and syncs.
func (s *segment) zero(from, to int64) error {
	for ; from < to; from += int64(len(zeros)) {
		if _, err := s.f.WriteAt(zeros[:min(int64(len(zeros)), to-from)], from); err != nil {
			return err
		}
	}
	return s.f.Sync()
}

// openSegment reads the head of a file. One whose head is still zero has no end.
func openSegment(fs Files, seq uint64) (*segment, error) {
	s := &segment{name: segmentName(seq), seq: seq}
	var err error
	if s.f, err = fs.Open(s.name); err != nil {
		return nil, err
	}
	if err = s.readFirst(); err != nil {
		return nil, errors.Join(err, s.f.Close())
	}
	return s, nil
}

func (s *segment) readFirst() (err error) {
	if s.size, err = s.f.Size(); err != nil {
		return err
	}
	b := make([]byte, segmentHead)
	if n, err := s.f.ReadAt(b, 0); err != nil && !errors.Is(err, io.EOF) {
		return err
	} else if allZero(b[:n]) {
		return nil
	}
	first := binary.BigEndian.Uint64(b[16:])
	if !slices.Equal(b, s.head(first)) || first == 0 {
		return damaged(s.name, "its head can't be read; "+recovery)
	}
	s.first, s.end = first, segmentHead
	return nil
}

// recovery is what to do if a member can't start from its own disk.
const recovery = "nothing of it was applied. Remove this node's directory and let it join again from its peers"

// scan finds the entries of a segment. until is the index from which on they are deleted. It stops at what was not
// written whole, which the caller may know to be impossible, and refuses what was altered.
func (s *segment) scan(until uint64) error {
	b := make([]byte, s.size)
	if n, err := s.f.ReadAt(b, 0); err != nil && !errors.Is(err, io.EOF) {
		return err
	} else if int64(n) < s.size {
		return damaged(s.name, "it ends at byte %d of %d; %s", n, s.size, recovery)
	}
	for s.last()+1 < until {
		r, ok, err := s.at(b, s.end)
		if err != nil {
			return err
		}
		if !ok {
			return s.lost(b)
		}
		s.offs, s.end = append(s.offs, r.off), r.off+r.size()
	}
	return nil
}

// at reads the record at off and checks it; not ok is one that was not written, or not whole.
func (s *segment) at(b []byte, off int64) (r record, ok bool, err error) {
	want := s.last() + 1
	if s.size-off < recordHead+align {
		return r, false, nil
	}
	r, ok = readHead(b[off:], off)
	if !ok {
		if torn(b[off:off+recordHead], off) {
			return r, false, nil
		}
		return r, false, damaged(s.name, "entry %d at byte %d can't be read; %s", want, off, recovery)
	}
	if r.index != want {
		return r, false, damaged(s.name, "entry %d at byte %d is where entry %d belongs; %s", r.index, off, want, recovery)
	}
	if r.size() > s.size-off {
		return r, false, damaged(s.name, "entry %d at byte %d is longer than the file; %s", want, off, recovery)
	}
	whole := b[off : off+r.size()]
	if torn(whole, off) {
		return r, false, nil
	}
	if _, _, ok := r.body(slices.Clone(whole)); !ok {
		return r, false, damaged(s.name, "entry %d at byte %d does not have the checksum that it was written with; %s", want, off, recovery)
	}
	return r, true, nil
}

// lost refuses a segment in which an entry that was not written whole lies before one that was written when this was on disk
// already: the disk lost what it had said it holds.
func (s *segment) lost(b []byte) error {
	for off := roundUp(s.end + 1); off+recordHead <= s.size; off += align {
		if b[off] != recordVersion {
			continue
		}
		if r, ok := readHead(b[off:], off); ok && r.batch > s.end {
			return damaged(s.name, "entry %d at byte %d was on disk and is gone, entry %d after it is there; %s",
				s.last()+1, s.end, r.index, recovery)
		}
	}
	return nil
}

// clean makes the rest of the file zeros again if it is not.
func (s *segment) clean() error {
	b := make([]byte, len(zeros))
	for off := s.end; off < s.size; off += int64(len(b)) {
		n, err := s.f.ReadAt(b[:min(int64(len(b)), s.size-off)], off)
		if err != nil && !errors.Is(err, io.EOF) {
			return err
		}
		if !allZero(b[:n]) || n == 0 {
			return s.zero(off, s.size)
		}
	}
	return nil
}
