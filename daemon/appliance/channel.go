// SPDX-License-Identifier: Apache-2.0

package appliance

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"net"
	"sync"
	"time"

	"connectrpc.com/connect"

	"github.com/demarc-dev/demarc/api"
	boundaryv1 "github.com/demarc-dev/demarc/api/boundary/v1"
	"github.com/demarc-dev/demarc/api/boundary/v1/boundaryv1connect"
	"github.com/demarc-dev/demarc/audit"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/seal"
)

// carry proves both sides over the connection and carries the channel until it or ctx ends.
func (a *Appliance) carry(ctx context.Context, route string, c net.Conn, up func()) error {
	const op = "appliance.carry"
	l, err := a.open(ctx, route, c, a.wallet)
	if err != nil {
		return err
	}
	defer l.cc.Close()
	ctx, end := context.WithCancelCause(ctx)
	defer end(nil)
	defer context.AfterFunc(ctx, func() { _ = l.cc.Close() })()

	stream := boundaryv1connect.NewBoundaryClient(l.http, base, connect.WithReadMaxBytes(8<<20)).Channel(ctx)
	page := a.book.View()
	hello := &boundaryv1.Hello{Build: a.build, OrdersDone: page.OrdersDone, BundleHeld: a.wallet.number(), Route: kindOf(a.cfg.Transports, route)}
	if err := stream.Send(&boundaryv1.Up{Body: &boundaryv1.Up_Hello{Hello: hello}}); err != nil {
		_, got := stream.Receive()
		return api.FromWire(op, errors.Join(got, err))
	}
	watch := time.AfterFunc(welcomeWait, func() {
		end(fault.New(op, fault.Unavailable, "nothing was heard from the control plane in time"))
	})
	defer watch.Stop()
	first, err := stream.Receive()
	if err != nil {
		return because(ctx, api.FromWire(op, err))
	}
	welcome := first.GetWelcome()
	if welcome == nil {
		return fault.New(op, fault.Invalid, "the control plane's first message is not a welcome")
	}
	a.welcomed(welcome)
	if err := a.acked(ctx, welcome.GetReportsDone()); err != nil {
		return err
	}
	l.node = welcome.GetNode()
	a.setLink(l)
	defer a.dropLink(l)
	up()
	a.log.Info("channel is up", "route", route, "node", l.node)
	out := &outbox{wake: make(chan struct{}, 1), sent: welcome.GetReportsDone()}
	var wg sync.WaitGroup
	defer wg.Wait()
	defer func() { end(nil) }()
	wg.Go(func() { end(a.speak(ctx, stream, out)) })
	for {
		watch.Reset(beatLost)
		down, err := stream.Receive()
		if err != nil {
			return because(ctx, api.FromWire(op, err))
		}
		if err := a.hear(ctx, down, out); err != nil {
			return err
		}
	}
}

func because(ctx context.Context, err error) error {
	if cause := context.Cause(ctx); cause != nil && !errors.Is(cause, context.Canceled) {
		return cause
	}
	return err
}

// outbox is what the reader asks the writer to say.
type outbox struct {
	mu   sync.Mutex
	upto uint64 // orders to acknowledge
	held uint64 // bundle to acknowledge
	wake chan struct{}
	sent uint64 // number of the last report on this channel; the writer's own
}

func (o *outbox) ack(upto uint64) {
	o.mu.Lock()
	o.upto = max(o.upto, upto)
	o.mu.Unlock()
	select {
	case o.wake <- struct{}{}:
	default:
	}
}

func (o *outbox) holds(number uint64) {
	o.mu.Lock()
	o.held = max(o.held, number)
	o.mu.Unlock()
	select {
	case o.wake <- struct{}{}:
	default:
	}
}

func (o *outbox) bundle() uint64 {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.held
}

func (o *outbox) acked() uint64 {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.upto
}

// hear takes one message of the control plane.
func (a *Appliance) hear(ctx context.Context, down *boundaryv1.Down, out *outbox) error {
	switch body := down.GetBody().(type) {
	case *boundaryv1.Down_Beat:
		return nil
	case *boundaryv1.Down_Ack:
		return a.acked(ctx, body.Ack.GetUpto())
	case *boundaryv1.Down_Bundle:
		if err := a.newBundle(body.Bundle); err != nil {
			return err
		}
		out.holds(a.wallet.number())
		return nil
	case *boundaryv1.Down_Order:
		took, err := submit(ctx, a, a.take(body.Order))
		if err != nil {
			return err
		}
		if took.Reason != "" {
			a.log.Warn("an order came to nothing", "number", body.Order.GetNumber(), "reason", took.Reason)
		}
		out.ack(took.Done)
		return nil
	}
	return fault.New("appliance.hear", fault.Invalid, "a message that this build does not know: update the appliance")
}

func (a *Appliance) acked(ctx context.Context, upto uint64) error {
	if upto <= a.book.View().ReportsDone {
		return nil
	}
	_, err := submit(ctx, a, ReportsDone{Upto: upto})
	return err
}

// take turns an order into a change of the book. A checkpoint is looked at here, since to countersign takes a clock.
func (a *Appliance) take(o *boundaryv1.Order) Take {
	t := Take{Number: o.GetNumber()}
	switch body := o.GetBody().(type) {
	case *boundaryv1.Order_Release:
		t.Release = body.Release
	case *boundaryv1.Order_Operation:
		t.Operation = body.Operation
	case *boundaryv1.Order_Cancel:
		t.Cancel = body.Cancel
	case *boundaryv1.Order_Probe:
		t.Probe = &ProbeIndex{ID: body.Probe.GetId(), Index: body.Probe.GetIndex()}
		if len(t.Probe.ID) > 64 {
			t.Probe, t.Refused = nil, "a probe's id has at most 64 bytes"
		}
	case *boundaryv1.Order_Checkpoint:
		c, err := a.countersign(body.Checkpoint)
		if err != nil {
			t.Refused = "the vendor's checkpoint was not countersigned: " + fault.Text(err)
			a.log.Error("the vendor's log does not continue what was countersigned", "err", err)
		}
		t.Witnessed = c
	case *boundaryv1.Order_Cosigned:
		if len(body.Cosigned) <= 4<<10 {
			t.Cosigned = body.Cosigned
		} else {
			t.Refused = "a countersigned checkpoint has at most 4 KiB"
		}
	default:
		t.Refused = "an order that this build does not know"
	}
	return t
}

// countersign checks that the vendor's checkpoint continues the last one, and adds this appliance's line.
func (a *Appliance) countersign(c *boundaryv1.Checkpoint) ([]byte, error) {
	page := a.book.View()
	if len(c.GetNote()) > 4<<10 || len(c.GetProof()) > 64 {
		return nil, fault.New("appliance.countersign", fault.Invalid, "a checkpoint has at most 4 KiB and a proof of 64 hashes")
	}
	k, err := seal.ParseKey(page.VendorLogKey)
	if err != nil {
		return nil, err
	}
	v, err := audit.NoteVerifier(audit.VendorOrigin(page.Site.TrustDomain), k.Public)
	if err != nil {
		return nil, err
	}
	var last []byte
	if n := len(page.Witnessed); n > 0 {
		last = page.Witnessed[n-1]
	}
	if _, err := audit.Continues(c.GetNote(), c.GetProof(), v, last); err != nil {
		return nil, err
	}
	return audit.Cosign(c.GetNote(), audit.CustomerOrigin(page.Site.TrustDomain, page.Appliance), a.signer, a.now())
}

// speak is the one function through which anything leaves on the channel: reports of the book in order, and
// acknowledgements and beats.
func (a *Appliance) speak(ctx context.Context, stream *connect.BidiStreamForClient[boundaryv1.Up, boundaryv1.Down], out *outbox) error {
	tick := time.NewTicker(beatEvery)
	defer tick.Stop()
	var acked, held uint64
	for {
		changed := a.book.Changed()
		page := a.book.View()
		out.sent = max(out.sent, page.ReportsDone)
		for out.sent < page.ReportsSent() {
			m := page.Reports[out.sent-page.ReportsDone].toWire(out.sent + 1)
			if err := stream.Send(&boundaryv1.Up{Body: &boundaryv1.Up_Report{Report: m}}); err != nil {
				return fault.At("appliance.speak", fault.Unavailable, err)
			}
			out.sent++
		}
		if upto := out.acked(); upto > acked {
			acked = upto
			if err := stream.Send(&boundaryv1.Up{Body: &boundaryv1.Up_Ack{Ack: &boundaryv1.Ack{Upto: upto}}}); err != nil {
				return fault.At("appliance.speak", fault.Unavailable, err)
			}
		}
		if number := out.bundle(); number > held {
			held = number
			if err := stream.Send(&boundaryv1.Up{Body: &boundaryv1.Up_BundleHeld{BundleHeld: number}}); err != nil {
				return fault.At("appliance.speak", fault.Unavailable, err)
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		case <-out.wake:
		case <-tick.C:
			if err := stream.Send(&boundaryv1.Up{Body: &boundaryv1.Up_Beat{Beat: &boundaryv1.Beat{AtUnixMs: a.now().UnixMilli()}}}); err != nil {
				return fault.At("appliance.speak", fault.Unavailable, err)
			}
		}
	}
}

// toWire turns a report into its message. What has no field there does not leave.
func (r Report) toWire(number uint64) *boundaryv1.Report {
	w := &boundaryv1.Report{Number: number, AtUnixMs: r.At.UnixMilli()}
	switch {
	case r.Deploy != nil:
		d := r.Deploy
		w.Body = &boundaryv1.Report_Deploy{Deploy: &boundaryv1.DeployReport{Release: string(d.Release), Version: d.Version, State: string(d.State), Plan: string(d.Plan), Reason: clipSentence(d.Reason)}}
	case r.Operation != nil:
		o := r.Operation
		w.Body = &boundaryv1.Report_Operation{Operation: &boundaryv1.OperationReport{Id: o.ID, State: o.State, Reason: clipSentence(o.Reason), Statement: o.Statement, Output: o.Output}}
	case r.Probe != nil:
		w.Body = &boundaryv1.Report_Probe{Probe: &boundaryv1.ProbeReport{Id: r.Probe.ID, Index: r.Probe.Index}}
	case r.Checkpoint != nil:
		c := r.Checkpoint
		w.Body = &boundaryv1.Report_Checkpoint{Checkpoint: &boundaryv1.Checkpoint{Note: c.Note, From: c.From, Proof: c.Proof}}
	case r.Cosigned != nil:
		w.Body = &boundaryv1.Report_Cosigned{Cosigned: r.Cosigned}
	case r.Status != nil:
		s := &boundaryv1.StatusReport{Posture: string(r.Status.Posture)}
		for _, h := range r.Status.Services {
			s.Services = append(s.Services, &boundaryv1.ServiceHealth{Name: h.Name, Healthy: h.Healthy, Restarts: h.Restarts})
		}
		for _, p := range r.Status.Secrets {
			s.Secrets = append(s.Secrets, &boundaryv1.SecretPresence{Name: p.Name, Present: p.Present})
		}
		w.Body = &boundaryv1.Report_Status{Status: s}
	}
	return w
}

// clipSentence keeps a reason within what the vendor takes.
func clipSentence(s string) string {
	if len(s) > 1000 {
		return s[:1000] + "..."
	}
	return s
}

func trimmed(b []byte) string { return string(bytes.TrimSpace(b)) }

func writeJSON(path string, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return fault.At("appliance.writeJSON", fault.Internal, err)
	}
	return writeFile(path, b)
}
