// SPDX-License-Identifier: Apache-2.0

package ledger

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"io"
	"sync"

	"github.com/demarc-dev/demarc/fault"
)

// File is what a [Local] needs of its open file: an *os.File has it. Nobody else may write to it.
type File interface {
	io.ReadWriteSeeker
	Truncate(size int64) error
	Sync() error
}

// The file is the line "demarc-book/1" and records, each a batch of proposals that was synced at once:
//
//	length of the payload, 4 bytes, big endian | CRC-32C of those 4 bytes | CRC-32C of the payload | payload
//
// and the payload is proposals, each with its length in 4 bytes before it.
const (
	bookVersion = "demarc-book/1\n"
	headBytes   = 12
	maxBatch    = 2 * MaxChange // bytes of a payload
	sector      = 512           // what a disk writes at once, at the least
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Recovered says what opening a file found.
type Recovered struct {
	Changes int   // that were replayed
	Cut     int64 // bytes of a torn tail that were cut off: a write that nobody was told of when the machine stopped
}

// Local is a book of one copy: a change is computed, appended, synced, and only then seen and answered. Changes that
// are proposed while one is being synced share the next sync. It has no goroutine of its own. Its methods may be called
// concurrently.
//
// A write that fails is cut off again, and its changes are refused as unavailable: none of them happened. The next
// proposal is tried again, so that a full disk is over when there is space.
type Local[S any] struct {
	book *Book[S]
	file File

	mu   sync.Mutex // guards what follows
	tail *page[S]   // the page after everything that waits
	next *batch[S]  // what the next write takes
	bad  error      // why the last write failed, nil after one that did not

	disk sync.Mutex // held while writing; taken before mu
	end  int64      // offset up to which the file is known to be whole; guarded by disk
	torn bool       // something may lie after end, which is cut off before the next write; guarded by disk
}

// batch is proposals that are written and synced at once. Who wrote it, or another caller, sets done and err under
// [Local.disk].
type batch[S any] struct {
	data []byte
	tail *page[S] // after its last proposal
	done bool
	err  error
}

// OpenLocal replays the file into the book, which must be new. A torn tail is cut off and reported. Any other damage is
// an error that names the place, and nothing is changed.
func OpenLocal[S any](file File, book *Book[S]) (*Local[S], Recovered, error) {
	const op = "ledger.OpenLocal"
	var rec Recovered
	size, err := file.Seek(0, io.SeekEnd)
	if err == nil {
		_, err = file.Seek(0, io.SeekStart)
	}
	if err != nil {
		return nil, rec, fault.At(op, fault.Unavailable, err)
	}
	l := &Local[S]{book: book, file: file, tail: book.now.Load(), next: &batch[S]{}}
	end := int64(len(bookVersion))
	if size < end {
		had := make([]byte, size)
		if _, err := io.ReadFull(file, had); err != nil {
			return nil, rec, fault.At(op, fault.Unavailable, err)
		}
		if string(had) != bookVersion[:size] {
			return nil, rec, fault.New(op, fault.Invalid, "the file is not a book of this format: it does not begin with %q", bookVersion)
		}
		rec.Cut = size
		if err := l.begin(); err != nil {
			return nil, rec, fault.Because(err, op, fault.Unavailable, "the book's file can't be begun: %s", fault.Disk(err))
		}
		l.end = end
		return l, rec, nil
	}
	r := bufio.NewReaderSize(file, int(min(size, 1<<20)))
	first := make([]byte, len(bookVersion))
	if _, err := io.ReadFull(r, first); err != nil {
		return nil, rec, fault.At(op, fault.Unavailable, err)
	}
	if string(first) != bookVersion {
		return nil, rec, fault.New(op, fault.Invalid, "the file is not a book of this format: it does not begin with %q", bookVersion)
	}
	for end < size {
		payload, err := readRecord(r, end, size)
		if errors.Is(err, errTorn) {
			rec.Cut = size - end
			break
		}
		if err != nil {
			return nil, rec, fault.At(op, "", err)
		}
		n, err := l.replay(payload, end)
		if err != nil {
			return nil, rec, fault.At(op, "", err)
		}
		rec.Changes += n
		end += headBytes + int64(len(payload))
	}
	if rec.Cut > 0 {
		if err := errors.Join(file.Truncate(end), file.Sync()); err != nil {
			return nil, rec, fault.Because(err, op, fault.Unavailable, "the torn end of the book's file can't be cut off: %s", fault.Disk(err))
		}
	}
	if _, err := file.Seek(end, io.SeekStart); err != nil {
		return nil, rec, fault.At(op, fault.Unavailable, err)
	}
	l.end = end
	book.publish(l.tail, l.tail)
	return l, rec, nil
}

// begin writes the first line of a new file.
func (l *Local[S]) begin() error {
	if err := l.file.Truncate(0); err != nil {
		return err
	}
	if _, err := l.file.Seek(0, io.SeekStart); err != nil {
		return err
	}
	if _, err := l.file.Write([]byte(bookVersion)); err != nil {
		return err
	}
	return l.file.Sync()
}

var errTorn = errors.New("a torn tail")

// readRecord reads the record at offset at of a file of that size. errTorn means that the write of the last record never
// ended: the file ends inside of it, or a whole sector of it was never written (the rule of etcd's write-ahead log).
func readRecord(r io.Reader, at, size int64) ([]byte, error) {
	const op = "ledger.readRecord"
	if size-at < headBytes {
		return nil, errTorn
	}
	var head [headBytes]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return nil, fault.At(op, fault.Unavailable, err)
	}
	n := int64(binary.BigEndian.Uint32(head[:4]))
	if crc32.Checksum(head[:4], castagnoli) != binary.BigEndian.Uint32(head[4:8]) {
		if head == ([headBytes]byte{}) && onlyZeros(r) {
			return nil, errTorn
		}
		return nil, fault.New(op, fault.Invalid, "the record at byte %d is damaged in its length: restore the file from a copy, or ask demarc "+
			"verify what the evidence still proves", at)
	}
	if n == 0 || n > maxBatch {
		return nil, fault.New(op, fault.Invalid, "the record at byte %d claims %d bytes, and %d is the most", at, n, maxBatch)
	}
	if at+headBytes+n > size {
		return nil, errTorn
	}
	payload := make([]byte, n)
	if _, err := io.ReadFull(r, payload); err != nil {
		return nil, fault.At(op, fault.Unavailable, err)
	}
	if crc32.Checksum(payload, castagnoli) != binary.BigEndian.Uint32(head[8:]) {
		if at+headBytes+n == size && blankSector(payload, at+headBytes) {
			return nil, errTorn
		}
		return nil, fault.New(op, fault.Invalid, "the record at byte %d is damaged: restore the file from a copy, or ask demarc verify what "+
			"the evidence still proves", at)
	}
	return payload, nil
}

func onlyZeros(r io.Reader) bool {
	buf := make([]byte, 64<<10)
	for {
		n, err := r.Read(buf)
		for _, b := range buf[:n] {
			if b != 0 {
				return false
			}
		}
		if err != nil {
			return errors.Is(err, io.EOF)
		}
	}
}

// blankSector reports whether some part of b that fills the file's sector, or what b has of it, is all zeros.
func blankSector(b []byte, at int64) bool {
	for len(b) > 0 {
		n := min(int64(len(b)), sector-at%sector)
		blank := true
		for _, c := range b[:n] {
			blank = blank && c == 0
		}
		if blank {
			return true
		}
		b, at = b[n:], at+n
	}
	return false
}

// replay applies the proposals of one record to the tail.
func (l *Local[S]) replay(payload []byte, at int64) (int, error) {
	const op = "ledger.replay"
	n := 0
	for ; len(payload) > 0; n++ {
		if len(payload) < 4 || uint64(len(payload)-4) < uint64(binary.BigEndian.Uint32(payload)) {
			return n, fault.New(op, fault.Invalid, "the record at byte %d holds a change that is cut off", at)
		}
		size := binary.BigEndian.Uint32(payload)
		next, _, err := l.book.try(l.tail, l.tail.index+1, payload[4:4+size])
		if err != nil {
			return n, fault.Because(err, op, fault.Internal, "the record at byte %d: %s", at, fault.Text(err))
		}
		l.tail, payload = next, payload[4+size:]
	}
	return n, nil
}

// Propose implements [Proposer]. A proposal that can't be applied is refused and not written, and so is, with [fault.Busy],
// one whose answer is more than the book may remember. One whose write failed is refused with [fault.Unavailable], or with
// [fault.Unsure] if what was written can't be taken back now. A ctx that has ended keeps a proposal out; one that is in is
// waited for.
func (l *Local[S]) Propose(ctx context.Context, data []byte) ([]byte, error) {
	const op = "ledger.Propose"
	if err := ctx.Err(); err != nil {
		return nil, fault.At(op, fault.Unavailable, err)
	}
	l.mu.Lock()
	for len(l.next.data) > 0 && len(l.next.data)+4+len(data) > maxBatch {
		full := l.next
		l.mu.Unlock()
		_ = l.flush(full) // its own callers are told; this proposal goes into the next batch
		l.mu.Lock()
	}
	next, ans, err := l.book.try(l.tail, l.tail.index+1, data)
	if err == nil {
		err = l.book.limit.allows(l.tail.log.Size(), next.log.Size(), next.old.Len(), next.held)
	}
	if err != nil {
		l.mu.Unlock()
		return nil, fault.At(op, "", err)
	}
	mine := l.next
	mine.data = append(binary.BigEndian.AppendUint32(mine.data, uint32(len(data))), data...)
	mine.tail, l.tail = next, next
	l.mu.Unlock()
	if err := l.flush(mine); err != nil {
		return nil, err
	}
	return ans, nil
}

// flush returns once the batch is on disk and published, or was given up: by this caller, or by one that was faster.
func (l *Local[S]) flush(b *batch[S]) error {
	const op = "ledger.flush"
	l.disk.Lock()
	defer l.disk.Unlock()
	if b.done {
		return b.err
	}
	l.mu.Lock()
	l.next = &batch[S]{} // b was the one in its place, or it would be done
	l.mu.Unlock()
	err := l.write(b.data)
	b.done = true
	if err == nil {
		l.book.publish(b.tail, b.tail)
		l.mu.Lock()
		l.bad = nil
		l.mu.Unlock()
		return nil
	}
	none := fault.Because(err, op, fault.Unavailable, "the book takes no changes: %s; it goes on by itself, and this change did not happen",
		fault.Disk(err))
	if b.err = none; l.torn {
		b.err = fault.Because(err, op, fault.Unsure, "the book takes no changes: %s; whether this change is on the disk is not known: "+
			"ask again with the same request id", fault.Disk(err))
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.bad = none
	if len(l.next.data) > 0 { // they were computed on top of what did not happen
		l.next.done, l.next.err = true, none
		l.next = &batch[S]{}
	}
	l.tail = l.book.now.Load()
	return b.err
}

// write appends one record and syncs it. What a failed write left is cut off again; if that fails too, torn says so.
func (l *Local[S]) write(payload []byte) error {
	if l.torn {
		if err := l.trim(); err != nil {
			return err
		}
	}
	record := make([]byte, headBytes, headBytes+len(payload))
	binary.BigEndian.PutUint32(record, uint32(len(payload)))
	binary.BigEndian.PutUint32(record[4:], crc32.Checksum(record[:4], castagnoli))
	binary.BigEndian.PutUint32(record[8:], crc32.Checksum(payload, castagnoli))
	if err := l.put(append(record, payload...)); err != nil {
		return err
	}
	l.end += headBytes + int64(len(payload))
	return nil
}

// put writes and syncs bytes after end, or cuts them off.
func (l *Local[S]) put(b []byte) error {
	_, err := l.file.Write(b)
	if err == nil {
		err = l.file.Sync()
	}
	if err != nil {
		l.torn = true
		_ = l.trim() // torn says whether it worked, and the next write tries it again
	}
	return err
}

// trim cuts off what lies after end. Nobody was told that it happened.
func (l *Local[S]) trim() error {
	err := l.file.Truncate(l.end)
	if err == nil {
		_, err = l.file.Seek(l.end, io.SeekStart)
	}
	if err == nil {
		err = l.file.Sync()
	}
	l.torn = err != nil
	return err
}

// Failed returns why the last write failed, nil if it did not. It says so until a write succeeds: [Local.Probe] makes one.
func (l *Local[S]) Failed() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.bad
}

// probeBytes is how much space ends a failure: more than a change of state needs.
const probeBytes = 64 << 10

// Probe finds out whether the file of a book that failed takes bytes again: it writes zeros, which a start takes for a
// torn tail, and cuts them off. It returns what Failed does then. It does nothing for a book that has not failed.
func (l *Local[S]) Probe() error {
	l.disk.Lock()
	defer l.disk.Unlock()
	if err := l.Failed(); err == nil {
		return nil
	}
	var err error
	if l.torn {
		err = l.trim()
	}
	if err == nil {
		err = l.put(make([]byte, probeBytes))
	}
	if err == nil {
		l.torn = true
		err = l.trim()
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if err == nil {
		l.bad = nil
	} else {
		l.bad = fault.Because(err, "ledger.Probe", fault.Unavailable, "the book takes no changes: %s; it goes on by itself", fault.Disk(err))
	}
	return l.bad
}
