// SPDX-License-Identifier: Apache-2.0

package controlplane

import (
	"context"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"github.com/demarc-dev/demarc/daemon/controlplane/book"
	"github.com/demarc-dev/demarc/daemon/controlplane/limit"
	"github.com/demarc-dev/demarc/daemon/controlplane/refusal"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
)

// What one enrolled appliance may have its vendor's node do. It is far above what an appliance of this build does; see
// docs/channel.md. Reports and artifacts above it are slowed, which costs no other appliance anything; a renewal is told to come again.
const (
	reportRate   = 200     // reports a second that enter the book
	reportBurst  = 4096    // at once: all that an appliance keeps while it is away comes at its return
	reportBytes  = 1 << 20 // a second, of reports
	reportVolume = 16 << 20
	statusEvery  = 2 * time.Second // reports of status; the newest one says it all
	statusBurst  = 4096            // likewise

	renewEvery = 2 * time.Minute // certificates, for leaves of 30 days; less for shorter ones
	renewBurst = 10              // a lost answer is asked for again
	renewPart  = 1000            // of a leaf's life, at the most

	artifactStreams = 4        // at once
	artifactBytes   = 32 << 20 // a second, of all of them together

	edgeEvery = 5 * time.Second // comings that the book is told of, and with each the leaving before it
	edgeBurst = 60

	tooMuchEvery = time.Hour // between two entries of the record about one appliance that is above its bounds
)

// quota is what one appliance uses up. The methods may be called concurrently.
type quota struct {
	reports, volume, status, renewals, bytes, edges *rate.Limiter
	streams                                         chan struct{}
}

// quotas is those of the appliances that were heard since the start: as many as the fleet has.
type quotas struct {
	life time.Duration // of leaves

	mu sync.Mutex
	of map[fleet.ApplianceID]*quota
}

func newQuotas(life time.Duration) *quotas {
	return &quotas{life: life, of: map[fleet.ApplianceID]*quota{}}
}

// get is what an enrolled appliance uses up.
func (q *quotas) get(name fleet.ApplianceID) *quota {
	q.mu.Lock()
	defer q.mu.Unlock()
	one := q.of[name]
	if one == nil {
		every := renewEvery
		if q.life > 0 {
			every = min(every, q.life/renewPart)
		}
		one = &quota{reports: rate.NewLimiter(reportRate, reportBurst), volume: rate.NewLimiter(reportBytes, reportVolume),
			status: rate.NewLimiter(rate.Every(statusEvery), statusBurst), renewals: rate.NewLimiter(rate.Every(max(every, time.Millisecond)), renewBurst),
			bytes: rate.NewLimiter(artifactBytes, artifactBytes), edges: rate.NewLimiter(rate.Every(edgeEvery), edgeBurst), streams: make(chan struct{}, artifactStreams)}
		q.of[name] = one
	}
	return one
}

// within waits until n more are allowed; mostly they are at once.
func within(ctx context.Context, lim *rate.Limiter, n int) error {
	if lim.AllowN(time.Now(), n) {
		return nil
	}
	return lim.WaitN(ctx, n)
}

// admit waits until an appliance may have one more report of so many bytes taken. The reader of its channel waits meanwhile, and so
// does the appliance.
func (s *Server) admit(ctx context.Context, name fleet.ApplianceID, size int, isStatus bool) error {
	q := s.quotas.get(name)
	began := time.Now()
	err := within(ctx, q.reports, 1)
	if err == nil {
		err = within(ctx, q.volume, min(size, reportVolume))
	}
	if err == nil && isStatus {
		err = within(ctx, q.status, 1)
	}
	if time.Since(began) > time.Second {
		s.tooMuch(name, "it reports more than it may, and is slowed")
	}
	if err != nil {
		return fault.Because(err, "controlplane.report", fault.Busy, "the appliance reports more than it may: the report was not taken, send it again later")
	}
	return nil
}

// comes waits until the book may be told once more that an appliance has come: one that comes and goes without end is slowed.
func (s *Server) comes(ctx context.Context, name fleet.ApplianceID) error {
	began := time.Now()
	err := within(ctx, s.quotas.get(name).edges, 1)
	if err != nil || time.Since(began) > time.Second {
		s.tooMuch(name, "it comes and goes more often than it may, and is slowed")
	}
	if err != nil {
		return fault.Because(err, "controlplane.Channel", fault.Busy, "appliance %q came %d times in a row, as often as it may: come back in %s", name, edgeBurst, edgeEvery)
	}
	return nil
}

// tooMuch puts on record, once in a while, that an appliance is above its bounds, and how often it was.
func (s *Server) tooMuch(name fleet.ApplianceID, what string) {
	now, left := s.refusals.Allow(refusal.Caller{Key: "quota/" + string(name), Rate: limit.Rate{PerSecond: rate.Every(tooMuchEvery), Burst: 1}})
	if !now {
		return
	}
	s.log.Warn("an appliance is above its bounds", "appliance", name, "what", what, "left_out", left)
	ctx, cancel := context.WithTimeout(context.Background(), submitFor)
	defer cancel()
	s.refusals.Record(ctx, s.replica.Self(), book.Refuse{What: "quota", Name: string(name), Fault: fault.Busy, Reason: what}, left)
}

// renews refuses an appliance that asks for certificates faster than one can be needed.
func (s *Server) renews(name fleet.ApplianceID) error {
	if s.quotas.get(name).renewals.Allow() {
		return nil
	}
	s.tooMuch(name, "it asks for more certificates than it may, and is told to come again")
	return fault.New("controlplane.Renew", fault.Busy, "appliance %q has had %d certificates in a row, as many as it may: try again in %s", name, renewBurst, renewEvery)
}

// stream counts a stream of an artifact to an appliance. The caller ends it with done, and asks pace before each piece.
func (s *Server) stream(ctx context.Context, name fleet.ApplianceID) (pace func(n int) error, done func(), err error) {
	q := s.quotas.get(name)
	select {
	case q.streams <- struct{}{}:
	default:
		s.tooMuch(name, "it fetches more artifacts at once than it may, and is told to come again")
		return nil, nil, fault.New("controlplane.Artifact", fault.Busy, "appliance %q fetches %d artifacts at once already, and that is the most: try again when one is there", name, artifactStreams)
	}
	return func(n int) error {
		if err := within(ctx, q.bytes, min(n, artifactBytes)); err != nil {
			return fault.At("controlplane.Artifact", fault.Unavailable, err)
		}
		return nil
	}, func() { <-q.streams }, nil
}
