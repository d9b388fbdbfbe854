// SPDX-License-Identifier: Apache-2.0

package controlplane

import (
	"context"
	"crypto/tls"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"time"

	"connectrpc.com/connect"

	"github.com/demarc-dev/demarc/api"
	"github.com/demarc-dev/demarc/api/channel"
	"github.com/demarc-dev/demarc/daemon"
	"github.com/demarc-dev/demarc/daemon/controlplane/limit"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/mesh"
)

// Bounds of a door.
const (
	queueMax      = 16384            // connections that wait for a handshake; the oldest goes first
	queueWait     = 10 * time.Second // for a handshake to begin: an appliance gives up after 20 s, and needs the rest to be up
	flightMax     = 512              // handshakes under way
	handshakeWait = 10 * time.Second // for one handshake
	silentWait    = time.Second      // after its coming for a peer's first byte, while all places are taken and others wait
	glance        = 50 * time.Millisecond
	peerWait      = 4 * time.Second // for all of a peer's bytes, then
	heavyWait     = time.Second     // the same, for a source with more than heavy handshakes under way, while others wait
	heavy         = flightMax / 8
	turnsEach     = 2               // handshakes that compute at once, for each processor
	stopWait      = 4 * time.Second // for channels to end at a stop
)

// Protocols lists what a door speaks, by ALPN: Connect over HTTP/2, and the channel.
func Protocols() []string { return []string{"h2", channel.Proto} }

// Door is one listener with the whole behaviour of a door of this role: admission, the handshake, channels, and calls. It is
// a [daemon.Part].
type Door struct {
	s    *Server
	name string
	ln   net.Listener
	conf *tls.Config
	log  *slog.Logger
	born time.Time

	mu     sync.Mutex
	queue  lines
	next   string             // source, behind a slash, of the connection that was popped and waits for a place
	flying map[*turn]struct{} // handshakes under way
	held   map[*turn]struct{} // connections whose handshake has begun, until they are closed
	wait   chan struct{}      // holds a token while the queue may have something
	opened chan struct{}      // closed when the door opens
	porch  bool               // another part takes connections; see [Door.Porch]

	wg    sync.WaitGroup  // handshakes, channels, and connections for calls
	life  context.Context // of what channels ask of the book: it ends after the door's last patience
	close context.CancelFunc
	calls map[net.Conn]*daemon.Calls
	serve http.Handler
}

// Door makes the part that serves ln, of whatever kind it is, with conf of [identity.Server] and [Protocols]. The part
// closes ln.
//
// A connection waits in the line of its source, first come first served, until a handshake can begin; the lines take
// turns. Of the handshakes under way only a few compute at once, and one that waits for its peer's bytes lets others
// compute: a slow peer holds nobody up, and where all places are taken and others wait, those who say nothing lose theirs. A
// storm of reconnections is served in order, at the speed of the processors.
func (s *Server) Door(name string, ln net.Listener, conf *tls.Config, log *slog.Logger) *Door {
	life, end := context.WithCancel(context.Background())
	return &Door{s: s, name: name, ln: ln, conf: conf, log: log, flying: map[*turn]struct{}{}, held: map[*turn]struct{}{}, wait: make(chan struct{}, 1), opened: make(chan struct{}),
		life: life, close: end, calls: map[net.Conn]*daemon.Calls{}, serve: s.Handler()}
}

// Porch makes the part that takes connections before the door opens, and while it is open: it starts earlier than the door,
// while the node still reads its book, and stops later. What nobody takes waits in the kernel's backlog, which holds a few
// thousand; the first bytes of others are dropped there, and repeated after 1, 3, 7 and 15 s. Call it before the door runs.
func (d *Door) Porch() daemon.Part {
	d.porch = true
	return daemon.Func(d.name+"-porch", func(ctx context.Context, ready func()) error {
		ready()
		var parts sync.WaitGroup
		parts.Go(func() { d.sweep(ctx) })
		err := d.accept(ctx)
		<-ctx.Done() // the door may have closed the listener
		parts.Wait()
		d.dismiss(time.Time{})
		return err
	})
}

// sweep closes the connections that have waited for too long for a door that does not open: they may find another node.
func (d *Door) sweep(ctx context.Context) {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-d.opened:
			return
		case <-tick.C:
			d.dismiss(time.Now().Add(-queueWait))
		}
	}
}

// dismiss closes the connections that have waited since before a time, or all of them where it is zero.
func (d *Door) dismiss(since time.Time) {
	d.mu.Lock()
	out := d.queue.before(since)
	d.mu.Unlock()
	for _, w := range out {
		d.s.meter.Rejected.Inc()
		_ = w.conn.Close()
	}
}

// Name implements [daemon.Part].
func (d *Door) Name() string { return d.name }

// Run implements [daemon.Part].
func (d *Door) Run(ctx context.Context, ready func()) error {
	d.born = time.Now()
	close(d.opened)
	own, cancel := context.WithCancel(ctx)
	defer cancel()
	failed := make(chan error, 1)
	var parts sync.WaitGroup
	if !d.porch {
		parts.Go(func() { failed <- d.accept(own) })
	}
	parts.Go(func() { d.admit(own) })
	ready()
	var err error
	select {
	case err = <-failed:
	case <-ctx.Done():
	}
	cancel()
	_ = d.ln.Close()
	d.endAll()
	parts.Wait()
	if !d.porch {
		d.dismiss(time.Time{}) // who came while admit ended
	}
	if ctx.Err() != nil {
		return nil
	}
	return err
}

var errStops = fault.New("controlplane.Channel", fault.Unavailable, "this node stops: come back to another, or to this one in a while")

// endAll ends the channels and the connections for calls of this door, and waits for them. Those that have not ended in order
// within stopWait are cut, and what they wait for is given up.
func (d *Door) endAll() {
	defer d.close()
	d.mu.Lock()
	for _, c := range d.calls {
		d.wg.Go(c.End)
	}
	d.mu.Unlock()
	for _, l := range d.s.channels.all() {
		if l.door == d {
			go l.end(errStops)
		}
	}
	done := make(chan struct{})
	go func() { d.wg.Wait(); close(done) }()
	select {
	case <-done:
		return
	case <-time.After(stopWait):
	}
	d.close()
	d.mu.Lock()
	for t := range d.held {
		go func() { _ = t.Close() }() // one that is not TCP may take its time
	}
	d.mu.Unlock()
	<-done
}

// hold keeps a connection whose handshake begins, so that the door can cut it. Its close lets go of it.
func (d *Door) hold(t *turn) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.held[t] = struct{}{}
}

func (d *Door) release(t *turn) {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.held, t)
}

// accept takes connections as they come: what waits in the kernel's backlog is retried by peers with ever longer pauses.
func (d *Door) accept(ctx context.Context) error {
	defer context.AfterFunc(ctx, func() { _ = d.ln.Close() })()
	for pause := time.Millisecond; ; {
		c, err := d.ln.Accept()
		if err != nil {
			if ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
				return nil
			}
			d.log.Warn("no connection can be taken", "part", d.name, "err", err, "again in", pause)
			select {
			case <-ctx.Done():
				return nil
			case <-time.After(pause):
			}
			pause = min(2*pause, time.Second)
			continue
		}
		pause = time.Millisecond
		mesh.KeepAlive(c)
		d.push(waiting{c, time.Now(), limit.NetworkOf(c)})
	}
}

func (d *Door) push(w waiting) {
	d.mu.Lock()
	out := d.queue.push(w, queueMax)
	d.mu.Unlock()
	if out != nil {
		d.s.meter.Rejected.Inc()
		_ = out.Close()
	}
	select {
	case d.wait <- struct{}{}:
	default:
	}
}

func (d *Door) pop() (waiting, bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	w, ok := d.queue.pop()
	if d.next = ""; ok {
		d.next = "/" + w.from
	}
	return w, ok
}

// admit begins handshakes, those of each source in the order of arrival.
func (d *Door) admit(ctx context.Context) {
	flight := make(chan struct{}, flightMax)
	for {
		w, ok := d.pop()
		for !ok && ctx.Err() == nil {
			select {
			case <-d.wait:
			case <-ctx.Done():
			}
			w, ok = d.pop()
		}
		if ok {
			d.place(ctx, flight)
		}
		if ctx.Err() != nil {
			for ; ok; w, ok = d.pop() {
				_ = w.conn.Close()
			}
			return
		}
		waited := time.Since(w.since)
		d.s.meter.Admission.Observe(waited.Seconds())
		if waited > queueWait {
			d.s.meter.Rejected.Inc()
			_ = w.conn.Close()
			<-flight
			continue
		}
		d.wg.Add(1)
		go d.shake(ctx, w, sync.OnceFunc(func() { <-flight }))
	}
}

// place takes a place among the handshakes under way. While there is none it makes one.
func (d *Door) place(ctx context.Context, flight chan<- struct{}) {
	for {
		select {
		case flight <- struct{}{}:
			return
		default:
		}
		select {
		case flight <- struct{}{}:
			return
		case <-ctx.Done():
			return
		case <-time.After(d.shed()):
		}
	}
}

// shed ends the handshake whose peer is overdue the most, if any is, and tells when to look again.
func (d *Door) shed() time.Duration {
	d.mu.Lock()
	defer d.mu.Unlock()
	under := map[string]int{}
	for t := range d.flying {
		under[t.from]++
	}
	var worst *turn
	var most time.Duration
	for t := range d.flying {
		wait := peerWait
		if under[t.from] > heavy && d.nextIsNot(t.from) {
			wait = heavyWait
		}
		if over := t.overdue(wait); worst == nil || over > most {
			worst, most = t, over
		}
	}
	if worst == nil || most < 0 {
		return min(max(-most, time.Millisecond), glance)
	}
	delete(d.flying, worst)
	d.s.meter.Rejected.Inc()
	go func() { _ = worst.Conn.Close() }() // one that is not TCP may take its time
	return time.Millisecond
}

// nextIsNot tells whether anyone from elsewhere waits. The lock is held.
func (d *Door) nextIsNot(from string) bool {
	return d.queue.others(from) || d.next != "" && d.next != "/"+from
}

// fly puts a handshake among those that shed looks at, or takes it away.
func (d *Door) fly(t *turn, under bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if under {
		d.flying[t] = struct{}{}
		return
	}
	delete(d.flying, t)
}

// shake does one handshake and hands the connection to what it chose. The channel goes on in a goroutine of its own:
// that of the handshake has grown a deep stack.
func (d *Door) shake(ctx context.Context, w waiting, landed func()) {
	defer landed()
	raw := w.conn
	t := &turn{Conn: raw, door: d, turns: d.s.turns, came: w.since, from: w.from}
	d.hold(t)
	handed := false
	defer func() {
		if v := recover(); v != nil {
			d.log.Error("a handshake panicked", "part", d.name, "panic", v)
		}
		if !handed {
			_ = t.Close()
			d.wg.Done()
		}
	}()
	begun := time.Now()
	d.fly(t, true)
	defer d.fly(t, false)
	c := tls.Server(t, d.conf)
	_ = raw.SetDeadline(begun.Add(handshakeWait))
	t.take()
	err := c.Handshake()
	t.give()
	t.turns = nil
	d.fly(t, false)
	if err != nil {
		d.log.Debug("no handshake", "part", d.name, "err", err)
		return
	}
	d.s.meter.Handshake.Observe(time.Since(begun).Seconds())
	_ = raw.SetDeadline(time.Time{})
	landed()
	if c.ConnectionState().NegotiatedProtocol != channel.Proto {
		d.s.sessions.watch(t, c.ConnectionState())
		if err := d.s.replica.View().RefusesConnection(c.ConnectionState()); err != nil {
			d.log.Warn("a peer was refused", "part", d.name, "err", err)
			return
		}
		handed = d.admitCalls(ctx, c)
		return
	}
	if l := d.s.greet(d, c); l != nil {
		d.s.meter.Arrival.Observe(time.Since(d.born).Seconds())
		handed = true
		if ctx.Err() != nil {
			go l.end(errStops)
		}
		go l.listen()
	}
}

// admitCalls serves the calls of a proven connection, within the bounds of its source or its member.
func (d *Door) admitCalls(ctx context.Context, c *tls.Conn) bool {
	h, who := d.serve, guestOf(c)
	out, err := d.s.guests.enter(c, who, d.s.CallsIdle)
	switch {
	case who.gone:
		d.s.meter.Crowded.Inc()
		return false
	case err != nil:
		d.s.meter.Crowded.Inc()
		h = refusedConn(err)
	case out != nil:
		d.s.meter.Displaced.Inc()
		out.leave()
	}
	calls := daemon.NewCalls(d.name, c, h, d.moved, d.log)
	d.mu.Lock()
	d.calls[c] = calls
	d.mu.Unlock()
	calls.Serve()
	d.s.guests.serve(c, calls)
	if ctx.Err() != nil { // endAll may have come before
		go calls.End()
	}
	return true
}

// refusedConn answers each call with err, and ends the connection after the first in order.
func refusedConn(err error) http.Handler {
	say := connect.NewErrorWriter()
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Connection", "close")
		_ = say.Write(w, r, api.ToWire(err))
	})
}

// moved takes what the server of a connection for calls says of it.
func (d *Door) moved(c net.Conn, st http.ConnState) {
	d.s.guests.moved(c, st)
	if st != http.StateClosed {
		return
	}
	d.mu.Lock()
	_, open := d.calls[c]
	delete(d.calls, c)
	d.mu.Unlock()
	if open {
		d.wg.Done()
	}
}
