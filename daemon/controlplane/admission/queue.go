// SPDX-License-Identifier: Apache-2.0

package admission

import (
	"net"
	"slices"
	"time"
)

// waiting is a connection that waits for its handshake to begin.
type waiting struct {
	conn  net.Conn
	since time.Time
	from  string // its source
}

// fairQueue is the waiting connections: one FIFO queue for each source, served round robin. The first of one source is served before the
// second of any other.
type fairQueue struct {
	of    map[string]*networkQueue
	order []*networkQueue // the next one first
	n     int
}

type networkQueue struct {
	from string
	list []waiting
}

// push adds w. If most wait already, it returns the connection to close for it: the oldest of the longest queue.
func (q *fairQueue) push(w waiting, most int) (out net.Conn) {
	if q.of == nil {
		q.of = map[string]*networkQueue{}
	}
	if q.n >= most {
		longest := q.order[0]
		for _, l := range q.order {
			if len(l.list) > len(longest.list) {
				longest = l
			}
		}
		out = q.take(longest).conn
	}
	l := q.of[w.from]
	if l == nil {
		l = &networkQueue{from: w.from}
		q.of[w.from], q.order = l, append(q.order, l)
	}
	l.list = append(l.list, w)
	q.n++
	return out
}

// take removes the first of a source's queue. An empty queue is removed.
func (q *fairQueue) take(l *networkQueue) waiting {
	w := l.list[0]
	l.list[0] = waiting{}
	l.list = l.list[1:]
	q.n--
	if len(l.list) == 0 {
		delete(q.of, l.from)
		for i, o := range q.order {
			if o == l {
				q.order = append(q.order[:i], q.order[i+1:]...)
				break
			}
		}
	}
	return w
}

// pop removes the next connection.
func (q *fairQueue) pop() (waiting, bool) {
	if q.n == 0 {
		*q = fairQueue{} // frees the arrays of a storm
		return waiting{}, false
	}
	l := q.order[0]
	w := q.take(l)
	if len(l.list) > 0 {
		q.order = append(q.order[1:], l)
	}
	return w, true
}

// before removes those that have waited since before a time, or all of them if it is zero.
func (q *fairQueue) before(since time.Time) (out []waiting) {
	for _, l := range slices.Clone(q.order) {
		for len(l.list) > 0 && (since.IsZero() || l.list[0].since.Before(since)) {
			out = append(out, q.take(l))
		}
	}
	return out
}

// others reports whether a source other than from waits.
func (q *fairQueue) others(from string) bool {
	return len(q.order) > 1 || len(q.order) == 1 && q.order[0].from != from
}
