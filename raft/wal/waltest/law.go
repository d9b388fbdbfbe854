// SPDX-License-Identifier: Apache-2.0

package waltest

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"strconv"

	"github.com/demarc-dev/demarc/raft/wal"
)

// Store is a log with votes beside it.
type Store interface {
	Append([]wal.Entry) error
	Cut(from uint64) error
	Drop(to uint64) error
	Set(name string, value []byte) error
	First() uint64
	Last() uint64
	Get(index uint64) (wal.Entry, error)
	Value(name string) []byte
	Close() error
}

// Open opens a store on a file system.
type Open func(*Script) (Store, error)

// Book is what a log should hold.
type Book struct {
	First   uint64 // of the log
	Entries []wal.Entry
	Values  map[string]string
}

func (b Book) Last() uint64 { return b.First + uint64(len(b.Entries)) - 1 }

// Act is one operation of a schedule.
type Act struct {
	Name    string
	Entries []wal.Entry
	Index   uint64
	Value   string
}

func (a Act) Do(l Store) error {
	switch a.Name {
	case "append":
		return l.Append(a.Entries)
	case "cut":
		return l.Cut(a.Index)
	case "drop":
		return l.Drop(a.Index)
	case "prepare":
		if p, ok := l.(interface{ Prepare() error }); ok {
			return p.Prepare()
		}
		return nil
	}
	return l.Set(a.Name, []byte(a.Value))
}

func (a Act) On(b Book) Book {
	switch a.Name {
	case "append":
		if len(b.Entries) == 0 {
			b.First = a.Entries[0].Index
		}
		b.Entries = append(b.Entries[:len(b.Entries):len(b.Entries)], a.Entries...)
	case "cut":
		if a.Index <= b.Last() {
			b.Entries = b.Entries[:max(a.Index, b.First)-b.First]
		}
	case "drop":
		switch {
		case a.Index >= b.Last() && a.Index >= b.First:
			b.First, b.Entries = a.Index+1, nil
		case a.Index >= b.First:
			b.First, b.Entries = a.Index+1, b.Entries[a.Index+1-b.First:]
		}
	case "prepare":
	default:
		b.Values = maps.Clone(b.Values)
		b.Values[a.Name] = a.Value
	}
	return b
}

// Schedule draws acts as a member's life makes them: appends of one or more, cuts after which another term's entries
// come, heads that a snapshot replaces, a log that begins anew behind a snapshot, votes.
func Schedule(r *rand.Rand, n int) (acts []Act) {
	b := Book{First: 1, Values: map[string]string{}}
	term := uint64(1)
	for range n {
		var a Act
		switch k := r.IntN(20); {
		case k < 11:
			next := b.Last() + 1
			if len(b.Entries) == 0 && r.IntN(2) == 0 {
				next += uint64(r.IntN(5))
			}
			a.Name = "append"
			for range 1 + r.IntN(4) {
				a.Entries = append(a.Entries, Random(r, next, term))
				next++
			}
		case k < 14:
			term++
			a = Act{Name: "cut", Index: b.First + uint64(r.IntN(len(b.Entries)+1))}
			if r.IntN(2) == 0 { // a few of the newest
				a.Index = max(b.First, b.Last()+1-min(uint64(r.IntN(4)), uint64(len(b.Entries))))
			}
		case k < 16:
			a = Act{Name: "drop", Index: b.First + uint64(r.IntN(len(b.Entries)+1))}
			if r.IntN(4) == 0 {
				a.Index = b.Last() + uint64(r.IntN(3))
			}
		case k < 17:
			a.Name = "prepare"
		default:
			term += uint64(r.IntN(2))
			a = Act{Name: []string{"CurrentTerm", "LastVoteCand"}[r.IntN(2)], Value: strconv.FormatUint(term, 10)}
		}
		acts, b = append(acts, a), a.On(b)
	}
	return acts
}

func Random(r *rand.Rand, index, term uint64) wal.Entry {
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

// Read gives what a log holds, and fails where it can't be read whole.
func Read(l Store) (Book, error) {
	b := Book{First: l.First(), Values: map[string]string{}}
	if b.First == 0 {
		b.First = 1
	} else {
		for i := b.First; i <= l.Last(); i++ {
			e, err := l.Get(i)
			if err != nil {
				return b, err
			}
			b.Entries = append(b.Entries, e)
		}
	}
	for _, k := range []string{"CurrentTerm", "LastVoteCand"} {
		if v := l.Value(k); v != nil {
			b.Values[k] = string(v)
		}
	}
	return b, nil
}

func same(a, b wal.Entry) bool {
	return a.Index == b.Index && a.Term == b.Term && a.Type == b.Type && a.At == b.At && bytes.Equal(a.Ext, b.Ext) && bytes.Equal(a.Data, b.Data)
}

// Lawful checks what a log holds after a crash against what was answered before it, and what was being done.
func Lawful(got, sure, maybe Book, doing Act) error {
	for k, v := range sure.Values {
		if got.Values[k] != v && got.Values[k] != maybe.Values[k] {
			return fmt.Errorf("%s is %q, %q was answered", k, got.Values[k], v)
		}
	}
	for k, v := range got.Values {
		if v != sure.Values[k] && v != maybe.Values[k] {
			return fmt.Errorf("%s is %q, which was never set", k, v)
		}
	}
	if len(got.Entries) == 0 && (len(sure.Entries) == 0 || len(maybe.Entries) == 0) {
		return nil
	}
	if len(got.Entries) == 0 {
		return fmt.Errorf("the log is empty: %d to %d were answered", sure.First, sure.Last())
	}
	lowest, highest := min(sure.First, maybe.First), max(sure.First, maybe.First)
	if len(sure.Entries) == 0 {
		lowest = maybe.First
	}
	if got.First < lowest || got.First > highest {
		return fmt.Errorf("the log begins at %d: %d or %d", got.First, sure.First, maybe.First)
	}
	lowest, highest = min(sure.Last(), maybe.Last()), max(sure.Last(), maybe.Last())
	switch {
	case len(maybe.Entries) == 0: // all is being deleted
		lowest, highest = sure.Last(), sure.Last()
	case len(sure.Entries) == 0: // it begins
		lowest, highest = maybe.First, maybe.Last()
	}
	if got.Last() < lowest || got.Last() > highest {
		return fmt.Errorf("the log ends at %d: %d was answered, and %d by %s", got.Last(), sure.Last(), maybe.Last(), doing.Name)
	}
	for _, e := range got.Entries {
		ok := false
		for _, b := range []Book{sure, maybe} {
			ok = ok || (e.Index >= b.First && e.Index <= b.Last() && same(e, b.Entries[e.Index-b.First]))
		}
		if !ok {
			return fmt.Errorf("entry %d of term %d is not the one that was appended", e.Index, e.Term)
		}
	}
	return nil
}

// Sweep plays schedules of acts, crashes each at each of its steps, each in some variants, and tells how many states there
// were and what was wrong with them.
func Sweep(seeds, acts, variants int, open Open) (states int, wrong []error) {
	for seed := range uint64(seeds) {
		list := Schedule(rand.New(rand.NewPCG(seed, 1)), acts)
		for at := 0; ; at++ {
			fs := New()
			fs.Left = at
			sure, maybe, doing, err := play(fs, list, open)
			if err != nil {
				return states, append(wrong, fmt.Errorf("seed %d step %d (%s): %w", seed, at, doing.Name, err))
			}
			if !fs.Off() {
				break
			}
			for k := range uint64(variants) {
				states++
				r := rand.New(rand.NewPCG(seed<<32|uint64(at), k))
				disk := fs.Crash(r)
				disk.Left = r.IntN(12) - 4
				l, err := open(disk)
				if err == nil {
					err = l.Close()
				}
				if !disk.Off() && err != nil {
					wrong = append(wrong, fmt.Errorf("seed %d step %d variant %d (%s): %w", seed, at, k, doing.Name, err))
					continue
				}
				disk = disk.Crash(r)
				if err := comesBack(disk, sure, maybe, doing, open); err != nil {
					wrong = append(wrong, fmt.Errorf("seed %d step %d variant %d (%s): %w", seed, at, k, doing.Name, err))
				}
			}
		}
	}
	return states, wrong
}

// play does acts until the machine crashes. It tells what was answered, and what should be there had the last one been.
func play(fs *Script, acts []Act, open Open) (sure, maybe Book, doing Act, err error) {
	sure = Book{First: 1, Values: map[string]string{}}
	l, err := open(fs)
	if fs.Off() {
		return sure, sure, Act{Name: "open"}, nil
	}
	if err != nil {
		return sure, sure, Act{Name: "open"}, err
	}
	defer l.Close()
	for _, a := range acts {
		maybe = a.On(sure)
		err := a.Do(l)
		if fs.Off() {
			return sure, maybe, a, nil
		}
		if err != nil {
			return sure, maybe, a, err
		}
		sure = maybe
	}
	got, err := Read(l)
	return sure, sure, Act{Name: "read"}, errors.Join(err, Lawful(got, sure, sure, Act{Name: "nothing"}))
}

// comesBack opens a log after a crash, checks it, and that it can be lived with.
func comesBack(disk *Script, sure, maybe Book, doing Act, open Open) error {
	l, err := open(disk)
	if err != nil {
		return err
	}
	got, err := Read(l)
	if err == nil {
		err = Lawful(got, sure, maybe, doing)
	}
	if err != nil {
		return err
	}
	next := got.Last() + 1
	if len(got.Entries) == 0 {
		next = max(sure.Last(), maybe.Last()) + 1
	}
	more := Act{Name: "append", Entries: []wal.Entry{{Index: next, Term: 1 << 40, Data: []byte("after")}, {Index: next + 1, Term: 1 << 40}}}
	if err := more.Do(l); err != nil {
		return err
	}
	want := more.On(got)
	if err := l.Close(); err != nil {
		return err
	}
	if l, err = open(disk.Crash(rand.New(rand.NewPCG(next, 2)))); err != nil {
		return fmt.Errorf("after a second crash: %w", err)
	}
	defer l.Close()
	if got, err = Read(l); err != nil {
		return err
	}
	if err := Lawful(got, want, want, Act{Name: "nothing"}); err != nil {
		return fmt.Errorf("after a second crash: %w", err)
	}
	return nil
}
