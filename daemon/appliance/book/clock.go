// SPDX-License-Identifier: Apache-2.0

package book

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"sync"
	"time"

	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/ledger"
)

// When the book's time is set back to the host's clock.
const (
	clockEvery = 5 * time.Second
	clockLimit = time.Minute      // the book may be ahead of the host's clock by so much
	clockShort = time.Minute      // for so long it must be ahead if a second clock agrees with the host's
	clockLong  = 10 * time.Minute // and so long if none does
	clockOff   = 5 * time.Minute  // if the vendor's differs by more from the host's, the host's is not trusted
)

// bookTime is the time by which the book judges ends: the host's clock, or what the clock that only runs forward has counted
// since the host's was read, whichever is later. So an end comes even if somebody sets the host's clock back. A host's clock that
// was ahead once leaves both behind: tend sets them back. The vendor's time is a hint for that, and moves no end by itself.
// Its methods may be called concurrently.
type bookTime struct {
	mu sync.Mutex

	ref   time.Time // the latest that was
	since time.Time // when that was, by the clock that only runs forward

	start   time.Time // what the host's clock said when this program started
	started time.Time
	sound   bool // the book was not ahead of it then

	vendor   time.Time // what the vendor's clock said last
	vendorAt time.Time // when that was

	seen   time.Time // the host's clock at the last look
	seenAt time.Time
	ahead  time.Time // since when the book is ahead, and the host's clock runs evenly; zero if it is not ahead
	why    string    // why it is not set back yet
}

// now returns the time, and stores the host's clock if it is later.
func (b *bookTime) now(host time.Time) time.Time {
	b.mu.Lock()
	defer b.mu.Unlock()
	mono := time.Now()
	if b.since.IsZero() {
		b.ref, b.since = host, mono
	}
	if t := b.ref.Add(mono.Sub(b.since)); t.After(host) {
		return t.UTC()
	}
	b.ref, b.since = host, mono
	return host.UTC()
}

// begin starts at the later one of the host's clock and the book's time.
func (b *bookTime) begin(host, book time.Time) {
	b.mu.Lock()
	defer b.mu.Unlock()
	mono := time.Now()
	b.ref, b.since, b.start, b.started, b.sound = host, mono, host, mono, book.Sub(host) <= clockLimit
	if book.After(host) {
		b.ref = book
	}
}

// hint notes the vendor's time.
func (b *bookTime) hint(vendor time.Time) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.vendor, b.vendorAt = vendor, time.Now()
}

// back forgets that it was ever later than the host's clock.
func (b *bookTime) back(host time.Time) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.ref, b.since, b.ahead, b.why = host, time.Now(), time.Time{}, ""
}

// look reports whether the book is to be set back to the host's clock now. vouched is the latest time that a document of the
// customer's and the host's clock have both shown: it has been later than that.
func (b *bookTime) look(host, book, vouched time.Time) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	mono := time.Now()
	near := func(t, at time.Time, by time.Duration) bool { return t.Add(mono.Sub(at)).Sub(host).Abs() <= by }
	if book.Sub(host) <= clockLimit && b.ref.Add(mono.Sub(b.since)).Sub(host) <= clockLimit {
		b.ahead, b.why = time.Time{}, ""
		b.seen, b.seenAt = host, mono
		return false
	}
	if b.ahead.IsZero() || !near(b.seen, b.seenAt, clockLimit) {
		b.ahead = mono
	}
	b.seen, b.seenAt = host, mono
	wait := clockLong
	known, counted := !b.vendorAt.IsZero(), b.sound && near(b.start, b.started, clockLimit)
	agrees := known && near(b.vendor, b.vendorAt, clockLimit)
	if counted || agrees && !b.sound {
		wait = clockShort
	}
	switch left := wait - mono.Sub(b.ahead); {
	case host.Before(vouched):
		b.why = fmt.Sprintf("this host's clock is behind what the customer signed at %s: set it", vouched.UTC().Format(time.RFC3339))
	case known && !near(b.vendor, b.vendorAt, clockOff):
		b.why = "the vendor's clock agrees with the book's time or with neither: set this host's clock (is its NTP running?)"
	case b.sound && !counted && !agrees:
		b.why = "this host's clock was set back since this program started, and no clock of the vendor's agrees with it: set it right, " +
			"or restart demarcd if it is right"
	case left > 0:
		b.why = fmt.Sprintf("it is set back within %s, if this host's clock stays as it is", wait)
	default:
		return true
	}
	return false
}

// reason is why the book's time is not set back yet, "" if it is not ahead.
func (b *bookTime) reason() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.why
}

// stamp is the time of a change that is made now.
func (s *Store) stamp() time.Time { return s.time.now(s.host()) }

// VendorTime takes the vendor's time: a hint for [Store.TendTime] that moves no end by itself.
func (s *Store) VendorTime(at time.Time) { s.time.hint(at) }

// Lead is by how much the book's time is later than the host's clock, 0 if that is little, and why it is not set back yet.
func (s *Store) Lead() (time.Duration, string) {
	if lead := s.Now().Sub(s.host()); lead > clockLimit {
		return lead, s.time.reason()
	}
	return 0, ""
}

// TendTime sets the book's time back, on record, once the host's clock is right again after it was ahead, until ctx ends. What the book
// decided meanwhile stays decided; a grant whose end has not come by the host's clock counts again.
func (s *Store) TendTime(ctx context.Context) {
	tick := time.NewTicker(clockEvery)
	defer tick.Stop()
	said := false
	for {
		host := s.host().UTC()
		set := s.time.look(host, s.Now(), s.View().Vouched)
		if why := s.time.reason(); why != "" && !said {
			s.log.Warn("the book's time is ahead of this host's clock: grants and approvals are judged by the later one",
				"book", s.Now(), "host", host, "next", why)
		}
		said = s.time.reason() != ""
		if set {
			from := s.Now()
			if err := s.setBack(ctx, host); err != nil {
				s.log.Warn("the book's time is not set back", "err", err)
			} else {
				s.log.Warn("the book's time is set back", "from", from, "to", host)
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// setBack sets the book's time to the host's. A change that is made at the same moment may come in between: then it is tried again.
func (s *Store) setBack(ctx context.Context, host time.Time) error {
	for try := 0; ; try++ {
		from := s.book.At()
		if !from.After(host) {
			break
		}
		c := ledger.SetTime[State]{From: from, To: host}
		m := c.Meta(fleet.Local, drawID())
		_, err := ledger.Foresee(s.book, m, c)
		if err == nil {
			_, err = ledger.Submit(context.WithoutCancel(ctx), s.local, m, c)
		}
		if err == nil {
			break
		}
		if try == 8 {
			return err
		}
	}
	s.time.back(host)
	return nil
}

// vouch remembers the latest time that a document of the customer's and the stamp of its change have both shown. The book's time
// is not set back before it. A grant says only from when it counts: that is when it was signed, or it says nothing here.
func (s *State) vouch(document []byte, at time.Time) {
	var envelope struct {
		Payload string `json:"payload"`
	}
	var signed struct {
		At        time.Time `json:"at"`
		From      time.Time `json:"from"`
		Predicate struct {
			At time.Time `json:"at"`
		} `json:"predicate"`
	}
	if json.Unmarshal(document, &envelope) != nil {
		return
	}
	payload, err := base64.StdEncoding.DecodeString(envelope.Payload)
	if err != nil || json.Unmarshal(payload, &signed) != nil {
		return
	}
	for _, t := range []time.Time{signed.At, signed.Predicate.At} {
		if t.After(at) {
			t = at
		}
		if t.After(s.Vouched) {
			s.Vouched = t.UTC()
		}
	}
	if f := signed.From; !f.After(at) && at.Sub(f) < 24*time.Hour && f.After(s.Vouched) {
		s.Vouched = f.UTC()
	}
}
