// SPDX-License-Identifier: Apache-2.0

package book

import (
	"slices"
	"time"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/grant"
	"github.com/demarc-dev/demarc/ledger"
	"github.com/demarc-dev/demarc/operation"
	"github.com/demarc-dev/demarc/seal"
)

// Consent is one document that the customer signed. What it is, its own payload type says. It is opened here, in the
// book, with the keys that are pinned at this moment: the log holds the document itself.
type Consent struct {
	Document []byte `json:"document"`
	Output   []byte `json:"output,omitempty"` // with the release of an output only: encrypted to the operator who asked
}

// Consented says what a document did.
type Consented struct {
	What    string   `json:"what"`              // grant, revocation, deny, lift, plan approval, approval, release, cancel
	ID      string   `json:"id"`                // of the grant, the deny or the operation
	Stopped []string `json:"stopped,omitempty"` // operations that ran and may not continue
}

// Kind names the change in the log.
func (Consent) Kind() string { return "consent/1" }

// Record is what the log shows: of the output its digest.
func (c Consent) Record() any {
	if len(c.Output) == 0 {
		return nil
	}
	return struct {
		Document []byte      `json:"document"`
		Output   *ledger.Cut `json:"output,omitempty"`
	}{c.Document, ledger.CutOf(c.Output)}
}

// The documents by their payload types: those of grants have one each, in-toto statements share one.
var consents = map[string]func(Consent, *State, []seal.Key, ledger.Meta) (Consented, error){
	grant.Grant{}.PayloadType():  give,
	grant.Revoke{}.PayloadType(): revoke,
	grant.Deny{}.PayloadType():   forbid,
	grant.Lift{}.PayloadType():   lift,
	operation.TypePlanApproval:   approvePlan,
	operation.TypeApproval:       approve,
	operation.TypeRelease:        release,
	operation.TypeCancel:         cancel,
}

// Apply verifies the document and does what it says to the book; the act follows from the book.
func (c Consent) Apply(s *State, m ledger.Meta) (Consented, error) {
	const op = "consent"
	keys, err := s.Keys()
	if err != nil {
		return Consented{}, fault.At(op, fault.Internal, err)
	}
	if len(keys) == 0 {
		return Consented{}, fault.New(op, fault.Denied, "no key is pinned on this appliance: demarc local pin KEY.pub")
	}
	kind, _, err := seal.Verify(c.Document, keys)
	if err != nil {
		return Consented{}, fault.At(op, "", err)
	}
	if kind == (operation.Approval{}).PayloadType() {
		if kind, err = operation.Kind(c.Document); err != nil {
			return Consented{}, fault.At(op, "", err)
		}
	}
	do, ok := consents[kind]
	if !ok {
		return Consented{}, fault.New(op, fault.Invalid, "a document of type %q decides nothing here", fault.Clip(kind))
	}
	out, err := do(c, s, keys, m)
	if err == nil {
		s.vouch(c.Document, m.At)
		s.reportDeployAgain(m) // the document may have let observing begin again
	}
	return out, err
}

// open opens a document and checks that it is for this appliance.
func open[T interface {
	seal.Body
	Check() error
}](c Consent, s *State, keys []seal.Key, of func(T) fleet.ApplianceID) (T, string, []seal.KeyID, error) {
	const op = "consent"
	v, by, err := seal.Open[T](c.Document, keys)
	if err != nil {
		return v, "", nil, fault.At(op, "", err)
	}
	if err := v.Check(); err != nil {
		return v, "", nil, fault.At(op, "", err)
	}
	if a := of(v); a != s.Appliance {
		return v, "", nil, fault.New(op, fault.Denied, "the document is for appliance %q, this is %q", fault.Clip(string(a)), s.Appliance)
	}
	id, err := seal.Identity(c.Document)
	if err != nil {
		return v, "", nil, fault.At(op, "", err)
	}
	ids := make([]seal.KeyID, 0, len(by))
	for _, k := range by {
		ids = append(ids, k.ID)
	}
	return v, id, ids, nil
}

func give(c Consent, s *State, keys []seal.Key, m ledger.Meta) (Consented, error) {
	g, id, by, err := open(c, s, keys, func(g grant.Grant) fleet.ApplianceID { return g.Appliance })
	if err != nil {
		return Consented{}, err
	}
	s.Grants, err = s.Grants.Give(id, g, by, m.At)
	return Consented{What: "grant", ID: id}, err
}

func revoke(c Consent, s *State, keys []seal.Key, m ledger.Meta) (Consented, error) {
	r, id, _, err := open(c, s, keys, func(r grant.Revoke) fleet.ApplianceID { return r.Appliance })
	if err != nil {
		return Consented{}, err
	}
	if s.Grants, _, err = s.Grants.Revoke(id, r, m.At); err != nil {
		return Consented{}, err
	}
	return s.settle(Consented{What: "revocation", ID: id}, m)
}

func forbid(c Consent, s *State, keys []seal.Key, m ledger.Meta) (Consented, error) {
	d, id, by, err := open(c, s, keys, func(d grant.Deny) fleet.ApplianceID { return d.Appliance })
	if err != nil {
		return Consented{}, err
	}
	if s.Grants, err = s.Grants.Forbid(id, d, by, m.At); err != nil {
		return Consented{}, err
	}
	return s.settle(Consented{What: "deny", ID: id}, m)
}

func lift(c Consent, s *State, keys []seal.Key, m ledger.Meta) (Consented, error) {
	l, id, _, err := open(c, s, keys, func(l grant.Lift) fleet.ApplianceID { return l.Appliance })
	if err != nil {
		return Consented{}, err
	}
	s.Grants, err = s.Grants.Lift(id, l, m.At)
	return Consented{What: "lift", ID: id}, err
}

// settle ends, in the same change, every operation that the grants no longer allow: those that wait are rejected, those
// that run are cancelled and named, so that their processes can be killed before the customer is answered.
func (s *State) settle(out Consented, m ledger.Meta) (Consented, error) {
	for _, o := range s.Operations() {
		if o.State != operation.Requested && o.State != operation.Approved && o.State != operation.Running {
			continue
		}
		r, who, err := s.asker(o.Request)
		grants := s.Grants
		if o.State == operation.Running {
			grants = counted(grants, o.Grant)
		}
		var d grant.Decision
		var t operation.Template
		if err == nil {
			t, err = s.Template(r)
		}
		if err == nil {
			with := *s
			with.Grants = grants
			d = with.decide(r, who, t, m.At, 0)
		} else {
			d.Why = fault.Text(err)
		}
		if d.Allow {
			continue
		}
		event := operation.Stop
		if o.State == operation.Requested {
			event = operation.Reject
		}
		if o.State == operation.Running {
			out.Stopped = append(out.Stopped, o.ID)
		}
		if err := s.move(&o, event, Grounds{fleet.Reason{Kind: fleet.ConsentRevoked}, "the customer revoked the consent: " + d.Why}, m, nil,
			nil); err != nil {
			return out, err
		}
	}
	return out, nil
}

// counted is what a running act rests on: the grants whose uses it was counted on, with that use given back, and no others. An
// act ends with its own grants, whatever else is granted.
func counted(g grant.State, ids ...string) grant.State {
	var own []grant.Held
	for _, h := range g.Held {
		if slices.Contains(ids, h.ID) {
			h.Used--
			own = append(own, h)
		}
	}
	g.Held = own
	return g
}

// DeployPhases lists what a deploy needs: install for the first one, deploy for each.
func (s State) DeployPhases() []fleet.Phase {
	if s.Good.Release == "" {
		return []fleet.Phase{fleet.Install, fleet.Deploy}
	}
	return []fleet.Phase{fleet.Deploy}
}

func approvePlan(c Consent, s *State, keys []seal.Key, m ledger.Meta) (Consented, error) {
	const op = "consent.plan"
	a, id, _, err := open(c, s, keys, func(a operation.PlanApproval) fleet.ApplianceID { return a.Appliance })
	if err != nil {
		return Consented{}, err
	}
	if err := operation.InForce("approval", a.NotAfter, m.At); err != nil {
		return Consented{}, fault.At(op, "", err)
	}
	if s.counted(id, a.At) {
		return Consented{}, fault.New(op, fault.Conflict,
			"this approval was used before, or is older than those that are remembered: sign a new one")
	}
	plan, _, o, err := s.Plan(a.Release)
	if err != nil {
		return Consented{}, fault.At(op, "", err)
	}
	if plan.Digest() != a.Plan {
		return Consented{}, fault.New(op, fault.Conflict, "the approval binds plan %s, and the release compiles to %s now: review again",
			a.Plan.Short(), plan.Digest().Short())
	}
	for _, p := range s.DeployPhases() {
		if !slices.Contains(a.Phases, p) {
			return Consented{}, fault.New(op, fault.Denied, "this deploy needs the phase %s, and the approval does not name it", p)
		}
	}
	s.Approved = Approved{ID: id, Release: o.Digest, Plan: a.Plan, At: m.At, NotAfter: a.NotAfter}
	s.count(id, a.At)
	return Consented{What: "plan approval", ID: id}, nil
}

// counted reports whether an approval of a plan that was signed at this time may have counted before.
func (s State) counted(id string, at time.Time) bool {
	return !s.CountedTo.IsZero() && !at.After(s.CountedTo) || slices.ContainsFunc(s.Counted, func(c Counted) bool { return c.ID == id })
}

// count stores an approval permanently: if there is no more room, what is as old as the oldest is refused from then on. An end that has
// passed forgets nothing, for the book's clock may be set back.
func (s *State) count(id string, at time.Time) {
	i, _ := slices.BinarySearchFunc(s.Counted, at, func(c Counted, at time.Time) int { return c.At.Compare(at) })
	s.Counted = slices.Insert(slices.Clone(s.Counted), i, Counted{id, at})
	if over := len(s.Counted) - MaxCounted; over > 0 {
		s.CountedTo, s.Counted = s.Counted[over-1].At, s.Counted[over:]
	}
}

func approve(c Consent, s *State, keys []seal.Key, m ledger.Meta) (Consented, error) {
	const op = "consent.operation"
	a, _, _, err := open(c, s, keys, func(a operation.Approval) fleet.ApplianceID { return a.Appliance })
	if err != nil {
		return Consented{}, err
	}
	o, err := s.Operation(a.ID)
	if err != nil {
		return Consented{}, err
	}
	out := Consented{What: "approval", ID: a.ID}
	if a.Request != fleet.DigestOf(o.Request) {
		return out, fault.New(op, fault.Conflict, "the approval binds another request: look at it again (demarc consent show %s)", a.ID)
	}
	if a.Decision == operation.DecisionReject {
		o.Approval = c.Document
		return out, s.move(&o, operation.Reject, Grounds{fleet.Reason{Kind: fleet.Rejected}, a.Reason}, m, c.Document, nil)
	}
	if err := operation.InForce("approval", a.NotAfter, m.At); err != nil {
		return out, fault.At(op, "", err)
	}
	if !slices.Equal(a.Argv, o.Argv) {
		return out, fault.New(op, fault.Conflict, "the approval is for another command than the one that would run")
	}
	if why := s.admit(&o, m.At); why != nil {
		return out, fault.At(op, "", why)
	}
	if err := s.verifiable(o.Request, c.Document, a.At, m.At, keys); err != nil {
		return out, err
	}
	o.Approval = c.Document
	return out, s.move(&o, operation.Approve, Grounds{}, m, c.Document, nil)
}

// verifiable refuses an approval whose chain an auditor would refuse later: a link by the wrong party, times that contradict
// each other. Nothing runs of which the evidence would be worthless.
func (s *State) verifiable(request, approval []byte, approved, now time.Time, customers []seal.Key) error {
	const op = "consent.operation"
	operators := Trust{}.operators(recorded{site: s.Site})
	if _, err := operation.VerifyChain(request, approval, nil, nil, operation.Keys{Operators: operators, Customers: customers}); err != nil {
		return fault.Because(err, op, fault.Of(err), "request and approval make no chain: %s", fault.Text(err))
	}
	return fault.At(op, "", operation.Dated("approval", approved, now))
}

func release(c Consent, s *State, keys []seal.Key, m ledger.Meta) (Consented, error) {
	const op = "consent.release"
	r, _, _, err := open(c, s, keys, func(r operation.Release) fleet.ApplianceID { return r.Appliance })
	if err != nil {
		return Consented{}, err
	}
	o, err := s.Operation(r.ID)
	if err != nil {
		return Consented{}, err
	}
	out := Consented{What: "release", ID: r.ID}
	if o.Result == nil || r.Result != fleet.DigestOf(o.Result) {
		return out, fault.New(op, fault.Conflict, "the document binds another result than that of operation %q", r.ID)
	}
	if res, err := seal.Peek[operation.Result](o.Result); err != nil || r.At.Before(res.Ended.Add(-operation.Skew)) {
		return out, fault.New(op, fault.Conflict,
			"the document was made before the operation had ended: the clock of the appliance or of the signer is wrong, set it")
	}
	o.Release, o.Output = c.Document, nil
	if r.Decision == operation.DecisionWithhold {
		return out, s.move(&o, operation.Withhold, Grounds{fleet.Reason{Kind: fleet.Withheld}, r.Reason}, m, c.Document, nil)
	}
	if len(c.Output) == 0 || len(c.Output) > MaxOutput || fleet.DigestOf(c.Output) != r.Output {
		return out, fault.New(op, fault.Conflict,
			"the output that came along is not the one that the document binds, or is larger than %d bytes", MaxOutput)
	}
	return out, s.move(&o, operation.LetOut, Grounds{Sentence: r.Reason}, m, c.Document, c.Output)
}

func cancel(c Consent, s *State, keys []seal.Key, m ledger.Meta) (Consented, error) {
	r, _, _, err := open(c, s, keys, func(r operation.Cancel) fleet.ApplianceID { return r.Appliance })
	if err != nil {
		return Consented{}, err
	}
	o, err := s.Operation(r.ID)
	if err != nil {
		return Consented{}, err
	}
	out := Consented{What: "cancel", ID: r.ID}
	if r.Request != fleet.DigestOf(o.Request) {
		return out, fault.New("consent.cancel", fault.Conflict, "the document binds another request")
	}
	if o.State == operation.Running {
		out.Stopped = []string{o.ID}
	}
	return out, s.move(&o, operation.Stop, Grounds{fleet.Reason{Kind: fleet.CancelledByCustomer}, "cancelled by the customer"}, m, nil, nil)
}
