// SPDX-License-Identifier: Apache-2.0

package ledger_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"sync"
	"testing"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/ledger"
)

func fill(t testing.TB, path string, n int) {
	t.Helper()
	l, _, _ := openLocal(t, path)
	for i := range n {
		if _, err := ledger.Submit(context.Background(), l, meta("ann", fmt.Sprint(i), 0), add{1}); err != nil {
			t.Fatal(err)
		}
	}
}

func TestLocalReplays(t *testing.T) {
	path := bookPath(t)
	l, b, rec := openLocal(t, path)
	if rec.Changes != 0 || rec.Cut != 0 {
		t.Fatalf("new file: %+v", rec)
	}
	for i, n := range []int{5, -9, 3} {
		_, err := ledger.Submit(context.Background(), l, meta("ann", fmt.Sprint(i), 0), add{n})
		if n == -9 {
			wantFault(t, err, fault.Denied)
		} else if err != nil {
			t.Fatal(err)
		}
	}
	if _, err := l.Propose(context.Background(), encoded(t, meta("ann", "x", 0), explode{})); err == nil {
		t.Fatal("a panicking change was taken")
	}
	l2, b2, rec := openLocal(t, path)
	if rec.Changes != 3 || rec.Cut != 0 || rootOf(b2) != rootOf(b) || b2.View().Sum != 8 || b2.Index() != 3 {
		t.Fatalf("replayed %+v, %s, want %s", rec, rootOf(b2), rootOf(b))
	}
	got, err := ledger.Submit(context.Background(), l2, meta("ann", "0", 0), add{5})
	if err != nil || got != 5 || b2.Log().Size() != 3 {
		t.Fatalf("an answer was forgotten by a restart: %d, %v", got, err)
	}
}

// A tail that is cut at any byte opens, loses at most the last record, and reports it.
func TestLocalCutsATornTail(t *testing.T) {
	path := bookPath(t)
	fill(t, path, 3)
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	const first = len("demarc-book/1\n")
	record := (len(whole) - first) / 3
	for n := 0; n <= len(whole); n++ {
		if err := os.WriteFile(path, whole[:n], 0o600); err != nil {
			t.Fatal(err)
		}
		l, b, rec := openLocal(t, path)
		want := max(0, n-first) / record
		if b.View().Sum != want {
			t.Fatalf("%d of %d bytes: sum %d, want %d (%+v)", n, len(whole), b.View().Sum, want, rec)
		}
		if _, err := ledger.Submit(context.Background(), l, meta("bob", "after", 0), add{10}); err != nil {
			t.Fatal(err)
		}
		if _, b, rec := openLocal(t, path); b.View().Sum != want+10 || rec.Cut != 0 {
			t.Fatalf("%d bytes: after the cut and one change, sum %d, %+v", n, b.View().Sum, rec)
		}
	}
}

// What is cut off is off the disk before a change is taken: a crash that keeps part of a later write, and the old length of the file,
// would leave the rest of the torn record behind it.
func TestLocalSyncsTheCut(t *testing.T) {
	path := bookPath(t)
	fill(t, path, 3)
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for name, torn := range map[string][]byte{"a torn record": whole[:len(whole)-3],
		"an unwritten tail": append(bytes.Clone(whole), make([]byte, 5000)...), "a torn first line": whole[:5]} {
		disk := &memory{b: bytes.Clone(torn), synced: torn}
		_, rec, err := ledger.OpenLocal(disk, newToy())
		if err != nil || rec.Cut == 0 {
			t.Fatalf("%s: %+v, %v", name, rec, err)
		}
		if !bytes.Equal(disk.synced, disk.b) || bytes.Equal(disk.synced, torn) {
			t.Errorf("%s: %d bytes are on the disk after the cut, %d in the file", name, len(disk.synced), len(disk.b))
		}
	}
}

// Bytes that the disk never wrote are zeros: a file that grew and was not filled is a torn tail too.
func TestLocalCutsAnUnwrittenTail(t *testing.T) {
	path := bookPath(t)
	fill(t, path, 2)
	whole, _ := os.ReadFile(path)
	if err := os.WriteFile(path, append(whole, make([]byte, 5000)...), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, b, rec := openLocal(t, path); b.View().Sum != 2 || rec.Cut != 5000 {
		t.Fatalf("sum %d, %+v", b.View().Sum, rec)
	}
}

// No flipped bit goes unseen, and none is taken for a torn tail.
func TestLocalRefusesDamage(t *testing.T) {
	path := bookPath(t)
	fill(t, path, 3)
	whole, _ := os.ReadFile(path)
	for i := range whole {
		damaged := bytes.Clone(whole)
		damaged[i] ^= 0x10
		if err := os.WriteFile(path, damaged, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, _, err := ledger.OpenLocal(openFile(t, path), newToy()); err == nil {
			t.Fatalf("byte %d is flipped, and the file opens", i)
		}
		if after, _ := os.ReadFile(path); !bytes.Equal(after, damaged) {
			t.Fatalf("byte %d: a damaged file was written to", i)
		}
	}
}

func TestLocalLeavesForeignFilesAlone(t *testing.T) {
	for _, content := range []string{"hello", "hello, this is a longer file of someone else", "demarc-book/2\n"} {
		path := bookPath(t)
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		_, _, err := ledger.OpenLocal(openFile(t, path), newToy())
		wantFault(t, err, fault.Invalid)
		if after, _ := os.ReadFile(path); string(after) != content {
			t.Fatalf("the file is now %q", after)
		}
	}
}

func TestLocalSharesSyncs(t *testing.T) {
	f := &flaky{File: openFile(t, bookPath(t))}
	b := newToy()
	l, _, err := ledger.OpenLocal(f, b)
	if err != nil {
		t.Fatal(err)
	}
	const n = 200
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() {
			if _, err := ledger.Submit(context.Background(), l, meta("ann", fmt.Sprint(i), 0), add{1}); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if b.View().Sum != n || b.Log().Size() != n {
		t.Fatalf("sum %d, %d leaves", b.View().Sum, b.Log().Size())
	}
	if f.syncs > n {
		t.Fatalf("%d syncs for %d changes", f.syncs, n)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := l.Propose(ctx, encoded(t, meta("ann", "late", 0), add{1})); err == nil {
		t.Fatal("a caller that had gone was served")
	}
}

// FuzzOpenLocal opens what may lie on a disk. Half of the inputs get checksums that are right, else the changes behind them are never
// read. What is refused is not written to; what opens takes a change, and opens again with all of it.
func FuzzOpenLocal(f *testing.F) {
	var disk memory
	l, _, err := ledger.OpenLocal(&disk, newToy())
	if err != nil {
		f.Fatal(err)
	}
	for i := range 2 {
		if _, err := ledger.Submit(context.Background(), l, meta("ann", fmt.Sprint(i), 0), add{1}); err != nil {
			f.Fatal(err)
		}
	}
	f.Add(disk.b, false)
	f.Add(disk.b, true)
	f.Add(disk.b[:len(disk.b)-3], false)
	f.Add(append(bytes.Clone(disk.b), make([]byte, 600)...), false)
	f.Fuzz(func(t *testing.T, data []byte, mend bool) {
		if mend {
			data = mended(data)
		}
		disk := memory{b: bytes.Clone(data)}
		b := newToy()
		l, rec, err := ledger.OpenLocal(&disk, b)
		if err != nil {
			if !bytes.Equal(disk.b, data) {
				t.Fatalf("refused with %v, and written to", err)
			}
			return
		}
		if b.Log().Size() != int64(rec.Changes) || rec.Cut < 0 || rec.Cut > int64(len(data)) {
			t.Fatalf("%+v, and %d entries in the log", rec, b.Log().Size())
		}
		if kept := len(data) - int(rec.Cut); kept > 0 && !bytes.Equal(disk.b, data[:kept]) {
			t.Fatalf("%d bytes are whole, and they are others on the disk", kept)
		}
		if _, err := ledger.Submit(context.Background(), l, meta("zoe", "fuzz", 0), add{1 << 20}); err != nil {
			return
		}
		again := newToy()
		if _, rec, err := ledger.OpenLocal(&disk, again); err != nil || rec.Cut != 0 || pretty(again.View()) != pretty(b.View()) ||
			rootOf(again) != rootOf(b) {
			t.Fatalf("what was written is read as %s of %s with %+v, %v: want %s of %s", pretty(again.View()), rootOf(again), rec, err,
				pretty(b.View()), rootOf(b))
		}
	})
}

// mended writes the right checksums over those of a book's records, as far as their lengths lead.
func mended(data []byte) []byte {
	data = bytes.Clone(data)
	table := crc32.MakeTable(crc32.Castagnoli)
	for b := data[min(len(data), len("demarc-book/1\n")):]; len(b) >= 12; {
		n := uint64(binary.BigEndian.Uint32(b))
		binary.BigEndian.PutUint32(b[4:], crc32.Checksum(b[:4], table))
		if uint64(len(b)-12) < n {
			break
		}
		binary.BigEndian.PutUint32(b[8:], crc32.Checksum(b[12:12+n], table))
		b = b[12+n:]
	}
	return data
}

// memory is a file, and what a loss of power leaves of it.
type memory struct {
	b      []byte
	at     int
	synced []byte
}

func (m *memory) Read(b []byte) (int, error) {
	if m.at >= len(m.b) {
		return 0, io.EOF
	}
	n := copy(b, m.b[m.at:])
	m.at += n
	return n, nil
}

func (m *memory) Write(b []byte) (int, error) {
	m.b = append(m.b[:m.at], b...) // a book writes at its end alone
	m.at = len(m.b)
	return len(b), nil
}

func (m *memory) Seek(offset int64, whence int) (int64, error) {
	m.at = int(offset) + map[int]int{io.SeekStart: 0, io.SeekCurrent: m.at, io.SeekEnd: len(m.b)}[whence]
	return int64(m.at), nil
}

func (m *memory) Truncate(size int64) error {
	m.b = m.b[:size]
	return nil
}

func (m *memory) Sync() error {
	m.synced = bytes.Clone(m.b)
	return nil
}
