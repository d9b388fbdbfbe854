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
type Local[S any] struct {
	book *Book[S]
	file File

	mu     sync.Mutex // guards what follows
	tail   *page[S]   // the page after everything that waits
	batch  []byte
	made   uint64 // proposals that were taken
	broken error

	disk sync.Mutex // held while writing; taken before mu
	done uint64     // proposals that are synced and published; guarded by disk
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
	l := &Local[S]{book: book, file: file, tail: book.now.Load()}
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
			return nil, rec, fault.At(op, fault.Unavailable, err)
		}
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
			return nil, rec, fault.At(op, fault.Unavailable, err)
		}
	}
	if _, err := file.Seek(end, io.SeekStart); err != nil {
		return nil, rec, fault.At(op, fault.Unavailable, err)
	}
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
		return nil, fault.New(op, fault.Invalid, "the record at byte %d is damaged in its length: restore the file from a copy, or ask demarc verify what the evidence still proves", at)
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
		return nil, fault.New(op, fault.Invalid, "the record at byte %d is damaged: restore the file from a copy, or ask demarc verify what the evidence still proves", at)
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
// one whose answer is more than the book may remember. After a failed write or
// sync nothing more is taken: what the disk holds is only known by opening it again. A ctx that has ended keeps a
// proposal out; one that is in is waited for.
func (l *Local[S]) Propose(ctx context.Context, data []byte) ([]byte, error) {
	const op = "ledger.Propose"
	if err := ctx.Err(); err != nil {
		return nil, fault.At(op, fault.Unavailable, err)
	}
	l.mu.Lock()
	for len(l.batch) > 0 && len(l.batch)+4+len(data) > maxBatch {
		mine := l.made
		l.mu.Unlock()
		if err := l.flush(mine); err != nil {
			return nil, err
		}
		l.mu.Lock()
	}
	if l.broken != nil {
		defer l.mu.Unlock()
		return nil, l.broken
	}
	next, ans, err := l.book.try(l.tail, l.tail.index+1, data)
	if err == nil {
		err = l.book.limit.allows(l.tail.log.Size(), next.log.Size(), next.old.Len(), next.held)
	}
	if err != nil {
		l.mu.Unlock()
		return nil, fault.At(op, "", err)
	}
	l.tail = next
	l.batch = binary.BigEndian.AppendUint32(l.batch, uint32(len(data)))
	l.batch = append(l.batch, data...)
	l.made++
	mine := l.made
	l.mu.Unlock()
	if err := l.flush(mine); err != nil {
		return nil, err
	}
	return ans, nil
}

// flush returns once proposal mine is on disk and published: written here, or by a caller that was faster.
func (l *Local[S]) flush(mine uint64) error {
	const op = "ledger.flush"
	l.disk.Lock()
	defer l.disk.Unlock()
	if l.done >= mine {
		return nil
	}
	l.mu.Lock()
	batch, tail, made, broken := l.batch, l.tail, l.made, l.broken
	l.batch = nil
	l.mu.Unlock()
	if broken != nil {
		return fault.Because(broken, op, fault.Unsure, "the book's file failed while this change was being written: restart, and propose it again with the same request id")
	}
	record := make([]byte, headBytes, headBytes+len(batch))
	binary.BigEndian.PutUint32(record, uint32(len(batch)))
	binary.BigEndian.PutUint32(record[4:], crc32.Checksum(record[:4], castagnoli))
	binary.BigEndian.PutUint32(record[8:], crc32.Checksum(batch, castagnoli))
	_, err := l.file.Write(append(record, batch...))
	if err == nil {
		err = l.file.Sync()
	}
	if err != nil {
		l.mu.Lock()
		l.broken = fault.Because(err, op, fault.Unavailable, "the book's file can't be written: nothing more is taken until the process is started again")
		l.mu.Unlock()
		return fault.Because(err, op, fault.Unsure, "the book's file failed while this change was being written: restart, and propose it again with the same request id")
	}
	l.done = made
	l.book.publish(tail, tail)
	return nil
}

// Failed tells why the book takes no more changes, nil while it does.
func (l *Local[S]) Failed() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.broken
}
