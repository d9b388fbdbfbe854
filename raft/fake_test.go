// SPDX-License-Identifier: Apache-2.0

package raft_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/identity"
	"github.com/demarc-dev/demarc/raft"

	"crypto/tls"
)

// fakeNet is a network of pipes in one process: it lives in fake time, and can be cut anywhere.
type fakeNet struct {
	mu    sync.Mutex
	doors map[string]*fakeDoor
	away  map[string]bool // nodes that are cut off
	conns map[net.Conn][2]string
}

type fakeDoor struct {
	addr  string
	in    chan net.Conn
	once  sync.Once
	ended chan struct{}
}

func (d *fakeDoor) Accept() (net.Conn, error) {
	select {
	case c := <-d.in:
		return c, nil
	case <-d.ended:
		return nil, net.ErrClosed
	}
}
func (d *fakeDoor) Close() error   { d.once.Do(func() { close(d.ended) }); return nil }
func (d *fakeDoor) Addr() net.Addr { return &net.UnixAddr{Name: d.addr} }

func (n *fakeNet) listen(addr string) *fakeDoor {
	n.mu.Lock()
	defer n.mu.Unlock()
	d := &fakeDoor{addr: addr, in: make(chan net.Conn), ended: make(chan struct{})}
	n.doors[addr] = d
	return d
}

func (n *fakeNet) dialer(from string) func(ctx context.Context, addr string) (net.Conn, error) {
	return func(ctx context.Context, addr string) (net.Conn, error) {
		n.mu.Lock()
		d, cut := n.doors[addr], n.away[from] || n.away[addr]
		n.mu.Unlock()
		if d == nil || cut {
			return nil, errors.New("no route")
		}
		here, there := net.Pipe()
		select {
		case d.in <- there:
		case <-d.ended:
			return nil, errors.New("refused")
		case <-ctx.Done():
			return nil, ctx.Err()
		}
		n.mu.Lock()
		defer n.mu.Unlock()
		n.conns[here], n.conns[there] = [2]string{from, addr}, [2]string{from, addr}
		return here, nil
	}
}

// cut keeps all others from a node, and breaks its connections.
func (n *fakeNet) cut(addr string, on bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.away[addr] = on
	for c, ends := range n.conns {
		if on && (ends[0] == addr || ends[1] == addr) {
			c.Close()
			delete(n.conns, c)
		}
	}
}

// The whole cluster in one process and in fake time: minutes of cuts and crashes take a second. Each answer that was
// given holds on every node, once and in one order.
func TestFakeMinutesOfCutsAndCrashes(t *testing.T) {
	for seed := range uint64(3) {
		t.Run(fmt.Sprint("seed ", seed), func(t *testing.T) {
			ca := newCA(t) // certificates are of the real clock; the bubble's begins in the year 2000
			dirs := []string{t.TempDir(), t.TempDir(), t.TempDir()}
			synctest.Test(t, func(t *testing.T) { fakeRun(t, ca, dirs, rand.New(rand.NewPCG(seed, 7))) })
		})
	}
}

type fakeSource struct {
	identity.Source
	now time.Time
}

func (s fakeSource) Now() time.Time { return s.now }

// fakeCluster is nodes in a bubble. Its certificates are made by the real clock.
type fakeCluster struct {
	*cluster
	world   *fakeNet
	sources []identity.Source
}

func newFakeCluster(t *testing.T, ca *identity.Authority, dirs []string, edit func(i int, cfg *raft.Config)) *fakeCluster {
	t.Helper()
	real := ca.Cert.NotAfter.Add(-30 * time.Minute)
	f := &fakeCluster{world: &fakeNet{doors: map[string]*fakeDoor{}, away: map[string]bool{}, conns: map[net.Conn][2]string{}}}
	f.cluster = &cluster{t: t, ca: ca, lists: make([]*list, len(dirs)), nodes: make([]*raft.Node, len(dirs)), edit: edit}
	for i := range dirs {
		f.members = append(f.members, raft.Member{ID: fmt.Sprintf("n%d", i), Addr: fmt.Sprintf("n%d:1", i)})
		f.dirs = append(f.dirs, filepath.Join(dirs[i], "raft"))
		f.sources = append(f.sources, fakeSource{sourceAt(t, ca, fleet.Node, f.members[i].ID, real), real})
	}
	for i := range dirs {
		f.up(i)
	}
	return f
}

// up starts a node.
func (f *fakeCluster) up(i int) {
	f.t.Helper()
	s := f.sources[i]
	f.lists[i] = &list{}
	cfg := raft.Config{Self: f.members[i], First: f.members, Dir: f.dirs[i], Machine: f.lists[i],
		Listener: f.world.listen(f.members[i].Addr), Dial: f.world.dialer(f.members[i].Addr), Peer: peer,
		ServerTLS: identity.Server(s, onlyNodes, true, raft.ProtoRaft, raft.ProtoForward),
		ClientTLS: func(id string) *tls.Config { return identity.Client(s, identity.WantNode(domain, id)) }}
	raft.SmallLog(&cfg, 4<<20)
	if f.edit != nil {
		f.edit(i, &cfg)
	}
	n, err := raft.Open(cfg)
	if err != nil {
		f.t.Fatal(err)
	}
	f.nodes[i] = n
}

func fakeRun(t *testing.T, ca *identity.Authority, dirs []string, r *rand.Rand) {
	c := newFakeCluster(t, ca, dirs, nil)
	world, up := c.world, c.up
	began := time.Now()
	sure, tried := map[string]bool{}, map[string]bool{}
	for k := range 150 {
		switch i := r.IntN(3); r.IntN(12) {
		case 0:
			world.cut(c.members[i].Addr, true)
		case 1, 2:
			for _, m := range c.members {
				world.cut(m.Addr, false)
			}
		case 3: // a crash: nothing is handed over
			gone, stop := context.WithCancel(t.Context())
			stop()
			if err := c.nodes[i].Close(gone); err != nil {
				t.Fatal(err)
			}
			up(i)
		case 4:
			time.Sleep(time.Duration(r.IntN(20)) * time.Second)
		}
		line := fmt.Sprint("line", k)
		tried[line] = true
		ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
		_, err := c.nodes[r.IntN(3)].Propose(ctx, []byte(line))
		cancel()
		if err == nil {
			sure[line] = true
		} else if k := fault.Of(err); k != fault.Unsure && k != fault.Unavailable && k != fault.NotLeader {
			t.Fatalf("%s: %v", line, err)
		}
	}
	for _, m := range c.members {
		world.cut(m.Addr, false)
	}
	for i := range 3 {
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
		if err := c.nodes[i].Read(ctx); err != nil {
			t.Fatal(err)
		}
		cancel()
	}
	base := c.lists[0].all()
	for i := range 3 {
		if got := c.lists[i].all(); !slices.Equal(got, base) {
			t.Fatalf("n%d has %d lines, n0 has %d, or in another order", i, len(got), len(base))
		}
	}
	for line := range sure {
		if !slices.Contains(base, line) {
			t.Fatalf("%q was answered and is lost", line)
		}
	}
	for i, line := range base {
		if !tried[line] || slices.Contains(base[:i], line) {
			t.Fatalf("%q is there twice, or was never proposed", line)
		}
	}
	if len(sure) < 50 {
		t.Fatalf("only %d of 150 were answered: the cluster hardly lived", len(sure))
	}
	t.Logf("%d of 150 answered in %s of fake time", len(sure), time.Since(began).Round(time.Second))
	for i := range 3 {
		c.stop(i)
	}
}
