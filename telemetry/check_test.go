// SPDX-License-Identifier: Apache-2.0

package telemetry_test

import (
	"context"
	"errors"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/telemetry"
)

func TestReadiness(t *testing.T) {
	r := telemetry.New("control-plane", "v1")
	var raft, disk error
	wantAnswer := func(path string, code int, body string) {
		t.Helper()
		w := ask(r, http.MethodGet, path)
		if w.Code != code || w.Body.String() != body {
			t.Errorf("%s = %d %q, want %d %q", path, w.Code, w.Body, code, body)
		}
		if ct := w.Header().Get("Content-Type"); ct != "text/plain; charset=utf-8" {
			t.Errorf("%s: Content-Type = %q", path, ct)
		}
	}
	wantAnswer("/readyz", 200, "ok\n")
	r.Check("raft", func(context.Context) error { return raft })
	r.Check("disk", func(context.Context) error { return disk })
	r.Alive("apply", func(context.Context) error { return nil })
	wantAnswer("/readyz", 200, "ok\n")

	raft = fault.New("raft.Leader", fault.NotLeader, "no leader is known")
	wantAnswer("/readyz", 503, "raft: no leader is known\n")
	wantAnswer("/healthz", 200, "ok\n")

	// A cause stays in the process, and a sentence is one line however it is written.
	disk = fault.Because(errors.New("/var/lib/secret-path"), "x", fault.Unavailable, "the disk\nraft: is well\x1b[2J %s",
		strings.Repeat("z", 1000))
	raft = errors.New("dial 10.0.0.1: password hunter2")
	wantAnswer("/readyz", 503, "raft: an internal error; the log of the server has its cause\n"+
		"disk: the disk raft: is well [2J "+strings.Repeat("z", 400-len("the disk raft: is well [2J "))+"...\n")

	raft, disk = nil, nil
	wantAnswer("/readyz", 200, "ok\n")
	r.Check("panics", func(context.Context) error { panic("on purpose") })
	for range 2 {
		wantAnswer("/readyz", 503, "panics: the check itself is broken: it panicked\n")
	}
	r.Alive("stuck", func(context.Context) error {
		return fault.New("x", fault.Internal, "no change was applied for 5 min: restart me")
	})
	wantAnswer("/healthz", 503, "stuck: no change was applied for 5 min: restart me\n")
}

func TestOnlyGet(t *testing.T) {
	r := telemetry.New("appliance", "v1")
	var asked atomic.Int32
	count := func(context.Context) error { asked.Add(1); return nil }
	r.Check("c", count)
	r.Alive("c", count)
	for _, path := range []string{"/metrics", "/healthz", "/readyz"} {
		for _, method := range []string{"HEAD", "POST", "PUT", "DELETE", "OPTIONS", "get"} {
			w := ask(r, method, path)
			if w.Code != http.StatusMethodNotAllowed || w.Header().Get("Allow") != "GET" {
				t.Errorf("%s %s = %d, Allow %q", method, path, w.Code, w.Header().Get("Allow"))
			}
		}
		if w := ask(r, "GET", path); w.Code != 200 || w.Header().Get("X-Content-Type-Options") != "nosniff" {
			t.Errorf("GET %s = %d %v", path, w.Code, w.Header())
		}
	}
	if n := asked.Load(); n != 2 {
		t.Errorf("checks were asked %d times, want 2", n)
	}
	for _, path := range []string{"/", "/metrics/", "/readyz/raft", "/debug/pprof/", "/../metrics"} {
		if w := ask(r, "GET", path); w.Code != http.StatusNotFound {
			t.Errorf("GET %s = %d, want 404", path, w.Code)
		}
	}
}

// TestSlowChecks: three checks that take their time are asked at once, and those that are late are named.
func TestSlowChecks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := telemetry.New("appliance", "v1")
		r.Check("polite", func(ctx context.Context) error {
			<-ctx.Done()
			return fault.New("x", fault.Unavailable, "was told to stop")
		})
		r.Check("just in time", func(ctx context.Context) error { time.Sleep(1900 * time.Millisecond); return nil })
		r.Check("also", func(ctx context.Context) error {
			time.Sleep(1900 * time.Millisecond)
			return fault.New("x", fault.Busy, "is full")
		})
		r.Check("deaf", func(context.Context) error { time.Sleep(time.Minute); return nil })
		before := time.Now()
		w := ask(r, http.MethodGet, "/readyz")
		if took := time.Since(before); took != telemetry.CheckTimeout {
			t.Errorf("the answer took %s, want %s", took, telemetry.CheckTimeout)
		}
		want := "polite: gave no answer within 2s\nalso: is full\ndeaf: gave no answer within 2s\n"
		if w.Code != 503 || w.Body.String() != want {
			t.Errorf("answer = %d %q, want 503 %q", w.Code, w.Body, want)
		}
		time.Sleep(time.Hour) // of the bubble's time: the deaf one ends before the bubble does
	})
}

// TestHangingCheckRunsOnce: probes come every few seconds, and a check that hangs must not gather goroutines.
func TestHangingCheckRunsOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := telemetry.New("appliance", "v1")
		var runs atomic.Int32
		release := make(chan struct{})
		r.Check("c", func(context.Context) error { runs.Add(1); <-release; return nil })
		for range 20 {
			if w := ask(r, http.MethodGet, "/readyz"); w.Code != 503 {
				t.Fatalf("a check that hangs is told as %d", w.Code)
			}
		}
		if n := runs.Load(); n != 1 {
			t.Errorf("the check was started %d times, want 1", n)
		}
		close(release)
		synctest.Wait()
		if w := ask(r, http.MethodGet, "/readyz"); w.Code != 200 || runs.Load() != 2 {
			t.Errorf("after the hang: %d, started %d times, want 200 after 2", w.Code, runs.Load())
		}
	})
}

// TestCallerGoesAway: the first caller hangs up; the run that a second one shares goes on.
func TestCallerGoesAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := telemetry.New("appliance", "v1")
		var runs atomic.Int32
		r.Check("c", func(ctx context.Context) error {
			runs.Add(1)
			select {
			case <-time.After(time.Second):
				return nil
			case <-ctx.Done():
				return ctx.Err()
			}
		})
		h := r.Handler()
		ctx, hangUp := context.WithCancel(t.Context())
		first, second := httptest.NewRecorder(), httptest.NewRecorder()
		var wg sync.WaitGroup
		wg.Go(func() {
			h.ServeHTTP(first, httptest.NewRequestWithContext(ctx, http.MethodGet, "/readyz", nil))
		})
		wg.Go(func() {
			h.ServeHTTP(second, httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/readyz", nil))
		})
		synctest.Wait()
		hangUp()
		wg.Wait()
		if first.Body.Len() != 0 || second.Code != 200 || second.Body.String() != "ok\n" || runs.Load() != 1 {
			t.Errorf("first %q, second %d %q after %d runs", first.Body, second.Code, second.Body, runs.Load())
		}
	})
}

// TestHangingScrape: a read that blocks costs a bounded number of scrapes, and never an answer of /healthz.
func TestHangingScrape(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := telemetry.New("appliance", "v1")
		release := make(chan struct{})
		var reads atomic.Int32
		r.Gauge("demarc_x", "X.", func() float64 { reads.Add(1); <-release; return 1 })
		h := r.Handler()
		var wg sync.WaitGroup
		for range 30 {
			wg.Go(func() {
				w := httptest.NewRecorder()
				h.ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/metrics", nil))
				if w.Code != http.StatusServiceUnavailable {
					t.Errorf("a scrape that hangs is told as %d", w.Code)
				}
			})
		}
		wg.Wait()
		if n := reads.Load(); n > 8 {
			t.Errorf("%d reads hang at once, want at most 8", n)
		}
		if w := ask(r, http.MethodGet, "/healthz"); w.Code != 200 {
			t.Errorf("/healthz = %d", w.Code)
		}
		close(release)
		synctest.Wait()
		w := httptest.NewRecorder()
		h.ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/metrics", nil))
		if w.Code != 200 || !strings.Contains(w.Body.String(), "demarc_x 1\n") {
			t.Errorf("after the hang: %d", w.Code)
		}
	})
}
