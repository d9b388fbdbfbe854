// SPDX-License-Identifier: Apache-2.0

// Package raft is the order of bytes: elects, replicates, snapshots, steps down when its own disk hangs.
//
// # Promise
//
// What [Node.Propose] answered is in the log of a majority, on disk, and was applied once, in the same order, on every
// node. An error says whether it may have happened: [fault.Unsure] that it may, every other kind that it did not.
//
// # On the wire
//
// One TLS listener with mutual authentication, two protocols by ALPN: demarc-raft/1 is hashicorp/raft's own transport,
// demarc-forward/1 carries proposals and reads of followers to the leader (see forward.go). A log entry is a pack of
// proposals: those that wait while one entry is being written share the next one.
//
//	1 byte, 0x01 | for each proposal: length in 4 bytes, big endian | proposal
//
// A snapshot is the line "demarc-raft/1 <index>" and what the machine writes.
//
// # A disk that hangs
//
// A leader whose disk does not return from a write goes on sending heartbeats and leads nobody anywhere. When a write
// takes longer than [Timing].DiskHang this package cuts the node off from its peers until the write returns: they elect
// another leader in the meantime.
package raft

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	hraft "github.com/hashicorp/raft"
	wal "github.com/hashicorp/raft-wal"
	"github.com/hashicorp/raft-wal/metadb"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/demarc-dev/demarc/fault"
)

// Member is one voter.
type Member struct{ ID, Addr string } // Addr is host:port of its listener

// Machine is what the bytes are for. Apply, Snapshot and Restore are called from one goroutine; Rehearse from another.
type Machine interface {
	// Rehearse fails where Apply would stop the machine.
	Rehearse(data []byte) error
	// Apply is pure. An error means that this node must stop. Proposals of one entry share its index.
	Apply(index uint64, data []byte) ([]byte, error)
	// Snapshot takes the present state; what it returns is written while Apply goes on.
	Snapshot() (io.WriterTo, error)
	// Restore replaces the state, or leaves it as it was.
	Restore(r io.Reader) error
}

// Timing of a cluster. Zero means the default.
type Timing struct {
	Heartbeat, Election, Lease, Commit time.Duration // 1 s, 1 s, 500 ms, 50 ms
	SnapshotEvery                      time.Duration // how often it is looked whether a snapshot is due; 30 s
	SnapshotThreshold, Trailing        uint64        // entries: 8192, 10240
	DiskHang                           time.Duration // 5 s
}

// Config is what a node is made of.
type Config struct {
	Self       Member
	First      []Member // the first configuration, the same list on each node; used only where Dir is empty
	Dir        string
	Machine    Machine
	Listener   net.Listener                                             // plain TCP; the node closes it
	ServerTLS  *tls.Config                                              // must require the certificate of a node, and offer ProtoRaft and ProtoForward
	ClientTLS  func(id string) *tls.Config                              // must prove that it is this member who answers
	Dial       func(ctx context.Context, addr string) (net.Conn, error) // nil: TCP
	Logger     *slog.Logger
	Timing     Timing
	Registerer prometheus.Registerer // nil: no metrics

	wrap func(hraft.LogStore) hraft.LogStore // tests: a disk that misbehaves
}

// Node is one member of a cluster. Its methods may be called concurrently.
type Node struct {
	cfg     Config
	log     *slog.Logger
	raft    *hraft.Raft
	fsm     *machine
	net     *network
	store   *watched
	queue   *queue
	forward forwarder

	ctx       context.Context // ends when the node closes
	stop      context.CancelFunc
	wg        sync.WaitGroup
	wal       *wal.WAL
	meta      *metadb.BoltMetaDB
	trans     *hraft.NetworkTransport
	once      sync.Once
	closed    error
	barrier   atomic.Uint64 // term in which this leader has applied all that was committed before it
	reachable atomic.Int64
}

// Timeouts that are not timing of the cluster.
const (
	handshakeWait = 10 * time.Second
	rpcWait       = 10 * time.Second
	applyWait     = 10 * time.Second // to get an entry into the leader's queue
)

func (t *Timing) fill() {
	for _, d := range []struct {
		to *time.Duration
		by time.Duration
	}{{&t.Heartbeat, time.Second}, {&t.Election, time.Second}, {&t.Lease, 500 * time.Millisecond}, {&t.Commit, 50 * time.Millisecond},
		{&t.SnapshotEvery, 30 * time.Second}, {&t.DiskHang, 5 * time.Second}} {
		if *d.to <= 0 {
			*d.to = d.by
		}
	}
	if t.SnapshotThreshold == 0 {
		t.SnapshotThreshold = 8192
	}
	if t.Trailing == 0 {
		t.Trailing = 10240
	}
}

// Open starts a node. Where Dir holds no state it begins with the first configuration, and the cluster elects once a
// majority of its members does so.
func Open(cfg Config) (*Node, error) {
	const op = "raft.Open"
	cfg.Timing.fill()
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.Dial == nil {
		var d net.Dialer
		cfg.Dial = func(ctx context.Context, addr string) (net.Conn, error) { return d.DialContext(ctx, "tcp", addr) }
	}
	if len(cfg.First) == 0 || cfg.Self.ID == "" || cfg.Machine == nil || cfg.Listener == nil || cfg.ServerTLS == nil || cfg.ClientTLS == nil {
		return nil, fault.New(op, fault.Invalid, "a node needs a name, members, a machine, a listener and TLS on both sides")
	}
	if !slices.Contains(cfg.ServerTLS.NextProtos, ProtoRaft) || !slices.Contains(cfg.ServerTLS.NextProtos, ProtoForward) {
		return nil, fault.New(op, fault.Invalid, "the server's TLS must offer the protocols %s and %s", ProtoRaft, ProtoForward)
	}
	n := &Node{cfg: cfg, log: cfg.Logger, queue: newQueue()}
	n.ctx, n.stop = context.WithCancel(context.Background())
	n.fsm = newMachine(cfg.Machine)
	n.net = newNetwork(n)
	if err := n.open(); err != nil {
		n.stop()
		n.net.close()
		if n.trans != nil {
			_ = n.trans.Close()
		}
		n.closeStore()
		return nil, fault.At(op, "", err)
	}
	n.forward.n = n
	n.wg.Go(n.net.accept)
	n.wg.Go(n.pack)
	n.wg.Go(n.watchDisk)
	n.wg.Go(n.watchFatal)
	n.metrics()
	return n, nil
}

func (n *Node) open() error {
	const op = "raft.open"
	logs, stable, err := n.openStore()
	if err != nil {
		return err
	}
	snapDir := filepath.Join(n.cfg.Dir, "snapshots")
	logger := hclogger(n.log)
	snaps, err := hraft.NewFileSnapshotStoreWithLogger(n.cfg.Dir, 2, logger)
	if err != nil {
		return fault.Because(err, op, fault.Unavailable, "can't keep snapshots in %s", snapDir)
	}
	n.trans = hraft.NewNetworkTransportWithConfig(&hraft.NetworkTransportConfig{Stream: n.net, MaxPool: 4, Timeout: rpcWait, Logger: logger})
	conf := hraft.DefaultConfig()
	t := n.cfg.Timing
	conf.LocalID, conf.Logger = hraft.ServerID(n.cfg.Self.ID), logger
	conf.HeartbeatTimeout, conf.ElectionTimeout, conf.LeaderLeaseTimeout, conf.CommitTimeout = t.Heartbeat, t.Election, t.Lease, t.Commit
	conf.SnapshotInterval, conf.SnapshotThreshold, conf.TrailingLogs = t.SnapshotEvery, t.SnapshotThreshold, t.Trailing
	conf.MaxAppendEntries, conf.NoLegacyTelemetry = 64, true
	had, err := hraft.HasExistingState(logs, stable, snaps)
	if err != nil {
		return fault.Because(err, op, fault.Unavailable, "the log in %s can't be read", n.cfg.Dir)
	}
	if !had {
		var first hraft.Configuration
		for _, m := range n.cfg.First {
			first.Servers = append(first.Servers, hraft.Server{Suffrage: hraft.Voter, ID: hraft.ServerID(m.ID), Address: hraft.ServerAddress(m.Addr)})
		}
		if err := hraft.BootstrapCluster(conf, logs, stable, snaps, n.trans, first); err != nil {
			return fault.Because(err, op, fault.Invalid, "the first configuration is not one: %v", err)
		}
	}
	if n.raft, err = hraft.NewRaft(conf, n.fsm, logs, stable, snaps, n.trans); err != nil {
		return fault.Because(err, op, fault.Internal, "the node can't start from what is in %s: %v", n.cfg.Dir, err)
	}
	n.observe()
	return nil
}

// openStore opens the write-ahead log and makes sure that the directory is this node's.
func (n *Node) openStore() (hraft.LogStore, hraft.StableStore, error) {
	const op = "raft.openStore"
	dir := filepath.Join(n.cfg.Dir, "log")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, nil, fault.Because(err, op, fault.Unavailable, "can't make the directory of the log")
	}
	// raft-wal's Close does not close its meta store: it is opened here, so that closeStore can.
	n.meta = &metadb.BoltMetaDB{}
	w, err := wal.Open(dir, wal.WithMetaStore(n.meta), wal.WithLogger(hclogger(n.log)))
	if err != nil {
		return nil, nil, fault.Because(err, op, fault.Unavailable, "the log in %s can't be opened", dir)
	}
	n.wal = w
	key := []byte("demarc-self")
	was, err := w.Get(key)
	if err != nil {
		return nil, nil, fault.At(op, fault.Unavailable, err)
	}
	if len(was) > 0 && string(was) != n.cfg.Self.ID {
		return nil, nil, fault.New(op, fault.Conflict, "the directory belongs to node %q, this is %q: two nodes can't share one", was, n.cfg.Self.ID)
	}
	if err := w.Set(key, []byte(n.cfg.Self.ID)); err != nil {
		return nil, nil, fault.At(op, fault.Unavailable, err)
	}
	var logs hraft.LogStore = w
	if n.cfg.wrap != nil {
		logs = n.cfg.wrap(logs)
	}
	n.store = &watched{LogStore: logs}
	return n.store, w, nil
}

func (n *Node) closeStore() {
	if n.wal != nil {
		_ = n.wal.Close()
	}
	if n.meta != nil {
		_ = n.meta.Close()
	}
}

// Leader names the leader, as far as this node knows.
func (n *Node) Leader() (string, bool) {
	_, id := n.raft.LeaderWithID()
	return string(id), id != ""
}

// State is for people and for metrics.
type State struct {
	Role      string // leader, follower, candidate, shutdown
	Term      uint64
	Applied   uint64 // index of the last entry that the machine has
	Last      uint64 // index of the last entry on disk
	Leader    string
	Reachable int // members that this node, as the leader, hears from, itself included; 0 where it does not lead
}

// State tells what this node is at this moment.
func (n *Node) State() State {
	id, _ := n.Leader()
	s := State{Role: roleOf(n.raft.State()), Term: n.raft.CurrentTerm(), Applied: n.fsm.index.Load(), Last: n.raft.LastIndex(), Leader: id}
	if n.raft.State() == hraft.Leader {
		s.Reachable = int(n.reachable.Load())
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

// observe counts the members that a leader hears from.
func (n *Node) observe() {
	ch := make(chan hraft.Observation, 64)
	n.raft.RegisterObserver(hraft.NewObserver(ch, false, func(o *hraft.Observation) bool {
		switch o.Data.(type) {
		case hraft.FailedHeartbeatObservation, hraft.ResumedHeartbeatObservation, hraft.RaftState:
			return true
		}
		return false
	}))
	all := int64(len(n.cfg.First))
	n.reachable.Store(all)
	n.wg.Go(func() {
		failed := map[hraft.ServerID]bool{}
		for {
			select {
			case <-n.ctx.Done():
				return
			case o := <-ch:
				switch d := o.Data.(type) {
				case hraft.FailedHeartbeatObservation:
					failed[d.PeerID] = true
				case hraft.ResumedHeartbeatObservation:
					delete(failed, d.PeerID)
				case hraft.RaftState:
					clear(failed)
				}
				n.reachable.Store(all - int64(len(failed)))
			}
		}
	})
}

// Fatal is closed when the machine could not apply an entry: this node has stopped, and [Node.Failure] says why.
func (n *Node) Fatal() <-chan struct{} { return n.fsm.dead }

// Failure tells why the node stopped by itself, nil while it has not.
func (n *Node) Failure() error { return n.fsm.failure() }

// watchFatal stops a node whose machine can't go on: it must not vote on what it can't apply.
func (n *Node) watchFatal() {
	select {
	case <-n.ctx.Done():
	case <-n.fsm.dead:
		n.log.Error("this node stops: it can't apply what the cluster decided", "err", n.fsm.failure())
		_ = n.raft.Shutdown().Error()
	}
}

// watchDisk cuts the node off while a write to its disk hangs.
func (n *Node) watchDisk() {
	tick := time.NewTicker(n.cfg.Timing.DiskHang / 4)
	defer tick.Stop()
	was := false
	for {
		select {
		case <-n.ctx.Done():
			return
		case <-tick.C:
		}
		since := n.store.since()
		hangs := !since.IsZero() && time.Since(since) > n.cfg.Timing.DiskHang
		if hangs == was {
			continue
		}
		was = hangs
		n.net.cut(hangs)
		if hangs {
			n.log.Error("a write to the disk hangs: this node is cut off from its peers until it returns", "since", since)
		} else {
			n.log.Warn("the disk writes again: this node is back")
		}
	}
}

// Close hands leadership over where it can, stops the node, and leaves no goroutine behind. It may be called twice.
func (n *Node) Close(ctx context.Context) error {
	n.once.Do(func() { n.closed = n.close(ctx) })
	return n.closed
}

func (n *Node) close(ctx context.Context) error {
	if n.raft.State() == hraft.Leader && len(n.cfg.First) > 1 && ctx.Err() == nil {
		done := make(chan error, 1)
		go func() { done <- n.raft.LeadershipTransfer().Error() }()
		select {
		case err := <-done:
			if err != nil {
				n.log.Warn("leadership was not handed over", "err", err)
			}
		case <-ctx.Done():
			n.log.Warn("leadership was not handed over in time")
		}
	}
	n.queue.close()
	err := n.raft.Shutdown().Error()
	n.stop()
	n.net.close()
	n.forward.close()
	err = errors.Join(err, n.trans.Close())
	n.wg.Wait()
	n.net.wg.Wait()
	n.closeStore()
	if err != nil {
		return fault.At("raft.Close", fault.Internal, err)
	}
	return nil
}

// metrics registers what Prometheus may know of the node.
func (n *Node) metrics() {
	if n.cfg.Registerer == nil {
		return
	}
	gauge := func(name, help string, read func() float64) {
		n.cfg.Registerer.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, read))
	}
	gauge("demarc_raft_leader", "1 where this node leads.", func() float64 {
		if n.raft.State() == hraft.Leader {
			return 1
		}
		return 0
	})
	gauge("demarc_raft_term", "Current term.", func() float64 { return float64(n.raft.CurrentTerm()) })
	gauge("demarc_raft_applied_index", "Index of the last entry that was applied.", func() float64 { return float64(n.fsm.index.Load()) })
	gauge("demarc_raft_last_index", "Index of the last entry on disk.", func() float64 { return float64(n.raft.LastIndex()) })
	gauge("demarc_raft_reachable_members", "Members that the leader hears from, itself included; 0 on a follower.", func() float64 { return float64(n.State().Reachable) })
	gauge("demarc_raft_disk_hangs", "1 while a write to the disk takes too long.", func() float64 {
		if s := n.store.since(); !s.IsZero() && time.Since(s) > n.cfg.Timing.DiskHang {
			return 1
		}
		return 0
	})
}

// addrOf finds where a member listens.
func (n *Node) addrOf(id string) (string, error) {
	for _, m := range n.cfg.First {
		if m.ID == id {
			return m.Addr, nil
		}
	}
	return "", fault.New("raft.addrOf", fault.Internal, "no member is called %q", id)
}

func (n *Node) idOf(addr string) string {
	for _, m := range n.cfg.First {
		if m.Addr == addr {
			return m.ID
		}
	}
	return ""
}

// watched is a log store that knows since when a write has been going on.
type watched struct {
	hraft.LogStore
	began atomic.Int64 // Unix nanoseconds, 0: no write is going on
}

func (w *watched) since() time.Time {
	if b := w.began.Load(); b != 0 {
		return time.Unix(0, b)
	}
	return time.Time{}
}

func (w *watched) StoreLogs(logs []*hraft.Log) error {
	w.began.Store(time.Now().UnixNano())
	defer w.began.Store(0)
	return w.LogStore.StoreLogs(logs)
}

func (w *watched) StoreLog(l *hraft.Log) error { return w.StoreLogs([]*hraft.Log{l}) }

// IsMonotonic tells hashicorp/raft that a log with a gap must be emptied before a snapshot takes its place.
func (w *watched) IsMonotonic() bool { return true }
