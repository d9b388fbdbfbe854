// SPDX-License-Identifier: Apache-2.0

package mesh_test

import (
	"context"
	"errors"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/mesh"
)

// fake is a route that can be taken down, with the sessions over it.
type fake struct {
	name  string
	down  atomic.Bool
	dials atomic.Int64
	cut   atomic.Pointer[context.CancelCauseFunc]
}

func (f *fake) Name() string { return f.name }

func (f *fake) Dial(context.Context, string) (net.Conn, error) {
	f.dials.Add(1)
	if f.down.Load() {
		return nil, fault.New("test", fault.Unavailable, "%s is down", f.name)
	}
	a, b := net.Pipe()
	_ = b.Close()
	return a, nil
}

func (f *fake) fail(err error) {
	f.down.Store(true)
	if cut := f.cut.Load(); cut != nil {
		(*cut)(err)
	}
}

// moves counts the sessions that are up, and the fewest since the first.
type moves struct {
	now, low atomic.Int64
	prove    func(net.Conn) error // that bytes pass, before the session is up
}

// runSwitch runs s with sessions that stand until they are told to end.
func runSwitch(t *testing.T, s *mesh.Switch, fakes ...*fake) *moves {
	t.Helper()
	return proveSwitch(t, s, nil, fakes...)
}

func proveSwitch(t *testing.T, s *mesh.Switch, prove func(net.Conn) error, fakes ...*fake) *moves {
	t.Helper()
	m := &moves{prove: prove}
	m.low.Store(1)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		done <- s.Run(ctx, func(ctx context.Context, route string, c net.Conn, up func()) error {
			if m.prove != nil {
				if err := m.prove(c); err != nil {
					return err
				}
			}
			own, cut := context.WithCancelCause(ctx)
			defer cut(nil)
			for _, f := range fakes {
				if f.name == route {
					f.cut.Store(&cut)
				}
			}
			m.now.Add(1)
			up()
			<-own.Done()
			if n := m.now.Add(-1); n < m.low.Load() {
				m.low.Store(n)
			}
			return context.Cause(own)
		})
	}()
	first := s.Changed()
	if s.Current() == "" {
		<-first
	}
	stop := func() {
		low := m.low.Load()
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run = %v", err)
		}
		m.low.Store(low)
		if s.Current() != "" || m.now.Load() != 0 {
			t.Errorf("after Run: current %q, %d sessions", s.Current(), m.now.Load())
		}
	}
	t.Cleanup(stop)
	return m
}

func newSwitch(t *testing.T, fakes ...*fake) *mesh.Switch {
	t.Helper()
	cfg := mesh.SwitchConfig{Rand: func() float64 { return 0.5 }}
	for _, f := range fakes {
		cfg.Routes = append(cfg.Routes, f)
	}
	s, err := mesh.NewSwitch(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestFailOverAndBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := &fake{name: "a"}, &fake{name: "b"}
		s := newSwitch(t, a, b)
		m := runSwitch(t, s, a, b)
		time.Sleep(time.Minute) // fake time: the session is a good one
		a.fail(errors.New("cut"))
		synctest.Wait()
		if got := s.Current(); got != "b" {
			t.Fatalf("after the cut: %q, want b at once", got)
		}
		if s.Last("a") == nil || s.Last("b") != nil {
			t.Errorf("Last = %v, %v", s.Last("a"), s.Last("b"))
		}
		m.low.Store(1)
		a.down.Store(false)
		time.Sleep(2 * time.Minute)
		synctest.Wait()
		if got := s.Current(); got != "a" {
			t.Errorf("after the way back: %q, want a", got)
		}
		if m.low.Load() < 1 {
			t.Error("the way back left a gap")
		}
	})
}

func TestUseKeepsTheOldWhenTheNewFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := &fake{name: "a"}, &fake{name: "b"}
		s := newSwitch(t, a, b)
		m := runSwitch(t, s, a, b)
		b.down.Store(true)
		if err := s.Use(t.Context(), "b"); fault.Of(err) != fault.Unavailable {
			t.Errorf("Use of a dead route = %v, want unavailable", err)
		}
		if err := s.Use(t.Context(), "c"); fault.Of(err) != fault.NotFound {
			t.Errorf("Use of no route = %v, want not_found", err)
		}
		if got := s.Current(); got != "a" || m.low.Load() < 1 {
			t.Errorf("after failed changes: %q, fewest %d", got, m.low.Load())
		}
		b.down.Store(false)
		if err := s.Use(t.Context(), "b"); err != nil {
			t.Fatal(err)
		}
		time.Sleep(10 * time.Minute)
		if got := s.Current(); got != "b" {
			t.Errorf("a preferred route was left for %q", got)
		}
		if err := s.Use(t.Context(), ""); err != nil {
			t.Fatal(err)
		}
		if got := s.Current(); got != "a" || m.low.Load() < 1 {
			t.Errorf("back to the configured order: %q, fewest %d", got, m.low.Load())
		}
	})
}

type later struct{ error }

func (later) RetryAfter() time.Duration { return 5 * time.Minute }

func TestBackoff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := &fake{name: "a"}
		s := newSwitch(t, a)
		runSwitch(t, s, a)
		time.Sleep(time.Minute)
		a.fail(errors.New("cut"))
		synctest.Wait()
		// With half of full jitter the waits are 250 ms, 500 ms, 1 s, 2 s, 4 s, 8 s, and from then on half of the cap, 15 s (MUTANTS.md).
		waits := []time.Duration{250 * time.Millisecond, 500 * time.Millisecond, time.Second, 2 * time.Second, 4 * time.Second, 8 * time.Second,
			15 * time.Second, 15 * time.Second, 15 * time.Second}
		for i, wait := range waits {
			before := a.dials.Load()
			time.Sleep(wait - time.Millisecond)
			synctest.Wait()
			if n := a.dials.Load() - before; n != 0 {
				t.Fatalf("round %d: %d dials before %s are over", i, n, wait)
			}
			time.Sleep(time.Millisecond)
			synctest.Wait()
			if n := a.dials.Load() - before; n != 1 {
				t.Fatalf("round %d: %d dials after %s, want 1", i, n, wait)
			}
		}
		a.down.Store(false)
		time.Sleep(time.Minute)
		if s.Current() != "a" {
			t.Fatal("the route does not come back")
		}
		a.fail(later{errors.New("overload")}) // the peer asks for five minutes
		a.down.Store(false)
		before := a.dials.Load()
		time.Sleep(4 * time.Minute)
		if n := a.dials.Load() - before; n != 0 {
			t.Errorf("%d dials in the time that the peer asked for", n)
		}
		time.Sleep(2 * time.Minute)
		if s.Current() != "a" {
			t.Error("the route does not come back after the time that the peer asked for")
		}
	})
}

type soon struct{ error }

func (soon) RetryAfter() time.Duration { return 100 * time.Millisecond }

// TestGoodSessionsAreNotPaidForLater: a node that restarts for the tenth time gets its appliances back as fast as at the first.
func TestGoodSessionsAreNotPaidForLater(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := &fake{name: "a"}
		s := newSwitch(t, a)
		runSwitch(t, s, a)
		for i := range 10 {
			time.Sleep(time.Minute)
			a.fail(soon{errors.New("lost")})
			a.down.Store(false)
			time.Sleep(time.Second)
			synctest.Wait()
			if s.Current() != "a" {
				t.Fatalf("loss %d of a session that was good: not back after a second", i+1)
			}
		}
	})
}

// TestFlapping: a session that comes up and dies at once must not become a tight loop.
func TestFlapping(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := &fake{name: "a"}
		s := newSwitch(t, a)
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
		defer cancel()
		if err := s.Run(ctx, func(_ context.Context, _ string, _ net.Conn, up func()) error { up(); return errors.New("refused") }); err != nil {
			t.Fatal(err)
		}
		if n := a.dials.Load(); n > 60 {
			t.Errorf("%d dials in ten minutes", n)
		}
	})
}

func TestNotUpInTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var ends atomic.Pointer[func(context.Context) error] // how a session of a ends
		a, b := &fake{name: "a"}, &fake{name: "b"}
		s := newSwitch(t, a, b)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() {
			done <- s.Run(ctx, func(ctx context.Context, route string, _ net.Conn, up func()) error {
				if route == "b" {
					up()
				}
				<-ctx.Done()
				if f := ends.Load(); f != nil && route == "a" {
					return (*f)(ctx)
				}
				return ctx.Err()
			})
		}()
		time.Sleep(21 * time.Second)
		if got := s.Current(); got != "b" {
			t.Errorf("Current = %q, want b: a never comes up", got)
		}
		for _, r := range []struct {
			ends func(context.Context) error
			want string
		}{
			{func(ctx context.Context) error { return ctx.Err() }, "route a: not up within 20s"},
			{func(ctx context.Context) error {
				return mesh.For(mesh.TailnetUnreached, fault.Because(ctx.Err(), "x", fault.Denied, "the coordinator is away"))
			}, "route a: not up within 20s: the coordinator is away"},
		} {
			ends.Store(&r.ends)
			if err := s.Use(t.Context(), "a"); !strings.HasSuffix(fault.Text(err), r.want) {
				t.Errorf("who orders it is told %q, want %q", fault.Text(err), r.want)
			}
		}
		if got := mesh.ReasonOf(s.Last("a")); got != mesh.TailnetUnreached {
			t.Errorf("the reason is %q", got)
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

func TestNewSwitchRefuses(t *testing.T) {
	r := func() float64 { return 0 }
	for name, cfg := range map[string]mesh.SwitchConfig{
		"no route":  {Rand: r},
		"no jitter": {Routes: []mesh.Route{&fake{name: "a"}}},
		"twice":     {Rand: r, Routes: []mesh.Route{&fake{name: "a"}, &fake{name: "a"}}},
	} {
		if _, err := mesh.NewSwitch(cfg); fault.Of(err) != fault.Invalid {
			t.Errorf("%s: %v, want invalid", name, err)
		}
	}
}

// hole is a route that answers at first, and then nothing: a dial hangs for as long as it may.
type hole struct {
	fake
	deep atomic.Bool
}

func (h *hole) Dial(ctx context.Context, addr string) (net.Conn, error) {
	if h.deep.Load() {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	return h.fake.Dial(ctx, addr)
}

type silent struct{ error }

func (silent) Silent() bool { return true }

// TestSilentRouteWaits: when a session falls silent the next route is tried before the one that would hang.
func TestSilentRouteWaits(t *testing.T) {
	for _, quiet := range []bool{true, false} {
		synctest.Test(t, func(t *testing.T) {
			h, b := &hole{fake: fake{name: "a"}}, &fake{name: "b"}
			s, err := mesh.NewSwitch(mesh.SwitchConfig{Routes: []mesh.Route{h, b}, Rand: func() float64 { return 0.5 }})
			if err != nil {
				t.Fatal(err)
			}
			runSwitch(t, s, &h.fake, b)
			time.Sleep(11 * time.Second) // a good session: the next round is at once
			h.deep.Store(true)
			cause, began := error(fault.New("test", fault.Unavailable, "gone")), time.Now()
			if quiet {
				cause = silent{cause}
			}
			(*h.cut.Load())(cause)
			for changed := s.Changed(); s.Current() != "b"; changed = s.Changed() {
				<-changed
			}
			if took := time.Since(began); quiet != (took < time.Second) {
				t.Errorf("silent %v: the other route after %s", quiet, took)
			}
			h.deep.Store(false)
		})
	}
}
