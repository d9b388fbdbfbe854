// SPDX-License-Identifier: Apache-2.0

package admission

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"net"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/identity"
	"github.com/demarc-dev/demarc/identity/identitytest"
)

// TestEarlyConnectionsAreAccepted: while a node reads its book, connections leave the kernel's backlog, and are served in
// order once the listener runs.
func TestEarlyConnectionsAreAccepted(t *testing.T) {
	const early = 20
	ca, err := identity.NewCA(domain, time.Now(), rand.Reader, identity.DefaultCALife)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := identitytest.Leaf(ca, fleet.PrincipalOf(domain, fleet.Node, "cp-1"), time.Now(), time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	roots := identity.Pool([]*x509.Certificate{ca.Cert})
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	lis := listening(ln, identity.Server(identity.Fixed(leaf, roots), admitAll, false, "h2"))
	part := lis.AcceptEarly()
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 2)
	go func() { ended <- part.Run(ctx, func() {}) }()
	var wg sync.WaitGroup
	for range early {
		raw, err := net.Dial("tcp", ln.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer raw.Close()
		wg.Go(func() {
			_ = raw.SetDeadline(time.Now().Add(20 * time.Second))
			if err := tls.Client(raw, identity.Client(identity.Fixed(nil, roots), identity.WantNode(domain), "h2")).Handshake(); err != nil {
				t.Error(err)
			}
		})
	}
	waiting := func() int {
		lis.mu.Lock()
		defer lis.mu.Unlock()
		return lis.queue.n
	}
	for till := time.Now().Add(10 * time.Second); waiting() < early; {
		if time.Now().After(till) {
			t.Fatalf("%d wait, want %d", waiting(), early)
		}
		time.Sleep(time.Millisecond)
	}
	go func() { ended <- lis.Run(ctx, func() {}) }()
	wg.Wait()
	cancel()
	for range 2 {
		if err := <-ended; err != nil {
			t.Error(err)
		}
	}
}

// TestOverdueConnectionsAreClosed: a node that does not open keeps nobody from trying another.
func TestOverdueConnectionsAreClosed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		in := newUpgradeListener(&net.TCPAddr{}, 1)
		part := listening(in, nil).AcceptEarly()
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error, 1)
		go func() { ended <- part.Run(ctx, func() {}) }()
		came := time.Now()
		mine, theirs := net.Pipe()
		in.conns <- &pending{Conn: theirs, leave: func() {}}
		if _, err := mine.Read(make([]byte, 1)); err == nil {
			t.Error("somebody said something")
		}
		if took := time.Since(came); took < queueWait || took > queueWait+2*time.Second {
			t.Errorf("it was let go after %s, want %s", took, queueWait)
		}
		late, last := net.Pipe()
		in.conns <- &pending{Conn: last, leave: func() {}}
		synctest.Wait()
		cancel()
		if _, err := late.Read(make([]byte, 1)); err == nil {
			t.Error("a node that stops leaves a connection open")
		}
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
}
