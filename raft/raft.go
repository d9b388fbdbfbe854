// SPDX-License-Identifier: Apache-2.0

// Package raft is the order of bytes: elects, replicates, snapshots, steps down when its own disk hangs.
//
// # Promise
//
// What [Node.Propose] answered is in the log of a majority, on disk, and was applied once, in the same order, on every
// node. An error says whether it may have happened: [fault.Unsure] that it may, every other kind that it did not. After
// [Node.Read] the machine has all that anyone was answered before the call, on whichever node it is called. What a node
// cannot apply stops that node.
//
// The room trusts whom the TLS configs admit: it bears nodes that crash, hang or are cut off, not one that holds a valid
// certificate and lies.
//
// # On the wire
//
// One TLS 1.3 listener with mutual authentication, two protocols by ALPN: demarc-raft/1 is hashicorp/raft's own
// transport, demarc-forward/1 carries proposals and reads of followers to the leader (see forward.go). A log entry is a
// pack of proposals: those that wait while one entry is being written share the next one.
//
//	1 byte, 0x01 | for each proposal: length in 4 bytes, big endian | proposal
//
// A snapshot is the line "demarc-raft/1 <index>" and what the machine writes; the index is that of the last entry with
// proposals that was applied.
//
// # On disk
//
// "lock" is held while the node is open. "log/wal" is a log of package wal; beside it lie term, vote, and which member the
// directory belongs to. "snapshots" is hashicorp/raft's file store, synced and with checksums; two are kept. Where an
// entry was altered on disk the node does not start, and says which file and entry; a snapshot that was altered is put
// aside in "damaged", and the older one and the log take its place where they reach. Where the log can no longer be read
// while the node runs, or a vote not be stored, the library panics: the process ends, which is stopping too.
//
// A leader syncs proposals while its followers do; see package store.
//
// # Reading
//
// The leader of a term, which has committed an entry of that term, takes its commit index, and then asks the members for
// their terms. When a majority, itself included, is not beyond its own, no later leader was elected before the read
// began, so nothing was answered that the index does not cover. Reads that wait share one such round. The library's
// VerifyLeader is not used: it also counts the answer to a heartbeat that was sent before the question, so that a
// process which was paused and woken takes old news for new.
//
// # A disk that hangs
//
// A leader whose disk does not return from a write goes on sending heartbeats and leads nobody anywhere
// (hashicorp/raft#503). When a write or a sync takes longer than [Timing].DiskHang this package cuts the node off from its peers
// until the write returns: they elect another leader in the meantime. What waits on the cut-off node is answered
// unavailable, except the entry in the disk's hands, which is unsure. A disk that fails to sync stops the node: nobody
// knows what is on it, and the next start reads it anew.
//
// # A disk that is full
//
// A leader whose log can't grow refuses proposals as unavailable, says why, goes on answering reads, and lets another
// member lead where one can. Elections and votes have room that was set aside. When there is space again it takes
// proposals within a second, by itself. A follower whose disk is full stays behind until then.
//
// # Clocks
//
// What is stamped is the machine's; this package tells what time it is. Each member tells its clock when it is asked how
// it is, and counts the moments between by the clock that only runs forward. What a majority of the voters' clocks says, within
// 30 s of each other, is the time: [Node.Now] for who stamps, [Node.Judge] for the leader, before the log. A leader whose
// own clock is off gives the lead away. Where no majority agrees, two voters that differ among them, there is no time, and
// nothing that is judged is let into the log.
//
// # Members
//
// The configuration in the log is the truth about who is a member and who votes; [Node.Change] changes it by stable id. The
// list of the config is for the first start, and tells where members may be. A member is looked for where it last said that
// it is, where the log says, and where the list says, and is known by its certificate alone; a leader writes a new address
// into the log by itself. A node with [Config.Join] begins no cluster: it waits until a leader that added it calls. A node whose
// disk was lost looks like one that was never started: [Config.Begin] is where its caller tells them apart.
//
// Whoever is removed is cut off by each node that has the change, is told so, and stops.
package raft

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"log/slog"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	hraft "github.com/hashicorp/raft"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/raft/clock"
	"github.com/demarc-dev/demarc/raft/forward"
	"github.com/demarc-dev/demarc/raft/store"
	"github.com/demarc-dev/demarc/raft/wal"
)

// Member is one node, known by its id.
type Member struct {
	ID   string `json:"id"`
	Addr string `json:"addr"` // host:port of its listener
}

// Machine is what the bytes are for. Apply, Snapshot and Restore are called from one goroutine at a time; Rehearse from
// any, also during an Apply.
type Machine interface {
	// Rehearse fails where Apply would stop the machine. With [fault.Unavailable] it keeps out what can't be taken soon, with
	// [fault.Busy] what may be taken in a moment, and with [fault.NotLeader] what this node can't judge yet: that is tried again.
	// It is called in the order in which proposals are put into the log, as long as this node leads.
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
	First      []Member     // the first voters, Self among them, the same list on each node; where Dir holds state it tells addresses only
	Join       bool         // begin no cluster: wait to be added to the one whose members First tells
	Begin      func() error // asked before a cluster is begun, which is where Dir holds no state and Join is not set: an error keeps Open from it; nil: it may
	Dir        string
	Machine    Machine
	Listener   net.Listener                                             // plain TCP; the node closes it
	ServerTLS  *tls.Config                                              // must require the certificate of a node, and offer ProtoRaft and ProtoForward
	ClientTLS  func(id string) *tls.Config                              // must prove that it is this member who answers
	Dial       func(ctx context.Context, addr string) (net.Conn, error) // nil: TCP
	Peer       func(tls.ConnectionState) (id string, err error)         // who calls, and why it may not; nil: members are not told apart
	About      func() []byte                                            // what the leader may know of this node, up to 64 KiB; nil: nothing
	Now        func() time.Time                                         // the clock of this node, which may be wrong; nil: time.Now
	Logger     *slog.Logger
	Timing     Timing
	Registerer prometheus.Registerer // nil: no metrics

	Files wal.Files   // the log and the votes, where they are not in Dir: a disk that loses power, in tests; nil: in Dir
	Log   wal.Options // of the files of the log

	wrap func(store.BufferedLog) store.BufferedLog // tests: a disk that misbehaves
}

// Node is one member of a cluster. Its methods may be called concurrently.
type Node struct {
	cfg      Config
	log      *slog.Logger
	raft     *hraft.Raft
	fsm      *machine
	net      *network
	logs     hraft.LogStore // store, behind a cache
	store    *store.Async
	disk     *store.Disk
	queue    *queue
	order    sync.Mutex // of packs, from their rehearsal until the library has them
	rounds   *rounds
	calls    *forward.Client
	server   forward.Server
	members  *members
	watch    *watch
	clocks   *clock.Clocks
	probe    chan struct{} // holds a token while the members are to be asked at once
	clockOff int           // rounds, without a break, in which this leader's own clock was off; of watchMembers alone
	silent   silent
	meters   *meters
	trans    *hraft.NetworkTransport
	hung     atomic.Bool // the node is cut off while its disk hangs
	full     atomic.Bool // the node takes no proposals while its disk is full

	ctx      context.Context // ends when all that was given to the library has been answered
	stop     context.CancelFunc
	work     sync.WaitGroup // ends with ctx, and needs the library to run until then
	wg       sync.WaitGroup // ends with ctx
	once     sync.Once
	closing  chan struct{}
	gone     chan struct{} // nothing is left
	closed   error         // of the end; read after gone
	changing sync.Mutex    // held by a change of the members
}

// Timeouts that are not timing of the cluster.
const (
	handshakeWait = 10 * time.Second
	rpcWait       = 10 * time.Second
	applyWait     = 5 * time.Second // to get an entry into the leader's queue
	closeWait     = 5 * time.Second // for the disk and the machine, once Close has run out of time
	cachedEntries = 64

	// inFlight is how many entries of a pipeline wait for their answer. With the library's default of 2 a sender can wait for
	// ever for a reader that has ended, when leadership is lost at that moment, and then the node never ends.
	inFlight = 16
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
// majority of its members does so. Where it fails the listener is still the caller's.
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
	if err := cfg.check(); err != nil {
		return nil, err
	}
	n := &Node{cfg: cfg, log: cfg.Logger, queue: newQueue(), rounds: newRounds(), closing: make(chan struct{}), gone: make(chan struct{})}
	n.ctx, n.stop = context.WithCancel(context.Background())
	n.fsm = newMachine(cfg.Machine)
	n.net = newNetwork(n)
	n.fsm.at = func(index uint64) { n.members.passed(index) }
	n.clocks, n.probe = clock.New(cfg.Now), make(chan struct{}, 1)
	n.members, n.watch, n.silent.failed = newMembers(cfg.First), newWatch(), map[hraft.ServerID]bool{}
	n.calls = forward.NewClient(n.ctx, forward.ClientConfig{DialTimeout: min(rpcWait, max(time.Second, 2*cfg.Timing.Election)),
		Dial: n.dialForward, Known: func(id string) bool { return len(n.where(id)) > 0 }, Removed: n.told})
	n.server = forward.Server{Term: func() uint64 { return n.raft.CurrentTerm() }, Handle: n.serve}
	n.meters = newMeters(n)
	if err := n.open(); err != nil {
		n.stop()
		n.wg.Wait()
		if n.raft != nil {
			_ = n.raft.Shutdown().Error()
		}
		n.net.close(false)
		n.calls.Close()
		if n.trans != nil {
			_ = n.trans.Close()
		}
		n.store.Close()
		if also := n.disk.Close(); also != nil {
			err = errors.Join(err, also) // alone it says better what it is
		}
		return nil, fault.At(op, "", err)
	}
	n.wg.Go(n.net.accept)
	for range packers {
		n.work.Go(n.pack)
	}
	n.work.Go(n.readRounds)
	n.work.Go(n.watchMembers)
	n.wg.Go(n.watchDisk)
	n.wg.Go(n.tendLog)
	go n.run()
	return n, nil
}

// check refuses what can never work.
func (cfg *Config) check() error {
	const op = "raft.Open"
	if cfg.Dir == "" || cfg.Machine == nil || cfg.Listener == nil || cfg.ServerTLS == nil || cfg.ClientTLS == nil {
		return fault.New(op, fault.Invalid, "a node needs a directory, a machine, a listener and TLS on both sides")
	}
	if !slices.Contains(cfg.ServerTLS.NextProtos, ProtoRaft) || !slices.Contains(cfg.ServerTLS.NextProtos, ProtoForward) {
		return fault.New(op, fault.Invalid, "the server's TLS must offer the protocols %s and %s", ProtoRaft, ProtoForward)
	}
	if cfg.ServerTLS.ClientAuth != tls.RequireAndVerifyClientCert {
		return fault.New(op, fault.Invalid, "the server's TLS must require and verify the certificate of the caller")
	}
	cfg.First = slices.Clone(cfg.First)
	ids, addrs := map[string]bool{}, map[string]bool{}
	for _, m := range cfg.First {
		if m.ID == "" || m.Addr == "" || ids[m.ID] || addrs[m.Addr] {
			return fault.New(op, fault.Invalid, "member %q at %q has no name or no address, or one that another member has", m.ID, m.Addr)
		}
		ids[m.ID], addrs[m.Addr] = true, true
	}
	if cfg.Self.ID == "" || cfg.Self.Addr == "" {
		return fault.New(op, fault.Invalid, "a node has a name and an address")
	}
	if !cfg.Join && !slices.Contains(cfg.First, cfg.Self) {
		return fault.New(op, fault.Invalid, "node %q at %q is not among the members: write the same list on each node", cfg.Self.ID, cfg.Self.Addr)
	}
	if err := hraft.ValidateConfig(cfg.library()); err != nil {
		return fault.Because(err, op, fault.Invalid, "the timing does not fit together: heartbeat at most election, lease at most heartbeat, none under 5 ms")
	}
	return nil
}

// library is what hashicorp/raft is told.
func (cfg *Config) library() *hraft.Config {
	conf, t := hraft.DefaultConfig(), cfg.Timing
	conf.LocalID, conf.Logger = hraft.ServerID(cfg.Self.ID), hclogger(cfg.Logger)
	conf.HeartbeatTimeout, conf.ElectionTimeout, conf.LeaderLeaseTimeout, conf.CommitTimeout = t.Heartbeat, t.Election, t.Lease, t.Commit
	conf.SnapshotInterval, conf.SnapshotThreshold, conf.TrailingLogs = t.SnapshotEvery, t.SnapshotThreshold, t.Trailing
	conf.MaxAppendEntries, conf.NoLegacyTelemetry, conf.ShutdownOnRemove = 64, true, false
	return conf
}

func (n *Node) open() error {
	const op = "raft.open"
	var err error
	if n.disk, err = store.Open(store.Options{Dir: n.cfg.Dir, Self: n.cfg.Self.ID, Log: n.cfg.Log, Files: n.cfg.Files}, hclogger(n.log)); err != nil {
		return err
	}
	var logs store.BufferedLog = n.disk.Log
	if n.cfg.wrap != nil {
		logs = n.cfg.wrap(logs)
	}
	n.store = store.NewAsync(logs, store.AsyncConfig{Wrote: n.meters.wrote, Fail: func(err error) {
		n.fsm.fail(fault.Because(err, op, fault.Internal, "the log can't be written: %s", fault.Text(err)))
	}})
	n.fsm.onDisk = func(index uint64) bool { return n.store.WaitSynced(index, n.fsm.dead) }
	if n.logs, err = hraft.NewLogCache(cachedEntries, n.store); err != nil {
		return fault.At(op, fault.Internal, err)
	}
	n.trans = hraft.NewNetworkTransportWithConfig(&hraft.NetworkTransportConfig{Stream: n.net, MaxPool: 4, Timeout: rpcWait, MaxRPCsInFlight: inFlight,
		Logger: hclogger(n.log), ServerAddressProvider: byID{}})
	if err := n.bootstrap(); err != nil {
		return err
	}
	n.raft, err = hraft.NewRaft(n.cfg.library(), n.fsm, n.logs, n.disk.Log, n.disk.Snapshots, store.ClampCommits(n.trans, n.store.Synced))
	n.store.Lead(n.raft)
	switch {
	case n.fsm.failure() != nil:
		return n.fsm.failure() // says it better
	case err != nil:
		return fault.Because(err, op, fault.Internal, "the node can't start from what is in its directory")
	}
	at, err := n.disk.ConfigurationIndex()
	if err != nil {
		return fault.Because(err, op, fault.Unavailable, "the members can't be read from the log")
	}
	n.members.passed(at)
	n.compare()
	n.refresh()
	n.observe()
	return n.meters.register(n.cfg.Registerer)
}

// bootstrap begins a cluster where there is nothing, this node is not one that joins, and its caller lets it.
func (n *Node) bootstrap() error {
	had, err := hraft.HasExistingState(n.logs, n.disk.Log, n.disk.Snapshots)
	if err == nil && !had && !n.cfg.Join && n.cfg.Begin != nil {
		if err := n.cfg.Begin(); err != nil {
			return err
		}
	}
	if err == nil {
		err = n.first(had)
	}
	if err != nil {
		return fault.Because(err, "raft.bootstrap", fault.Unavailable, "the first configuration can't be written")
	}
	return nil
}

// first writes the first configuration where there is nothing. It completes a start that was cut off between the
// library's two writes, the term and the configuration: a node that has voted is beyond term 1.
func (n *Node) first(had bool) error {
	var first hraft.Configuration
	for _, m := range n.cfg.First {
		first.Servers = append(first.Servers, hraft.Server{Suffrage: hraft.Voter, ID: hraft.ServerID(m.ID), Address: hraft.ServerAddress(m.Addr)})
	}
	if !had && n.cfg.Join {
		return nil
	}
	if !had {
		return hraft.BootstrapCluster(n.cfg.library(), n.logs, n.disk.Log, n.disk.Snapshots, n.trans, first)
	}
	if last, err := n.logs.LastIndex(); err != nil || last > 0 {
		return err
	}
	if snaps, err := n.disk.Snapshots.List(); err != nil || len(snaps) > 0 {
		return err
	}
	if term, err := n.disk.Log.GetUint64([]byte("CurrentTerm")); err != nil || term != 1 || n.cfg.Join {
		return err
	}
	return n.logs.StoreLog(&hraft.Log{Index: 1, Term: 1, Type: hraft.LogConfiguration, Data: hraft.EncodeConfiguration(first)})
}

// compare says where the list names others than the log: nobody is added or removed by editing it.
func (n *Node) compare() {
	logged := n.IDs()
	for _, m := range n.cfg.First {
		if len(logged) > 0 && !slices.Contains(logged, m.ID) {
			n.log.Warn("the list names a node that is no member: the log goes before the list", "node", m.ID, "members", logged)
		}
	}
}
