// SPDX-License-Identifier: Apache-2.0

package fleettest

import (
	"context"
	"crypto/tls"
	"net"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/demarc-dev/demarc/daemon/controlplane"
	"github.com/demarc-dev/demarc/daemon/controlplane/admission"
	"github.com/demarc-dev/demarc/daemon/controlplane/authority"
	"github.com/demarc-dev/demarc/daemon/controlplane/book"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/identity"
	"github.com/demarc-dev/demarc/ledger"
	"github.com/demarc-dev/demarc/raft"
)

// trio is a vendor with three nodes and real raft between them, in fake time and over wires of memory.
type trio struct {
	*Fleet
	members []book.Member
	dirs    map[string]string // of the nodes
	timing  raft.Timing
	mu      sync.Mutex
	doors   map[string]*door // by address
	peers   map[string]*peer
	world   world
	turn    int // counts dials of appliances

	bundles map[string][]byte        // by node: the bundle file of one that came later
	lists   map[string][]book.Member // by node: the members of its file, where they are not all
	shape   func(name string, p *peer, o *controlplane.Options, c *raft.Config)
}

// unhurried is a timing with which an hour of three nodes costs little: leaders are found within some 10 s.
var unhurried = raft.Timing{Heartbeat: 4 * time.Second, Election: 4 * time.Second, Lease: 2 * time.Second, Commit: time.Second,
	SnapshotEvery: time.Hour, DiskHang: time.Minute}

// peer is one node that runs.
type peer struct {
	book   *ledger.Book[book.State]
	server *controlplane.Server
	source *authority.Source
	raft   *raft.Node
	live   atomic.Pointer[raft.Node] // the same, while it is being opened nil
	api    *door
	keks   authority.KEKFiles // none: the fleet's, for ever
	stop   func()
}

func newTrio(t *testing.T, timing raft.Timing) *trio {
	t.Helper()
	c, slots := foundTrio(t, timing)
	c.startAll()
	c.begin(slots)
	return c
}

// foundTrio makes one whose nodes do not run yet.
func foundTrio(t *testing.T, timing raft.Timing) (*trio, []identity.Slot) {
	t.Helper()
	f, slots := found(t, "cp-1", "cp-2", "cp-3")
	c := &trio{Fleet: f, timing: timing, dirs: map[string]string{}, doors: map[string]*door{}, peers: map[string]*peer{}, world: newWorld()}
	for name := range f.first {
		c.members = append(c.members, book.Member{Name: name, Raft: name + ":1", API: name + ":2"})
	}
	for _, m := range c.members {
		c.dirs[m.Name] = t.TempDir()
	}
	return c, slots
}

func (c *trio) startAll() {
	for _, m := range c.members {
		c.startNode(m.Name)
	}
	c.t.Cleanup(func() {
		for name := range c.dirs {
			c.stopNode(name)
		}
	})
	c.front("cp-1")
}

// sequence is raft as a server takes it.
type sequence struct {
	n *raft.Node
	f *Fleet // nil: nobody is told
}

func (s sequence) Propose(ctx context.Context, data []byte) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, 15*time.Second)
	defer cancel()
	ans, err := s.n.Propose(ctx, data)
	if err == nil && s.f != nil && s.f.told(data) {
		return nil, fault.New("fleettest.Propose", fault.Unsure, "the answer is lost")
	}
	return ans, err
}

func (s sequence) Read(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 15*time.Second)
	defer cancel()
	return s.n.Read(ctx)
}

func (s sequence) Leader() string { id, _ := s.n.Leader(); return id }

// late is a sequence that is known only once the server is made.
type late struct{ book.Consensus }

func (c *trio) listen(addr string) *door {
	d := newDoor()
	c.mu.Lock()
	defer c.mu.Unlock()
	c.doors[addr] = d
	return d
}

func (c *trio) connect(ctx context.Context, addr string) (net.Conn, error) {
	c.mu.Lock()
	d := c.doors[addr]
	c.mu.Unlock()
	none := fault.New("fleettest.connect", fault.Unavailable, "no way to %s", addr)
	if d == nil {
		return nil, none
	}
	here, there := wire()
	select {
	case d.in <- there:
		return here, nil
	case <-d.ended:
		return nil, none
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// startNode starts a node with what is in its folder.
func (c *trio) startNode(name string) {
	f := c.Fleet
	f.t.Helper()
	p := &peer{book: book.NewBook()}
	seq, clock := &late{}, &voters{world: &c.world, node: name}
	members := c.members
	if own := c.lists[name]; own != nil {
		members = own
	}
	var err error
	opts := controlplane.Options{Name: name, Book: p.book, Consensus: seq, KEK: f.kek, LeafLife: LeafLife, Beat: f.Beat, Members: members,
		Now: clock.Now, Clocks: clock, Log: f.log.With("node", name),
		Dial:     func(ctx context.Context, _, addr string) (net.Conn, error) { return c.connect(ctx, addr) },
		Snapshot: func(_ context.Context, index uint64) error { return p.raft.SnapshotAt(index) }}
	conf := raft.Config{}
	if c.shape != nil {
		c.shape(name, p, &opts, &conf)
	}
	p.server, err = controlplane.NewServer(opts)
	f.must(err)
	if p.keks.Current != "" {
		f.must(p.server.Authority().ReadKeys(p.keks))
	}
	bundle := f.bundle
	if own := c.bundles[name]; own != nil {
		bundle = own
	}
	roots, err := identity.ParseBundle(bundle, Domain)
	f.must(err)
	p.source, err = p.server.Authority().NewSource(f.first[name], identity.Pool(roots))
	f.must(err)
	f.must(p.source.SaveAt(filepath.Join(c.dirs[name], authority.CredentialsFile)))
	conf.Dir, conf.Machine, conf.Listener = filepath.Join(c.dirs[name], "raft"), book.Gate{Book: p.book, Cluster: clock.voting},
		c.listen(name+":1")
	conf.Logger, conf.Now, conf.Timing = c.world.logger(name, f.log), clock.own, c.timing
	conf.About = func() []byte { return aboutOf(p.book) }
	conf.Dial = func(ctx context.Context, addr string) (net.Conn, error) {
		return c.world.dial(ctx, name, addr, c.connect)
	}
	conf.ServerTLS = identity.Server(p.source.ToPeers(), func(id fleet.Principal, _ fleet.Serial) error {
		if _, role, _, _ := id.Split(); role != fleet.Node {
			return fault.New("fleettest.raft", fault.Denied, "%s is no node", id)
		}
		return nil
	}, true, raft.ProtoRaft, raft.ProtoForward)
	conf.ClientTLS = func(id string) *tls.Config { return identity.Client(p.source.ToPeers(), identity.WantNode(Domain, id)) }
	for _, m := range members {
		conf.First = append(conf.First, raft.Member{ID: m.Name, Addr: m.Raft})
		if m.Name == name {
			conf.Self = raft.Member{ID: m.Name, Addr: m.Raft}
		}
	}
	p.raft, err = raft.Open(conf)
	f.must(err)
	seq.Consensus = sequence{p.raft, f}
	clock.up(p.raft)
	p.live.Store(p.raft)
	ctx, cancel := context.WithCancel(context.Background())
	p.api = c.listen(name + ":2")
	var wg sync.WaitGroup
	wg.Go(func() {
		for p.book.View().TrustDomain == "" || p.raft.Read(ctx) != nil {
			// as the daemon does: a door that opens on an old book would refuse those that it does not know yet
			select {
			case <-ctx.Done():
				return
			case <-time.After(100 * time.Millisecond):
			}
		}
		wg.Go(func() { p.server.RollCall(ctx, 90*time.Second) })
		conf := identity.Server(p.source, p.server.Admit, false, admission.Protocols()...)
		_ = p.server.Listener("door", p.api, conf, f.log).Run(ctx, func() {})
	})
	wg.Go(func() { _ = p.server.Follow(ctx, func() {}) })
	wg.Go(func() { _ = p.source.Tend(ctx) })
	wg.Go(func() { _ = p.server.TendTime(ctx) })
	if p.keks.Current != "" {
		wg.Go(func() { _ = p.server.Authority().TendKeys(ctx, p.keks) })
	}
	wg.Go(func() { _ = p.source.CatchUp(ctx, 5*time.Second) })
	p.stop = func() {
		cancel()
		gone, end := context.WithCancel(context.Background())
		end() // a crash: nothing is handed over
		_ = p.raft.Close(gone)
		wg.Wait()
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.peers[name] = p
}

// stopNode ends a node.
func (c *trio) stopNode(name string) {
	c.mu.Lock()
	p := c.peers[name]
	delete(c.peers, name)
	c.mu.Unlock()
	if p != nil {
		p.stop()
	}
}

// front has appliances come to this node, and the operator ask it.
func (c *trio) front(name string) {
	c.mu.Lock()
	p := c.peers[name]
	c.mu.Unlock()
	c.Fleet.mu.Lock()
	defer c.Fleet.mu.Unlock()
	c.book, c.server, c.door, c.seq, c.stop = p.book, p.server, p.api, sequence{n: p.raft}, func() {}
}

func playTrio(t *testing.T, play func(t *testing.T, c *trio)) {
	synctest.Test(t, func(t *testing.T) { play(t, newTrio(t, raft.Timing{})) })
}

// TestThreeNodesOfflineRow plays the row of docs/offline.md in which an appliance was stopped for an hour, with three nodes;
// the one that it was at is down when it comes back.
func TestThreeNodesOfflineRow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newTrio(t, unhurried)
		a := c.AddAppliance("eu-1")
		a.Start()
		a.WaitUp(time.Minute)
		before := c.Of("eu-1")
		a.Stop()
		c.Wait("it left", time.Minute, func() bool { return !c.Of("eu-1").Online })
		time.Sleep(time.Hour)
		c.front("cp-2")
		c.stopNode("cp-1")
		time.Sleep(time.Minute)
		size := c.Size()
		a.Start()
		there := func() bool { at := c.Of("eu-1"); return a.Up() && at.Node == "cp-2" }
		c.Wait("it is at another node", time.Minute, there)
		if at := c.Of("eu-1"); string(at.LogKey) != string(before.LogKey) || !at.Since.Equal(before.Since) {
			t.Error("it came back as another")
		}
		if n := c.Size() - size; n > 4 {
			t.Errorf("%d entries", n)
		}
	})
}
