// SPDX-License-Identifier: Apache-2.0

package ledger_test

import (
	"bytes"
	"fmt"
	"testing"

	"pgregory.net/rapid"

	"github.com/demarc-dev/demarc/ledger"
)

// Whatever was rehearsed, in whatever order, and of whatever the log then brings: the book has the answers, the state and
// the root of one that rehearsed nothing.
func TestWhatIsTakenOverIsWhatIsApplied(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var pool [][]byte
		for i := range rapid.IntRange(1, 12).Draw(t, "proposals") {
			// Few request ids, so that some are repeated with the same and with another body.
			m := meta("ann", fmt.Sprint(rapid.IntRange(0, 5).Draw(t, "request")), 0)
			data, err := ledger.Encode(m, add{rapid.IntRange(-3, 3).Draw(t, "n")})
			if err != nil {
				t.Fatal(i, err)
			}
			pool = append(pool, data)
		}
		book, plain := newToy(), newToy()
		var log, waiting [][]byte // waiting: rehearsed, and in the order in which a leader would propose
		index := uint64(0)
		apply := func(data []byte) {
			index++
			got, err := book.Apply(index, data)
			want, err2 := plain.Apply(index, data)
			if err != nil || err2 != nil || string(got) != string(want) {
				t.Fatalf("entry %d: %s %v, without rehearsals %s %v", index, got, err, want, err2)
			}
			if book.View() != plain.View() || rootOf(book) != rootOf(plain) || book.Index() != plain.Index() {
				t.Fatalf("entry %d: %+v %s, without rehearsals %+v %s", index, book.View(), rootOf(book), plain.View(), rootOf(plain))
			}
			log = append(log, data)
		}
		var saved []byte
		for range rapid.IntRange(1, 40).Draw(t, "steps") {
			data := rapid.SampledFrom(pool).Draw(t, "data")
			switch rapid.IntRange(0, 6).Draw(t, "act") {
			case 0, 1:
				if err := book.DryRun(data); err != nil {
					t.Fatal(err)
				}
				waiting = append(waiting, data)
			case 2: // the log brings what was rehearsed
				if len(waiting) > 0 {
					apply(waiting[0])
					waiting = waiting[1:]
				}
			case 3: // the log of another leader
				apply(data)
				if rapid.Bool().Draw(t, "forget") {
					waiting = nil
				}
			case 5:
				snap, err := plain.Snapshot()
				var file bytes.Buffer
				if _, err2 := snap.WriteTo(&file); err != nil || err2 != nil {
					t.Fatal(err, err2)
				}
				saved = file.Bytes()
			case 6: // what was rehearsed follows no page of the snapshot
				if saved == nil {
					continue
				}
				if err, err2 := book.Restore(bytes.NewReader(saved)), plain.Restore(bytes.NewReader(saved)); err != nil || err2 != nil {
					t.Fatal(err, err2)
				}
			case 4: // one that was rehearsed never gets into the log
				if len(waiting) > 0 {
					waiting = waiting[1:]
				}
			}
		}
	})
}

// What is rehearsed in the order of the log is computed once, the refused and the repeated ones too.
func TestRehearsedOnce(t *testing.T) {
	ran := 0
	book := ledger.NewBook(counted{}, ledger.Learn[count]())
	var log [][]byte
	for i := range 20 {
		data, err := ledger.Encode(meta("ann", fmt.Sprint(i/2), 0), count{i / 2})
		if err != nil {
			t.Fatal(err)
		}
		log = append(log, data)
	}
	counting = &ran
	defer func() { counting = nil }()
	for _, data := range log[:10] {
		if err := book.DryRun(data); err != nil {
			t.Fatal(err)
		}
	}
	for i, data := range log {
		if i+10 < len(log) { // rehearsals go on while others are applied
			if err := book.DryRun(log[i+10]); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := book.Apply(uint64(i+1), data); err != nil {
			t.Fatal(err)
		}
	}
	if ran != 10 {
		t.Fatalf("10 different changes were computed %d times", ran)
	}
	if book.Log().Size() != 10 || book.Index() != 20 {
		t.Fatalf("%d entries at index %d", book.Log().Size(), book.Index())
	}
}

type counted struct{}

// counting is where count counts how often it is applied.
var counting *int

type count struct {
	N int `json:"n"`
}

func (count) Kind() string { return "count/1" }
func (count) Apply(*counted, ledger.Meta) (struct{}, error) {
	if counting != nil {
		*counting++
	}
	return struct{}{}, nil
}

// A reader, a snapshot and rehearsals go on while changes are applied: the race detector watches.
func TestRehearsalsBesideEverything(t *testing.T) {
	book := newToy()
	done := make(chan struct{})
	go func() {
		defer close(done)
		for i := range 300 {
			_ = book.DryRun(encoded(t, meta("bob", fmt.Sprint(i), 0), add{1}))
			_ = book.View()
			_ = rootOf(book)
		}
	}()
	for i := range 300 {
		data := encoded(t, meta("ann", fmt.Sprint(i), 0), add{1})
		if i%3 == 0 {
			if err := book.DryRun(data); err != nil {
				t.Error(err)
			}
		}
		if _, err := book.Apply(uint64(i+1), data); err != nil {
			t.Error(err)
		}
	}
	<-done
	if book.View().Sum != 300 {
		t.Fatalf("sum %d", book.View().Sum)
	}
}
