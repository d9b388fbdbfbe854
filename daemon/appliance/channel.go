// SPDX-License-Identifier: Apache-2.0

package appliance

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"io"
	mrand "math/rand/v2"
	"net"
	"net/http"
	"sync"
	"time"

	"golang.org/x/net/http2"

	"github.com/demarc-dev/demarc/api"
	boundaryv1 "github.com/demarc-dev/demarc/api/boundary/v1"
	"github.com/demarc-dev/demarc/api/channel"
	"github.com/demarc-dev/demarc/audit"
	"github.com/demarc-dev/demarc/daemon/appliance/book"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/identity"
	"github.com/demarc-dev/demarc/mesh"
	"github.com/demarc-dev/demarc/seal"
)

// Bounds on what the control plane may wish.
const (
	defaultBeat = 5 * time.Second
	maxBeat     = channel.MaxQuiet
	maxSpread   = 5 * time.Minute
	writeWait   = 10 * time.Second // for the control plane to take one message
	bulkIdle    = 30 * time.Second // after which the connection for artifacts and renewals is closed
)

// carry proves both sides over the connection and carries the channel until it or ctx ends. Losing a channel that stood
// is answered by coming back at a random moment of the time that the control plane named: with it, many others lost theirs.
func (a *Appliance) carry(ctx context.Context, route string, c net.Conn, up func()) error {
	shown := a.creds.Serial() // before the handshake: where another is stored meanwhile, it may have been this one
	t, err := a.shake(ctx, route, mesh.LayerChannel, c, identity.Client(a.creds, identity.WantNode(a.cfg.TrustDomain), channel.Proto))
	if err != nil {
		return err
	}
	defer t.Close()
	defer context.AfterFunc(ctx, func() { _ = t.Close() })()
	seen := seenIn(ctx)
	seen.proven.Store(true)
	told := alerted{t, seen}
	l, bulk := a.bulk(route, t)
	defer bulk.CloseIdleConnections()

	welcome, err := a.greet(ctx, route, told, a.idle.tolerated(route, c))
	if err != nil {
		return err
	}
	a.welcomed(welcome)
	epoch, err := a.meet(ctx, welcome)
	if err != nil {
		return err
	}
	if err := a.acked(ctx, epoch, welcome.GetReportsDone()); err != nil {
		return err
	}
	l.node, l.shown, l.classical = welcome.GetNode(), shown, t.ConnectionState().CurveID != tls.X25519MLKEM768
	a.setLink(l)
	defer a.dropLink(l)
	up()
	a.log.Info("channel is up", "route", route, "node", l.node)
	err = a.converse(ctx, route, told, welcome, epoch)
	var own later
	if ctx.Err() == nil && !errors.As(err, &own) {
		spread := min(time.Duration(welcome.GetReconnectSpreadMs())*time.Millisecond, maxSpread)
		err = later{err, time.Duration(mrand.Float64() * float64(spread))}
	}
	return err
}

// shake runs TLS over a connection of a route, and where the first message is swallowed, over a second one.
func (a *Appliance) shake(ctx context.Context, route string, layer mesh.Layer, c net.Conn, cfg *tls.Config) (*tls.Conn, error) {
	mesh.KeepAlive(c)
	return a.hellos[route].Shake(ctx, layer, c, func(ctx context.Context) (net.Conn, error) {
		second, err := a.routes[route].Dial(ctx, "")
		if err == nil {
			mesh.KeepAlive(second)
		}
		return second, err
	}, cfg)
}

// stale reports whether the channel over a route was opened without ML-KEM, and the next one may be opened with it.
func (a *Appliance) stale(route string) bool {
	l := a.link.Load()
	return l != nil && l.at == route && l.classical && !a.hellos[route].Small(mesh.LayerChannel)
}

// transportErr is the last outcome of a route. Of one that works without ML-KEM it says so.
func (a *Appliance) transportErr(route string) error {
	if err := a.sw.Last(route); err != nil {
		return err
	}
	return a.hellos[route].Err()
}

// later is the end of a channel after which this appliance waits before it comes back.
type later struct {
	error
	wait time.Duration
}

// Unwrap returns the reason.
func (l later) Unwrap() error { return l.error }

// RetryAfter implements [mesh.RetryAfter].
func (l later) RetryAfter() time.Duration { return l.wait }

// bulk is what artifacts and renewals go over: a connection of its own on the same route, dialled when it is needed and
// closed when it is idle. Commands on the channel never wait behind it.
func (a *Appliance) bulk(route string, c io.Closer) (*link, *http2.Transport) {
	tr := &http2.Transport{ReadIdleTimeout: pingAfter, PingTimeout: pingWait, IdleConnTimeout: bulkIdle}
	tr.DialTLSContext = func(ctx context.Context, _, _ string, _ *tls.Config) (net.Conn, error) {
		raw, err := a.routes[route].Dial(ctx, "")
		if err != nil {
			return nil, err
		}
		return a.shake(ctx, route, mesh.LayerChannel, raw, identity.Client(a.creds, identity.WantNode(a.cfg.TrustDomain), "h2"))
	}
	return &link{cc: c, http: &http.Client{Transport: api.Sent(tr)}, at: route}, tr
}

// greet says hello and gives the control plane's welcome.
func (a *Appliance) greet(ctx context.Context, route string, t net.Conn, quiet time.Duration) (*boundaryv1.Welcome, error) {
	const op = "appliance.greet"
	_ = t.SetDeadline(time.Now().Add(welcomeWait))
	st := a.book.View()
	hello := &boundaryv1.Hello{Epoch: epochToWire(st.Epoch), ReportsDone: st.ReportsDone, ReportsFrom: st.OldestReport(),
		LogHeads: st.WitnessedSizes(), LogLeast: st.LeastKept,
		Build: a.build, OrdersDone: st.OrdersDone, BundleHeld: a.creds.SignedBundle(), Route: kindOf(a.cfg.Transports,
			route), QuietMs: uint32(quiet.Milliseconds())}
	failed := channel.Write(t, &boundaryv1.Up{Body: &boundaryv1.Up_Hello{Hello: hello}}, channel.MaxHello)
	var first boundaryv1.Down
	if err := channel.Read(t, &first, channel.MaxDown); err != nil {
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		return nil, fault.Because(errors.Join(mesh.Explain(err), failed), op, fault.Unavailable, "the control plane opened no channel")
	}
	if c := first.GetClosed(); c != nil {
		return nil, closed(c)
	}
	welcome := first.GetWelcome()
	if welcome == nil {
		return nil, fault.New(op, fault.Invalid, "the control plane's first message is not a welcome")
	}
	return welcome, nil
}

// closed is the control plane's reason as a fault, and the wait that it asks for.
func closed(c *boundaryv1.Closed) error {
	kind := fault.Kind(c.GetKind())
	if !kind.Known() {
		kind = fault.Internal
	}
	err := answered(fault.New("appliance.channel", kind, "%s", clipSentence(c.GetReason())))
	if ms := c.GetRetryAfterMs(); ms > 0 {
		wish := min(time.Duration(ms)*time.Millisecond, maxSpread)
		return later{err, time.Duration(mrand.Float64() * float64(wish))}
	}
	return err
}

// converse reads and writes until the channel ends.
func (a *Appliance) converse(ctx context.Context, route string, t net.Conn, welcome *boundaryv1.Welcome, epoch fleet.Epoch) error {
	ctx, end := context.WithCancelCause(ctx)
	beat := defaultBeat
	if ms := welcome.GetBeatMs(); ms > 0 {
		beat = min(max(time.Duration(ms)*time.Millisecond, time.Second), maxBeat)
	}
	out := &outbox{wake: make(chan struct{}, 1), sent: welcome.GetReportsDone(), epoch: epoch}
	var wg sync.WaitGroup
	defer wg.Wait()
	defer end(nil)
	wg.Go(func() {
		if err := a.speak(ctx, t, beat, out); err != nil {
			end(err)
			_ = t.Close()
		}
	})
	for {
		since := time.Now()
		out.watch.Listen(t, since, beat)
		var down boundaryv1.Down
		if err := channel.Read(t, &down, channel.MaxDown); err != nil {
			if ctx.Err() == nil {
				a.idle.dropped(route, time.Since(since))
			}
			return because(ctx, err)
		}
		out.watch.Heard()
		a.idle.lasted(route, time.Since(since))
		if err := a.hear(ctx, &down, out); err != nil {
			return err
		}
	}
}

func because(ctx context.Context, err error) error {
	if cause := context.Cause(ctx); cause != nil && !errors.Is(cause, context.Canceled) {
		return cause
	}
	var late net.Error
	switch {
	case errors.Is(err, io.EOF):
		return fault.New("appliance.channel", fault.Unavailable, "the control plane ended the channel")
	case errors.As(err, &late) && late.Timeout(): // by our clock, or by the kernel's; a tailnet's own stack has an error of its own for it
		return silence{fault.Because(err, "appliance.channel", fault.Unavailable, "nothing was heard from the control plane in time")}
	}
	return err
}

// silence is the end of a channel that went dead without a word.
type silence struct{ error }

// Unwrap returns the reason.
func (s silence) Unwrap() error { return s.error }

// Silent implements [mesh.Silent].
func (silence) Silent() bool { return true }

// outbox is what the reader asks the writer to say.
type outbox struct {
	mu   sync.Mutex
	upto uint64 // orders to acknowledge
	held uint64 // bundle to acknowledge
	wake chan struct{}
	sent uint64 // number of the last report on this channel; the writer's own

	epoch fleet.Epoch // of the channel

	watch channel.Watch // for an answer to what the writer says
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
	case *boundaryv1.Down_Closed:
		return closed(body.Closed)
	case *boundaryv1.Down_Ack:
		return a.acked(ctx, out.epoch, body.Ack.GetUpto())
	case *boundaryv1.Down_Bundle:
		if err := a.newBundle(body.Bundle); err != nil {
			return err
		}
		out.holds(a.creds.BundleNumber())
		return nil
	case *boundaryv1.Down_Order:
		if e, err := epochOf(body.Order.GetEpoch()); err != nil || e != out.epoch {
			return fault.New("appliance.hear", fault.Conflict, "order %d is of another epoch of the vendor's book than its channel",
				body.Order.GetNumber())
		}
		done, err := a.takeOrder(ctx, body.Order)
		if err != nil {
			return err
		}
		out.ack(done)
		return nil
	}
	return fault.New("appliance.hear", fault.Invalid, "a message that this build does not know: update the appliance")
}

func (a *Appliance) acked(ctx context.Context, epoch fleet.Epoch, upto uint64) error {
	if upto <= a.book.View().ReportsDone {
		return nil
	}
	_, err := book.Attempt(ctx, a.book, book.ReportsDone{Upto: upto, Epoch: epoch.Number})
	if a.book.Failed() != nil {
		return nil // the vendor says it again; a channel need not end for it
	}
	return err
}

// countersign checks that the vendor's checkpoint continues the last one, and adds this appliance's line.
func (a *Appliance) countersign(c *boundaryv1.Checkpoint) ([]byte, error) {
	st := a.book.View()
	if len(c.GetNote()) > channel.MaxNote || len(c.GetProof()) > channel.MaxProof {
		return nil, fault.New("appliance.countersign", fault.Invalid, "a checkpoint has at most %d bytes and a proof of %d hashes",
			channel.MaxNote, channel.MaxProof)
	}
	k, err := seal.ParseKey(st.VendorLogKey)
	if err != nil {
		return nil, err
	}
	v, err := audit.NoteVerifier(audit.VendorOrigin(st.Site.TrustDomain), k.Public)
	if err != nil {
		return nil, err
	}
	var last []byte
	if n := len(st.Witnessed); n > 0 {
		last = st.Witnessed[n-1]
		if head, err := audit.OpenCheckpoint(last, v); err == nil && c.GetFrom() < head.Size {
			return last, nil // the vendor did not take it, and what it proves next must begin there
		}
	}
	if _, err := audit.Continues(c.GetNote(), c.GetProof(), v, last); err != nil {
		return nil, err
	}
	return audit.Cosign(c.GetNote(), audit.CustomerOrigin(st.Site.TrustDomain, st.Appliance), a.signer, a.now())
}

// speak is the one function through which anything leaves on the channel: reports of the book in order, and
// acknowledgements and beats.
func (a *Appliance) speak(ctx context.Context, t net.Conn, beat time.Duration, out *outbox) error {
	say := func(up *boundaryv1.Up) error {
		_ = t.SetWriteDeadline(time.Now().Add(writeWait))
		return fault.At("appliance.speak", "", channel.Write(t, up, channel.MaxUp))
	}
	tick := time.NewTimer(jitter(beat))
	defer tick.Stop()
	var acked, held uint64
	for {
		changed := a.book.Changed()
		st := a.book.View()
		if st.Epoch != out.epoch {
			return fault.New("appliance.speak", fault.Unavailable, "another epoch of the vendor's book was met on another channel")
		}
		out.sent = max(out.sent, st.ReportsDone)
		for out.sent < st.ReportsSent() {
			m := a.sendable(reportToWire(st.Reports[out.sent-st.ReportsDone], out.sent+1))
			out.watch.Ask(t, time.Now())
			if err := say(m); err != nil {
				return err
			}
			out.sent++
		}
		if upto := out.acked(); upto > acked {
			acked = upto
			if err := say(&boundaryv1.Up{Body: &boundaryv1.Up_Ack{Ack: &boundaryv1.Ack{Upto: upto}}}); err != nil {
				return err
			}
		}
		if number := out.bundle(); number > held {
			held = number
			if err := say(&boundaryv1.Up{Body: &boundaryv1.Up_BundleHeld{BundleHeld: number}}); err != nil {
				return err
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		case <-out.wake:
		case <-tick.C:
			out.watch.Ask(t, time.Now())
			if err := say(&boundaryv1.Up{Body: &boundaryv1.Up_Beat{Beat: &boundaryv1.Beat{AtUnixMs: a.now().UnixMilli()}}}); err != nil {
				return err
			}
			tick.Reset(jitter(beat))
		}
	}
}

// jitter is a moment in the last fifth before d: the beats of a fleet that came at once spread out.
func jitter(d time.Duration) time.Duration {
	return d - time.Duration(mrand.Float64()*float64(d)/5)
}

func trimmed(b []byte) string { return string(bytes.TrimSpace(b)) }
