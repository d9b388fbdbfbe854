// SPDX-License-Identifier: Apache-2.0

package wal_test

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"strconv"
	"testing"

	"github.com/demarc-dev/demarc/raft/wal"
)

// book is what a log should hold.
type book struct {
	first   uint64 // of the log
	entries []wal.Entry
	values  map[string]string
}

func (b book) last() uint64 { return b.first + uint64(len(b.entries)) - 1 }

// act is one operation of a schedule.
type act struct {
	name    string
	entries []wal.Entry
	index   uint64
	value   string
}

func (a act) do(l *wal.Log) error {
	switch a.name {
	case "append":
		return l.Append(a.entries)
	case "cut":
		return l.Cut(a.index)
	case "drop":
		return l.Drop(a.index)
	case "prepare":
		return l.Prepare()
	}
	return l.Set(a.name, []byte(a.value))
}

func (a act) on(b book) book {
	switch a.name {
	case "append":
		if len(b.entries) == 0 {
			b.first = a.entries[0].Index
		}
		b.entries = append(b.entries[:len(b.entries):len(b.entries)], a.entries...)
	case "cut":
		if a.index <= b.last() {
			b.entries = b.entries[:max(a.index, b.first)-b.first]
		}
	case "drop":
		switch {
		case a.index >= b.last() && a.index >= b.first:
			b.first, b.entries = a.index+1, nil
		case a.index >= b.first:
			b.first, b.entries = a.index+1, b.entries[a.index+1-b.first:]
		}
	case "prepare":
	default:
		b.values = maps.Clone(b.values)
		b.values[a.name] = a.value
	}
	return b
}

// schedule draws acts as a member's life makes them: appends of one or more, cuts after which another term's entries
// come, heads that a snapshot replaces, a log that begins anew behind a snapshot, votes.
func schedule(r *rand.Rand, n int) (acts []act) {
	b := book{first: 1, values: map[string]string{}}
	term := uint64(1)
	for range n {
		var a act
		switch k := r.IntN(20); {
		case k < 11:
			next := b.last() + 1
			if len(b.entries) == 0 && r.IntN(2) == 0 {
				next += uint64(r.IntN(5))
			}
			a.name = "append"
			for range 1 + r.IntN(4) {
				a.entries = append(a.entries, entry(r, next, term))
				next++
			}
		case k < 14:
			term++
			a = act{name: "cut", index: b.first + uint64(r.IntN(len(b.entries)+1))}
			if r.IntN(2) == 0 { // a few of the newest
				a.index = max(b.first, b.last()+1-min(uint64(r.IntN(4)), uint64(len(b.entries))))
			}
		case k < 16:
			a = act{name: "drop", index: b.first + uint64(r.IntN(len(b.entries)+1))}
			if r.IntN(4) == 0 {
				a.index = b.last() + uint64(r.IntN(3))
			}
		case k < 17:
			a.name = "prepare"
		default:
			term += uint64(r.IntN(2))
			a = act{name: []string{"CurrentTerm", "LastVoteCand"}[r.IntN(2)], value: strconv.FormatUint(term, 10)}
		}
		acts, b = append(acts, a), a.on(b)
	}
	return acts
}

func entry(r *rand.Rand, index, term uint64) wal.Entry {
	e := wal.Entry{Index: index, Term: term, Type: byte(r.IntN(4)), At: r.Int64N(2)}
	n := []int{0, 1, 8, 100, 300, 700, 1500, 5000}[r.IntN(8)]
	if n > 0 {
		e.Data = make([]byte, n) // zeros are the hardest to tell from nothing
		if r.IntN(3) > 0 {
			for i := range e.Data {
				e.Data[i] = byte(r.Uint32())
			}
		}
	}
	if r.IntN(4) == 0 {
		e.Ext = bytes.Repeat([]byte{byte(term)}, 1+r.IntN(20))
	}
	return e
}

// read gives what a log holds, and fails where it can't be read whole.
func read(l *wal.Log) (book, error) {
	b := book{first: l.First(), values: map[string]string{}}
	if b.first == 0 {
		b.first = 1
	} else {
		for i := b.first; i <= l.Last(); i++ {
			e, err := l.Get(i)
			if err != nil {
				return b, err
			}
			b.entries = append(b.entries, e)
		}
	}
	for _, k := range []string{"CurrentTerm", "LastVoteCand"} {
		if v := l.Value(k); v != nil {
			b.values[k] = string(v)
		}
	}
	return b, nil
}

func same(a, b wal.Entry) bool {
	return a.Index == b.Index && a.Term == b.Term && a.Type == b.Type && a.At == b.At && bytes.Equal(a.Ext, b.Ext) && bytes.Equal(a.Data, b.Data)
}

// lawful checks what a log holds after a crash against what was answered before it, and what was being done.
func lawful(got, sure, maybe book, doing act) error {
	for k, v := range sure.values {
		if got.values[k] != v && got.values[k] != maybe.values[k] {
			return fmt.Errorf("%s is %q, %q was answered", k, got.values[k], v)
		}
	}
	for k, v := range got.values {
		if v != sure.values[k] && v != maybe.values[k] {
			return fmt.Errorf("%s is %q, which was never set", k, v)
		}
	}
	if len(got.entries) == 0 && (len(sure.entries) == 0 || len(maybe.entries) == 0) {
		return nil
	}
	if len(got.entries) == 0 {
		return fmt.Errorf("the log is empty: %d to %d were answered", sure.first, sure.last())
	}
	lowest, highest := min(sure.first, maybe.first), max(sure.first, maybe.first)
	if len(sure.entries) == 0 {
		lowest = maybe.first
	}
	if got.first < lowest || got.first > highest {
		return fmt.Errorf("the log begins at %d: %d or %d", got.first, sure.first, maybe.first)
	}
	lowest, highest = min(sure.last(), maybe.last()), max(sure.last(), maybe.last())
	switch {
	case len(maybe.entries) == 0: // all is being deleted
		lowest, highest = sure.last(), sure.last()
	case len(sure.entries) == 0: // it begins
		lowest, highest = maybe.first, maybe.last()
	}
	if got.last() < lowest || got.last() > highest {
		return fmt.Errorf("the log ends at %d: %d was answered, and %d by %s", got.last(), sure.last(), maybe.last(), doing.name)
	}
	for _, e := range got.entries {
		ok := false
		for _, b := range []book{sure, maybe} {
			ok = ok || (e.Index >= b.first && e.Index <= b.last() && same(e, b.entries[e.Index-b.first]))
		}
		if !ok {
			return fmt.Errorf("entry %d of term %d is not the one that was appended", e.Index, e.Term)
		}
	}
	return nil
}

func rounds(t *testing.T, short int) int {
	if s := os.Getenv("DEMARC_CRASH_SEEDS"); s != "" {
		n, err := strconv.Atoi(s)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	return short
}

// A machine that crashes at any step of a schedule of appends, cuts, drops and votes comes back with all that was
// answered, with nothing that was deleted, and with its votes, whichever of the unsynced sectors reached the disk. And
// the same again when it crashes while it comes back.
func TestCrashAtEachStep(t *testing.T) {
	states := 0
	for seed := range uint64(rounds(t, 4)) {
		acts := schedule(rand.New(rand.NewPCG(seed, 1)), 36)
		for at := 0; ; at++ {
			fs := newScript()
			fs.left = at
			sure, maybe, doing, crashed := play(t, fs, acts)
			if !crashed {
				break
			}
			for k := range uint64(4) {
				states++
				r := rand.New(rand.NewPCG(seed<<32|uint64(at), k))
				disk := fs.crash(r)
				disk.left = r.IntN(12) - 4
				if l, err := wal.Open(disk, wal.Options{SegmentBytes: 8 << 10}); err == nil {
					_ = l.Close()
				} else if !errors.Is(err, errCrash) {
					t.Fatalf("seed %d step %d variant %d (%s): %v", seed, at, k, doing.name, err)
				}
				disk = disk.crash(r)
				if err := comesBack(disk, sure, maybe, doing); err != nil {
					t.Fatalf("seed %d step %d variant %d (%s): %v", seed, at, k, doing.name, err)
				}
			}
		}
	}
	t.Logf("%d crash states", states)
}

// play does acts until the machine crashes. It tells what was answered, and what should be there had the last one been.
func play(t *testing.T, fs *script, acts []act) (sure, maybe book, doing act, crashed bool) {
	sure = book{first: 1, values: map[string]string{}}
	l, err := wal.Open(fs, wal.Options{SegmentBytes: 8 << 10})
	if errors.Is(err, errCrash) {
		return sure, sure, act{name: "open"}, true
	}
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	for _, a := range acts {
		maybe = a.on(sure)
		err := a.do(l)
		if errors.Is(err, errCrash) {
			return sure, maybe, a, true
		}
		if err != nil {
			t.Fatalf("%s %d: %v", a.name, a.index, err)
		}
		sure = maybe
	}
	got, err := read(l)
	if err == nil {
		err = lawful(got, sure, sure, act{name: "nothing"})
	}
	if err != nil {
		t.Fatal(err)
	}
	return sure, sure, act{}, false
}

// comesBack opens a log after a crash, checks it, and that it can be lived with.
func comesBack(disk *script, sure, maybe book, doing act) error {
	l, err := wal.Open(disk, wal.Options{SegmentBytes: 8 << 10})
	if err != nil {
		return err
	}
	got, err := read(l)
	if err == nil {
		err = lawful(got, sure, maybe, doing)
	}
	if err != nil {
		return err
	}
	next := got.last() + 1
	if len(got.entries) == 0 {
		next = max(sure.last(), maybe.last()) + 1
	}
	more := act{name: "append", entries: []wal.Entry{{Index: next, Term: 1 << 40, Data: []byte("after")}, {Index: next + 1, Term: 1 << 40}}}
	if err := more.do(l); err != nil {
		return err
	}
	want := more.on(got)
	if err := l.Close(); err != nil {
		return err
	}
	if l, err = wal.Open(disk.crash(rand.New(rand.NewPCG(next, 2))), wal.Options{SegmentBytes: 8 << 10}); err != nil {
		return fmt.Errorf("after a second crash: %w", err)
	}
	defer l.Close()
	if got, err = read(l); err != nil {
		return err
	}
	if err := lawful(got, want, want, act{name: "nothing"}); err != nil {
		return fmt.Errorf("after a second crash: %w", err)
	}
	return nil
}
