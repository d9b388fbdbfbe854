// SPDX-License-Identifier: Apache-2.0

// Package forward sends requests to other nodes and answers theirs, many at a time over one connection to each.
//
// It is what a follower uses to pass a proposal on to the leader. A connection must be mutually authenticated before it is
// handed to this package; see [Conn]. The protocol is demarc-forward/1: both sides send frames, and responses come in any
// order.
//
//	length of the rest, 4 bytes | id of the request, 8 bytes | kind, 1 byte | payload
//
// All numbers are big endian. A request other than 't' begins with 4 bytes of its timeout in ms. The kinds that this
// package knows are
//
//	't'  request: the term of the answerer; with id 0 it is the keepalive, which a client sends every 2 s
//	'g'  request, or notice with id 0: the receiver was removed by the configuration of an index, 8 bytes
//	'a'  response: what the handler returned
//	'f'  response: a fault, as its kind, a line feed and its sentence
//	'n'  the same, and the request must not be repeated at once; see [Permanent]
//	'e'  notice with id 0: the sender ends, and took nothing that it has not answered
//
// Either side drops a connection on which it hears nothing for 6 s. A server that ends reads no more, answers what it has
// read, and then sends 'e': what has no response by then was not taken, and may be sent to another node. If a connection
// breaks without it, the requests that were sent whole are in doubt; one of which only a part was sent was not taken.
package forward

import (
	"encoding/binary"
	"errors"
	"io"
	"net"
	"strings"
	"sync"
	"time"

	"github.com/demarc-dev/demarc/fault"
)

// MaxPayload bounds what a request or a response carries, in bytes.
const MaxPayload = 16 << 20

// Kind is what a frame means. The values are part of the wire format.
type Kind byte

// The kinds of requests that this package knows; those of its users must differ from all of the package comment.
const (
	Term    Kind = 't'
	Removed Kind = 'g'

	responseOK        Kind = 'a'
	responseFault     Kind = 'f'
	responsePermanent Kind = 'n'
	noticeEnd         Kind = 'e'
)

const (
	frameHead    = 9 // what the length counts beside the payload
	timeoutBytes = 4
	maxFrame     = frameHead + timeoutBytes + MaxPayload

	maxInFlight = 4096             // requests of one connection at a time; the next is refused as busy
	maxTimeout  = 30 * time.Second // of one request

	keepaliveEvery = 2 * time.Second
	idleTimeout    = 3 * keepaliveEvery
	lingerTimeout  = time.Second // for the peer to read the last responses, and that this is the end
	bufferBytes    = 64 << 10
)

// Conn is a connection to a node whose identity is proven.
type Conn interface {
	net.Conn
	Peer() string          // its id; "" if nodes are not told apart
	Abort()                // Close without a TLS goodbye, which would wait for a peer that does not read
	Done() <-chan struct{} // closed when the connection is
}

// frame is one message in either direction.
type frame struct {
	id      uint64
	kind    Kind
	payload []byte
}

func writeFrame(w io.Writer, f frame) error {
	b := make([]byte, 4+frameHead, 4+frameHead+len(f.payload))
	binary.BigEndian.PutUint32(b, uint32(frameHead+len(f.payload)))
	binary.BigEndian.PutUint64(b[4:], f.id)
	b[12] = byte(f.kind)
	_, err := w.Write(append(b, f.payload...))
	return err
}

func readFrame(r io.Reader) (frame, error) {
	var head [4]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return frame{}, err
	}
	n := binary.BigEndian.Uint32(head[:])
	if n < frameHead || n > maxFrame {
		return frame{}, fault.New("forward.readFrame", fault.Invalid, "a frame of %d bytes", n)
	}
	var b strings.Builder // grows with what comes, not with what is announced
	if _, err := io.CopyN(&b, r, int64(n)); err != nil {
		return frame{}, err
	}
	s := b.String()
	return frame{binary.BigEndian.Uint64([]byte(s[:8])), Kind(s[8]), []byte(s[9:])}, nil
}

func number(n uint64) []byte { return binary.BigEndian.AppendUint64(nil, n) }

// permanent is an error made by Permanent.
type permanent struct{ error }

// Permanent marks a failure that must not be repeated at once, though nothing was done. The mark goes over the wire.
func Permanent(err error) error { return &permanent{err} }

// Unwrap implements the interface of package errors.
func (p *permanent) Unwrap() error { return p.error }

// IsPermanent reports whether an error is marked by [Permanent], here or by the node that answered.
func IsPermanent(err error) bool {
	var p *permanent
	return errors.As(err, &p)
}

// responseOf is the response with an error.
func responseOf(id uint64, err error) frame {
	kind := responseFault
	if IsPermanent(err) {
		kind = responsePermanent
	}
	return frame{id, kind, []byte(string(fault.Of(err)) + "\n" + fault.Text(err))}
}

// errorOf is the inverse of responseOf. An answer that can't be understood is [fault.Unsure].
func errorOf(f frame) error {
	const op = "forward.Call"
	word, text, _ := strings.Cut(string(f.payload), "\n")
	k := fault.Kind(word)
	switch {
	case k.Known() && f.kind == responsePermanent:
		return Permanent(fault.New(op, k, "%s", text))
	case k.Known() && f.kind == responseFault:
		return fault.New(op, k, "%s", text)
	}
	return fault.New(op, fault.Unsure, "the node gave an answer that this build does not understand")
}

// NotifyRemoved writes to a caller, instead of serving it, that it was removed by the configuration of an index.
func NotifyRemoved(c net.Conn, index uint64) error {
	if err := c.SetWriteDeadline(time.Now().Add(idleTimeout)); err != nil {
		return err
	}
	return writeFrame(c, frame{0, Removed, number(index)})
}

// CallRemoved is the only request on a connection: the peer was removed by the configuration of an index. It returns when
// the peer has answered.
func CallRemoved(c net.Conn, index uint64) error {
	if err := c.SetDeadline(time.Now().Add(idleTimeout)); err != nil {
		return err
	}
	timeout := binary.BigEndian.AppendUint32(nil, uint32(time.Second.Milliseconds()))
	if err := writeFrame(c, frame{1, Removed, append(timeout, number(index)...)}); err != nil {
		return err
	}
	_, err := readFrame(c)
	return err
}

// idleConn breaks when nothing comes for a while, or when it is told to stop reading.
type idleConn struct {
	Conn
	mu      sync.Mutex
	stopped bool
}

// Read implements net.Conn.
func (c *idleConn) Read(b []byte) (int, error) {
	c.mu.Lock()
	if c.stopped {
		c.mu.Unlock()
		return 0, net.ErrClosed
	}
	_ = c.SetReadDeadline(time.Now().Add(idleTimeout))
	c.mu.Unlock()
	return c.Conn.Read(b)
}

// stop ends the reading. What is being written has a moment more, so that a peer that does not read delays no end.
func (c *idleConn) stop() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.stopped = true
	_ = c.SetReadDeadline(time.Unix(1, 0))
	_ = c.SetWriteDeadline(time.Now().Add(lingerTimeout))
}

// allowWrite sets the deadline of the next response.
func (c *idleConn) allowWrite() {
	c.mu.Lock()
	defer c.mu.Unlock()
	wait := idleTimeout
	if c.stopped {
		wait = lingerTimeout
	}
	_ = c.SetWriteDeadline(time.Now().Add(wait))
}

func (c *idleConn) isStopped() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.stopped
}
