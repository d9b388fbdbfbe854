// SPDX-License-Identifier: Apache-2.0

package appliance

import (
	"context"
	"time"

	boundaryv1 "github.com/demarc-dev/demarc/api/boundary/v1"
	"github.com/demarc-dev/demarc/daemon"
	"github.com/demarc-dev/demarc/daemon/appliance/book"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/ingress"
	"github.com/demarc-dev/demarc/ledger"
	"github.com/demarc-dev/demarc/manifest"
	"github.com/demarc-dev/demarc/workload"
)

// Bare is an appliance of nothing but a book, a runtime and a clock.
func Bare(b *ledger.Book[book.State], r Runtime, now func() time.Time) *Appliance {
	return &Appliance{book: book.ReadOnly(b, now), run: r, now: now}
}

// SetRuntime puts a runtime of a test in the place of the real one.
func (a *Appliance) SetRuntime(r Runtime) {
	_ = a.run.Close(context.Background())
	a.run = r
}

// SetSecrets puts a store of a test around the real one, before the loops begin.
func (a *Appliance) SetSecrets(around func(workload.Secrets) workload.Secrets) {
	a.secret = around(a.secret)
}

// Book is the appliance's own.
func (a *Appliance) Book() *ledger.Book[book.State] { return a.book.Book() }

// Propose puts a proposal into the appliance's book.
func (a *Appliance) Propose(ctx context.Context, data []byte) ([]byte, error) {
	return a.book.Propose(ctx, data)
}

// Store takes an artifact.
func (a *Appliance) Store(d fleet.Digest, b []byte) error {
	p, err := a.store.Begin(d)
	if err != nil {
		return err
	}
	defer p.Close()
	if p.Done() {
		return nil
	}
	if _, err := p.Write(b); err != nil {
		return err
	}
	return p.Commit()
}

// Work is the parts that deploy and operate.
func (a *Appliance) Work() []daemon.Part {
	return []daemon.Part{daemon.Func("deploy", a.reconcile), daemon.Func("operations", a.operate)}
}

// Hold keeps the good plan of a page running, as after a restart.
func (a *Appliance) Hold(ctx context.Context, st book.State) error {
	return (&rounds{a: a}).hold(ctx, st)
}

// While is what bounds the context of a running act.
func (a *Appliance) While(ctx context.Context, grants []string, may func(time.Time) error) (context.Context, func()) {
	return a.while(ctx, grants, may)
}

// SetPosture opens the doors of a posture.
func (a *Appliance) SetPosture(ctx context.Context, p fleet.Posture) error {
	return a.setPosture(ctx, "", p)
}

// Doors are those of the plan that stands.
func (a *Appliance) Doors() []ingress.Door { return a.gate.Plan().Doors }

// ToWire is the message of a report.
func ToWire(r book.Report, number uint64) *boundaryv1.Report { return reportToWire(r, number) }

// PlanOf is the plan of an offered release, as the loops have it.
func (a *Appliance) PlanOf(d fleet.Digest) manifest.Plan {
	p, _, _, _ := a.plans.Plan(a.book.View(), d)
	return p
}
