// SPDX-License-Identifier: Apache-2.0

package book

import (
	"bytes"
	"slices"

	"filippo.io/age"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/ledger"
	"github.com/demarc-dev/demarc/operation"
	"github.com/demarc-dev/demarc/seal"
)

// none is the result of a change without one.
type none struct{}

// SetSite records the part of the customer's file that decisions rest on.
type SetSite struct {
	Site Site `json:"site"`
}

// Kind names the change in the log.
func (SetSite) Kind() string { return "site.set/1" }

// Apply refuses keys that it can't read and a move to another vendor.
func (c SetSite) Apply(s *State, _ ledger.Meta) (none, error) {
	const op = "site.set"
	if s.Site.TrustDomain != "" && s.Site.TrustDomain != c.Site.TrustDomain {
		return none{}, fault.New(op, fault.Conflict, "this book belongs to the vendor %q: another vendor needs an appliance of its own",
			s.Site.TrustDomain)
	}
	if err := c.Site.Check(); err != nil {
		return none{}, fault.At(op, fault.Invalid, err)
	}
	for _, p := range s.Pinned {
		if who := c.Site.owner(p.ID); who != "" {
			return none{}, fault.New(op, fault.Denied,
				"key %s is pinned as the customer's, and the file has it as that of %s: nobody speaks for both sides", p.ID, who)
		}
	}
	s.Site = c.Site
	return none{}, nil
}

// MeetVendor records the key of the vendor's log at the first enrolment.
type MeetVendor struct {
	LogKey []byte `json:"log_key"` // PEM
}

// Kind names the change in the log.
func (MeetVendor) Kind() string { return "vendor.meet/1" }

// Apply refuses another key than the first: a vendor's log has one key, and another one is a fork.
func (c MeetVendor) Apply(s *State, _ ledger.Meta) (none, error) {
	const op = "vendor.meet"
	if s.VendorLogKey != nil && !bytes.Equal(s.VendorLogKey, c.LogKey) {
		return none{}, fault.New(op, fault.Denied,
			"the vendor's log has another key than at the first enrolment: its evidence would not continue")
	}
	if _, err := seal.ParseKey(c.LogKey); err != nil {
		return none{}, fault.At(op, fault.Invalid, err)
	}
	s.VendorLogKey = c.LogKey
	return none{}, nil
}

// Pin pins a key of the customer.
type Pin struct {
	Public      []byte `json:"public"` // PEM
	Recipient   string `json:"recipient,omitempty"`
	Endorsement []byte `json:"endorsement,omitempty"`
}

// Kind names the change in the log.
func (Pin) Kind() string { return "key.pin/1" }

// Apply takes the first key from the owner of the socket; a later one needs the signature of a pinned one.
func (c Pin) Apply(s *State, m ledger.Meta) (seal.KeyID, error) {
	const op = "key.pin"
	k, err := seal.ParseKey(c.Public)
	if err != nil {
		return "", fault.At(op, "", err)
	}
	if c.Recipient != "" {
		if _, err := age.ParseX25519Recipient(c.Recipient); err != nil {
			return "", fault.Because(err, op, fault.Invalid, "the recipient is not one of age (age1...)")
		}
	}
	if slices.ContainsFunc(s.Pinned, func(p Pinned) bool { return p.ID == k.ID }) {
		return "", fault.New(op, fault.Conflict, "key %s is pinned already", k.ID)
	}
	if who := s.Site.owner(k.ID); who != "" {
		return "", fault.New(op, fault.Denied, "key %s is that of %s in the appliance's file: nobody speaks for both sides", k.ID, who)
	}
	if len(s.Pinned) >= MaxPinned {
		return "", fault.New(op, fault.Busy, "%d keys are pinned, and that is the most", len(s.Pinned))
	}
	if len(s.Pinned) > 0 {
		keys, err := s.Keys()
		if err != nil {
			return "", err
		}
		if c.Endorsement == nil {
			return "", fault.New(op, fault.Denied,
				"a key is pinned already: another one needs an endorsement signed with it (demarc local pin --endorse-with KEY)")
		}
		e, _, err := seal.Open[operation.Endorsement](c.Endorsement, keys)
		if err != nil {
			return "", fault.At(op, "", err)
		}
		if e.Appliance != s.Appliance || e.Key != k.ID {
			return "", fault.New(op, fault.Denied, "the endorsement is for another key or another appliance")
		}
	}
	s.Pinned = append(slices.Clip(s.Pinned), Pinned{ID: k.ID, Public: c.Public, Recipient: c.Recipient, Since: m.At})
	return k.ID, nil
}

// SetPosture records the posture of ingress.
type SetPosture struct {
	Posture fleet.Posture `json:"posture"`
}

// Kind names the change in the log.
func (SetPosture) Kind() string { return "posture.set/1" }

// Apply refuses a posture that is not one.
func (c SetPosture) Apply(s *State, _ ledger.Meta) (none, error) {
	if err := c.Posture.Check(); err != nil {
		return none{}, err
	}
	s.Posture = c.Posture
	return none{}, nil
}

// UseTransport records the route that the customer prefers.
type UseTransport struct {
	Name string `json:"name"`
}

// Kind names the change in the log.
func (UseTransport) Kind() string { return "transport.use/1" }

// Apply takes any name: the list of routes is in the customer's file.
func (c UseTransport) Apply(s *State, _ ledger.Meta) (none, error) {
	s.Transport = c.Name
	return none{}, nil
}

// ReportsDone drops what the vendor has in its book.
type ReportsDone struct {
	Upto  uint64 `json:"upto"`
	Epoch uint64 `json:"epoch,omitempty"` // number of the epoch of the vendor's book that says so
}

// Kind names the change in the log.
func (ReportsDone) Kind() string { return "reports.done/1" }

// Apply refuses an acknowledgement of what was never sent, and that of another epoch; an old one changes nothing.
func (c ReportsDone) Apply(s *State, m ledger.Meta) (none, error) {
	if c.Epoch != s.Epoch.Number {
		return none{}, fault.New("reports.done", fault.Conflict,
			"epoch %d of the vendor's book acknowledges, and epoch %d is the one that was met", c.Epoch, s.Epoch.Number)
	}
	if c.Upto > s.ReportsSent() {
		return none{}, fault.New("reports.done", fault.Conflict, "the vendor acknowledges report %d, and %d is the last that was written",
			c.Upto, s.ReportsSent())
	}
	if c.Upto > s.ReportsDone {
		s.acknowledge(c.Upto)
		s.catchUp(m)
	}
	return none{}, nil
}

// Observe records a change of health, of presence of secrets or of the posture's name, for the vendor to know.
type Observe struct {
	Status Status `json:"status"`
}

// Kind names the change in the log.
func (Observe) Kind() string { return "status/1" }

// Apply reports it, unless the customer has switched observation off.
func (c Observe) Apply(s *State, m ledger.Meta) (none, error) {
	s.Status = c.Status
	if !s.Decision(fleet.Observe, m.At).Allow {
		return none{}, nil
	}
	s.reportStatus(m)
	s.reportDeployAgain(m) // a grant may have begun, or a deny ended, by its own time
	return none{}, nil
}

// ObserveTransports is [Observe] with failing transports, or ones that failed before: [Observe] has no field for them.
type ObserveTransports Observe

// Kind names the change in the log.
func (ObserveTransports) Kind() string { return "status/2" }

// Apply is that of [Observe].
func (c ObserveTransports) Apply(s *State, m ledger.Meta) (none, error) {
	return Observe(c).Apply(s, m)
}

// Checkpointed queues a head of this log for the vendor to countersign.
type Checkpointed struct {
	Checkpoint Checkpoint `json:"checkpoint"`
}

// Kind names the change in the log.
func (Checkpointed) Kind() string { return "checkpoint.send/1" }

// Apply queues it, if not too many wait.
func (c Checkpointed) Apply(s *State, m ledger.Meta) (none, error) {
	if n := s.waiting(func(r Report) bool { return r.Checkpoint != nil }); n >= MaxHeads {
		return none{}, fault.New("checkpoint.send", fault.Conflict, "%d checkpoints wait for the vendor already", n)
	}
	cp := c.Checkpoint
	s.report(Report{At: m.At, Checkpoint: &cp})
	s.Asked = append(slices.Clip(s.Asked), cp.Note)
	s.Asked = s.Asked[max(0, len(s.Asked)-MaxAsked):]
	return none{}, nil
}

// appendBounded appends to what is stored of one kind; the oldest is dropped first.
func appendBounded(kept [][]byte, b []byte) [][]byte {
	kept = append(slices.Clip(kept), b)
	return kept[max(0, len(kept)-MaxWitnessed):]
}

// Grounds are why an operation is as it is: what the vendor is told, and the sentence of the customer's side.
type Grounds struct {
	Why      fleet.Reason
	Sentence string
}

// GroundsOf is the reason that an error has.
func GroundsOf(err error) Grounds { return Grounds{fleet.ReasonOf(err), fault.Text(err)} }

// move makes the next state of an operation, and reports it with a statement if there is one.
func (s *State) move(o *Operation, e operation.Event, b Grounds, m ledger.Meta, statement, output []byte) error {
	next, err := operation.Next(o.State, e)
	if err != nil {
		return err
	}
	o.State, o.Reason = next, b.Sentence
	s.operations = s.operations.Set(o.ID, *o)
	s.report(Report{At: m.At, Operation: &OperationReport{ID: o.ID, State: string(next), Why: b.Why.Clipped(), Statement: statement,
		Output: output}})
	return nil
}
