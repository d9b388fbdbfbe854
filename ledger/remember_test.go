// SPDX-License-Identifier: Apache-2.0

package ledger_test

import (
	"bytes"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/ledger"
)

func (d *direct) ask(t testing.TB, id string, at time.Duration) error {
	t.Helper()
	_, err := ledger.Submit(t.Context(), d, meta("ann", id, at), add{1})
	return err
}

// What is remembered has a bound, and none of it is forgotten early: new changes are kept out, and repeated ones answered.
func TestWhatIsRememberedIsBounded(t *testing.T) {
	for name, tc := range map[string]struct {
		count int
		bytes int64
	}{
		"by count": {4, 1 << 30},
		"by bytes": {1 << 30, 4 * 340}, // an answer of these is counted as 256 + 32 + 5 + 32 bytes
	} {
		t.Run(name, func(t *testing.T) {
			d := &direct{book: newToy()}
			d.book.Limit(tc.count, tc.bytes)
			for i := range 4 {
				if err := d.ask(t, fmt.Sprint(i), time.Duration(i)*time.Minute); err != nil {
					t.Fatalf("change %d: %v", i, err)
				}
			}
			for _, at := range []time.Duration{3 * time.Minute, ledger.Remember - 1} {
				wantFault(t, d.ask(t, "more", at), fault.Busy)
			}
			if d.book.View().Sum != 4 || d.book.Log().Size() != 4 || d.index != 4 {
				t.Fatalf("what was told busy is in the log: %+v, %d leaves, %d entries", d.book.View(), d.book.Log().Size(), d.index)
			}
			for i := range 4 {
				if err := d.ask(t, fmt.Sprint(i), ledger.Remember-1); err != nil || d.book.View().Sum != 4 {
					t.Fatalf("request %d again: %v, sum %d", i, err, d.book.View().Sum)
				}
			}
			if err := d.ask(t, "more", ledger.Remember); err != nil { // the first is forgotten now, and no other
				t.Fatal(err)
			}
			wantFault(t, d.ask(t, "still more", ledger.Remember), fault.Busy)
			if err := d.ask(t, "1", ledger.Remember); err != nil || d.book.View().Sum != 5 {
				t.Fatalf("%v, sum %d", err, d.book.View().Sum)
			}
			if n, _ := d.book.Remembered(); n != 4 {
				t.Fatalf("%d answers are remembered, want 4", n)
			}
		})
	}
}

// The book of one copy has the bound too.
func TestTheLocalBookIsBounded(t *testing.T) {
	l, b, _ := openLocal(t, bookPath(t))
	b.Limit(1, 1<<30)
	propose := func(id string, at time.Duration) error {
		_, err := ledger.Submit(t.Context(), l, meta("ann", id, at), add{1})
		return err
	}
	if err := propose("1", 0); err != nil {
		t.Fatal(err)
	}
	wantFault(t, propose("2", time.Minute), fault.Busy)
	if err := propose("1", time.Minute); err != nil || b.View().Sum != 1 {
		t.Fatalf("%v, %+v", err, b.View())
	}
	if err := propose("2", ledger.Remember); err != nil || b.View().Sum != 2 {
		t.Fatalf("%v, %+v", err, b.View())
	}
}

// The bytes are counted up and down, and the same after a snapshot.
func TestBytesOfWhatIsRemembered(t *testing.T) {
	d := &direct{book: newToy()}
	for i := range 100 {
		if err := d.ask(t, strings.Repeat("x", 1+i%60)+fmt.Sprint(i), time.Duration(i)*time.Minute); err != nil {
			t.Fatal(err)
		}
	}
	count, size := d.book.Remembered()
	if count != 10 || size < 10*(256+32) || size > 10*(256+32+64+64) {
		t.Fatalf("%d answers of %d bytes", count, size)
	}
	var snap bytes.Buffer
	w, err := d.book.Snapshot()
	if err == nil {
		_, err = w.WriteTo(&snap)
	}
	if err != nil {
		t.Fatal(err)
	}
	again := newToy()
	if err := again.Restore(&snap); err != nil {
		t.Fatal(err)
	}
	if c, s := again.Remembered(); c != count || s != size {
		t.Fatalf("restored %d of %d bytes, want %d of %d", c, s, count, size)
	}
}

// A book whose time was lifted by a wrong clock is set back, once, on record; what it remembers keeps its age.
func TestTimeIsSetBack(t *testing.T) {
	const now, ahead = 5 * time.Minute, 10 * time.Hour
	newBook := func() *ledger.Book[toy] {
		return ledger.NewBook(toy{}, ledger.Learn[add](), ledger.Learn[ledger.SetTime[toy]]())
	}
	d := &direct{book: newBook()}
	var log [][]byte
	propose := func(data []byte) (string, error) {
		log = append(log, data)
		ans, err := d.Propose(t.Context(), data)
		return string(ans), err
	}
	plus := func(id string, at time.Duration) string {
		t.Helper()
		ans, err := propose(encoded(t, meta("ann", id, at), add{1}))
		if err != nil {
			t.Fatal(err)
		}
		return ans
	}
	set := func(id string, from, to time.Duration) string {
		t.Helper()
		c := ledger.SetTime[toy]{From: start.Add(from), To: start.Add(to)}
		ans, err := propose(encoded(t, c.Meta("node", fleet.RequestID(id)), c))
		if err != nil {
			t.Fatal(err)
		}
		return ans
	}
	plus("0", ahead-4*time.Minute) // a clock that runs away
	plus("1", ahead)
	plus("2", now)
	for i, c := range []struct {
		from,
		to time.Duration
	}{{ahead - time.Hour, now}, {ahead, ahead + time.Minute}, {ahead, ahead}, {ahead + time.Hour, now}} {
		if ans := set(fmt.Sprint("no", i), c.from, c.to); !strings.Contains(ans, `"fault":"conflict"`) {
			t.Errorf("from %s to %s: %s", c.from, c.to, ans)
		}
	}
	at := d.book.At() // a refused one stamped ahead lifts it like any change
	before := d.book.Log().Size()
	if ans := set("yes", at.Sub(start), now); strings.Contains(ans, "conflict") || !d.book.At().Equal(start.Add(now)) {
		t.Fatalf("%s, the book's time is %s", ans, d.book.At())
	}
	if e := leaf(t, d.book, before); e.Kind != "book.time/1" || !e.At.Equal(start.Add(now)) || e.By != "node" ||
		!strings.Contains(string(e.Body), "from") {
		t.Fatalf("on record: %+v", e)
	}
	// Request 0 was 4 minutes old, and another minute passed for the refused ones; 1 and 2 are of one moment of the book.
	sum := d.book.View().Sum
	for _, id := range []string{"0", "1", "2"} {
		if plus(id, now+4*time.Minute); d.book.View().Sum != sum {
			t.Fatalf("request %s was done twice", id)
		}
	}
	if plus("3", now+6*time.Minute); d.book.View().Sum != sum+1 {
		t.Fatal("a new change was not made")
	}
	if plus("0", now+6*time.Minute); d.book.View().Sum != sum+2 {
		t.Fatal("request 0 is remembered for longer than the time that it had left")
	}
	if plus("1", now+8*time.Minute); d.book.View().Sum != sum+2 {
		t.Fatal("request 1 was forgotten too early")
	}
	if plus("4", now+20*time.Minute); !d.book.At().Equal(start.Add(now + 20*time.Minute)) {
		t.Fatalf("the book's time does not go on: %s", d.book.At())
	}
	again := newBook()
	for i, data := range log {
		if _, err := again.Apply(uint64(i+1), data); err != nil {
			t.Fatal(err)
		}
	}
	if rootOf(again) != rootOf(d.book) || !again.At().Equal(d.book.At()) {
		t.Fatal("the same log gives another book")
	}
}
