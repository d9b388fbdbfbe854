// SPDX-License-Identifier: Apache-2.0

package admission

import (
	"net"
	"sync/atomic"
	"time"
)

// handshake is a connection whose handshake computes only while it has a slot; it releases the slot while it waits for bytes.
type handshake struct {
	net.Conn
	listener *Listener     // that admitted it; nil for none
	slots    chan struct{} // nil once the handshake is over
	accepted time.Time
	network  string // its source

	closed atomic.Pointer[func()] // called once it is closed; nil for none

	spoke  atomic.Bool  // its peer sent something
	since  atomic.Int64 // when it began to wait for bytes, after came; 0 while it does not
	waited atomic.Int64 // for bytes, before that
}

func (t *handshake) acquire() { t.slots <- struct{}{} } // senders on a channel are served in order
func (t *handshake) release() { <-t.slots }

// NetConn returns the underlying connection.
func (t *handshake) NetConn() net.Conn { return t.Conn }

// Close implements net.Conn.
func (t *handshake) Close() error {
	if t.listener != nil {
		t.listener.release(t)
	}
	if f := t.closed.Swap(nil); f != nil {
		(*f)()
	}
	return t.Conn.Close()
}

// Read implements net.Conn.
func (t *handshake) Read(p []byte) (int, error) {
	if t.slots == nil {
		return t.Conn.Read(p)
	}
	t.release()
	defer t.acquire()
	began := time.Since(t.accepted)
	t.since.Store(int64(max(began, 1)))
	n, err := t.Conn.Read(p)
	t.since.Store(0)
	t.waited.Add(int64(time.Since(t.accepted) - began))
	if n > 0 {
		t.spoke.Store(true)
	}
	return n, err
}

// overdue is how much longer the peer has been silent than permitted while others wait; less than 0 if it has time left.
func (t *handshake) overdue(wait time.Duration) time.Duration {
	now, since := time.Since(t.accepted), time.Duration(t.since.Load())
	switch {
	case since == 0:
		return -stallCheck // it computes
	case !t.spoke.Load():
		return min(now-silentWait, now-since-stallCheck)
	}
	return time.Duration(t.waited.Load()) + now - since - wait
}
