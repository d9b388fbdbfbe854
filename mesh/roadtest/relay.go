// SPDX-License-Identifier: Apache-2.0

package roadtest

import (
	"context"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// Mode is what a relay does with the bytes.
type Mode string

// The modes.
const (
	Pass      Mode = "pass"
	Slow      Mode = "slow"       // each chunk waits for Delay, each way
	BlackHole Mode = "black hole" // nothing is written any more, and all stays open; what waits goes on when it is healed
	HalfOpen  Mode = "half-open"  // towards the target it goes on, back it does not
	Reset     Mode = "reset"      // every connection, and each new one, is reset
	Swallow   Mode = "swallow"    // of a new connection whose first TLS record is longer than Packet nothing goes on, and all stays open
)

// Packet is how long a first record may be that the mode Swallow lets through, in bytes.
const Packet = 1400

// Delay is that of the mode Slow.
const Delay = 2 * time.Second

// Relay passes TCP on. Safe for concurrent use.
type Relay struct {
	Target string
	Dial   Dial // nil: the system's

	mu      sync.Mutex
	mode    Mode
	changed chan struct{}
	conns   map[net.Conn]bool

	waited    [2]atomic.Int64 // pieces that waited for all of Delay: towards the target, and back
	swallowed atomic.Int64
}

// Waited is how many pieces waited for all of [Delay], each way.
func (r *Relay) Waited() (to, back int64) { return r.waited[0].Load(), r.waited[1].Load() }

// Swallowed is how many connections had a first record that was swallowed.
func (r *Relay) Swallowed() int64 { return r.swallowed.Load() }

// Serve takes connections until the listener is closed.
func (r *Relay) Serve(ln net.Listener) {
	for {
		c, err := ln.Accept()
		if err != nil {
			return
		}
		go r.serve(c)
	}
}

// Set changes the mode, for connections that are open too.
func (r *Relay) Set(m Mode) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.mode = m
	if r.changed != nil {
		close(r.changed)
		r.changed = nil
	}
	if m == Reset {
		r.cut()
	}
}

// Cut resets every connection that is open.
func (r *Relay) Cut() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.cut()
}

func (r *Relay) cut() {
	for c := range r.conns {
		reset(c)
	}
}

func (r *Relay) now() (Mode, <-chan struct{}) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.changed == nil {
		r.changed = make(chan struct{})
	}
	return r.mode, r.changed
}

func (r *Relay) track(c net.Conn, is bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.conns == nil {
		r.conns = map[net.Conn]bool{}
	}
	if is {
		r.conns[c] = true
	} else {
		delete(r.conns, c)
	}
}

func (r *Relay) serve(down net.Conn) {
	defer down.Close()
	if m, _ := r.now(); m == Reset {
		reset(down)
		return
	}
	dial := r.Dial
	if dial == nil {
		dial = new(net.Dialer).DialContext
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	up, err := dial(ctx, "tcp", r.Target)
	cancel()
	if err != nil {
		return
	}
	defer up.Close()
	for _, c := range []net.Conn{down, up} {
		r.track(c, true)
		defer r.track(c, false)
	}
	gone := make(chan struct{})
	end := sync.OnceFunc(func() { close(gone); down.Close(); up.Close() })
	var wg sync.WaitGroup
	wg.Go(func() { defer end(); r.pump(down, up, false, gone) })
	wg.Go(func() { defer end(); r.pump(up, down, true, gone) })
	wg.Wait()
}

// chunk is bytes and when they came.
type chunk struct {
	b  []byte
	at time.Time
}

// pump passes one direction on. Back is the one towards the caller.
func (r *Relay) pump(from, to net.Conn, back bool, gone chan struct{}) {
	line := make(chan chunk, 64)
	go func() {
		defer close(line)
		for {
			b := make([]byte, 16<<10)
			n, err := from.Read(b)
			if n > 0 {
				select {
				case line <- chunk{b[:n], time.Now()}:
				case <-gone:
					return
				}
			}
			if err != nil {
				return
			}
		}
	}()
	first := !back
	for c := range line {
		if m, _ := r.now(); first && m == Swallow && TooLong(c.b) {
			r.swallowed.Add(1)
			for { // what follows is read, and goes nowhere
				select {
				case _, open := <-line:
					if !open {
						return
					}
				case <-gone:
					return
				}
			}
		}
		first = false
		if !r.free(c, back, gone) {
			return
		}
		if _, err := to.Write(c.b); err != nil {
			return
		}
	}
	// The end goes the way of the bytes: over a black hole nobody hears of it.
	r.free(chunk{at: time.Now()}, back, gone)
}

// TooLong reports whether b begins with the head of a TLS record that is longer than [Packet].
func TooLong(b []byte) bool {
	return len(b) >= 5 && b[0] == 22 && 5+(int(b[3])<<8|int(b[4])) > Packet
}

// free waits until a chunk may go on; false when the connection is gone.
func (r *Relay) free(c chunk, back bool, gone <-chan struct{}) bool {
	for {
		m, changed := r.now()
		var wait <-chan time.Time
		switch {
		case m == BlackHole, m == HalfOpen && back:
		case m == Slow && time.Until(c.at.Add(Delay)) > 0:
			wait = time.After(time.Until(c.at.Add(Delay)))
		case m == Slow:
			r.waited[map[bool]int{false: 0, true: 1}[back]].Add(1)
			return true
		default:
			return true
		}
		select {
		case <-changed:
		case <-wait:
		case <-gone:
			return false
		}
	}
}
