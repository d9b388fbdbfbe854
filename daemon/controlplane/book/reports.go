// SPDX-License-Identifier: Apache-2.0

package book

import (
	"slices"
	"time"

	"golang.org/x/mod/sumdb/note"

	"github.com/demarc-dev/demarc/audit"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/ledger"
	"github.com/demarc-dev/demarc/seal"
)

// Report is one numbered report of an appliance. Exactly one of Deploy, Operation, Probe, Status, Checkpoint,
// Cosigned, Refused, Withdrawn is set.
type Report struct {
	Name   fleet.ApplianceID `json:"name"`
	Number uint64            `json:"number"`
	At     time.Time         `json:"at"` // the appliance's clock

	Deploy     *DeployReport    `json:"deploy,omitempty"`
	Operation  *OperationReport `json:"operation,omitempty"`
	Probe      *ProbeIndex      `json:"probe,omitempty"`
	Checkpoint *Checkpoint      `json:"checkpoint,omitempty"`
	Cosigned   []byte           `json:"cosigned,omitempty"`
	Refused    string           `json:"refused,omitempty"` // in place of an invalid countersignature: why, its size and its digest
	Status     *Status          `json:"status,omitempty"`
	Withdrawn  bool             `json:"withdrawn,omitempty"` // it was about a former epoch: only its number counts
}

// Status is the health of a deployment as the appliance last reported a change of it.
type Status struct {
	Posture  fleet.Exposure  `json:"posture"`
	Services []ServiceHealth `json:"services,omitempty"`
	Secrets  []Presence      `json:"secrets,omitempty"`
	Offer    OfferWaits      `json:"offer,omitzero"`
}

// OfferWaits is the newest release on offer that the customer has not approved.
type OfferWaits struct {
	Release fleet.Digest `json:"release"`
	Why     fleet.Reason `json:"why"`
}

// ServiceHealth is the health of one service.
type ServiceHealth struct {
	Name     string `json:"name"`
	Healthy  bool   `json:"healthy"`
	Restarts uint32 `json:"restarts"`

	Why fleet.Reason `json:"why,omitzero"`
}

// Presence reports whether a secret exists; there is no field for its value.
type Presence struct {
	Name    string `json:"name"`
	Present bool   `json:"present"`
}

// DeployReport is a change of state of a deployment.
type DeployReport struct {
	Release fleet.Digest `json:"release"`
	Version string       `json:"version"`
	State   fleet.State  `json:"state"`
	Plan    fleet.Digest `json:"plan"`
	Why     fleet.Reason `json:"why,omitzero"`
}

// OperationReport is a change of state of an operation.
type OperationReport struct {
	ID        string       `json:"id"`
	State     string       `json:"state"`
	Why       fleet.Reason `json:"why,omitzero"`
	Statement []byte       `json:"statement,omitempty"`
	Output    []byte       `json:"output,omitempty"`
}

// Took is the result of a report.
type Took struct {
	Done   uint64 `json:"done"`             // number of the last report in the book
	New    bool   `json:"new"`              // false if the report was in the book already
	Reason string `json:"reason,omitempty"` // why it had no effect
}

func (Report) Kind() string { return "report/1" }

// Record is what the log shows: of an output only its digest.
func (c Report) Record() any {
	if c.Operation == nil || len(c.Operation.Output) == 0 {
		return nil
	}
	o, out := *c.Operation, c.Operation.Output
	o.Output, c.Operation = nil, &o
	return struct {
		Report
		Output *ledger.Cut `json:"output"`
	}{c, ledger.CutOf(out)}
}

// Apply takes each report once and in order: one that is in the book already is answered and changes nothing, one that is out of sequence
// is refused.
func (c Report) Apply(s *State, _ ledger.Meta) (Took, error) {
	a, err := s.Appliance(c.Name)
	if err != nil {
		return Took{}, err
	}
	if c.Number <= a.ReportsDone {
		return Took{Done: a.ReportsDone}, nil
	}
	if c.Number != a.ReportsDone+1 {
		return Took{}, fault.New("report", fault.Conflict,
			"report %d of appliance %q leaves a gap: %d is the last one in the book", c.Number, c.Name, a.ReportsDone)
	}
	a.ReportsDone = c.Number
	s.met(&a)
	reason := c.Refused
	switch {
	case c.Deploy != nil:
		d := c.Deploy
		a.Release, a.Version, a.State, a.Plan, a.Why = d.Release, d.Version, d.State, d.Plan, d.Why
	case c.Operation != nil:
		if !s.progress(c.Name, *c.Operation) {
			reason = "no such operation was requested of it in what this book holds"
		}
	case c.Cosigned != nil:
		if err := a.CheckCountersigned(s.TrustDomain, c.Cosigned); err != nil {
			reason = fault.Text(err)
		}
	case c.Status != nil:
		a.Health = *c.Status
	case c.Probe != nil:
		a.Probe = a.Probe.heard(*c.Probe)
	}
	s.appliances = s.appliances.Set(c.Name, a)
	return Took{Done: c.Number, New: true, Reason: reason}, nil
}

// CheckCountersigned stores a countersignature of this appliance over a head that was sent to it, and drops that head and the older ones
// from those that wait. Anything else is refused, and changes no evidence.
func (a *Appliance) CheckCountersigned(domain string, b []byte) error {
	witness, err := a.witness(domain)
	if err != nil {
		return err
	}
	_, i, err := audit.Countersigned(b, a.Asked, witness)
	if err != nil {
		return err
	}
	a.Cosigned, a.Asked, a.LogFrom = keep(a.Cosigned, b), slices.Clone(a.Asked[i+1:]), nil
	return nil
}

// witness verifies countersignatures of this appliance.
func (a Appliance) witness(domain string) (note.Verifier, error) {
	k, err := seal.ParseKey(a.LogKey)
	if err != nil {
		return nil, err
	}
	return audit.CosignVerifier(audit.CustomerOrigin(domain, a.Name), k.Public)
}

// progress updates an operation, and reports whether it exists. If the operation is not in the book, because its request was lost with a
// former epoch or never made, the report is recorded and changes nothing: if it were refused, it would be sent again forever.
func (s *State) progress(name fleet.ApplianceID, r OperationReport) bool {
	key := string(name) + "/" + r.ID
	o, ok := s.operations.Get(key)
	if !ok {
		return false
	}
	o.State, o.Why = r.State, r.Why
	if r.Statement != nil {
		o.Statements = append(slices.Clip(o.Statements), r.Statement)
	}
	if r.Output != nil {
		o.Output = r.Output
	}
	s.operations = s.operations.Set(key, o)
	return true
}

// heard counts one echo. Indexes arrive in order, so one at or below the last is a duplicate.
func (p Probe) heard(e ProbeIndex) Probe {
	if e.ID != p.ID {
		return p
	}
	switch {
	case e.Index <= p.Last:
		p.Doubled++
	case e.Index == p.Last+1:
		p.Echoed, p.Last = p.Echoed+1, e.Index
	default:
		p.OutOfOrder, p.Echoed, p.Last = p.OutOfOrder+1, p.Echoed+1, e.Index
	}
	return p
}
