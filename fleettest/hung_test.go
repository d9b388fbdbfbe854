// SPDX-License-Identifier: Apache-2.0

package fleettest_test

import (
	"testing"
	"time"

	"github.com/demarc-dev/demarc/api/channel"
	"github.com/demarc-dev/demarc/fleettest"
)

// TestHungApplianceIsFoundInTime: an appliance's program hangs while its kernel takes what is written. The vendor's book
// shows it offline in time, however many orders are given to it meanwhile.
func TestHungApplianceIsFoundInTime(t *testing.T) {
	const never = 0
	for _, c := range []struct {
		name   string
		beat   time.Duration
		orders time.Duration // how far apart
		within time.Duration
	}{
		{"a small fleet", 5 * time.Second, never, 15 * time.Second},
		{"a small fleet and orders all the time", 5 * time.Second, 3 * time.Second, 15 * time.Second},
		{"through a proxy and orders all the time", 50 * time.Second, 20 * time.Second, 80 * time.Second},
		{"rare beats", 15 * time.Minute, never, 16 * time.Minute},
		{"rare beats and one order", 15 * time.Minute, time.Hour, time.Minute},
		{"rare beats and orders all the time", 15 * time.Minute, 20 * time.Second, time.Minute},
		{"rare beats and an order now and then", 15 * time.Minute, 59 * time.Second, time.Minute},
	} {
		t.Run(c.name, func(t *testing.T) {
			bubble(t, func(t *testing.T, f *fleettest.Fleet) {
				f.Beat = c.beat
				f.CrashNode()
				f.StartNode()
				a := f.AddAppliance("eu-1")
				a.Start()
				a.WaitUp(time.Minute)
				f.Order("eu-1") // an order that is answered leaves nothing behind
				f.Wait("it acknowledged", time.Second, func() bool { return f.Of("eu-1").OrdersDone == 1 })
				time.Sleep(c.beat)
				a.Hang(true)
				began := time.Now()
				next := began
				for f.Of("eu-1").Online {
					if time.Since(began) > c.within+c.within/32+2*time.Second {
						// a node looks that much later at most; a second to read why a channel ends
						t.Fatalf("after %s the vendor still shows it online, want within %s", time.Since(began), c.within)
					}
					if c.orders > 0 && !time.Now().Before(next) {
						f.Order("eu-1")
						next = next.Add(c.orders)
					}
					time.Sleep(100 * time.Millisecond)
				}
				t.Logf("found after %s", time.Since(began))
				a.Hang(false)
				a.WaitUp(2 * time.Minute)
				f.Wait("what was ordered meanwhile has come", time.Minute, func() bool { at := f.Of("eu-1"); return at.OrdersDone == at.OrdersSent() })
			})
		})
	}
}

// TestHungNodeIsLeftInTime: the program of the node hangs. The appliance leaves it by itself, and is back soon after it goes on.
func TestHungNodeIsLeftInTime(t *testing.T) {
	for _, beat := range []time.Duration{5 * time.Second, 25 * time.Second, 50 * time.Second, 15 * time.Minute} {
		t.Run(beat.String(), func(t *testing.T) {
			bubble(t, func(t *testing.T, f *fleettest.Fleet) {
				f.Beat = beat
				f.CrashNode()
				f.StartNode()
				a := f.AddAppliance("eu-1")
				a.Start()
				a.WaitUp(time.Minute)
				time.Sleep(5 * time.Minute) // connections beside the channel are closed by then
				dials := a.Dials()
				a.Hang(true)
				took := f.Wait("the appliance gave the channel up", channel.Patience(beat)+2*time.Second, func() bool { return a.Dials() > dials })
				t.Logf("left after %s", took)
				a.Hang(false)
				a.WaitUp(2 * time.Minute)
			})
		})
	}
}
