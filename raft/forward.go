// SPDX-License-Identifier: Apache-2.0

package raft

import (
	"bufio"
	"context"
	"encoding/binary"
	"io"
	"strings"
	"sync"
	"time"

	"github.com/demarc-dev/demarc/fault"
)

// The protocol demarc-forward/1: both sides send frames, answers in any order.
//
//	length of the rest, 4 bytes | id of the question, 8 bytes | kind, 1 byte | payload
//
// Questions: 'p' a proposal, 'r' a read index. Answers: 'a' the machine's answer or 8 bytes of index, 'f' a fault: its kind, a line
// feed, its sentence. A question that came by this way is never forwarded again.
const (
	askPropose = 'p'
	askRead    = 'r'
	answerOK   = 'a'
	answerBad  = 'f'

	frameHead   = 9
	maxFrame    = MaxProposal + frameHead
	maxAsking   = 1024 // questions of one peer at a time
	forwardWait = 30 * time.Second
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

// serveForward answers the questions of one peer.
func (n *Node) serveForward(c *tracked) {
	var (
		wg    sync.WaitGroup
		mu    sync.Mutex // guards writing
		slots = make(chan struct{}, maxAsking)
		in    = bufio.NewReaderSize(c, 64<<10)
	)
	defer wg.Wait()
	defer c.Close()
	for {
		f, err := readFrame(in)
		if err != nil {
			return
		}
		select {
		case slots <- struct{}{}:
		case <-n.ctx.Done():
			return
		}
		wg.Go(func() {
			defer func() { <-slots }()
			ans := n.serve(f)
			mu.Lock()
			defer mu.Unlock()
			_ = c.SetWriteDeadline(time.Now().Add(rpcWait))
			if writeFrame(c, ans) != nil {
				_ = c.Close()
			}
		})
	}
}

func (n *Node) serve(f frame) frame {
	ctx, cancel := context.WithTimeout(n.ctx, forwardWait)
	defer cancel()
	var ans []byte
	err := error(fault.New("raft.serve", fault.Invalid, "a question of kind %q", f.kind))
	switch f.kind {
	case askPropose:
		ans, err = n.propose(ctx, f.payload)
	case askRead:
		var index uint64
		index, err = n.readIndex()
		ans = binary.BigEndian.AppendUint64(nil, index)
	}
	if err != nil {
		return frame{f.id, answerBad, []byte(string(fault.Of(err)) + "\n" + fault.Text(err))}
	}
	return frame{f.id, answerOK, ans}
}

// forwarder asks leaders: one connection each, made when it is needed.
type forwarder struct {
	n     *Node
	mu    sync.Mutex
	lines map[string]*line
}

// line is one connection to a leader.
type line struct {
	c     *tracked
	write sync.Mutex

	mu      sync.Mutex
	next    uint64
	waiting map[uint64]chan frame
	broken  bool
}

func (f *forwarder) close() {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, l := range f.lines {
		_ = l.c.Close()
	}
}

// line gives the connection to a leader.
func (f *forwarder) line(ctx context.Context, id string) (*line, error) {
	f.mu.Lock()
	l := f.lines[id]
	f.mu.Unlock()
	if l != nil && !l.isBroken() {
		return l, nil
	}
	addr, err := f.n.addrOf(id)
	if err != nil {
		return nil, err
	}
	dctx, cancel := context.WithTimeout(ctx, rpcWait)
	defer cancel()
	c, err := f.n.net.dial(dctx, id, addr, ProtoForward)
	if err != nil {
		return nil, err
	}
	l = &line{c: c, waiting: map[uint64]chan frame{}}
	f.mu.Lock()
	defer f.mu.Unlock()
	if was := f.lines[id]; was != nil && !was.isBroken() { // another caller was faster
		_ = c.Close()
		return was, nil
	}
	if f.lines == nil {
		f.lines = map[string]*line{}
	}
	f.lines[id] = l
	f.n.net.wg.Go(l.read)
	return l, nil
}

func (l *line) isBroken() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.broken
}

// read hands answers to those who asked, until the connection ends.
func (l *line) read() {
	in := bufio.NewReaderSize(l.c, 64<<10)
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
			_ = l.c.Close()
			return
		}
		if ch := l.waiting[f.id]; ch != nil {
			delete(l.waiting, f.id)
			ch <- f
		}
		l.mu.Unlock()
	}
}

// ask puts a question to the leader. Once it began to be sent, a broken line means that it may have been acted upon.
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
	l.write.Lock()
	_ = l.c.SetWriteDeadline(time.Now().Add(rpcWait))
	err = writeFrame(l.c, frame{id, kind, payload})
	l.write.Unlock()
	if err != nil {
		_ = l.c.Close()
	}
	unsure := fault.New(op, fault.Unsure, "the line to the leader broke: it may have happened, propose the same again with the same request id")
	select {
	case got, ok := <-ch:
		switch {
		case !ok:
			return nil, unsure
		case got.kind == answerOK:
			return got.payload, nil
		}
		word, text, _ := strings.Cut(string(got.payload), "\n")
		k := fault.Kind(word)
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

// readIndex asks a leader how far a reader must be. To ask again is always safe.
func (f *forwarder) readIndex(ctx context.Context, leader string) (uint64, error) {
	const op = "raft.forward"
	b, err := f.ask(ctx, leader, askRead, nil)
	if err != nil {
		k := fault.Of(err)
		if k == fault.Unsure && ctx.Err() == nil {
			k = fault.Unavailable
		}
		return 0, fault.At(op, k, err)
	}
	if len(b) != 8 {
		return 0, fault.New(op, fault.Internal, "the leader gave an index of %d bytes", len(b))
	}
	return binary.BigEndian.Uint64(b), nil
}
