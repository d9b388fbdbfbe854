// SPDX-License-Identifier: Apache-2.0

package appliance_test

import (
	"bytes"
	"cmp"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"connectrpc.com/connect"

	boundaryv1 "github.com/demarc-dev/demarc/api/boundary/v1"
	localv1 "github.com/demarc-dev/demarc/api/local/v1"
	"github.com/demarc-dev/demarc/daemon/appliance"
	"github.com/demarc-dev/demarc/daemon/appliance/book"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/grant"
)

// host is an appliance on a host whose clock is off by some time.
type host struct {
	skew atomic.Int64
	dir  string
	*appliance.Appliance
}

func (h *host) now() time.Time { return time.Now().Add(time.Duration(h.skew.Load())) }

func (h *host) start(t *testing.T) {
	h.Appliance = appliance.Alone(t, h.dir, newIdle(), h.now)
}

// access asks for one phase.
func (h *host) access(t *testing.T, phase fleet.Phase) (*localv1.Access, *localv1.BookTime) {
	t.Helper()
	res, err := h.Customer().Access(t.Context(), connect.NewRequest(&localv1.AccessRequest{Phase: string(phase)}))
	if err != nil || len(res.Msg.GetAccess()) != 1 {
		t.Fatalf("%v, %v", res, err)
	}
	return res.Msg.GetAccess()[0], res.Msg.GetBookTime()
}

func (h *host) probe(t *testing.T) {
	t.Helper()
	n := h.Book().View().OrdersDone + 1
	if _, err := h.TakeOrder(t.Context(), &boundaryv1.Order{Number: n,
		Body: &boundaryv1.Order_Probe{Probe: &boundaryv1.ProbeOrder{Id: "p", Index: n}}}); err != nil {
		t.Fatal(err)
	}
}

// newHost is an appliance with one grant that ends in a minute and one that ends in a day.
func newHost(t *testing.T) *host {
	t.Helper()
	h := &host{dir: t.TempDir()}
	h.start(t)
	o := &order{book: h.Book(), to: h.Appliance, clock: h.now}
	must(t, o, book.SetSite{Site: fileOf(t)})
	must(t, o, book.Pin{Public: pem(t, customer)})
	must(t, o, consent(t, grant.Grant{Appliance: "eu-1", Phase: fleet.Deploy, From: h.now(), Until: h.now().Add(24 * time.Hour),
		Nonce: nonce()}, customer))
	must(t, o, consent(t, grant.Grant{Appliance: "eu-1", Phase: fleet.OperateRead, From: h.now(), Until: h.now().Add(time.Minute),
		Nonce: nonce()}, customer))
	return h
}

// back reports whether the log shows that the book's time was set back.
func (h *host) back() bool {
	log := h.Book().Log()
	for i := range log.Size() {
		if bytes.Contains(log.Entry(i), []byte(`"kind":"book.time/1"`)) {
			return true
		}
	}
	return false
}

// TestAClockThatWasAheadOnce: FAULTS.md A6 and J4. Six seconds of a clock two years ahead while messages come, then it is right
// again: a grant whose end has not come counts again, on record, and one that ended stays ended. Meanwhile access judges as the
// book does, and says so.
func TestAClockThatWasAheadOnce(t *testing.T) {
	const years = 2 * 365 * 24 * time.Hour
	for name, c := range map[string]struct {
		restart bool
		vendor  time.Duration // what the vendor's clock is off by, if hint
		hint    bool
		within  time.Duration
		not     time.Duration // and it is not set back before
	}{
		"it ran on":                            {within: 2 * time.Minute, not: 30 * time.Second},
		"restarted, offline":                   {restart: true, within: 12 * time.Minute, not: 9 * time.Minute},
		"restarted, the vendor agrees":         {restart: true, hint: true, within: 2 * time.Minute, not: 30 * time.Second},
		"restarted, the vendor says otherwise": {restart: true, hint: true, vendor: years, not: 3 * time.Hour},
		"it ran on, the vendor says otherwise": {hint: true, vendor: -years, not: 3 * time.Hour},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				h := newHost(t)
				if !c.restart {
					begin(t, h.Appliance, "clock")
				}
				time.Sleep(2 * time.Minute)
				h.skew.Store(int64(years))
				for range 6 {
					h.probe(t)
					time.Sleep(time.Second)
				}
				h.skew.Store(0)
				if c.restart {
					h.start(t)
					begin(t, h.Appliance, "clock")
				}
				if c.hint {
					h.Hint(time.Now().Add(c.vendor))
				}
				h.probe(t)
				if x, b := h.access(t, fleet.Deploy); x.GetAllowed() || b.GetAheadMs() < (years-time.Hour).Milliseconds() {
					t.Errorf("while it is off: %v, %v", x, b)
				}
				time.Sleep(c.not)
				h.probe(t)
				if _, b := h.access(t, fleet.Deploy); h.back() || b.GetAheadMs() == 0 || b.GetSaid() == "" {
					t.Fatalf("after %s: set back %v, %v", c.not, h.back(), b)
				}
				if c.within == 0 {
					return
				}
				time.Sleep(c.within - c.not)
				h.probe(t)
				if at := h.Book().At(); !h.back() || time.Since(at).Abs() > time.Minute {
					t.Errorf("after %s: set back %v, the book's time is %s", c.within, h.back(), at)
				}
				if x, b := h.access(t, fleet.Deploy); !x.GetAllowed() || b.GetAheadMs() != 0 || b.GetSaid() != "" {
					t.Errorf("the grant that has not ended: %v, %v", x, b)
				}
				if x, _ := h.access(t, fleet.OperateRead); x.GetAllowed() {
					t.Errorf("the grant that ended: %v", x)
				}
				size := h.Book().Log().Size()
				time.Sleep(10 * time.Minute)
				if got := h.Book().Log().Size() - size; got != 0 {
					t.Errorf("%d entries at rest", got)
				}
			})
		})
	}
}

// TestWhatEndedStaysEnded: FAULTS.md A6. A host's clock that is set back revives nothing: an end comes by what has passed, the
// book's time is not set back against it, and never before what the customer signed.
func TestWhatEndedStaysEnded(t *testing.T) {
	for name, c := range map[string]struct {
		by      time.Duration
		restart bool
		hint    time.Duration // 0: no vendor
		rounds  int           // 0: 24; after a restart nobody but the vendor knows better than a host's clock that is past the signature
	}{
		"behind what was signed":          {by: 30 * time.Hour},
		"after the signature":             {by: 23 * time.Hour},
		"and restarted":                   {by: 30 * time.Hour, restart: true, rounds: 4},
		"restarted, and the vendor knows": {by: 23 * time.Hour, restart: true, hint: time.Second},
		"and the vendor knows":            {by: 23 * time.Hour, hint: time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				h := newHost(t)
				time.Sleep(25 * time.Hour)
				h.probe(t)
				h.skew.Store(-int64(c.by))
				if c.restart {
					h.start(t)
				}
				begin(t, h.Appliance, "clock")
				if c.hint > 0 {
					h.Hint(time.Now())
				}
				for range cmp.Or(c.rounds, 24) {
					time.Sleep(time.Hour)
					h.probe(t)
					if x, b := h.access(t, fleet.Deploy); x.GetAllowed() || h.back() || b.GetSaid() == "" {
						t.Fatalf("%v, %v, set back %v", x, b, h.back())
					}
				}
			})
		})
	}
}

// TestAnEndComesWhileTheClockIsBehind: FAULTS.md A6. A host's clock that is set back before an end puts it off by nothing.
func TestAnEndComesWhileTheClockIsBehind(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHost(t)
		begin(t, h.Appliance, "clock")
		time.Sleep(20 * time.Hour)
		h.probe(t)
		if x, _ := h.access(t, fleet.Deploy); !x.GetAllowed() {
			t.Fatal(x)
		}
		h.skew.Store(-int64(10 * time.Hour))
		time.Sleep(5 * time.Hour)
		if x, _ := h.access(t, fleet.Deploy); x.GetAllowed() {
			t.Errorf("an hour after its end: %v", x)
		}
		_, err := appliance.Put(t.Context(), h.Appliance, book.BeginDeploy{Approval: "x"})
		if err == nil || !h.Book().At().After(time.Now().Add(-time.Minute)) {
			t.Errorf("%v; the book's time is %s, and it is %s", err, h.Book().At(), time.Now())
		}
	})
}
