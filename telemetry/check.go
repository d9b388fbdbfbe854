// SPDX-License-Identifier: Apache-2.0

package telemetry

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"regexp"
	"strings"
	"sync"
	"time"
	"unicode"

	"github.com/demarc-dev/demarc/fault"
)

// CheckTimeout is how long a check may take. One that has not answered by then has failed.
const CheckTimeout = 2 * time.Second

// maxSentence bounds a sentence in an answer, in runes.
const maxSentence = 400

var checkForm = regexp.MustCompile(`^[a-z0-9][a-z0-9 _./-]{0,63}$`)

// Check adds a check to /readyz: nil where this part can do its work now. The context ends after [CheckTimeout], or
// not at all with the caller: those who ask at the same time share one run.
func (r *Registry) Check(name string, ready func(ctx context.Context) error) {
	r.addCheck("Check", name, ready, &r.ready)
}

// Alive adds a check to /healthz: an error where only a restart of the process helps.
func (r *Registry) Alive(name string, alive func(ctx context.Context) error) {
	r.addCheck("Alive", name, alive, &r.alive)
}

func (r *Registry) addCheck(method, name string, ask func(context.Context) error, to *[]*check) {
	if !checkForm.MatchString(name) {
		mistake(method, name, "is not a name in lower case of at most 64 letters")
	}
	if ask == nil {
		mistake(method, name, "has no function to ask")
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, c := range *to {
		if c.name == name {
			mistake(method, name, "is registered already")
		}
	}
	// A new slice each time: one that is being walked does not change.
	*to = append((*to)[:len(*to):len(*to)], &check{name: name, ask: ask})
}

// Health asks what /healthz asks: nil where no restart of the process would help, else what each failed check says.
func (r *Registry) Health(ctx context.Context) error {
	if bad := r.failed(ctx, func() []*check { return r.alive }); bad != "" {
		return fault.New("telemetry.Health", fault.Unavailable, "%s", strings.TrimSuffix(strings.ReplaceAll(bad, "\n", "; "), "; "))
	}
	return fault.At("telemetry.Health", fault.Unavailable, ctx.Err())
}

// health answers with what failed tells.
func (r *Registry) health(of func() []*check) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		bad := r.failed(req.Context(), of)
		if req.Context().Err() != nil {
			return // nobody listens
		}
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		if bad != "" {
			w.WriteHeader(http.StatusServiceUnavailable)
			_, _ = io.WriteString(w, bad)
			return
		}
		_, _ = io.WriteString(w, "ok\n")
	})
}

// failed asks all checks at once and gives a line of each that failed. Where ctx ends before they answered it gives less.
func (r *Registry) failed(ctx context.Context, of func() []*check) string {
	r.mu.Lock()
	checks := of()
	r.mu.Unlock()
	runs := make([]*run, len(checks))
	for i, c := range checks {
		runs[i] = c.start()
	}
	late := time.NewTimer(CheckTimeout)
	defer late.Stop()
	var (
		bad  strings.Builder
		over bool
	)
	for i, c := range checks {
		if !over {
			select {
			case <-runs[i].done:
			case <-late.C:
				over = true
			case <-ctx.Done():
				over = true
			}
		}
		if err := runs[i].result(); err != nil {
			fmt.Fprintf(&bad, "%s: %s\n", c.name, line(fault.Text(err)))
		}
	}
	return bad.String()
}

// check is one question. At most one run of it is under way: a check that hangs holds one goroutine, however often
// somebody asks.
type check struct {
	name string
	ask  func(context.Context) error

	mu  sync.Mutex
	now *run
}

type run struct {
	done chan struct{}
	err  error // to be read after done
}

// start begins a run, or joins the one under way.
func (c *check) start() *run {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.now != nil {
		return c.now
	}
	r := &run{done: make(chan struct{})}
	c.now = r
	go func() {
		ctx, cancel := context.WithTimeout(context.Background(), CheckTimeout)
		defer cancel()
		err := safely(ctx, c.ask)
		if err != nil && ctx.Err() != nil {
			err = errLate()
		}
		c.mu.Lock()
		defer c.mu.Unlock()
		r.err = err
		c.now = nil
		close(r.done)
	}()
	return r
}

// result is the error of a run that is over, and a fault where it is not.
func (r *run) result() error {
	select {
	case <-r.done:
		return r.err
	default:
		return errLate()
	}
}

func errLate() error {
	return fault.New("telemetry.Check", fault.Unavailable, "gave no answer within %s", CheckTimeout)
}

// safely turns a panic of a check into a fault: a question about health must not end the process.
func safely(ctx context.Context, ask func(context.Context) error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fault.Because(fmt.Errorf("panic: %v", p), "telemetry.Check", fault.Internal, "the check itself is broken: it panicked")
		}
	}()
	return ask(ctx)
}

// line makes one bounded line of a sentence: no sentence can look like the line of another check.
func line(s string) string {
	s = strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return ' '
		}
		return r
	}, s)
	if rs := []rune(s); len(rs) > maxSentence {
		s = string(rs[:maxSentence]) + "..."
	}
	return s
}
