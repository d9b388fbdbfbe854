// SPDX-License-Identifier: Apache-2.0

package controlplane

import (
	"context"
	"fmt"
	"time"

	"golang.org/x/time/rate"

	"github.com/demarc-dev/demarc/api"
	"github.com/demarc-dev/demarc/daemon/controlplane/book"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
)

// What one brings about by being refused. Of what comes faster the next that goes on record tells how much it was.
var (
	ofRefused  = allowance{rate: 0.25, burst: 5} // one caller with a name
	ofAllNamed = allowance{rate: 1, burst: 20}   // all of them together
	ofNobodies = allowance{rate: 1, burst: 64}   // all who have no name yet
)

// refusersMax is how many callers are told apart. Of the one that was refused longest ago is forgotten what it used up.
const refusersMax = 4096

// refusals is the one bound on what refused callers add to this node's log and to the book. Nobody fills them by knocking,
// nobody uses up what is another one's, and no crowd of callers hides that a customer's log was forked.
type refusals struct {
	by    *budget
	named *rate.Limiter
}

func newRefusals() refusals {
	return refusals{by: newBudget(refusersMax), named: rate.NewLimiter(ofAllNamed.rate, ofAllNamed.burst)}
}

// refuser is whose share a refusal uses up.
type refuser struct {
	key   string
	may   allowance
	named bool // it shares what all callers with a name have together
}

func ofCaller(p fleet.Principal) refuser {
	return refuser{key: "/" + string(p), may: ofRefused, named: true}
}
func ofFork(appliance fleet.ApplianceID) refuser {
	return refuser{key: "fork/" + string(appliance), may: ofRefused}
}

var (
	atBootstrap = refuser{key: "bootstrap", may: ofNobodies} // strangers whose proof, token or invitation was refused
	elsewhere   = refuser{key: "stranger", may: ofRefused}   // strangers who called what is not for them: in the log only
)

// take tells whether a refusal goes on record now, and how many of the same refuser before it did not.
func (r refusals) take(who refuser) (now bool, left int) {
	var common *rate.Limiter
	if who.named {
		common = r.named
	}
	return r.by.take(who.key, who.may, common)
}

// unlessTooMany is [refusals.take] with the measurement of what is left out.
func (s *Server) unlessTooMany(who refuser) (now bool, left int) {
	if now, left = s.refusals.take(who); !now {
		s.meter.Unlogged.Inc()
	}
	return now, left
}

// refused logs a call that the table refused, and puts it on record where the caller has a name.
func (s *Server) refused(ctx context.Context, w api.Who, procedure string) {
	who := elsewhere
	if w.Principal != "" {
		who = ofCaller(w.Principal)
	}
	now, left := s.unlessTooMany(who)
	if !now {
		return
	}
	s.log.Warn("call refused", "caller", w.Class, "principal", w.Principal, "procedure", procedure, "left_out", left)
	if w.Principal == "" {
		return
	}
	reason := "not in the table for " + string(w.Class)
	if w.Rank != "" {
		reason = fmt.Sprintf("it needs the role %s, and the caller's is %s", api.Least(procedure), w.Rank)
	}
	s.putOnRecord(ctx, w.Principal, book.Refuse{What: procedure, Name: string(w.Principal), Fault: fault.Denied, Reason: reason}, left)
}

// onRecord puts on record that a caller with a name was refused.
func (s *Server) onRecord(ctx context.Context, by fleet.Principal, r book.Refuse) {
	if now, left := s.unlessTooMany(ofCaller(by)); now {
		s.putOnRecord(ctx, by, r, left)
	}
}

// isRefusal tells an answer to the caller from trouble here.
func isRefusal(err error) bool {
	k := fault.Of(err)
	return k != fault.Unavailable && k != fault.Unsure && k != fault.Busy && k != fault.NotLeader
}

// strangerRefused puts on record why one who is nobody yet was refused.
func (s *Server) strangerRefused(ctx context.Context, what, name string, err error) {
	if !isRefusal(err) {
		return
	}
	if now, left := s.unlessTooMany(atBootstrap); now {
		s.putOnRecord(ctx, s.replica.Self(), book.Refuse{What: what, Name: fault.Clip(name), Fault: fault.Of(err), Reason: fault.Text(err)}, left)
	}
}

// putOnRecord submits a refusal. That it can't be recorded is logged: the refusal itself stands.
func (s *Server) putOnRecord(ctx context.Context, by fleet.Principal, r book.Refuse, left int) {
	if left > 0 {
		r.Reason += fmt.Sprintf(" (and %d refusals before this one that were not recorded)", left)
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	if _, err := book.Submit(ctx, s.replica, by, "", r); err != nil {
		s.log.Error("a refusal is not on record", "what", r.What, "reason", r.Reason, "error", err)
	}
}
