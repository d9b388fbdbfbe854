// SPDX-License-Identifier: Apache-2.0

package daemon_test

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"sync/atomic"
	"testing"
	"time"

	"github.com/demarc-dev/demarc/daemon"
	"github.com/demarc-dev/demarc/fault"
)

// manager listens as a service manager does, at a socket of a path or, with @, of an abstract name.
func manager(t *testing.T, name string) *net.UnixConn {
	t.Helper()
	c, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: name, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

// hear gives the next word, "" where none comes in time.
func hear(t *testing.T, c *net.UnixConn, within time.Duration) string {
	t.Helper()
	_ = c.SetReadDeadline(time.Now().Add(within))
	b := make([]byte, 256)
	n, err := c.Read(b)
	if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatal(err)
	}
	return string(b[:n])
}

func TestNotify(t *testing.T) {
	path := filepath.Join(t.TempDir(), "notify")
	for _, name := range []string{path, "@demarc-test-" + strconv.Itoa(os.Getpid())} {
		m := manager(t, name)
		t.Setenv("NOTIFY_SOCKET", name)
		t.Setenv("WATCHDOG_USEC", "100000")
		t.Setenv("WATCHDOG_PID", strconv.Itoa(os.Getpid()))
		var sick atomic.Bool
		n := daemon.NewNotify(func(context.Context) error {
			if sick.Load() {
				return errors.New("the book can't be written")
			}
			return nil
		}, slog.New(slog.DiscardHandler))
		if os.Getenv("NOTIFY_SOCKET")+os.Getenv("WATCHDOG_USEC")+os.Getenv("WATCHDOG_PID") != "" {
			t.Error("what the daemon starts could speak in its place")
		}
		ctx, stop := context.WithCancel(t.Context())
		slow := make(chan struct{})
		ended := make(chan error, 1)
		go func() {
			ended <- daemon.Run(ctx, slog.New(slog.DiscardHandler), daemon.Func("slow", func(ctx context.Context, ready func()) error {
				<-slow
				ready()
				<-ctx.Done()
				return nil
			}), n)
		}()
		if word := hear(t, m, 200*time.Millisecond); word != "" {
			t.Fatalf("%q before the parts are ready", word)
		}
		close(slow)
		if word := hear(t, m, 10*time.Second); word != "READY=1" {
			t.Fatalf("%q, want READY=1", word)
		}
		for range 5 {
			if word := hear(t, m, 10*time.Second); word != "WATCHDOG=1" {
				t.Fatalf("%q, want WATCHDOG=1", word)
			}
		}
		sick.Store(true)
		_ = hear(t, m, 300*time.Millisecond) // one may be on its way
		if word := hear(t, m, 300*time.Millisecond); word != "" {
			t.Fatalf("%q while the daemon is not healthy", word)
		}
		sick.Store(false)
		if word := hear(t, m, 10*time.Second); word != "WATCHDOG=1" {
			t.Fatalf("%q, want WATCHDOG=1 once it is healthy again", word)
		}
		stop()
		word := hear(t, m, 10*time.Second)
		for word == "WATCHDOG=1" {
			word = hear(t, m, 10*time.Second)
		}
		if word != "STOPPING=1" {
			t.Fatalf("%q, want STOPPING=1", word)
		}
		if err := <-ended; err != nil {
			t.Fatal(err)
		}
	}
}

// TestNotifyHangingCheck: a check that never answers is no health.
func TestNotifyHangingCheck(t *testing.T) {
	path := filepath.Join(t.TempDir(), "notify")
	m := manager(t, path)
	t.Setenv("NOTIFY_SOCKET", path)
	t.Setenv("WATCHDOG_USEC", "100000")
	t.Setenv("WATCHDOG_PID", "")
	n := daemon.NewNotify(func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() }, slog.New(slog.DiscardHandler))
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- n.Run(ctx, func() {}) }()
	if word := hear(t, m, 10*time.Second); word != "READY=1" {
		t.Fatalf("%q, want READY=1", word)
	}
	if word := hear(t, m, 500*time.Millisecond); word != "" {
		t.Errorf("%q, and no check answered", word)
	}
	stop()
	if word := hear(t, m, 10*time.Second); word != "STOPPING=1" {
		t.Errorf("%q, want STOPPING=1", word)
	}
	<-ended
}

func TestNotifyEnvironment(t *testing.T) {
	for name, c := range map[string]struct {
		socket, usec, pid string
		bad               bool
	}{
		"nobody listens":          {"", "100000", "", false},
		"a relative path":         {"notify", "", "", true},
		"a socket that is gone":   {"/nonexistent/notify", "", "", false},
		"no number":               {"/nonexistent/notify", "soon", "", true},
		"less than none":          {"/nonexistent/notify", "-1", "", true},
		"a year":                  {"/nonexistent/notify", "31536000000000", "", true},
		"meant for somebody else": {"/nonexistent/notify", "soon", "1", false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Setenv("NOTIFY_SOCKET", c.socket)
			t.Setenv("WATCHDOG_USEC", c.usec)
			t.Setenv("WATCHDOG_PID", c.pid)
			n := daemon.NewNotify(func(context.Context) error { return nil }, slog.New(slog.DiscardHandler))
			ctx, stop := context.WithCancel(t.Context())
			err := n.Run(ctx, stop)
			if errors.Is(err, fault.Invalid) != c.bad || !c.bad && err != nil {
				t.Errorf("%v, refused wanted: %v", err, c.bad)
			}
		})
	}
}
