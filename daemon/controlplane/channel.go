// SPDX-License-Identifier: Apache-2.0

package controlplane

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/demarc-dev/demarc/api"
	boundaryv1 "github.com/demarc-dev/demarc/api/boundary/v1"
	"github.com/demarc-dev/demarc/api/boundary/v1/boundaryv1connect"
	"github.com/demarc-dev/demarc/api/channel"
	"github.com/demarc-dev/demarc/daemon/controlplane/book"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/identity"
)

// Timing of a channel.
const (
	helloWait = 10 * time.Second // for the first message
	writeWait = 10 * time.Second // for an appliance to take one message, unless the options say another
	linger    = time.Second      // for an appliance to read why its channel ends
	submitFor = 15 * time.Second // for one change of the book

	minBeat   = 5 * time.Second // between two beats of a small fleet
	beatsEach = 200             // beats a second of a fleet whose roads are not known to bear silence, before channel.KnownQuiet
	rareEach  = 3               // beats a second of one whose roads the kernels watch, before channel.MaxQuiet

	backEach  = 1500 // appliances a second that a node takes back
	minSpread = 200 * time.Millisecond
)

// live is one channel. A goroutine of its own reads; whoever has something to say writes, under mu. There are ten
// thousand of these: no timer, no context and no second goroutine stands for an idle one, and what takes a deep stack runs
// in a goroutine that ends with it. A stack that has grown stays: of the reader's, less than a quarter is hardly ever in
// use, and only such a one is shrunk.
type live struct {
	s      *Server
	life   context.Context // of what it asks of the book
	conn   *tls.Conn
	name   fleet.ApplianceID
	serial fleet.Serial
	issuer fleet.Digest // the CA of its certificate
	by     fleet.Principal
	beat   time.Duration // that it was told
	epoch  fleet.Epoch   // of the book, as it was told

	heard  atomic.Int64  // when something was heard last, as patience counts time
	asked  atomic.Int64  // when the first order was written since then; 0 for none
	look   time.Duration // when patience looks at it again; guarded by its lock
	looked int           // its place among those; the same

	upto  atomic.Uint64 // reports to acknowledge
	owes  atomic.Uint64 // number of a bundle that it says it holds and that this node has not met yet; 0 for none
	busy  atomic.Int32  // idle, running, again: is there a goroutine that writes what the book has
	ended atomic.Pointer[ending]

	mu     sync.Mutex // held to write
	sent   uint64     // orders
	bundle uint64     // number of the newest one that was sent
	held   uint64     // number of the one that it said in hello that it holds; set before the channel is shared
	acked  uint64     // reports
}

// ending is why a channel ends, and until when what still comes is read and thrown away.
type ending struct {
	why  error
	till time.Time
}

// What busy says.
const (
	idle int32 = iota
	running
	again
)

// greet takes a connection on which TLS has agreed on the channel: it says who may have one, reads hello, puts the
// appliance's coming on record and says welcome. It gives nil where it closed the connection.
func (s *Server) greet(life context.Context, c *tls.Conn) *live {
	l, err := s.begin(life, c)
	if err == nil {
		return l
	}
	if !errors.Is(err, io.EOF) {
		s.log.Debug("no channel", "error", err)
		_ = c.SetDeadline(time.Now().Add(linger))
		var old stale
		if errors.As(err, &old) {
			_ = channel.Write(c, &boundaryv1.Down{Body: &boundaryv1.Down_Welcome{Welcome: &boundaryv1.Welcome{Node: s.replica.Node, ServerTimeUnix: s.replica.Now().Unix(), Epoch: epochToWire(old.epoch)}}}, channel.MaxDown)
		}
		_ = channel.Write(c, closed(err, s.spread()), channel.MaxDown)
		_ = c.CloseWrite()
		_, _ = io.Copy(io.Discard, io.LimitReader(c, channel.MaxHello)) // unread bytes would turn the close into a reset
	}
	_ = c.Close()
	return nil
}

func (s *Server) begin(life context.Context, c *tls.Conn) (*live, error) {
	const op = "controlplane.Channel"
	state := c.ConnectionState()
	who := api.Who{Class: api.Stranger}
	if len(state.PeerCertificates) > 0 {
		p, serial, err := identity.PrincipalOf(&state)
		if err != nil {
			return nil, err
		}
		who = api.Who{Class: api.ClassOf(p), Principal: p, Serial: serial, Issuer: identity.IssuerOf(&state)}
	}
	ctx, cancel := context.WithTimeout(life, submitFor)
	defer cancel()
	if !api.May(who, boundaryv1connect.BoundaryChannelProcedure) {
		s.refusals.Call(ctx, who, boundaryv1connect.BoundaryChannelProcedure)
		return nil, fault.New(op, fault.Denied, "a channel is for appliances, and the caller is of the class %s", who.Class)
	}
	_, _, id, _ := who.Principal.Split()
	l := &live{s: s, life: life, conn: c, name: fleet.ApplianceID(id), serial: who.Serial, issuer: who.Issuer, by: who.Principal}
	first, err := s.hello(l.name, c)
	if err != nil {
		return nil, err
	}
	hello := first.GetHello()
	if hello == nil {
		return nil, fault.New(op, fault.Invalid, "the first message of a channel is hello")
	}
	l.beat = s.beat(time.Duration(hello.GetQuietMs()) * time.Millisecond)
	if err := s.came(ctx, l, hello.GetRoute()); err != nil {
		return nil, err
	}
	restart, err := s.meet(ctx, l, hello)
	if err != nil {
		return nil, err
	}
	l.held = hello.GetBundleHeld()
	if err := s.holds(ctx, l, l.held); err != nil {
		return nil, err
	}
	_ = c.SetReadDeadline(time.Time{}) // patience ends it from now on
	l.busy.Store(running)              // until listen, nobody else writes
	if old := s.channels.take(l); old != nil {
		go old.end(errReplaced)
	}
	s.owed(s.replica.View(), l)            // the book may have caught up before the hub saw the channel
	a, err := l.admitted(s.replica.View()) // what was changed since the handshake the hub did not tell this channel
	if err == nil && !a.Online {           // the older one's edge came between, and the hub saw no channel
		go s.assert(l, hello.GetRoute())
	}
	if err != nil {
		s.left(l)
		return nil, err
	}
	if err := l.welcome(restart); err != nil {
		s.left(l)
		return nil, err
	}
	return l, nil
}

// hello reads the first message. Of the connections of one appliance that say none, the oldest gives way.
func (s *Server) hello(name fleet.ApplianceID, c *tls.Conn) (first *boundaryv1.Up, err error) {
	if old := s.channels.greet(name, c); old != nil {
		s.desk.Meter.Displaced.Inc()
		_ = old.NetConn().Close()
	}
	defer s.channels.greetedBy(name, c)
	_ = c.SetReadDeadline(time.Now().Add(helloWait))
	first = &boundaryv1.Up{}
	return first, channel.Read(c, first, channel.MaxHello)
}

// came puts an appliance's coming on record, where the book does not say so already: after a restart of a node all of
// its appliances come back, and none of them is news.
func (s *Server) came(ctx context.Context, l *live, route string) error {
	if route != "https" && route != "privatelink" && route != "tailscale" {
		route = "unknown"
	}
	a, err := s.replica.View().Appliance(l.name)
	if err == nil && a.Online && a.Node == s.replica.Node && a.Route == route && a.Current == l.serial {
		return a.Accepts(l.serial)
	}
	if err := s.comes(ctx, l.name); err != nil {
		return err
	}
	_, err = book.Submit(ctx, s.replica, l.by, "", book.Edge{Name: l.name, Serial: l.serial, Online: true, Node: s.replica.Node, Route: route})
	return err
}

// welcome says the first word. Nobody else writes before it, since busy says running.
func (l *live) welcome(restart *boundaryv1.Restart) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	a, err := l.s.replica.View().Appliance(l.name)
	if err != nil {
		return err
	}
	l.acked = a.ReportsDone
	return l.write(&boundaryv1.Down{Body: &boundaryv1.Down_Welcome{Welcome: &boundaryv1.Welcome{Node: l.s.replica.Node, ServerTimeUnix: l.s.replica.Now().Unix(),
		ReportsDone: a.ReportsDone, ReconnectSpreadMs: uint32(l.s.spread().Milliseconds()), BeatMs: uint32(l.beat.Milliseconds()),
		Epoch: epochToWire(l.epoch), Restart: restart}}})
}

// fleet is how many appliances may come here: any of them, where other nodes are down.
func (s *Server) fleet() int { return s.replica.View().ApplianceCount() }

func (s *Server) beat(quiet time.Duration) time.Duration {
	if s.Beat > 0 {
		return s.Beat
	}
	return beatFor(s.fleet(), quiet)
}

func (s *Server) spread() time.Duration { return spreadFor(s.fleet()) }

// Serve reads until the channel ends. It runs in a goroutine of its own, which is all that an idle channel has.
func (l *live) Serve() {
	defer func() {
		if v := recover(); v != nil {
			l.s.log.Error("a channel panicked", "appliance", l.name, "panic", v)
		}
		l.s.patience.forget(l)
		_ = l.conn.NetConn().Close()
		l.s.left(l)
	}()
	l.heard.Store(int64(l.s.patience.now()))
	l.s.patience.keep(l)
	go l.finish()
	for {
		if err := l.hear(); err != nil {
			l.end(err)
			_ = l.conn.SetReadDeadline(l.ended.Load().till)
			_, _ = io.Copy(io.Discard, l.conn) // bytes that nobody read would turn the close into a reset, and lose the reason
			return
		}
	}
}

var errEnded = errors.New("the channel has ended")

// hear takes one message of the appliance.
func (l *live) hear() error {
	var up boundaryv1.Up
	if err := channel.Read(l.conn, &up, channel.MaxUp); err != nil {
		return err
	}
	l.heard.Store(int64(l.s.patience.now()))
	l.asked.Store(0)
	if l.ended.Load() != nil {
		return errEnded
	}
	if _, ok := up.GetBody().(*boundaryv1.Up_Beat); ok {
		l.mu.Lock()
		defer l.mu.Unlock()
		return l.write(&boundaryv1.Down{Body: &boundaryv1.Down_Beat{Beat: &boundaryv1.Beat{AtUnixMs: l.s.replica.Now().UnixMilli()}}})
	}
	return l.aside(&up)
}

// aside takes what is no beat, in a goroutine that ends with it: a change of the book takes a deep stack.
func (l *live) aside(up *boundaryv1.Up) error {
	done := make(chan error, 1)
	go func() {
		defer func() {
			if v := recover(); v != nil {
				done <- fault.New("controlplane.Channel", fault.Internal, "the message made this build fail: %v", v)
			}
		}()
		ctx, cancel := context.WithTimeout(l.life, submitFor)
		defer cancel()
		done <- l.s.hear(ctx, l, up)
	}()
	return <-done
}

// due is when silence ends the channel, as patience counts time.
func (l *live) due() time.Duration {
	due := time.Duration(l.heard.Load()) + channel.Patience(l.beat)
	if asked := l.asked.Load(); asked > 0 {
		due = min(due, time.Duration(asked)+channel.Answer)
	}
	return due
}

// hear takes what an appliance says beside beats.
func (s *Server) hear(ctx context.Context, l *live, up *boundaryv1.Up) error {
	switch body := up.GetBody().(type) {
	case *boundaryv1.Up_Ack:
		return s.done(ctx, l.by, l.name, body.Ack.GetUpto())
	case *boundaryv1.Up_BundleHeld:
		return s.holds(ctx, l, body.BundleHeld)
	case *boundaryv1.Up_Report:
		if err := s.admit(ctx, l.name, proto.Size(body.Report), body.Report.GetStatus() != nil); err != nil {
			return err
		}
		l.heard.Store(int64(s.patience.now())) // it may have been made to wait
		r, err := reportOf(l.name, body.Report)
		if err != nil {
			return err
		}
		if st := body.Report.GetStatus(); st != nil {
			if err := s.troubles(ctx, l, r.Number, st.GetRoads()); err != nil {
				return err
			}
		}
		took, err := book.Submit(ctx, s.replica, l.by, "", s.evidence.WithoutInvalid(r))
		if err != nil {
			return err
		}
		if took.Reason != "" {
			s.log.Warn("a report came to nothing", "appliance", l.name, "number", r.Number, "reason", took.Reason)
		}
		l.upto.Store(took.Done) // only this goroutine stores it
		l.wake()
		if took.New && r.Checkpoint != nil {
			return s.evidence.Countersign(ctx, l.name, *r.Checkpoint)
		}
		return nil
	}
	return fault.New("controlplane.Channel", fault.Invalid, "a message that this build does not know")
}

// done records an acknowledgement where it says something new.
func (s *Server) done(ctx context.Context, by fleet.Principal, name fleet.ApplianceID, upto uint64) error {
	a, err := s.replica.View().Appliance(name)
	if err != nil || upto <= a.OrdersDone {
		return err
	}
	_, err = book.Submit(ctx, s.replica, by, "", book.OrdersDone{Name: name, Upto: upto})
	return err
}

// wake has what the book holds for the appliance written soon, by a goroutine that lives as long as that takes.
func (l *live) wake() {
	if l.busy.CompareAndSwap(idle, running) {
		go l.finish()
		return
	}
	l.busy.CompareAndSwap(running, again)
	if l.busy.CompareAndSwap(idle, running) { // it finished in between
		go l.finish()
	}
}

// finish writes until there is nothing new. Its caller has set busy to running.
func (l *live) finish() {
	for {
		l.busy.Store(running)
		if err := l.say(); err != nil {
			l.end(err)
			return // busy stays: nobody writes any more
		}
		if l.busy.CompareAndSwap(running, idle) {
			return
		}
	}
}

// say writes the orders and acknowledgements that are new, or gives the reason why the appliance may have no channel.
func (l *live) say() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	a, err := l.admitted(l.s.replica.View())
	if err != nil {
		return err
	}
	if l.s.replica.View().Epoch().Epoch != l.epoch {
		return fault.New("controlplane.Channel", fault.Unavailable, "another epoch of the book has begun: come again")
	}
	if number := l.s.replica.View().Bundle(); number > max(l.bundle, min(a.Bundle, l.held)) { // who lost what it had stored says so in hello
		sealed, err := l.s.authority.SignedBundle()
		if err != nil {
			return err
		}
		if err := l.write(&boundaryv1.Down{Body: &boundaryv1.Down_Bundle{Bundle: sealed}}); err != nil {
			return err
		}
		l.bundle = number
	}
	l.sent = max(l.sent, a.OrdersDone)
	if l.sent < a.OrdersSent() && l.ended.Load() == nil { // whoever ends it sets a deadline of its own, under mu
		l.expect()
	}
	for ; l.sent < a.OrdersSent(); l.sent++ {
		if err := l.write(orderToWire(a.Orders[l.sent-a.OrdersDone], l.sent+1, l.epoch)); err != nil {
			return err
		}
	}
	if upto := l.upto.Load(); upto > l.acked {
		l.acked = upto
		return l.write(&boundaryv1.Down{Body: &boundaryv1.Down_Ack{Ack: &boundaryv1.Ack{Upto: upto}}})
	}
	return nil
}

// expect has the channel end where nothing is heard soon after an order. It comes before the order is written: the answer
// may be there before the write returns. A later order does not put that off.
func (l *live) expect() {
	if l.asked.CompareAndSwap(0, int64(l.s.patience.now())) {
		l.s.patience.sooner(l)
	}
}

// write sends one message. The caller holds mu. An appliance that does not read loses its channel after writeWait. The
// deadline is taken away at once: it would wake the process when it has passed.
func (l *live) write(m *boundaryv1.Down) error {
	if l.ended.Load() != nil {
		return errEnded
	}
	_ = l.conn.SetWriteDeadline(time.Now().Add(l.s.WriteWait))
	err := channel.Write(l.conn, m, channel.MaxDown)
	_ = l.conn.SetWriteDeadline(time.Time{}) // end sets its own once it holds mu
	return err
}

// End ends the channel as end does, and returns at once.
func (l *live) End(why error) { go l.end(why) }

// end ends the channel, once: it says why, as far as the appliance takes it at once, and reads on for a moment, so that
// the reason is not lost in a reset. It waits for an appliance that does not read no longer than linger.
func (l *live) end(why error) {
	e := &ending{why, time.Now().Add(linger)}
	if !l.ended.CompareAndSwap(nil, e) {
		return
	}
	_ = l.conn.SetWriteDeadline(e.till) // of who writes now, too
	if errors.Is(why, io.EOF) || !l.lockBy(e.till) {
		_ = l.conn.NetConn().Close()
		return
	}
	defer l.mu.Unlock()
	_ = l.conn.SetWriteDeadline(e.till)
	if err := channel.Write(l.conn, closed(why, l.s.spread()), channel.MaxDown); err != nil {
		_ = l.conn.NetConn().Close()
		return
	}
	_ = l.conn.CloseWrite()
	_ = l.conn.SetReadDeadline(e.till)
}

// lockBy waits until till at most for who writes now: a reason is not lost because an order was on its way.
func (l *live) lockBy(till time.Time) bool {
	for !l.mu.TryLock() {
		if !time.Now().Before(till) {
			return false
		}
		time.Sleep(time.Millisecond)
	}
	return true
}

// closed is the last message of a channel. Whoever may come back is told when.
func closed(why error, spread time.Duration) *boundaryv1.Down {
	c := &boundaryv1.Closed{Kind: string(fault.Of(why)), Reason: fault.Text(why)}
	switch fault.Of(why) {
	case fault.Busy, fault.Unavailable, fault.NotLeader, fault.Unsure:
		c.RetryAfterMs = uint32(spread.Milliseconds())
	}
	return &boundaryv1.Down{Body: &boundaryv1.Down_Closed{Closed: c}}
}

// left puts the edge on record when the channel was the appliance's newest.
func (s *Server) left(l *live) {
	if !s.channels.drop(l) || s.leaving.Load() { // one entry has said it for all
		return
	}
	s.gone(l.life, l.name)
}

// gone puts on record that an appliance has no channel here. What can't be recorded while the node stops, the roll call tells.
func (s *Server) gone(ctx context.Context, name fleet.ApplianceID) {
	life := ctx
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	if _, err := book.Submit(ctx, s.replica, s.replica.Self(), "", book.Edge{Name: name, Online: false, Node: s.replica.Node}); err != nil && life.Err() == nil {
		s.log.Warn("could not record that an appliance left", "appliance", name, "error", err)
	}
}
