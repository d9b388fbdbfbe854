// SPDX-License-Identifier: Apache-2.0

package mesh

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"slices"
	"sync"
	"time"

	"github.com/demarc-dev/demarc/fault"
)

// Session is the work over one connection. It owns the connection until it returns, calls up once its channel stands (TLS
// done, the peer proven), and returns when ctx ends: then another session has taken its streams over, or all is to end.
type Session func(ctx context.Context, route string, c net.Conn, up func()) error

// RetryAfter is what an error of a session may tell: the peer asks not to be called before then.
type RetryAfter interface{ RetryAfter() time.Duration }

// Silent is what an error of a session may tell: the line went dead without a word, as into a black hole. A dial there would
// hang as well, so the other routes are tried before that one.
type Silent interface{ Silent() bool }

// SwitchConfig is what a switch works with. Zero times take the defaults.
type SwitchConfig struct {
	Routes   []Route // in the customer's order
	Rand     func() float64
	Logger   *slog.Logger
	Attempt  time.Duration // to dial and to be up; default 20 s
	Base     time.Duration // of the wait after a round in which no route worked; doubles; default 500 ms
	Cap      time.Duration // of that wait; default 30 s
	Stable   time.Duration // a session that lived this long was a good one; default 10 s
	FailBack time.Duration // how often a better route is tried; default 1 min

	// Stale reports whether a new session over the route that is up would be a better one. It is asked as often as a better route is
	// tried; the new session is up before the old one ends. nil: never.
	Stale func(route string) bool
}

// maxAsked bounds how long a peer may ask us to stay away.
const maxAsked = 10 * time.Minute

// Switch keeps one session up over the first route that works. Safe for concurrent use; Run runs once.
type Switch struct {
	cfg  SwitchConfig
	asks chan ask

	mu      sync.Mutex
	order   []Route // the customer's, with the preferred one in front
	current string
	last    map[string]error
	changed chan struct{}
}

type ask struct {
	order  []Route
	answer chan error
}

// session is one that is being tried or is up.
type session struct {
	route  Route
	cancel context.CancelFunc
	up     chan struct{}
	done   chan error
	born   time.Time
}

// NewSwitch gives a switch over routes, each with a name of its own.
func NewSwitch(cfg SwitchConfig) (*Switch, error) {
	const op = "mesh.Switch"
	if len(cfg.Routes) == 0 || cfg.Rand == nil {
		return nil, fault.New(op, fault.Invalid, "a switch needs at least one route and a source of jitter")
	}
	seen := map[string]bool{}
	for _, r := range cfg.Routes {
		if r.Name() == "" || seen[r.Name()] {
			return nil, fault.New(op, fault.Invalid, "route %q is listed twice: name each transport once", r.Name())
		}
		seen[r.Name()] = true
	}
	for _, d := range []struct {
		to *time.Duration
		by time.Duration
	}{{&cfg.Attempt, 20 * time.Second}, {&cfg.Base, 500 * time.Millisecond}, {&cfg.Cap, 30 * time.Second}, {&cfg.Stable, 10 * time.Second},
		{&cfg.FailBack, time.Minute}} {
		if *d.to <= 0 {
			*d.to = d.by
		}
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	return &Switch{cfg: cfg, asks: make(chan ask), order: slices.Clone(cfg.Routes), last: map[string]error{},
		changed: make(chan struct{})}, nil
}

// Current names the route of the session that is up; "" when none is.
func (s *Switch) Current() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.current
}

// Changed is closed when Current next changes.
func (s *Switch) Changed() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.changed
}

// Last gives the latest error of a route, nil after a success.
func (s *Switch) Last(route string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.last[route]
}

// Use makes a route the preferred one and moves to it: it returns when the new session is up and the old one has ended. When
// the route does not work the old session and the old order stay. "" restores the configured order.
func (s *Switch) Use(ctx context.Context, name string) error {
	const op = "mesh.Use"
	order := slices.Clone(s.cfg.Routes)
	if name != "" {
		i := slices.IndexFunc(order, func(r Route) bool { return r.Name() == name })
		if i < 0 {
			return fault.New(op, fault.NotFound, "route %.32q is not on the customer's list of transports", name)
		}
		r := order[i]
		order = slices.Insert(slices.Delete(order, i, i+1), 0, r)
	}
	a := ask{order: order, answer: make(chan error, 1)}
	select {
	case s.asks <- a:
	case <-ctx.Done():
		return fault.Because(ctx.Err(), op, fault.Unavailable, "the switch is busy or does not run")
	}
	select {
	case err := <-a.answer:
		return err
	case <-ctx.Done():
		return fault.Because(ctx.Err(), op, fault.Unsure, "the change to route %q is under way", name)
	}
}

// Run keeps a session up until ctx ends, and returns when the last session has ended.
func (s *Switch) Run(ctx context.Context, work Session) error {
	var live *session
	var asked time.Duration // what the peer asked for
	var dead Route          // that fell silent, until the next round
	round := 0
	defer func() {
		if live != nil {
			s.stop(live)
		}
		s.set(nil)
	}()
	for ctx.Err() == nil {
		if live == nil {
			live, asked = s.first(ctx, work, last(s.routes(), dead))
			dead = nil
			if live == nil {
				if s.pause(ctx, work, s.backoff(round, asked), &live) {
					round++
				}
			}
			continue
		}
		better := time.NewTimer(s.cfg.FailBack/2 + time.Duration(s.cfg.Rand()*float64(s.cfg.FailBack)))
		select {
		case <-ctx.Done():
		case err := <-live.done:
			lived := time.Since(live.born)
			s.lost(live, err)
			live.cancel()
			if silent(err) {
				dead = live.route
			}
			live = nil
			s.set(nil)
			if lived >= s.cfg.Stable {
				round = 0 // whatever was before it
				if retryAfter(err) == 0 {
					break // the next round of dialling is at once
				}
			}
			if s.pause(ctx, work, s.backoff(round, retryAfter(err)), &live) {
				round++
			}
		case a := <-s.asks:
			live = s.obey(ctx, work, live, a)
		case <-better.C:
			if next := s.better(ctx, work, live); next != nil {
				live = s.swap(live, next)
			}
		}
		better.Stop()
	}
	return nil
}

// better gives a session that is up and better than live: over a route before it, or over the same one where live is stale; nil for none.
func (s *Switch) better(ctx context.Context, work Session, live *session) *session {
	if i := slices.Index(s.routes(), live.route); i > 0 {
		if next, _ := s.first(ctx, work, s.routes()[:i]); next != nil {
			return next
		}
	}
	if s.cfg.Stale == nil || !s.cfg.Stale(live.route.Name()) {
		return nil
	}
	next, err := s.try(ctx, work, live.route)
	if err != nil {
		s.note(live.route, nil) // live is up
		return nil
	}
	return next
}

// last gives the routes with r behind the others.
func last(routes []Route, r Route) []Route {
	if i := slices.Index(routes, r); r != nil && i >= 0 {
		return append(slices.Delete(slices.Clone(routes), i, i+1), r)
	}
	return routes
}

func silent(err error) bool {
	var s Silent
	return errors.As(err, &s) && s.Silent()
}

// pause waits with no session up; a wish ends the wait. It reports whether the wait ran out.
func (s *Switch) pause(ctx context.Context, work Session, wait time.Duration, live **session) bool {
	t := time.NewTimer(wait)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case a := <-s.asks:
		*live = s.obey(ctx, work, nil, a)
	case <-ctx.Done():
	}
	return false
}

// obey carries out one wish and answers it.
func (s *Switch) obey(ctx context.Context, work Session, live *session, a ask) *session {
	want := a.order[0]
	if live == nil || live.route != want {
		next, err := s.try(ctx, work, want)
		if err != nil {
			a.answer <- fault.Because(err, "mesh.Use", fault.Unavailable, "route %q does not work; the one of before stays: %s", want.Name(),
				fault.Text(err))
			return live
		}
		live = s.swap(live, next)
	}
	s.mu.Lock()
	s.order = a.order
	s.mu.Unlock()
	a.answer <- nil
	return live
}

// swap makes next the one that is up, then ends the old one.
func (s *Switch) swap(old, next *session) *session {
	s.set(next)
	if old != nil {
		s.stop(old)
	}
	return next
}

// first tries routes in order and gives the first session that is up, or the longest wait that a peer asked for.
func (s *Switch) first(ctx context.Context, work Session, routes []Route) (*session, time.Duration) {
	var asked time.Duration
	for _, r := range routes {
		if ctx.Err() != nil {
			break
		}
		next, err := s.try(ctx, work, r)
		if err == nil {
			if s.Current() == "" {
				s.set(next)
			}
			return next, 0
		}
		asked = max(asked, retryAfter(err))
	}
	return nil, asked
}

// try starts a session over r and waits until it is up.
func (s *Switch) try(ctx context.Context, work Session, r Route) (*session, error) {
	own, cancel := context.WithCancel(ctx)
	n := &session{route: r, cancel: cancel, up: make(chan struct{}), done: make(chan error, 1)}
	limit := time.NewTimer(s.cfg.Attempt)
	defer limit.Stop()
	go func() {
		c, err := r.Dial(own, "")
		if err != nil {
			n.done <- err
			return
		}
		var once sync.Once
		err = work(own, r.Name(), c, func() { once.Do(func() { close(n.up) }) })
		_ = c.Close() // the session may have closed it
		if err == nil {
			err = fault.New("mesh.Session", fault.Unavailable, "the session ended")
		}
		n.done <- err
	}()
	var err error
	select {
	case <-n.up:
		n.born = time.Now()
		s.note(r, nil)
		return n, nil
	case err = <-n.done:
		cancel()
	case <-limit.C:
		cancel()
		err = notInTime(r, s.cfg.Attempt, <-n.done)
	}
	s.note(r, err)
	if ctx.Err() == nil {
		s.cfg.Logger.Warn("a route does not work", "route", r.Name(), "kind", string(fault.Of(err)), "err", err)
	}
	return nil, err
}

// notInTime is of a session that was ended since it was not up: how it ended may say how far it came.
func notInTime(r Route, limit time.Duration, ended error) error {
	const op = "mesh.Switch"
	var told *fault.Error
	if errors.As(ended, &told) && told.Text != "" {
		return fault.Because(ended, op, fault.Unavailable, "route %s: not up within %s: %s", r.Name(), limit, told.Text)
	}
	return fault.Because(ended, op, fault.Unavailable, "route %s: not up within %s", r.Name(), limit)
}

func (s *Switch) stop(n *session) {
	n.cancel()
	<-n.done
}

func (s *Switch) lost(n *session, err error) {
	s.note(n.route, err)
	s.cfg.Logger.Warn("a session was lost", "route", n.route.Name(), "kind", string(fault.Of(err)), "err", err)
}

func (s *Switch) note(r Route, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.last[r.Name()] = err
}

func (s *Switch) routes() []Route {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.order)
}

func (s *Switch) set(n *session) {
	name := ""
	if n != nil {
		name = n.route.Name()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.current == name {
		return
	}
	s.current = name
	close(s.changed)
	s.changed = make(chan struct{})
}

// backoff is full jitter below a doubling ceiling, and never less than what the peer asked for.
func (s *Switch) backoff(round int, asked time.Duration) time.Duration {
	ceiling := s.cfg.Cap
	if round < 16 {
		ceiling = min(ceiling, s.cfg.Base<<round)
	}
	return min(asked, maxAsked) + time.Duration(s.cfg.Rand()*float64(ceiling))
}

func retryAfter(err error) time.Duration {
	var r RetryAfter
	if errors.As(err, &r) {
		return max(0, r.RetryAfter())
	}
	return 0
}
