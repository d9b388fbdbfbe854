// SPDX-License-Identifier: Apache-2.0

package raft

import (
	"context"
	"sync"
	"sync/atomic"

	"github.com/demarc-dev/demarc/fault"
)

// Bounds of the queue. What is over them is refused as busy.
const (
	queueBytes = 64 << 20
	queueCount = 16 << 10
)

// proposal is one on its way into the log.
type proposal struct {
	data   []byte
	taken  atomic.Bool // into an entry, or given up: whatever sets it first decides
	answer chan result
}

type result struct {
	ans []byte
	err error
}

// queue holds proposals while an entry is being written.
type queue struct {
	mu     sync.Mutex
	list   []*proposal
	bytes  int
	busy   int           // packs that are being written
	wake   chan struct{} // holds a token while something waits
	idle   chan struct{} // closed, and made anew, when nothing waits and nothing is being written
	closed bool
}

func newQueue() *queue { return &queue{wake: make(chan struct{}, 1), idle: make(chan struct{})} }

func (q *queue) put(w *proposal) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.closed {
		return errClosing
	}
	if q.bytes+len(w.data) > queueBytes || len(q.list) >= queueCount {
		return fault.New("raft.Propose", fault.Busy, "%d proposals of %d bytes wait already: try again in a moment", len(q.list), q.bytes)
	}
	q.list, q.bytes = append(q.list, w), q.bytes+len(w.data)
	wake(q.wake)
	return nil
}

// take returns the next pack, nil if nothing waits. Whoever gets one calls done.
func (q *queue) take() []*proposal {
	q.mu.Lock()
	defer q.mu.Unlock()
	var out []*proposal
	size := 0
	for len(q.list) > 0 && len(out) < packCount {
		w := q.list[0]
		if len(out) > 0 && size+len(w.data) > packBytes {
			break
		}
		q.list[0] = nil
		q.list, q.bytes = q.list[1:], q.bytes-len(w.data)
		if w.taken.CompareAndSwap(false, true) {
			out, size = append(out, w), size+len(w.data)
		}
	}
	if len(q.list) > 0 {
		wake(q.wake)
	}
	if len(out) > 0 {
		q.busy++
	}
	q.announceIdle()
	return out
}

func (q *queue) done() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.busy--
	q.announceIdle()
}

func (q *queue) isIdle() bool { return q.busy == 0 && len(q.list) == 0 }

// announceIdle wakes waitIdle. The lock is held.
func (q *queue) announceIdle() {
	if q.isIdle() {
		close(q.idle)
		q.idle = make(chan struct{})
	}
}

// waitIdle waits until nothing waits and nothing is being written.
func (q *queue) waitIdle(ctx context.Context) error {
	for {
		q.mu.Lock()
		idle, done := q.idle, q.isIdle()
		q.mu.Unlock()
		if done {
			return nil
		}
		select {
		case <-idle:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// refuse answers all that wait.
func (q *queue) refuse(err error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for _, w := range q.list {
		if w.taken.CompareAndSwap(false, true) {
			w.answer <- result{err: err}
		}
	}
	q.list, q.bytes = nil, 0
	q.announceIdle()
}

func (q *queue) close() {
	q.mu.Lock()
	q.closed = true
	q.mu.Unlock()
	q.refuse(errClosing)
}
