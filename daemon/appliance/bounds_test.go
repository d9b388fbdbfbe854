// SPDX-License-Identifier: Apache-2.0

package appliance_test

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"connectrpc.com/connect"

	boundaryv1 "github.com/demarc-dev/demarc/api/boundary/v1"
	localv1 "github.com/demarc-dev/demarc/api/local/v1"
	"github.com/demarc-dev/demarc/audit"
	"github.com/demarc-dev/demarc/daemon/appliance"
	"github.com/demarc-dev/demarc/daemon/appliance/book"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/grant"
	"github.com/demarc-dev/demarc/manifest"
	"github.com/demarc-dev/demarc/operation"
	"github.com/demarc-dev/demarc/workload"
)

// idle is a runtime in which everything is well, and operations run until they are ended.
type idle struct {
	mu      sync.Mutex
	applied int
	began   chan string
	ended   chan string
}

func newIdle() *idle { return &idle{began: make(chan string, 256), ended: make(chan string, 256)} }

func (*idle) Missing(manifest.Plan) ([]manifest.Secret, error) { return nil, nil }
func (r *idle) Apply(context.Context, manifest.Plan) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.applied++
	return nil
}
func (*idle) Status() workload.Status         { return workload.Status{} }
func (*idle) Changed() <-chan struct{}        { return nil }
func (*idle) Addr(string, int) (string, bool) { return "", false }
func (*idle) Close(context.Context) error     { return nil }
func (r *idle) Exec(ctx context.Context, service string, _ []string, _ workload.Limits) (workload.ExecResult, error) {
	r.began <- service
	<-ctx.Done()
	r.ended <- service
	return workload.ExecResult{Killed: true}, nil
}

func (r *idle) plans() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.applied
}

// begin has the appliance's loops run until the test ends.
func begin(t *testing.T, a *appliance.Appliance, loops ...string) {
	t.Helper()
	ctx, stop := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	for _, name := range loops {
		wg.Go(func() {
			if err := a.Loops()[name](ctx, func() {}); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		})
	}
	t.Cleanup(func() { stop(); wg.Wait() })
}

// whole is an appliance whose customer pinned a key, with release 1.0.0 and its artifacts on offer.
func whole(t *testing.T, run appliance.Runtime) (*appliance.Appliance, *order) {
	t.Helper()
	a := appliance.Alone(t, t.TempDir(), run, time.Now)
	o := &order{book: a.Book(), to: a, clock: time.Now}
	must(t, o, book.SetSite{Site: fileOf(t)})
	must(t, o, book.Pin{Public: pem(t, customer)})
	offer(t, a, o, "1.0.0")
	return a, o
}

func offer(t *testing.T, a *appliance.Appliance, o *order, version string) {
	t.Helper()
	rel := release(t, version)
	for _, text := range []string{"web" + version, "store"} {
		if _, err := a.Artifacts().Put(t.Context(), fleet.DigestOf([]byte(text)), strings.NewReader(text)); err != nil {
			t.Fatal(err)
		}
	}
	if why := take(t, o, book.Take{Release: sealed(t, rel, vendor)}); why != "" {
		t.Fatal(why)
	}
}

// TestALastingRefusalIsOneEntry: FAULTS.md C4. In each state in which what was approved may not begin, the refusal was an
// entry, the entry woke the loop, and the loop tried again. At rest there is no entry in ten minutes, and the deploy begins
// when the grant comes.
func TestALastingRefusalIsOneEntry(t *testing.T) {
	now := time.Now
	give := func(t *testing.T, o *order, p fleet.Phase, edit func(*grant.Grant)) string {
		g := grant.Grant{Appliance: "eu-1", Phase: p, From: now().Add(-time.Minute), Until: now().Add(30 * 24 * time.Hour), Nonce: nonce()}
		if edit != nil {
			edit(&g)
		}
		return must(t, o, consent(t, g, customer)).ID
	}
	both := func(t *testing.T, o *order, edit func(*grant.Grant)) {
		give(t, o, fleet.Install, edit)
		give(t, o, fleet.Deploy, edit)
	}
	for name, before := range map[string]func(t *testing.T, o *order){
		"nothing granted": func(*testing.T, *order) {},
		"install only":    func(t *testing.T, o *order) { give(t, o, fleet.Install, nil) },
		"not begun":       func(t *testing.T, o *order) { both(t, o, func(g *grant.Grant) { g.From = now().Add(24 * time.Hour) }) },
		"ended": func(t *testing.T, o *order) {
			both(t, o, func(g *grant.Grant) { g.Until = now().Add(time.Second) })
			time.Sleep(time.Minute)
		},
		"revoked": func(t *testing.T, o *order) {
			both(t, o, nil)
			must(t, o, consent(t, grant.Revoke{Appliance: "eu-1", All: true, At: now(), Nonce: nonce()}, customer))
		},
		"denied": func(t *testing.T, o *order) {
			both(t, o, nil)
			must(t, o, consent(t, grant.Deny{Appliance: "eu-1", Name: "none", Cedar: `forbid (principal, action == Action::"deploy", resource);`,
				At: now(), Nonce: nonce()}, customer))
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				run := newIdle()
				a, o := whole(t, run)
				before(t, o)
				must(t, o, consent(t, o.approval(t, ""), customer))
				begin(t, a, "deploy", "operations", "witness")
				time.Sleep(30 * time.Second)
				if d := a.Book().View().Deploy; d.State != fleet.StateWaiting || d.Reason == "" {
					t.Fatalf("the deployment is %q: %q", d.State, d.Reason)
				}
				size := a.Book().Log().Size()
				time.Sleep(3 * time.Minute)
				if got := a.Book().Log().Size() - size; got != 0 {
					t.Errorf("%d entries in three minutes at rest", got)
				}
				if run.plans() != 0 {
					t.Error("it was deployed")
				}
				if name == "denied" {
					must(t, o, consent(t, grant.Lift{Appliance: "eu-1", Deny: a.Book().View().Grants.Denies[0].ID, At: now(), Nonce: nonce()}, customer))
				} else {
					both(t, o, nil)
				}
				synctest.Wait()
				if d := a.Book().View().Deploy; d.State != fleet.StateDeployed || run.plans() != 1 {
					t.Errorf("with a grant it is %q: %q, %d plans", d.State, d.Reason, run.plans())
				}
			})
		})
	}
}

// TestASpentGrantIsOneEntry: FAULTS.md C4, the next release after a grant of one use.
func TestASpentGrantIsOneEntry(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, o := whole(t, newIdle())
		for _, p := range []fleet.Phase{fleet.Install, fleet.Deploy} {
			must(t, o, consent(t, grant.Grant{Appliance: "eu-1", Phase: p, From: time.Now(), Until: time.Now().Add(24 * time.Hour), Uses: 1,
				Nonce: nonce()}, customer))
		}
		must(t, o, consent(t, o.approval(t, ""), customer))
		begin(t, a, "deploy", "witness")
		time.Sleep(time.Minute)
		offer(t, a, o, "1.1.0")
		must(t, o, consent(t, o.approval(t, ""), customer))
		time.Sleep(30 * time.Second)
		size := a.Book().Log().Size()
		time.Sleep(3 * time.Minute)
		if s := a.Book().View(); s.Deploy.State != fleet.StateWaiting || a.Book().Log().Size() != size {
			t.Errorf("%+v, %d entries", s.Deploy, a.Book().Log().Size()-size)
		}
	})
}

// TestAPlanThatIsKeptIsTheReleases: a plan that is remembered is that of its release, however many were asked for.
func TestAPlanThatIsKeptIsTheReleases(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, o := whole(t, newIdle())
		for i := range 12 {
			offer(t, a, o, fmt.Sprintf("1.%d.0", i+1))
		}
		st, seen := a.Book().View(), map[fleet.Digest]bool{}
		for range 2 {
			for _, x := range st.Offers {
				got := a.PlanOf(x.Digest).Digest()
				compiled, _, _, err := st.Plan(x.Digest)
				if err != nil {
					t.Fatal(err)
				}
				if want := compiled.Digest(); got != want {
					t.Errorf("release %s %s: plan %s, want %s", x.App, x.Version, got.Short(), want.Short())
				}
				seen[got] = true
			}
		}
		if len(seen) < 12 {
			t.Errorf("%d plans of %d releases", len(seen), len(st.Offers))
		}
	})
}

// TestAVendorCausesNoEntriesWithoutEnd: FAULTS.md C4, the loops of the channel. What the vendor repeats without end, an
// acknowledgement of what was never sent, an order out of sequence, one that was taken before, is not an entry each time.
func TestAVendorCausesNoEntriesWithoutEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, o := whole(t, newIdle())
		size := a.Book().Log().Size()
		for i := range 2_000 {
			if err := a.Acked(t.Context(), uint64(1000+i)); fault.Of(err) != fault.Conflict {
				t.Fatalf("an acknowledgement of what was never sent: %v", err)
			}
			if _, err := a.TakeOrder(t.Context(), &boundaryv1.Order{Number: uint64(1000 + i),
				Body: &boundaryv1.Order_Release{Release: make([]byte, 1000)}}); fault.Of(err) != fault.Conflict {
				t.Fatalf("a gap: %v", err)
			}
			if done, err := a.TakeOrder(t.Context(), &boundaryv1.Order{Number: 1, Body: &boundaryv1.Order_Cancel{Cancel: "x"}}); err != nil ||
				done != o.sent {
				t.Fatalf("an order of before: %d, %v", done, err)
			}
		}
		if got := a.Book().Log().Size() - size; got > 40 {
			t.Errorf("%d entries", got)
		}
	})
}

// running starts an operation, which runs until it is ended.
func running(t *testing.T, a *appliance.Appliance, o *order, run *idle, id string) {
	t.Helper()
	if why := take(t, o, book.Take{Operation: o.request(t, id)}); why != "" {
		t.Fatal(why)
	}
	must(t, o, o.approve(t, id))
	<-run.began
	if o.state(t, id) != operation.Running {
		t.Fatalf("%s is %s", id, o.state(t, id))
	}
}

// TestTheCustomersWordHasRoom: FAULTS.md A1. 20,000 probe orders whose echoes the vendor never acknowledges, and as many of
// everything else that makes reports, leave room for what the customer decides and for how operations end.
func TestTheCustomersWordHasRoom(t *testing.T) {
	run := newIdle()
	a, o := whole(t, run)
	for _, p := range []fleet.Phase{fleet.Install, fleet.Deploy, fleet.OperateRead} {
		must(t, o, consent(t, grant.Grant{Appliance: "eu-1", Phase: p, From: time.Now().Add(-time.Minute),
			Until: time.Now().Add(24 * time.Hour), Nonce: nonce()}, customer))
	}
	id := must(t, o, consent(t, o.approval(t, ""), customer)).ID
	must(t, o, book.BeginDeploy{Approval: id})
	must(t, o, book.EndDeploy{Approval: id, State: fleet.StateDeployed})
	begin(t, a, "operations")
	for _, op := range []string{"op-1", "op-2", "op-3", "op-4"} {
		running(t, a, o, run, op)
	}
	refused := 0
	mem := &order{book: a.Book(), to: a, clock: time.Now, n: 1 << 20, sent: o.sent}
	for i := range 6_000 {
		// The foreseen way of the channel is in other tests: here are as many as possible in little time.
		if take(t, mem, book.Take{Probe: &book.ProbeIndex{ID: "p", Index: uint64(i)}}) != "" {
			refused++
		}
		if i%20 == 0 {
			must(t, mem, book.Observe{Status: book.Status{Services: []book.ServiceHealth{{Name: "web", Restarts: uint32(i)}}}})
			must(t, mem, book.EndDeploy{Approval: id, State: fleet.StateDegraded, Why: fleet.Reason{Kind: fleet.Exited, Number: int32(i)}})
			take(t, mem, book.Take{Witnessed: []byte("note")})
			take(t, mem, book.Take{Operation: []byte("nonsense")})
		}
	}
	if refused != 6_000-book.MaxEchoes {
		t.Errorf("%d probes were refused, want %d", refused, 6_000-book.MaxEchoes)
	}
	call := func(doc book.Consent) {
		t.Helper()
		if _, err := a.Customer().Submit(t.Context(), connect.NewRequest(&localv1.SubmitRequest{Document: doc.Document})); err != nil {
			t.Fatalf("the customer's word: %v", err)
		}
	}
	op1, err := a.Book().View().Operation("op-1")
	if err != nil {
		t.Fatal(err)
	}
	call(consent(t, operation.Cancel{ID: "op-1", Appliance: "eu-1", Request: fleet.DigestOf(op1.Request), At: time.Now(), Nonce: nonce()},
		customer))
	<-run.ended
	call(consent(t, grant.Deny{Appliance: "eu-1", Name: "none",
		Cedar: `forbid (principal, action, resource) when { context.operation == "nothing" };`, At: time.Now(), Nonce: nonce()}, customer))
	must(t, mem, book.Finish{ID: "op-2", Result: []byte("result"), Output: []byte("x")})
	call(consent(t, grant.Revoke{Appliance: "eu-1", All: true, At: time.Now(), Nonce: nonce()}, customer))
	<-run.ended
	<-run.ended
	for op, want := range map[string]operation.State{"op-1": operation.Cancelled, "op-2": operation.Held, "op-3": operation.Cancelled,
		"op-4": operation.Cancelled} {
		if got := o.state(t, op); got != want {
			t.Errorf("%s is %s, want %s", op, got, want)
		}
	}
	s := a.Book().View()
	if n := len(s.Reports); n > book.MaxEchoes+book.MaxDeployEdges+book.MaxHeads+100 {
		t.Errorf("%d reports wait", n)
	}
	if got := s.Reports[len(s.Reports)-1]; got.Operation == nil {
		t.Errorf("the last report is %+v", got)
	}
}

// TestTheNewestIsToldAtLast: FAULTS.md A1. Reports that were held back are told when there is room: the newest.
func TestTheNewestIsToldAtLast(t *testing.T) {
	o := deployed(t)
	id := o.book.View().Good.ID
	for i := range 2 * book.MaxDeployEdges {
		must(t, o, book.Observe{Status: book.Status{Services: []book.ServiceHealth{{Name: "web", Restarts: uint32(i)}}}})
		must(t, o, book.EndDeploy{Approval: id, State: fleet.StateDegraded, Why: fleet.Reason{Kind: fleet.Exited, Number: int32(i)}})
	}
	before := o.book.View().ReportsSent()
	must(t, o, book.ReportsDone{Upto: before})
	var restarts uint32
	var reason int32
	for _, r := range o.book.View().Reports {
		if r.Status != nil {
			restarts = r.Status.Services[0].Restarts
		}
		if r.Deploy != nil {
			reason = r.Deploy.Why.Number
		}
	}
	if n := len(o.book.View().Reports); n != 2 || restarts != 2*book.MaxDeployEdges-1 || reason != 2*book.MaxDeployEdges-1 {
		t.Errorf("%d reports, %d restarts, %d", n, restarts, reason)
	}
	must(t, o, book.ReportsDone{Upto: before + 2})
	if n := len(o.book.View().Reports); n != 0 {
		t.Errorf("%d reports at rest", n)
	}
	must(t, o, book.Observe{Status: book.Status{Posture: fleet.Public}})
	must(t, o, book.Observe{Status: book.Status{Posture: fleet.Closed}})
	must(t, o, consent(t, grant.Revoke{Appliance: "eu-1", Phase: fleet.Observe, At: start, Nonce: nonce()}, customer))
	must(t, o, book.ReportsDone{Upto: before + 3})
	if n := len(o.book.View().Reports); n != 0 {
		t.Error("what was held back was told after observing was switched off")
	}
}

// TestHeldOperationsHoldUpNothing: FAULTS.md A14. The order after the last one that there is room for is refused on record,
// and what lies behind it continues.
func TestHeldOperationsHoldUpNothing(t *testing.T) {
	o := deployed(t)
	must(t, o, consent(t, granted(fleet.OperateRead, 0), customer))
	for i := range book.MaxHeld {
		id := fmt.Sprintf("op-%d", i)
		if why := take(t, o, book.Take{Operation: o.request(t, id)}); why != "" {
			t.Fatal(why)
		}
		must(t, o, o.approve(t, id))
		must(t, o, book.Start{ID: id})
		must(t, o, book.Finish{ID: id, Result: sealed(t, operation.Result{ID: id, Appliance: "eu-1", State: operation.Held, Started: o.now(),
			Ended: o.now()}, thief), Output: []byte("x")})
	}
	why := take(t, o, book.Take{Operation: o.request(t, "one-more")})
	if !strings.Contains(why, "64") || o.book.View().OrdersDone != o.sent {
		t.Fatalf("%q, %d of %d orders", why, o.book.View().OrdersDone, o.sent)
	}
	if why := take(t, o, book.Take{Probe: &book.ProbeIndex{ID: "p", Index: 1}}); why != "" {
		t.Errorf("what lies behind it: %s", why)
	}
	x, err := o.book.View().Operation("op-7")
	if err != nil {
		t.Fatal(err)
	}
	must(t, o, consent(t, operation.Release{ID: "op-7", Appliance: "eu-1", Result: fleet.DigestOf(x.Result),
		Decision: operation.DecisionWithhold, At: o.now(), Nonce: nonce()}, customer))
	if why := take(t, o, book.Take{Operation: o.request(t, "one-more")}); why != "" {
		t.Errorf("when one is withheld: %s", why)
	}
	for i := range book.MaxActive {
		why = take(t, o, book.Take{Operation: o.request(t, fmt.Sprintf("waits-%d", i))})
	}
	if !strings.Contains(why, fmt.Sprint(book.MaxActive)) {
		t.Errorf("operations that wait for the customer have no bound: %q", why)
	}
}

// TestRefusedOrdersCostLittle: FAULTS.md C1 and C3. Whatever is in an order of which nothing comes, the book keeps its digest
// and its size; the evidence can be exported and verified, and the book opens again.
func TestRefusedOrdersCostLittle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := t.TempDir()
		a := appliance.Alone(t, dir, newIdle(), time.Now)
		o := &order{book: a.Book(), to: a, clock: time.Now}
		must(t, o, book.SetSite{Site: fileOf(t)})
		long := strings.Repeat("x", 7<<20)
		bodies := []*boundaryv1.Order{
			{Body: &boundaryv1.Order_Cancel{Cancel: long}},
			{Body: &boundaryv1.Order_Cancel{Cancel: strings.Repeat("\xff", 7<<20)}},
			{Body: &boundaryv1.Order_Release{Release: []byte(long)}},
			{Body: &boundaryv1.Order_Release{Release: sealed(t, manifest.Release{App: "x", Compose: long[:500_000]}, thief)}},
			{Body: &boundaryv1.Order_Operation{Operation: []byte(long)}},
			{Body: &boundaryv1.Order_Operation{Operation: sealed(t, operation.Request{ID: "op-1", Reason: long[:500_000]}, thief)}},
			{Body: &boundaryv1.Order_Probe{Probe: &boundaryv1.ProbeOrder{Id: long}}},
			{Body: &boundaryv1.Order_Cosigned{Cosigned: []byte(long)}},
			{Body: &boundaryv1.Order_Checkpoint{Checkpoint: &boundaryv1.Checkpoint{Note: []byte(long), Proof: [][]byte{[]byte(long)}}}},
			{},
		}
		for i := range 30 {
			b := bodies[i%len(bodies)]
			b.Number = uint64(i + 1)
			if done, err := a.TakeOrder(t.Context(), b); err != nil || done != b.Number {
				t.Fatalf("order %d: %d, %v", b.Number, done, err)
			}
		}
		if info, err := os.Stat(filepath.Join(dir, "book")); err != nil || info.Size() > 256<<10 {
			t.Errorf("the book has %d bytes: %v", info.Size(), err)
		}
		st, log := a.Book().Both()
		for i := range log.Size() {
			if _, err := audit.ParseEntry(log.Entry(i)); err != nil {
				t.Errorf("entry %d: %v", i, err)
			}
		}
		if x, err := st.Operation("op-1"); err != nil || x.State != operation.Rejected || x.Request != nil || x.Left == nil ||
			x.Left.Size < 500_000 {
			t.Errorf("the refused operation: %+v, %v", x.Left, err)
		}
		again := appliance.Alone(t, dir, newIdle(), time.Now)
		if again.Book().Log().Root() != log.Root() {
			t.Error("the book opens as another one")
		}
	})
}

// TestRefusedOrdersHaveARate: FAULTS.md C3. However fast the vendor sends what is refused, the book grows slowly.
func TestRefusedOrdersHaveARate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, o := whole(t, newIdle())
		size := a.Book().Log().Size()
		ctx, stop := context.WithTimeout(t.Context(), 10*time.Minute)
		defer stop()
		for n := o.sent + 1; ctx.Err() == nil; n++ {
			if _, err := a.TakeOrder(ctx, &boundaryv1.Order{Number: n, Body: &boundaryv1.Order_Release{Release: bytes.Repeat([]byte{1},
				1000)}}); err != nil {
				break
			}
			if n > 1<<20 {
				t.Fatal("no end")
			}
		}
		// 1 KiB a second and 4 MiB at once, each entry counted with 512 bytes and more.
		if got := a.Book().Log().Size() - size; got < 1000 || got > 10_000 {
			t.Errorf("%d refused orders are on record after ten minutes", got)
		}
	})
}
