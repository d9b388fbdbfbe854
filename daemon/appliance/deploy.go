// SPDX-License-Identifier: Apache-2.0

package appliance

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"connectrpc.com/connect"

	"github.com/demarc-dev/demarc/api"
	boundaryv1 "github.com/demarc-dev/demarc/api/boundary/v1"
	"github.com/demarc-dev/demarc/daemon/appliance/book"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/manifest"
	"github.com/demarc-dev/demarc/workload"
)

// lookEvery is how often the world is looked at that gives no word of its own: the store of secrets.
const lookEvery = 500 * time.Millisecond

// reconcile makes what runs equal to what the customer approved. It is level-triggered: each round looks at the book and
// at the world, and does the one next thing.
func (a *Appliance) reconcile(ctx context.Context, ready func()) error {
	ready()
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	r := &rounds{a: a}
	for ctx.Err() == nil {
		changed, moved := a.book.Changed(), a.run.Changed()
		if err := r.round(ctx); a.book.Reportable(ctx, err) {
			a.log.Error("the deployment can't go on for now", "err", err)
		}
		if err := a.observe(ctx); a.book.Reportable(ctx, err) {
			a.log.Error("the status is not on record", "err", err)
		}
		if err := a.followDoors(ctx); err != nil && ctx.Err() == nil {
			a.log.Warn("the doors are not as the posture wants them", "err", err)
		}
		select {
		case <-ctx.Done():
		case <-changed:
		case <-moved:
		case <-tick.C:
		}
	}
	return nil
}

// rounds remembers what this process has done.
type rounds struct {
	a       *Appliance
	applied string // id of the approval whose plan the runtime has
	brought fetching
	refused struct { // when it was last seen that the deploy may not begin
		approval string
		index    uint64 // of the book
		until    time.Time
	}
}

// grantEvery is how often it is looked whether a grant begins that was given before: what changes in the book is seen at once.
const grantEvery = 5 * time.Second

// How long a download that failed is left alone: doubling, and shorter where there is a new channel.
const (
	fetchMin = time.Second
	fetchMax = time.Minute
)

// fetching is the last download that failed.
type fetching struct {
	approval string
	over     *link // the channel that it was tried with
	err      error
	wait     time.Duration
	until    time.Time
}

// bring downloads what a release needs. After a failure it answers with that failure for a while.
func (r *rounds) bring(ctx context.Context, approval string, rel manifest.Release) error {
	last, l := r.brought, r.a.link.Load()
	again := last.err != nil && last.approval == approval
	if again && (l == nil || l == last.over && time.Now().Before(last.until)) {
		return last.err
	}
	err := r.a.fetchAll(ctx, rel)
	if err == nil || ctx.Err() != nil {
		r.brought = fetching{}
		return err
	}
	wait := fetchMin
	if again {
		wait = min(2*last.wait, fetchMax)
	}
	r.brought = fetching{approval, l, err, wait, time.Now().Add(wait)}
	return err
}

func (r *rounds) round(ctx context.Context) error {
	st := r.a.book.View()
	next := st.Approved
	failed := st.Deploy.Approval == next.ID && st.Deploy.State == fleet.StateFailed
	if next.ID == "" || next.ID == st.Good.ID || failed {
		return r.hold(ctx, st)
	}
	return r.advance(ctx, st, next)
}

// hold keeps the last good plan running: after a restart of this process, and while a newer one can't be deployed. It
// needs no grant: the customer approved it, and the application does not need the vendor.
func (r *rounds) hold(ctx context.Context, st book.State) error {
	if st.Good.ID == "" {
		return nil
	}
	if r.applied != st.Good.ID {
		if err := r.again(ctx, st); err != nil {
			if ctx.Err() != nil || st.Deploy.Approval != st.Good.ID {
				return err
			}
			return errors.Join(err, r.tell(ctx, st.Good.ID, fleet.StateDegraded, book.GroundsOf(err)))
		}
		r.applied = st.Good.ID
	}
	if st.Deploy.Approval != st.Good.ID {
		return nil // a newer one failed: that is what is to be told
	}
	for _, s := range r.a.run.Status().Services {
		if !s.Healthy {
			return r.tell(ctx, st.Good.ID, fleet.StateDegraded, book.Grounds{Why: unhealthy(s),
				Sentence: fmt.Sprintf("service %s is not healthy: %s", s.Name, s.Reason)})
		}
	}
	return r.tell(ctx, st.Good.ID, fleet.StateDeployed, book.Grounds{})
}

// again has the last good plan run, as after a restart.
func (r *rounds) again(ctx context.Context, st book.State) error {
	plan, _, _, err := r.a.plans.Plan(st, st.Good.Release)
	if err != nil {
		return err
	}
	if plan.Digest() != st.Good.Plan {
		return book.PlanChanged.With(fault.New("appliance.hold", fault.Internal,
			"this build compiles release %s to another plan than the one that was approved: approve it again", st.Good.Release.Short()))
	}
	return r.a.run.Apply(ctx, plan)
}

// advance does the next step towards an approved plan.
func (r *rounds) advance(ctx context.Context, st book.State, next book.Approved) error {
	if d := r.refused; d.approval == next.ID && d.index == r.a.book.Index() && time.Now().Before(d.until) &&
		r.a.book.Now().Before(next.NotAfter) {
		return nil
	}
	if st.Deploy.Approval != next.ID || st.Deploy.State != fleet.StateDeploying { // what runs goes on until this one begins
		if err := r.keepGood(ctx, st); err != nil {
			return err
		}
	}
	if !r.a.book.Now().Before(next.NotAfter) {
		return r.begin(ctx, st, next) // refused there, on record: it waits for nothing any more
	}
	plan, rel, _, err := r.a.plans.Plan(st, next.Release)
	if err != nil {
		return r.tell(ctx, next.ID, fleet.StateWaiting, book.GroundsOf(err))
	}
	if err := r.bring(ctx, next.ID, rel); err != nil {
		return r.tell(ctx, next.ID, fleet.StateWaiting, book.GroundsOf(err))
	}
	missing, err := r.a.run.Missing(plan)
	if err != nil {
		return r.tell(ctx, next.ID, fleet.StateWaiting, book.Grounds{Why: fleet.Reason{Kind: fleet.SecretUnknown}, Sentence: fault.Text(err)})
	}
	if len(missing) > 0 {
		why := fleet.Reason{Kind: fleet.SecretMissing, Secret: missing[0].Name, Number: int32(len(missing))}
		return r.tell(ctx, next.ID, fleet.StateWaiting, book.Grounds{Why: why, Sentence: r.a.missingSentence(missing)})
	}
	if err := r.begin(ctx, st, next); err != nil {
		return err
	}
	if now := r.a.book.View(); now.Approved.ID != next.ID || now.Deploy.Approval != next.ID || now.Deploy.State != fleet.StateDeploying {
		return nil // refused, and told
	}
	err = r.apply(ctx, plan)
	if ctx.Err() != nil {
		return nil
	}
	r.applied = ""
	if err != nil {
		r.a.log.Warn("a deploy failed", "version", rel.Version, "err", err)
		return r.tell(ctx, next.ID, fleet.StateFailed, book.GroundsOf(err))
	}
	r.applied = next.ID
	return r.tell(ctx, next.ID, fleet.StateDeployed, book.Grounds{})
}

// begin asks the book whether a deploy may begin, and tells why it may not. What a grant could still allow waits; an approval
// that has ended, and a deploy that was interrupted and whose consent has ended since, have failed. Why it may not is on record
// once, as the reason for that. The refusal itself is not: it would wake this loop, which would ask again.
func (r *rounds) begin(ctx context.Context, st book.State, next book.Approved) error {
	index := r.a.book.Index()
	_, err := book.DryRun(r.a.book, book.BeginDeploy{Approval: next.ID})
	if err == nil {
		_, err = book.Submit(ctx, r.a.book, book.BeginDeploy{Approval: next.ID})
	}
	interrupted := st.Deploy.Approval == next.ID && st.Deploy.State == fleet.StateDeploying
	why := book.Grounds{Why: fleet.ReasonOf(err), Sentence: fault.Text(err)}
	if _, now := (book.BeginDeploy{Approval: next.ID}).Apply(&st, r.a.book.Meta("")); now != nil { // an answer of the book has no reason
		why.Why = fleet.ReasonOf(now)
	}
	switch kind := fault.Of(err); {
	case err == nil:
		return nil
	case kind == fault.Expired || kind == fault.Denied && interrupted:
		return r.tell(ctx, next.ID, fleet.StateFailed, why)
	case kind == fault.Denied || kind == fault.Conflict || kind == fault.NotFound:
		r.refused.approval, r.refused.index, r.refused.until = next.ID, index, time.Now().Add(grantEvery)
		return r.tell(ctx, next.ID, fleet.StateWaiting, why)
	}
	return err
}

func (r *rounds) keepGood(ctx context.Context, st book.State) error {
	if st.Good.ID == "" || r.applied == st.Good.ID {
		return nil
	}
	plan, _, _, err := r.a.plans.Plan(st, st.Good.Release)
	if err == nil {
		err = r.a.run.Apply(ctx, plan)
	}
	if err == nil {
		r.applied = st.Good.ID
	}
	return err
}

// apply runs the plan, and stops at once if the consent ends in the middle of it: taken back, forbidden, or at its own end.
func (r *rounds) apply(ctx context.Context, plan manifest.Plan) error {
	st := r.a.book.View()
	ctx, stop := r.a.while(ctx, st.Approved.Grants, func(now time.Time) error {
		if why := r.a.book.View().DeployEnds(now); why != "" {
			return book.ConsentEnded.With(fault.New("appliance.apply", fault.Denied, "%s", why))
		}
		return nil
	})
	defer stop()
	err := r.a.run.Apply(ctx, plan)
	if cause := context.Cause(ctx); err != nil && fault.Of(cause) == fault.Denied {
		return cause
	}
	return err
}

// tell puts an edge on record where it is one.
func (r *rounds) tell(ctx context.Context, approval string, state fleet.State, g book.Grounds) error {
	st := r.a.book.View()
	d := st.Deploy
	if d.Approval == approval && d.State == state && d.Reason == g.Sentence {
		return nil
	}
	_, err := book.Attempt(ctx, r.a.book, book.EndDeploy{Approval: approval, State: state, Reason: g.Sentence,
		Why: r.a.names(st).reason(g.Why)})
	return err
}

// unhealthy is the reason of a service that is not healthy.
func unhealthy(s workload.ServiceStatus) fleet.Reason {
	if s.Why.Kind == "" {
		return fleet.Reason{Kind: fleet.Unhealthy, Service: s.Name}
	}
	return s.Why
}

// missingSentence says which command creates what is missing.
func (a *Appliance) missingSentence(missing []manifest.Secret) string {
	var parts []string
	for _, s := range missing {
		parts = append(parts, fmt.Sprintf("secret %s is missing, create it with: %s", s.Name, a.createWith(s)))
	}
	return strings.Join(parts, "; ")
}

func (a *Appliance) createWith(s manifest.Secret) string {
	return fmt.Sprintf("demarc secret create %s --dir %s --from-file FILE", s.Store, a.cfg.Secrets.Dir)
}

// fetchAll brings the artifacts of a release here.
func (a *Appliance) fetchAll(ctx context.Context, rel manifest.Release) error {
	for _, d := range rel.Artifacts {
		if a.store.Has(d) {
			continue
		}
		if err := a.fetch(ctx, d); err != nil {
			return err
		}
	}
	return nil
}

// fetch streams one artifact, going on where an earlier try ended.
func (a *Appliance) fetch(ctx context.Context, d fleet.Digest) error {
	const op = "appliance.fetch"
	absent := fleet.Reason{Kind: fleet.ArtifactMissing}
	l := a.link.Load()
	if l == nil {
		return absent.With(fault.New(op, fault.Unavailable, "artifact %s is not here yet, and the control plane is not reached", d.Short()))
	}
	p, err := a.store.Begin(d)
	if err != nil {
		return err
	}
	defer p.Close()
	client := l.boundary(1 << 20)
	stream, err := client.Artifact(ctx, connect.NewRequest(&boundaryv1.ArtifactRequest{Digest: string(d), Offset: p.Offset()}))
	if err != nil {
		return absent.With(api.FromWire(op, err))
	}
	defer stream.Close()
	for stream.Receive() {
		if _, err := p.Write(stream.Msg().GetData()); err != nil {
			return err
		}
	}
	if err := stream.Err(); err != nil && !errors.Is(err, io.EOF) {
		return absent.With(api.FromWire(op, err))
	}
	if err = p.Commit(); fault.Of(err) == fault.Invalid {
		return fleet.Reason{Kind: fleet.ArtifactDamaged}.With(err)
	}
	return err
}

// observe puts a change of health, presence or posture on record.
func (a *Appliance) observe(ctx context.Context) error {
	st := a.book.View()
	now := book.Status{Posture: st.Posture.Exposure, Transports: a.health.failures(a.cfg.Transports, a.transportErr, a.now())}
	if o, ok := st.Unapproved(); ok {
		now.Offer = book.OfferWaits{Release: o.Digest, Why: fleet.Reason{Kind: fleet.NotApproved}}
	}
	for _, s := range a.run.Status().Services {
		h := book.ServiceHealth{Name: s.Name, Healthy: s.Healthy, Restarts: uint32(s.Restarts), Why: s.Why}
		if !s.Healthy {
			h.Why = unhealthy(s)
		}
		now.Services = append(now.Services, h)
	}
	if d := st.CurrentRelease(); d != "" {
		plan, _, _, err := a.plans.Plan(st, d)
		if err != nil {
			return err
		}
		for _, s := range plan.Secrets {
			there, err := a.secret.Present(s.Store)
			if err != nil {
				continue // that it can't be told is the reason of the deployment, and on the customer's own page
			}
			now.Secrets = append(now.Secrets, book.Presence{Name: s.Name, Present: there})
		}
	}
	now = a.names(st).forVendor(now)
	if st.Status.Posture == now.Posture && slices.Equal(st.Status.Services, now.Services) && slices.Equal(st.Status.Secrets, now.Secrets) &&
		slices.Equal(st.Status.Transports, now.Transports) &&
		st.Status.Offer == now.Offer && !st.DeployUnreported(a.now()) {
		return nil
	}
	var err error
	if len(st.Status.Transports)+len(now.Transports) == 0 {
		_, err = book.Attempt(ctx, a.book, book.Observe{Status: now})
	} else {
		_, err = book.Attempt(ctx, a.book, book.ObserveTransports{Status: now})
	}
	return err
}
