// SPDX-License-Identifier: Apache-2.0

package forward

import (
	"bufio"
	"context"
	"encoding/binary"
	"sync"
	"time"

	"golang.org/x/sync/semaphore"

	"github.com/demarc-dev/demarc/fault"
)

// ErrClosed is what a call of a client that was closed fails with.
var ErrClosed = fault.New("forward.Call", fault.Unavailable, "this node is stopping: ask another one")

// ClientConfig is what a client needs to know. All fields are required.
type ClientConfig struct {
	Dial        func(ctx context.Context, id string) (Conn, error)
	DialTimeout time.Duration
	Known       func(id string) bool            // whether there is an address of a node
	Removed     func(peer string, index uint64) // a node says that this one was removed by the configuration of an index
}

// Client sends requests to nodes: one connection to each, made when it is needed.
type Client struct {
	cfg ClientConfig
	ctx context.Context // ends every dial

	mu     sync.Mutex
	nodes  map[string]*node
	closed bool
	wg     sync.WaitGroup // the goroutines of connections
}

// node is one peer of a client.
type node struct {
	dial *semaphore.Weighted // of one: its holder may dial
	mu   sync.Mutex
	conn *clientConn // the latest; nil before the first
}

// NewClient returns a client whose dials end with ctx. Close ends it.
func NewClient(ctx context.Context, cfg ClientConfig) *Client {
	return &Client{cfg: cfg, ctx: ctx, nodes: map[string]*node{}}
}

// Close ends all connections, and waits for their goroutines.
func (c *Client) Close() {
	c.mu.Lock()
	c.closed = true
	nodes := make([]*node, 0, len(c.nodes))
	for _, n := range c.nodes {
		nodes = append(nodes, n)
	}
	c.mu.Unlock()
	for _, n := range nodes {
		n.abort()
	}
	c.wg.Wait()
}

// Forget ends the connection to a node that is no member any more.
func (c *Client) Forget(id string) {
	c.mu.Lock()
	n := c.nodes[id]
	delete(c.nodes, id)
	c.mu.Unlock()
	if n != nil {
		n.abort()
	}
}

func (n *node) abort() {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.conn != nil {
		n.conn.c.Abort()
	}
}

func (n *node) latest() *clientConn {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.conn
}

func (c *Client) node(id string) *node {
	c.mu.Lock()
	defer c.mu.Unlock()
	n := c.nodes[id]
	if n == nil {
		n = &node{dial: semaphore.NewWeighted(1)}
		c.nodes[id] = n
	}
	return n
}

func notKnown(id string) error {
	return fault.New("forward.Call", fault.Unavailable, "no member is called %q", id)
}

// conn is the connection to a node. One caller dials, the others wait for it, each for as long as its context allows.
func (c *Client) conn(ctx context.Context, id string) (*clientConn, error) {
	if !c.cfg.Known(id) {
		return nil, notKnown(id)
	}
	n := c.node(id)
	ctx, cancel := context.WithTimeout(ctx, c.cfg.DialTimeout)
	defer cancel()
	defer context.AfterFunc(c.ctx, cancel)()
	if err := n.dial.Acquire(ctx, 1); err != nil {
		return nil, fault.Because(err, "forward.Call", fault.Unavailable, "node %s is not reached", id)
	}
	defer n.dial.Release(1)
	if l := n.latest(); l != nil && !l.isBroken() {
		return l, nil
	}
	raw, err := c.cfg.Dial(ctx, id)
	if err != nil {
		return nil, err
	}
	return c.begin(id, n, raw)
}

// begin starts the goroutines of a connection.
func (c *Client) begin(id string, n *node, raw Conn) (*clientConn, error) {
	l := &clientConn{c: raw, removed: c.cfg.Removed, pending: map[uint64]chan frame{}}
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.closed:
		raw.Abort()
		return nil, ErrClosed
	case c.nodes[id] != n:
		raw.Abort()
		return nil, notKnown(id)
	}
	n.mu.Lock()
	n.conn = l
	n.mu.Unlock()
	c.wg.Go(l.read)
	c.wg.Go(l.keepalive)
	return l, nil
}

// clientConn is one connection with requests that wait for their responses.
type clientConn struct {
	c       Conn
	removed func(peer string, index uint64)
	write   sync.Mutex

	mu      sync.Mutex
	next    uint64
	pending map[uint64]chan frame
	broken  bool
	ended   bool // the peer took nothing that it did not answer
}

// send writes one frame, and ends the connection if it can't.
func (l *clientConn) send(f frame) error {
	l.write.Lock()
	defer l.write.Unlock()
	_ = l.c.SetWriteDeadline(time.Now().Add(idleTimeout))
	err := writeFrame(l.c, f)
	if err != nil {
		l.c.Abort()
	}
	return err
}

// keepalive lets both sides hear that the other is there.
func (l *clientConn) keepalive() {
	t := time.NewTicker(keepaliveEvery)
	defer t.Stop()
	for {
		select {
		case <-l.c.Done():
			return
		case <-t.C:
			if l.send(frame{kind: Term}) != nil {
				return
			}
		}
	}
}

func (l *clientConn) isBroken() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.broken
}

func (l *clientConn) hasEnded() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.ended
}

// read hands responses to their callers, until the connection ends.
func (l *clientConn) read() {
	in := bufio.NewReaderSize(&idleConn{Conn: l.c}, bufferBytes)
	for {
		f, err := readFrame(in)
		if err != nil {
			l.fail()
			return
		}
		switch {
		case f.kind == noticeEnd && f.id == 0:
			l.mu.Lock()
			l.ended = true
			l.mu.Unlock()
			l.c.Abort() // the peer waits for it
		case f.kind == Removed && len(f.payload) == 8:
			l.removed(l.c.Peer(), binary.BigEndian.Uint64(f.payload))
		default:
			if ch := l.take(f.id); ch != nil {
				ch <- f
			}
		}
	}
}

// fail ends the connection, and every call that waits on it.
func (l *clientConn) fail() {
	l.mu.Lock()
	l.broken = true
	for id, ch := range l.pending {
		delete(l.pending, id)
		close(ch)
	}
	l.mu.Unlock()
	l.c.Abort()
}

// expect registers a request; false if the connection is broken.
func (l *clientConn) expect() (uint64, <-chan frame, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.broken {
		return 0, nil, false
	}
	l.next++
	ch := make(chan frame, 1)
	l.pending[l.next] = ch
	return l.next, ch, true
}

// take removes a request, and returns where its response goes; nil if there is no such request.
func (l *clientConn) take(id uint64) chan<- frame {
	l.mu.Lock()
	defer l.mu.Unlock()
	ch := l.pending[id]
	delete(l.pending, id)
	return ch
}

// Call sends a request to a node and returns its response. Whatever kind of fault the node answered is the kind of the
// error. Without an answer it is [fault.Unavailable] if nothing was done, and [fault.Unsure] once all of the request was
// sent: it may have been acted upon.
func (c *Client) Call(ctx context.Context, id string, kind Kind, payload []byte) ([]byte, error) {
	const op = "forward.Call"
	l, err := c.conn(ctx, id)
	if err != nil {
		return nil, fault.At(op, fault.Unavailable, err)
	}
	request, response, ok := l.expect()
	if !ok {
		return nil, fault.New(op, fault.Unavailable, "the connection broke before anything was sent")
	}
	if kind != Term {
		payload = withTimeout(ctx, payload)
	}
	if err := l.send(frame{request, kind, payload}); err != nil { // a part of a request is not acted upon
		l.take(request)
		return nil, fault.Because(err, op, fault.Unavailable, "the connection broke before the request was sent")
	}
	select {
	case got, ok := <-response:
		switch {
		case !ok && l.hasEnded():
			return nil, fault.New(op, fault.Unavailable, "node %s is stopping, and did not take this", id)
		case !ok:
			return nil, fault.New(op, fault.Unsure, "the connection broke: it may have happened, propose the same again with the same request id")
		case got.kind == responseOK:
			return got.payload, nil
		}
		return nil, errorOf(got)
	case <-ctx.Done():
		l.take(request)
		return nil, fault.Because(ctx.Err(), op, fault.Unsure,
			"the time was up while the node was asked: it may happen, propose the same again with the same request id")
	}
}

// withTimeout puts the time that a caller has left before a payload.
func withTimeout(ctx context.Context, payload []byte) []byte {
	wait := maxTimeout
	if t, ok := ctx.Deadline(); ok {
		wait = min(wait, max(time.Until(t), time.Millisecond))
	}
	return append(binary.BigEndian.AppendUint32(make([]byte, 0, timeoutBytes+len(payload)), uint32(wait.Milliseconds())), payload...)
}

// Number is Call for a response of 8 bytes, of a request that changes nothing: instead of [fault.Unsure] it is
// [fault.Unavailable].
func (c *Client) Number(ctx context.Context, id string, kind Kind) (uint64, error) {
	const op = "forward.Number"
	b, err := c.Call(ctx, id, kind, nil)
	switch {
	case fault.Of(err) == fault.Unsure:
		return 0, fault.At(op, fault.Unavailable, err)
	case err != nil:
		return 0, err
	case len(b) != 8:
		return 0, fault.New(op, fault.Internal, "a member gave a number of %d bytes", len(b))
	}
	return binary.BigEndian.Uint64(b), nil
}
