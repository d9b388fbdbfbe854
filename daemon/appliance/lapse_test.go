// SPDX-License-Identifier: Apache-2.0

package appliance_test

import (
	"context"
	"errors"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/demarc-dev/demarc/daemon/appliance"
	"github.com/demarc-dev/demarc/daemon/appliance/book"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/grant"
	"github.com/demarc-dev/demarc/ledger"
	"github.com/demarc-dev/demarc/operation"
)

// later lets time pass in a book.
func (o *order) later(d time.Duration) { o.past += d }

func edited[T any](v T, edit func(*T)) T { edit(&v); return v }

// offered is a book in which version 1.0.0 runs and the next is offered.
func offered(t *testing.T, version string) *order {
	o := deployed(t)
	take(t, o, book.Take{Release: sealed(t, release(t, version), vendor)})
	return o
}

// TestAPlanApprovalEnds (FAULTS.md A4): an approval of a plan must be carried out before it ends. After that the deploy does not
// begin, whatever it waited for, and one that was interrupted does not continue.
func TestAPlanApprovalEnds(t *testing.T) {
	for name, c := range map[string]struct {
		began bool
		wait  time.Duration
		want  error
	}{
		"in time":                      {false, time.Minute, nil},
		"after its end":                {false, time.Hour, fault.Expired},
		"30 days later":                {false, 30 * 24 * time.Hour, fault.Expired},
		"interrupted, in time":         {true, time.Minute, nil},
		"interrupted, after its end":   {true, time.Hour, fault.Expired},
		"interrupted, after the grant": {true, 30 * time.Minute, fault.Denied},
	} {
		o := offered(t, "1.1.0")
		must(t, o, consent(t, grant.Revoke{Appliance: "eu-1", Phase: fleet.Deploy, At: start, Nonce: nonce()}, customer))
		g := granted(fleet.Deploy, 0)
		if name == "interrupted, after the grant" {
			g.Until = start.Add(20 * time.Minute)
		}
		must(t, o, consent(t, g, customer))
		id := must(t, o, consent(t, o.approval(t, ""), customer)).ID
		if c.began {
			must(t, o, book.BeginDeploy{Approval: id})
		}
		o.later(c.wait)
		before := o.book.View()
		_, err := put(t, o, book.BeginDeploy{Approval: id})
		if !errors.Is(err, c.want) || (err == nil) != (c.want == nil) {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
		if errors.Is(err, fault.Expired) && !strings.Contains(fault.Text(err), "demarc review") {
			t.Errorf("%s: %q does not say what to do", name, fault.Text(err))
		}
		if after := o.book.View(); err != nil && (after.Deploy.State != before.Deploy.State || after.Deploy.Approval != before.Deploy.Approval) {
			t.Errorf("%s: it was refused, and the deployment is %+v", name, after.Deploy)
		}
	}
}

// TestAnOldPlanApprovalNeverCountsAgain (FAULTS.md A5; MUTANTS.md consent.go:207): not after another release was deployed, failed
// or was approved, and not when more approvals came than are remembered.
func TestAnOldPlanApprovalNeverCountsAgain(t *testing.T) {
	o := newBook(t)
	must(t, o, book.Pin{Public: pem(t, customer)})
	must(t, o, consent(t, granted(fleet.Install, 0), customer))
	must(t, o, consent(t, granted(fleet.Deploy, 0), customer))
	var papers []book.Consent
	old := func() {
		t.Helper()
		for i, c := range papers {
			if _, err := put(t, o, c); !errors.Is(err, fault.Conflict) {
				t.Fatalf("approval %d of %d counts again: %v", i, len(papers), err)
			}
		}
	}
	for _, version := range []string{"1.0.0", "1.1.0", "1.2.0"} {
		take(t, o, book.Take{Release: sealed(t, release(t, version), vendor)})
		for _, end := range []fleet.State{"", fleet.StateFailed, fleet.StateDeployed} { // one is never begun, one fails, one runs
			a := edited(o.approval(t, ""), func(a *operation.PlanApproval) { a.NotAfter = start.Add(90 * 24 * time.Hour) })
			papers = append(papers, consent(t, a, customer))
			id := must(t, o, papers[len(papers)-1]).ID
			old()
			if end == "" {
				continue
			}
			must(t, o, book.BeginDeploy{Approval: id})
			old()
			must(t, o, book.EndDeploy{Approval: id, State: end})
			old()
		}
	}
	for range book.MaxCounted + 1 {
		o.later(time.Second)
		must(t, o, consent(t, edited(o.approval(t, ""),
			func(a *operation.PlanApproval) { a.At = o.now(); a.NotAfter = o.now().Add(time.Hour) }), customer))
	}
	if n := len(o.book.View().Counted); n != book.MaxCounted {
		t.Errorf("%d approvals are remembered", n)
	}
	old()
}

// TestADeployEndsWithItsGrants (FAULTS.md A8): what a deploy under way rests on is the grants that it was counted on. Others, that
// have not begun, have ended, or stand beside, keep nothing going.
func TestADeployEndsWithItsGrants(t *testing.T) {
	for name, c := range map[string]struct {
		event func(t *testing.T, o *order, install, deploy string)
		stops bool
	}{
		"nothing": {func(*testing.T, *order, string, string) {}, false},
		"another phase is revoked": {func(t *testing.T, o *order, _, _ string) {
			must(t, o, consent(t, grant.Revoke{Appliance: "eu-1", Phase: fleet.OperateAdmin, At: start, Nonce: nonce()}, customer))
		}, false},
		"deploy is denied": {func(t *testing.T, o *order, _, _ string) {
			must(t, o, consent(t, grant.Deny{Appliance: "eu-1", Name: "stop", Cedar: `forbid (principal, action == Action::"deploy", resource);`,
				At: start, Nonce: nonce()}, customer))
		}, true},
		"install is revoked": {func(t *testing.T, o *order, _, _ string) {
			must(t, o, consent(t, grant.Revoke{Appliance: "eu-1", Phase: fleet.Install, At: start, Nonce: nonce()}, customer))
		}, true},
		"its grant is revoked, another stands": {func(t *testing.T, o *order, _, deploy string) {
			must(t, o, consent(t, granted(fleet.Deploy, 0), customer))
			must(t, o, consent(t, grant.Revoke{Appliance: "eu-1", Grant: deploy, At: start, Nonce: nonce()}, customer))
		}, true},
		"its grant has ended, another has not begun": {func(t *testing.T, o *order, _, _ string) {
			must(t, o, consent(t, edited(granted(fleet.Deploy, 0), func(g *grant.Grant) { g.From = start.Add(48 * time.Hour) }), customer))
			o.later(time.Hour)
		}, true},
		"its grant has ended, another has too": {func(t *testing.T, o *order, _, _ string) {
			must(t, o, consent(t, edited(granted(fleet.Deploy, 0), func(g *grant.Grant) { g.Until = start.Add(31 * time.Minute) }), customer))
			o.later(time.Hour)
		}, true},
	} {
		o := newBook(t)
		must(t, o, book.Pin{Public: pem(t, customer)})
		take(t, o, book.Take{Release: sealed(t, release(t, "1.0.0"), vendor)})
		install := must(t, o, consent(t, granted(fleet.Install, 1), customer)).ID
		deploy := must(t, o, consent(t, edited(granted(fleet.Deploy, 1), func(g *grant.Grant) { g.Until = start.Add(30 * time.Minute) }),
			customer)).ID
		a := edited(o.approval(t, ""), func(a *operation.PlanApproval) { a.NotAfter = start.Add(24 * time.Hour) })
		id := must(t, o, consent(t, a, customer)).ID
		must(t, o, book.BeginDeploy{Approval: id})
		c.event(t, o, install, deploy)
		_, err := put(t, o, book.BeginDeploy{Approval: id}) // begun anew by a process that was started in the middle of it
		if (err != nil) != c.stops || err != nil && !errors.Is(err, fault.Denied) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestWhatOutlastsItsGrantIsNotBegun (FAULTS.md A10): the sample's operation may take ten seconds.
func TestWhatOutlastsItsGrantIsNotBegun(t *testing.T) {
	until := func(d time.Duration) grant.Grant {
		return edited(granted(fleet.OperateRead, 0), func(g *grant.Grant) { g.Until = start.Add(d) })
	}
	o := deployed(t)
	must(t, o, consent(t, until(time.Minute), customer))
	for _, id := range []string{"op-1", "op-2"} {
		if why := take(t, o, book.Take{Operation: o.request(t, id)}); why != "" {
			t.Fatal(why)
		}
		must(t, o, o.approve(t, id))
	}
	if s := must(t, o, book.Start{ID: "op-1"}); s != operation.Running {
		t.Fatal(s)
	}
	o.past = start.Add(51 * time.Second).Sub(o.at(0))
	if s := must(t, o, book.Start{ID: "op-2"}); s != operation.Cancelled {
		t.Fatal(s)
	}
	x, _ := o.book.View().Operation("op-2")
	if !strings.Contains(x.Reason, "may take 10s, and operate.read is granted for 9s more") {
		t.Errorf("%q", x.Reason)
	}
	if why := take(t, o, book.Take{Operation: o.request(t, "op-3")}); !strings.Contains(why, "not begun") {
		t.Errorf("%q", why)
	}
	long := must(t, o, consent(t, edited(until(time.Hour), func(g *grant.Grant) { g.Uses = 1 }), customer)).ID
	if why := take(t, o, book.Take{Operation: o.request(t, "op-4")}); why != "" {
		t.Fatal(why)
	}
	must(t, o, o.approve(t, "op-4"))
	if s := must(t, o, book.Start{ID: "op-4"}); s != operation.Running {
		t.Fatal(s)
	}
	if x, _ := o.book.View().Operation("op-4"); x.Grant != long {
		t.Error("it is counted on the grant that ends before it may")
	}
}

// TestARunningOperationEndsWithItsOwnGrant: that another grant stands beside keeps nothing running whose own was revoked.
func TestARunningOperationEndsWithItsOwnGrant(t *testing.T) {
	o := deployed(t)
	own := must(t, o, consent(t, granted(fleet.OperateRead, 0), customer)).ID
	take(t, o, book.Take{Operation: o.request(t, "op-1")})
	must(t, o, o.approve(t, "op-1"))
	must(t, o, book.Start{ID: "op-1"})
	beside := must(t, o, consent(t, granted(fleet.OperateRead, 0), customer)).ID
	if done := must(t, o, consent(t, grant.Revoke{Appliance: "eu-1", Grant: beside, At: start, Nonce: nonce()},
		customer)); len(done.Stopped) != 0 {
		t.Fatalf("%+v", done)
	}
	must(t, o, consent(t, granted(fleet.OperateRead, 0), customer))
	if done := must(t, o, consent(t, grant.Revoke{Appliance: "eu-1", Grant: own, At: start, Nonce: nonce()},
		customer)); len(done.Stopped) != 1 || o.state(t, "op-1") != operation.Cancelled {
		t.Fatalf("%+v, %s", done, o.state(t, "op-1"))
	}
}

// TestAnActIsEndedInTime (FAULTS.md A10): the end of a grant ends the context of what was counted on it, by the host's clock and by
// the monotonic clock, whichever comes first.
func TestAnActIsEndedInTime(t *testing.T) {
	for name, c := range map[string]struct {
		step time.Duration // of the host's clock, after ten minutes
		want time.Duration
	}{
		"the clock goes on":        {0, time.Hour},
		"the clock is set back":    {-10 * time.Hour, time.Hour},
		"the clock is set ahead":   {10 * time.Hour, 10*time.Minute + time.Second},
		"the clock goes on a bit":  {40 * time.Minute, 20 * time.Minute},
		"it is set back by a year": {-365 * 24 * time.Hour, time.Hour},
	} {
		synctest.Test(t, func(t *testing.T) {
			o := newBook(t)
			o.still = true
			must(t, o, book.Pin{Public: pem(t, customer)})
			id := must(t, o, consent(t, grant.Grant{Appliance: "eu-1", Phase: fleet.OperateRead, From: start.Add(-time.Minute),
				Until: start.Add(time.Hour), Nonce: nonce()}, customer)).ID
			var step atomic.Int64 // nanoseconds
			began := time.Now()
			a := appliance.Bare(o.book, nil, func() time.Time { return start.Add(time.Since(began) + time.Duration(step.Load())) })
			ctx, stop := a.While(t.Context(), []string{id}, func(now time.Time) error {
				for _, h := range o.book.View().Grants.Held {
					if !now.Before(h.Grant.Until) {
						return fault.New("test", fault.Expired, "ended")
					}
				}
				return nil
			})
			defer stop()
			time.Sleep(10*time.Minute - time.Millisecond)
			step.Store(int64(c.step))
			<-ctx.Done()
			if took := time.Since(began); took > c.want || took < c.want-time.Second || fault.Of(context.Cause(ctx)) != fault.Expired {
				t.Errorf("%s: after %s, want %s: %v", name, took, c.want, context.Cause(ctx))
			}
		})
	}
}

// TestWhatIsCarriedOutIsWhatWasApproved (MUTANTS.md acts.go:40, deploy.go:82): a build that compiles a release to another plan than
// the one that was approved neither deploys it nor keeps it running.
func TestWhatIsCarriedOutIsWhatWasApproved(t *testing.T) {
	o := offered(t, "1.1.0")
	id := must(t, o, consent(t, o.approval(t, ""), customer)).ID
	st := o.book.View()
	m := ledger.Meta{At: o.now(), By: fleet.Local, Request: "r"}
	if _, err := (book.BeginDeploy{Approval: id}).Apply(&st, m); err != nil {
		t.Fatal(err)
	}
	st = o.book.View()
	st.Approved.Plan = fleet.DigestOf([]byte("another plan"))
	if _, err := (book.BeginDeploy{Approval: id}).Apply(&st, m); !errors.Is(err, fault.Conflict) || st.Deploy.Approval == id {
		t.Errorf("%v, %+v", err, st.Deploy)
	}
	st = o.book.View()
	run := newFakeRun()
	if err := appliance.Bare(o.book, run, o.now).Hold(t.Context(), st); err != nil || len(run.plans()) != 1 {
		t.Fatalf("%v, %d plans", err, len(run.plans()))
	}
	st.Good.Plan, st.Deploy.Approval = fleet.DigestOf([]byte("another plan")), "a newer one"
	run = newFakeRun()
	if err := appliance.Bare(o.book, run, o.now).Hold(t.Context(), st); err == nil || len(run.plans()) != 0 {
		t.Errorf("%v, %d plans", err, len(run.plans()))
	}
}
