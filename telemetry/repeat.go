// SPDX-License-Identifier: Apache-2.0

package telemetry

import (
	"context"
	"log/slog"
	"slices"
	"sync"
	"time"
)

// Of lines that say the same, as many are written in a period; of the rest the next line that is written tells the count.
const (
	repeatPeriod = time.Minute // the first; it doubles each time that lines were held back in it
	repeatLong   = time.Hour   // the longest
	repeatBurst  = 10
	repeatKinds  = 1024 // kinds of lines that are told apart; what comes beyond them counts as one kind
)

// repeatNames are the attributes that tell one kind of line from another beside its level and message: each takes its values
// from this daemon's own file or plan, never from who calls.
var repeatNames = []string{"part", "service", "transport", "route", "door", "listener"}

// limited is a handler that bounds how often the same line is written: a state that lasts, and callers who are refused again
// and again, must not fill the disk. It is safe for concurrent use if the handler behind it is.
type limited struct {
	slog.Handler
	names string // values of repeatNames that With has set
	kinds *kinds
}

// kinds counts lines by kind. It is shared by all handlers of one logger.
type kinds struct {
	mu   sync.Mutex
	seen map[string]*kind
}

type kind struct {
	since   time.Time // when the period began
	period  time.Duration
	written int
	held    bool // lines were held back in this period
	dropped int  // since the last line that was written
}

func limit(h slog.Handler) slog.Handler {
	return limited{Handler: h, kinds: &kinds{seen: map[string]*kind{}}}
}

// Handle implements [slog.Handler].
func (l limited) Handle(ctx context.Context, r slog.Record) error {
	key := r.Level.String() + " " + r.Message + l.names
	r.Attrs(func(a slog.Attr) bool {
		key += named(a)
		return true
	})
	write, dropped := l.kinds.count(key, r.Time)
	if !write {
		return nil
	}
	if dropped > 0 {
		r = r.Clone()
		r.AddAttrs(slog.Int("repeated", dropped))
	}
	return l.Handler.Handle(ctx, r)
}

func named(a slog.Attr) string {
	if !slices.Contains(repeatNames, a.Key) {
		return ""
	}
	return "\x00" + a.Key + "\x00" + a.Value.String()
}

// count reports whether a line is to be written, and how many of its kind were not since the last that was.
func (k *kinds) count(key string, at time.Time) (bool, int) {
	k.mu.Lock()
	defer k.mu.Unlock()
	x := k.seen[key]
	if x == nil {
		if len(k.seen) >= repeatKinds {
			for old, y := range k.seen {
				if at.Sub(y.since) >= y.period && y.dropped == 0 {
					delete(k.seen, old)
				}
			}
		}
		if len(k.seen) >= repeatKinds {
			key = ""
		}
		if x = k.seen[key]; x == nil {
			x = &kind{since: at, period: repeatPeriod}
			k.seen[key] = x
		}
	}
	if past := at.Sub(x.since); past >= x.period || past < 0 { // below zero: the clock was set back
		switch {
		case past >= 2*x.period || past < 0:
			x.period = repeatPeriod // it was quiet for a period
		case x.held:
			x.period = min(2*x.period, repeatLong)
		}
		x.since, x.written, x.held = at, 0, false
	}
	if x.written >= repeatBurst {
		x.dropped, x.held = x.dropped+1, true
		return false, 0
	}
	x.written++
	dropped := x.dropped
	x.dropped = 0
	return true, dropped
}

// WithAttrs implements [slog.Handler].
func (l limited) WithAttrs(attrs []slog.Attr) slog.Handler {
	for _, a := range attrs {
		l.names += named(a)
	}
	l.Handler = l.Handler.WithAttrs(attrs)
	return l
}

// WithGroup implements [slog.Handler].
func (l limited) WithGroup(name string) slog.Handler {
	l.Handler = l.Handler.WithGroup(name)
	return l
}
