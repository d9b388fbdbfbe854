// SPDX-License-Identifier: Apache-2.0

// Package raft replicates a log of proposals to a few nodes and applies it, in one order, to a state machine on each. It runs
// hashicorp/raft, and adds what that library leaves open: linearizable reads, forwarding to the leader, a disk that hangs or
// is full, clocks that are wrong, and members that come, go and move.
//
// # Promise
//
// What [Node.Propose] answered is in the log of a majority, on disk, and was applied once, in the same order, on every
// node. An error of kind [fault.Unsure] means that it may have happened, every other kind that it did not. After
// [Node.Read] the machine has all that anyone was answered before the call, on whichever node it is called. What a node
// cannot apply stops that node.
//
// The package trusts the peers that the TLS configs admit: it tolerates nodes that crash, hang or are cut off, not one that
// holds a valid certificate and lies.
//
// # On the wire
//
// One TLS 1.3 listener with mutual authentication (mTLS), two protocols by ALPN: demarc-raft/1 is hashicorp/raft's own
// transport, demarc-forward/1 carries proposals and reads of followers to the leader (see package forward). A log entry is a
// pack of proposals: those that wait while one entry is being written share the next one.
//
//	1 byte, 0x01 | for each proposal: length in 4 bytes, big endian | proposal
//
// A snapshot is the line "demarc-raft/1 <index>" and what the machine writes; the index is that of the last entry with
// proposals that was applied.
//
// # On disk
//
// See package store for what is in the directory. If an entry was altered on disk the node does not start, and says which
// file and entry; a snapshot that was altered is moved to "damaged", and the older one and the log take its place if they
// reach far enough. If the log can no longer be read while the node runs, or a vote not be stored, the library panics: the
// process ends, which is stopping too.
//
// A leader syncs proposals while its followers do: see [store.Async].
//
// # Reading
//
// The leader of a term, which has committed an entry of that term, takes its commit index, and then asks the members for
// their terms. If a majority, itself included, is not beyond its own term, no later leader was elected before the read
// began, so nothing was answered that the index does not cover. Reads that wait share one such round. The library's
// VerifyLeader is not used: it also counts the answer to a heartbeat that was sent before the question, so that a
// process which was paused and woken takes stale news for fresh.
//
// # A disk that hangs
//
// A leader whose disk does not return from a write continues to send heartbeats, and commits nothing (hashicorp/raft#503).
// When a write or a sync takes longer than [Timing].DiskHang this package cuts the node off from its peers until the write
// returns: they elect another leader in the meantime. Queued proposals fail with unavailable; the one being written fails
// with unsure. A disk that fails to sync stops the node: its content is unknown, and the next start reads it anew.
//
// # A disk that is full
//
// A leader whose log can't grow refuses proposals as unavailable, says why, still answers reads, and hands leadership to
// another member if one can take it. Elections and votes have room that was reserved. When there is space again it takes
// proposals within a second, without a restart. A follower whose disk is full stays behind until then.
//
// # Clocks
//
// The machine decides which timestamps a proposal has; this package knows what time it is. Each member reads its clock when
// it is asked for its status. What a majority of the voters' clocks says, within 30 s of each other, is the time: [Node.Now]
// for new timestamps, [Node.Judge] for the leader, before an entry is written. A leader whose own clock is off hands
// leadership over. If no majority agrees, for instance two voters that differ, there is no time, and nothing that must be
// judged is let into the log. See package clock.
//
// # Members
//
// The configuration in the log decides which nodes are members and which of them vote; [Node.Change] changes it by stable id.
// The list of the config is for the first start, and holds addresses. A member is dialled at the address that it last
// advertised, at that in the log, and at that in the list, and is known by its certificate alone; a leader writes a new
// address into the log by itself. A node with [Config.Join] begins no cluster: it waits until a leader that added it calls.
// A node whose disk was lost looks like one that was never started: [Config.Begin] lets its caller tell them apart.
//
// A removed node is cut off by each node that has the change, is notified, and stops.
package raft

import (
	"context"
	"crypto/tls"
	"io"
	"log/slog"
	"net"
	"slices"
	"time"

	hraft "github.com/hashicorp/raft"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/raft/store"
	"github.com/demarc-dev/demarc/raft/transport"
	"github.com/demarc-dev/demarc/raft/wal"
)

// The protocols of the listener: the server's TLS must offer both.
const (
	ProtoRaft    = transport.ProtoRaft
	ProtoForward = transport.ProtoForward
)

// ErrRemoved is in an error of [Config.Peer] if the caller was removed for good; see [transport.ErrRemoved]. It is in that of
// [Node.Failure] if this node was.
var ErrRemoved = transport.ErrRemoved

// Member is one node, known by its id.
type Member struct {
	ID   string `json:"id"`
	Addr string `json:"addr"` // host:port of its listener
}

// Machine is the state machine. Apply, Snapshot and Restore are called from one goroutine at a time; DryRun from any, also
// during an Apply.
type Machine interface {
	// DryRun fails if Apply would stop the machine. With [fault.Unavailable] it refuses what can't be taken soon, with
	// [fault.Busy] what may be taken in a moment, and with [fault.NotLeader] what this node can't judge yet: that is retried.
	// It is called in the order in which proposals are put into the log, as long as this node leads.
	DryRun(data []byte) error
	// Apply is pure. An error means that this node must stop. Proposals of one entry share its index.
	Apply(index uint64, data []byte) ([]byte, error)
	// Snapshot takes the present state; what it returns is written while further entries are applied.
	Snapshot() (io.WriterTo, error)
	// Restore replaces the state, or leaves it as it was.
	Restore(r io.Reader) error
}

// Timing of a cluster. Zero means the default.
type Timing struct {
	Heartbeat, Election, Lease, Commit time.Duration // 1 s, 1 s, 500 ms, 50 ms
	SnapshotEvery                      time.Duration // how often the node checks whether a snapshot is due; 30 s
	SnapshotThreshold, Trailing        uint64        // entries: 8192, 10240
	DiskHang                           time.Duration // 5 s
}

// Config is what a node is made of.
type Config struct {
	Self     Member
	First    []Member     // the first voters, Self among them, the same list on each node; if Dir holds state only their addresses count
	Join     bool         // begin no cluster: wait to be added to the one whose members First lists
	Begin    func() error // asked before a cluster is begun: if Dir holds no state and Join is not set; an error fails Open; nil: it may
	Dir      string
	Machine  Machine
	Listener net.Listener // plain TCP; the node closes it

	ServerTLS *tls.Config                                              // must require a certificate, and offer ProtoRaft and ProtoForward
	ClientTLS func(id string) *tls.Config                              // must verify that it is this member that answers
	Dial      func(ctx context.Context, addr string) (net.Conn, error) // nil: TCP
	Peer      func(tls.ConnectionState) (id string, err error)         // which node calls, and why it may not; nil: nodes are not told apart
	About     func() []byte                                            // what the leader may know of this node, up to 64 KiB; nil: nothing
	Now       func() time.Time                                         // the clock of this node, which may be wrong; nil: time.Now

	Logger     *slog.Logger
	Timing     Timing
	Registerer prometheus.Registerer // nil: no metrics

	Files wal.Files   // the log and the votes, if they are not in Dir: a disk that loses power, in tests; nil: in Dir
	Log   wal.Options // of the files of the log

	wrap func(store.BufferedLog) store.BufferedLog // tests: a disk that misbehaves
}

// Timeouts that are not timing of the cluster.
const (
	rpcTimeout    = 10 * time.Second
	applyTimeout  = 5 * time.Second // to get an entry into the leader's queue
	closeTimeout  = 5 * time.Second // for the disk and the machine, once Close has run out of time
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

// callTimeout is for a call whose answer needs no disk.
func (t *Timing) callTimeout() time.Duration { return max(time.Second, 2*t.Election) }

// silence is how long a member may say nothing and still counts as heard from.
func (t *Timing) silence() time.Duration { return max(4*t.Heartbeat, time.Second) }

// fill sets the defaults.
func (cfg *Config) fill() {
	cfg.Timing.fill()
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.Dial == nil {
		var d net.Dialer
		cfg.Dial = func(ctx context.Context, addr string) (net.Conn, error) { return d.DialContext(ctx, "tcp", addr) }
	}
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
		return fault.New(op, fault.Invalid,
			"node %q at %q is not among the members: write the same list on each node", cfg.Self.ID, cfg.Self.Addr)
	}
	if err := hraft.ValidateConfig(cfg.library()); err != nil {
		return fault.Because(err, op, fault.Invalid,
			"the timing does not fit together: heartbeat at most election, lease at most heartbeat, none under 5 ms")
	}
	return nil
}

// library is the configuration of hashicorp/raft.
func (cfg *Config) library() *hraft.Config {
	conf, t := hraft.DefaultConfig(), cfg.Timing
	conf.LocalID, conf.Logger = hraft.ServerID(cfg.Self.ID), hclogger(cfg.Logger)
	conf.HeartbeatTimeout, conf.ElectionTimeout, conf.LeaderLeaseTimeout, conf.CommitTimeout = t.Heartbeat, t.Election, t.Lease, t.Commit
	conf.SnapshotInterval, conf.SnapshotThreshold, conf.TrailingLogs = t.SnapshotEvery, t.SnapshotThreshold, t.Trailing
	conf.MaxAppendEntries, conf.NoLegacyTelemetry, conf.ShutdownOnRemove = 64, true, false
	return conf
}
