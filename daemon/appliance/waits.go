// SPDX-License-Identifier: Apache-2.0

package appliance

import (
	"cmp"
	"fmt"
	"slices"
	"time"

	localv1 "github.com/demarc-dev/demarc/api/local/v1"
	"github.com/demarc-dev/demarc/daemon/appliance/book"
	"github.com/demarc-dev/demarc/fleet"
)

// endingSoon is how long before its end a consent is told to end, at most; and never before the last quarter of its life.
const endingSoon = 72 * time.Hour

// waitsFor says which release waits for the customer, and for what: an approval, or a grant. It returns nil if none does.
func waitsFor(s book.State, now time.Time) *localv1.Waiting {
	if o, ok := s.Unapproved(); ok {
		return &localv1.Waiting{Release: string(o.Digest), Version: o.Version, SinceUnix: unix(o.At), Why: "it is offered, and not approved",
			Do: "demarc review --release " + string(o.Digest)}
	}
	if s.Deploy.State != fleet.StateWaiting || s.Deploy.Why.Kind != fleet.NotGranted {
		return nil
	}
	o, err := s.Offer(s.Deploy.Release)
	if err != nil {
		return nil
	}
	return &localv1.Waiting{Release: string(o.Digest), Version: o.Version, SinceUnix: unix(o.At),
		Why: "it is approved, and not granted: " + s.Deploy.Reason, Do: "demarc grant " + string(lacking(s, now))}
}

// lacking is the first phase that the deploy needs and that is not granted.
func lacking(s book.State, now time.Time) fleet.Phase {
	phases := s.DeployPhases()
	for _, p := range phases {
		if !s.Decision(p, now).Allow {
			return p
		}
	}
	return phases[len(phases)-1]
}

// endings lists what of the customer's consent ends soon: grants in force, and the approval of a plan whose deploy has not begun.
func endings(s book.State, now time.Time) []*localv1.Ending {
	soon := func(from, at time.Time) bool {
		return !at.IsZero() && now.Before(at) && at.Sub(now) <= min(endingSoon, at.Sub(from)/4)
	}
	var out []*localv1.Ending
	for _, h := range s.Grants.Held {
		if g := h.Grant; soon(g.From, g.Until) && !now.Before(g.From) && (g.Uses == 0 || int(g.Uses) > h.Used) {
			out = append(out, &localv1.Ending{What: fmt.Sprintf("grant of %s", g.Phase), Id: h.ID, AtUnix: g.Until.Unix(),
				Do: "demarc grant " + string(g.Phase)})
		}
	}
	begun := s.Deploy.Approval == s.Approved.ID && s.Deploy.State != fleet.StateWaiting
	if a := s.Approved; a.ID != "" && a.ID != s.Good.ID && !begun && soon(a.At, a.NotAfter) {
		out = append(out, &localv1.Ending{What: "approval of plan " + a.Plan.Short(), Id: a.ID, AtUnix: a.NotAfter.Unix(),
			Do: "demarc review --release " + string(a.Release)})
	}
	slices.SortStableFunc(out, func(a, b *localv1.Ending) int { return cmp.Compare(a.AtUnix, b.AtUnix) })
	return out
}

// epochStatus is what the customer is told; nil in the first epoch of a vendor's book that was never another one.
func epochStatus(s book.State) *localv1.VendorEpoch {
	if len(s.Epochs) == 0 && s.EpochRefused == "" {
		return nil
	}
	out := &localv1.VendorEpoch{Number: s.Epoch.Number, Id: s.Epoch.ID, Refused: s.EpochRefused}
	if n := len(s.Epochs); n > 0 {
		e := s.Epochs[n-1]
		out.Cause, out.MetUnix, out.Lost = e.Cause, e.At.Unix(), e.Lost.Sentences()
	}
	return out
}
