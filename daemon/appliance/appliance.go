// SPDX-License-Identifier: Apache-2.0

// Package appliance is the customer's role: it dials out, keeps the customer's own book, and does only what the
// customer's signed grants allow. What the control plane sends is a request; package book decides.
package appliance

import (
	"context"
	"crypto/ed25519"
	"log/slog"
	mrand "math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/demarc-dev/demarc/configs"
	"github.com/demarc-dev/demarc/daemon/appliance/book"
	"github.com/demarc-dev/demarc/daemon/appliance/credentials"
	"github.com/demarc-dev/demarc/daemon/appliance/tailnet"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/identity"
	"github.com/demarc-dev/demarc/ingress"
	"github.com/demarc-dev/demarc/manifest"
	"github.com/demarc-dev/demarc/mesh"
	"github.com/demarc-dev/demarc/telemetry"
	"github.com/demarc-dev/demarc/workload"
	"github.com/demarc-dev/demarc/workload/artifact"
)

// Runtime makes what runs equal to a plan. *workload.Process is one.
type Runtime interface {
	Missing(plan manifest.Plan) ([]manifest.Secret, error)
	Apply(ctx context.Context, plan manifest.Plan) error
	Status() workload.Status
	Changed() <-chan struct{}
	Addr(service string, port int) (string, bool)
	Exec(ctx context.Context, service string, argv []string, l workload.Limits) (workload.ExecResult, error)
	Close(ctx context.Context) error
}

// Appliance is the customer's side, put together. Its methods may be called concurrently.
type Appliance struct {
	cfg    *configs.Appliance
	build  string
	log    *slog.Logger
	now    func() time.Time
	book   *book.Store
	creds  *credentials.Store
	signer ed25519.PrivateKey
	store  *artifact.Store
	run    Runtime
	secret workload.Secrets
	gate   *ingress.Gate
	sw     *mesh.Switch
	routes map[string]mesh.Route  // by name
	hellos map[string]*mesh.Hello // likewise

	link    atomic.Pointer[link]
	linked  chan struct{} // holds one token each time a channel comes up
	wake    chan struct{} // holds one token each time the renewal has something to look at
	opts    Options
	proving proving
	idle    idleTolerance
	epochs  epochRefusals
	running runner
	intake  intake
	plans   book.Plans
	door    sync.Mutex // one change of doors at a time
	health  transportHealth
	private *privateSide // nil: the file names no tailnet of the customer's

	doorCert   *ingress.Files // of the doors; nil: none
	turnedAway atomic.Pointer[telemetry.CounterVec]
}

// Options is what a test puts in the place of the world. The zero value is the world.
type Options struct {
	Now    func() time.Time      // the host's clock
	Routes map[string]mesh.Route // by the name of the transport, in the place of those that the file describes
	Proof  func(ctx context.Context, audience string) (string, error)
	// see platform.Keys
	Keys func(ctx context.Context) (jwks []byte, token func(ctx context.Context, audience string) (string, error), err error)
	// jitter, from 0 to 1
	Rand func() float64
}

// New opens the customer's book, the keys and the runtime. Close gives them back.
func New(ctx context.Context, cfg *configs.Appliance, build string, log *slog.Logger, opts Options) (*Appliance, error) {
	const op = "appliance.New"
	if opts.Now == nil {
		opts.Now = time.Now
	}
	if opts.Rand == nil {
		opts.Rand = mrand.Float64
	}
	a := &Appliance{cfg: cfg, build: build, log: log, now: opts.Now, opts: opts, linked: make(chan struct{}, 1), wake: make(chan struct{}, 1),
		routes: map[string]mesh.Route{}, hellos: map[string]*mesh.Hello{}}
	a.running.live = map[string]*execution{}
	if err := os.MkdirAll(cfg.Dir, 0o700); err != nil {
		return nil, fault.Because(err, op, fault.Unavailable, "can't make the directory %s", cfg.Dir)
	}
	if err := a.openBook(ctx); err != nil {
		return nil, err
	}
	if err := a.openRest(ctx); err != nil {
		a.Close(ctx)
		return nil, err
	}
	return a, nil
}

// openBook opens the book, and puts the file's decisions into it.
func (a *Appliance) openBook(ctx context.Context) error {
	const op = "appliance.openBook"
	site, err := siteOf(a.cfg)
	if err != nil {
		return fault.At(op, "", err)
	}
	store, err := book.Open(filepath.Join(a.cfg.Dir, "book"), book.Config{Appliance: fleet.ApplianceID(a.cfg.Name),
		Customer: fleet.CustomerID(a.cfg.Customer), Clock: a.now, Logger: a.log})
	if err != nil {
		return err
	}
	if err := store.Begin(ctx, site); err != nil {
		_ = store.Close()
		return err
	}
	a.book = store
	return nil
}

func (a *Appliance) openRest(ctx context.Context) error {
	const op = "appliance.open"
	cfg := a.cfg
	b, err := os.ReadFile(cfg.ControlPlane.BundleFile)
	if err != nil {
		return fault.Because(err, op, fault.Invalid, "control_plane.bundle_file can't be read: %s", cfg.ControlPlane.BundleFile)
	}
	cas, err := identity.ParseBundle(b, cfg.TrustDomain)
	if err != nil {
		return fault.At(op, "", err)
	}
	var damage []error
	if a.creds, damage, err = credentials.Open(filepath.Join(cfg.Dir, "wallet.json"), cfg.TrustDomain, cas, a.book.View().VendorLogKey,
		a.now); err != nil {
		return err
	}
	for _, bad := range damage {
		a.log.Error("what this appliance kept was altered: it gets it anew", "err", bad)
	}
	if a.signer, err = credentials.OpenSigner(filepath.Join(cfg.Dir, "signing.key")); err != nil {
		return err
	}
	if a.store, err = artifact.Open(filepath.Join(cfg.Dir, "artifacts")); err != nil {
		return err
	}
	files := workload.NewFiles(cfg.Secrets.Dir)
	a.secret = files
	run, err := workload.Open(workload.Config{Dir: filepath.Join(cfg.Dir, "run"), Artifacts: a.store, Secrets: files, Logger: a.log,
		Now: a.now})
	if err != nil {
		return err
	}
	a.run = run
	if err := a.openGate(); err != nil {
		return err
	}
	a.sw, err = a.transports()
	return err
}

// Close stops the application and closes the book.
func (a *Appliance) Close(ctx context.Context) {
	if a.private != nil {
		a.private.Stop() // a join under way: the gate would wait for it
	}
	if a.gate != nil {
		_ = a.gate.Close()
	}
	if a.private != nil {
		a.private.Close()
	}
	for _, r := range a.routes {
		if t, ok := r.(tailnet.Transport); ok {
			t.Close()
		}
	}
	if a.run != nil {
		if err := a.run.Close(ctx); err != nil {
			a.log.Warn("the application did not stop cleanly", "err", err)
		}
	}
	_ = a.book.Close()
}

// setLink makes l the connection for artifacts and renewals.
func (a *Appliance) setLink(l *link) {
	a.link.Store(l)
	select {
	case a.linked <- struct{}{}:
	default:
	}
	a.wakeRenewal()
}

// wakeRenewal has the renewal look at the wallet again.
func (a *Appliance) wakeRenewal() {
	select {
	case a.wake <- struct{}{}:
	default:
	}
}

func (a *Appliance) dropLink(l *link) { a.link.CompareAndSwap(l, nil) }

func kindOf(ts []configs.Transport, name string) string {
	for _, t := range ts {
		if t.Name == name {
			return t.Kind
		}
	}
	return name
}
