// SPDX-License-Identifier: Apache-2.0

package appliance

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	boundaryv1 "github.com/demarc-dev/demarc/api/boundary/v1"
	"github.com/demarc-dev/demarc/api/channel"
	"github.com/demarc-dev/demarc/daemon/appliance/book"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/mesh"
)

// talker is an appliance of which nothing runs but its book and one conversation.
func talker(t *testing.T) *Appliance {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "book"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() })
	a := &Appliance{now: time.Now, log: slog.New(slog.DiscardHandler)}
	if a.book, err = book.New(f, book.Config{Appliance: "eu-1", Customer: "globex"}); err != nil {
		t.Fatal(err)
	}
	return a
}

// TestHungVendorIsFoundInTime: the control plane's program hangs right after its welcome. Its kernel lives and takes all that
// is written, so nothing but the appliance's own deadline finds it, however much the appliance says meanwhile.
func TestHungVendorIsFoundInTime(t *testing.T) {
	const never = 0
	for _, c := range []struct {
		name     string
		beat     time.Duration
		first    time.Duration // when the first report is made
		every    time.Duration // and how long after it each of the others
		from, to time.Duration
	}{
		{"a small fleet", 5 * time.Second, never, never, 14 * time.Second, 15 * time.Second},
		{"beats closer than the answer is awaited", 25 * time.Second, never, never, 74 * time.Second, 75 * time.Second},
		{"through a proxy", 50 * time.Second, never, never, 100 * time.Second, 110 * time.Second},
		{"a beat waits", 15 * time.Minute, never, never, 13 * time.Minute, 16 * time.Minute},
		{"one report waits", 15 * time.Minute, time.Minute, time.Hour, 119 * time.Second, 2 * time.Minute},
		{"reports all the time", 15 * time.Minute, 7 * time.Second, 7 * time.Second, 66 * time.Second, 67 * time.Second},
		{"a report just before patience ends", 25 * time.Second, 70 * time.Second, 7 * time.Second, 74 * time.Second, 75 * time.Second},
		{"a small fleet with reports all the time", 5 * time.Second, time.Second, time.Second, 14 * time.Second, 15 * time.Second},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				took, err := leaves(t, c.beat, c.first, c.every, 2*c.to)
				if took < c.from || took > c.to {
					t.Errorf("the channel ended after %s, want %s to %s: %v", took, c.from, c.to, err)
				}
				var dead mesh.Silent
				if !errors.As(err, &dead) || fault.Of(err) != fault.Unavailable {
					t.Errorf("it is not told as silence: %v", err)
				}
			})
		})
	}
}

// leaves is how long an appliance stays with a control plane whose program hangs right after its welcome. It makes its first report
// after first (0: none), and others every so often.
func leaves(t *testing.T, beat, first, every, atMost time.Duration) (time.Duration, error) {
	a := talker(t)
	here, there := net.Pipe()
	go func() { _, _ = io.Copy(io.Discard, there) }() // the kernel of a program that hangs
	ctx, stop := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	defer wg.Wait()
	defer stop()
	if first > 0 {
		wg.Go(func() { a.chatter(ctx, t, first, every) })
	}
	began := time.Now()
	over := time.AfterFunc(atMost, func() { _ = here.Close() })
	defer over.Stop()
	err := a.converse(ctx, "https", here, &boundaryv1.Welcome{BeatMs: uint32(beat.Milliseconds())}, fleet.Epoch{})
	took := time.Since(began)
	_ = here.Close()
	return took, err
}

// chatter makes reports.
func (a *Appliance) chatter(ctx context.Context, t *testing.T, first, every time.Duration) {
	for wait := first; ; wait = every {
		select {
		case <-ctx.Done():
			return
		case <-time.After(wait):
		}
		if _, err := book.Submit(ctx, a.book, book.Checkpointed{Checkpoint: book.Checkpoint{Note: []byte("note")}}); err != nil {
			t.Error(err)
			return
		}
	}
}

// TestAVendorThatAnswersKeepsItsChannel is the other side of it: reports and beats that are answered late, but in time, end nothing.
func TestAVendorThatAnswersKeepsItsChannel(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := talker(t)
		here, there := net.Pipe()
		go slowVendor(there, 55*time.Second)
		ctx, stop := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		defer wg.Wait()
		defer stop()
		wg.Go(func() { a.chatter(ctx, t, time.Second, 20*time.Minute) })
		began := time.Now()
		time.AfterFunc(24*time.Hour, stop)
		defer context.AfterFunc(ctx, func() { _ = here.Close() })()
		err := a.converse(ctx, "https", here, &boundaryv1.Welcome{BeatMs: uint32((15 * time.Minute).Milliseconds())}, fleet.Epoch{})
		if took := time.Since(began); took < 24*time.Hour {
			t.Errorf("the channel ended after %s: %v", took, err)
		}
	})
}

// slowVendor answers each report and each beat after a while, and reads on meanwhile.
func slowVendor(c net.Conn, after time.Duration) {
	var mu sync.Mutex
	for {
		var up boundaryv1.Up
		if channel.Read(c, &up, channel.MaxUp) != nil {
			return
		}
		down := &boundaryv1.Down{Body: &boundaryv1.Down_Beat{Beat: &boundaryv1.Beat{}}}
		if r := up.GetReport(); r != nil {
			down.Body = &boundaryv1.Down_Ack{Ack: &boundaryv1.Ack{Upto: r.GetNumber()}}
		}
		time.AfterFunc(after, func() {
			mu.Lock()
			defer mu.Unlock()
			_ = channel.Write(c, down, channel.MaxDown) // the channel may have ended
		})
	}
}

// TestWhatTheCustomerMayExpect holds the second table of docs/channel.md: how soon an appliance leaves a node whose program hangs. The
// beats are those that the control plane tells fleets of 100, 1,000 and 10,000 (daemon/controlplane.TestWhatTheVendorMayExpect).
func TestWhatTheCustomerMayExpect(t *testing.T) {
	const second = "| What broke at the vendor |"
	b, err := os.ReadFile("../../docs/channel.md")
	if err != nil {
		t.Fatal(err)
	}
	_, table, ok := strings.Cut(string(b), second)
	if !ok {
		t.Fatal("docs/channel.md has no such table")
	}
	rare := []time.Duration{time.Second * 100 / 3, time.Second * 1000 / 3, time.Second * 10_000 / 3}
	known := []time.Duration{5 * time.Second, 5 * time.Second, 50 * time.Second}
	rows := strings.Split(table, "\n")
	for _, c := range []struct {
		row      string
		beats    []time.Duration
		reported time.Duration // when a report is made; 0: never
	}{
		{"its program hangs, nobody watches it;", rare, 0},
		{"the same, and a report waits", rare, time.Millisecond},
		{"host, path or program;", known, 0},
		{"the same, and a report waits", known, time.Millisecond},
	} {
		for len(rows) > 0 && !strings.HasPrefix(rows[0], "| "+c.row) {
			rows = rows[1:]
		}
		if len(rows) == 0 {
			t.Fatalf("docs/channel.md has no row %q in its place", c.row)
		}
		cells := strings.Split(strings.Trim(rows[0], "| "), " | ")
		rows = rows[1:]
		if len(cells) != 2+len(c.beats) {
			t.Fatalf("the row %q has %d cells", c.row, len(cells))
		}
		for i, beat := range c.beats {
			want, err := time.ParseDuration(strings.NewReplacer(" ", "", "min", "m").Replace(cells[2+i]))
			if err != nil {
				t.Fatalf("the row %q: %v", c.row, err)
			}
			synctest.Test(t, func(t *testing.T) {
				took, err := leaves(t, beat, c.reported, 2*time.Hour, 2*want)
				took -= c.reported
				if took > want || took < want-want/5-time.Second { // a beat comes in the last fifth of its time
					t.Errorf("%s, a beat in %s: left after %s, promised are %s: %v", c.row, beat, took, want, err)
				}
			})
		}
	}
}

// late is the error that the stack of a tailnet node gives: it is not that of package os.
type late struct{}

func (late) Error() string   { return "i/o timeout" }
func (late) Timeout() bool   { return true }
func (late) Temporary() bool { return true }

// TestSilenceIsToldOnEachRoad: the switch tries a road that fell silent behind the others, so it must learn of it whatever the stack.
func TestSilenceIsToldOnEachRoad(t *testing.T) {
	for name, c := range map[string]struct {
		err    error
		silent bool
	}{
		"our deadline":           {&net.OpError{Op: "read", Err: os.ErrDeadlineExceeded}, true},
		"the kernel's":           {&net.OpError{Op: "read", Err: os.NewSyscallError("read", syscall.ETIMEDOUT)}, true},
		"that of a tailnet node": {&net.OpError{Op: "read", Err: late{}}, true},
		"within a frame": {fault.Because(&net.OpError{Op: "read", Err: late{}}, "channel.Read", fault.Unavailable,
			"the channel ended within a frame"), true},
		"a reset": {&net.OpError{Op: "read", Err: os.NewSyscallError("read", syscall.ECONNRESET)}, false},
		"the end": {io.EOF, false},
	} {
		var dead mesh.Silent
		if got := errors.As(because(t.Context(), c.err), &dead); got != c.silent {
			t.Errorf("%s: told as silence %v, want %v", name, got, c.silent)
		}
	}
}
