// SPDX-License-Identifier: Apache-2.0

package daemon_test

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/demarc-dev/demarc/daemon"
)

type diary struct {
	mu    sync.Mutex
	lines []string
}

func (d *diary) add(s string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.lines = append(d.lines, s)
}

func (d *diary) part(name string) daemon.Part {
	return daemon.Func(name, func(ctx context.Context, ready func()) error {
		d.add("start " + name)
		ready()
		<-ctx.Done()
		d.add("stop " + name)
		return ctx.Err()
	})
}

func TestOrder(t *testing.T) {
	boom := errors.New("boom")
	after := func(d *diary, err error) daemon.Part {
		return daemon.Func("c", func(ctx context.Context, ready func()) error { ready(); return err })
	}
	for name, tc := range map[string]struct {
		third func(*diary) daemon.Part
		stop  bool
		want  []string
		err   string
	}{
		"clean stop": {func(d *diary) daemon.Part { return d.part("c") }, true,
			[]string{"start a", "start b", "start c", "stop c", "stop b", "stop a"}, ""},
		"failure": {func(d *diary) daemon.Part { return after(d, boom) }, false, []string{"start a", "start b", "stop b", "stop a"}, "boom"},
		"ends by self": {func(d *diary) daemon.Part { return after(d, nil) }, false, []string{"start a", "start b", "stop b", "stop a"},
			"part c ended by itself"},
		"never ready": {func(d *diary) daemon.Part {
			return daemon.Func("c", func(context.Context, func()) error { return boom })
		}, false, []string{"start a", "start b", "stop b", "stop a"}, "boom"},
		"panic": {func(d *diary) daemon.Part {
			return daemon.Func("c", func(context.Context, func()) error { panic("ouch") })
		}, false, []string{"start a", "start b", "stop b", "stop a"}, "panicked: ouch"},
		"does not stop": {func(d *diary) daemon.Part {
			return daemon.Func("c", func(ctx context.Context, ready func()) error {
				ready()
				<-ctx.Done()
				<-time.After(daemon.Grace + time.Second) // fake time
				return nil
			})
		}, true, []string{"start a", "start b", "stop b", "stop a"}, "did not stop within"},
	} {
		t.Run(name, func(t *testing.T) {
			run := func(t *testing.T) {
				var d diary
				ctx, cancel := context.WithCancel(context.Background())
				defer cancel()
				done := make(chan error)
				go func() {
					done <- daemon.Run(ctx, slog.New(slog.DiscardHandler), d.part("a"), d.part("b"), tc.third(&d))
				}()
				if tc.stop {
					synctest.Wait()
					cancel()
				}
				err := <-done
				if (tc.err == "") != (err == nil) || (err != nil && !strings.Contains(err.Error(), tc.err)) {
					t.Errorf("Run = %v, want %q", err, tc.err)
				}
				<-time.After(2 * daemon.Grace) // fake time: the part that was left behind ends
				if !slices.Equal(d.lines, tc.want) {
					t.Errorf("diary = %q, want %q", d.lines, tc.want)
				}
			}
			synctest.Test(t, run)
		})
	}
}
