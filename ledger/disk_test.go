// SPDX-License-Identifier: Apache-2.0

package ledger_test

import (
	"context"
	"fmt"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/ledger"
)

// FAULTS.md J1: after one failed write the book took nothing more until the process was started again.
func TestLocalGoesOnAfterADiskError(t *testing.T) {
	for _, row := range []struct {
		name                  string
		write, sync, truncate bool
		told                  fault.Kind // of the change that met the failure
	}{
		{name: "a write that failed half way is taken back", write: true, told: fault.Unavailable},
		{name: "so is one that can't be synced, when it is known that it is gone", sync: true, told: fault.Unsure},
		{name: "nothing is promised while it can't be cut off", write: true, truncate: true, told: fault.Unsure},
		{name: "all at once", write: true, sync: true, truncate: true, told: fault.Unsure},
	} {
		t.Run(row.name, func(t *testing.T) {
			ctx, path := context.Background(), bookPath(t)
			f := &flaky{File: openFile(t, path)}
			b := newToy()
			l, _, err := ledger.OpenLocal(f, b)
			if err != nil {
				t.Fatal(err)
			}
			add1 := func(id string) error {
				_, err := ledger.Submit(ctx, l, meta("ann", id, 0), add{1})
				return err
			}
			if err := add1("1"); err != nil || l.Failed() != nil || l.Probe() != nil {
				t.Fatal(err, l.Failed())
			}
			size := sizeOf(t, path)
			f.failWrite.Store(row.write)
			f.failSync.Store(row.sync)
			f.failTruncate.Store(row.truncate)
			wantFault(t, add1("2"), row.told)
			if b.View().Sum != 1 {
				t.Fatal("a change is seen that the disk may not have")
			}
			if err := l.Failed(); err == nil || row.write && !row.truncate && !strings.Contains(fault.Text(err), "the disk is full") {
				t.Fatalf("the book says %v", err)
			}
			wantFault(t, l.Probe(), fault.Unavailable)
			for i := range 10 {
				if err := add1(fmt.Sprint("still ", i)); err == nil {
					t.Fatal("a change was taken by a disk that fails")
				}
			}
			if row.told == fault.Unavailable && sizeOf(t, path) != size {
				t.Fatalf("what was refused left %d bytes", sizeOf(t, path)-size)
			}
			f.failWrite.Store(false)
			f.failSync.Store(false)
			f.failTruncate.Store(false)
			if err := l.Probe(); err != nil || l.Failed() != nil {
				t.Fatalf("the disk is well again, and the book says %v", err)
			}
			if err := add1("2"); err != nil {
				t.Fatalf("the same request again: %v", err)
			}
			if _, b2, rec := openLocal(t, path); b2.View().Sum != 2 || rec.Cut != 0 || rootOf(b2) != rootOf(b) {
				t.Fatalf("opened again: sum %d, %+v", b2.View().Sum, rec)
			}
		})
	}
}

// FAULTS.md J1: without a probe, too. What was computed on top of a change that did not happen does not happen either, and
// every caller is told what is true, while the disk fails and heals.
func TestLocalTellsEachCallerTheTruth(t *testing.T) {
	ctx, path := context.Background(), bookPath(t)
	f := &flaky{File: openFile(t, path)}
	b := newToy()
	l, _, err := ledger.OpenLocal(f, b)
	if err != nil {
		t.Fatal(err)
	}
	var taken, refused atomic.Int64
	var wg sync.WaitGroup
	for i := range 40 {
		wg.Go(func() {
			for j := range 30 {
				if i == 0 {
					f.failWrite.Store(j%3 == 1)
					f.failSync.Store(j%5 == 1)
				}
				// Until the answer is certain, as a client does: the same request id gives the same answer.
				for _, err := ledger.Submit(ctx, l, meta("ann", fmt.Sprintf("%d/%d", i, j), 0), add{1}); err != nil; {
					refused.Add(1)
					if k := fault.Of(err); k != fault.Unavailable && k != fault.Unsure {
						t.Errorf("%v", err)
						return
					}
					if i == 0 {
						f.failWrite.Store(false)
						f.failSync.Store(false)
					}
					_, err = ledger.Submit(ctx, l, meta("ann", fmt.Sprintf("%d/%d", i, j), 0), add{1})
				}
				taken.Add(1)
			}
		})
	}
	wg.Wait()
	if b.View().Sum != int(taken.Load()) || taken.Load() != 40*30 {
		t.Fatalf("the sum is %d, and %d changes were answered", b.View().Sum, taken.Load())
	}
	if refused.Load() == 0 {
		t.Fatal("the disk never failed: nothing was tested")
	}
	if _, b2, rec := openLocal(t, path); rec.Cut != 0 || rootOf(b2) != rootOf(b) || b2.View().Sum != b.View().Sum {
		t.Fatalf("opened again: sum %d, want %d; %+v", b2.View().Sum, b.View().Sum, rec)
	}
}

// A crash between the zeros of a probe and their removal is a torn tail.
func TestLocalProbeIsATornTail(t *testing.T) {
	path := bookPath(t)
	fill(t, path, 2)
	f := &flaky{File: openFile(t, path)}
	b := newToy()
	l, _, err := ledger.OpenLocal(f, b)
	if err != nil {
		t.Fatal(err)
	}
	f.failWrite.Store(true)
	if _, err := ledger.Submit(context.Background(), l, meta("ann", "x", 0), add{1}); err == nil {
		t.Fatal("taken")
	}
	f.failWrite.Store(false)
	f.failTruncate.Store(true) // the process ends here
	if l.Probe() == nil {
		t.Fatal("the zeros were not cut off, and the book says it is well")
	}
	if _, b2, rec := openLocal(t, path); b2.View().Sum != 2 || rec.Cut == 0 {
		t.Fatalf("sum %d, %+v", b2.View().Sum, rec)
	}
}

func sizeOf(t testing.TB, path string) int64 {
	t.Helper()
	st, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	return st.Size()
}
