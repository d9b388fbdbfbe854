// SPDX-License-Identifier: Apache-2.0

package appliance

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/hex"
	"log/slog"
	mrand "math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/demarc-dev/demarc/configs"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/identity"
	"github.com/demarc-dev/demarc/ingress"
	"github.com/demarc-dev/demarc/ledger"
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
	book   *ledger.Book[State]
	local  *ledger.Local[State]
	wallet *wallet
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
	nudge   chan struct{} // holds one token each time the renewal has something to look at
	opts    Options
	proving proving
	hush    hush
	epochs  epochRefusals
	running runner
	refused refusals
	intake  intake
	clock   bookTime
	plans   plans
	door    sync.Mutex // one change of doors at a time
	ill     sickness
	private *privateSide // nil: the file names no tailnet of the customer's

	doorCert   *ingress.Files // of the doors; nil: none
	turnedAway atomic.Pointer[telemetry.CounterVec]

	file *os.File
	disk bookDisk
}

// NewBook makes the customer's book with every change that this build knows.
func NewBook(name fleet.ApplianceID, customer fleet.CustomerID) *ledger.Book[State] {
	return ledger.NewBook(NewState(name, customer), ledger.Learn[SetSite](), ledger.Learn[MeetVendor](), ledger.Learn[Pin](), ledger.Learn[SetPosture](),
		ledger.Learn[UseTransport](), ledger.Learn[ReportsDone](), ledger.Learn[Observe](), ledger.Learn[ObserveRoads](), ledger.Learn[Checkpointed](), ledger.Learn[Take](),
		ledger.Learn[Unsaid](), ledger.Learn[ledger.SetTime[State]](), ledger.Learn[Consent](), ledger.Learn[BeginDeploy](), ledger.Learn[EndDeploy](), ledger.Learn[Start](), ledger.Learn[Finish](), ledger.Learn[Expire](),
		ledger.Learn[MeetEpoch](), ledger.Learn[RefuseEpoch]())
}

// Options is what a test puts in the place of the world. The zero value is the world.
type Options struct {
	Now    func() time.Time      // the host's clock
	Routes map[string]mesh.Route // by the name of the transport, in the place of those that the file describes
	Proof  func(ctx context.Context, audience string) (string, error)
	Keys   func(ctx context.Context) (jwks []byte, token func(ctx context.Context, audience string) (string, error), err error) // see platform.Keys
	Rand   func() float64                                                                                                       // jitter, from 0 to 1
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
	a := &Appliance{cfg: cfg, build: build, log: log, now: opts.Now, opts: opts, linked: make(chan struct{}, 1), nudge: make(chan struct{}, 1),
		routes: map[string]mesh.Route{}, hellos: map[string]*mesh.Hello{}}
	a.running.live = map[string]*act{}
	a.disk.wake = make(chan struct{}, 1)
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

// openBook locks and replays the book, and puts the file's decisions into it.
func (a *Appliance) openBook(ctx context.Context) error {
	const op = "appliance.openBook"
	path := filepath.Join(a.cfg.Dir, "book")
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return fault.Because(err, op, fault.Unavailable, "the book can't be opened: %s", path)
	}
	a.file = f
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		f.Close()
		return fault.Because(err, op, fault.Conflict, "another process has the book %s: one appliance, one process", path)
	}
	a.book = NewBook(fleet.ApplianceID(a.cfg.Name), fleet.CustomerID(a.cfg.Customer))
	local, rec, err := ledger.OpenLocal(f, a.book)
	if err != nil {
		f.Close()
		return fault.At(op, "", err)
	}
	a.local = local
	a.clock.begin(a.now().UTC(), a.book.At())
	if rec.Cut > 0 {
		a.log.Warn("the book ended in a write that nobody was told of: it was cut off", "bytes", rec.Cut)
	}
	site, err := siteOf(a.cfg)
	if err != nil {
		return fault.At(op, "", err)
	}
	if s := a.book.View().Site; !sameSite(s, site) {
		a.disk.site = &site
		if err := a.settle(ctx); err != nil {
			if a.local.Failed() == nil {
				return err
			}
			a.disk.failed(a.now()) // the application does not wait for space; whatever the vendor asks does
		}
	}
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
	if a.wallet, damage, err = openWallet(filepath.Join(cfg.Dir, "wallet.json"), cfg.TrustDomain, cas, a.book.View().VendorLogKey, a.now); err != nil {
		return err
	}
	for _, bad := range damage {
		a.log.Error("what this appliance kept was altered: it gets it anew", "err", bad)
	}
	if a.signer, err = openSigner(filepath.Join(cfg.Dir, "signing.key")); err != nil {
		return err
	}
	if a.store, err = artifact.Open(filepath.Join(cfg.Dir, "artifacts")); err != nil {
		return err
	}
	files := workload.NewFiles(cfg.Secrets.Dir)
	a.secret = files
	run, err := workload.Open(workload.Config{Dir: filepath.Join(cfg.Dir, "run"), Artifacts: a.store, Secrets: files, Logger: a.log, Now: a.now})
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
		a.private.stop() // a join under way: the gate would wait for it
	}
	if a.gate != nil {
		_ = a.gate.Close()
	}
	if a.private != nil {
		a.private.close()
	}
	for _, r := range a.routes {
		if t, ok := r.(tailnetRoute); ok {
			t.close()
		}
	}
	if a.run != nil {
		if err := a.run.Close(ctx); err != nil {
			a.log.Warn("the application did not stop cleanly", "err", err)
		}
	}
	if a.file != nil {
		_ = a.file.Close()
	}
}

// submit stamps a change of the appliance itself and puts it into the customer's book. While the book's disk takes nothing,
// it is refused at once: whoever looks again later does so by [State].
func submit[R any](ctx context.Context, a *Appliance, c ledger.Change[State, R]) (R, error) {
	if err := a.local.Failed(); err != nil {
		var none R
		return none, mesh.For(mesh.OwnDisk, err)
	}
	return submitAs(ctx, a, drawID(), c)
}

// submitAs is submit with a request id of the caller.
func submitAs[R any](ctx context.Context, a *Appliance, id fleet.RequestID, c ledger.Change[State, R]) (R, error) {
	if id == "" {
		id = drawID()
	}
	var r R
	err := a.settle(ctx)
	if err == nil { // what is in the book must not depend on whether a connection lives
		r, err = ledger.Submit(context.WithoutCancel(ctx), a.local, a.meta(id), c)
	}
	if err != nil && a.local.Failed() != nil {
		a.disk.failed(a.now())
		err = mesh.For(mesh.OwnDisk, err)
	}
	return r, err
}

func (a *Appliance) meta(id fleet.RequestID) ledger.Meta {
	return ledger.Meta{At: a.stamp(), By: fleet.Local, Request: id}
}

func drawID() fleet.RequestID {
	var b [16]byte
	_, _ = rand.Read(b[:]) // crypto/rand.Read never fails
	return fleet.RequestID(hex.EncodeToString(b[:]))
}

// setLink makes l the connection for artifacts and renewals.
func (a *Appliance) setLink(l *link) {
	a.link.Store(l)
	select {
	case a.linked <- struct{}{}:
	default:
	}
	a.look()
}

// look has the renewal look at the wallet again.
func (a *Appliance) look() {
	select {
	case a.nudge <- struct{}{}:
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
