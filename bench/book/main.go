// SPDX-License-Identifier: Apache-2.0

// Command book measures the vendor's book with many appliances: what a change costs at 500 and at 50,000 of them, and how
// long a snapshot takes to be written and to be restored. It is all in one process: no disk, no network.
package main

import (
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"runtime"
	"slices"
	"syscall"
	"time"

	"github.com/demarc-dev/demarc/daemon/controlplane/book"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/identity/identitytest"
	"github.com/demarc-dev/demarc/ledger"
)

const block = 500 // changes between two looks at the clock

func main() {
	n := flag.Int("n", 50000, "appliances")
	few := flag.Int("few", 500, "appliances of the book that it is compared with")
	rounds := flag.Int("rounds", 20, "blocks of 500 changes on each book")
	flag.Parse()
	if err := run(*few, *n, *rounds); err != nil {
		fmt.Fprintln(os.Stderr, "book:", err)
		os.Exit(1)
	}
}

type subject struct {
	book   *ledger.Book[book.State]
	n      int
	index  uint64
	at     time.Time
	expect []byte
	took   []float64 // microseconds of processor time a change, a block each
}

func apply[R any](s *subject, c ledger.Change[book.State, R]) error {
	data, err := ledger.Encode(s.meta(), c)
	if err != nil {
		return err
	}
	return s.give(data)
}

func (s *subject) meta() ledger.Meta {
	s.index++
	s.at = s.at.Add(100 * time.Millisecond) // ten changes a second, so that 6,000 answers are remembered
	return ledger.Meta{At: s.at, By: "spiffe://bench.example/operator/ann", Request: fleet.RequestID(fmt.Sprint(s.index))}
}

// give applies a change and wants it taken.
func (s *subject) give(data []byte) error {
	ans, err := s.book.Apply(s.index, data)
	if err == nil && !bytes.HasPrefix(ans, []byte(`{"fault":"",`)) {
		err = fmt.Errorf("refused: %s", ans)
	}
	return err
}

func name(i int) fleet.ApplianceID { return fleet.ApplianceID(fmt.Sprintf("appliance-%06d", i)) }

// fill makes a book of n appliances, each registered.
func fill(n int) (*subject, error) {
	s := &subject{book: book.NewBook(), n: n, at: time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)}
	issuer, err := identitytest.NewIssuer("https://issuer.bench.example")
	if err != nil {
		return nil, err
	}
	if s.expect, err = json.Marshal(issuer.Expect("demarc", "appliance")); err != nil {
		return nil, err
	}
	if err := apply(s, book.RegisterCustomer{Name: "globex"}); err != nil {
		return nil, err
	}
	for i := range n {
		if err := apply(s, book.RegisterAppliance{Name: name(i), Customer: "globex", Expect: s.expect}); err != nil {
			return nil, err
		}
	}
	return s, nil
}

// turn makes a block of changes of random appliances, each rehearsed first, as the leader does.
func (s *subject) turn(r *rand.Rand) error {
	var list [][]byte
	from := s.index + 1
	for range block {
		data, err := ledger.Encode(s.meta(), book.SetExpect{Name: name(r.IntN(s.n)), Expect: s.expect})
		if err != nil {
			return err
		}
		list = append(list, data)
	}
	t := computed()
	for i, data := range list {
		s.index = from + uint64(i)
		if err := s.book.DryRun(data); err != nil {
			return err
		}
		if err := s.give(data); err != nil {
			return err
		}
	}
	s.took = append(s.took, float64((computed()-t).Microseconds())/block)
	return nil
}

// computed is the processor time of this process so far, the collection of garbage included: what else the machine does is
// not in it.
func computed() time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

func median(v []float64) float64 {
	v = slices.Sorted(slices.Values(v))
	return v[len(v)/2]
}

func run(few, n, rounds int) error {
	small, err := fill(few)
	if err != nil {
		return err
	}
	begun := time.Now()
	large, err := fill(n)
	if err != nil {
		return err
	}
	fmt.Printf("%d appliances registered in %.1f s\n", n, time.Since(begun).Seconds())
	r := rand.New(rand.NewPCG(1, 2))
	for _, s := range []*subject{small, large} { // until as many answers are remembered as ever will be
		for end := s.at.Add(ledger.Remember); s.at.Before(end); {
			if err := s.turn(r); err != nil {
				return err
			}
		}
		s.took = nil
	}
	for range rounds { // in turns, so that what else the machine does meets both
		for _, s := range []*subject{small, large} {
			if err := s.turn(r); err != nil {
				return err
			}
		}
	}
	result(fmt.Sprintf("a change, rehearsed and applied, at %d appliances, against %d", n, few), median(large.took), median(small.took), "us")
	return snapshot(large)
}

// result prints a figure; a ratio above 1 means that ours is the better one.
func result(what string, ours, peer float64, unit string) {
	fmt.Printf("RESULT {\"bench\":\"book\",\"case\":%q,\"ours\":%.2f,\"peer\":%.2f,\"ratio\":%.2f,\"unit\":%q}\n", what, ours, peer, peer/ours,
		unit)
}

func alone(what string, ours float64, unit string) {
	fmt.Printf("RESULT {\"bench\":\"book\",\"case\":%q,\"ours\":%.2f,\"peer\":null,\"ratio\":null,\"unit\":%q}\n", what, ours, unit)
}

func snapshot(s *subject) error {
	runtime.GC()
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	t := time.Now()
	w, err := s.book.Snapshot()
	if err != nil {
		return err
	}
	alone("taking a snapshot, for which the book waits", float64(time.Since(t).Nanoseconds())/1e3, "us")
	t, used := time.Now(), computed()
	if _, err := w.WriteTo(io.Discard); err != nil {
		return err
	}
	wrote := time.Since(t)
	used = computed() - used
	runtime.ReadMemStats(&after)
	var b bytes.Buffer
	if _, err := w.WriteTo(&b); err != nil {
		return err
	}
	alone("writing a snapshot, beside the book", wrote.Seconds(), "s")
	alone("processor time of it", used.Seconds(), "s")
	alone("memory that writing it asks for", float64(after.TotalAlloc-before.TotalAlloc)/(1<<20), "MiB")
	alone("size of a snapshot", float64(b.Len())/(1<<20), "MiB")
	fresh := book.NewBook()
	t, used = time.Now(), computed()
	if err := fresh.Restore(&b); err != nil {
		return err
	}
	alone("restoring it, with the root of the audit log", time.Since(t).Seconds(), "s")
	alone("processor time of that", (computed() - used).Seconds(), "s")
	if a, b := fresh.Log().Root(), s.book.Log().Root(); a != b || len(fresh.View().Appliances()) != s.n {
		return fmt.Errorf("the restored book is another one")
	}
	return nil
}
