// SPDX-License-Identifier: Apache-2.0

package controlplane_test

import (
	"crypto/tls"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"slices"
	"testing"
	"time"

	boundaryv1 "github.com/demarc-dev/demarc/api/boundary/v1"
	"github.com/demarc-dev/demarc/api/channel"
	"github.com/demarc-dev/demarc/daemon/controlplane/book"
	"github.com/demarc-dev/demarc/fleet"
)

// alone has a test run in a process of its own, and tells whether this is that process: what is measured is of all goroutines.
func alone(t *testing.T) bool {
	t.Helper()
	const mark = "DEMARC_TEST_ALONE"
	if os.Getenv(mark) == t.Name() {
		return true
	}
	c := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^"+t.Name()+"$", "-test.v")
	c.Env = append(os.Environ(), mark+"="+t.Name())
	out, err := c.CombinedOutput()
	t.Logf("%s", out)
	if err != nil {
		t.Fatal(err)
	}
	return false
}

// raced tells whether this test is built with the race detector, which needs larger stacks.
func raced(t *testing.T) bool {
	t.Helper()
	info, ok := debug.ReadBuildInfo()
	if !ok {
		t.Fatal("this binary does not know how it was built")
	}
	return slices.Contains(info.Settings, debug.BuildSetting{Key: "-race", Value: "true"})
}

// stacks is the memory of all stacks, in bytes, once what is not in use has been given back.
func stacks() float64 {
	runtime.GC()
	runtime.GC()
	s := []metrics.Sample{{Name: "/memory/classes/heap/stacks:bytes"}}
	metrics.Read(s)
	return float64(s[0].Value.Uint64())
}

// A stack that has grown once is shrunk only while less than a quarter of it is in use, and a goroutine that waits for bytes
// of TLS uses more. So nothing deep runs in the goroutine of a channel: it has a stack of 4 KiB (8 KiB with the race
// detector), and one goroutine, after it came, beat, took an order, acknowledged it and reported.
func TestAnIdleChannelKeepsASmallStack(t *testing.T) {
	if !alone(t) {
		return
	}
	const n = 300
	most := 5.
	if raced(t) {
		most = 10
	}
	h := open(t)
	var leaves []*tls.Certificate
	for i := range n {
		leaves = append(leaves, h.member(fmt.Sprintf("a-%03d", i)))
	}
	before, routines := stacks(), runtime.NumGoroutine()
	for i, leaf := range leaves {
		c, err := h.up(leaf)
		if err != nil {
			t.Fatal(err)
		}
		say(t, c, &boundaryv1.Up{Body: &boundaryv1.Up_Beat{Beat: &boundaryv1.Beat{}}})
		submitTo(t, h, book.Ask{To: fleet.ApplianceID(fmt.Sprintf("a-%03d", i)), ID: "p", First: 1, Count: 1})
		say(t, c, &boundaryv1.Up{Body: &boundaryv1.Up_Ack{Ack: &boundaryv1.Ack{Upto: next(t, c).GetNumber()}}})
		status := &boundaryv1.StatusReport{Posture: "closed"}
		say(t, c, &boundaryv1.Up{Body: &boundaryv1.Up_Report{Report: &boundaryv1.Report{Number: 1, Body: &boundaryv1.Report_Status{Status: status}}}})
		for { // its acknowledgement is the last thing that the node says
			var down boundaryv1.Down
			if err := channel.Read(c, &down, channel.MaxDown); err != nil {
				t.Fatal(err)
			}
			if down.GetAck().GetUpto() == 1 {
				break
			}
		}
	}
	within(t, 10*time.Second, "one goroutine a channel", func() bool { return runtime.NumGoroutine()-routines <= n })
	each := (stacks() - before) / n / 1024
	t.Logf("%.1f KiB of stack a channel", each)
	if each > most {
		t.Errorf("%.1f KiB of stack a channel, at most %.0f are expected", each, most)
	}
}

func say(t *testing.T, c *tls.Conn, up *boundaryv1.Up) {
	t.Helper()
	if err := channel.Write(c, up, channel.MaxUp); err != nil {
		t.Fatal(err)
	}
}
