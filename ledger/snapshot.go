// SPDX-License-Identifier: Apache-2.0

package ledger

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"time"

	"github.com/benbjohnson/immutable"

	"github.com/demarc-dev/demarc/audit"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/seal"
)

// A snapshot is lines: the name of the format, a header, the state, each remembered answer, each leaf of the audit log,
// and the SHA-256 of everything before the last line.
//
//	demarc-ledger/1
//	{"index":7,"at":"...","size":2,"root":"<hex>","remembered":1}
//	{...state...}
//	{"at":"...","key":"...","sum":"...","answer":"..."}
//	{"v":1,...}
//	{"v":1,...}
//	sha256:<hex>
const (
	snapshotVersion = "demarc-ledger/1"
	maxState        = 1 << 30 // bytes of the state's line
	maxHeader       = 4 << 10
	maxRemembered   = 2*MaxChange + maxHeader
)

type header struct {
	Index      uint64    `json:"index"`
	At         time.Time `json:"at"`
	Size       int64     `json:"size"` // of the audit log
	Root       string    `json:"root"` // hex
	Remembered int       `json:"remembered"`
}

// Snapshot takes the present page. What it returns may be written by another goroutine while the book goes on.
func (b *Book[S]) Snapshot() (io.WriterTo, error) { return snapshot[S]{b.now.Load()}, nil }

type snapshot[S any] struct{ p *page[S] }

// WriteTo writes the snapshot.
func (s snapshot[S]) WriteTo(w io.Writer) (int64, error) {
	const op = "ledger.Snapshot"
	sum := sha256.New()
	out := &counted{w: bufio.NewWriterSize(w, 1<<20), sum: sum}
	root := s.p.log.Root()
	out.line([]byte(snapshotVersion))
	out.json(header{s.p.index, s.p.at, s.p.log.Size(), hex.EncodeToString(root[:]), s.p.old.Len()})
	out.state(s.p.state)
	for it := s.p.old.Iterator(); !it.Done(); {
		_, key := it.Next()
		r, _ := s.p.seen.Get(key)
		out.json(r)
	}
	const batch = 1024
	for i := int64(0); i < s.p.log.Size(); i += batch {
		leaves, err := s.p.log.Entries(i, min(i+batch, s.p.log.Size()))
		if err != nil {
			return out.n, fault.At(op, fault.Internal, err)
		}
		for _, l := range leaves {
			out.line(l)
		}
	}
	out.line([]byte("sha256:" + hex.EncodeToString(sum.Sum(nil))))
	if out.err == nil {
		out.err = out.w.Flush()
	}
	return out.n, fault.At(op, "", out.err)
}

// counted writes lines, counts and hashes them, and keeps the first error.
type counted struct {
	w   *bufio.Writer
	sum hash.Hash
	n   int64
	err error
}

func (c *counted) line(b []byte) {
	if c.err != nil {
		return
	}
	c.sum.Write(b)
	c.sum.Write([]byte{'\n'})
	if _, c.err = c.w.Write(b); c.err == nil {
		c.err = c.w.WriteByte('\n')
	}
	c.n += int64(len(b)) + 1
}

func (c *counted) json(v any) {
	if c.err != nil {
		return
	}
	b, err := json.Marshal(v)
	if err != nil {
		c.err = err
		return
	}
	c.line(b)
}

// state spells the state. What it says of itself is not read and copied again by encoding/json: it can be 100 MB.
func (c *counted) state(v any) {
	m, ok := v.(json.Marshaler)
	if !ok || c.err != nil {
		c.json(v)
		return
	}
	b, err := m.MarshalJSON()
	if err == nil && bytes.IndexByte(b, '\n') >= 0 {
		err = fault.New("ledger.Snapshot", fault.Internal, "the state has more than one line")
	}
	if err != nil {
		c.err = err
		return
	}
	c.line(b)
}

// Restore replaces the book's page by that of a snapshot, or leaves it untouched: nothing is taken over before the last
// line was verified.
func (b *Book[S]) Restore(r io.Reader) error {
	const op = "ledger.Restore"
	in := &lines{r: bufio.NewReaderSize(r, 64<<10), sum: sha256.New()}
	if v, err := in.next(maxHeader); err != nil {
		return fault.At(op, fault.Invalid, err)
	} else if string(v) != snapshotVersion {
		return fault.New(op, fault.Invalid, "line 1: not a snapshot of the format %s", snapshotVersion)
	}
	var h header
	if err := in.json(&h, maxHeader); err != nil {
		return fault.At(op, fault.Invalid, err)
	}
	if h.Size < 0 || h.Remembered < 0 {
		return fault.New(op, fault.Invalid, "line 2: a negative count")
	}
	p := &page[S]{index: h.Index, at: h.At, seen: immutable.NewMap[string, remembered](nil), old: immutable.NewList[string]()}
	if err := in.state(&p.state); err != nil {
		return fault.At(op, fault.Invalid, err)
	}
	for range h.Remembered {
		var m remembered
		if err := in.json(&m, maxRemembered); err != nil {
			return fault.At(op, fault.Invalid, err)
		}
		p.seen, p.old, p.held = p.seen.Set(m.Key, m), p.old.Append(m.Key), p.held+m.bytes()
	}
	if p.seen.Len() != p.old.Len() {
		return fault.New(op, fault.Invalid, "an answer is remembered twice")
	}
	for range h.Size {
		leaf, err := in.next(audit.MaxLeaf + 1<<10)
		if err != nil {
			return fault.At(op, fault.Invalid, err)
		}
		p.log = p.log.AppendLeaf(leaf)
	}
	want := "sha256:" + hex.EncodeToString(in.sum.Sum(nil))
	if last, err := in.next(maxHeader); err != nil {
		return fault.At(op, fault.Invalid, err)
	} else if string(last) != want {
		return fault.New(op, fault.Invalid, "line %d: the snapshot was changed after it was written: its SHA-256 differs", in.n)
	}
	if _, err := in.r.ReadByte(); err != io.EOF {
		return fault.New(op, fault.Invalid, "line %d: bytes after the end of the snapshot", in.n+1)
	}
	if root := p.log.Root(); hex.EncodeToString(root[:]) != h.Root {
		return fault.New(op, fault.Invalid, "the audit log's root is not that of the header")
	}
	b.publish(p, p)
	return nil
}

// lines reads bounded lines and hashes them.
type lines struct {
	r   *bufio.Reader
	sum hash.Hash
	n   int
}

func (l *lines) next(limit int) ([]byte, error) {
	l.n++
	var out []byte
	for {
		part, err := l.r.ReadSlice('\n')
		out = append(out, part...)
		if len(out) > limit {
			return nil, fault.New("ledger.line", fault.Invalid, "line %d is longer than %d bytes", l.n, limit)
		}
		if errors.Is(err, bufio.ErrBufferFull) {
			continue
		}
		if err != nil {
			return nil, fault.Because(err, "ledger.line", fault.Invalid, "line %d: the snapshot is cut off", l.n)
		}
		break
	}
	l.sum.Write(out)
	return bytes.TrimSuffix(out, []byte{'\n'}), nil
}

// state reads the state. One that reads itself must do so strictly, and is not read twice.
func (l *lines) state(v any) error {
	u, ok := v.(json.Unmarshaler)
	if !ok {
		return l.json(v, maxState)
	}
	b, err := l.next(maxState)
	if err == nil {
		err = u.UnmarshalJSON(b)
	}
	if err != nil {
		return fmt.Errorf("line %d: %w", l.n, err)
	}
	return nil
}

func (l *lines) json(v any, limit int) error {
	b, err := l.next(limit)
	if err != nil {
		return err
	}
	if err := seal.StrictJSON(b, v); err != nil {
		return fmt.Errorf("line %d: %w", l.n, err)
	}
	return nil
}
