// SPDX-License-Identifier: Apache-2.0

// Package controlplane is the vendor's role: one node of the replicated control plane, with its listeners for appliances, operators and
// the other nodes. It can ask a customer's appliance for anything and make it do nothing.
package controlplane

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"

	"github.com/demarc-dev/demarc/configs"
	"github.com/demarc-dev/demarc/daemon"
	"github.com/demarc-dev/demarc/daemon/controlplane/admission"
	"github.com/demarc-dev/demarc/daemon/controlplane/authority"
	"github.com/demarc-dev/demarc/daemon/controlplane/book"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/identity"
	"github.com/demarc-dev/demarc/ledger"
	"github.com/demarc-dev/demarc/raft"
	"github.com/demarc-dev/demarc/seal"
	"github.com/demarc-dev/demarc/telemetry"
	"github.com/demarc-dev/demarc/workload/artifact"
)

// node is one process of the control plane.
type node struct {
	cfg    *configs.Control
	build  string
	log    *slog.Logger
	reg    *telemetry.Registry
	book   *ledger.Book[book.State]
	raft   *raft.Node
	server *Server
	files  *authority.Source
	store  *artifact.Store
	up     atomic.Bool // raft is there
}

// witnessEvery is how often appliances are asked to countersign the vendor's log, where it grew.
const witnessEvery = 10 * time.Second

// Parts makes the parts of one node, in the order in which they start. Its sockets are bound here, so that an address
// in use is an error at once; the parts close them.
func Parts(cfg *configs.Control, build string, log *slog.Logger) ([]daemon.Part, error) {
	const op = "controlplane.Parts"
	n := &node{cfg: cfg, build: build, log: log, book: book.NewBook(), reg: telemetry.New(configs.RoleControl, build)}
	keks, err := authority.KEKFiles{Current: cfg.KEKFile}.Read()
	if err != nil {
		return nil, err
	}
	if n.store, err = artifact.Open(cfg.Artifacts); err != nil {
		return nil, err
	}
	var members []book.Member
	for _, m := range cfg.Cluster {
		members = append(members, book.Member{Name: m.Name, Raft: m.Raft, API: m.API})
	}
	platforms, err := platformsOf(cfg.Platforms)
	if err != nil {
		return nil, err
	}
	people, err := loginOf(cfg.OIDC)
	if err != nil {
		return nil, err
	}
	n.server, err = NewServer(Options{Login: people, Name: cfg.Name, Book: n.book, Consensus: n, Artifacts: n.store, KEK: keks[0].Key, LeafLife: cfg.Leaf.Life,
		Backdate:  max(cfg.Leaf.Backdate, time.Nanosecond), // a certificate counts whole seconds: 0s is none
		Platforms: platforms, Members: members, Cluster: n, Build: build, Now: n.now, Clocks: n, Snapshot: n.snapshot, Log: log, Meter: meterOf(n.reg),
		Unlogged: n.reg.Counter("demarc_refusals_unlogged_total", "Refused calls that are neither in the log nor on record: there were too many.")})
	if err != nil {
		return nil, err
	}
	if err := n.server.authority.ReadKeys(authority.KEKFiles{Current: cfg.KEKFile}); err != nil {
		return nil, err
	}
	if n.files, err = n.server.authority.LoadSource(cfg); err != nil {
		return nil, err
	}
	n.server.Reach(func(node string) *tls.Config {
		return identity.Client(n.files, identity.WantNode(cfg.TrustDomain, node), "h2")
	})
	if err := os.MkdirAll(cfg.Dir, 0o700); err != nil {
		return nil, fault.Because(err, op, fault.Unavailable, "dir can't be made: %v", err)
	}
	if err := n.files.SaveAt(filepath.Join(cfg.Dir, authority.CredentialsFile)); err != nil {
		return nil, err
	}
	ln, err := net.Listen("tcp", cfg.Listen) // before the log is read, which takes seconds: who comes back meanwhile waits, and is not refused
	if err != nil {
		return nil, fault.Because(err, op, fault.Unavailable, "listen: %v", err)
	}
	rln, err := net.Listen("tcp", cfg.Raft.Listen)
	if err != nil {
		_ = ln.Close()
		return nil, fault.Because(err, op, fault.Unavailable, "raft.listen: %v", err)
	}
	if n.raft, err = raft.Open(n.raftConfig(rln)); err != nil {
		_ = ln.Close()
		_ = rln.Close()
		return nil, err
	}
	n.up.Store(true)
	n.describe()
	conf := identity.Server(n.files, n.server.Admit, false, admission.Protocols()...)
	door := n.server.Listener("door", ln, conf, log)
	// Catch-up comes before genesis, which waits for a leader: none speaks to a node that has to catch up first.
	parts := []daemon.Part{daemon.Func("raft", n.runRaft), daemon.Func("artifacts", n.server.TendArtifacts), door.AcceptEarly(), daemon.Func("catch-up", func(ctx context.Context, ready func()) error {
		ready()
		return n.files.CatchUp(ctx, authority.CatchUpEvery)
	}), daemon.Func("genesis", n.genesis), daemon.Func("introduction", n.introduce), daemon.Func("recheck", n.recheck)}
	doors, err := n.doors(door, conf)
	if err != nil {
		_ = ln.Close()
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		_ = n.raft.Close(ctx)
		return nil, err
	}
	parts = append(parts, doors...)
	parts = append(parts, daemon.Func("witness", func(ctx context.Context, ready func()) error {
		ready()
		return n.server.evidence.Witness(ctx, witnessEvery)
	}))
	parts = append(parts, daemon.Func("bundle", func(ctx context.Context, ready func()) error {
		ready()
		return n.files.Tend(ctx)
	}), daemon.Func("autopilot", func(ctx context.Context, ready func()) error {
		ready()
		return n.server.Pilot(ctx)
	}))
	parts = append(parts, daemon.Func("time", func(ctx context.Context, ready func()) error {
		ready()
		return n.server.TendTime(ctx)
	}), daemon.Func("keys", func(ctx context.Context, ready func()) error {
		ready()
		return n.server.authority.TendKeys(ctx, authority.KEKFiles{Current: cfg.KEKFile})
	}))
	if cfg.Management != nil {
		parts = append(parts, daemon.Func("management", n.tellManagement))
	}
	return append(parts, daemon.NewNotify(n.reg.Health, log)), nil
}

// doors binds what else this node listens on for others than its peers.
func (n *node) doors(door *admission.Listener, conf *tls.Config) ([]daemon.Part, error) {
	const op = "controlplane.doors"
	var parts []daemon.Part
	if n.cfg.Metrics.Listen != "" {
		ln, err := net.Listen("tcp", n.cfg.Metrics.Listen)
		if err != nil {
			return nil, fault.Because(err, op, fault.Unavailable, "metrics.listen: %v", err)
		}
		parts = append(parts, daemon.HTTP("metrics", ln, nil, n.reg.Handler(), n.log))
	}
	parts = append(parts, daemon.Func("hub", n.server.Follow), door)
	inner, err := admission.InnerListener(n.cfg.InnerTLS, conf, admission.MaxUnproven, func(name string, ln net.Listener, c *tls.Config) daemon.Part {
		return n.server.Listener(name, ln, c, n.log)
	}, n.log)
	if err != nil {
		return nil, err
	}
	parts = append(parts, inner...)
	if n.cfg.Tailnet != nil {
		_, port, err := net.SplitHostPort(n.cfg.Listen)
		if err != nil {
			return nil, fault.At(op, fault.Invalid, err)
		}
		parts = append(parts, daemon.Func("tailnet", func(ctx context.Context, ready func()) error { return n.tailnetDoor(ctx, ready, port, conf) }))
	}
	parts = append(parts, daemon.Func("roll-call", func(ctx context.Context, ready func()) error { // the first door's part to stop
		ready()
		n.server.RollCall(ctx, absentAfter)
		<-ctx.Done()
		stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), leaveWait)
		defer cancel()
		n.server.Leave(stop)
		return nil
	}))
	return parts, nil
}

// runRaft holds the node until all other parts have stopped.
func (n *node) runRaft(ctx context.Context, ready func()) error {
	ready()
	var failed error
	select {
	case <-ctx.Done():
	case <-n.raft.Fatal():
		failed = n.raft.Failure()
	}
	stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	err := n.raft.Close(stop)
	if failed != nil {
		return failed
	}
	return err
}

// Propose implements [book.Consensus].
func (n *node) Propose(ctx context.Context, data []byte) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, 15*time.Second)
	defer cancel()
	if n.Leader() != n.cfg.Name {
		if err := (book.Gate{Book: n.book, Cluster: n.voting}).Foresee(data); err != nil {
			return nil, err
		}
	}
	return n.raft.Propose(ctx, data)
}

// Read implements [book.Consensus].
func (n *node) Read(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 15*time.Second)
	defer cancel()
	return n.raft.Read(ctx)
}

// Leader implements [book.Consensus].
func (n *node) Leader() string {
	id, _ := n.raft.Leader()
	return id
}

// genesis makes sure that the book has its trust domain before any door opens. Every node proposes the same; the book
// takes it once.
func (n *node) genesis(ctx context.Context, ready func()) error {
	const op = "controlplane.genesis"
	for wait := 50 * time.Millisecond; ctx.Err() == nil; wait = min(2*wait, time.Second) {
		err := n.Read(ctx)
		if td := n.book.View().TrustDomain; err == nil && td != "" {
			if td != n.cfg.TrustDomain {
				return fault.New(op, fault.Conflict, "the book is of the trust domain %q, the file says %q", td, n.cfg.TrustDomain)
			}
			if err := n.server.authority.CheckKEK(); err != nil {
				return fault.Because(err, op, fault.Invalid, "kek_file does not open the keys of the book: %s", fault.Text(err))
			}
			if n.book.View().Development {
				n.log.Warn("this trust domain was made for development: whoever has the file of a development key may be its appliance")
			}
			ready()
			<-ctx.Done()
			return nil
		}
		if err == nil && !n.cfg.Join {
			err = n.begin(ctx)
			if k := fault.Of(err); k == fault.Invalid || k == fault.Conflict {
				return err
			}
		}
		if err != nil && ctx.Err() == nil {
			n.log.Info(n.waitsFor(), "err", fault.Text(err))
			select {
			case <-ctx.Done():
			case <-time.After(wait):
			}
		}
	}
	return nil
}

// firstDay is how long after it was made a genesis may begin a cluster.
const firstDay = 24 * time.Hour

// mayBegin tells whether an empty directory is that of a first start. A node whose disk was lost looks the same, and has the same
// file: alone, or with others in the same plight, it would begin anew, with the old keys and an empty book, beside or in place of
// the cluster that there is. So a genesis begins a cluster on its first day only. Who comes later makes another one: nobody
// depends on it yet.
func (n *node) mayBegin(now time.Time) error {
	const op = "controlplane.mayBegin"
	g, err := n.readGenesis(op)
	if err != nil {
		return err
	}
	var made time.Time
	for _, s := range g.Slots {
		ca, err := x509.ParseCertificate(s.CertDER)
		if err != nil {
			return fault.Because(err, op, fault.Invalid, "the genesis holds no certificate authority that can be read: %s", n.cfg.Genesis)
		}
		if at := ca.NotBefore.Add(identity.DefaultBackdate); at.After(made) {
			made = at
		}
	}
	if now.Sub(made) <= firstDay {
		return nil
	}
	return fault.New(op, fault.Conflict, "%s holds no log, and no cluster is begun with a genesis that is older than a day: %s is of %s. If this node's disk was lost, have it certified (demarc control-plane certify), with join: true in its file; if no node is left, restore a snapshot (demarc control-plane snapshot restore); if no cluster was ever begun, make another one (demarc control-plane init)",
		n.cfg.Dir, n.cfg.Genesis, made.UTC().Format(time.RFC3339))
}

func (n *node) readGenesis(op string) (book.GenesisWith, error) {
	var g book.GenesisWith // what an older build wrote has no operator
	if n.cfg.Genesis == "" {
		return g, fault.New(op, fault.Invalid, "the book is empty and the file names no genesis: take the one that demarc control-plane init wrote")
	}
	b, err := os.ReadFile(n.cfg.Genesis)
	if err != nil {
		return g, fault.Because(err, op, fault.Invalid, "genesis can't be read: %s", n.cfg.Genesis)
	}
	if err := seal.StrictJSON(b, &g); err != nil {
		return g, fault.At(op, fault.Invalid, err)
	}
	if g.TrustDomain != n.cfg.TrustDomain {
		return g, fault.New(op, fault.Invalid, "the genesis is of the trust domain %q, the file says %q", g.TrustDomain, n.cfg.TrustDomain)
	}
	return g, nil
}

func (n *node) begin(ctx context.Context) error {
	g, err := n.readGenesis("controlplane.begin")
	if err != nil {
		return err
	}
	by := fleet.PrincipalOf(g.TrustDomain, fleet.Node, n.cfg.Name)
	meta := ledger.Meta{At: n.now().UTC(), By: by, Request: "genesis"}
	if g.Operator == (book.FirstOperator{}) {
		_, err = ledger.Submit(ctx, n, meta, g.Genesis)
		return err
	}
	_, err = ledger.Submit(ctx, n, meta, g)
	return err
}

// meterOf registers what the doors measure.
func meterOf(r *telemetry.Registry) admission.Meter {
	return admission.Meter{
		Admission: r.Histogram("demarc_admission_wait_seconds", "Time that a connection waited for its handshake to begin.", []float64{.001, .01, .1, .5, 1, 2, 5, 10, 20}),
		Handshake: r.Histogram("demarc_handshake_seconds", "Time of a handshake that succeeded.", []float64{.001, .005, .01, .05, .1, .5, 1, 2, 5, 10}),
		Arrival:   r.Histogram("demarc_channel_arrival_seconds", "Time after the opening of the door at which a channel came up.", []float64{.5, 1, 2, 3, 4, 5, 6, 8, 10, 15, 30, 60, 300}),
		Rejected:  r.Counter("demarc_connections_rejected_total", "Connections that were closed before their handshake began: too many waited, or for too long."),
		Displaced: r.Counter("demarc_connections_displaced_total", "Connections for calls, and channels without hello, that gave way to newer ones of the same source, or of a source that held fewer."),
		Crowded:   r.Counter("demarc_connections_crowded_total", "Connections for calls that were refused: their operator, appliance or node had as many in use as it may."),
	}
}

// describe registers what Prometheus may know.
func (n *node) describe() {
	r := n.reg
	var t book.TotalsCache
	r.GaugeVec("demarc_appliances", "Appliances by status.", "status", []string{book.Registered, book.Enrolled, book.Banned}, func(status string) float64 {
		return float64(t.Of(n.book.View()).Status[status])
	})
	r.Gauge("demarc_appliances_online", "Appliances with a channel to any node.", func() float64 { return float64(t.Of(n.book.View()).Online) })
	r.Gauge("demarc_channels", "Channels of appliances at this node.", func() float64 { return float64(n.server.channels.count()) })
	r.Gauge("demarc_audit_entries", "Entries of the vendor's audit log.", func() float64 { return float64(n.book.Log().Size()) })
	r.Gauge("demarc_answers_remembered", "Answers of the last 10 minutes that the book remembers, so that a repeated request is not done twice.", func() float64 {
		count, _ := n.book.Remembered()
		return float64(count)
	})
	r.Gauge("demarc_artifacts_missing", "Artifacts that releases name and that this node does not have; -1 before it looked.", func() float64 { return float64(n.server.depot.missing.Load()) })
	r.Gauge("demarc_orders_waiting", "Orders that appliances have not acknowledged.", func() float64 { return float64(t.Of(n.book.View()).Orders) })
	r.Check("raft", func(ctx context.Context) error { return n.raft.Read(ctx) })
	r.Check("clock", func(context.Context) error { return n.raft.Clock() })
	r.Alive("raft", func(context.Context) error { return n.raft.Failure() })
}
