// SPDX-License-Identifier: Apache-2.0

package fleettest

import (
	"bytes"
	"io"
	"net"
	"os"
	"sync"
	"time"
)

// half is one direction of a wire: what is written waits until it is read. A writer never waits.
type half struct {
	mu     sync.Mutex
	more   *sync.Cond
	buf    bytes.Buffer
	closed bool // by either side
	left   bool // by the side that reads
	held   bool // what is written stays where it is, and so does that the writer closed
	until  time.Time
	alarm  *time.Timer
}

func newHalf() *half {
	h := &half{}
	h.more = sync.NewCond(&h.mu)
	return h
}

func (h *half) read(p []byte) (int, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for {
		switch {
		case h.left && h.held:
			return 0, io.ErrClosedPipe
		case h.buf.Len() > 0 && !h.held:
			return h.buf.Read(p)
		case h.closed && !h.held:
			return 0, io.EOF
		case !h.until.IsZero() && !time.Now().Before(h.until):
			return 0, os.ErrDeadlineExceeded
		}
		h.more.Wait()
	}
}

func (h *half) write(p []byte) (int, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.closed {
		return 0, io.ErrClosedPipe
	}
	h.more.Broadcast()
	return h.buf.Write(p)
}

func (h *half) close(reads bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.closed = true
	h.left = h.left || reads
	if reads && h.alarm != nil { // who is held from seeing the end still has a deadline
		h.alarm.Stop()
	}
	h.more.Broadcast()
}

func (h *half) hold(held bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.held = held
	h.more.Broadcast()
}

func (h *half) deadline(t time.Time) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.until = t
	if h.alarm != nil {
		h.alarm.Stop()
		h.alarm = nil
	}
	if !t.IsZero() && !h.left {
		h.alarm = time.AfterFunc(time.Until(t), func() {
			h.mu.Lock()
			defer h.mu.Unlock()
			h.more.Broadcast()
		})
	}
	h.more.Broadcast()
}

// end is one end of a wire. It is a net.Conn that keeps what it carries in memory, so that it works in fake time.
type end struct{ in, out *half }

func wire() (client, server *end) {
	a, b := newHalf(), newHalf()
	return &end{a, b}, &end{b, a}
}

type place string

func (place) Network() string  { return "memory" }
func (p place) String() string { return string(p) }

func (e *end) Read(p []byte) (int, error)        { return e.in.read(p) }
func (e *end) Write(p []byte) (int, error)       { return e.out.write(p) }
func (e *end) LocalAddr() net.Addr               { return place("here") }
func (e *end) RemoteAddr() net.Addr              { return place("there") }
func (e *end) SetReadDeadline(t time.Time) error { e.in.deadline(t); return nil }
func (e *end) SetWriteDeadline(time.Time) error  { return nil } // a writer never waits
func (e *end) SetDeadline(t time.Time) error     { return e.SetReadDeadline(t) }
func (e *end) Close() error {
	e.in.close(true)
	e.out.close(false)
	return nil
}

// hold has neither side hear anything of the other, not even its end: what a program that hangs looks like, while its
// kernel lives and takes what is written.
func (e *end) hold(held bool) {
	e.in.hold(held)
	e.out.hold(held)
}

// door is a listener of such ends.
type door struct {
	in    chan net.Conn
	once  sync.Once
	ended chan struct{}
}

func newDoor() *door { return &door{in: make(chan net.Conn), ended: make(chan struct{})} }

// Accept implements net.Listener.
func (d *door) Accept() (net.Conn, error) {
	select {
	case c := <-d.in:
		return c, nil
	case <-d.ended:
		return nil, net.ErrClosed
	}
}

// Close implements net.Listener.
func (d *door) Close() error { d.once.Do(func() { close(d.ended) }); return nil }

// Addr implements net.Listener.
func (d *door) Addr() net.Addr { return place("node") }
