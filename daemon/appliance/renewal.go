// SPDX-License-Identifier: Apache-2.0

package appliance

import (
	"context"
	"time"

	"connectrpc.com/connect"

	"github.com/demarc-dev/demarc/api"
	boundaryv1 "github.com/demarc-dev/demarc/api/boundary/v1"
	"github.com/demarc-dev/demarc/identity"
)

// Timing of renewals.
const (
	rolledSpread = 10 * time.Minute // over which a fleet renews once another CA issues
	renewRest    = time.Minute      // the least time between two renewals
	renewBase    = 10 * time.Second // wait after a failed one; doubles
	renewCap     = time.Hour
	lookAgain    = 6 * time.Hour // at the latest; a host that slept has missed its timers
)

// renewal asks for the next certificate from half of the life of this one on, and at once (spread over the fleet) where
// another CA issues than the one that issued this one.
func (a *Appliance) renewal(ctx context.Context, ready func()) error {
	ready()
	var due time.Time // when the certificate of this serial is renewed, by the wallet's clock
	var serial string
	var tainted bool
	failed := 0
	for {
		wait := lookAgain
		if leaf, _ := a.creds.Leaf(); leaf != nil {
			if s, t := string(identity.SerialOf(leaf.Leaf)), a.creds.Tainted(); s != serial || t != tainted {
				serial, tainted, failed = s, t, 0
				due = a.due(leaf.Leaf.NotAfter, identity.RenewFrom(leaf.Leaf, identity.DefaultBackdate), tainted)
			}
			l := a.link.Load()
			until := due.Sub(a.creds.Now())
			switch {
			case l == nil: // the nudge comes with the next channel
			case l.shown != "" && l.shown != serial: // it was dialled while this certificate was on its way
				_ = l.cc.Close() // it may be closed already: the switch dials again, and the nudge comes with that channel
			case until > 0:
				wait = min(wait, until)
			default:
				if err := a.renew(ctx, l); err == nil {
					wait = renewRest
				} else if ctx.Err() == nil {
					wait = min(renewCap, renewBase<<min(failed, 10))
					wait = wait/2 + time.Duration(a.opts.Rand()*float64(wait)/2)
					failed++
					due = a.creds.Now().Add(wait)
					a.log.Warn("the certificate was not renewed", "until", leaf.Leaf.NotAfter, "again in", wait, "err", err)
				}
			}
		}
		t := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			t.Stop()
			return nil
		case <-t.C:
		case <-a.wake:
			t.Stop()
		}
	}
}

// due is when a certificate is renewed: some time after half of its life, so that a fleet that enrolled in one hour
// does not renew in one hour; within minutes where its CA no longer issues.
func (a *Appliance) due(end, half time.Time, tainted bool) time.Time {
	if tainted {
		now := a.creds.Now()
		return now.Add(time.Duration(a.opts.Rand() * float64(max(0, min(rolledSpread, end.Sub(now)/4))))) // not after its own end
	}
	return half.Add(time.Duration(a.opts.Rand() * float64(end.Sub(half)) / 4))
}

func (a *Appliance) renew(ctx context.Context, l *link) error {
	const op = "appliance.renew"
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	key, request, err := a.creds.PendingKey()
	if err != nil {
		return err
	}
	res, err := l.boundary(256<<10).Renew(ctx, connect.NewRequest(&boundaryv1.RenewRequest{Csr: request}))
	if err != nil {
		return api.FromWire(op, err)
	}
	if err := a.creds.StoreCertificate(key, res.Msg.GetCertificate(), nil, 0); err != nil {
		return err
	}
	a.log.Info("certificate renewed")
	// where it is not closed already; the switch dials again at once, with the new certificate; what is under way is sent again
	_ = l.cc.Close()
	return nil
}
