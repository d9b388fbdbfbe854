// SPDX-License-Identifier: Apache-2.0

package controlplane

import (
	"net"
	"sync/atomic"
	"time"
)

// turn is a connection whose handshake computes only while it has a turn; to wait for bytes it gives the turn back.
type turn struct {
	net.Conn
	door  *Listener     // that holds it; nil for none
	turns chan struct{} // nil once the handshake is over
	came  time.Time
	from  string // its source

	closed atomic.Pointer[func()] // called once it is closed; nil for none

	spoke  atomic.Bool  // its peer said something
	since  atomic.Int64 // when it began to wait for bytes, after came; 0 while it does not
	waited atomic.Int64 // for bytes, before that
}

func (t *turn) take() { t.turns <- struct{}{} } // Go serves those that wait here in order
func (t *turn) give() { <-t.turns }

// NetConn gives the connection beneath.
func (t *turn) NetConn() net.Conn { return t.Conn }

// Close implements net.Conn.
func (t *turn) Close() error {
	if t.door != nil {
		t.door.release(t)
	}
	if f := t.closed.Swap(nil); f != nil {
		(*f)()
	}
	return t.Conn.Close()
}

// Read implements net.Conn.
func (t *turn) Read(p []byte) (int, error) {
	if t.turns == nil {
		return t.Conn.Read(p)
	}
	t.give()
	defer t.take()
	began := time.Since(t.came)
	t.since.Store(int64(max(began, 1)))
	n, err := t.Conn.Read(p)
	t.since.Store(0)
	t.waited.Add(int64(time.Since(t.came) - began))
	if n > 0 {
		t.spoke.Store(true)
	}
	return n, err
}

// overdue is how much longer the peer has been silent than it may be while others wait; less than 0 where it has time left.
func (t *turn) overdue(wait time.Duration) time.Duration {
	now, since := time.Since(t.came), time.Duration(t.since.Load())
	switch {
	case since == 0:
		return -glance // it computes
	case !t.spoke.Load():
		return min(now-silentWait, now-since-glance)
	}
	return time.Duration(t.waited.Load()) + now - since - wait
}
