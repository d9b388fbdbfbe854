// SPDX-License-Identifier: Apache-2.0

// Package daemon starts parts in order and stops them in reverse.
//
// The roles live in its sub-packages controlplane, appliance and management: the only place where rooms meet.
package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/demarc-dev/demarc/fault"
)

// Part is one long-running thing of a daemon.
type Part interface {
	Name() string
	// Run works until ctx ends and then returns nil or ctx's error. It calls ready once, when those that depend on it
	// may start. An error before that keeps them from starting; an error after it stops the daemon.
	Run(ctx context.Context, ready func()) error
}

// Func makes a part of a name and a function.
func Func(name string, run func(ctx context.Context, ready func()) error) Part {
	return funcPart{name, run}
}

type funcPart struct {
	name string
	run  func(context.Context, func()) error
}

func (p funcPart) Name() string                                { return p.name }
func (p funcPart) Run(ctx context.Context, ready func()) error { return p.run(ctx, ready) }

// Grace is how long one part may take to stop before it is named in the log and left behind.
const Grace = 15 * time.Second

type running struct {
	part   Part
	cancel context.CancelFunc
	done   chan struct{}
	err    error
}

// Run starts each part once the one before it is ready, and waits until ctx ends or a part fails. It then stops them
// one by one in reverse order. It returns nil after a clean stop asked for by ctx, else the first failure.
func Run(ctx context.Context, log *slog.Logger, parts ...Part) error {
	var (
		started []*running
		failed  = make(chan *running, len(parts))
		first   error
	)
start:
	for _, p := range parts {
		pctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
		r := &running{part: p, cancel: cancel, done: make(chan struct{})}
		ready := make(chan struct{})
		go r.run(pctx, sync.OnceFunc(func() { close(ready) }), failed)
		started = append(started, r)
		select {
		case <-ready:
			log.Debug("part is ready", "part", p.Name())
		case f := <-failed:
			first = f.failure()
			break start
		case <-ctx.Done():
			break start
		}
	}
	if first == nil {
		select {
		case <-ctx.Done():
		case f := <-failed:
			first = f.failure()
		}
	}
	for i := len(started) - 1; i >= 0; i-- {
		r := started[i]
		r.cancel()
		select {
		case <-r.done:
			if first == nil && r.err != nil && !errors.Is(r.err, context.Canceled) {
				first = fault.At("daemon.Run: "+r.part.Name(), "", r.err)
			}
		case <-time.After(Grace):
			log.Error("part did not stop in time", "part", r.part.Name(), "grace", Grace)
			if first == nil {
				first = fault.New("daemon.Run", fault.Internal, "part %s did not stop within %s", r.part.Name(), Grace)
			}
		}
	}
	return first
}

func (r *running) run(ctx context.Context, ready func(), failed chan<- *running) {
	defer close(r.done)
	defer func() {
		if v := recover(); v != nil {
			r.err = fault.New("daemon.Run", fault.Internal, "part %s panicked: %v", r.part.Name(), v)
			failed <- r
		}
	}()
	r.err = r.part.Run(ctx, ready)
	if ctx.Err() == nil { // it ended by itself
		failed <- r
	}
}

func (r *running) failure() error {
	if r.err == nil {
		return fault.New("daemon.Run", fault.Internal, "part %s ended by itself", r.part.Name())
	}
	return fault.At(fmt.Sprintf("daemon.Run: %s", r.part.Name()), "", r.err)
}
