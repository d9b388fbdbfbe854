// SPDX-License-Identifier: Apache-2.0

package forward_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/raft/forward"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// conn is a connection to a node that is trusted.
type conn struct {
	net.Conn
	once sync.Once
	done chan struct{}
}

func trusted(c net.Conn) *conn        { return &conn{Conn: c, done: make(chan struct{})} }
func (c *conn) Peer() string          { return "leader" }
func (c *conn) Done() <-chan struct{} { return c.done }
func (c *conn) Abort()                { _ = c.Close() }
func (c *conn) Close() (err error) {
	c.once.Do(func() { err = c.Conn.Close(); close(c.done) })
	return err
}

func client(c net.Conn) *forward.Client {
	return forward.NewClient(context.Background(), forward.ClientConfig{
		Dial:        func(context.Context, string) (forward.Conn, error) { return trusted(c), nil },
		DialTimeout: time.Second,
		Known:       func(id string) bool { return id == "leader" },
		Removed:     func(string, uint64) {},
	})
}

// call proposes to a leader over a connection.
func call(t *testing.T, c net.Conn, proposal []byte) ([]byte, error) {
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	calls := client(c)
	defer calls.Close()
	return calls.Call(ctx, "leader", 'p', proposal)
}

// wireFrame spells a frame of the forward protocol.
func wireFrame(id uint64, kind byte, payload []byte) []byte {
	b := binary.BigEndian.AppendUint32(nil, uint32(9+len(payload)))
	return append(append(binary.BigEndian.AppendUint64(b, id), kind), payload...)
}

// What is known of a proposal whose connection breaks depends on how much of it was sent, and on what the leader said last. The leader
// is a listener that reads so many bytes, answers with so many, and hangs up.
func TestAConnectionThatBreaks(t *testing.T) {
	const small, large = 100, 12 << 20 // of which no socket takes all unless it is read
	whole := func(n int) int { return 4 + 9 + 4 + n }
	answer := wireFrame(1, 'a', []byte("done"))
	for _, tc := range []struct {
		name  string
		size  int
		reads int
		says  []byte
		want  fault.Kind // "" : answered
	}{
		{"answered", small, whole(small), answer, ""},
		{"nothing of a large one is read", large, 0, nil, fault.Unavailable},
		{"a part of a large one is read", large, 1 << 20, nil, fault.Unavailable},
		{"all of a large one is read", large, whole(large), nil, fault.Unsure},
		{"all of it is read", small, whole(small), nil, fault.Unsure},
		{"it was sent, whatever was read", small, 20, nil, fault.Unsure},
		{"half of an answer", small, whole(small), answer[:len(answer)-2], fault.Unsure},
		{"an answer to another question", small, whole(small), wireFrame(7, 'a', []byte("done")), fault.Unsure},
		{"the leader ends and did not take it", small, whole(small), wireFrame(0, 'e', nil), fault.Unavailable},
		{"the leader ends and has answered", small, whole(small), append(append([]byte{}, answer...), wireFrame(0, 'e', nil)...), ""},
		{"half of the word of an end", small, whole(small), wireFrame(0, 'e', nil)[:8], fault.Unsure},
		{"refused", small, whole(small), wireFrame(1, 'f', []byte("busy\nlater")), fault.Busy},
	} {
		t.Run(tc.name, func(t *testing.T) {
			ln, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			defer ln.Close()
			served := make(chan error, 1)
			go func() {
				c, err := ln.Accept()
				if err == nil {
					_, err = io.CopyN(io.Discard, c, int64(tc.reads))
				}
				if err == nil {
					_, err = c.Write(tc.says)
				}
				if err == nil && len(tc.says) > 0 { // so that what was said is not thrown away
					err = c.(*net.TCPConn).CloseWrite()
					_, _ = io.Copy(io.Discard, c)
				}
				served <- errors.Join(err, c.Close())
			}()
			c, err := net.Dial("tcp", ln.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			ans, err := call(t, c, make([]byte, tc.size))
			if fault.Of(err) != tc.want || tc.want == "" && string(ans) != "done" {
				t.Errorf("%q, %v, want %q", ans, err, tc.want)
			}
			if err := <-served; err != nil {
				t.Error(err)
			}
		})
	}
}

// What a handler returns arrives, with the kind of its fault and the mark that it is not to be repeated; so does what a client
// of a closed connection or of a node that is not known is told.
func TestAnswersArriveAsTheyAre(t *testing.T) {
	here, there := net.Pipe()
	ctx, stop := context.WithCancel(t.Context())
	served := make(chan struct{})
	go func() {
		defer close(served)
		handle := func(ctx context.Context, peer string, kind forward.Kind, b []byte) ([]byte, error) {
			switch string(b) {
			case "busy":
				return nil, fault.New("test", fault.Busy, "later")
			case "never":
				return nil, forward.Permanent(fault.New("test", fault.Unavailable, "the disk is full"))
			case "hang":
				<-ctx.Done()
				return nil, fault.At("test", fault.Unavailable, ctx.Err())
			}
			return append([]byte{byte(kind)}, b...), nil
		}
		forward.Server{Term: func() uint64 { return 7 }, Handle: handle}.Serve(ctx, trusted(there))
	}()
	calls := client(here)
	if got, err := calls.Call(t.Context(), "leader", 'p', []byte("x")); string(got) != "px" || err != nil {
		t.Errorf("%q, %v", got, err)
	}
	if got, err := calls.Number(t.Context(), "leader", forward.Term); got != 7 || err != nil {
		t.Errorf("%d, %v", got, err)
	}
	_, err := calls.Call(t.Context(), "leader", 'p', []byte("busy"))
	if fault.Of(err) != fault.Busy || fault.Text(err) != "later" || forward.IsPermanent(err) {
		t.Errorf("%v", err)
	}
	if _, err := calls.Call(t.Context(), "leader", 'p', []byte("never")); fault.Of(err) != fault.Unavailable || !forward.IsPermanent(err) {
		t.Errorf("%v", err)
	}
	short, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := calls.Call(short, "leader", 'p', []byte("hang")); fault.Of(err) != fault.Unsure && fault.Of(err) != fault.Unavailable {
		t.Errorf("%v", err)
	}
	if _, err := calls.Call(t.Context(), "other", 'p', nil); fault.Of(err) != fault.Unavailable {
		t.Errorf("%v", err)
	}
	stop()
	<-served
	calls.Close()
	if _, err := calls.Call(t.Context(), "leader", 'p', nil); !errors.Is(err, forward.ErrClosed) {
		t.Errorf("%v", err)
	}
}

func FuzzFrames(f *testing.F) {
	f.Add([]byte{0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0, 1, 'r'})
	f.Fuzz(func(t *testing.T, wire []byte) {
		var again bytes.Buffer
		if err := forward.CopyFrame(&again, bytes.NewReader(wire)); err == nil && !bytes.HasPrefix(wire, again.Bytes()) {
			t.Fatal("two spellings of one frame")
		}
	})
}
