// SPDX-License-Identifier: Apache-2.0

package raft_test

import (
	"context"
	"crypto/tls"
	"encoding/binary"
	"fmt"
	"io"
	"testing"
	"testing/synctest"
	"time"

	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/identity"
	"github.com/demarc-dev/demarc/raft"
)

// wireFrame spells a frame of the forward protocol.
func wireFrame(id uint64, kind byte, payload []byte) []byte {
	b := binary.BigEndian.AppendUint32(nil, uint32(9+len(payload)))
	return append(append(binary.BigEndian.AppendUint64(b, id), kind), payload...)
}

// A node that ends answers what it has read, says then that it took nothing else, and waits for the peer to hang up.
func TestANodeThatEndsSaysSo(t *testing.T) {
	c := start(t, 1, nil)
	c.leader()
	held, open := make(chan struct{}), make(chan struct{})
	c.lists[0].mu.Lock()
	c.lists[0].hold = func(string) { close(held); <-open }
	c.lists[0].mu.Unlock()
	conf := identity.Client(source(t, c.ca, fleet.Node, "n9"), identity.WantNode(domain))
	conf.NextProtos = []string{raft.ProtoForward}
	conn, err := tls.Dial("tcp", c.members[0].Addr, conf)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(20 * time.Second))
	timeout := []byte{0, 0, 0x40, 0}
	if _, err := conn.Write(wireFrame(1, 'p', append(timeout, "one"...))); err != nil {
		t.Fatal(err)
	}
	<-held
	closed := make(chan error, 1)
	go func() {
		ctx, cancel := context.WithCancel(context.Background())
		cancel() // nothing polite
		closed <- c.nodes[0].Close(ctx)
	}()
	waitFor(t, c.nodes[0].Ends)
	for id := range uint64(50) { // some may be read, and are refused; the others lie in buffers
		if _, err := conn.Write(wireFrame(id+2, 'p', append(timeout, fmt.Sprint("late", id)...))); err != nil {
			t.Fatal(err)
		}
	}
	close(open)
	var kinds string
	for {
		f, err := readWire(conn)
		if err != nil {
			t.Fatalf("after %q: %v", kinds, err)
		}
		if kinds += string(f); f == 'e' {
			break
		}
	}
	if n := len(kinds); n < 2 || kinds[0] != 'a' && kinds[n-2] != 'a' {
		t.Errorf("the frames were %q: want the answer to the first, and an end", kinds)
	}
	conn.Close()
	if err := <-closed; err != nil {
		t.Error(err)
	}
	c.nodes[0] = nil
	if got := c.lists[0].all(); len(got) != 1 || got[0] != "one" {
		t.Errorf("taken: %q", got)
	}
}

// A peer that is slow to read gets what a node that ends has for it, the answer and the notice of the end: the node waits, and does not
// hang up while it writes. Nothing lies in buffers here: what is not read is not written.
func TestANodeThatEndsWaitsForItsAnswers(t *testing.T) {
	ca, dirs := newCA(t), []string{t.TempDir()}
	synctest.Test(t, func(t *testing.T) {
		c := newFakeCluster(t, ca, dirs, nil)
		c.leader()
		open := make(chan struct{})
		c.lists[0].mu.Lock()
		c.lists[0].hold = func(string) { <-open }
		c.lists[0].mu.Unlock()
		raw, err := c.world.dialer("n0:2")(t.Context(), c.members[0].Addr)
		if err != nil {
			t.Fatal(err)
		}
		conf := identity.Client(c.sources[0], identity.WantNode(domain))
		conf.NextProtos = []string{raft.ProtoForward}
		conn := tls.Client(raw, conf)
		defer raw.Close()
		if _, err := conn.Write(wireFrame(1, 'p', append([]byte{0, 0, 0x40, 0}, "one"...))); err != nil {
			t.Fatal(err)
		}
		synctest.Wait() // it is being applied
		closed := make(chan error, 1)
		go func() {
			ctx, cancel := context.WithCancel(context.Background())
			cancel() // nothing polite
			closed <- c.nodes[0].Close(ctx)
		}()
		synctest.Wait()
		close(open)
		synctest.Wait() // all that can happen before the answer is read has happened
		select {
		case err := <-closed:
			t.Fatalf("the node has ended, and its answer was not read: %v", err)
		default:
		}
		for _, want := range "ae" {
			if got, err := readWire(conn); err != nil || rune(got) != want {
				t.Fatalf("the next frame is %q, %v: want %q", got, err, want)
			}
			synctest.Wait()
		}
		select {
		case err := <-closed:
			t.Fatalf("the node has ended before the peer hung up: %v", err)
		default:
		}
		raw.Close()
		if err := <-closed; err != nil {
			t.Error(err)
		}
		c.nodes[0] = nil
	})
}

// A peer that reads nothing at all, or does not hang up, delays the end of a node by a second.
func TestNoPeerDelaysTheEnd(t *testing.T) {
	for name, reads := range map[string]string{"reads nothing": "", "reads nothing of what comes late": "", "does not hang up": "ae"} {
		t.Run(name, func(t *testing.T) {
			ca, dirs := newCA(t), []string{t.TempDir()}
			synctest.Test(t, func(t *testing.T) {
				c := newFakeCluster(t, ca, dirs, nil)
				c.leader()
				open := make(chan struct{})
				c.lists[0].mu.Lock()
				c.lists[0].hold = func(string) { <-open }
				c.lists[0].mu.Unlock()
				if name != "reads nothing of what comes late" {
					close(open)
				}
				raw, err := c.world.dialer("n0:2")(t.Context(), c.members[0].Addr)
				if err != nil {
					t.Fatal(err)
				}
				defer raw.Close()
				conf := identity.Client(c.sources[0], identity.WantNode(domain))
				conf.NextProtos = []string{raft.ProtoForward}
				conn := tls.Client(raw, conf)
				if _, err := conn.Write(wireFrame(1, 'p', append([]byte{0, 0, 0x40, 0}, "one"...))); err != nil {
					t.Fatal(err)
				}
				synctest.Wait()
				began, closed := time.Now(), make(chan error, 1)
				go func() {
					ctx, cancel := context.WithCancel(context.Background())
					cancel()
					closed <- c.nodes[0].Close(ctx)
				}()
				if synctest.Wait(); name == "reads nothing of what comes late" {
					close(open)
				}
				for range reads {
					if _, err := readWire(conn); err != nil {
						t.Fatal(err)
					}
				}
				if err := <-closed; err != nil {
					t.Error(err)
				}
				if took := time.Since(began); took > 1500*time.Millisecond {
					t.Errorf("the node took %s to end", took)
				}
				c.nodes[0] = nil
			})
		})
	}
}

// readWire reads a frame and returns its kind.
func readWire(r io.Reader) (byte, error) {
	var head [4]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return 0, err
	}
	b := make([]byte, binary.BigEndian.Uint32(head[:]))
	_, err := io.ReadFull(r, b)
	return b[8], err
}
