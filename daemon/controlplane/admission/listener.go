// SPDX-License-Identifier: Apache-2.0

// Package admission admits connections fairly, does their TLS handshakes, and hands each to the protocol that it negotiated: calls over
// HTTP/2, or a channel. It does not know the book: which peers are accepted, and what is served, are functions in its configuration.
//
// Under a reconnect storm, handshakes run in arrival order within each network, round robin over the networks, and CPU-bound: a slow peer
// does not delay others.
package admission

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

// Bounds of a listener.
const (
	queueMax      = 16384            // connections that wait for a handshake; the oldest is closed first
	queueWait     = 10 * time.Second // for a handshake to begin: an appliance gives up after 20 s, and needs the rest to be up
	flightMax     = 512              // handshakes under way
	HandshakeWait = 10 * time.Second // for one handshake
	silentWait    = time.Second      // after its arrival for a peer's first byte, while all places are taken and others wait
	stallCheck    = 50 * time.Millisecond
	peerWait      = 4 * time.Second // total time to wait for a peer's bytes while stalled peers are evicted
	heavyWait     = time.Second     // the same, for a source with more than heavy handshakes under way, while others wait
	heavy         = flightMax / 8
	slotsEach     = 2               // handshakes that compute at once, for each processor
	StopWait      = 4 * time.Second // for channels to end at a stop
)

// Protocols lists the ALPN protocols of a listener: Connect over HTTP/2, and the channel.
func Protocols() []string { return []string{"h2", channel.Proto} }

// Listener admits the connections of one socket, does their handshakes, and hands each to the protocol that it negotiated. It is a
// [daemon.Part].
type Listener struct {
	desk *Desk
	name string
	ln   net.Listener
	conf *tls.Config
	log  *slog.Logger
	born time.Time

	mu           sync.Mutex
	queue        fairQueue
	next         string        // network, behind a slash, of the connection that was popped and waits for a place
	conns        connsOf       // those whose handshake has begun; guarded by mu
	wait         chan struct{} // holds a token while the queue may have something
	opened       chan struct{} // closed when the listener is served
	acceptsEarly bool          // another part accepts connections; see [Listener.AcceptEarly]

	wg   sync.WaitGroup // handshakes, channels, and connections for calls
	life lifetime       // of the calls that channels make: it ends when a stop has waited long enough
}

// connsOf is the connections of a listener.
type connsOf struct {
	inFlight map[*handshake]struct{}    // handshakes under way
	open     map[*handshake]struct{}    // all whose handshake has begun, until they are closed
	calls    map[net.Conn]*daemon.Calls // those that are served
	sessions map[Session]struct{}
}

type lifetime struct {
	ctx context.Context
	end context.CancelFunc
}

// Listener makes the part that serves ln, of whatever kind it is, with conf of [identity.Server] and [Protocols]. The part
// closes ln.
//
// A connection waits in the queue of its source until a handshake can begin; the queues are served round robin. Of the handshakes in
// flight only a few compute at once, and one that waits for its peer's bytes lets others compute. If all places are taken and others
// wait, silent peers are evicted.
func (k *Desk) Listener(name string, ln net.Listener, conf *tls.Config, log *slog.Logger) *Listener {
	ctx, end := context.WithCancel(context.Background())
	return &Listener{desk: k, name: name, ln: ln, conf: conf, log: log, wait: make(chan struct{}, 1), opened: make(chan struct{}),
		conns: connsOf{map[*handshake]struct{}{}, map[*handshake]struct{}{}, map[net.Conn]*daemon.Calls{}, map[Session]struct{}{}},
		life:  lifetime{ctx, end}}
}

// AcceptEarly makes the part that accepts connections from before the listener runs until after it stops: it starts while the node still
// reads its book. Connections that are not accepted wait in the kernel's backlog, which holds a few thousand; beyond that, packets are
// dropped and sent again after 1, 3, 7 and 15 s. Call it before the listener runs.
func (d *Listener) AcceptEarly() daemon.Part {
	d.acceptsEarly = true
	return daemon.Func(d.name+"-accept", func(ctx context.Context, ready func()) error {
		ready()
		var parts sync.WaitGroup
		parts.Go(func() { d.rejectOverdue(ctx) })
		err := d.accept(ctx)
		<-ctx.Done() // Run may have closed the socket
		parts.Wait()
		d.rejectQueued(time.Time{})
		return err
	})
}

// rejectOverdue closes the connections that have waited too long for the listener to run: they may find another node.
func (d *Listener) rejectOverdue(ctx context.Context) {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-d.opened:
			return
		case <-tick.C:
			d.rejectQueued(time.Now().Add(-queueWait))
		}
	}
}

// rejectQueued closes the connections that have waited since before a time, or all of them if it is zero.
func (d *Listener) rejectQueued(since time.Time) {
	d.mu.Lock()
	out := d.queue.before(since)
	d.mu.Unlock()
	for _, w := range out {
		d.desk.Meter.Rejected.Inc()
		_ = w.conn.Close()
	}
}

// Name implements [daemon.Part].
func (d *Listener) Name() string { return d.name }

// Run implements [daemon.Part].
func (d *Listener) Run(ctx context.Context, ready func()) error {
	d.born = time.Now()
	close(d.opened)
	own, cancel := context.WithCancel(ctx)
	defer cancel()
	failed := make(chan error, 1)
	var parts sync.WaitGroup
	if !d.acceptsEarly {
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
	if !d.acceptsEarly {
		d.rejectQueued(time.Time{}) // arrived while admit ended
	}
	if ctx.Err() != nil {
		return nil
	}
	return err
}

// ErrStops is why the channels of a node end when it stops.
var ErrStops = fault.New("controlplane.Channel", fault.Unavailable, "this node stops: come back to another, or to this one in a while")

// endAll drains the channels and the connections for calls of this listener, and waits for them. Those that have not ended within
// [StopWait] are closed, and their calls are cancelled.
func (d *Listener) endAll() {
	defer d.life.end()
	d.mu.Lock()
	for _, c := range d.conns.calls {
		d.wg.Go(c.End)
	}
	for s := range d.conns.sessions {
		s.End(ErrStops)
	}
	d.mu.Unlock()
	done := make(chan struct{})
	go func() { d.wg.Wait(); close(done) }()
	select {
	case <-done:
		return
	case <-time.After(StopWait):
	}
	d.life.end()
	d.mu.Lock()
	for t := range d.conns.open {
		go func() { _ = t.Close() }() // may block if it is not TCP
	}
	d.mu.Unlock()
	<-done
}

// hold registers a connection whose handshake begins, so that the listener can close it. Its Close removes it.
func (d *Listener) hold(t *handshake) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.conns.open[t] = struct{}{}
}

func (d *Listener) release(t *handshake) {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.conns.open, t)
}

// accept accepts connections as they arrive: peers that wait in the kernel's backlog retry with growing pauses.
func (d *Listener) accept(ctx context.Context) error {
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

func (d *Listener) push(w waiting) {
	d.mu.Lock()
	out := d.queue.push(w, queueMax)
	d.mu.Unlock()
	if out != nil {
		d.desk.Meter.Rejected.Inc()
		_ = out.Close()
	}
	select {
	case d.wait <- struct{}{}:
	default:
	}
}

func (d *Listener) pop() (waiting, bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	w, ok := d.queue.pop()
	if d.next = ""; ok {
		d.next = "/" + w.from
	}
	return w, ok
}

// admit begins handshakes, those of each source in the order of arrival.
func (d *Listener) admit(ctx context.Context) {
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
		d.desk.Meter.Admission.Observe(waited.Seconds())
		if waited > queueWait {
			d.desk.Meter.Rejected.Inc()
			_ = w.conn.Close()
			<-flight
			continue
		}
		d.wg.Add(1)
		go d.handshake(ctx, w, sync.OnceFunc(func() { <-flight }))
	}
}

// place takes a place among the handshakes in flight. While there is none, it evicts stalled ones.
func (d *Listener) place(ctx context.Context, flight chan<- struct{}) {
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
		case <-time.After(d.evictStalled()):
		}
	}
}

// evictStalled ends the handshake whose peer is overdue the most, if any is, and returns when to check again.
func (d *Listener) evictStalled() time.Duration {
	d.mu.Lock()
	defer d.mu.Unlock()
	under := map[string]int{}
	for t := range d.conns.inFlight {
		under[t.network]++
	}
	var worst *handshake
	var most time.Duration
	for t := range d.conns.inFlight {
		wait := peerWait
		if under[t.network] > heavy && d.nextIsNot(t.network) {
			wait = heavyWait
		}
		if over := t.overdue(wait); worst == nil || over > most {
			worst, most = t, over
		}
	}
	if worst == nil || most < 0 {
		return min(max(-most, time.Millisecond), stallCheck)
	}
	delete(d.conns.inFlight, worst)
	d.desk.Meter.Rejected.Inc()
	go func() { _ = worst.Conn.Close() }() // may block if it is not TCP
	return time.Millisecond
}

// nextIsNot reports whether a connection of another network waits. The caller holds mu.
func (d *Listener) nextIsNot(from string) bool {
	return d.queue.others(from) || d.next != "" && d.next != "/"+from
}

// setInFlight adds a handshake to those that evictStalled checks, or removes it.
func (d *Listener) setInFlight(t *handshake, under bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if under {
		d.conns.inFlight[t] = struct{}{}
		return
	}
	delete(d.conns.inFlight, t)
}

// handshake does one handshake and hands the connection to the protocol that it negotiated. A channel runs in another goroutine, because
// the handshake has grown the stack of this one.
func (d *Listener) handshake(ctx context.Context, w waiting, landed func()) {
	defer landed()
	raw := w.conn
	t := &handshake{Conn: raw, listener: d, slots: d.desk.slots, accepted: w.since, network: w.from}
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
	d.setInFlight(t, true)
	defer d.setInFlight(t, false)
	c := tls.Server(t, d.conf)
	_ = raw.SetDeadline(begun.Add(HandshakeWait))
	t.acquire()
	err := c.Handshake()
	t.release()
	t.slots = nil
	d.setInFlight(t, false)
	if err != nil {
		d.log.Debug("no handshake", "part", d.name, "err", err)
		return
	}
	d.desk.Meter.Handshake.Observe(time.Since(begun).Seconds())
	_ = raw.SetDeadline(time.Time{})
	landed()
	if c.ConnectionState().NegotiatedProtocol != channel.Proto {
		closed := d.desk.Opened(func() { _ = t.Close() }, c.ConnectionState())
		t.closed.Store(&closed)
		if err := d.desk.Verified(c.ConnectionState()); err != nil {
			d.log.Warn("a peer was refused", "part", d.name, "err", err)
			return
		}
		handed = d.admitCalls(ctx, c)
		return
	}
	if l := d.desk.Channel(d.life.ctx, c); l != nil {
		d.desk.Meter.Arrival.Observe(time.Since(d.born).Seconds())
		handed = true
		d.session(l, true)
		if ctx.Err() != nil { // endAll may have run before
			l.End(ErrStops)
		}
		go func() {
			defer d.wg.Done()
			defer d.session(l, false)
			l.Serve()
		}()
	}
}

// session adds a channel, or removes one that has ended.
func (d *Listener) session(l Session, open bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if open {
		d.conns.sessions[l] = struct{}{}
		return
	}
	delete(d.conns.sessions, l)
}

// admitCalls serves the calls of a connection after its handshake, within the quota of its owner.
func (d *Listener) admitCalls(ctx context.Context, c *tls.Conn) bool {
	h, who := d.desk.Calls, ownerOf(c)
	out, err := d.desk.conns.enter(c, who, d.desk.CallsIdle)
	switch {
	case who.refused:
		d.desk.Meter.Crowded.Inc()
		return false
	case err != nil:
		d.desk.Meter.Crowded.Inc()
		h = refuseAll(err)
	case out != nil:
		d.desk.Meter.Displaced.Inc()
		out.leave()
	}
	calls := daemon.NewCalls(d.name, c, h, d.stateChanged, d.log)
	d.mu.Lock()
	d.conns.calls[c] = calls
	d.mu.Unlock()
	calls.Serve()
	d.desk.conns.serve(c, calls)
	if ctx.Err() != nil { // endAll may have run before
		go calls.End()
	}
	return true
}

// refuseAll answers each call with err, and drains the connection after the first.
func refuseAll(err error) http.Handler {
	say := connect.NewErrorWriter()
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Connection", "close")
		_ = say.Write(w, r, api.ToWire(err))
	})
}

// stateChanged handles a state change that the server of a connection for calls reports.
func (d *Listener) stateChanged(c net.Conn, st http.ConnState) {
	d.desk.conns.stateChanged(c, st)
	if st != http.StateClosed {
		return
	}
	d.mu.Lock()
	_, open := d.conns.calls[c]
	delete(d.conns.calls, c)
	d.mu.Unlock()
	if open {
		d.wg.Done()
	}
}
