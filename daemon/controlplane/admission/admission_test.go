// SPDX-License-Identifier: Apache-2.0

package admission

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/demarc-dev/demarc/daemon"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/identity"
	"github.com/demarc-dev/demarc/identity/identitytest"
)

const domain = "acme.example" // trust domain

// listening is a listener of a desk that serves nothing.
func listening(ln net.Listener, conf *tls.Config) *Listener {
	return NewDesk(Config{Calls: http.NotFoundHandler(), Channel: func(_ context.Context, c *tls.Conn) Session { _ = c.Close(); return nil },
		Verified: func(tls.ConnectionState) error { return nil },
		Opened:   func(func(), tls.ConnectionState) func() { return func() {} }}).Listener("listener", ln, conf, slog.New(slog.DiscardHandler))
}

func admitAll(fleet.Principal, fleet.Serial) error { return nil }

// served runs a listener until the test ends.
func served(t *testing.T, d *Listener) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- d.Run(ctx, func() {}) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// lasted reads until a connection ends, and returns how long that took.
func lasted(c io.Reader) time.Duration {
	began := time.Now()
	_, _ = io.Copy(io.Discard, c)
	return time.Since(began).Round(time.Millisecond)
}

// TestWhoWaitedTooLongIsNotServed: a connection that is admitted after its peer has gone elsewhere takes no handshake.
func TestWhoWaitedTooLongIsNotServed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		lis := listening(newUpgradeListener(&net.TCPAddr{}, 1), nil)
		late, theirs := net.Pipe()
		lis.push(waiting{theirs, time.Now().Add(-queueWait - time.Second), "192.0.2.1"})
		served(t, lis)
		if took := lasted(late); took != 0 {
			t.Errorf("it was held for %s", took)
		}
	})
}

// TestAnonymousOfManyNetworksAreEvicted: all their connections together have a bound, and the network that holds the most pays.
func TestAnonymousOfManyNetworksAreEvicted(t *testing.T) {
	g := newConnTable()
	enter := func(host string) (*callConn, error) {
		c, _ := net.Pipe()
		who := &callConn{owner: host, kind: anonymousQuota}
		out, err := g.enter(c, who, 0)
		g.serve(c, &daemon.Calls{})
		return out, err
	}
	for i := range anonymousQuota.all {
		host := fmt.Sprint("net-", i)
		if i < AnonymousEach/2 {
			host = "most"
		}
		if out, err := enter(host); out != nil || err != nil {
			t.Fatalf("connection %d: %v, %v", i, out, err)
		}
	}
	for i := range 10 {
		out, err := enter(fmt.Sprint("late-", i))
		if err != nil || out == nil || out.owner != "most" {
			t.Fatalf("newcomer %d: %+v gives way, %v", i, out, err)
		}
	}
	if n := g.kinds[anonymousQuota]; n != anonymousQuota.all {
		t.Errorf("%d anonymous connections are open, want %d", n, anonymousQuota.all)
	}
}

// TestWhoLosesItsPlace: how long a peer may be silent in its handshake while all places are taken and others wait.
func TestWhoLosesItsPlace(t *testing.T) {
	for name, x := range map[string]struct {
		spoke bool
		many  int    // handshakes of its source
		waits string // where the one comes from that waits
		want  time.Duration
	}{
		"it never spoke":                      {false, 1, "other", silentWait},
		"it spoke":                            {true, 1, "other", peerWait},
		"one of many of its source":           {true, heavy + 1, "other", heavyWait},
		"one of as many as a source may have": {true, heavy, "other", peerWait},
		"one of many, and only its own wait":  {true, heavy + 1, "it", peerWait},
		"one of many that never spoke":        {false, heavy + 1, "it", silentWait},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				lis := listening(newUpgradeListener(&net.TCPAddr{}, 1), nil)
				mine, theirs := net.Pipe()
				defer mine.Close()
				for range x.many {
					one := &handshake{Conn: theirs, slots: lis.desk.slots, accepted: time.Now(), network: "it"}
					one.spoke.Store(x.spoke)
					one.since.Store(1) // it waits for its peer's bytes
					lis.setInFlight(one, true)
				}
				lis.next = "/" + x.waits
				began := time.Now()
				for len(lis.conns.inFlight) == x.many {
					time.Sleep(lis.evictStalled())
				}
				if took := time.Since(began); took < x.want || took > x.want+2*stallCheck {
					t.Errorf("it lost its place after %s, want %s", took, x.want)
				}
			})
		})
	}
}

// TestAProvenConnectionLeavesItsPlace: the listener wraps the connection, and the place is found all the same.
func TestAProvenConnectionLeavesItsPlace(t *testing.T) {
	ca, err := identity.NewCA(domain, time.Now(), rand.Reader, identity.DefaultCALife)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := identitytest.Leaf(ca, fleet.PrincipalOf(domain, fleet.Node, "cp-1"), time.Now(), time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	roots := identity.Pool([]*x509.Certificate{ca.Cert})
	in := newUpgradeListener(&net.TCPAddr{}, 1)
	conf := in.proving(identity.Server(identity.Fixed(leaf, roots), admitAll, false, "h2"))
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- listening(in, conf).Run(ctx, func() {}) }()
	mine, theirs := net.Pipe()
	defer mine.Close()
	left := make(chan struct{})
	in.conns <- &pending{Conn: theirs, leave: sync.OnceFunc(func() { close(left) })}
	if err := tls.Client(mine, identity.Client(identity.Fixed(nil, roots), identity.WantNode(domain),
		"h2")).HandshakeContext(t.Context()); err != nil {
		t.Fatal(err)
	}
	select {
	case <-left:
	case <-time.After(5 * time.Second): // the server of HTTP/2 would end the silent connection after 10 s
		t.Error("a proven connection still holds its place")
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// TestSourcesAreServedRoundRobin: the first of one source is served before the second of another, and at the bound the longest queue loses one.
func TestSourcesAreServedRoundRobin(t *testing.T) {
	var q fairQueue
	for i := range 100 {
		q.push(waiting{from: "many", since: time.Unix(int64(i), 0)}, 100)
	}
	mine, theirs := net.Pipe()
	defer mine.Close()
	defer theirs.Close()
	q.order[0].list[0].conn = theirs
	if out := q.push(waiting{from: "one"}, 100); out != theirs {
		t.Fatal("the oldest of the longest line did not go")
	}
	q.push(waiting{from: "two"}, 1000)
	var got []string
	for range 4 {
		w, _ := q.pop()
		got = append(got, w.from)
	}
	if want := []string{"many", "one", "two", "many"}; !slices.Equal(want, got) {
		t.Fatalf("want %v, got %v", want, got)
	}
	for n := 97; n > 0; n-- {
		if _, ok := q.pop(); !ok {
			t.Fatalf("%d are missing", n)
		}
	}
	if _, ok := q.pop(); ok || len(q.of) != 0 || len(q.order) != 0 {
		t.Fatal("something is left")
	}
}
