// SPDX-License-Identifier: Apache-2.0

package wal

import (
	"bytes"
	"encoding/binary"
	"hash/crc32"

	"github.com/demarc-dev/demarc/fault"
)

const (
	recordVersion = 0x02
	recordHead    = 52
	align         = 8
	padding       = 0xE5 // closes a record; see torn
	mask          = 0xA5 // lies over the body; see torn
	sector        = 512
	maxBody       = 1 << 30
)

var (
	castagnoli = crc32.MakeTable(crc32.Castagnoli)
	zeros      [256 << 10]byte
)

// record is the place of an entry and the content of its head.
type record struct {
	off     int64
	kind    byte
	term    uint64
	index   uint64
	at      int64
	batch   int64 // up to where the file was on disk when it was written
	ext     int
	data    int
	bodySum uint32
}

func roundUp(n int64) int64 { return (n + align - 1) / align * align }

// sizeOf is what a body takes with its head and at least 8 bytes of padding.
func sizeOf(ext, data int) int64 { return roundUp(recordHead+int64(ext)+int64(data)) + align }

func (r record) size() int64 { return sizeOf(r.ext, r.data) }

// appendRecord spells an entry behind b. synced is up to where its file is on disk.
func appendRecord(b []byte, e *Entry, synced int64) []byte {
	start := len(b)
	sum := crc32.Update(crc32.Checksum(e.Ext, castagnoli), castagnoli, e.Data)
	b = append(b, recordVersion, e.Type, 0, 0)
	b = binary.BigEndian.AppendUint32(b, uint32(len(e.Ext)))
	b = binary.BigEndian.AppendUint64(b, e.Index)
	b = binary.BigEndian.AppendUint64(b, e.Term)
	b = binary.BigEndian.AppendUint64(b, uint64(e.At))
	b = binary.BigEndian.AppendUint64(b, uint64(synced))
	b = binary.BigEndian.AppendUint32(b, uint32(len(e.Data)))
	b = binary.BigEndian.AppendUint32(b, sum)
	b = binary.BigEndian.AppendUint32(b, crc32.Checksum(b[start:], castagnoli))
	body := len(b)
	b = append(append(b, e.Ext...), e.Data...)
	cover(b[body:])
	for end := start + int(sizeOf(len(e.Ext), len(e.Data))); len(b) < end; {
		b = append(b, padding)
	}
	return b
}

// cover lays the mask over a body, or takes it off.
func cover(b []byte) {
	const wide = mask * 0x0101010101010101
	for ; len(b) >= 8; b = b[8:] {
		binary.NativeEndian.PutUint64(b, binary.NativeEndian.Uint64(b)^wide)
	}
	for i := range b {
		b[i] ^= mask
	}
}

// readHead reads the head of the record at off.
func readHead(b []byte, off int64) (record, bool) {
	if len(b) < recordHead || b[0] != recordVersion || b[2] != 0 || b[3] != 0 ||
		crc32.Checksum(b[:48], castagnoli) != binary.BigEndian.Uint32(b[48:]) {
		return record{}, false
	}
	r := record{off: off, kind: b[1], ext: int(binary.BigEndian.Uint32(b[4:])),
		index: binary.BigEndian.Uint64(b[8:]), term: binary.BigEndian.Uint64(b[16:]),
		at: int64(binary.BigEndian.Uint64(b[24:])), batch: int64(binary.BigEndian.Uint64(b[32:])), data: int(binary.BigEndian.Uint32(b[40:])),
		bodySum: binary.BigEndian.Uint32(b[44:])}
	return r, r.ext <= maxBody && r.data <= maxBody && r.batch <= off
}

// body takes the mask off the bytes of a whole record, in place, and checks them.
func (r record) body(b []byte) (ext, data []byte, ok bool) {
	rest := b[recordHead:r.size()]
	n := r.ext + r.data
	for _, p := range rest[n:] {
		if p != padding {
			return nil, nil, false
		}
	}
	body := rest[:n:n]
	cover(body)
	if crc32.Checksum(body, castagnoli) != r.bodySum {
		return nil, nil, false
	}
	return body[:r.ext:r.ext], body[r.ext:], true
}

// torn tells a record that was not written whole from one that was altered. b is what lies at off in a file that was all
// zeros before. A disk writes sectors, each wholly or not at all and in any order: of a record that was not written
// whole, the part in some sector is still zero. Of a whole one no part is: the first holds the version, the last the
// padding or the sum of the head, and between them lies the mask over what is not a sector full of that mask's value.
func torn(b []byte, off int64) bool {
	for len(b) > 0 {
		n := min(int(sector-off%sector), len(b))
		if allZero(b[:n]) {
			return true
		}
		b, off = b[n:], off+int64(n)
	}
	return false
}

func allZero(b []byte) bool {
	for len(b) > 0 {
		n := min(len(b), len(zeros))
		if !bytes.Equal(b[:n], zeros[:n]) {
			return false
		}
		b = b[n:]
	}
	return true
}

func damaged(file, format string, args ...any) error {
	args = append([]any{file}, args...)
	return fault.New("wal", fault.Internal, "the log's file %s is damaged: "+format, args...)
}
