// SPDX-License-Identifier: Apache-2.0

package controlplane

import (
	"time"

	boundaryv1 "github.com/demarc-dev/demarc/api/boundary/v1"
	"github.com/demarc-dev/demarc/api/channel"
	"github.com/demarc-dev/demarc/daemon/controlplane/book"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
)

// reportOf turns a report from the wire into a change, every size checked. It names the field that is too large.
func reportOf(from fleet.ApplianceID, r *boundaryv1.Report) (book.Report, error) {
	out := book.Report{Name: from, Number: r.GetNumber(), At: time.UnixMilli(r.GetAtUnixMs()).UTC()}
	var b bounds
	switch body := r.GetBody().(type) {
	case *boundaryv1.Report_Deploy:
		d := body.Deploy
		b.text("deploy.release", d.GetRelease(), channel.MaxName)
		b.text("deploy.version", d.GetVersion(), channel.MaxName)
		b.text("deploy.state", d.GetState(), channel.MaxName)
		b.text("deploy.plan", d.GetPlan(), channel.MaxName)
		out.Deploy = &book.DeployReport{Release: fleet.Digest(d.GetRelease()), Version: d.GetVersion(), State: fleet.State(d.GetState()), Plan: fleet.Digest(d.GetPlan()), Why: channel.ReasonFromWire(d.GetReason())}
	case *boundaryv1.Report_Operation:
		o := body.Operation
		b.text("operation.id", o.GetId(), channel.MaxName)
		b.text("operation.state", o.GetState(), channel.MaxName)
		b.size("operation.statement", len(o.GetStatement()), channel.MaxStatement)
		b.size("operation.output", len(o.GetOutput()), channel.MaxOutput)
		out.Operation = &book.OperationReport{ID: o.GetId(), State: o.GetState(), Why: channel.ReasonFromWire(o.GetReason()), Statement: o.GetStatement(), Output: o.GetOutput()}
	case *boundaryv1.Report_Probe:
		b.text("probe.id", body.Probe.GetId(), channel.MaxName)
		out.Probe = &book.ProbeIndex{ID: body.Probe.GetId(), Index: body.Probe.GetIndex()}
	case *boundaryv1.Report_Status:
		out.Status = statusOf(body.Status, &b)
	case *boundaryv1.Report_Checkpoint:
		c := body.Checkpoint
		b.size("checkpoint.note", len(c.GetNote()), channel.MaxNote)
		b.size("checkpoint.proof", len(c.GetProof()), channel.MaxProof)
		for _, h := range c.GetProof() {
			b.size("checkpoint.proof hash", len(h), 32)
		}
		out.Checkpoint = &book.Checkpoint{Note: c.GetNote(), From: c.GetFrom(), Proof: c.GetProof()}
	case *boundaryv1.Report_Cosigned:
		b.size("cosigned", len(body.Cosigned), channel.MaxNote)
		out.Cosigned = body.Cosigned
	case *boundaryv1.Report_Withdrawn:
		out.Withdrawn = body.Withdrawn
	default:
		return book.Report{}, fault.New("controlplane.report", fault.Invalid, "report %d has no body that this build knows", r.GetNumber())
	}
	return out, b.err
}

func statusOf(s *boundaryv1.StatusReport, b *bounds) *book.Status {
	b.text("status.posture", s.GetPosture(), channel.MaxName)
	b.size("status.services", len(s.GetServices()), channel.MaxServices)
	b.size("status.secrets", len(s.GetSecrets()), channel.MaxSecrets)
	b.size("status.roads", len(s.GetRoads()), channel.MaxTroubles)
	if b.err != nil {
		return nil
	}
	out := &book.Status{Posture: fleet.Exposure(s.GetPosture())}
	for _, h := range s.GetServices() {
		b.text("status.services.name", h.GetName(), channel.MaxName)
		out.Services = append(out.Services, book.ServiceHealth{Name: h.GetName(), Healthy: h.GetHealthy(), Restarts: h.GetRestarts(), Why: channel.ReasonFromWire(h.GetReason())})
	}
	for _, p := range s.GetSecrets() {
		b.text("status.secrets.name", p.GetName(), channel.MaxName)
		out.Secrets = append(out.Secrets, book.Presence{Name: p.GetName(), Present: p.GetPresent()})
	}
	if o := s.GetOffer(); o != nil {
		b.text("status.offer.release", o.GetRelease(), channel.MaxName)
		out.Offer = book.OfferWaits{Release: fleet.Digest(o.GetRelease()), Why: channel.ReasonFromWire(o.GetReason())}
	}
	return out
}

// bounds remembers the first field that is too large.
type bounds struct{ err error }

func (b *bounds) text(field, s string, limit int) { b.size(field, len(s), limit) }

func (b *bounds) size(field string, n, limit int) {
	if b.err == nil && n > limit {
		b.err = fault.New("controlplane.report", fault.Invalid, "field %s has %d, and %d is the most that is taken", field, n, limit)
	}
}

// orderToWire turns a waiting order into its message.
func orderToWire(o book.Order, number uint64, in fleet.Epoch) *boundaryv1.Down {
	w := &boundaryv1.Order{Number: number, Epoch: epochToWire(in)}
	switch {
	case o.Release != nil:
		w.Body = &boundaryv1.Order_Release{Release: o.Release}
	case o.Operation != nil:
		w.Body = &boundaryv1.Order_Operation{Operation: o.Operation}
	case o.Cancel != "":
		w.Body = &boundaryv1.Order_Cancel{Cancel: o.Cancel}
	case o.Probe != nil:
		w.Body = &boundaryv1.Order_Probe{Probe: &boundaryv1.ProbeOrder{Id: o.Probe.ID, Index: o.Probe.Index}}
	case o.Checkpoint != nil:
		c := o.Checkpoint
		w.Body = &boundaryv1.Order_Checkpoint{Checkpoint: &boundaryv1.Checkpoint{Note: c.Note, From: c.From, Proof: c.Proof}}
	case o.Cosigned != nil:
		w.Body = &boundaryv1.Order_Cosigned{Cosigned: o.Cosigned}
	case o.Withdrawn:
		w.Body = &boundaryv1.Order_Withdrawn{Withdrawn: true}
	}
	return &boundaryv1.Down{Body: &boundaryv1.Down_Order{Order: w}}
}
