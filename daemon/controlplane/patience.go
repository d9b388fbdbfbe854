// SPDX-License-Identifier: Apache-2.0

package controlplane

import (
	"container/heap"
	"math/bits"
	"sync"
	"time"

	"github.com/demarc-dev/demarc/api/channel"
	"github.com/demarc-dev/demarc/fault"
)

// patience ends the channels on which nothing was heard in time. One timer serves all channels of a node: a deadline of its
// own would wake the process for each of them. A channel is looked at when its silence could have ended it; what is heard
// on it meanwhile moves nothing, and puts off the end when the look comes.
type patience struct {
	born time.Time // the times below are after it, by the monotonic clock

	mu    sync.Mutex
	looks looks
	timer *time.Timer   // nil until there is a channel
	next  time.Duration // when timer fires; 0: it does not
}

var errSilent = fault.New("controlplane.Channel", fault.Unavailable, "nothing was heard from the appliance in time")

// coarse is into how many parts a wait is divided, at least: looks are put off to the next full part, so that many of them need one
// wake-up, and a channel ends that much later at most.
const coarse = 32

func newPatience() *patience { return &patience{born: time.Now()} }

func (p *patience) now() time.Duration { return time.Since(p.born) }

// keep begins to watch over l, on which something was heard just now.
func (p *patience) keep(l *live) {
	p.mu.Lock()
	defer p.mu.Unlock()
	l.look = p.full(l.due())
	heap.Push(&p.looks, l)
	p.set()
}

// forget ends that.
func (p *patience) forget(l *live) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if l.looked > 0 {
		heap.Remove(&p.looks, l.looked-1)
	}
}

// sooner takes note that l waits for an answer from now on.
func (p *patience) sooner(l *live) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if look := p.full(l.due()); l.looked > 0 && look < l.look {
		l.look = look
		heap.Fix(&p.looks, l.looked-1)
		p.set()
	}
}

// full is when a channel is looked at that may end at due. The lock is held.
func (p *patience) full(due time.Duration) time.Duration {
	part := time.Duration(1) << bits.Len64(uint64(max(due-p.now(), 0)/(2*coarse))) // a power of two, so that the parts of like waits are the same
	return (due + part - 1) / part * part
}

// set has the timer fire at the first look. The lock is held.
func (p *patience) set() {
	if len(p.looks) == 0 || p.next > 0 && p.next <= p.looks[0].look {
		return // a timer that fires for a channel that is gone sets itself anew
	}
	p.next = p.looks[0].look
	wait := p.next - p.now()
	if p.timer == nil {
		p.timer = time.AfterFunc(wait, p.pass)
		return
	}
	p.timer.Reset(wait)
}

// pass looks at those whose time has come.
func (p *patience) pass() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.next = 0
	for now := p.now(); len(p.looks) > 0 && p.looks[0].look <= now; {
		l := p.looks[0]
		if due := l.due(); due > now {
			l.look = p.full(due)
			heap.Fix(&p.looks, 0)
			continue
		}
		heap.Pop(&p.looks)
		go l.end(errSilent)
	}
	p.set()
}

// looks is a heap of channels by their next look. Each knows its place, from 1 on; 0 is none.
type looks []*live

// Len, Less, Swap, Push and Pop implement [heap.Interface].
func (q looks) Len() int           { return len(q) }
func (q looks) Less(i, j int) bool { return q[i].look < q[j].look }
func (q looks) Swap(i, j int) {
	q[i], q[j] = q[j], q[i]
	q[i].looked, q[j].looked = i+1, j+1
}

func (q *looks) Push(x any) {
	l := x.(*live)
	*q = append(*q, l)
	l.looked = len(*q)
}

func (q *looks) Pop() any {
	last := len(*q) - 1
	l := (*q)[last]
	(*q)[last] = nil
	*q = (*q)[:last]
	l.looked = 0
	return l
}

// beatFor is how often an appliance of a fleet of n speaks, at least, whose road bears that much silence. A beat that comes
// alone wakes an idle node, which costs more than to answer it: where the kernels of both ends watch the path, beats only find what the kernels can't, a peer whose
// program hangs, and are rare. Where they don't, or nothing is known (quiet 0), beats find a dead path, too.
func beatFor(n int, quiet time.Duration) time.Duration {
	if quiet <= channel.KnownQuiet {
		if quiet <= 0 {
			quiet = channel.KnownQuiet
		}
		return max(min(time.Duration(n)*time.Second/beatsEach, quiet), minBeat)
	}
	return max(min(time.Duration(n)*time.Second/rareEach, quiet, channel.MaxQuiet), minBeat)
}

// spreadFor is the time over which the appliances of a fleet of n come back to a node that they lost.
func spreadFor(n int) time.Duration {
	return max(time.Duration(n)*time.Second/backEach, minSpread)
}
