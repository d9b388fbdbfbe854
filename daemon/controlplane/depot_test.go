// SPDX-License-Identifier: Apache-2.0

package controlplane

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"fmt"
	"log/slog"
	"sync"
	"testing"
	"time"

	"github.com/demarc-dev/demarc/daemon/controlplane/book"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/identity"
	"github.com/demarc-dev/demarc/manifest"
	"github.com/demarc-dev/demarc/seal"
	"github.com/demarc-dev/demarc/workload/artifact"
)

// depots is three nodes with a store each, one book, and ways between them that can break.
type depots struct {
	t     *testing.T
	order *alone
	nodes []*Server
	key   ed25519.PrivateKey

	mu    sync.Mutex
	down  map[string]bool               // nobody reaches it
	spoil map[string]func([]byte) error // what it does to the pieces that it sends
	hangs map[string]bool               // it takes calls, and answers none
	calls map[string]int                // fetches that it was asked for
	stops []func()
}

// newDepots is called inside of a bubble.
func newDepots(t *testing.T) *depots {
	t.Helper()
	w := &depots{t: t, order: &alone{book: book.NewBook()}, key: ed25519.NewKeyFromSeed(make([]byte, 32)), down: map[string]bool{}, spoil: map[string]func([]byte) error{}, hangs: map[string]bool{}, calls: map[string]int{}}
	var members []book.Member
	for i := range 3 {
		members = append(members, book.Member{Name: fmt.Sprint("cp-", i+1), API: fmt.Sprint("cp-", i+1)})
	}
	for _, m := range members {
		s, err := NewServer(Options{Name: m.Name, Book: w.order.book, Consensus: w.order, Artifacts: w.disk(), Members: members, KEK: make([]byte, 32), Now: time.Now, Log: slog.New(slog.DiscardHandler)})
		if err != nil {
			t.Fatal(err)
		}
		s.depot.reach = func(to book.Member) Remote { return wireTo{w, to.Name} }
		w.nodes = append(w.nodes, s)
	}
	tell(t, w.nodes[0], book.Genesis{TrustDomain: innerDomain, Slots: []identity.Slot{{Stage: identity.Active, CertDER: []byte("c"), SealedKey: []byte("k")}}})
	tell(t, w.nodes[0], book.RegisterCustomer{Name: "globex"})
	for _, name := range []fleet.ApplianceID{"eu-1", "eu-2"} {
		tell(t, w.nodes[0], book.RegisterAppliance{Name: name, Customer: "globex", Expect: []byte(`{}`)})
	}
	for i := range w.nodes {
		w.stops = append(w.stops, func() {})
		w.start(i)
	}
	t.Cleanup(func() {
		for i := range w.nodes {
			w.stops[i]()
		}
	})
	return w
}

func (w *depots) disk() *artifact.Store {
	w.t.Helper()
	s, err := artifact.Open(w.t.TempDir())
	if err != nil {
		w.t.Fatal(err)
	}
	return s
}

// start runs what keeps a node's artifacts.
func (w *depots) start(i int) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	d := w.nodes[i].depot
	go func() { defer close(done); _ = d.run(ctx, func() {}) }()
	w.stops[i] = func() { cancel(); <-done }
}

// lose replaces the disk of a node.
func (w *depots) lose(i int) {
	w.stops[i]()
	s := w.nodes[i]
	d := newDepot(s, w.disk())
	d.reach = s.depot.reach
	w.set(func() { s.depot = d })
	w.start(i)
}

func (w *depots) set(f func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	f()
}

// put uploads an artifact to a node.
func (w *depots) put(i int, b []byte) fleet.Digest {
	w.t.Helper()
	d := fleet.DigestOf(b)
	if _, err := w.nodes[i].depot.store.Put(context.Background(), d, bytes.NewReader(b)); err != nil {
		w.t.Fatal(err)
	}
	return d
}

// publish has a node publish a release that names artifacts, and offer it to eu-1.
func (w *depots) publish(i int, version string, of ...fleet.Digest) error {
	w.t.Helper()
	rel := manifest.Release{App: "notes", Version: version, Artifacts: map[string]fleet.Digest{}}
	for i, d := range of {
		rel.Artifacts[fmt.Sprint("s", i)] = d
	}
	if err := w.nodes[i].depot.replicateAll(context.Background(), rel); err != nil {
		return err
	}
	sealed, err := seal.Seal(rel, w.key)
	if err != nil {
		w.t.Fatal(err)
	}
	tell(w.t, w.nodes[i], book.Publish{Digest: fleet.DigestOf(sealed), App: rel.App, Version: version, Sealed: sealed, To: []fleet.ApplianceID{"eu-1"}})
	return nil
}

// holding counts the nodes that have an artifact, whole, with its own bytes.
func (w *depots) holding(d fleet.Digest) (n int) {
	w.t.Helper()
	for _, s := range w.nodes {
		if !s.depot.store.Durable(d) {
			continue
		}
		b, err := s.depot.store.Get(d)
		if err != nil {
			w.t.Fatal(err)
		}
		all := make([]byte, b.Size())
		_, err = b.ReadAt(all, 0)
		b.Close()
		if err != nil || fleet.DigestOf(all) != d {
			w.t.Fatalf("%s holds other bytes under %s: %v", s.replica.Node, d.Short(), err)
		}
		n++
	}
	return n
}

// wireTo is the way to a node.
type wireTo struct {
	w  *depots
	to string
}

func (c wireTo) node(ctx context.Context) (*depot, error) {
	c.w.mu.Lock()
	down, hangs := c.w.down[c.to], c.w.hangs[c.to]
	c.w.mu.Unlock()
	if hangs {
		<-ctx.Done()
	}
	if down || hangs {
		return nil, fault.New("test", fault.Unavailable, "connection refused")
	}
	c.w.mu.Lock()
	defer c.w.mu.Unlock()
	for _, s := range c.w.nodes {
		if s.replica.Node == c.to {
			return s.depot, nil
		}
	}
	return nil, fault.New("test", fault.Unavailable, "no such node")
}

func (c wireTo) Fetch(ctx context.Context, d fleet.Digest, offset int64, give func(int64, []byte) error) error {
	c.w.mu.Lock()
	c.w.calls[c.to]++
	c.w.mu.Unlock()
	s, err := c.node(ctx)
	if err != nil {
		return err
	}
	b, err := s.store.Get(d)
	if err != nil {
		return err
	}
	defer b.Close()
	if offset > b.Size() {
		return fault.New("test", fault.Invalid, "offset")
	}
	for ; offset < b.Size(); offset += 1000 {
		piece := make([]byte, min(1000, b.Size()-offset))
		if _, err := b.ReadAt(piece, offset); err != nil {
			return err
		}
		c.w.mu.Lock()
		spoil := c.w.spoil[c.to]
		c.w.mu.Unlock()
		if spoil != nil {
			if err := spoil(piece); err != nil {
				return err
			}
		}
		if _, err := c.node(ctx); err != nil { // it may have died meanwhile
			return err
		}
		if err := give(b.Size(), piece); err != nil {
			return err
		}
		time.Sleep(10 * time.Millisecond)
	}
	return nil
}

func (c wireTo) Hold(ctx context.Context, d fleet.Digest, from []string, told func(int64)) error {
	s, err := c.node(ctx)
	if err != nil {
		return err
	}
	return s.hold(ctx, d, from, func(n int64) error { told(n); return nil })
}

// soon waits for a condition, in fake time.
func soon(t *testing.T, limit time.Duration, what string, is func() bool) {
	t.Helper()
	for end := time.Now().Add(limit); !is(); time.Sleep(100 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not so within %s: %s", limit, what)
		}
	}
}

func some(n int, seed byte) []byte { return bytes.Repeat([]byte{seed, 1, 2, 3, 5, 7, 11}, n/7) }
