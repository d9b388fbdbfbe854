// SPDX-License-Identifier: Apache-2.0

package ingress

import (
	"context"
	"crypto/tls"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"time"

	"github.com/demarc-dev/demarc/fault"
)

// Opener opens a listener on one side. It is called by one goroutine at a time.
type Opener interface {
	Open(ctx context.Context, addr string) (net.Listener, error)
}

// Peer is who is behind a connection on the tailnet, as the tailnet's node knows it.
type Peer struct {
	Login string   // of a person; empty for a tagged device
	Name  string   // for display
	Node  string   // the device
	Tags  []string // of a tagged device
}

// Knower is a further power of an Opener: it tells who is behind a connection. The answers become identity headers.
type Knower interface {
	WhoIs(ctx context.Context, remote netip.AddrPort) (Peer, error)
}

// HostNet opens doors on the host's own network.
type HostNet struct{}

// Open listens on a TCP address.
func (HostNet) Open(ctx context.Context, addr string) (net.Listener, error) {
	return new(net.ListenConfig).Listen(ctx, "tcp", addr)
}

// Config is what a gate works with. Zero limits take the defaults.
type Config struct {
	Host        Opener // nil: no door on the host
	Tailnet     Opener // nil: no door on a tailnet
	Certificate func(*tls.ClientHelloInfo) (*tls.Certificate, error)
	Logger      *slog.Logger
	Refused     func(Refusal) // counts who is turned away though the plan admits it; nil: nobody counts
	HeaderWait  time.Duration // for a PROXY header, a TLS handshake, an HTTP header; default 10 s

	// Over all doors together. Connections above a bound are closed at accept, requests above one are told to come back.
	MaxConns          int // default 8192
	ConnsPerSource    int // default an eighth of MaxConns
	MaxRequests       int // under way at once; default twice MaxConns
	RequestsPerSource int // default an eighth of MaxRequests
}

// Gate keeps the open doors equal to a plan. Safe for concurrent use.
type Gate struct {
	cfg Config
	web *web

	conned  *share // connections
	asked   *share // requests under way
	notices notices

	setting sync.Mutex // one change at a time; held while doors are opened

	mu     sync.Mutex // guards what follows; never held while anything blocks
	plan   Plan
	doors  map[place]*door
	conns  map[*conn]struct{}
	closed bool

	ctx    context.Context // of all work behind the doors
	cancel context.CancelFunc
	work   sync.WaitGroup
}

// door is an open listener and what the plan says of it.
type door struct {
	Door
	listener net.Listener
	gone     bool // closed by the gate
	failed   error
}

// New gives a gate without any door.
func New(cfg Config) *Gate {
	if cfg.MaxConns <= 0 {
		cfg.MaxConns = 8192
	}
	if cfg.MaxRequests <= 0 {
		cfg.MaxRequests = 2 * cfg.MaxConns
	}
	if cfg.ConnsPerSource <= 0 {
		cfg.ConnsPerSource = max(1, cfg.MaxConns/8)
	}
	if cfg.RequestsPerSource <= 0 {
		cfg.RequestsPerSource = max(1, cfg.MaxRequests/8)
	}
	if cfg.HeaderWait <= 0 {
		cfg.HeaderWait = 10 * time.Second
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	g := &Gate{cfg: cfg, plan: Plan{Version: Version}, doors: map[place]*door{}, conns: map[*conn]struct{}{},
		conned: newShare(cfg.MaxConns, cfg.ConnsPerSource), asked: newShare(cfg.MaxRequests, cfg.RequestsPerSource),
		notices: notices{log: cfg.Logger}}
	g.ctx, g.cancel = context.WithCancel(context.Background())
	g.web = newWeb(g)
	g.work.Go(func() {
		if err := g.web.server.Serve(g.web); err != nil && !errors.Is(err, http.ErrServerClosed) {
			g.cfg.Logger.Error("the doors' web server ended", "err", err)
		}
	})
	return g
}

// Set makes the open doors equal to p, all or nothing: new doors are opened first, and if one can't be, the old doors stand
// as they were and the error says which. Then the rules are swapped at once, doors that are no longer in the plan are
// closed, and connections that the plan no longer allows are cut. Setting the same plan again opens doors that failed since.
func (g *Gate) Set(ctx context.Context, p Plan) error {
	const op = "ingress.Set"
	if err := p.Check(); err != nil {
		return fault.At(op, "", err)
	}
	g.setting.Lock()
	defer g.setting.Unlock()

	fresh, err := g.openMissing(ctx, p)
	if err != nil {
		for _, d := range fresh {
			_ = d.listener.Close() // nothing was accepted on it
		}
		return err
	}

	g.mu.Lock()
	if g.closed {
		g.mu.Unlock()
		for _, d := range fresh {
			_ = d.listener.Close()
		}
		return fault.New(op, fault.Unavailable, "the gate is closed")
	}
	next, byName := make(map[place]*door, len(p.Doors)), make(map[string]Door, len(p.Doors))
	for _, want := range p.Doors {
		d := fresh[want.place()]
		if d == nil {
			d = g.doors[want.place()]
			d.Door = want
		}
		next[want.place()], byName[want.Name] = d, want
	}
	var shut []net.Listener
	for at, d := range g.doors {
		if next[at] != d {
			d.gone = true
			shut = append(shut, d.listener)
		}
	}
	g.plan, g.doors = p, next
	for _, d := range fresh {
		g.work.Go(func() { g.accept(d) })
	}
	var cut []*conn
	for c := range g.conns {
		want, ok := byName[c.door.Name]
		if ok && c.admitted && want.keeps(c.door, c.source) || ok && !c.admitted && next[c.door.place()] != nil {
			c.door = want
			continue
		}
		cut = append(cut, c)
	}
	g.mu.Unlock()

	for _, l := range shut {
		_ = l.Close() // it accepts no more either way
	}
	for _, c := range cut {
		_ = c.abort() // the peer may have gone first
	}
	if len(fresh)+len(shut)+len(cut) > 0 {
		g.cfg.Logger.Info("doors changed", "posture", string(p.Posture.Exposure), "open", len(next), "opened", len(fresh), "closed", len(shut),
			"cut", len(cut))
	}
	return nil
}

// openMissing opens the doors of p that do not stand open. On an error it gives those that it had opened.
func (g *Gate) openMissing(ctx context.Context, p Plan) (map[place]*door, error) {
	const op = "ingress.Set"
	fresh := map[place]*door{}
	for _, want := range p.Doors {
		g.mu.Lock()
		have := g.doors[want.place()]
		standing := have != nil && have.failed == nil
		g.mu.Unlock()
		if want.TLS == TLSFiles && g.cfg.Certificate == nil {
			return fresh, fault.New(op, fault.Invalid, "door %q ends TLS and there is no certificate: set ingress.tls", want.Name)
		}
		if standing {
			continue
		}
		opener := g.cfg.Host
		if want.Side == Tailnet {
			opener = g.cfg.Tailnet
		}
		if opener == nil {
			return fresh, fault.New(op, fault.Unavailable, "door %q: this appliance has no %s to open it on", want.Name, want.Side)
		}
		l, err := opener.Open(ctx, want.Addr)
		if err != nil {
			return fresh, fault.Because(err, op, fault.Unavailable, "door %q can't be opened at %s on the %s; the doors of before stay as they were",
				want.Name, want.Addr, want.Side)
		}
		fresh[want.place()] = &door{Door: want, listener: l}
	}
	return fresh, nil
}

// Plan gives the plan that the doors were last made equal to.
func (g *Gate) Plan() Plan {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.plan
}

// Standing is the state of one door.
type Standing struct {
	Name string
	Addr net.Addr
	Err  error // not nil: the listener failed by itself; Set opens it again
}

// Doors tells how the doors of the plan stand, in the order of the plan.
func (g *Gate) Doors() []Standing {
	g.mu.Lock()
	defer g.mu.Unlock()
	out := make([]Standing, 0, len(g.plan.Doors))
	for _, want := range g.plan.Doors {
		d := g.doors[want.place()]
		out = append(out, Standing{Name: d.Name, Addr: d.listener.Addr(), Err: d.failed})
	}
	return out
}

// Close shuts every door, cuts every connection and returns when no goroutine is left.
func (g *Gate) Close() error {
	g.setting.Lock()
	defer g.setting.Unlock()
	g.mu.Lock()
	g.closed = true
	var shut []*door
	for _, d := range g.doors {
		d.gone = true
		shut = append(shut, d)
	}
	var cut []*conn
	for c := range g.conns {
		cut = append(cut, c)
	}
	g.doors, g.plan = map[place]*door{}, Plan{Version: Version}
	g.mu.Unlock()
	g.cancel()
	var errs []error
	for _, d := range shut {
		if err := d.listener.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
			errs = append(errs, err)
		}
	}
	for _, c := range cut {
		_ = c.abort() // the peer may have gone first
	}
	if err := g.web.close(); err != nil {
		errs = append(errs, err)
	}
	g.work.Wait()
	return fault.At("ingress.Close", fault.Internal, errors.Join(errs...))
}

// accept serves one listener until it is closed.
func (g *Gate) accept(d *door) {
	wait := time.Millisecond
	for {
		raw, err := d.listener.Accept()
		if err == nil {
			wait = time.Millisecond
			g.enter(d, raw)
			continue
		}
		g.mu.Lock()
		gone, name := d.gone, d.Name
		passing := temporary(err)
		if !gone && !passing {
			d.failed = err
		}
		g.mu.Unlock()
		if gone {
			return
		}
		if passing {
			g.notices.warn("a door accepts no connection for the moment", "door", name, "err", err)
		} else {
			g.cfg.Logger.Warn("a door accepts no connection any more", "door", name, "err", err)
			_ = d.listener.Close() // it has failed already
			return
		}
		select { // out of files, for instance: others must close first
		case <-time.After(wait):
			wait = min(2*wait, time.Second)
		case <-g.ctx.Done():
			return
		}
	}
}

func temporary(err error) bool {
	var t interface{ Temporary() bool }
	return errors.As(err, &t) && t.Temporary() //nolint:staticcheck // what else tells EMFILE from a dead listener on any kind of listener
}
