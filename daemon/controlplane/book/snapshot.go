// SPDX-License-Identifier: Apache-2.0

package book

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"hash"
	"io"
	"time"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/ledger"
	"github.com/demarc-dev/demarc/seal"
)

const snapshotFormat = "demarc-snapshot/1"

const snapshotHead = 4 << 10 // bytes of a line of the head at most

const snapshotSum = len("sha256:") + 2*32 + 1 // bytes of the last line

// MaxSnapshot bounds a snapshot file, in bytes.
const MaxSnapshot = 8 << 30

// SnapshotHead is where and when a snapshot was taken.
type SnapshotHead struct {
	Index       uint64    `json:"index"` // of the last entry of the raft log that it has
	Term        uint64    `json:"term"`
	At          time.Time `json:"at"`
	Node        string    `json:"node"`
	Build       string    `json:"build"`
	TrustDomain string    `json:"trust_domain"`
}

// WriteSnapshot writes a book in its current state as a file.
func WriteSnapshot(w io.Writer, h SnapshotHead, stored io.WriterTo) error {
	const op = "controlplane.WriteSnapshot"
	sum := sha256.New()
	out := io.MultiWriter(w, sum)
	head, err := json.Marshal(h)
	if err != nil {
		return fault.At(op, fault.Internal, err)
	}
	if _, err := io.WriteString(out, snapshotFormat+"\n"+string(head)+"\n"); err != nil {
		return fault.At(op, "", err)
	}
	if _, err := stored.WriteTo(out); err != nil {
		return fault.At(op, "", err)
	}
	_, err = io.WriteString(w, "sha256:"+hex.EncodeToString(sum.Sum(nil))+"\n")
	return fault.At(op, "", err)
}

// ReadSnapshot reads a file of size bytes and verifies all of it: both sums, each line, and that the audit log has the root that it
// claims. It returns the head and the book.
func ReadSnapshot(r io.Reader, size int64) (SnapshotHead, *ledger.Book[State], error) {
	const op = "controlplane.ReadSnapshot"
	var h SnapshotHead
	if size < int64(snapshotSum) || size > MaxSnapshot {
		return h, nil, fault.New(op, fault.Invalid, "a file of %d bytes is not a snapshot", size)
	}
	in := &hashed{r: bufio.NewReaderSize(io.LimitReader(r, size-int64(snapshotSum)), 64<<10), sum: sha256.New()}
	first, err := in.line()
	if err != nil || first != snapshotFormat {
		return h, nil, fault.Because(err, op, fault.Invalid, "line 1: not a snapshot of the format %s", snapshotFormat)
	}
	head, err := in.line()
	if err != nil {
		return h, nil, fault.At(op, fault.Invalid, err)
	}
	if err := seal.StrictJSON([]byte(head), &h); err != nil {
		return h, nil, fault.Because(err, op, fault.Invalid, "line 2: %s", fault.Text(err))
	}
	stored := NewBook()
	if err := stored.Restore(in); err != nil {
		return h, nil, err
	}
	last := make([]byte, snapshotSum)
	if _, err := io.ReadFull(r, last); err != nil {
		return h, nil, fault.Because(err, op, fault.Invalid, "the snapshot is cut off")
	}
	if want := "sha256:" + hex.EncodeToString(in.sum.Sum(nil)) + "\n"; string(last) != want {
		return h, nil, fault.New(op, fault.Invalid, "the snapshot was changed after it was written: its SHA-256 differs")
	}
	if st := stored.View(); st.TrustDomain != h.TrustDomain || stored.Index() > h.Index {
		return h, nil, fault.New(op, fault.Invalid, "line 2: the head is not that of this book")
	}
	return h, stored, nil
}

// hashed reads, and hashes what was read.
type hashed struct {
	r   *bufio.Reader
	sum hash.Hash
}

// Read implements io.Reader.
func (h *hashed) Read(b []byte) (int, error) {
	n, err := h.r.Read(b)
	h.sum.Write(b[:n])
	return n, err
}

func (h *hashed) line() (string, error) {
	b, err := h.r.ReadSlice('\n')
	if err != nil || len(b) > snapshotHead {
		return "", fault.Because(err, "controlplane.line", fault.Invalid, "the head of the snapshot is cut off, or too long")
	}
	h.sum.Write(b)
	return string(bytes.TrimSuffix(b, []byte{'\n'})), nil
}
