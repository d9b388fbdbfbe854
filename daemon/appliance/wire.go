// SPDX-License-Identifier: Apache-2.0

package appliance

import (
	"google.golang.org/protobuf/proto"

	boundaryv1 "github.com/demarc-dev/demarc/api/boundary/v1"
	"github.com/demarc-dev/demarc/api/channel"
	"github.com/demarc-dev/demarc/daemon/appliance/book"
	"github.com/demarc-dev/demarc/fault"
)

// reportToWire turns a report into its message. What has no field there does not leave. Each text is UTF-8, and each field has the
// size that the vendor takes: a report that could not be encoded, or was refused, would hold back all that follow it.
func reportToWire(r book.Report, number uint64) *boundaryv1.Report {
	w := &boundaryv1.Report{Number: number, AtUnixMs: r.At.UnixMilli()}
	switch {
	case r.Deploy != nil:
		d := r.Deploy
		w.Body = &boundaryv1.Report_Deploy{Deploy: &boundaryv1.DeployReport{Release: clipName(string(d.Release)), Version: clipName(d.Version),
			State: clipName(string(d.State)),
			Plan:  clipName(string(d.Plan)), Reason: channel.ReasonToWire(d.Why)}}
	case r.Operation != nil:
		o := r.Operation
		w.Body = &boundaryv1.Report_Operation{Operation: &boundaryv1.OperationReport{Id: clipName(o.ID), State: clipName(o.State),
			Reason: channel.ReasonToWire(o.Why), Statement: o.Statement, Output: o.Output}}
	case r.Probe != nil:
		w.Body = &boundaryv1.Report_Probe{Probe: &boundaryv1.ProbeReport{Id: clipName(r.Probe.ID), Index: r.Probe.Index}}
	case r.Checkpoint != nil:
		c := r.Checkpoint
		w.Body = &boundaryv1.Report_Checkpoint{Checkpoint: &boundaryv1.Checkpoint{Note: c.Note, From: c.From, Proof: c.Proof}}
	case r.Cosigned != nil:
		w.Body = &boundaryv1.Report_Cosigned{Cosigned: r.Cosigned}
	case r.Status != nil:
		w.Body = &boundaryv1.Report_Status{Status: statusToWire(*r.Status)}
	case r.Withdrawn:
		w.Body = &boundaryv1.Report_Withdrawn{Withdrawn: true}
	}
	return w
}

func statusToWire(s book.Status) *boundaryv1.StatusReport {
	w := &boundaryv1.StatusReport{Posture: clipName(string(s.Posture))}
	for _, h := range s.Services[:min(len(s.Services), channel.MaxServices)] {
		w.Services = append(w.Services, &boundaryv1.ServiceHealth{Name: clipName(h.Name), Healthy: h.Healthy, Restarts: h.Restarts,
			Reason: channel.ReasonToWire(h.Why)})
	}
	for _, p := range s.Secrets[:min(len(s.Secrets), channel.MaxSecrets)] {
		w.Secrets = append(w.Secrets, &boundaryv1.SecretPresence{Name: clipName(p.Name), Present: p.Present})
	}
	for _, t := range s.Transports[:min(len(s.Transports), channel.MaxTroubles)] {
		w.Roads = append(w.Roads, &boundaryv1.RoadTrouble{Kind: clipName(t.Kind), Reason: clipName(string(t.Reason))})
	}
	if s.Offer.Release != "" {
		w.Offer = &boundaryv1.OfferWaits{Release: clipName(string(s.Offer.Release)), Reason: channel.ReasonToWire(s.Offer.Why)}
	}
	return w
}

// sendable returns the message of a report. One that can't be sent is a defect of this program: it is logged, and an echo of
// no probe, which tells nothing, takes its number, so that what comes after it is heard.
func (a *Appliance) sendable(r *boundaryv1.Report) *boundaryv1.Up {
	up := &boundaryv1.Up{Body: &boundaryv1.Up_Report{Report: r}}
	_, err := proto.Marshal(up)
	if size := proto.Size(up); err == nil && size > channel.MaxUp {
		err = fault.New("appliance.sendable", fault.Internal, "the report has %d bytes, and %d is the most", size, channel.MaxUp)
	}
	if err == nil {
		return up
	}
	a.log.Error("a report can't be sent, and is left out", "number", r.GetNumber(), "err", err)
	r.Body = &boundaryv1.Report_Probe{Probe: &boundaryv1.ProbeReport{Id: "left-out"}}
	return up
}

const cut = len("...") // what is added to a text that was cut

// clipSentence keeps a reason within what the vendor takes.
func clipSentence(s string) string { return fault.ClipTo(s, channel.MaxSentence-cut) }

// clipName keeps a name within what the vendor takes.
func clipName(s string) string { return fault.ClipTo(s, channel.MaxName-cut) }
