// SPDX-License-Identifier: Apache-2.0

// Package refusal records refused calls at a bounded rate, and bounds how often callers without a certificate may call.
package refusal

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	"golang.org/x/time/rate"

	"github.com/demarc-dev/demarc/api"
	"github.com/demarc-dev/demarc/daemon/controlplane/book"
	"github.com/demarc-dev/demarc/daemon/controlplane/limit"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/telemetry"
)

// How often refusals are recorded. Excess refusals are counted, and the count is in the next one that is recorded.
var (
	namedRate     = limit.Rate{PerSecond: 0.25, Burst: 5} // one caller with a name
	allNamedRate  = limit.Rate{PerSecond: 1, Burst: 20}   // all of them together
	bootstrapRate = limit.Rate{PerSecond: 1, Burst: 64}   // all anonymous callers together
)

// callersMax is how many callers are counted separately; the least recently refused one is evicted.
const callersMax = 4096

// Recorder bounds what refused callers add to this node's log and to the book. No caller can fill them, use up another caller's share, or
// hide the fork of a customer's log behind many calls.
//
// Its methods may be called concurrently.
type Recorder struct {
	replica  *book.Replica
	log      *slog.Logger
	unlogged telemetry.Counter

	by    *limit.Limiter
	named *rate.Limiter

	anonymous *rate.Limiter  // all callers without a certificate together
	sources   *limit.Limiter // the same, by network
}

// NewRecorder makes a recorder. unlogged counts refusals that are neither logged nor recorded; it may be nil.
func NewRecorder(r *book.Replica, log *slog.Logger, unlogged telemetry.Counter) *Recorder {
	return &Recorder{replica: r, log: log, unlogged: unlogged, by: limit.NewLimiter(callersMax),
		named:     rate.NewLimiter(allNamedRate.PerSecond, allNamedRate.Burst),
		anonymous: rate.NewLimiter(anonymousRate, anonymousBurst), sources: limit.NewLimiter(networksMax)}
}

// Callers without a certificate may call this often, all of them together; beyond that they are refused with fault.Busy.
const (
	anonymousRate  = 200 // a second
	anonymousBurst = 400
)

// Caller is the caller that a refusal is counted for.
type Caller struct {
	Key   string
	Rate  limit.Rate
	named bool // it has a certificate: also counts for the common rate of all such callers
}

// Principal is the caller with a certificate of that name.
func Principal(p fleet.Principal) Caller {
	return Caller{Key: "/" + string(p), Rate: namedRate, named: true}
}

// Fork is an appliance whose log was forked: counted separately from its calls.
func Fork(appliance fleet.ApplianceID) Caller {
	return Caller{Key: "fork/" + string(appliance), Rate: namedRate}
}

var (
	atBootstrap = Caller{Key: "bootstrap", Rate: bootstrapRate} // anonymous callers whose proof, token or invitation was refused
	elsewhere   = Caller{Key: "anonymous", Rate: namedRate}     // anonymous callers of a procedure that is not for them: in the log only
)

// Allow reports whether a refusal is recorded now, and how many of the same caller before it were not.
func (r *Recorder) Allow(who Caller) (now bool, left int) {
	var common *rate.Limiter
	if who.named {
		common = r.named
	}
	return r.by.Allow(who.Key, who.Rate, common)
}

// Count is [Recorder.Allow], and counts what is left out.
func (r *Recorder) Count(who Caller) (now bool, left int) {
	if now, left = r.Allow(who); !now && r.unlogged != nil {
		r.unlogged.Inc()
	}
	return now, left
}

// Call logs a call that the access table refused, and records it if the caller has a certificate.
func (r *Recorder) Call(ctx context.Context, w api.Who, procedure string) {
	who := elsewhere
	if w.Principal != "" {
		who = Principal(w.Principal)
	}
	now, left := r.Count(who)
	if !now {
		return
	}
	r.log.Warn("call refused", "caller", w.Class, "principal", w.Principal, "procedure", procedure, "left_out", left)
	if w.Principal == "" {
		return
	}
	reason := "not in the table for " + string(w.Class)
	if w.Rank != "" {
		reason = fmt.Sprintf("it needs the role %s, and the caller's is %s", api.Least(procedure), w.Rank)
	}
	r.Record(ctx, w.Principal, book.Refuse{What: procedure, Name: string(w.Principal), Fault: fault.Denied, Reason: reason}, left)
}

// Named records that a caller with a certificate was refused.
func (r *Recorder) Named(ctx context.Context, by fleet.Principal, what book.Refuse) {
	if now, left := r.Count(Principal(by)); now {
		r.Record(ctx, by, what, left)
	}
}

// IsRefusal reports whether an error refuses the caller, and is not a failure of this node.
func IsRefusal(err error) bool {
	k := fault.Of(err)
	return k != fault.Unavailable && k != fault.Unsure && k != fault.Busy && k != fault.NotLeader
}

// AnonymousCall records why an anonymous caller was refused.
func (r *Recorder) AnonymousCall(ctx context.Context, what, name string, err error) {
	if !IsRefusal(err) {
		return
	}
	if now, left := r.Count(atBootstrap); now {
		r.Record(ctx, r.replica.Self(), book.Refuse{What: what, Name: fault.Clip(name), Fault: fault.Of(err), Reason: fault.Text(err)}, left)
	}
}

// Record submits a refusal. If it can't be recorded, that is logged; the call is refused all the same.
func (r *Recorder) Record(ctx context.Context, by fleet.Principal, what book.Refuse, left int) {
	if left > 0 {
		what.Reason += fmt.Sprintf(" (and %d refusals before this one that were not recorded)", left)
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	if _, err := book.Submit(ctx, r.replica, by, "", what); err != nil {
		r.log.Error("a refusal is not on record", "what", what.What, "reason", what.Reason, "error", err)
	}
}

// Bounds for one source. Appliances behind one NAT, proxy or private endpoint share a source and these bounds; beyond them they are
// refused with fault.Busy.
const (
	networksMax = 4096 // counted separately; the least recently used one is evicted
)

// networkRate bounds the calls of the bootstrap service of one network.
var networkRate = limit.Rate{PerSecond: 20, Burst: 100}

// Anonymous is the limiter of all callers without a certificate together.
func (r *Recorder) Anonymous() *rate.Limiter { return r.anonymous }

// Heard reports whether a call of an anonymous caller at addr is permitted now. Its network's own limit is checked first, so that a flood
// uses up its own share and not the common one.
func (r *Recorder) Heard(addr string) bool {
	ok, _ := r.sources.Allow(limit.Network(addr), networkRate, r.anonymous)
	return ok
}

// Busy is the error for a caller without a certificate if there are too many of them.
func Busy() error {
	return fault.New("controlplane.Bootstrap", fault.Busy, "too many callers without a certificate at once: try again in a few seconds")
}
