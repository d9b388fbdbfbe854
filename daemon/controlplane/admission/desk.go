// SPDX-License-Identifier: Apache-2.0

package admission

import "runtime"

import "time"

import "crypto/tls"

import "context"

import "net/http"

// Session is a channel on an admitted connection.
type Session interface {
	// Serve runs until the channel has ended.
	Serve()
	// End ends it with a reason. It returns at once.
	End(why error)
}

// Config is what all listeners of a node have in common.
type Config struct {
	Calls http.Handler // answers calls
	// Channel starts a channel on a connection that negotiated one; it returns nil if it refused and closed the connection. Its calls to
	// others end with life.
	Channel func(life context.Context, c *tls.Conn) Session
	// Verified refuses a connection for calls whose handshake is done.
	Verified func(tls.ConnectionState) error
	// Opened is called for a connection for calls, before Verified; end closes it at once. The function that it returns is called when the
	// connection closes.
	Opened func(end func(), state tls.ConnectionState) (closed func())
	// CallsIdle is how long a connection for calls has had none before it may be closed for another one of the same caller; zero
	// means 10 s.
	CallsIdle time.Duration
	Meter     Meter
}

// Desk admits the connections of all listeners of a node. Its methods may be called concurrently.
type Desk struct {
	Config
	slots chan struct{} // handshakes that compute, of all listeners
	conns *connTable
}

// NewDesk makes a desk.
func NewDesk(c Config) *Desk {
	if c.CallsIdle <= 0 {
		c.CallsIdle = callsIdle
	}
	c.Meter = c.Meter.orNone()
	return &Desk{Config: c, slots: make(chan struct{}, slotsEach*runtime.GOMAXPROCS(0)), conns: newConnTable()}
}

// Slots is how many handshakes compute at once.
func (k *Desk) Slots() int { return cap(k.slots) }

// Acquire waits for a slot, and takes it. Waiters are served in order.
func (k *Desk) Acquire() { k.slots <- struct{}{} }

// Release returns a slot.
func (k *Desk) Release() { <-k.slots }

// AtWork is the number of connections for calls that have a call in flight.
func (k *Desk) AtWork() (n int) {
	k.conns.mu.Lock()
	defer k.conns.mu.Unlock()
	for _, o := range k.conns.of {
		if !o.idle {
			n++
		}
	}
	return n
}

// Yield releases the slot of a handshake while f runs.
func (k *Desk) Yield(f func() error) error {
	select {
	case <-k.slots:
		defer func() { k.slots <- struct{}{} }()
	default: // not in a handshake of a listener
	}
	return f()
}
