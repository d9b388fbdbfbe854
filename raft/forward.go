// SPDX-License-Identifier: Apache-2.0

package raft

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"strings"
	"sync"
	"time"

	"github.com/demarc-dev/demarc/fault"
)

// The protocol demarc-forward/1: both sides send frames, answers in any order.
//
//	length of the rest, 4 bytes | id of the question, 8 bytes | kind, 1 byte | payload
//
// Questions: 't' the term of the answerer; all others begin with 4 bytes of patience in ms: 'p' and a proposal; 'r' a read
// index; 'w' and JSON, how the answerer is, and where the asker is; 'c' the members, as JSON; 'm' and JSON, a change of them;
// 'g' and 8 bytes, the node that is asked was removed by the configuration of that index. Answers: 'a' the machine's answer,
// JSON, or 8 bytes of index or term; 'f' a fault: its kind, a line feed, its sentence; 'n' likewise, and it is of no use to
// ask again at once. A question that came by this way is never forwarded again. A node that is no member is answered with
// 'g', id 0, and the index of the configuration that says so.
//
// A node that ends reads no more, answers what it has read, and then says 'e' with id 0: what has no answer by then was not
// taken, and may be asked elsewhere. A line that breaks without it leaves those in doubt whose question was sent whole; a
// question of which a part was sent was not taken either.
//
// Who asks says 't' with id 0 every 2 s. Either side drops a connection on which it hears nothing for 6 s.
const (
	askPropose = 'p'
	askRead    = 'r'
	askTerm    = 't'
	askWeather = 'w'
	askMembers = 'c'
	askChange  = 'm'
	askGone    = 'g'
	saidEnd    = 'e'
	answerOK   = 'a'
	answerBad  = 'f'
	answerNo   = 'n'

	frameHead   = 9
	maxFrame    = MaxProposal + frameHead + 4
	maxAsking   = 4096 // questions of one connection at a time; the next is told to come back
	forwardWait = 30 * time.Second

	pulseEvery = 2 * time.Second
	pulseWait  = 3 * pulseEvery
	endWait    = time.Second // for the peer to hear its last answers, and that this is the end
)

type frame struct {
	id      uint64
	kind    byte
	payload []byte
}

func writeFrame(w io.Writer, f frame) error {
	b := make([]byte, 4+frameHead, 4+frameHead+len(f.payload))
	binary.BigEndian.PutUint32(b, uint32(frameHead+len(f.payload)))
	binary.BigEndian.PutUint64(b[4:], f.id)
	b[12] = f.kind
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
		return frame{}, fault.New("raft.readFrame", fault.Invalid, "a frame of %d bytes", n)
	}
	var b strings.Builder // grows with what comes, not with what is announced
	if _, err := io.CopyN(&b, r, int64(n)); err != nil {
		return frame{}, err
	}
	s := b.String()
	return frame{binary.BigEndian.Uint64([]byte(s[:8])), s[8], []byte(s[9:])}, nil
}

// heard is a connection that breaks when nothing comes for a while, or when it is told to stop reading.
type heard struct {
	*tracked
	mu      sync.Mutex
	stopped bool
}

func (h *heard) Read(b []byte) (int, error) {
	h.mu.Lock()
	if h.stopped {
		h.mu.Unlock()
		return 0, net.ErrClosed
	}
	_ = h.SetReadDeadline(time.Now().Add(pulseWait))
	h.mu.Unlock()
	return h.tracked.Read(b)
}

// stop ends the reading. What is being written has a moment more: a peer that does not read holds up no end.
func (h *heard) stop() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.stopped = true
	_ = h.SetReadDeadline(time.Unix(1, 0))
	_ = h.SetWriteDeadline(time.Now().Add(endWait))
}

// bound gives the next answer its time to be written.
func (h *heard) bound() {
	h.mu.Lock()
	defer h.mu.Unlock()
	wait := pulseWait
	if h.stopped {
		wait = endWait
	}
	_ = h.SetWriteDeadline(time.Now().Add(wait))
}

// serveForward answers the questions of one peer. When its connection ends, what it still waits for is given up; when the
// node ends, what was asked is answered first.
func (n *Node) serveForward(c *tracked) {
	var (
		wg    sync.WaitGroup
		mu    sync.Mutex // guards writing
		slots = make(chan struct{}, maxAsking)
		from  = &heard{tracked: c}
		in    = bufio.NewReaderSize(from, 64<<10)
	)
	ctx, cancel := context.WithCancel(context.Background()) // not the node's: who is being answered gets the answer
	defer context.AfterFunc(n.ctx, from.stop)()
	defer func() {
		if n.ctx.Err() == nil {
			cancel()
		}
		wg.Wait()
		cancel()
		if from.isStopped() {
			c.farewell()
		}
		c.abort()
	}()
	answer := func(f frame) {
		mu.Lock()
		defer mu.Unlock()
		from.bound()
		if writeFrame(c, f) != nil {
			c.abort()
		}
	}
	for {
		f, err := readFrame(in)
		if err != nil {
			return
		}
		if f.kind == askTerm {
			answer(frame{f.id, answerOK, binary.BigEndian.AppendUint64(nil, n.raft.CurrentTerm())})
			continue
		}
		select {
		case slots <- struct{}{}:
		default:
			answer(bad(f.id, fault.New("raft.serve", fault.Busy, "too many questions at once: try again in a moment")))
			continue
		}
		wg.Go(func() {
			defer func() { <-slots }()
			answer(n.serve(ctx, c.id, f))
		})
	}
}

// isStopped tells whether the reading ended because the node does.
func (h *heard) isStopped() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.stopped
}

// farewell says that nothing more is taken, and waits until the peer has hung up: to close a connection in whose buffers
// lies a question that nobody read would throw away, at the peer, the answers that are on their way.
func (t *tracked) farewell() {
	_ = t.SetDeadline(time.Now().Add(endWait))
	if writeFrame(t, frame{kind: saidEnd}) == nil {
		_, _ = io.Copy(io.Discard, t.Conn)
	}
}

func bad(id uint64, err error) frame {
	kind := byte(answerBad)
	if no := (*final)(nil); errors.As(err, &no) {
		kind = answerNo
	}
	return frame{id, kind, []byte(string(fault.Of(err)) + "\n" + fault.Text(err))}
}

func (n *Node) serve(ctx context.Context, by string, f frame) frame {
	const op = "raft.serve"
	if len(f.payload) < 4 {
		return bad(f.id, fault.New(op, fault.Invalid, "a question of kind %q without patience", f.kind))
	}
	wait := min(time.Duration(binary.BigEndian.Uint32(f.payload))*time.Millisecond, forwardWait)
	ctx, cancel := context.WithTimeout(ctx, wait)
	defer cancel()
	var ans []byte
	err := error(fault.New(op, fault.Invalid, "a question of kind %q", f.kind))
	switch f.kind {
	case askPropose:
		if len(f.payload)-4 > MaxProposal {
			return bad(f.id, fault.New(op, fault.Invalid, "the proposal is too large"))
		}
		if ans, err = n.propose(ctx, f.payload[4:]); len(ans) > MaxProposal {
			err = fault.New(op, fault.Unsure, "it has happened, and the machine's answer is too large to be sent")
		}
	case askRead:
		var index uint64
		index, err = n.readIndex(ctx)
		ans = binary.BigEndian.AppendUint64(nil, index)
	case askWeather, askMembers, askChange, askGone:
		ans, err = n.serveMembers(ctx, by, f.kind, f.payload[4:])
	}
	if err != nil {
		return bad(f.id, err)
	}
	return frame{f.id, answerOK, ans}
}

// forwarder asks members: one connection each, made when it is needed.
type forwarder struct {
	n     *Node
	mu    sync.Mutex
	peers map[string]*peer
}

type peer struct {
	dialing chan struct{} // holds one token: who has it may dial
	mu      sync.Mutex
	line    *line
}

func newForwarder(n *Node) *forwarder { return &forwarder{n: n, peers: map[string]*peer{}} }

// peer gives what is kept of a member, nil where there is no way to it.
func (f *forwarder) peer(id string) *peer {
	if len(f.n.where(id)) == 0 {
		return nil
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	p := f.peers[id]
	if p == nil {
		p = &peer{dialing: make(chan struct{}, 1)}
		p.dialing <- struct{}{}
		f.peers[id] = p
	}
	return p
}

// forget drops a node that is no member any more.
func (f *forwarder) forget(id string) {
	f.mu.Lock()
	p := f.peers[id]
	delete(f.peers, id)
	f.mu.Unlock()
	if p == nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.line != nil {
		p.line.c.abort()
	}
}

// line is one connection to a leader.
type line struct {
	c     *tracked
	write sync.Mutex

	mu      sync.Mutex
	next    uint64
	waiting map[uint64]chan frame
	broken  bool
	ended   bool // the peer took nothing that it did not answer
}

// line gives the connection to a member. One caller dials, the others wait for it.
func (f *forwarder) line(ctx context.Context, id string) (*line, error) {
	const op = "raft.forward"
	p := f.peer(id)
	if p == nil {
		return nil, fault.New(op, fault.Unavailable, "no member is called %q", id)
	}
	ctx, cancel := context.WithTimeout(ctx, min(rpcWait, max(time.Second, 2*f.n.cfg.Timing.Election)))
	defer cancel()
	defer context.AfterFunc(f.n.ctx, cancel)()
	select {
	case <-p.dialing:
	case <-ctx.Done():
		return nil, fault.Because(ctx.Err(), op, fault.Unavailable, "node %s is not reached", id)
	}
	defer func() { p.dialing <- struct{}{} }()
	p.mu.Lock()
	l := p.line
	p.mu.Unlock()
	if l != nil && !l.isBroken() {
		return l, nil
	}
	c, err := f.n.net.reach(ctx, id, ProtoForward)
	if err != nil {
		return nil, err
	}
	l = &line{c: c, waiting: map[uint64]chan frame{}}
	if !f.n.net.spawn(l.read, l.pulse) {
		c.abort()
		return nil, errClosing
	}
	p.mu.Lock()
	p.line = l
	p.mu.Unlock()
	return l, nil
}

// send writes one frame, and ends the connection where it can't.
func (l *line) send(f frame) error {
	l.write.Lock()
	defer l.write.Unlock()
	_ = l.c.SetWriteDeadline(time.Now().Add(pulseWait))
	err := writeFrame(l.c, f)
	if err != nil {
		l.c.abort()
	}
	return err
}

// pulse lets both sides hear that the other is there.
func (l *line) pulse() {
	t := time.NewTicker(pulseEvery)
	defer t.Stop()
	for {
		select {
		case <-l.c.done:
			return
		case <-t.C:
			if l.send(frame{kind: askTerm}) != nil {
				return
			}
		}
	}
}

func (l *line) isBroken() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.broken
}

func (l *line) hasEnded() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.ended
}

// read hands answers to those who asked, until the connection ends.
func (l *line) read() {
	in := bufio.NewReaderSize(&heard{tracked: l.c}, 64<<10)
	for {
		f, err := readFrame(in)
		l.mu.Lock()
		if err != nil {
			l.broken = true
			for id, ch := range l.waiting {
				delete(l.waiting, id)
				close(ch)
			}
			l.mu.Unlock()
			l.c.abort()
			return
		}
		if f.kind == saidEnd && f.id == 0 {
			l.ended = true
			l.mu.Unlock()
			l.c.abort() // the peer waits for it
			continue
		}
		if f.kind == askGone && len(f.payload) == 8 {
			l.mu.Unlock()
			l.c.w.n.told(l.c.id, binary.BigEndian.Uint64(f.payload))
			continue
		}
		if ch := l.waiting[f.id]; ch != nil {
			delete(l.waiting, f.id)
			ch <- f
		}
		l.mu.Unlock()
	}
}

// ask puts a question to a member. Once all of it was sent, a broken line means that it may have been acted upon.
func (f *forwarder) ask(ctx context.Context, leader string, kind byte, payload []byte) ([]byte, error) {
	const op = "raft.forward"
	l, err := f.line(ctx, leader)
	if err != nil {
		return nil, fault.At(op, fault.Unavailable, err)
	}
	ch := make(chan frame, 1)
	l.mu.Lock()
	if l.broken {
		l.mu.Unlock()
		return nil, fault.New(op, fault.Unavailable, "the line to the leader broke before anything was sent")
	}
	l.next++
	id := l.next
	l.waiting[id] = ch
	l.mu.Unlock()
	if kind != askTerm {
		wait := forwardWait
		if t, ok := ctx.Deadline(); ok {
			wait = min(wait, max(time.Until(t), time.Millisecond))
		}
		payload = append(binary.BigEndian.AppendUint32(make([]byte, 0, 4+len(payload)), uint32(wait.Milliseconds())), payload...)
	}
	if err := l.send(frame{id, kind, payload}); err != nil { // nobody acts upon a part
		l.mu.Lock()
		delete(l.waiting, id)
		l.mu.Unlock()
		return nil, fault.Because(err, op, fault.Unavailable, "the line to the leader broke before the question was sent")
	}
	unsure := fault.New(op, fault.Unsure, "the line to the leader broke: it may have happened, propose the same again with the same request id")
	select {
	case got, ok := <-ch:
		switch {
		case !ok && l.hasEnded():
			return nil, fault.New(op, fault.Unavailable, "node %s is stopping, and did not take this", leader)
		case !ok:
			return nil, unsure
		case got.kind == answerOK:
			return got.payload, nil
		}
		word, text, _ := strings.Cut(string(got.payload), "\n")
		k := fault.Kind(word)
		if got.kind == answerNo && k.Known() {
			return nil, &final{fault.New(op, k, "%s", text)}
		}
		if got.kind != answerBad || !k.Known() {
			return nil, fault.New(op, fault.Unsure, "the leader gave an answer that this build does not understand")
		}
		return nil, fault.New(op, k, "%s", text)
	case <-ctx.Done():
		l.mu.Lock()
		delete(l.waiting, id)
		l.mu.Unlock()
		return nil, fault.Because(ctx.Err(), op, fault.Unsure, "the time was up while the leader was asked: it may happen, propose the same again with the same request id")
	}
}
