// SPDX-License-Identifier: Apache-2.0

package appliance_test

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect"
	"filippo.io/age"
	"google.golang.org/protobuf/proto"

	localv1 "github.com/demarc-dev/demarc/api/local/v1"
	"github.com/demarc-dev/demarc/daemon/appliance"
	"github.com/demarc-dev/demarc/daemon/appliance/book"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/grant"
	"github.com/demarc-dev/demarc/manifest"
	"github.com/demarc-dev/demarc/operation"
	"github.com/demarc-dev/demarc/workload"
	"github.com/demarc-dev/demarc/workload/artifact"
)

// canary is in each name, path and text of the customer's side in the tests of this file.
const canary = "kanarie"

// ailing is a runtime that fails as it is told to.
type ailing struct {
	*fakeRun
	missing func() ([]manifest.Secret, error)
	apply   func() error
	status  []workload.ServiceStatus
	exec    func() (workload.ExecResult, error)
}

func (a *ailing) Missing(p manifest.Plan) ([]manifest.Secret, error) {
	if a.missing != nil {
		return a.missing()
	}
	return a.fakeRun.Missing(p)
}

func (a *ailing) Apply(ctx context.Context, p manifest.Plan) error {
	if a.apply != nil {
		return a.apply()
	}
	return a.fakeRun.Apply(ctx, p)
}

func (a *ailing) Status() workload.Status {
	if a.status != nil {
		return workload.Status{Services: a.status}
	}
	return a.fakeRun.Status()
}

func (a *ailing) Exec(ctx context.Context, s string, argv []string, l workload.Limits) (workload.ExecResult, error) {
	if a.exec != nil {
		return a.exec()
	}
	return a.fakeRun.Exec(ctx, s, argv, l)
}

// crossed returns the reasons of all reports, after it looked for the canary in each byte of them, documents that they carry included.
func (p *place) crossed() (out []fleet.Reason) {
	p.t.Helper()
	for i, r := range p.o.book.View().Reports {
		w := appliance.ToWire(r, uint64(i+1))
		b, err := proto.Marshal(w)
		if err != nil {
			p.t.Fatal(err)
		}
		var doc struct {
			Payload string `json:"payload"`
		}
		if s := w.GetOperation().GetStatement(); s != nil {
			if err := json.Unmarshal(s, &doc); err != nil {
				p.t.Fatal(err)
			}
			text, err := base64.StdEncoding.DecodeString(doc.Payload)
			if err != nil {
				p.t.Fatal(err)
			}
			b = append(b, text...)
		}
		if bytes.Contains(bytes.ToLower(b), []byte(canary)) {
			p.t.Errorf("what is the customer's crosses: %s", b)
		}
		switch {
		case r.Deploy != nil:
			out = append(out, r.Deploy.Why)
		case r.Operation != nil:
			out = append(out, r.Operation.Why)
		case r.Status != nil:
			for _, s := range r.Status.Services {
				out = append(out, s.Why)
			}
			out = append(out, r.Status.Offer.Why)
		}
	}
	return out
}

// approved has a key pinned and a release approved, and granted if it says so.
func (p *place) approved(grants bool, edit func(*manifest.Release)) {
	t, o := p.t, p.o
	t.Helper()
	id, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	must(t, o, book.Pin{Public: pem(t, customer), Recipient: id.Recipient().String()})
	p.offer("1.0.0", edit)
	if grants {
		must(t, o, consent(t, granted(fleet.Install, 0), customer))
		must(t, o, consent(t, granted(fleet.Deploy, 0), customer))
	}
	must(t, o, consent(t, o.approval(t, ""), customer))
}

// TestNothingOfTheCustomersCrossesInAReason (FAULTS.md I7): folders, stores, hosts and the texts of errors hold a canary, each way to
// fail is driven, and of each the vendor hears the kind, with its own names, and not one byte of the canary.
func TestNothingOfTheCustomersCrossesInAReason(t *testing.T) {
	path := &fs.PathError{Op: "open", Path: "/srv/" + canary + "/x", Err: syscall.ENOSPC}
	text := func(k fault.Kind) error { return fault.New("x", k, "open /srv/%s: it says no", canary) }
	none := func(*manifest.Release) {}
	reason := func(k fleet.ReasonKind) fleet.Reason { return fleet.Reason{Kind: k} }
	type way struct {
		run    func(*ailing)
		edit   func(*manifest.Release)
		denied bool                // nothing is granted
		after  func(*place)        // once it is deployed, nil: it is not
		want   fleet.Reason        // that crosses
		local  func(*place) string // what the customer's own page must hold
	}
	deployReason := func(p *place) string { return p.o.book.View().Deploy.Reason }
	ways := map[string]way{
		"a secret is missing": {run: func(a *ailing) {
			a.missing = func() ([]manifest.Secret, error) {
				return []manifest.Secret{{Name: "store-token", Store: canary + "-store", Required: true}, {Name: "other", Store: canary + "-2"}}, nil
			}
		}, want: fleet.Reason{Kind: fleet.SecretMissing, Secret: "store-token", Number: 2}, local: func(p *place) string {
			return "demarc secret create " + canary + "-store --dir " + p.cfg.Secrets.Dir
		}},
		"a secret that the manifest does not have": {run: func(a *ailing) {
			a.missing = func() ([]manifest.Secret, error) {
				return []manifest.Secret{{Name: canary, Store: "x", Required: true}}, nil
			}
		}, want: fleet.Reason{Kind: fleet.SecretMissing, Number: 1}, local: func(*place) string { return canary }},
		"the store does not answer": {run: func(a *ailing) {
			a.missing = func() ([]manifest.Secret, error) { return nil, text(fault.Unavailable) }
		}, want: reason(fleet.SecretUnknown), local: func(*place) string { return canary }},
		"an artifact is not here": {edit: func(r *manifest.Release) { r.Artifacts["web"] = fleet.DigestOf([]byte("elsewhere")) },
			want: reason(fleet.ArtifactMissing)},
		"the plan is refused": {edit: func(r *manifest.Release) {},
			run: func(a *ailing) { a.apply = func() error { return text(fault.Invalid) } }, want: reason(fleet.IsInvalid)},
		"the disk is full": {run: func(a *ailing) {
			a.apply = func() error { return fault.Because(path, "x", fault.Unavailable, "%s is full", path.Path) }
		}, want: reason(fleet.DiskFull), local: func(*place) string { return canary }},
		"an error without a kind": {run: func(a *ailing) { a.apply = func() error { return errors.New(path.Path) } },
			want: reason(fleet.IsInternal)},
		"the runtime is told to wait": {run: func(a *ailing) { a.apply = func() error { return text(fault.Busy) } }, want: reason(fleet.IsBusy)},
		"the runtime has a new reason": {run: func(a *ailing) {
			a.apply = func() error {
				return fleet.Reason{Kind: canary, Service: canary, Runs: canary}.With(text(fault.Denied))
			}
		}, want: reason(fleet.OtherReason)},
		"a foreign service fails": {run: func(a *ailing) {
			a.apply = func() error {
				return fleet.Reason{Kind: fleet.Exited, Service: canary, Number: 3}.With(text(fault.Unavailable))
			}
		}, want: fleet.Reason{Kind: fleet.Exited, Number: 3}},
		"nothing is granted": {denied: true, want: reason(fleet.NotGranted)},
		"a service is not healthy": {run: func(a *ailing) {
			a.status = []workload.ServiceStatus{{Name: "web", Reason: "it ended: /srv/" + canary,
				Why: fleet.Reason{Kind: fleet.Signalled, Service: "web", Number: 9}}}
		}, after: func(*place) {}, want: fleet.Reason{Kind: fleet.Signalled, Service: "web", Number: 9}, local: func(*place) string { return canary }},
		"a service of which nothing is known": {run: func(a *ailing) { a.status = []workload.ServiceStatus{{Name: "web", Reason: canary}} },
			after: func(*place) {}, want: fleet.Reason{Kind: fleet.Unhealthy, Service: "web"}},
		"an operation can't be started": {run: func(a *ailing) {
			a.exec = func() (workload.ExecResult, error) {
				return workload.ExecResult{},
					path
			}
		},
			after: func(p *place) { p.runs("op-1", operation.Failed) }, want: reason(fleet.DiskFull)},
		"an operation is killed": {run: func(a *ailing) {
			a.exec = func() (workload.ExecResult, error) {
				return workload.ExecResult{Killed: true, Exit: -1, Signal: "killed", Stdout: []byte(canary)}, nil
			}
		}, after: func(p *place) { p.runs("op-1", operation.Failed) }, want: reason(fleet.WasKilled)},
		"an operation is out of time": {run: func(a *ailing) {
			a.exec = func() (workload.ExecResult, error) {
				return workload.ExecResult{TimedOut: true, Exit: -1, Stderr: []byte(canary)}, nil
			}
		}, after: func(p *place) { p.runs("op-1", operation.Failed) }, want: reason(fleet.TimedOut)},
		"an operation that no grant allows": {after: func(p *place) {
			must(p.t, p.o, consent(p.t, grant.Deny{Appliance: "eu-1", Name: canary,
				Cedar: `forbid (principal, action == Action::"operate.read", resource);`, At: start, Nonce: nonce()}, customer))
			take(p.t, p.o, book.Take{Operation: p.o.request(p.t, "op-1")})
		}, want: reason(fleet.NotGranted)},
		"a deny ends what waits": {after: func(p *place) {
			must(p.t, p.o, consent(p.t, granted(fleet.OperateRead, 0), customer))
			take(p.t, p.o, book.Take{Operation: p.o.request(p.t, "op-1")})
			must(p.t, p.o, consent(p.t, grant.Deny{Appliance: "eu-1", Name: canary,
				Cedar: `forbid (principal, action == Action::"operate.read", resource);`, At: start, Nonce: nonce()}, customer))
		}, want: reason(fleet.ConsentRevoked)},
	}
	for name, w := range ways {
		t.Run(name, func(t *testing.T) {
			p := newPlaceIn(t, filepath.Join(t.TempDir(), canary))
			run := &ailing{fakeRun: p.run}
			if w.run != nil {
				w.run(run)
			}
			p.app.SetRuntime(run)
			if w.edit == nil {
				w.edit = none
			}
			p.approved(!w.denied, w.edit)
			p.begin()
			if w.after != nil {
				p.until("it runs", func() bool { return p.o.book.View().Good.ID != "" })
				w.after(p)
			}
			p.until("it is told", func() bool { return slices.Contains(p.crossed(), w.want) })
			if w.local != nil {
				p.until("the customer reads it", func() bool { return strings.Contains(deployReason(p), w.local(p)) })
			}
		})
	}
}

// runs has an operation requested, granted and approved, and waits for its end.
func (p *place) runs(id string, end operation.State) {
	t, o := p.t, p.o
	t.Helper()
	must(t, o, consent(t, granted(fleet.OperateRead, 0), customer))
	if why := take(t, o, book.Take{Operation: o.request(t, id)}); why != "" {
		t.Fatal(why)
	}
	must(t, o, o.approve(t, id))
	p.until("it is over", func() bool { return o.state(t, id) == end })
}

// TestAServiceThatDoesNotStartIsToldByItsKind (FAULTS.md G3, I7): real processes and a folder with a canary. How a service ended, its
// health check and a damaged artifact are told by kind and number; the customer's page has the rest.
func TestAServiceThatDoesNotStartIsToldByItsKind(t *testing.T) {
	listens := "#!/bin/sh\necho /srv/" + canary + " >&2\n"
	for name, w := range map[string]struct {
		files map[string]string // of the artifact of the store
		want  fleet.Reason
		said  string
	}{
		"it exits": {map[string]string{"bin/store": listens + "exit 3\n"},
			fleet.Reason{Kind: fleet.Exited, Service: "store", Number: 3, Runs: fleet.RunsNothing}, "exit status 3"},
		"it dies": {map[string]string{"bin/store": listens + "kill -9 $$\n"},
			fleet.Reason{Kind: fleet.Signalled, Service: "store", Number: 9, Runs: fleet.RunsNothing}, "killed"},
		"its health check fails": {map[string]string{"bin/store": listens + "exec sleep 60\n"},
			fleet.Reason{Kind: fleet.HealthFails, Service: "store", Runs: fleet.RunsNothing}, "health check fails"},
		"its interpreter is none": {map[string]string{"bin/store": "#!/srv/" + canary + "/none\n"},
			fleet.Reason{Kind: fleet.NotStarted, Service: "store", Runs: fleet.RunsNothing}, "can't be started"},
		"its program is none": {map[string]string{"bin/" + canary: "x"},
			fleet.Reason{Kind: fleet.ProgramMissing, Service: "store", Runs: fleet.RunsNothing}, "no file"},
		"its artifact is damaged": {nil, fleet.Reason{Kind: fleet.ArtifactDamaged, Service: "store", Runs: fleet.RunsNothing}, "not a tar"},
	} {
		t.Run(name, func(t *testing.T) {
			p := newPlaceIn(t, filepath.Join(t.TempDir(), canary), real)
			if err := workload.CreateFile(p.cfg.Secrets.Dir, "store-token", []byte(canary)); err != nil {
				t.Fatal(err)
			}
			digest, web := fleet.DigestOf([]byte("store")), p.pack(map[string]string{"bin/web": "#!/bin/sh\n"})
			if w.files != nil {
				digest = p.pack(w.files)
			}
			p.approved(true, func(r *manifest.Release) {
				r.Artifacts["store"], r.Artifacts["web"] = digest, web
				r.Compose = strings.ReplaceAll(r.Compose, "interval: 200ms", "interval: 100ms, retries: 1, start: 2s")
			})
			p.begin()
			p.until("it has failed", func() bool { return p.deployState() == fleet.StateFailed })
			if got := p.o.book.View().Deploy; got.Why != w.want || !strings.Contains(got.Reason, w.said) {
				t.Errorf("%+v", got)
			}
			if got := p.crossed(); !slices.Contains(got, w.want) {
				t.Errorf("the vendor hears %+v", got)
			}
		})
	}
}

// pack makes an artifact and stores it.
func (p *place) pack(files map[string]string) fleet.Digest {
	p.t.Helper()
	dir := p.t.TempDir()
	for name, text := range files {
		if err := errors.Join(os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o700),
			os.WriteFile(filepath.Join(dir, name), []byte(text), 0o700)); err != nil {
			p.t.Fatal(err)
		}
	}
	var b bytes.Buffer
	d, err := artifact.Pack(dir, &b)
	if err != nil {
		p.t.Fatal(err)
	}
	if err := p.app.Store(d, b.Bytes()); err != nil {
		p.t.Fatal(err)
	}
	return d
}

// TestAReleaseThatWaitsIsTold (FAULTS.md G3): to the vendor, until it is approved, and no longer than the customer lets it out.
func TestAReleaseThatWaitsIsTold(t *testing.T) {
	p := newPlace(t)
	p.deployed()
	p.offer("1.1.0", func(*manifest.Release) {})
	d := p.o.book.View().Offers[1].Digest
	waits := book.OfferWaits{Release: d, Why: fleet.Reason{Kind: fleet.NotApproved}}
	var heard []book.OfferWaits
	hears := func(want book.OfferWaits) func() bool {
		return func() bool {
			st := p.o.book.View()
			for _, r := range st.Reports {
				if r.Status != nil {
					heard = append(heard, r.Status.Offer)
				}
			}
			must(t, p.o, book.ReportsDone{Upto: st.ReportsSent()})
			return len(heard) > 0 && heard[len(heard)-1] == want
		}
	}
	p.until("the vendor hears that it waits", hears(waits))
	must(t, p.o, consent(t, granted(fleet.Deploy, 0), customer))
	must(t, p.o, consent(t, p.o.approval(t, ""), customer))
	p.until("and that it waits no more", hears(book.OfferWaits{}))
	must(t, p.o, consent(t, grant.Revoke{Appliance: "eu-1", Phase: fleet.Observe, At: start, Nonce: nonce()}, customer))
	p.offer("1.2.0", func(*manifest.Release) {})
	waits.Release = p.o.book.View().Offers[2].Digest
	p.until("the customer's page has it", func() bool { return p.o.book.View().Status.Offer == waits })
	if hears(waits)() {
		t.Error("the vendor hears of it, though observing is off")
	}
}

// status is the customer's own page.
func (p *place) status() *localv1.StatusResponse {
	p.t.Helper()
	m, err := p.app.Customer().Status(p.t.Context(), connect.NewRequest(&localv1.StatusRequest{}))
	if err != nil {
		p.t.Fatal(err)
	}
	return m.Msg
}

// TestTheCustomersPageSaysWhatWaits (FAULTS.md G3): a release that is not approved, one that is not granted, and consent in
// the last quarter of its life, each with the command that helps; and nothing of it when it is over.
func TestTheCustomersPageSaysWhatWaits(t *testing.T) {
	p := newPlace(t)
	p.deployed()
	if m := p.status(); m.GetWaits() != nil || len(m.GetEndings()) != 0 {
		t.Errorf("at rest: %v, %v", m.GetWaits(), m.GetEndings())
	}
	p.offer("1.1.0", func(*manifest.Release) {})
	d := p.o.book.View().Offers[1].Digest
	if w := p.status().GetWaits(); w.GetVersion() != "1.1.0" || w.GetRelease() != string(d) ||
		w.GetDo() != "demarc review --release "+string(d) || w.GetSinceUnix() == 0 {
		t.Errorf("not approved: %v", w)
	}
	must(t, p.o, consent(t, p.o.approval(t, ""), customer))
	p.until("it waits for a grant", func() bool { return p.deployState() == fleet.StateWaiting })
	if e := p.status().GetEndings(); len(e) != 0 {
		t.Errorf("nothing ends in the first three quarters of its life: %v", e)
	}
	p.pass(50 * time.Minute)
	m := p.status()
	if w := m.GetWaits(); !strings.Contains(w.GetWhy(), "not granted") || w.GetDo() != "demarc grant deploy" {
		t.Errorf("not granted: %v", w)
	}
	if e := m.GetEndings(); len(e) != 1 || !strings.HasPrefix(e[0].GetWhat(), "approval of plan") ||
		e[0].GetAtUnix() != p.o.book.View().Approved.NotAfter.Unix() {
		t.Errorf("its approval is good for an hour: %v", e)
	}
	short := granted(fleet.Deploy, 0)
	short.Until = p.o.now().Add(2 * time.Hour)
	must(t, p.o, consent(t, short, customer))
	p.until("it runs", func() bool { return p.deployState() == fleet.StateDeployed })
	p.pass(90 * time.Minute)
	m = p.status()
	if e := m.GetEndings(); m.GetWaits() != nil || len(e) != 1 || e[0].GetWhat() != "grant of deploy" ||
		e[0].GetDo() != "demarc grant deploy" || e[0].GetAtUnix() != short.Until.Unix() {
		t.Errorf("its grant ends in two hours: %v, %v", m.GetWaits(), e)
	}
	p.pass(3 * time.Hour)
	if e := p.status().GetEndings(); len(e) != 0 {
		t.Errorf("what has ended is about to end: %v", e)
	}
}

// TestTheCustomersPageSaysWhyAServiceDoesNotStart (FAULTS.md G3): with its path and its words, in a state in which the store of secrets
// does not answer, too.
func TestTheCustomersPageSaysWhyAServiceDoesNotStart(t *testing.T) {
	p := newPlace(t)
	run := &ailing{fakeRun: p.run, status: []workload.ServiceStatus{{Name: "web", Restarts: 4, Since: start,
		Reason: "it ended: exit status 3 (/srv/" + canary + ")",
		Why:    fleet.Reason{Kind: fleet.Exited, Service: "web", Number: 3}}}}
	p.app.SetRuntime(run)
	store := &silent{}
	p.app.SetSecrets(func(s workload.Secrets) workload.Secrets { store.Secrets = s; return store })
	p.approved(true, func(*manifest.Release) {})
	p.begin()
	p.until("it is told", func() bool { return p.deployState() == fleet.StateDegraded })
	store.is.Store(true)
	m := p.status()
	if s := m.GetServices(); len(s) != 1 || s[0].GetKind() != "exited" || s[0].GetNumber() != 3 || s[0].GetRestarts() != 4 ||
		s[0].GetSinceUnix() != start.Unix() ||
		!strings.Contains(s[0].GetReason(), "/srv/"+canary) {
		t.Errorf("%v", s)
	}
	if s := m.GetSecrets(); len(s) != 1 || s[0].GetPresent() || !strings.Contains(s[0].GetProblem(), "rights on the folder") {
		t.Errorf("%v", s)
	}
}

// silent is a store of secrets that does not answer from some time on.
type silent struct {
	workload.Secrets
	is atomic.Bool
}

func (s *silent) Present(name string) (bool, error) {
	if s.is.Load() {
		return false, fault.New("x", fault.Unavailable, "look at the rights on the folder")
	}
	return s.Secrets.Present(name)
}
