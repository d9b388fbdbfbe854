// SPDX-License-Identifier: Apache-2.0

package appliance_test

import (
	"context"
	"crypto/rand"
	enc "encoding/pem"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"connectrpc.com/connect"
	"filippo.io/age"

	localv1 "github.com/demarc-dev/demarc/api/local/v1"
	"github.com/demarc-dev/demarc/api/local/v1/localv1connect"
	"github.com/demarc-dev/demarc/configs"
	"github.com/demarc-dev/demarc/daemon/appliance"
	"github.com/demarc-dev/demarc/daemon/appliance/book"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/grant"
	"github.com/demarc-dev/demarc/identity"
	"github.com/demarc-dev/demarc/manifest"
	"github.com/demarc-dev/demarc/mesh"
	"github.com/demarc-dev/demarc/operation"
	"github.com/demarc-dev/demarc/workload"
)

// fakeRun is a runtime that says what it was told.
type fakeRun struct {
	mu      sync.Mutex
	applied []manifest.Plan
	limits  []workload.Limits
	ill     bool
	addr    string
	hang    atomic.Bool   // what is applied comes up when it is told to stop, and not before
	slow    bool          // an operation runs until its context ends, and its processes are gone when dead is closed
	running chan struct{} // gets one for each operation that runs
	dying   chan struct{} // and for each whose context ended
	dead    chan struct{}
	changed chan struct{}
}

func newFakeRun() *fakeRun {
	f := &fakeRun{addr: "127.0.0.1:9", running: make(chan struct{}, 16), dying: make(chan struct{}, 16), dead: make(chan struct{}),
		changed: make(chan struct{})}
	return f
}

func (f *fakeRun) Missing(manifest.Plan) ([]manifest.Secret, error) { return nil, nil }

func (f *fakeRun) Apply(ctx context.Context, p manifest.Plan) error {
	f.mu.Lock()
	f.applied = append(f.applied, p)
	f.mu.Unlock()
	if f.hang.Load() {
		<-ctx.Done()
		return fault.Because(ctx.Err(), "fake", fault.Unavailable, "it was called off")
	}
	return nil
}

func (f *fakeRun) plans() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	var out []string
	for _, p := range f.applied {
		out = append(out, p.AppVersion)
	}
	return out
}

func (f *fakeRun) Status() workload.Status {
	f.mu.Lock()
	defer f.mu.Unlock()
	return workload.Status{Services: []workload.ServiceStatus{{Name: "web", Healthy: !f.ill}}}
}

func (f *fakeRun) Changed() <-chan struct{} { return f.changed }

func (f *fakeRun) Addr(string, int) (string, bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.addr, true
}

func (f *fakeRun) Exec(ctx context.Context, _ string, _ []string, l workload.Limits) (workload.ExecResult, error) {
	f.mu.Lock()
	f.limits = append(f.limits, l)
	f.mu.Unlock()
	f.running <- struct{}{}
	if !f.slow {
		return workload.ExecResult{Stdout: []byte("done")}, nil
	}
	<-ctx.Done()
	f.dying <- struct{}{}
	<-f.dead
	return workload.ExecResult{Killed: true, Exit: -1}, nil
}

func (f *fakeRun) Close(context.Context) error { return nil }

// place is an appliance on a disk, which can be started again.
type place struct {
	t    *testing.T
	o    *order
	run  *fakeRun
	cfg  *configs.Appliance
	app  *appliance.Appliance
	skew atomic.Int64 // of its clock, from start
	stop func()
	real bool // its runtime is not the fake
}

func newPlace(t *testing.T) *place { return newPlaceIn(t, t.TempDir()) }

// real has a place keep its runtime of processes.
func real(p *place) { p.real = true }

func newPlaceIn(t *testing.T, dir string, with ...func(*place)) *place {
	t.Helper()
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	ca, err := identity.NewCA("acme.example", start, rand.Reader, 1000*24*time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	file := func(name string, b []byte) string {
		p := filepath.Join(dir, name)
		if err := os.WriteFile(p, b, 0o600); err != nil {
			t.Fatal(err)
		}
		return p
	}
	bundle := enc.EncodeToMemory(&enc.Block{Type: "CERTIFICATE", Bytes: ca.Cert.Raw})
	p := &place{t: t, cfg: &configs.Appliance{Name: "eu-1", Customer: "globex", TrustDomain: "acme.example",
		Dir: filepath.Join(dir, "state"), Socket: filepath.Join(dir, "socket", "s"),
		ControlPlane: configs.Vendor{Addresses: []string{"node:1"}, BundleFile: file("bundle.pem", bundle),
			ReleaseKeys: []string{file("release.pub", pem(t, vendor))},
			Operators:   []configs.Operator{{Name: "ann", Keys: []string{file("ann.pub", pem(t, ann))}}}},
		Transports: []configs.Transport{{Name: "https", Kind: configs.HTTPS}}, Runtime: configs.Runtime{Kind: configs.RuntimeProcess},
		Secrets: configs.Secrets{Kind: configs.SecretsFiles, Dir: dir}, Ingress: configs.Ingress{Host: "127.0.0.1",
			Ports: map[string]string{"web": "127.0.0.1:0"}}}}
	for _, w := range with {
		w(p)
	}
	p.open()
	t.Cleanup(func() { p.halt() })
	return p
}

func (p *place) now() time.Time { return start.Add(time.Duration(p.skew.Load())) }

type nowhere struct{}

func (nowhere) Name() string                                   { return "https" }
func (nowhere) Dial(context.Context, string) (net.Conn, error) { return nil, os.ErrDeadlineExceeded }

// open opens the appliance with what is on its disk; nothing works until begin.
func (p *place) open() {
	p.t.Helper()
	app, err := appliance.New(p.t.Context(), p.cfg, "test", slog.New(slog.DiscardHandler),
		appliance.Options{Now: p.now, Routes: map[string]mesh.Route{"https": nowhere{}}})
	if err != nil {
		p.t.Fatal(err)
	}
	p.app, p.run = app, newFakeRun()
	if !p.real {
		app.SetRuntime(p.run)
	}
	var sent uint64
	if p.o != nil {
		sent = p.o.sent
	}
	p.o = &order{book: app.Book(), to: app, sent: sent, n: uint64(app.Book().Index()), still: true}
	p.o.past = time.Duration(p.skew.Load())
	p.stop = func() { app.Close(context.Background()) }
}

// begin has it deploy and operate.
func (p *place) begin() {
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	for _, part := range p.app.Work() {
		wg.Go(func() { _ = part.Run(ctx, func() {}) })
	}
	app := p.app
	p.stop = func() {
		cancel()
		wg.Wait()
		app.Close(context.Background())
	}
}

func (p *place) halt() {
	if p.stop != nil {
		p.stop()
		p.stop = nil
	}
}

// restart ends it and opens it again.
func (p *place) restart() {
	p.t.Helper()
	p.halt()
	p.open()
}

// pass lets time pass on its clock.
func (p *place) pass(d time.Duration) {
	p.skew.Add(int64(d))
	p.o.past += d
}

// until waits for a condition.
func (p *place) until(what string, is func() bool) {
	p.t.Helper()
	for end := time.Now().Add(2 * time.Minute); !is(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			p.t.Fatalf("it is still not so: %s; %+v, %v", what, p.o.book.View().Deploy, p.run.plans())
		}
	}
}

// offer has a release offered whose artifacts are here.
func (p *place) offer(version string, edit func(*manifest.Release)) {
	p.t.Helper()
	r := release(p.t, version)
	edit(&r)
	for _, b := range []string{"web" + version, "store"} {
		if err := p.app.Store(fleet.DigestOf([]byte(b)), []byte(b)); err != nil {
			p.t.Fatal(err)
		}
	}
	if why := take(p.t, p.o, book.Take{Release: sealed(p.t, r, vendor)}); why != "" {
		p.t.Fatal(why)
	}
}

func (p *place) deployState() fleet.State { return p.o.book.View().Deploy.State }

// deployed has version 1.0.0 run; only what is granted here is granted.
func (p *place) deployed() {
	t, o := p.t, p.o
	t.Helper()
	id, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	must(t, o, book.Pin{Public: pem(t, customer), Recipient: id.Recipient().String()})
	p.offer("1.0.0", func(*manifest.Release) {})
	must(t, o, consent(t, granted(fleet.Install, 1), customer))
	must(t, o, consent(t, granted(fleet.Deploy, 1), customer))
	must(t, o, consent(t, o.approval(t, ""), customer))
	p.begin()
	p.until("1.0.0 runs", func() bool { return p.deployState() == fleet.StateDeployed })
}

// TestAnEndedApprovalIsToldAndTheGoodOneRunsOn (FAULTS.md A4; MUTANTS.md deploy.go:144 and 95): while a release waits the good one
// runs, after a restart too; when its approval ends that is on record, and what runs is told on.
func TestAnEndedApprovalIsToldAndTheGoodOneRunsOn(t *testing.T) {
	p := newPlace(t)
	p.deployed()
	p.offer("1.1.0", func(*manifest.Release) {})
	must(t, p.o, consent(t, p.o.approval(t, ""), customer))
	p.until("1.1.0 waits for a grant", func() bool { return p.deployState() == fleet.StateWaiting })
	p.restart()
	p.begin()
	p.until("1.0.0 is kept running", func() bool { return slices.Contains(p.run.plans(), "1.0.0") })
	p.pass(2 * time.Hour)
	p.until("the end of the approval is told", func() bool { return p.deployState() == fleet.StateFailed })
	if d := p.o.book.View().Deploy; d.Version != "1.1.0" || !strings.Contains(d.Reason, "before the deploy began") {
		t.Errorf("%+v", d)
	}
	must(t, p.o, consent(t, granted(fleet.Deploy, 0), customer))
	again := edited(p.o.approval(t, ""), func(a *operation.PlanApproval) { a.At, a.NotAfter = p.o.now(), p.o.now().Add(time.Hour) })
	must(t, p.o, consent(t, again, customer))
	p.until("1.1.0 runs, approved anew", func() bool { return p.deployState() == fleet.StateDeployed })
	if got := p.run.plans(); slices.Contains(got[:len(got)-1], "1.1.0") || got[len(got)-1] != "1.1.0" {
		t.Errorf("the runtime was given %v", got)
	}
	p.run.mu.Lock()
	p.run.ill = true
	p.run.mu.Unlock()
	p.until("a service that is not well is told", func() bool { return p.deployState() == fleet.StateDegraded })
}

// TestADeployIsCalledOff (FAULTS.md A8): when its grant ends, or a deny comes, while it is under way.
func TestADeployIsCalledOff(t *testing.T) {
	for name, event := range map[string]func(p *place){
		"its grant ends": func(p *place) { p.pass(40 * time.Minute) },
		"it is denied": func(p *place) {
			must(t, p.o, consent(t, grant.Deny{Appliance: "eu-1", Name: "stop", Cedar: `forbid (principal, action, resource);`, At: start,
				Nonce: nonce()}, customer))
		},
	} {
		t.Run(name, func(t *testing.T) {
			p := newPlace(t)
			p.deployed()
			p.run.hang.Store(true)
			p.offer("1.1.0", func(*manifest.Release) {})
			must(t, p.o, consent(t, edited(granted(fleet.Deploy, 0), func(g *grant.Grant) { g.Until = start.Add(30 * time.Minute) }), customer))
			must(t, p.o, consent(t, edited(granted(fleet.Deploy, 0), func(g *grant.Grant) { g.From = start.Add(48 * time.Hour) }), customer))
			must(t, p.o, consent(t, p.o.approval(t, ""), customer))
			p.until("1.1.0 is under way", func() bool { return slices.Contains(p.run.plans(), "1.1.0") })
			event(p)
			p.until("it is called off", func() bool { return p.deployState() == fleet.StateFailed })
			if d := p.o.book.View().Deploy; !strings.Contains(d.Reason, "consent ended while") {
				t.Errorf("%+v", d)
			}
		})
	}
}

// operating has operation op-1 requested, of a template with or without network.
func (p *place) operating(network bool) {
	t := p.t
	t.Helper()
	p.deployed()
	must(t, p.o, consent(t, edited(granted(fleet.OperateRead, 0), func(g *grant.Grant) { g.Until = start.Add(30 * time.Minute) }), customer))
	version := "1.0.0"
	if !network {
		version = "1.1.0"
		p.offer(version, func(r *manifest.Release) {
			r.Templates["state"] = strings.Replace(r.Templates["state"], "network: true", "network: false", 1)
		})
		must(t, p.o, consent(t, granted(fleet.Deploy, 0), customer))
		must(t, p.o, consent(t, p.o.approval(t, ""), customer))
		p.until("1.1.0 runs", func() bool { return p.o.book.View().Good.Release == p.o.book.View().Approved.Release })
	}
	if why := take(t, p.o, book.Take{Operation: p.o.request(t, "op-1")}); why != "" {
		t.Fatal(why)
	}
}

// TestARunningOperationEndsWithItsGrant (FAULTS.md A10): it is killed when its grant ends, and the signed result says why.
func TestARunningOperationEndsWithItsGrant(t *testing.T) {
	p := newPlace(t)
	p.operating(true)
	p.run.slow = true
	close(p.run.dead)
	must(t, p.o, p.o.approve(t, "op-1"))
	<-p.run.running
	p.pass(30 * time.Minute)
	<-p.run.dying
	p.until("it is cancelled", func() bool { return p.o.state(t, "op-1") == operation.Cancelled })
	x, _ := p.o.book.View().Operation("op-1")
	if !strings.Contains(x.Reason, "its grant ended at") || len(x.Result) == 0 || len(x.Output) != 0 {
		t.Errorf("%q, a result of %d bytes, an output of %d", x.Reason, len(x.Result), len(x.Output))
	}
}

// TestARevocationIsAnsweredWhenTheProcessesAreGone (MUTANTS.md local.go:142): not before, and the receipt names what was stopped.
func TestARevocationIsAnsweredWhenTheProcessesAreGone(t *testing.T) {
	p := newPlace(t)
	p.operating(true)
	p.run.slow = true
	must(t, p.o, p.o.approve(t, "op-1"))
	<-p.run.running
	srv := httptest.NewServer(p.app.Handler())
	defer srv.Close()
	client := localv1connect.NewLocalClient(http.DefaultClient, srv.URL)
	doc := sealed(t, grant.Revoke{Appliance: "eu-1", All: true, At: start, Nonce: nonce()}, customer)
	answered := make(chan error, 1)
	var receipt []byte
	go func() {
		m, err := client.Submit(context.Background(), connect.NewRequest(&localv1.SubmitRequest{Document: doc}))
		if err == nil {
			receipt = m.Msg.GetReceipt()
		}
		answered <- err
	}()
	<-p.run.dying
	select {
	case err := <-answered:
		t.Errorf("answered while a process was there: %v", err)
		close(p.run.dead)
		return
	case <-time.After(300 * time.Millisecond): // an answer that does not wait is here by then
	}
	close(p.run.dead)
	if err := <-answered; err != nil || len(receipt) == 0 {
		t.Errorf("%v, a receipt of %d bytes", err, len(receipt))
	}
}

// TestOperationsAfterARestart (MUTANTS.md operate.go:56 and 95): one that ran has failed, one that nobody answered expires.
func TestOperationsAfterARestart(t *testing.T) {
	p := newPlace(t)
	p.operating(true)
	take(t, p.o, book.Take{Operation: p.o.request(t, "op-2")})
	p.restart() // nothing works: what comes now is of a process that is killed
	must(t, p.o, p.o.approve(t, "op-1"))
	must(t, p.o, book.Start{ID: "op-1"})
	p.restart()
	p.begin()
	p.until("what ran has failed", func() bool { return p.o.state(t, "op-1") == operation.Failed })
	if x, _ := p.o.book.View().Operation("op-1"); len(x.Result) == 0 {
		t.Error("it has no signed result")
	}
	if s := p.o.state(t, "op-2"); s != operation.Requested {
		t.Errorf("op-2 is %s", s)
	}
	p.pass(2 * time.Hour)
	p.until("what nobody answered expires", func() bool { return p.o.state(t, "op-2") == operation.Expired })
}

// TestAnOperationHasTheNetworkThatItDeclares (MUTANTS.md operate.go:148).
func TestAnOperationHasTheNetworkThatItDeclares(t *testing.T) {
	for _, network := range []bool{true, false} {
		p := newPlace(t)
		p.operating(network)
		must(t, p.o, p.o.approve(t, "op-1"))
		p.until("it is held", func() bool { return p.o.state(t, "op-1") == operation.Held })
		if l := p.run.limits[0]; l.Network != network || !l.Credentials || l.Timeout != 10*time.Second {
			t.Errorf("declared %v, given %+v", network, l)
		}
		p.halt()
	}
}

// TestDoorsAfterARestartAndAMove (MUTANTS.md doors.go:72 and 76): the posture's doors stand after a restart, and follow a service
// that listens elsewhere.
func TestDoorsAfterARestartAndAMove(t *testing.T) {
	p := newPlace(t)
	p.deployed()
	if err := p.app.SetPosture(t.Context(), fleet.Posture{Exposure: fleet.Public}); err != nil {
		t.Fatal(err)
	}
	to := func(addr string) func() bool {
		return func() bool { d := p.app.Doors(); return len(d) == 1 && d[0].To == addr }
	}
	p.until("the door stands", to("127.0.0.1:9"))
	p.restart()
	if n := len(p.app.Doors()); n != 0 {
		t.Fatalf("%d doors before anything runs", n)
	}
	p.begin()
	p.until("the door stands again", to("127.0.0.1:9"))
	p.run.mu.Lock()
	p.run.addr = "127.0.0.1:10"
	p.run.mu.Unlock()
	p.until("the door follows", to("127.0.0.1:10"))
}
