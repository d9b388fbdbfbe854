// SPDX-License-Identifier: Apache-2.0

package ledger_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/ledger"
)

func TestSubmitAppliesAndRecords(t *testing.T) {
	ctx := context.Background()
	b := newToy()
	d := &direct{book: b}
	changed := b.Changed()
	got, err := ledger.Submit(ctx, d, meta("ann", "1", 0), add{5})
	if err != nil || got != 5 || b.View().Sum != 5 {
		t.Fatalf("got %d, %v, state %v", got, err, b.View())
	}
	select {
	case <-changed:
	default:
		t.Fatal("nobody was told of the new page")
	}
	e := leaf(t, b, 0)
	if e.By != "ann" || e.Kind != "add/1" || string(e.Body) != `{"n":5}` || e.Fault != "" {
		t.Fatalf("leaf %+v", e)
	}
}

func TestRefusedChangeLeavesOnlyItsRecord(t *testing.T) {
	ctx := context.Background()
	b := newToy()
	d := &direct{book: b}
	_, err := ledger.Submit(ctx, d, meta("ann", "1", 0), add{-1})
	wantFault(t, err, fault.Denied)
	if fault.Text(err) != "the sum would be -1" {
		t.Fatalf("text %q", fault.Text(err))
	}
	if b.View() != (toy{}) {
		t.Fatalf("a refused change altered the state: %+v", b.View())
	}
	if e := leaf(t, b, 0); e.Fault != fault.Denied || e.Detail != "the sum would be -1" {
		t.Fatalf("leaf %+v", e)
	}
}

func TestSameRequestSameAnswer(t *testing.T) {
	ctx := context.Background()
	b := newToy()
	d := &direct{book: b}
	for _, at := range []time.Duration{0, time.Minute, ledger.Remember - 1} {
		got, err := ledger.Submit(ctx, d, meta("ann", "1", at), add{5})
		if err != nil || got != 5 || b.Log().Size() != 1 {
			t.Fatalf("at %s: %d, %v, %d leaves", at, got, err, b.Log().Size())
		}
	}
	_, err := ledger.Submit(ctx, d, meta("ann", "1", time.Minute), add{6})
	wantFault(t, err, fault.Conflict)
	_, err = ledger.Submit(ctx, d, meta("ann", "1", time.Minute), whisper{"x"})
	wantFault(t, err, fault.Conflict)
	if got, err := ledger.Submit(ctx, d, meta("bob", "1", time.Minute), add{6}); err != nil || got != 11 {
		t.Fatalf("the ids of two principals met: %d, %v", got, err)
	}
	if _, err := ledger.Submit(ctx, d, meta("eve", "2", 2*ledger.Remember), add{0}); err != nil {
		t.Fatal(err)
	}
	if got, err := ledger.Submit(ctx, d, meta("ann", "1", 2*ledger.Remember), add{5}); err != nil || got != 16 {
		t.Fatalf("an answer is remembered for ever: %d, %v", got, err)
	}
}

func TestTimeNeverGoesBack(t *testing.T) {
	ctx := context.Background()
	b := newToy()
	d := &direct{book: b}
	for i, at := range []time.Duration{time.Hour, 0, -time.Hour, 2 * time.Hour} {
		if _, err := ledger.Submit(ctx, d, meta("ann", fmt.Sprint(i), at), add{1}); err != nil {
			t.Fatal(err)
		}
	}
	for i, want := range []time.Duration{time.Hour, time.Hour, time.Hour, 2 * time.Hour} {
		if e := leaf(t, b, int64(i)); !e.At.Equal(start.Add(want)) {
			t.Errorf("leaf %d is of %s, want %s", i, e.At, start.Add(want))
		}
	}
}

// Neither the leaf of a private change, taken or refused, nor what a snapshot holds of it has the body.
func TestPrivateBodyStaysOutOfTheLog(t *testing.T) {
	b := newToy()
	d := &direct{book: b}
	if _, err := ledger.Submit(context.Background(), d, meta("ann", "1", 0), whisper{"canary"}); err != nil {
		t.Fatal(err)
	}
	_, err := ledger.Submit(context.Background(), d, meta("ann", "2", 0), whisper{"!canary"})
	wantFault(t, err, fault.Denied)
	_, err = ledger.Submit(context.Background(), d, meta("ann", "1", 0), whisper{"another canary"}) // a request id that was used
	wantFault(t, err, fault.Conflict)
	for i, want := range []fault.Kind{"", fault.Denied} {
		if e := leaf(t, b, int64(i)); len(e.Body) != 0 || e.BodyDigest == "" || e.Fault != want {
			t.Errorf("leaf %+v, want the fault %q and a digest alone", e, want)
		}
		if bytes.Contains(b.Log().Entry(int64(i)), []byte("canary")) {
			t.Errorf("the private body is in leaf %d", i)
		}
	}
	snap, err := b.Snapshot()
	if err != nil {
		t.Fatal(err)
	}
	var file bytes.Buffer
	if _, err := snap.WriteTo(&file); err != nil || bytes.Contains(file.Bytes(), []byte("canary")) {
		t.Errorf("%v: the private body is in the snapshot: %s", err, file.Bytes())
	}
}

func TestWhatCannotBeAppliedStopsTheBook(t *testing.T) {
	m := `"meta":{"at":"2026-03-01T12:00:00Z","by":"ann","request":"1"}`
	for name, c := range map[string]struct{ data, want string }{
		"unknown kind":  {`{"kind":"add/2",` + m + `,"body":{"n":1}}`, `does not know the change "add/2"`},
		"unknown field": {`{"kind":"add/1",` + m + `,"body":{"n":1,"m":2}}`, "m"},
		"wrong type":    {`{"kind":"add/1",` + m + `,"body":{"n":"1"}}`, "add/1"},
		"a panic":       {`{"kind":"explode/1",` + m + `,"body":{}}`, "panics"},
		"no time":       {`{"kind":"add/1","meta":{"by":"ann","request":"1"},"body":{"n":1}}`, "request id"},
		"no principal":  {`{"kind":"add/1","meta":{"at":"2026-03-01T12:00:00Z","by":"","request":"1"},"body":{"n":1}}`, "request id"},
		"long id": {`{"kind":"add/1","meta":{"at":"2026-03-01T12:00:00Z","by":"a","request":"` + strings.Repeat("x",
			65) + `"},"body":{"n":1}}`, "request id"},
		"trailing bytes": {`{"kind":"add/1",` + m + `,"body":{"n":1}}{}`, ""},
		"not JSON":       {`hello`, ""},
		"too large":      {`{"kind":"add/1"` + strings.Repeat(" ", ledger.MaxChange) + `}`, "limit"},
	} {
		t.Run(name, func(t *testing.T) {
			b := newToy()
			before := b.View()
			err := b.DryRun([]byte(c.data))
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Fatalf("rehearse: %v, want %q", err, c.want)
			}
			if _, err := b.Apply(1, []byte(c.data)); err == nil {
				t.Fatal("applied")
			}
			if b.View() != before || b.Log().Size() != 0 || b.Index() != 0 {
				t.Fatal("the book moved")
			}
		})
	}
}

func TestRehearsingARefusalPasses(t *testing.T) {
	b := newToy()
	if err := b.DryRun(encoded(t, meta("ann", "1", 0), add{-1})); err != nil {
		t.Fatalf("a refusal belongs on record: %v", err)
	}
	if b.Log().Size() != 0 {
		t.Fatal("rehearsing left a trace")
	}
}

func TestTwoChangesOfOneKindPanic(t *testing.T) {
	defer func() {
		if recover() == nil {
			t.Fatal("learned twice")
		}
	}()
	ledger.NewBook(toy{}, ledger.Learn[add](), ledger.Learn[add]())
}

type step struct {
	By, ID string
	At     time.Duration
	N      int
}

func steps(t *rapid.T) []step {
	return rapid.SliceOfN(rapid.Custom(func(t *rapid.T) step {
		return step{rapid.SampledFrom([]string{"ann", "bob"}).Draw(t, "by"), fmt.Sprint(rapid.IntRange(0, 9).Draw(t, "id")),
			time.Duration(rapid.IntRange(-30, 30).Draw(t, "at")) * time.Minute, rapid.IntRange(-3, 5).Draw(t, "n")}
	}), 0, 40).Draw(t, "steps")
}

// Any sequence gives the same book whether it is replayed, or cut by a snapshot at any place.
func TestReplayAndSnapshotAgree(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		all := steps(t)
		cut := rapid.IntRange(0, len(all)).Draw(t, "cut")
		one, two := newToy(), newToy()
		var answers [][]byte
		put := func(b *ledger.Book[toy], i int) []byte {
			s := all[i]
			data, err := ledger.Encode(meta(s.By, s.ID, s.At), add{s.N})
			if err != nil {
				t.Fatal(err)
			}
			ans, err := b.Apply(uint64(i+1), data)
			if err != nil {
				t.Fatal(err)
			}
			return ans
		}
		for i := range all {
			answers = append(answers, put(one, i))
		}
		for i := range cut {
			put(two, i)
		}
		snap, err := two.Snapshot()
		if err != nil {
			t.Fatal(err)
		}
		var file bytes.Buffer
		if _, err := snap.WriteTo(&file); err != nil {
			t.Fatal(err)
		}
		three := newToy()
		if err := three.Restore(bytes.NewReader(file.Bytes())); err != nil {
			t.Fatal(err)
		}
		for i := cut; i < len(all); i++ {
			if got := put(three, i); !bytes.Equal(got, answers[i]) {
				t.Fatalf("step %d after the snapshot answers %s, without it %s", i, got, answers[i])
			}
		}
		if pretty(one.View()) != pretty(three.View()) || rootOf(one) != rootOf(three) || one.Index() != three.Index() {
			t.Fatalf("one %v %s, other %v %s", one.View(), rootOf(one), three.View(), rootOf(three))
		}
	})
}

// A refused or repeated change never moves the sum; the sum is what the accepted ones say.
func TestSumIsThatOfTheAccepted(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		b := newToy()
		d := &direct{book: b}
		sum := 0
		for _, s := range steps(t) {
			size := b.Log().Size()
			got, err := ledger.Submit(context.Background(), d, meta(s.By, s.ID, s.At), add{s.N})
			if b.Log().Size() > size && err == nil {
				sum += s.N
				if got != sum {
					t.Fatalf("answer %d, want %d", got, sum)
				}
			}
			if b.View().Sum != sum || sum < 0 {
				t.Fatalf("sum %d, want %d", b.View().Sum, sum)
			}
		}
	})
}

func TestRestoreTakesAllOrNothing(t *testing.T) {
	ctx := context.Background()
	src := newToy()
	d := &direct{book: src}
	for i := range 20 {
		if _, err := ledger.Submit(ctx, d, meta("ann", fmt.Sprint(i), time.Duration(i)*time.Second), add{i}); err != nil {
			t.Fatal(err)
		}
	}
	snap, _ := src.Snapshot()
	var file bytes.Buffer
	n, err := snap.WriteTo(&file)
	if err != nil || n != int64(file.Len()) {
		t.Fatalf("%d bytes, %v, counted %d", file.Len(), err, n)
	}
	b := newToy()
	if _, err := ledger.Submit(ctx, &direct{book: b}, meta("bob", "1", 0), add{1}); err != nil {
		t.Fatal(err)
	}
	before := rootOf(b)
	for i := range file.Len() {
		flipped := bytes.Clone(file.Bytes())
		flipped[i] ^= 1
		if err := b.Restore(bytes.NewReader(flipped)); err == nil {
			t.Fatalf("byte %d flipped and restored", i)
		}
		if err := b.Restore(bytes.NewReader(file.Bytes()[:i])); err == nil {
			t.Fatalf("cut at byte %d and restored", i)
		}
	}
	if err := b.Restore(bytes.NewReader(append(bytes.Clone(file.Bytes()), 'x'))); err == nil {
		t.Fatal("trailing bytes were taken")
	}
	root := sourceRoot(src)
	other := strings.Repeat("0", len(root))
	for name, forged := range map[string][]byte{ // by somebody who writes the right checksum
		"another root":  bytes.Replace(file.Bytes(), []byte(root), []byte(other), 1),
		"another leaf":  bytes.Replace(file.Bytes(), []byte(`"body":{"n":7}`), []byte(`"body":{"n":8}`), 1),
		"one leaf less": bytes.Replace(file.Bytes(), append(src.Log().Entry(19), '\n'), nil, 1),
	} {
		if bytes.Equal(forged, file.Bytes()) {
			t.Fatalf("%s: nothing was forged", name)
		}
		if err := b.Restore(bytes.NewReader(summed(forged))); err == nil {
			t.Errorf("%s was restored", name)
		}
	}
	if err := newToy().Restore(bytes.NewReader(summed(file.Bytes()))); err != nil {
		t.Fatalf("the checksum of the test is not that of a snapshot: %v", err)
	}
	if rootOf(b) != before {
		t.Fatal("a refused snapshot changed the book")
	}
	if err := b.Restore(&file); err != nil || rootOf(b) != rootOf(src) {
		t.Fatalf("%v, %s, want %s", err, rootOf(b), rootOf(src))
	}
}

func sourceRoot(b *ledger.Book[toy]) string {
	root := b.Log().Root()
	return hex.EncodeToString(root[:])
}

// summed gives a snapshot the checksum of what it holds.
func summed(file []byte) []byte {
	body := file[:bytes.LastIndex(file, []byte("sha256:"))]
	sum := sha256.Sum256(body)
	return append(bytes.Clone(body), []byte("sha256:"+hex.EncodeToString(sum[:])+"\n")...)
}

func FuzzRehearse(f *testing.F) {
	data, _ := ledger.Encode(meta("ann", "1", 0), add{1})
	f.Add(data)
	f.Add([]byte(`{"kind":"explode/1","meta":{"at":"2026-03-01T12:00:00Z","by":"ann","request":"1"},"body":{}}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		b := newToy()
		rehearsed := b.DryRun(data)
		_, err := b.Apply(1, data)
		if (rehearsed == nil) != (err == nil) {
			t.Fatalf("rehearse says %v, apply %v", rehearsed, err)
		}
	})
}

func FuzzRestore(f *testing.F) {
	b := newToy()
	if _, err := ledger.Submit(context.Background(), &direct{book: b}, meta("ann", "1", 0), add{1}); err != nil {
		f.Fatal(err)
	}
	snap, _ := b.Snapshot()
	var file bytes.Buffer
	if _, err := snap.WriteTo(&file); err != nil {
		f.Fatal(err)
	}
	f.Add(file.Bytes())
	f.Fuzz(func(t *testing.T, data []byte) {
		b := newToy()
		if b.Restore(bytes.NewReader(data)) != nil && (b.Log().Size() != 0 || b.Index() != 0) {
			t.Fatal("a refused snapshot changed the book")
		}
	})
}
