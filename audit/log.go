// SPDX-License-Identifier: Apache-2.0

package audit

import (
	"bytes"
	"sync/atomic"

	"golang.org/x/mod/sumdb/tlog"

	"github.com/demarc-dev/demarc/fault"
)

// Log is an append-only Merkle log as a value. The zero Log is empty. A Log never changes: Append gives another that
// shares its past, so older values can be read by any number of goroutines while newer ones are made. Appending twice
// to one value gives two logs that do not disturb each other.
type Log struct {
	leaves vec[[]byte]
	hashes vec[tlog.Hash] // in the order of tlog.StoredHashIndex
}

// Append gives the log with one more entry, in O(log n).
func (l Log) Append(e Entry) Log { return l.AppendLeaf(e.Leaf()) }

// AppendLeaf is Append for a leaf that is encoded already. The log keeps its own copy.
func (l Log) AppendLeaf(leaf []byte) Log {
	more, err := tlog.StoredHashes(l.Size(), leaf, l.reader())
	if err != nil { // the reader answers each index below the size
		return l
	}
	next := Log{leaves: l.leaves.push(bytes.Clone(leaf)), hashes: l.hashes}
	for _, h := range more {
		next.hashes = next.hashes.push(h)
	}
	return next
}

// Size is the number of entries.
func (l Log) Size() int64 { return int64(l.leaves.n) }

// Root is the hash of the whole log.
func (l Log) Root() [32]byte {
	h, err := tlog.TreeHash(l.Size(), l.reader())
	if err != nil {
		return [32]byte{} // not reachable: each index below the size is there
	}
	return h
}

// RootAt is the hash that the log had when it had size entries.
func (l Log) RootAt(size int64) ([32]byte, error) {
	if size < 0 || size > l.Size() {
		return [32]byte{}, fault.New("audit.RootAt", fault.NotFound, "the log has %d entries, not %d", l.Size(), size)
	}
	h, err := tlog.TreeHash(size, l.reader())
	return h, fault.At("audit.RootAt", fault.Internal, err)
}

// Entry gives the leaf at i, nil where there is none. The caller must not change it.
func (l Log) Entry(i int64) []byte {
	if i < 0 || i >= l.Size() {
		return nil
	}
	return l.leaves.at(int(i))
}

// Entries gives the leaves from (included) to to (not included). The caller must not change them.
func (l Log) Entries(from, to int64) ([][]byte, error) {
	if from < 0 || to < from || to > l.Size() {
		return nil, fault.New("audit.Entries", fault.NotFound, "the log has %d entries: %d to %d is not a part of it", l.Size(), from, to)
	}
	out := make([][]byte, 0, to-from)
	for i := from; i < to; i++ {
		out = append(out, l.leaves.at(int(i)))
	}
	return out, nil
}

// Inclusion proves that entry i is in the log of the given size. Included checks it.
func (l Log) Inclusion(i, size int64) ([][32]byte, error) {
	if i < 0 || size <= i || size > l.Size() {
		return nil, fault.New("audit.Inclusion", fault.NotFound, "the log has %d entries: no proof of entry %d in the first %d", l.Size(), i,
			size)
	}
	p, err := tlog.ProveRecord(size, i, l.reader())
	return plain(p), fault.At("audit.Inclusion", fault.Internal, err)
}

// Consistency proves that the log of size to begins with the log of size from. Grown checks it.
func (l Log) Consistency(from, to int64) ([][32]byte, error) {
	if from < 0 || to < from || to > l.Size() {
		return nil, fault.New("audit.Consistency", fault.NotFound, "the log has %d entries: no proof from %d to %d", l.Size(), from, to)
	}
	if from == 0 || from == to {
		return nil, nil
	}
	p, err := tlog.ProveTree(to, from, l.reader())
	return plain(p), fault.At("audit.Consistency", fault.Internal, err)
}

// Included checks a proof that leaf is entry i of the log with the given head.
func Included(leaf []byte, i int64, head Head, proof [][32]byte) error {
	const op = "audit.Included"
	if i < 0 || i >= head.Size || len(proof) > maxProof {
		return fault.New(op, fault.Invalid, "entry %d can't be in a log of %d entries by a proof of %d hashes", i, head.Size, len(proof))
	}
	if err := tlog.CheckRecord(hashes(proof), head.Size, head.Root, i, tlog.RecordHash(leaf)); err != nil {
		return fault.Because(err, op, fault.Conflict, "the proof does not show entry %d in the log of %d entries", i, head.Size)
	}
	return nil
}

// Grown checks a proof that the log with head new begins with the log with head old.
func Grown(old, new Head, proof [][32]byte) error {
	const op = "audit.Grown"
	switch {
	case old.Origin != new.Origin:
		return fault.New(op, fault.Invalid, "heads of two logs: %q and %q", fault.Clip(old.Origin), fault.Clip(new.Origin))
	case old.Size < 0 || new.Size < old.Size || len(proof) > maxProof:
		return fault.New(op, fault.Invalid, "a log of %d entries can't have grown from %d by a proof of %d hashes", new.Size, old.Size,
			len(proof))
	case old.Size == new.Size:
		if old.Root != new.Root {
			return fault.Because(Forked, op, fault.Conflict, "two histories of %d entries: the log %q is forked", new.Size, fault.Clip(new.Origin))
		}
		return nil
	case old.Size == 0:
		if old.Root != (Log{}).Root() {
			return fault.New(op, fault.Invalid, "the root of the empty log %q is wrong", fault.Clip(old.Origin))
		}
		return nil
	}
	if err := tlog.CheckTree(hashes(proof), new.Size, new.Root, old.Size, old.Root); err != nil {
		return fault.Because(err, op, fault.Conflict, "the proof does not show that %d entries grew from the %d before", new.Size, old.Size)
	}
	return nil
}

const maxProof = 128 // hashes: twice the height of the largest tree

func plain(p []tlog.Hash) [][32]byte {
	out := make([][32]byte, len(p))
	for i, h := range p {
		out[i] = h
	}
	return out
}

func hashes(p [][32]byte) []tlog.Hash {
	out := make([]tlog.Hash, len(p))
	for i, h := range p {
		out[i] = h
	}
	return out
}

func (l Log) reader() tlog.HashReader {
	return tlog.HashReaderFunc(func(indexes []int64) ([]tlog.Hash, error) {
		out := make([]tlog.Hash, len(indexes))
		for i, x := range indexes {
			if x < 0 || x >= int64(l.hashes.n) {
				return nil, fault.New("audit.Log", fault.Internal, "no stored hash %d among %d", x, l.hashes.n)
			}
			out[i] = l.hashes.at(int(x))
		}
		return out, nil
	})
}

// vec is a growing array as a value, in blocks. The last block is shared by all values that end in it: whoever first
// claims its next place writes there, and a second claim of the same place copies the block. So appending costs no
// copy in the common case, and one block where a value was appended to before (a rehearsal).
type vec[T any] struct {
	blocks []*block[T]
	n      int
}

const blockSize = 128

type block[T any] struct {
	used  atomic.Int32
	items [blockSize]T
}

func (v vec[T]) at(i int) T { return v.blocks[i/blockSize].items[i%blockSize] }

func (v vec[T]) push(x T) vec[T] {
	off := v.n % blockSize
	if off == 0 { // a full copy of the block list, once in blockSize pushes
		b := &block[T]{}
		b.used.Store(1)
		b.items[0] = x
		return vec[T]{append(v.blocks[:len(v.blocks):len(v.blocks)], b), v.n + 1}
	}
	last := v.blocks[len(v.blocks)-1]
	if last.used.CompareAndSwap(int32(off), int32(off+1)) {
		last.items[off] = x
		return vec[T]{v.blocks, v.n + 1}
	}
	b := &block[T]{}
	copy(b.items[:off], last.items[:off])
	b.items[off] = x
	b.used.Store(int32(off + 1))
	blocks := append([]*block[T](nil), v.blocks...)
	blocks[len(blocks)-1] = b
	return vec[T]{blocks, v.n + 1}
}
