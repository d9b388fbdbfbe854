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

// Async is a store that can also write now and sync later.
type Async interface {
	Write([]wal.Entry) error
	Sync() error
	Synced() uint64
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
	case "write":
		if w, ok := l.(Async); ok {
			return w.Write(a.Entries)
		}
		return l.Append(a.Entries)
	case "sync":
		if w, ok := l.(Async); ok {
			return w.Sync()
		}
		return nil
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
	case "append", "write":
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
	case "prepare", "sync":
	default:
		b.Values = maps.Clone(b.Values)
		b.Values[a.Name] = a.Value
	}
	return b
}

// Schedule draws acts as a member's life makes them: appends of one or more, writes that are synced later, cuts after which
// another term's entries come, heads that a snapshot replaces, a log that begins anew behind a snapshot, votes.
func Schedule(r *rand.Rand, n int) (acts []Act) {
	b := Book{First: 1, Values: map[string]string{}}
	term := uint64(1)
	for range n {
		var a Act
		switch k := r.IntN(22); {
		case k < 11:
			next := b.Last() + 1
			if len(b.Entries) == 0 && r.IntN(2) == 0 {
				next += uint64(r.IntN(5))
			}
			a.Name = []string{"append", "write", "write", "write"}[r.IntN(4)]
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
		case k < 19:
			a.Name = "sync"
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

// Read returns what a log holds, and fails if it can't be read whole.
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
	return a.Index == b.Index && a.Term == b.Term && a.Type == b.Type && a.At == b.At &&
		bytes.Equal(a.Ext, b.Ext) && bytes.Equal(a.Data, b.Data)
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

// moment is what a log may hold at a crash.
type moment struct {
	sure  Book // what was answered as being on disk
	seen  Book // what could be read
	maybe Book // what could be read had the present act been done
	doing Act
}

// lawful checks what a log holds after a crash.
func (m moment) lawful(got Book) error {
	switch m.doing.Name {
	case "cut", "drop": // what is not on disk yet comes there first
		if m.sure.Last() != m.seen.Last() && Lawful(got, m.sure, m.seen, m.doing) == nil {
			return nil
		}
		return Lawful(got, m.seen, m.maybe, m.doing)
	}
	return Lawful(got, m.sure, m.maybe, m.doing)
}

// done is the moment after the act.
func (m moment) done(async bool) moment {
	m.seen = m.maybe
	switch m.doing.Name {
	case "prepare":
	case "append", "cut", "drop", "sync":
		m.sure = m.seen
	case "write":
		if !async {
			m.sure = m.seen
		}
	default:
		m.sure.Values = m.seen.Values
	}
	return m
}

// Sweep plays schedules of acts, crashes each at each of its steps, each in some variants, and returns how many states there
// were and what was wrong with them.
func Sweep(seeds, acts, variants int, open Open) (states int, wrong []error) {
	for seed := range uint64(seeds) {
		list := Schedule(rand.New(rand.NewPCG(seed, 1)), acts)
		for at := 0; ; at++ {
			fs := New()
			fs.Left = at
			m, err := play(fs, list, open)
			if err != nil {
				return states, append(wrong, fmt.Errorf("seed %d step %d (%s): %w", seed, at, m.doing.Name, err))
			}
			if !fs.Off() {
				break
			}
			for k := range uint64(variants) {
				states++
				r := rand.New(rand.NewPCG(seed<<32|uint64(at), k))
				if err := outlives(fs, r, m, open); err != nil {
					wrong = append(wrong, fmt.Errorf("seed %d step %d variant %d (%s): %w", seed, at, k, m.doing.Name, err))
				}
			}
		}
	}
	return states, wrong
}

// outlives checks what is left after a crash of the machine, also if it crashes again while the log is opened, and after
// the end of the process alone.
func outlives(fs *Script, r *rand.Rand, m moment, open Open) error {
	disk := fs.Crash(r)
	disk.Left = r.IntN(12) - 4
	l, err := open(disk)
	if err == nil {
		err = l.Close()
	}
	if !disk.Off() && err != nil {
		return err
	}
	if err := comesBack(disk.Crash(r), m, open); err != nil {
		return err
	}
	// The next process reads what this one had not synced. It goes by that, so that it must be on disk.
	disk = fs.Again()
	if l, err = open(disk); err != nil {
		return fmt.Errorf("after a kill: %w", err)
	}
	defer l.Close()
	got, err := Read(l)
	if err == nil {
		err = m.lawful(got)
	}
	if err != nil {
		return fmt.Errorf("after a kill: %w", err)
	}
	if len(got.Entries) == 0 {
		got.First = max(m.sure.Last(), m.maybe.Last()) + 1
	}
	m = moment{got, got, got, Act{Name: "nothing"}}
	if err := comesBack(disk.Crash(r), m, open); err != nil {
		return fmt.Errorf("after a kill, and a crash after it: %w", err)
	}
	return nil
}

// play does acts until the machine crashes.
func play(fs *Script, acts []Act, open Open) (m moment, err error) {
	empty := Book{First: 1, Values: map[string]string{}}
	m = moment{empty, empty, empty, Act{Name: "open"}}
	l, err := open(fs)
	if fs.Off() {
		return m, nil
	}
	if err != nil {
		return m, err
	}
	defer l.Close()
	w, async := l.(Async)
	for _, a := range acts {
		m.maybe, m.doing = a.On(m.seen), a
		err := a.Do(l)
		if fs.Off() {
			return m, nil
		}
		if err != nil {
			return m, err
		}
		m = m.done(async)
		if async && len(m.sure.Entries) > 0 && w.Synced() < m.sure.Last() {
			return m, fmt.Errorf("the log says that it is on disk up to entry %d, it answered %d", w.Synced(), m.sure.Last())
		}
		if async { // from here on it counts as answered
			for n := len(m.sure.Entries); n < len(m.seen.Entries) && m.seen.First+uint64(n) <= w.Synced(); n++ {
				m.sure.First, m.sure.Entries = m.seen.First, m.seen.Entries[:n+1:n+1]
			}
		}
	}
	m.doing = Act{Name: "read"}
	got, err := Read(l)
	return m, errors.Join(err, Lawful(got, m.seen, m.seen, Act{Name: "nothing"}))
}

// comesBack opens a log after a crash, checks it, and that it can be lived with.
func comesBack(disk *Script, m moment, open Open) error {
	l, err := open(disk)
	if err != nil {
		return err
	}
	got, err := Read(l)
	if err == nil {
		err = m.lawful(got)
	}
	if err != nil {
		return err
	}
	next := got.Last() + 1
	if len(got.Entries) == 0 {
		next = max(m.sure.Last(), m.maybe.Last()) + 1
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
