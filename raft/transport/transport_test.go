// SPDX-License-Identifier: Apache-2.0

package transport

import (
	"fmt"
	"net"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// from is a connection of a source.
type from struct {
	net.Conn
	addr string
}

func (f from) RemoteAddr() net.Addr { return memberAddr(f.addr) }

func pipe(t *testing.T, addr string) (here, there net.Conn) {
	t.Helper()
	here, there = net.Pipe()
	t.Cleanup(func() { here.Close(); there.Close() })
	return from{here, addr}, there
}

func isClosed(c net.Conn) bool {
	return c.SetDeadline(time.Time{}) != nil // a closed pipe has none
}

// A new handshake evicts one of its own source if that has as many as it may: one that has sent nothing, and the oldest of those.
func TestHandshakesOfOneSourceEvictEachOther(t *testing.T) {
	h := newHandshakes()
	var all []*handshake
	for i := range maxSourceHandshake {
		c, peer := pipe(t, fmt.Sprintf("192.0.2.1:%d", i+1))
		g := h.admit(c)
		all = append(all, g)
		if i == 0 { // it has sent something
			go func() { _, _ = peer.Write([]byte{22}) }()
			if _, err := g.Read(make([]byte, 1)); err != nil {
				t.Fatal(err)
			}
		}
	}
	other, _ := pipe(t, "192.0.2.2:1")
	h.admit(other)
	for _, g := range all {
		if isClosed(g) {
			t.Fatal("evicted for another source")
		}
	}
	last, _ := pipe(t, "192.0.2.1:99")
	g := h.admit(last)
	if isClosed(all[0]) || !isClosed(all[1]) || isClosed(all[2]) || isClosed(g) {
		t.Error("not the oldest that has sent nothing was evicted")
	}
	h.done(g)
	h.done(g)
	if n := h.from["192.0.2.1/32"]; n != maxSourceHandshake-1 {
		t.Errorf("%d are counted", n)
	}
}

func TestAConnectionIsEvicted(t *testing.T) {
	s := newConns()
	var all []*conn
	for i := range maxPeerConns + 1 {
		c, _ := pipe(t, "")
		got, ok := s.add(c, "n1")
		if !ok {
			t.Fatalf("connection %d is refused", i)
		}
		all = append(all, got)
	}
	if !isClosed(all[0]) || isClosed(all[1]) {
		t.Error("not the oldest connection was evicted")
	}
	raw, _ := pipe(t, "")
	other, _ := s.add(raw, "n2")
	if s.evictPeer("n1"); len(s.open) != 1 || isClosed(other) {
		t.Errorf("%d connections are left", len(s.open))
	}
	if s.setCut(true); !isClosed(other) {
		t.Error("a connection survives that the node is cut off")
	}
	raw, _ = pipe(t, "")
	if _, ok := s.add(raw, "n2"); ok || !isClosed(raw) {
		t.Error("a connection is let in while the node is cut off")
	}
	s.setCut(false)
	raw, _ = pipe(t, "")
	if _, ok := s.add(raw, "n2"); !ok {
		t.Error("no connection is let in any more")
	}
	s.close()
	if _, ok := s.add(raw, "n2"); ok {
		t.Error("a connection is let in after the end")
	}
}
