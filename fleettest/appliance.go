// SPDX-License-Identifier: Apache-2.0

package fleettest

import (
	"context"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"connectrpc.com/connect"

	localv1 "github.com/demarc-dev/demarc/api/local/v1"
	"github.com/demarc-dev/demarc/api/local/v1/localv1connect"
	"github.com/demarc-dev/demarc/configs"
	"github.com/demarc-dev/demarc/daemon/appliance"
	"github.com/demarc-dev/demarc/daemon/controlplane/book"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/identity"
	"github.com/demarc-dev/demarc/ledger"
	"github.com/demarc-dev/demarc/mesh"
	"github.com/demarc-dev/demarc/seal"
)

// Appliance is one appliance of a fleet. Its directory outlives its process.
type Appliance struct {
	Name   string
	proofs atomic.Int64
	dials  atomic.Int64
	told   atomic.Int64
	f      *Fleet
	cfg    *configs.Appliance
	cut    bool
	mute   bool // its platform vouches for nobody
	hung   bool // nothing is delivered, either way
	skew   time.Duration
	stop   func()
	onDial func()
	app    *appliance.Appliance
}

// Proofs is how often it has proved its platform identity.
func (a *Appliance) Proofs() int { return int(a.proofs.Load()) }

// Told is how often it has told the control plane the keys of its cluster, or tried to.
func (a *Appliance) Told() int { return int(a.told.Load()) }

// Dials is how often it has come to the node's door, or tried to.
func (a *Appliance) Dials() int { return int(a.dials.Load()) }

// AddAppliance registers an appliance and makes its directory. Start starts it.
func (f *Fleet) AddAppliance(name string) *Appliance {
	f.t.Helper()
	f.Register(name)
	dir := f.t.TempDir()
	file := func(name string, b []byte) string {
		p := filepath.Join(dir, name)
		f.must(os.WriteFile(p, b, 0o600))
		return p
	}
	key, err := seal.KeyOf(f.platform.Public()) // any key will do: no release is signed here
	f.must(err)
	a := &Appliance{Name: name, f: f,
		cfg: &configs.Appliance{Name: name, Customer: "globex", TrustDomain: Domain, Dir: filepath.Join(dir, "state"),
			ControlPlane: configs.Vendor{Addresses: []string{"node:1"}, BundleFile: file("bundle.pem", f.bundle),
				ReleaseKeys: []string{file("release.pub", key.PEM())}},
			Transports: []configs.Transport{{Name: "https", Kind: configs.HTTPS}},
			Runtime:    configs.Runtime{Kind: configs.RuntimeProcess}, Secrets: configs.Secrets{Kind: configs.SecretsFiles, Dir: dir},
			Ingress: configs.Ingress{Host: "127.0.0.1"}}}
	f.t.Cleanup(func() { a.Hang(false); a.Stop() })
	return a
}

// Register has the vendor register an appliance.
func (f *Fleet) Register(name string) {
	f.t.Helper()
	_, err := ledger.Submit(f.t.Context(), order{f}, f.meta(),
		book.RegisterAppliance{Name: fleet.ApplianceID(name), Customer: "globex", Expect: f.expect(name)})
	f.must(err)
}

// File is where a file of the appliance's own directory is.
func (a *Appliance) File(name string) string { return filepath.Join(a.cfg.Dir, name) }

// Start starts the process, with what is on its disk.
func (a *Appliance) Start() {
	f := a.f
	f.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	app, err := appliance.New(ctx, a.cfg, "test", f.log.With("appliance", a.Name), appliance.Options{
		Now:    func() time.Time { f.mu.Lock(); defer f.mu.Unlock(); return time.Now().Add(a.skew) },
		Routes: map[string]mesh.Route{"https": road{a}},
		Proof:  a.proof, Keys: a.keys,
	})
	f.must(err)
	var wg sync.WaitGroup
	parts := app.Link()
	if f.Evidence {
		parts = append(parts, app.Witness())
	}
	for _, p := range parts {
		wg.Go(func() { _ = p.Run(ctx, func() {}) })
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	a.app = app
	a.stop = func() {
		cancel()
		wg.Wait()
		app.Close(context.Background())
	}
}

// Stop ends the process at once: its connections are gone before it can say goodbye.
func (a *Appliance) Stop() {
	a.f.mu.Lock()
	stop := a.stop
	a.stop = nil
	a.f.mu.Unlock()
	a.hangUp()
	if stop != nil {
		stop()
	}
}

func (a *Appliance) hangUp() {
	a.f.mu.Lock()
	defer a.f.mu.Unlock()
	for c, of := range a.f.conns {
		if of == a {
			_ = c.Close()
		}
	}
}

// Cut takes the network away, from connections that stand too.
func (a *Appliance) Cut() {
	a.f.mu.Lock()
	a.cut = true
	a.f.mu.Unlock()
	a.hangUp()
}

// Heal gives it back.
func (a *Appliance) Heal() {
	a.f.mu.Lock()
	defer a.f.mu.Unlock()
	a.cut = false
}

// Hang has the program at one end of the appliance's connections hang, until it is told otherwise: what either end writes is
// taken, and neither hears anything, not even that a connection ended. Which of the two programs hangs looks the same.
func (a *Appliance) Hang(hung bool) {
	a.f.mu.Lock()
	defer a.f.mu.Unlock()
	a.hung = hung
	for c, of := range a.f.conns {
		if of == a {
			c.hold(hung)
		}
	}
}

// Mute has the platform give no proof, until it is told otherwise.
func (a *Appliance) Mute(mute bool) {
	a.f.mu.Lock()
	defer a.f.mu.Unlock()
	a.mute = mute
}

// Skew sets the clock of the host wrong by d.
func (a *Appliance) Skew(d time.Duration) {
	a.f.mu.Lock()
	defer a.f.mu.Unlock()
	a.skew = d
}

// OnDial has hook called at the next dial, once: a place to crash at.
func (a *Appliance) OnDial(hook func()) {
	a.f.mu.Lock()
	defer a.f.mu.Unlock()
	a.onDial = hook
}

// Road is what the customer's own page says of the appliance's only transport.
func (a *Appliance) Road() *localv1.Road {
	a.f.t.Helper()
	a.f.mu.Lock()
	app := a.app
	a.f.mu.Unlock()
	l := localv1connect.NewLocalClient(&http.Client{Transport: inProcess{app.Handler()}}, "http://appliance")
	m, err := l.Status(a.f.t.Context(), connect.NewRequest(&localv1.StatusRequest{}))
	a.f.must(err)
	return m.Msg.GetWays()[0]
}

// inProcess answers requests by a handler of this process.
type inProcess struct{ http.Handler }

// RoundTrip implements [http.RoundTripper].
func (h inProcess) RoundTrip(r *http.Request) (*http.Response, error) {
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	return w.Result(), nil
}

// Up tells whether the vendor's book has the appliance online with a certificate that holds.
func (a *Appliance) Up() bool {
	at := a.f.Of(a.Name)
	return at.Online && at.Status == book.Enrolled && at.CurrentTill.After(time.Now())
}

// WaitUp waits until it is.
func (a *Appliance) WaitUp(limit time.Duration) time.Duration {
	a.f.t.Helper()
	return a.f.Wait(a.Name+" is up", limit, a.Up)
}

// road is the appliance's only transport.
type road struct{ a *Appliance }

// Name implements [mesh.Route].
func (road) Name() string { return "https" }

// Dial implements [mesh.Route].
func (r road) Dial(ctx context.Context, _ string) (net.Conn, error) {
	f := r.a.f
	f.mu.Lock()
	r.a.dials.Add(1)
	hook := r.a.onDial
	r.a.onDial = nil
	f.mu.Unlock()
	if hook != nil {
		hook()
		return nil, errGone
	}
	c, err := f.dial(ctx, r.a)
	if err != nil {
		return nil, err
	}
	return c, nil
}

// NewBundleFile puts the vendor's CAs of now in the place of the customer's file.
func (a *Appliance) NewBundleFile() {
	a.f.t.Helper()
	b, err := identity.BundlePEM(a.f.View().Slots)
	a.f.must(err)
	a.f.must(os.WriteFile(a.cfg.ControlPlane.BundleFile, b, 0o600))
}
