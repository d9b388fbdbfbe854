// SPDX-License-Identifier: Apache-2.0

package ledger_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/demarc-dev/demarc/audit"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/ledger"
)

// toy is a book of accounts that no change may overdraw.
type toy struct {
	Sum  int       `json:"sum"`
	Last time.Time `json:"last,omitzero"`
}

type add struct {
	N int `json:"n"`
}

func (add) Kind() string { return "add/1" }
func (c add) Apply(s *toy, m ledger.Meta) (int, error) {
	s.Sum += c.N // on purpose before the check: a refused change must leave no trace
	s.Last = m.At
	if s.Sum < 0 {
		return 0, fault.New("add", fault.Denied, "the sum would be %d", s.Sum)
	}
	return s.Sum, nil
}

type whisper struct {
	Secret string `json:"secret"`
}

func (whisper) Kind() string  { return "whisper/1" }
func (whisper) Private() bool { return true }
func (c whisper) Apply(s *toy, _ ledger.Meta) (struct{}, error) {
	if s.Sum < 0 || c.Secret == "" || c.Secret[0] == '!' {
		return struct{}{}, fault.New("whisper", fault.Denied, "too loud")
	}
	return struct{}{}, nil
}

type explode struct{}

func (explode) Kind() string                              { return "explode/1" }
func (explode) Apply(*toy, ledger.Meta) (struct{}, error) { panic("boom") }

func newToy() *ledger.Book[toy] {
	return ledger.NewBook(toy{}, ledger.Learn[add](), ledger.Learn[whisper](), ledger.Learn[explode]())
}

var start = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

func meta(by, id string, at time.Duration) ledger.Meta {
	return ledger.Meta{At: start.Add(at), By: fleet.Principal(by), Request: fleet.RequestID(id)}
}

func encoded[R any](t testing.TB, m ledger.Meta, c ledger.Change[toy, R]) []byte {
	t.Helper()
	b, err := ledger.Encode(m, c)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// direct proposes straight to a book.
type direct struct {
	book  *ledger.Book[toy]
	index uint64
}

func (d *direct) Propose(_ context.Context, data []byte) ([]byte, error) {
	if err := d.book.DryRun(data); err != nil {
		return nil, err
	}
	d.index++
	return d.book.Apply(d.index, data)
}

func openFile(t testing.TB, path string) *os.File {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

func bookPath(t testing.TB) string { return filepath.Join(t.TempDir(), "book") }

func openLocal(t testing.TB, path string) (*ledger.Local[toy], *ledger.Book[toy], ledger.Recovered) {
	t.Helper()
	b := newToy()
	l, rec, err := ledger.OpenLocal(openFile(t, path), b)
	if err != nil {
		t.Fatal(err)
	}
	return l, b, rec
}

func rootOf(b *ledger.Book[toy]) string {
	r := b.Log().Root()
	return fmt.Sprintf("%x of %d", r, b.Log().Size())
}

func leaf(t testing.TB, b *ledger.Book[toy], i int64) audit.Entry {
	t.Helper()
	e, err := audit.ParseEntry(b.Log().Entry(i))
	if err != nil {
		t.Fatal(err)
	}
	return e
}

func wantFault(t testing.TB, err error, k fault.Kind) {
	t.Helper()
	if !errors.Is(err, k) {
		t.Fatalf("error %v, want kind %s", err, k)
	}
}

// flaky fails when told to.
// flaky is a disk that can fail. The switches may be turned while it is in use.
type flaky struct {
	*os.File
	failWrite, failSync, failTruncate atomic.Bool
	syncs                             int
}

func (f *flaky) Write(b []byte) (int, error) {
	if f.failWrite.Load() {
		n, _ := f.File.Write(b[:len(b)/2])
		return n, &fs.PathError{Op: "write", Path: f.Name(), Err: syscall.ENOSPC}
	}
	return f.File.Write(b)
}

func (f *flaky) Truncate(size int64) error {
	if f.failTruncate.Load() {
		return syscall.EIO
	}
	return f.File.Truncate(size)
}

func (f *flaky) Sync() error {
	f.syncs++
	if f.failSync.Load() {
		return errors.New("the disk says no")
	}
	return f.File.Sync()
}

func pretty(v any) string {
	b, _ := json.Marshal(v)
	return string(b)
}
