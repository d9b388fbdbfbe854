// SPDX-License-Identifier: Apache-2.0

package raft

import (
	"context"
	"crypto/x509"
	"errors"
	"log/slog"
	"time"

	hraft "github.com/hashicorp/raft"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/raft/clock"
	"github.com/demarc-dev/demarc/raft/forward"
	"github.com/demarc-dev/demarc/raft/store"
	"github.com/demarc-dev/demarc/raft/transport"
)

// Node is one member of a cluster. Its methods may be called concurrently.
type Node struct {
	cfg  Config
	log  *slog.Logger
	life *lifetime

	lib       *consensus
	disk      *diskGuard
	net       *transport.Network
	trans     *hraft.NetworkTransport // nil before it is made
	calls     *forward.Client
	proposals *proposer
	reads     *reader
	time      *timekeeper
	members   *membership
	status    *monitor
	meters    *meters
}

// Open starts a node. If Dir holds no state it begins with the first configuration, and the cluster elects once a majority
// of its members does so. If it fails the listener is still the caller's.
func Open(cfg Config) (*Node, error) {
	const op = "raft.Open"
	cfg.fill()
	if err := cfg.check(); err != nil {
		return nil, err
	}
	n := assemble(cfg)
	if err := n.open(); err != nil {
		n.life.stop()
		n.life.tasks.Wait()
		if n.lib.raft != nil {
			_ = n.lib.raft.Shutdown().Error()
		}
		n.net.CloseConns()
		n.calls.Close()
		if n.trans != nil {
			_ = n.trans.Close()
		}
		if also := n.disk.close(); also != nil {
			err = errors.Join(err, also) // alone it says better what it is
		}
		return nil, fault.At(op, "", err)
	}
	serve := &handler{proposals: n.proposals, reads: n.reads, members: n.members, status: n.status}
	n.life.tasks.Go(func() { n.net.Run(forward.Server{Term: n.lib.term, Handle: serve.handle}) })
	for range packers {
		n.life.work.Go(n.proposals.run)
	}
	n.life.work.Go(n.reads.run)
	n.life.work.Go(n.status.run)
	n.life.tasks.Go(n.disk.watch)
	n.life.tasks.Go(n.disk.prepare)
	go n.run() // Close waits for it: it closes life.ended
	return n, nil
}

// assemble makes the parts of a node and connects them. Nothing runs yet.
func assemble(cfg Config) *Node {
	n := &Node{cfg: cfg, log: cfg.Logger, life: newLifetime()}
	n.lib = &consensus{self: cfg.Self.ID, fsm: newMachine(cfg.Machine)}
	addrs := newAddresses(cfg.First)
	n.lib.fsm.configuredAt = addrs.committed
	n.net = transport.New(n.life.ctx, transport.Config{Addr: cfg.Self.Addr, Listener: cfg.Listener, ServerTLS: cfg.ServerTLS,
		ClientTLS: cfg.ClientTLS, Dial: cfg.Dial, Peer: cfg.Peer, Logger: n.log,
		Addresses: addrs.of, Removed: addrs.removed, Index: addrs.index})
	n.calls = forward.NewClient(n.life.ctx, forward.ClientConfig{
		Dial:        n.net.DialForward,
		DialTimeout: min(rpcTimeout, cfg.Timing.callTimeout()),
		Known:       func(id string) bool { return len(addrs.of(id)) > 0 },
		Removed:     func(peer string, index uint64) { n.members.removedBy(peer, index) },
	})
	queue := newQueue()
	n.disk = &diskGuard{lib: n.lib, life: n.life, log: n.log, hang: cfg.Timing.DiskHang, cutOff: n.net.SetCut, refuse: queue.refuse}
	n.time = &timekeeper{lib: n.lib, clocks: clock.New(cfg.Now), probe: make(chan struct{}, 1)}
	n.meters = newMeters(n)
	n.proposals = &proposer{lib: n.lib, life: n.life, disk: n.disk, dryRun: cfg.Machine.DryRun, packs: n.meters.packs, queue: queue}
	n.reads = &reader{lib: n.lib, life: n.life, calls: n.calls, rounds: newRounds(), timeout: max(cfg.Timing.Election, 100*time.Millisecond)}
	peers := newPresence(cfg.Self.ID, cfg.Timing.silence())
	n.members = &membership{cfg: &n.cfg, lib: n.lib, life: n.life, log: n.log, addrs: addrs, peers: peers, net: n.net, calls: n.calls,
		snapshot: func() (uint64, error) { return n.disk.store.Snapshots.ConfigurationIndex() }}
	n.status = &monitor{cfg: &n.cfg, lib: n.lib, life: n.life, log: n.log, calls: n.calls, time: n.time, peers: peers, members: n.members}
	return n
}

// open opens the disk and starts the library.
func (n *Node) open() error {
	const op = "raft.open"
	var err error
	logger := hclogger(n.log)
	disk, err := store.Open(store.Options{Dir: n.cfg.Dir, Self: n.cfg.Self.ID, Log: n.cfg.Log, Files: n.cfg.Files}, logger)
	if err != nil {
		return err
	}
	var logs store.BufferedLog = disk.Log
	if n.cfg.wrap != nil {
		logs = n.cfg.wrap(logs)
	}
	n.disk.store = disk
	n.disk.logs = store.NewAsync(logs, store.AsyncConfig{Wrote: n.meters.wrote, Fail: func(err error) {
		n.lib.fsm.fail(fault.Because(err, op, fault.Internal, "the log can't be written: %s", fault.Text(err)))
	}})
	n.lib.fsm.onDisk = func(index uint64) bool { return n.disk.logs.WaitSynced(index, n.lib.fsm.failed) }
	if n.lib.logs, err = hraft.NewLogCache(cachedEntries, n.disk.logs); err != nil {
		return fault.At(op, fault.Internal, err)
	}
	n.trans = hraft.NewNetworkTransportWithConfig(&hraft.NetworkTransportConfig{Stream: n.net.Streams(), MaxPool: 4, Timeout: rpcTimeout,
		MaxRPCsInFlight: inFlight, Logger: logger, ServerAddressProvider: byID{}})
	if err := bootstrap(&n.cfg, n.lib.logs, disk, n.trans); err != nil {
		return err
	}
	trans := store.ClampCommits(n.trans, n.disk.logs.Synced)
	n.lib.raft, err = hraft.NewRaft(n.cfg.library(), n.lib.fsm, n.lib.logs, disk.Log, disk.Snapshots, trans)
	n.disk.logs.Lead(n.lib.raft)
	switch {
	case n.lib.fsm.failure() != nil:
		return n.lib.fsm.failure() // says it better
	case err != nil:
		return fault.Because(err, op, fault.Internal, "the node can't start from what is in its directory")
	}
	at, err := disk.ConfigurationIndex()
	if err != nil {
		return fault.Because(err, op, fault.Unavailable, "the members can't be read from the log")
	}
	n.members.start(at)
	n.lib.observe(n.life)
	return n.meters.register(n.cfg.Registerer)
}

// Leader names the leader, as far as this node knows. A leader whose disk hangs does not call itself one.
func (n *Node) Leader() (string, bool) { return n.lib.leader() }

// State is for people and for metrics.
type State struct {
	Role      string // leader, follower, candidate, shutdown
	Term      uint64
	Applied   uint64 // index of the last entry that the machine has
	Last      uint64 // index of the last entry in the log
	Leader    string
	Voters    int // in the configuration that this node knows
	Reachable int // voters that this node, as the leader, hears from, itself included; 0 if it does not lead
}

// State returns what this node is at this moment.
func (n *Node) State() State {
	id, _ := n.lib.leader()
	s := State{Role: roleOf(n.lib.raft.State()), Term: n.lib.term(), Applied: n.lib.fsm.index.Load(), Last: n.lib.raft.LastIndex(), Leader: id}
	all, heard := n.lib.reachable()
	s.Voters = all
	if n.lib.raft.State() == hraft.Leader {
		s.Reachable = heard
	}
	return s
}

func roleOf(s hraft.RaftState) string {
	switch s {
	case hraft.Leader:
		return "leader"
	case hraft.Candidate:
		return "candidate"
	case hraft.Shutdown:
		return "shutdown"
	}
	return "follower"
}

// SnapshotAt returns once a snapshot that has all entries up to index is on disk, and takes one if there is none yet. The
// node must have applied them. It is [fault.Unavailable] if none can be taken now.
func (n *Node) SnapshotAt(index uint64) error {
	const op = "raft.SnapshotAt"
	for tried := false; ; tried = true {
		list, err := n.disk.store.Snapshots.List()
		switch {
		case err != nil:
			return fault.Because(err, op, fault.Unavailable, "the snapshots can't be listed")
		case len(list) > 0 && list[0].Index >= index:
			return nil
		case tried:
			return fault.New(op, fault.Unavailable, "this node has not applied entry %d yet", index)
		}
		if err := n.lib.raft.Snapshot().Error(); err != nil && !errors.Is(err, hraft.ErrNothingNewToSnapshot) {
			return fault.Because(err, op, fault.Unavailable, "a snapshot can't be taken")
		}
	}
}

// EvictRevoked ends the connections, of either direction, whose peer's certificate, which was verified in the handshake, is
// no longer valid. Requests that wait on them are unsure or retried, as if a connection broke.
func (n *Node) EvictRevoked(check func(id string, leaf *x509.Certificate) error) {
	n.net.EvictRevoked(check)
}

// Fatal is closed when the machine could not apply an entry, or this node was removed: it has stopped, and [Node.Failure]
// says why.
func (n *Node) Fatal() <-chan struct{} { return n.lib.fsm.failed }

// Failure is why the node stopped by itself, nil if it has not.
func (n *Node) Failure() error { return n.lib.fsm.failure() }

// run waits for the end of the node and brings it about.
func (n *Node) run() {
	select {
	case <-n.life.closing:
	case <-n.lib.fsm.failed:
		n.log.Error("this node stops", "err", n.lib.fsm.failure())
		n.proposals.queue.close()
		n.handOver(n.life.ctx)
		n.life.close()
	}
	n.end()
}

// end is the hard half of Close. The library answers all that it was given only while it runs.
func (n *Node) end() {
	n.proposals.queue.close()
	n.life.stop()
	n.life.work.Wait()
	n.net.Drain()
	down := n.lib.raft.Shutdown()
	n.net.Close() // the library waits for calls to peers, which end with their connections
	err := errors.Join(down.Error(), n.trans.Close())
	n.life.tasks.Wait()
	n.net.Wait()
	n.calls.Close()
	n.meters.unregister(n.cfg.Registerer)
	if err = errors.Join(err, n.disk.close()); err != nil {
		n.life.err = fault.At("raft.Close", fault.Internal, err)
	}
	close(n.life.ended)
}

// Close lets what is being written end, hands leadership over if it can, stops the node, and leaves no goroutine
// behind. Ctx bounds the graceful half; the rest is quick unless the disk or the machine hangs, for which Close waits 5 s
// more at most. It may be called again, and waits for the same end.
func (n *Node) Close(ctx context.Context) error {
	n.proposals.queue.close()
	n.handOver(ctx)
	n.life.close()
	select {
	case <-n.life.ended:
		return n.life.err
	case <-ctx.Done():
	}
	t := time.NewTimer(closeTimeout)
	defer t.Stop()
	select {
	case <-n.life.ended:
		return n.life.err
	case <-t.C:
		return fault.New("raft.Close", fault.Unavailable,
			"the disk or the machine does not answer: the node ends when it does, or with the process")
	}
}

// handOver lets proposals end and makes another member lead, as far as ctx allows.
func (n *Node) handOver(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, 3*n.cfg.Timing.Election)
	defer cancel()
	if !n.lib.leads() || n.proposals.queue.waitIdle(ctx) != nil || len(n.lib.voters()) < 2 {
		return
	}
	changed := n.lib.raft.LeaderCh()
	n.lib.raft.LeadershipTransfer()
	for n.lib.leads() {
		select {
		case <-changed:
		case <-n.life.ended:
			return
		case <-ctx.Done():
			n.log.Warn("leadership was not handed over in time: the others elect")
			return
		}
	}
	// The others learn of it within a heartbeat. Until then they still call this node: they are told to try again, and no
	// connection breaks under their requests.
	t := time.NewTimer(n.cfg.Timing.Heartbeat)
	defer t.Stop()
	select {
	case <-t.C:
	case <-n.life.ended:
	case <-ctx.Done():
	}
}
