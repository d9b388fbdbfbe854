// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime/debug"

	"github.com/demarc-dev/demarc/raft/wal"
	"github.com/demarc-dev/demarc/raft/wal/waltest"
)

// alter changes one byte at a time of a store that holds forty entries, and looks at what it says then. What panics counts
// as told.
func alter(open waltest.Open) (found, silent, harmless int) {
	fs := waltest.New()
	l, err := open(fs)
	if err != nil {
		panic(err)
	}
	r := rand.New(rand.NewPCG(3, 4))
	for i := uint64(1); i <= 40; i += 2 {
		a, b := waltest.Random(r, i, 2), waltest.Random(r, i+1, 2)
		a.Data, b.Data = a.Data[:min(len(a.Data), 700)], b.Data[:min(len(b.Data), 700)]
		if err := l.Append([]wal.Entry{a, b}); err != nil {
			panic(err)
		}
	}
	if err := l.Set("CurrentTerm", []byte("7")); err != nil {
		panic(err)
	}
	want, err := waltest.Read(l)
	if err != nil {
		panic(err)
	}
	if err := l.Close(); err != nil {
		panic(err)
	}
	names, _ := fs.List()
	for _, name := range names {
		for off := range fs.Bytes(name) {
			if off%7 != 0 { // one byte of seven: all of them take long
				continue
			}
			disk := fs.Clone()
			disk.Bytes(name)[off] ^= 1 << (off % 8)
			switch err := look(open, disk, want); {
			case err == nil:
				harmless++
			case err == errDiffers:
				silent++
			default:
				found++
			}
		}
	}
	return found, silent, harmless
}

var errDiffers = fmt.Errorf("another log than was written")

func look(open waltest.Open, disk *waltest.Script, want waltest.Book) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true)) // bbolt follows what it reads in its map of the file
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("panic: %v", p)
		}
	}()
	l, err := open(disk)
	if err != nil {
		return err
	}
	got, err := waltest.Read(l) // bbolt can't be closed after a panic
	if err = errors.Join(err, l.Close()); err != nil {
		return err
	}
	if waltest.Lawful(got, want, want, waltest.Act{Name: "nothing"}) != nil {
		return errDiffers
	}
	return nil
}
