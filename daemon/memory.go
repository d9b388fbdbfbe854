// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"math"
	"os"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"sync"
)

// How much memory may lie unused between two collections: what is in use may grow by the larger of the two.
const (
	slackBytes   = 64 << 20
	slackPercent = 40
)

// Memory has the collector of this process leave less memory unused. By itself it lets the heap grow to twice what is in
// use before it collects, and a node with ten thousand idle channels would hold as much again for nothing. From here on a
// collection begins when the heap has grown by 64 MiB or by 40%, whichever is more, and never later than it would have by
// itself. It is paid for with collections: a process that has 500 MiB in use and allocates without a pause collects two and a
// half times as often.
//
// What the operator has said in GOGC goes before: then nothing is done. A limit in GOMEMLIMIT holds beside it. Memory wakes
// nothing: it looks at the heap after each collection. Calls after the first do nothing.
func Memory() {
	if _, said := os.LookupEnv("GOGC"); !said {
		pace()
	}
}

var pace = sync.OnceFunc(func() {
	var p pacer
	p.look()
	p.again()
})

// pacer sets the growth, in percent, after each collection. The runtime calls it from one goroutine.
type pacer struct{ percent int }

// again has the runtime look after the next collection: by then the mark is garbage.
func (p *pacer) again() {
	type mark struct{ _ [16]byte }
	runtime.AddCleanup(&mark{}, func(p *pacer) { p.look(); p.again() }, p)
}

func (p *pacer) look() {
	s := []metrics.Sample{{Name: "/gc/heap/live:bytes"}, {Name: "/gc/scan/stack:bytes"}, {Name: "/gc/scan/globals:bytes"}}
	metrics.Read(s)
	var base uint64 // what the collector takes its percentage of
	for _, one := range s {
		base += one.Value.Uint64()
	}
	want := percentFor(base)
	if diff := want - p.percent; diff <= -5 || diff >= 5 { // to set it stops the program for a moment
		p.percent = want
		debug.SetGCPercent(want)
	}
}

// percentFor is the growth for a heap of which so many bytes are in use.
func percentFor(base uint64) int {
	percent := math.Ceil(slackBytes * 100 / math.Max(float64(base), 1))
	return int(min(max(percent, slackPercent), 100))
}
