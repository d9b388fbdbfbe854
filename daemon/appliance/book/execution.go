// SPDX-License-Identifier: Apache-2.0

package book

import (
	"time"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/grant"
	"github.com/demarc-dev/demarc/ledger"
	"github.com/demarc-dev/demarc/operation"
	"github.com/demarc-dev/demarc/seal"
)

// The changes of this file are made by the appliance itself, before and after each act. What they allow is decided here,
// in the book, at the moment of the act, and not when it was asked for.

// BeginDeploy asks whether the newest approval may be carried out, and counts the uses before the act.
type BeginDeploy struct {
	Approval string `json:"approval"`
}

// Kind names the change in the log.
func (BeginDeploy) Kind() string { return "deploy.begin/1" }

// Apply refuses what no grant allows now, and an approval that has ended; the refusal is on record and reported. A deploy that
// this process begins anew, because an earlier one ended in the middle of it, is judged anew, and counts no use.
func (c BeginDeploy) Apply(s *State, m ledger.Meta) (none, error) {
	const op = "deploy.begin"
	if s.Approved.ID == "" || s.Approved.ID != c.Approval {
		return none{}, fault.New(op, fault.Conflict, "another approval took the place of this one")
	}
	if !m.At.Before(s.Approved.NotAfter) {
		return none{}, fleet.Reason{Kind: fleet.ApprovalEnded}.With(fault.New(op, fault.Expired,
			"the approval of this plan ended at %s, before the deploy began: look at it again (demarc review) and approve it anew",
			s.Approved.NotAfter.UTC().Format(time.RFC3339)))
	}
	if s.Deploy.Approval == c.Approval && s.Deploy.State == fleet.StateDeploying {
		if why := s.DeployEnds(m.At); why != "" {
			return none{}, ConsentEnded.With(fault.New(op, fault.Denied, "%s", why))
		}
		return none{}, nil
	}
	plan, rel, o, err := s.Plan(s.Approved.Release)
	if err != nil {
		return none{}, fault.At(op, "", err)
	}
	if plan.Digest() != s.Approved.Plan {
		return none{}, PlanChanged.With(fault.New(op, fault.Conflict,
			"the release compiles to another plan than the one that was approved: review again"))
	}
	grants := s.Grants
	var used []string
	for _, p := range s.DeployPhases() {
		d := grant.Decide(grant.Input{Appliance: s.Appliance, Phase: p, Now: m.At}, grants)
		if !d.Allow {
			return none{}, notGranted.With(fault.New(op, fault.Denied, "%s", d.Why))
		}
		if grants, err = grants.Use(d.Grant, m.At); err != nil {
			return none{}, fault.At(op, "", err)
		}
		used = append(used, d.Grant)
	}
	s.Grants, s.Approved.Grants = grants, used
	return none{}, s.deployed(Deploy{Approval: c.Approval, Release: o.Digest, Version: rel.Version, Plan: s.Approved.Plan,
		State: fleet.StateDeploying}, m)
}

// Reasons that are met in more than one place.
var (
	ConsentEnded = fleet.Reason{Kind: fleet.ConsentEnded}
	notGranted   = fleet.Reason{Kind: fleet.NotGranted}
	PlanChanged  = fleet.Reason{Kind: fleet.PlanChanged}
	wrongTime    = fleet.Reason{Kind: fleet.WrongTime}
	askerUnknown = fleet.Reason{Kind: fleet.AskerUnknown}
	tooManyOpen  = fleet.Reason{Kind: fleet.TooManyOpen}
)

// DeployEnds says why the deploy that began may not continue, "" if it may: one of the grants that it was counted on was revoked or
// has ended, or a deny forbids it.
func (s State) DeployEnds(at time.Time) string {
	own := counted(s.Grants, s.Approved.Grants...)
	for _, p := range s.DeployPhases() {
		if d := grant.Decide(grant.Input{Appliance: s.Appliance, Phase: p, Now: at}, own); !d.Allow {
			return "the consent ended while it was being deployed: " + d.Why
		}
	}
	return ""
}

// EndDeploy records the state of a deployment.
type EndDeploy struct {
	Approval string       `json:"approval"`
	State    fleet.State  `json:"state"`            // waiting, deployed, degraded or failed
	Reason   string       `json:"reason,omitempty"` // see [Deploy]
	Why      fleet.Reason `json:"why,omitzero"`
}

// Kind names the change in the log.
func (EndDeploy) Kind() string { return "deploy.state/1" }

// Apply records the edge and reports it.
func (c EndDeploy) Apply(s *State, m ledger.Meta) (none, error) {
	const op = "deploy.state"
	var a Approved
	switch c.Approval {
	case "":
		return none{}, fault.New(op, fault.Invalid, "no approval is named")
	case s.Approved.ID:
		a = s.Approved
	case s.Good.ID:
		a = s.Good
	default:
		return none{}, fault.New(op, fault.Conflict, "another approval took the place of this one")
	}
	o, err := s.Offer(a.Release)
	if err != nil {
		return none{}, fault.At(op, "", err)
	}
	if c.State == fleet.StateDeployed {
		s.Good = a
	}
	return none{}, s.deployed(Deploy{Approval: a.ID, Release: a.Release, Version: o.Version, Plan: a.Plan, State: c.State, Reason: c.Reason,
		Why: c.Why.Clipped()}, m)
}

func (s *State) deployed(d Deploy, m ledger.Meta) error {
	was := s.Deploy
	s.Deploy = d
	if was.ForVendor() == d.ForVendor() {
		return nil
	}
	if !s.Decision(fleet.Observe, m.At).Allow {
		return nil
	}
	s.reportDeploy(m)
	return nil
}

// Start asks whether an approved operation may begin now, and counts its use before the act.
type Start struct {
	ID string `json:"id"`
}

// Kind names the change in the log.
func (Start) Kind() string { return "operation.start/1" }

// Apply decides anew: a grant that was revoked, ran out or was spent since the approval ends the operation here, and so does one
// that would end before the operation's own time limit.
func (c Start) Apply(s *State, m ledger.Meta) (operation.State, error) {
	const op = "operation.start"
	o, err := s.Operation(c.ID)
	if err != nil {
		return "", err
	}
	if o.State != operation.Approved {
		return "", fault.New(op, fault.Conflict, "operation %q is %s", o.ID, o.State)
	}
	r, who, unnamed := s.asker(o.Request) // the file may name others by now
	a, err := seal.Peek[operation.Approval](o.Approval)
	if err != nil {
		return "", fault.At(op, fault.Internal, err)
	}
	if unnamed != nil {
		return operation.Cancelled, s.move(&o, operation.Stop, GroundsOf(unnamed), m, nil, nil)
	}
	if !m.At.Before(r.NotAfter) || !m.At.Before(a.NotAfter) {
		err := s.move(&o, operation.Expire, Grounds{fleet.Reason{Kind: fleet.RequestEnded}, "its time ran out before it began"}, m, nil, nil)
		return operation.Expired, err
	}
	t, err := s.Template(r)
	if err == nil {
		d := s.decide(r, who, t, m.At, t.Limit())
		if !d.Allow {
			err = notGranted.With(fault.New(op, fault.Denied, "%s", d.Why))
		} else if s.Grants, err = s.Grants.Use(d.Grant, m.At); err == nil {
			o.Grant, o.Started = d.Grant, m.At
			return operation.Running, s.move(&o, operation.Start, Grounds{}, m, nil, nil)
		}
	}
	return operation.Cancelled, s.move(&o, operation.Stop, GroundsOf(err), m, nil, nil)
}

// Finish records the sealed result of an operation, and its output, encrypted to the customer.
type Finish struct {
	ID     string `json:"id"`
	Result []byte `json:"result"`
	Output []byte `json:"output,omitempty"`
	Failed string `json:"failed,omitempty"` // why it did not come to its end, for the customer
	Lapsed string `json:"lapsed,omitempty"` // its grant ended while it ran, and it was killed: in place of Failed

	Why fleet.Reason `json:"why,omitzero"` // with Failed or Lapsed: what the vendor is told of it
}

// Kind names the change in the log.
func (Finish) Kind() string { return "operation.finish/1" }

// Record is what the log shows: of the output its digest.
func (c Finish) Record() any {
	if len(c.Output) == 0 {
		return nil
	}
	return struct {
		ID     string      `json:"id"`
		Result []byte      `json:"result"`
		Output *ledger.Cut `json:"output,omitempty"`
		Failed string      `json:"failed,omitempty"`
		Lapsed string      `json:"lapsed,omitempty"`

		Why fleet.Reason `json:"why,omitzero"`
	}{c.ID, c.Result, ledger.CutOf(c.Output), c.Failed, c.Lapsed, c.Why}
}

// Apply holds the output. For an operation that was cancelled while it ran, the result is kept as evidence and the output
// is not.
func (c Finish) Apply(s *State, m ledger.Meta) (operation.State, error) {
	const op = "operation.finish"
	o, err := s.Operation(c.ID)
	if err != nil {
		return "", err
	}
	if len(c.Output) > MaxOutput {
		return "", fault.New(op, fault.Invalid, "the output has %d bytes, and %d is the most", len(c.Output), MaxOutput)
	}
	o.Result = c.Result
	switch {
	case o.State == operation.Cancelled:
		s.operations = s.operations.Set(o.ID, o)
		s.report(Report{At: m.At, Operation: &OperationReport{ID: o.ID, State: string(o.State), Statement: c.Result}})
		return o.State, nil
	case c.Lapsed != "":
		return operation.Cancelled, s.move(&o, operation.Stop, Grounds{c.Why, c.Lapsed}, m, c.Result, nil)
	case c.Failed != "":
		return operation.Failed, s.move(&o, operation.Fail, Grounds{c.Why, c.Failed}, m, c.Result, nil)
	}
	o.Output = c.Output
	return operation.Held, s.move(&o, operation.Finish, Grounds{}, m, c.Result, nil)
}

// Expire ends what waited too long for an answer.
type Expire struct {
	ID string `json:"id"`
}

// Kind names the change in the log.
func (Expire) Kind() string { return "operation.expire/1" }

// Apply refuses to expire what is still good.
func (c Expire) Apply(s *State, m ledger.Meta) (none, error) {
	o, err := s.Operation(c.ID)
	if err != nil {
		return none{}, err
	}
	r, err := seal.Peek[operation.Request](o.Request)
	if err != nil {
		return none{}, fault.At("operation.expire", fault.Internal, err)
	}
	if m.At.Before(r.NotAfter) {
		return none{}, fault.New("operation.expire", fault.Conflict, "it is good until %s", r.NotAfter.Format(time.RFC3339))
	}
	return none{}, s.move(&o, operation.Expire, Grounds{fleet.Reason{Kind: fleet.NotAnswered}, "nobody answered in time"}, m, nil, nil)
}

// Lapsed reports that the grant of a running operation has ended, as the cause of the end of its context.
func (s State) Lapsed(grant string, now time.Time) error {
	for _, h := range s.Grants.Held {
		if u := h.Grant.Until; h.ID == grant && !u.IsZero() && !now.Before(u) {
			return ConsentEnded.With(fault.New("appliance.exec", fault.Expired, "its grant ended at %s while it ran: it was killed",
				u.UTC().Format(time.RFC3339)))
		}
	}
	return nil
}
