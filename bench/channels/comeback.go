// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"
)

// comeback is how a crowd came back after the kill. Times are since then.
type comeback struct {
	dialled []time.Duration // the beginning of the dial that got through, of each client; sorted
	came    []time.Duration // its welcome, sorted
	slowest time.Duration   // between the two, of one client
	tries   int             // the most dials of one client
}

func (f *crowd) comeback() (b comeback) {
	for _, c := range f.clients {
		c.mu.Lock()
		b.dialled = append(b.dialled, c.dial)
		b.came = append(b.came, c.came)
		b.slowest = max(b.slowest, c.came-c.dial)
		b.tries = max(b.tries, c.tries)
		c.mu.Unlock()
	}
	slices.Sort(b.dialled)
	slices.Sort(b.came)
	return b
}

func (b comeback) last() time.Duration { return b.came[len(b.came)-1] }

// print draws when the clients dialled, which shows the jitter, and when they were welcome.
func (b comeback) print() {
	width := 50 * time.Millisecond
	for _, w := range []time.Duration{100 * time.Millisecond, 250 * time.Millisecond, 500 * time.Millisecond, time.Second, 2 * time.Second,
		5 * time.Second, time.Minute} {
		if b.last() > 20*width {
			width = w
		}
	}
	fmt.Printf("  %-16s %-36s %s\n", "after the kill", "dialled", "back")
	for from := time.Duration(0); from <= b.last(); from += width {
		d, c := within(b.dialled, from, from+width), within(b.came, from, from+width)
		fmt.Printf("  %5.2f to %5.2f s %6d %-29s %6d %s\n", from.Seconds(), (from + width).Seconds(), d, bar(d, len(b.came)), c,
			bar(c, len(b.came)))
	}
}

func within(sorted []time.Duration, from, to time.Duration) int {
	a, _ := slices.BinarySearchFunc(sorted, from, cmp.Compare[time.Duration])
	b, _ := slices.BinarySearchFunc(sorted, to, cmp.Compare[time.Duration])
	return b - a
}

func bar(n, of int) string { return strings.Repeat("#", (n*100+of-1)/of) }
