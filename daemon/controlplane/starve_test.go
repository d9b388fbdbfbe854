// SPDX-License-Identifier: Apache-2.0

package controlplane

import (
	"context"
	"log/slog"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/demarc-dev/demarc/daemon/controlplane/book"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/identity"
	"github.com/demarc-dev/demarc/ledger"
)

// alone orders for a server whose reads wait for gate, where there is one.
type alone struct {
	mu   sync.Mutex
	book *ledger.Book[book.State]
	n    uint64
	gate chan struct{}
}

func (o *alone) Propose(_ context.Context, data []byte) ([]byte, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.n++
	return o.book.Apply(o.n, data)
}

func (o *alone) Read(context.Context) error {
	if o.gate != nil {
		<-o.gate
	}
	return nil
}
func (*alone) Leader() string { return "cp-1" }

// begun is a server whose book knows eu-1, enrolled with the serial s1.
func begun(t *testing.T) (*Server, *alone) {
	t.Helper()
	o := &alone{book: book.NewBook()}
	s, err := NewServer(Options{Name: "cp-1", Book: o.book, Consensus: o, KEK: make([]byte, 32), Now: time.Now, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	tell(t, s, book.Genesis{TrustDomain: innerDomain, Slots: []identity.Slot{{Stage: identity.Active, CertDER: []byte("c"), SealedKey: []byte("k")}}})
	tell(t, s, book.RegisterCustomer{Name: "globex"})
	tell(t, s, book.RegisterAppliance{Name: "eu-1", Customer: "globex", Expect: []byte(`{}`)})
	tell(t, s, book.Enrol{Name: "eu-1", Nonce: "n", NonceTill: time.Now().Add(time.Hour), Serial: "s1", Till: time.Now().Add(time.Hour), LogKey: []byte("k")})
	return s, o
}

func tell[R any](t *testing.T, s *Server, c ledger.Change[book.State, R]) {
	t.Helper()
	if _, err := book.Submit(t.Context(), s.replica, "test", "", c); err != nil {
		t.Fatalf("%s: %v", c.Kind(), err)
	}
}

// TestAHandshakeThatWaitsForTheBookLetsOthersCompute: callers whose certificate the book does not know take no turn while the
// node catches up, and one that is banned is refused without a question to the others.
func TestAHandshakeThatWaitsForTheBookLetsOthersCompute(t *testing.T) {
	s, o := begun(t)
	o.gate = make(chan struct{})
	who := fleet.PrincipalOf(innerDomain, fleet.Appliance, "eu-1")
	var wg sync.WaitGroup
	for range s.desk.Slots() {
		s.desk.Acquire()
		wg.Go(func() {
			if s.Admit(who, "old") == nil {
				t.Error("an old certificate came in")
			}
			s.desk.Release()
		})
	}
	free := make(chan struct{})
	go func() {
		s.desk.Acquire()
		close(free)
	}()
	select {
	case <-free:
		s.desk.Release()
	case <-time.After(10 * time.Second):
		t.Error("those who wait keep every turn")
	}
	close(o.gate)
	wg.Wait()
	tell(t, s, book.Ban{Name: "eu-1", Reason: "lost"})
	o.gate = make(chan struct{}) // nobody opens it
	if s.Admit(who, "s1") == nil {
		t.Error("a banned appliance came in")
	}
}

// TestWhoDoesNotCountersignIsAskedOnceForAHead: a log at rest stays at rest beside an appliance that acknowledges and does not sign.
func TestWhoDoesNotCountersignIsAskedOnceForAHead(t *testing.T) {
	s, _ := begun(t)
	s.channels.open["eu-1"] = &live{s: s, name: "eu-1"}
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- s.evidence.Witness(ctx, time.Second) }()
		asked := func() uint64 {
			a, err := s.replica.View().Appliance("eu-1")
			if err != nil {
				t.Fatal(err)
			}
			if a.OrdersSent() > a.OrdersDone {
				tell(t, s, book.OrdersDone{Name: "eu-1", Upto: a.OrdersSent()})
			}
			return a.OrdersSent()
		}
		rest := func(want uint64) {
			for range 4 {
				time.Sleep(time.Second)
				synctest.Wait()
				if got := asked(); got != want {
					t.Errorf("asked %d times, want %d", got, want)
				}
			}
		}
		time.Sleep(500 * time.Millisecond)
		rest(1)
		tell(t, s, book.RegisterCustomer{Name: "initech"}) // news
		rest(2)
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// TestBeats: beats of roads that the kernels watch are rare, and no node takes more than it was measured for.
func TestBeats(t *testing.T) {
	for _, c := range []struct {
		n           int
		quiet, want time.Duration
	}{
		{1, 0, 5 * time.Second}, {3000, 0, 15 * time.Second}, {10000, 0, 50 * time.Second}, {50000, 0, 50 * time.Second}, // an older build says nothing
		{10000, 20 * time.Second, 20 * time.Second}, {10000, time.Millisecond, 5 * time.Second}, {10000, 50 * time.Second, 50 * time.Second},
		{1, 15 * time.Minute, 5 * time.Second}, {900, 15 * time.Minute, 5 * time.Minute}, {10000, 15 * time.Minute, 15 * time.Minute}, // of a build that bore no more
		{1, time.Hour, 5 * time.Second}, {900, time.Hour, 5 * time.Minute}, {9000, time.Hour, 50 * time.Minute}, {50000, time.Hour, time.Hour}, {50000, 24 * time.Hour, time.Hour},
	} {
		if got := beatFor(c.n, c.quiet); got != c.want {
			t.Errorf("%d appliances, a road that bears %s: want %s, got %s", c.n, c.quiet, c.want, got)
		}
	}
}
