// SPDX-License-Identifier: Apache-2.0

package wal_test

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/raft/wal"
	"github.com/demarc-dev/demarc/raft/wal/waltest"
)

const small = 4 << 10

// filled makes a log of some files with votes, and returns what it holds.
func filled(t *testing.T) (*waltest.Script, waltest.Book) {
	t.Helper()
	fs := waltest.New()
	l := open(t, fs)
	r := rand.New(rand.NewPCG(3, 4))
	for i := uint64(1); i <= 40; i += 2 {
		a, b := waltest.Random(r, i, 2), waltest.Random(r, i+1, 2)
		a.Data, b.Data = a.Data[:min(len(a.Data), 700)], b.Data[:min(len(b.Data), 700)]
		check(t, l.Append([]wal.Entry{a, b}))
	}
	check(t, l.Set("CurrentTerm", []byte("2")))
	check(t, l.Set("LastVoteCand", []byte("n1:7000")))
	check(t, l.Set("CurrentTerm", []byte("3")))
	want, err := waltest.Read(l)
	check(t, err)
	check(t, l.Close())
	return fs, want
}

func open(t *testing.T, fs wal.Files) *wal.Log {
	t.Helper()
	l, err := wal.Open(fs, wal.Options{SegmentBytes: small})
	check(t, err)
	t.Cleanup(func() { _ = l.Close() })
	return l
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// Each byte of each file, altered in several ways: the log says which file and which entry, or has lost nothing.
func TestEachByteAltered(t *testing.T) {
	fs, want := filled(t)
	names, _ := fs.List()
	if len(names) < 4 {
		t.Fatalf("only %q: there should be several files", names)
	}
	refused, harmless := 0, 0
	for _, name := range names {
		for off := range fs.Bytes(name) {
			if name == "votes" && off%4096 > 600 && off%4096 < 4090 {
				continue // never written, like the six before the next copy
			}
			for _, x := range []byte{1 << (off % 8), fs.Bytes(name)[off]} { // one bit, and all of it
				if x == 0 {
					continue
				}
				disk := fs.Clone()
				disk.Bytes(name)[off] ^= x
				l, err := wal.Open(disk, wal.Options{SegmentBytes: small})
				if err != nil {
					refused++
					if !strings.Contains(err.Error(), name) || fault.Of(err) != fault.Internal {
						t.Fatalf("%s byte %d ^ %#x: %v: it does not name the file", name, off, x, err)
					}
					if name != "votes" && off >= 64 && !strings.Contains(err.Error(), "entry ") {
						t.Fatalf("%s byte %d ^ %#x: %v: it does not name the entry", name, off, x, err)
					}
					continue
				}
				harmless++
				got, err := waltest.Read(l)
				check(t, err)
				check(t, l.Close())
				if err := equal(got, want); err != nil {
					t.Fatalf("%s byte %d ^ %#x: opened, and %v", name, off, x, err)
				}
				if used := name != "votes" && fs.Bytes(name)[off] != 0; used {
					t.Fatalf("%s byte %d ^ %#x: not found", name, off, x)
				}
			}
		}
	}
	if refused == 0 || harmless == 0 {
		t.Fatalf("%d refused, %d harmless", refused, harmless)
	}
	t.Logf("%d alterations refused by name, %d in bytes that say nothing, or repaired from the second copy", refused, harmless)
}

func equal(got, want waltest.Book) error {
	return waltest.Lawful(got, want, want, waltest.Act{Name: "nothing"})
}

// One copy of the votes that is altered is repaired from the other, and told; two in one pair are refused.
func TestVotesHaveASecondCopy(t *testing.T) {
	fs, want := filled(t)
	for k := range 4 {
		disk := fs.Clone()
		disk.Bytes("votes")[k*4096+20] ^= 1
		l := open(t, disk)
		if !l.Repaired() {
			t.Errorf("copy %d: not told", k)
		}
		got, err := waltest.Read(l)
		check(t, err)
		check(t, equal(got, want))
		check(t, l.Close())
		if again := open(t, disk); again.Repaired() {
			t.Errorf("copy %d: repaired twice", k)
		}
	}
	for _, pair := range [][2]int{{0, 1}, {2, 3}} {
		disk := fs.Clone()
		disk.Bytes("votes")[pair[0]*4096+20] ^= 1
		disk.Bytes("votes")[pair[1]*4096+20] ^= 1
		if l, err := wal.Open(disk, wal.Options{}); err == nil {
			_ = l.Close()
			t.Errorf("pair %v: opened with votes that may have gone back", pair)
		}
	}
}

// An entry that is altered while the log is open is refused when it is read, by name.
func TestAlteredWhileOpen(t *testing.T) {
	fs, want := filled(t)
	l := open(t, fs)
	name := "0000000000000001.segment"
	fs.Bytes(name)[64+60] ^= 4
	_, err := l.Get(want.First)
	if err == nil || !strings.Contains(err.Error(), name) || !strings.Contains(err.Error(), "entry 1 ") {
		t.Fatalf("entry 1: %v", err)
	}
	if _, err := l.Get(want.First + 1); err != nil {
		t.Fatalf("the next one is whole: %v", err)
	}
}

// A file that is gone, cut off, or another one's is refused by name.
func TestFilesThatAreNotTheirs(t *testing.T) {
	fs, _ := filled(t)
	names, _ := fs.List()
	segments := slices.DeleteFunc(slices.Clone(names), func(n string) bool { return n == "votes" })
	last := segments[len(segments)-1]
	for name, c := range map[string]struct {
		do   func(*waltest.Script)
		says string
	}{
		"first gone":   {func(s *waltest.Script) { s.Gone(segments[0]) }, segments[1]},
		"middle gone":  {func(s *waltest.Script) { s.Gone(segments[1]) }, segments[0]},
		"last gone":    {func(s *waltest.Script) { s.Gone(last) }, last},
		"last emptied": {func(s *waltest.Script) { clear(s.Bytes(last)) }, last},
		"votes gone":   {func(s *waltest.Script) { s.Gone("votes") }, "votes"},
		"votes zeroed": {func(s *waltest.Script) { clear(s.Bytes("votes")) }, "votes"},
		"votes cut":    {func(s *waltest.Script) { s.Put("votes", s.Bytes("votes")[:9000]) }, "votes"},
		"cut off":      {func(s *waltest.Script) { s.Put(segments[0], s.Bytes(segments[0])[:1000]) }, segments[0]},
		"swapped": {func(s *waltest.Script) {
			a, b := s.Bytes(segments[0]), s.Bytes(segments[1])
			s.Put(segments[0], b)
			s.Put(segments[1], a)
		}, segments[0]},
		"a lost sector": {func(s *waltest.Script) { clear(s.Bytes(last)[512:1024]) }, last},
	} {
		disk := fs.Clone()
		c.do(disk)
		l, err := wal.Open(disk, wal.Options{SegmentBytes: small})
		if err == nil {
			_ = l.Close()
			t.Errorf("%s: opened", name)
		} else if !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %v: it does not name %s", name, err, c.says)
		}
	}
}

// A full disk refuses what needs a file and takes the rest, votes included; it loses nothing, and recovers without a restart.
func TestFullDisk(t *testing.T) {
	fs, want := filled(t)
	l := open(t, fs)
	fs.Full = true
	next := want.Last() + 1
	var full error
	for full == nil {
		a := waltest.Act{Name: "append", Entries: []wal.Entry{{Index: next, Term: 3, Data: make([]byte, 300)}}}
		if full = a.Do(l); full == nil {
			want, next = a.On(want), next+1
		}
	}
	if !wal.Full(full) || fault.Of(full) != fault.Unavailable || !strings.Contains(full.Error(), "the disk is full") {
		t.Fatalf("it says %v", full)
	}
	if err := l.Grow(small); !wal.Full(err) {
		t.Fatalf("grow: %v", err)
	}
	check(t, l.Set("CurrentTerm", []byte("4")))
	want.Values["CurrentTerm"] = "4"
	got, err := waltest.Read(l)
	check(t, err)
	check(t, equal(got, want))
	check(t, l.Cut(want.Last()))
	want = waltest.Act{Name: "cut", Index: want.Last()}.On(want)
	fs.Full = false
	check(t, l.Grow(small))
	a := waltest.Act{Name: "append", Entries: []wal.Entry{{Index: want.Last() + 1, Term: 4, Data: make([]byte, 900)}}}
	check(t, a.Do(l))
	check(t, l.Close())
	got, err = waltest.Read(open(t, fs))
	check(t, err)
	check(t, equal(got, a.On(want)))
}

// After a sync that failed it is not known what is on disk: the log takes nothing more until it is opened again.
func TestAFailedSyncIsTheLast(t *testing.T) {
	fs, want := filled(t)
	l := open(t, fs)
	fs.Broken = true
	a := waltest.Act{Name: "append", Entries: []wal.Entry{{Index: want.Last() + 1, Term: 3}}}
	if err := a.Do(l); fault.Of(err) != fault.Internal {
		t.Fatalf("a failed sync was answered with %v", err)
	}
	fs.Broken = false
	for _, a := range []waltest.Act{a, {Name: "CurrentTerm", Value: "9"}, {Name: "cut", Index: 5}, {Name: "drop", Index: 5}} {
		if err := a.Do(l); err == nil {
			t.Errorf("%s was taken after a failed sync", a.Name)
		}
	}
	if l.Broken() == nil {
		t.Error("it does not say that it is broken")
	}
	if fmt.Sprint(l.Last()) != fmt.Sprint(want.Last()) {
		t.Errorf("the log ends at %d, %d was answered", l.Last(), want.Last())
	}
}
