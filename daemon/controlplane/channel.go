// SPDX-License-Identifier: Apache-2.0

package controlplane

import (
	"context"
	"errors"
	"io"
	"maps"
	"slices"
	"sync"
	"time"

	"connectrpc.com/connect"

	"github.com/demarc-dev/demarc/api"
	boundaryv1 "github.com/demarc-dev/demarc/api/boundary/v1"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
)

// Timing of a channel.
const (
	helloWait = 10 * time.Second // for the first message
	beatEvery = 5 * time.Second  // each side says something at least this often
	beatLost  = 3 * beatEvery    // silence for this long ends the channel
)

// reconnectSpread is the time over which appliances that lost a node come back.
const reconnectSpread = 2 * time.Second

// channels is the live channels of this node, one an appliance.
type channels struct {
	mu   sync.Mutex
	open map[fleet.ApplianceID]*live
}

type live struct{ end context.CancelCauseFunc }

var errReplaced = fault.New("controlplane.Channel", fault.Conflict, "a newer channel of this appliance took the place of this one")

// take makes l the appliance's channel and ends the older one.
func (c *channels) take(name fleet.ApplianceID, l *live) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if old := c.open[name]; old != nil {
		old.end(errReplaced)
	}
	c.open[name] = l
}

// drop forgets l and reports whether it was still the appliance's channel.
func (c *channels) drop(name fleet.ApplianceID, l *live) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.open[name] != l {
		return false
	}
	delete(c.open, name)
	return true
}

func (c *channels) names() []fleet.ApplianceID {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Sorted(maps.Keys(c.open))
}

func (c *channels) count() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.open)
}

// abortKey carries a function that ends the reading of a request's body: Connect's Receive knows no context.
type abortKey struct{}

func abort(ctx context.Context) {
	if f, ok := ctx.Value(abortKey{}).(func()); ok {
		f()
	}
}

// Channel serves one appliance: reports come up and are acknowledged once they are in the book, orders go down from the
// book until they are acknowledged. Losing the channel at any moment loses nothing.
func (s *Server) Channel(ctx context.Context, stream *connect.BidiStream[boundaryv1.Up, boundaryv1.Down]) error {
	who := api.From(ctx)
	_, _, id, _ := who.Principal.Split()
	name := fleet.ApplianceID(id)

	ctx, end := context.WithCancelCause(ctx)
	defer end(nil)
	defer context.AfterFunc(ctx, func() { abort(ctx) })()
	watch := time.AfterFunc(helloWait, func() {
		end(fault.New("controlplane.Channel", fault.Unavailable, "nothing was heard from the appliance in time"))
	})
	defer watch.Stop()

	first, err := stream.Receive()
	if err != nil {
		return s.because(ctx, err)
	}
	hello := first.GetHello()
	if hello == nil {
		return fault.New("controlplane.Channel", fault.Invalid, "the first message of a channel is hello")
	}
	route := hello.GetRoute()
	if route != "https" && route != "privatelink" && route != "tailscale" {
		route = "unknown"
	}
	if _, err := submit(ctx, s, who.Principal, "", Edge{Name: name, Serial: who.Serial, Online: true, Node: s.name, Route: route}); err != nil {
		return err
	}
	l := &live{end: end}
	s.channels.take(name, l)
	defer s.left(ctx, name, l)

	if err := s.done(ctx, who.Principal, name, hello.GetOrdersDone()); err != nil {
		return err
	}
	if err := s.holds(ctx, who.Principal, name, hello.GetBundleHeld()); err != nil {
		return err
	}
	out := &outbox{wake: make(chan struct{}, 1)}
	var wg sync.WaitGroup
	defer wg.Wait()
	defer end(nil)
	wg.Go(func() {
		if err := s.speak(ctx, who, name, stream, out); err != nil {
			end(err)
		}
	})
	for {
		watch.Reset(beatLost)
		up, err := stream.Receive()
		if err != nil {
			return s.because(ctx, err)
		}
		if err := s.hear(ctx, who.Principal, name, up, out); err != nil {
			return err
		}
	}
}

// because prefers the reason that ended the channel to the error that it showed itself by.
func (s *Server) because(ctx context.Context, err error) error {
	if cause := context.Cause(ctx); cause != nil && !errors.Is(cause, context.Canceled) {
		return cause
	}
	if errors.Is(err, io.EOF) {
		return nil
	}
	return err
}

// left puts the edge on record when the channel was the appliance's newest.
func (s *Server) left(ctx context.Context, name fleet.ApplianceID, l *live) {
	if !s.channels.drop(name, l) {
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	if _, err := submit(ctx, s, s.self(), "", Edge{Name: name, Online: false, Node: s.name}); err != nil {
		s.log.Warn("could not record that an appliance left", "appliance", name, "error", err)
	}
}

// outbox is what the reader asks the writer to acknowledge.
type outbox struct {
	mu   sync.Mutex
	upto uint64
	wake chan struct{}
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

func (o *outbox) acked() uint64 {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.upto
}

// hear takes one message of the appliance.
func (s *Server) hear(ctx context.Context, by fleet.Principal, name fleet.ApplianceID, up *boundaryv1.Up, out *outbox) error {
	switch body := up.GetBody().(type) {
	case *boundaryv1.Up_Beat:
		return nil
	case *boundaryv1.Up_Ack:
		return s.done(ctx, by, name, body.Ack.GetUpto())
	case *boundaryv1.Up_BundleHeld:
		return s.holds(ctx, by, name, body.BundleHeld)
	case *boundaryv1.Up_Report:
		r, err := reportOf(name, body.Report)
		if err != nil {
			return err
		}
		took, err := submit(ctx, s, by, "", r)
		if err != nil {
			return err
		}
		out.ack(took.Done)
		if took.New && r.Checkpoint != nil {
			return s.countersign(ctx, name, *r.Checkpoint)
		}
		return nil
	}
	return fault.New("controlplane.Channel", fault.Invalid, "a message that this build does not know")
}

// done records an acknowledgement where it says something new.
func (s *Server) done(ctx context.Context, by fleet.Principal, name fleet.ApplianceID, upto uint64) error {
	a, err := s.book.View().Appliance(name)
	if err != nil || upto <= a.OrdersDone {
		return err
	}
	_, err = submit(ctx, s, by, "", OrdersDone{Name: name, Upto: upto})
	return err
}

// speak sends the welcome, then orders, acknowledgements and beats, until the channel ends or the appliance may no
// longer have one.
func (s *Server) speak(ctx context.Context, who api.Who, name fleet.ApplianceID, stream *connect.BidiStream[boundaryv1.Up, boundaryv1.Down], out *outbox) error {
	a, err := s.book.View().Appliance(name)
	if err != nil {
		return err
	}
	if err := stream.Send(&boundaryv1.Down{Body: &boundaryv1.Down_Welcome{Welcome: &boundaryv1.Welcome{Node: s.name,
		ServerTimeUnix: s.now().Unix(), ReportsDone: a.ReportsDone, ReconnectSpreadMs: uint32(reconnectSpread.Milliseconds())}}}); err != nil {
		return err
	}
	tick := time.NewTicker(beatEvery)
	defer tick.Stop()
	var sent, acked, bundle uint64
	for {
		changed := s.book.Changed()
		if a, err = s.book.View().Appliance(name); err != nil {
			return err
		}
		if err := a.admits(who.Serial); err != nil {
			return err
		}
		if number := s.book.View().Bundle(); number > max(bundle, a.Bundle) {
			sealed, err := s.signedBundle()
			if err != nil {
				return err
			}
			if err := stream.Send(&boundaryv1.Down{Body: &boundaryv1.Down_Bundle{Bundle: sealed}}); err != nil {
				return err
			}
			bundle = number
		}
		sent = max(sent, a.OrdersDone)
		for ; sent < a.OrdersSent(); sent++ {
			if err := stream.Send(a.Orders[sent-a.OrdersDone].toWire(sent + 1)); err != nil {
				return err
			}
		}
		if upto := out.acked(); upto > acked {
			acked = upto
			if err := stream.Send(&boundaryv1.Down{Body: &boundaryv1.Down_Ack{Ack: &boundaryv1.Ack{Upto: upto}}}); err != nil {
				return err
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		case <-out.wake:
		case <-tick.C:
			if err := stream.Send(&boundaryv1.Down{Body: &boundaryv1.Down_Beat{Beat: &boundaryv1.Beat{AtUnixMs: s.now().UnixMilli()}}}); err != nil {
				return err
			}
		}
	}
}

// admits tells whether a certificate of the appliance is good now: its serial is the current or the next one.
func (a Appliance) admits(serial fleet.Serial) error {
	switch {
	case a.Status == Banned:
		return fault.New("controlplane.admit", fault.Denied, "appliance %q is banned", a.Name)
	case a.Status != Enrolled:
		return fault.New("controlplane.admit", fault.Denied, "appliance %q has not enrolled", a.Name)
	case serial == "" || (serial != a.Current && serial != a.Next):
		return fault.New("controlplane.admit", fault.Denied, "this certificate of appliance %q is not its valid one: another has taken its place", a.Name)
	}
	return nil
}
