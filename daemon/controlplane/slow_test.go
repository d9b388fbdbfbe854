// SPDX-License-Identifier: Apache-2.0

package controlplane_test

import (
	"crypto/tls"
	"fmt"
	"testing"
	"time"

	boundaryv1 "github.com/demarc-dev/demarc/api/boundary/v1"
	"github.com/demarc-dev/demarc/api/channel"
	"github.com/demarc-dev/demarc/daemon/controlplane"
	"github.com/demarc-dev/demarc/daemon/controlplane/book"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
)

// online is what the book says of an appliance.
func (h *house) online(name string) bool {
	h.t.Helper()
	a, err := h.line.book.View().Appliance(fleet.ApplianceID(name))
	if err != nil {
		h.t.Fatal(err)
	}
	return a.Online
}

// next reads until an order comes.
func next(t *testing.T, c *tls.Conn) *boundaryv1.Order {
	t.Helper()
	for {
		var down boundaryv1.Down
		if err := channel.Read(c, &down, channel.MaxDown); err != nil {
			t.Fatalf("no order: %v", err)
		}
		if o := down.GetOrder(); o != nil {
			return o
		}
	}
}

// An appliance that never reads, with more orders than the kernel's buffers hold, holds nobody else up. Its channel ends
// by the deadline of a write, and what was not acknowledged comes again from the first on.
func TestASlowReaderHoldsNobodyUp(t *testing.T) {
	const wait = 3 * time.Second
	h := openWith(t, func(o *controlplane.Options) { o.WriteWait, o.Beat = wait, time.Hour }) // a missing beat must not be what ends it
	slow, other := h.member("eu-1"), h.member("eu-2")
	const orders = 30
	big := make([]byte, 512<<10)
	for i := range orders {
		submitTo(t, h, book.RequestOperation{ID: fmt.Sprint("op-", i), To: "eu-1", Sealed: big})
	}
	reads, err := h.up(other)
	if err != nil {
		t.Fatal(err)
	}
	began, rounds := time.Now(), uint64(0)
	if _, err := h.up(slow); err != nil {
		t.Fatal(err)
	}
	for ; h.online("eu-1"); rounds++ {
		if time.Since(began) > 5*wait {
			t.Fatalf("after %s the channel of an appliance that reads nothing still stands", 5*wait)
		}
		asked := time.Now()
		submitTo(t, h, book.Ask{To: "eu-2", ID: "p", First: rounds + 1, Count: 1})
		if o := next(t, reads); o.GetNumber() != rounds+1 {
			t.Fatalf("order %d, want %d", o.GetNumber(), rounds+1)
		}
		if took := time.Since(asked); took >= wait {
			t.Fatalf("an order of another appliance took %s", took)
		}
		ack := &boundaryv1.Up{Body: &boundaryv1.Up_Ack{Ack: &boundaryv1.Ack{Upto: rounds + 1}}}
		if err := channel.Write(reads, ack, channel.MaxUp); err != nil {
			t.Fatal(err)
		}
	}
	if took := time.Since(began); took < wait || rounds == 0 {
		t.Fatalf("the channel ended after %s and %d orders of another appliance: not by the deadline of %s", took, rounds, wait)
	}
	if !h.online("eu-2") {
		t.Fatal("the other one's channel ended too")
	}
	t.Logf("%d orders of another appliance while one read nothing for %s", rounds, time.Since(began).Round(time.Millisecond))
	a, err := h.line.book.View().Appliance("eu-1")
	if err != nil || len(a.Orders) != orders || a.OrdersDone != 0 {
		t.Fatalf("%d orders wait and %d are done, %v", len(a.Orders), a.OrdersDone, err)
	}
	again, err := h.up(slow)
	if err != nil {
		t.Fatal(err)
	}
	for want := uint64(1); want <= orders; want++ {
		if o := next(t, again); o.GetNumber() != want || len(o.GetOperation()) != len(big) {
			t.Fatalf("order %d of %d bytes, want %d", o.GetNumber(), len(o.GetOperation()), want)
		}
	}
}

// A channel on which nothing is heard for three beats is ended, and the book says so. One that beats stays.
func TestAHalfOpenChannelEnds(t *testing.T) {
	const beat = 500 * time.Millisecond
	h := openWith(t, func(o *controlplane.Options) { o.Beat = beat })
	dead, lives := h.member("eu-1"), h.member("eu-2")
	beats, err := h.up(lives)
	if err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	silent, err := h.up(dead)
	if err != nil {
		t.Fatal(err)
	}
	heard := 0
	for time.Since(began) < 10*beat || h.online("eu-1") {
		if time.Since(began) > 30*beat {
			t.Fatalf("after %d beats a channel on which nothing is heard still stands", 30)
		}
		if err := channel.Write(beats, &boundaryv1.Up{Body: &boundaryv1.Up_Beat{Beat: &boundaryv1.Beat{}}}, channel.MaxUp); err != nil {
			t.Fatalf("after %d beats: %v", heard, err)
		}
		var down boundaryv1.Down
		for down.Reset(); down.GetBeat() == nil; { // the bundle of CAs may come before
			if err := channel.Read(beats, &down, channel.MaxDown); err != nil {
				t.Fatalf("after %d beats: %v", heard, err)
			}
		}
		heard++
		if time.Since(began) < 3*beat && !h.online("eu-1") {
			t.Fatalf("the silent channel ended after %s, before three beats were missed", time.Since(began))
		}
	}
	if !h.online("eu-2") {
		t.Fatalf("the channel that beats ended, after %d beats", heard)
	}
	ends(t, silent, fault.Unavailable)
}
