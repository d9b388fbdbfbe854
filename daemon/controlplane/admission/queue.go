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

// fairQueue is the connections that wait: one line a source, first come first served in each, and the lines take turns. Who
// comes alone goes before the second of a thousand.
type fairQueue struct {
	of   map[string]*networkQueue
	turn []*networkQueue // the next one first
	n    int
}

type networkQueue struct {
	from string
	list []waiting
}

// push adds w and gives the connection that must go for it, the oldest of the longest line, where most wait already.
func (q *fairQueue) push(w waiting, most int) (out net.Conn) {
	if q.of == nil {
		q.of = map[string]*networkQueue{}
	}
	if q.n >= most {
		longest := q.turn[0]
		for _, l := range q.turn {
			if len(l.list) > len(longest.list) {
				longest = l
			}
		}
		out = q.take(longest).conn
	}
	l := q.of[w.from]
	if l == nil {
		l = &networkQueue{from: w.from}
		q.of[w.from], q.turn = l, append(q.turn, l)
	}
	l.list = append(l.list, w)
	q.n++
	return out
}

// take takes the first of a line. A line that is empty leaves.
func (q *fairQueue) take(l *networkQueue) waiting {
	w := l.list[0]
	l.list[0] = waiting{}
	l.list = l.list[1:]
	q.n--
	if len(l.list) == 0 {
		delete(q.of, l.from)
		for i, o := range q.turn {
			if o == l {
				q.turn = append(q.turn[:i], q.turn[i+1:]...)
				break
			}
		}
	}
	return w
}

// pop takes the next.
func (q *fairQueue) pop() (waiting, bool) {
	if q.n == 0 {
		*q = fairQueue{} // a storm's arrays are not kept
		return waiting{}, false
	}
	l := q.turn[0]
	w := q.take(l)
	if len(l.list) > 0 {
		q.turn = append(q.turn[1:], l)
	}
	return w, true
}

// before takes those that have waited since before a time, or all of them where it is zero.
func (q *fairQueue) before(since time.Time) (out []waiting) {
	for _, l := range slices.Clone(q.turn) {
		for len(l.list) > 0 && (since.IsZero() || l.list[0].since.Before(since)) {
			out = append(out, q.take(l))
		}
	}
	return out
}

// others tells whether any line but that of from waits.
func (q *fairQueue) others(from string) bool {
	return len(q.turn) > 1 || len(q.turn) == 1 && q.turn[0].from != from
}
