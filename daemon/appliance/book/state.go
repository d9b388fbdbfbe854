// SPDX-License-Identifier: Apache-2.0

// Package book is the customer's book: its state, the closed set of changes, and the file that holds it. What the vendor sends becomes
// a change only as far as the customer's signed grants allow: this package decides.
package book

import (
	"encoding/json"
	"slices"
	"time"

	"github.com/benbjohnson/immutable"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/grant"
	"github.com/demarc-dev/demarc/ledger"
	"github.com/demarc-dev/demarc/mesh"
	"github.com/demarc-dev/demarc/operation"
	"github.com/demarc-dev/demarc/seal"
)

// State is one state of the customer's book. A copy by assignment is a copy.
type State struct {
	Appliance fleet.ApplianceID
	Customer  fleet.CustomerID

	Site   Site     // what the customer's file says, as far as decisions rest on it
	Pinned []Pinned // the customer's keys, replaced whole
	Grants grant.State

	VendorLogKey []byte // PEM; learned at the first enrolment, never replaced
	Posture      fleet.Posture
	Transport    string // the route that the customer prefers, "" for the first of the configured list

	Offers     []Offer // releases that the vendor offered, oldest first, replaced whole, at most [MaxOffers]
	Approved   Approved
	Good       Approved  // the newest plan that came up healthy
	Counted    []Counted // approvals of plans that counted once, by their dates, replaced whole, at most [MaxCounted]
	CountedTo  time.Time // what was signed at or before may have counted, and be forgotten
	Deploy     Deploy
	operations *immutable.SortedMap[string, Operation]

	OrdersDone  uint64
	Reports     []Report // not acknowledged yet, replaced whole; numbers run from ReportsDone+1
	ReportsDone uint64
	ProbesSeen  uint64

	Vouched    time.Time // see vouch: it has been later than this
	StatusLate bool      // the newest status is to be reported when the one that waits is acknowledged
	DeployLate bool      // and so the newest edge of the deployment
	DeployTold Deploy    // the newest edge of the deployment that was reported

	Epoch        fleet.Epoch // of the vendor's book, as it was met last
	Epochs       []Met       // the last one is that one; replaced whole
	EpochRefused string      // the newest refusal of another one, for people
	Resend       []Report    // acknowledged, and stored to be sent again if the vendor loses them; numbers run up to ReportsDone
	Forgotten    [][]byte    // the vendor's heads that were countersigned here, and whose entries its book has no more; oldest first
	LeastKept    int64       // the fewest entries that the vendor's log kept in an epoch; 0: it was never cut
	VendorHolds  *int64      // size of the head of this log that the vendor's book has; nil: the last of Cosigned

	Status    Status   // as last reported
	Witnessed [][]byte // the vendor's checkpoints that this appliance countersigned, oldest first
	Cosigned  [][]byte // own checkpoints that the vendor countersigned, oldest first
	Asked     [][]byte // own checkpoints that the vendor was asked to countersign and has not yet, oldest first, at most [MaxAsked]
}

// Site is the part of the customer's file that decisions rest on. It is in the book, so that the log shows under which
// of the vendor's keys a decision was made.
type Site struct {
	TrustDomain string     `json:"trust_domain"`
	Runtime     string     `json:"runtime"`
	ReleaseKeys [][]byte   `json:"release_keys"`        // PEM: who may sign releases
	Operators   []Operator `json:"operators,omitempty"` // who may ask for operations
}

// Operator is a person of the vendor whom the customer's file names, with the keys that the person signs requests with.
type Operator struct {
	Name string   `json:"name"`
	Keys [][]byte `json:"keys"` // PEM
}

// Bounds on what the vendor can make this book hold.
const (
	MaxOffers     = 32
	MaxOperations = 1024 // in the list
	MaxRefused    = 256  // of them: that were refused before anybody was asked
	MaxActive     = 128  // of them: that wait for the customer, are approved, or run
	MaxHeld       = 64   // of them: whose output waits for the customer, when another one is asked for
	MaxWitnessed  = 256
	MaxAsked      = 4 // own checkpoints for which the vendor's answer is still taken
	MaxPinned     = 16
	MaxSiteKeys   = 256
	MaxCounted    = 256
	MaxOutput     = 4 << 20 // bytes of one operation's output, encrypted
)

// Bounds on the reports that wait for the vendor, by what causes them. What the vendor's orders cause has bounds of its own:
// at the bound the order is refused, or the newest report takes the place of the others. Reports of what the customer decides
// and of how operations end have none, since operations are bounded: no new one is taken while so many reports wait.
const (
	MaxEchoes          = 4096     // of probes
	MaxHeads           = 64       // checkpoints of this log; and countersigned ones of the vendor's
	MaxDeployEdges     = 256      // of the deployment: of later ones only the newest is reported
	MaxOperationEdges  = 4096     // of operations, when another one is asked for
	MaxOperationsBytes = 64 << 20 // of their documents and outputs, and of those that are held, when another one is asked for
)

// LeftOut replaces the body of an order that was refused.
type LeftOut struct {
	What   string       `json:"what"`         // release, operation, cancel, probe, checkpoint, cosigned
	ID     string       `json:"id,omitempty"` // of the operation
	Digest fleet.Digest `json:"digest"`
	Size   int          `json:"size"` // bytes
}

// Pinned is a key of the customer, pinned by the customer's own act.
type Pinned struct {
	ID        seal.KeyID `json:"id"`
	Public    []byte     `json:"public"`              // PEM
	Recipient string     `json:"recipient,omitempty"` // age recipient for output
	Since     time.Time  `json:"since"`
}

// Offer is a release on offer, whose signature was checked before it entered the book.
type Offer struct {
	Digest  fleet.Digest `json:"digest"`
	App     string       `json:"app"`
	Version string       `json:"version"`
	Sealed  []byte       `json:"sealed"`
	At      time.Time    `json:"at"`
}

// Approved is the newest plan that the customer approved.
type Approved struct {
	ID      string       `json:"id"` // digest of the sealed approval
	Release fleet.Digest `json:"release"`
	Plan    fleet.Digest `json:"plan"`
	At      time.Time    `json:"at"`

	NotAfter time.Time `json:"not_after"`        // before which the deploy must begin
	Grants   []string  `json:"grants,omitempty"` // whose uses were counted when it began; it continues as long as they are in force
}

// Counted is a document that counts once, and what is needed to know it again.
type Counted struct {
	ID string    `json:"id"`
	At time.Time `json:"at"` // when it was signed, by its own word
}

// Deploy is the state of the deployment.
type Deploy struct {
	Approval string       `json:"approval,omitempty"` // id of the approval that it carries out
	Release  fleet.Digest `json:"release,omitempty"`
	Version  string       `json:"version,omitempty"`
	Plan     fleet.Digest `json:"plan,omitempty"`
	State    fleet.State  `json:"state,omitempty"`
	Reason   string       `json:"reason,omitempty"` // for the customer alone: it may name paths and the customer's stores
	Why      fleet.Reason `json:"why,omitzero"`     // what the vendor may know of it
}

// ForVendor is what of it the vendor may know.
func (d Deploy) ForVendor() Deploy {
	d.Reason = ""
	return d
}

// Status is the health as last reported to the vendor.
type Status struct {
	Posture    fleet.Exposure     `json:"posture,omitempty"`
	Services   []ServiceHealth    `json:"services,omitempty"`
	Secrets    []Presence         `json:"secrets,omitempty"`
	Transports []TransportFailure `json:"roads,omitempty"` // only in a change of the kind status/2
	Offer      OfferWaits         `json:"offer,omitzero"`
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

// Presence reports whether a secret exists.
type Presence struct {
	Name    string `json:"name"`
	Present bool   `json:"present"`
}

// Operation is one operation of the vendor, with everything that the customer knows of it.
type Operation struct {
	ID       string          `json:"id"`
	State    operation.State `json:"state"`
	Reason   string          `json:"reason,omitempty"` // for the customer: the vendor gets only its kind
	Phase    fleet.Phase     `json:"phase"`
	Request  []byte          `json:"request,omitempty"`
	Left     *LeftOut        `json:"left,omitempty"` // in place of the request, if it was refused before a decision of the customer
	Approval []byte          `json:"approval,omitempty"`
	Result   []byte          `json:"result,omitempty"`
	Release  []byte          `json:"release,omitempty"`
	Argv     []string        `json:"argv,omitempty"`
	Service  string          `json:"service,omitempty"`
	Grant    string          `json:"grant,omitempty"`  // whose use was counted when it began
	Started  time.Time       `json:"started,omitzero"` // when it was let begin: within the time of its request and its approval
	Output   []byte          `json:"output,omitempty"` // encrypted to the customer, while it waits for release
	At       time.Time       `json:"at"`
}

// Statements lists those that there are, oldest first.
func (o Operation) Statements() [][]byte {
	var out [][]byte
	for _, b := range [][]byte{o.Approval, o.Result, o.Release} {
		if b != nil {
			out = append(out, b)
		}
	}
	return out
}

// Report is one numbered thing that the vendor may know. Exactly one of its fields is set.
type Report struct {
	At         time.Time        `json:"at"`
	Deploy     *Deploy          `json:"deploy,omitempty"`
	Operation  *OperationReport `json:"operation,omitempty"`
	Probe      *ProbeIndex      `json:"probe,omitempty"`
	Checkpoint *Checkpoint      `json:"checkpoint,omitempty"`
	Cosigned   []byte           `json:"cosigned,omitempty"`
	Status     *Status          `json:"status,omitempty"`
	Withdrawn  bool             `json:"withdrawn,omitempty"` // it was about a former epoch: only its number counts
}

// Checkpoint is a signed head with the proof that its log extends the one that was countersigned last.
type Checkpoint struct {
	Note  []byte   `json:"note"`
	From  int64    `json:"from"`
	Proof [][]byte `json:"proof,omitempty"`
}

// OperationReport is a change of state of an operation.
type OperationReport struct {
	ID        string       `json:"id"`
	State     string       `json:"state"`
	Why       fleet.Reason `json:"why,omitzero"`
	Statement []byte       `json:"statement,omitempty"`
	Output    []byte       `json:"output,omitempty"` // with state released only; encrypted to the operator who asked
}

// ProbeIndex is one message of a probe.
type ProbeIndex struct {
	ID    string `json:"id"`
	Index uint64 `json:"index"`
}

// NewState returns the first state of an appliance's book: everything closed, no key trusted.
func NewState(name fleet.ApplianceID, customer fleet.CustomerID) State {
	return State{Appliance: name, Customer: customer, Posture: fleet.Posture{Exposure: fleet.Closed},
		operations: immutable.NewSortedMap[string, Operation](nil)}
}

// Keys returns the pinned keys as they verify documents.
func (s State) Keys() ([]seal.Key, error) {
	pem := make([][]byte, 0, len(s.Pinned))
	for _, p := range s.Pinned {
		pem = append(pem, p.Public)
	}
	return keysOf(pem)
}

func keysOf(pem [][]byte) ([]seal.Key, error) {
	out := make([]seal.Key, 0, len(pem))
	for _, p := range pem {
		k, err := seal.ParseKey(p)
		if err != nil {
			return nil, err
		}
		out = append(out, k)
	}
	return out, nil
}

// Offer looks up an offered release, the newest one for the empty digest.
func (s State) Offer(d fleet.Digest) (Offer, error) {
	for _, o := range slices.Backward(s.Offers) {
		if d == "" || o.Digest == d {
			return o, nil
		}
	}
	if d == "" {
		return Offer{}, fault.New("appliance.Offer", fault.NotFound, "the vendor has offered no release yet")
	}
	return Offer{}, fault.New("appliance.Offer", fault.NotFound, "no release %s is on offer", d.Short())
}

// Operation returns an operation by id.
func (s State) Operation(id string) (Operation, error) {
	o, ok := s.operations.Get(id)
	if !ok {
		return o, fault.New("appliance.Operation", fault.NotFound, "no operation %q", fault.Clip(id))
	}
	return o, nil
}

// Operations lists all operations by id.
func (s State) Operations() []Operation {
	out := make([]Operation, 0, s.operations.Len())
	for it := s.operations.Iterator(); !it.Done(); {
		_, o, _ := it.Next()
		out = append(out, o)
	}
	return out
}

// report appends to the outbox. The caller bounds reports that the vendor can cause without limit: see [MaxEchoes].
func (s *State) report(r Report) { s.Reports = append(slices.Clip(s.Reports), r) }

// waiting counts the reports of a kind in the outbox.
func (s State) waiting(of func(Report) bool) int {
	n := 0
	for _, r := range s.Reports {
		if of(r) {
			n++
		}
	}
	return n
}

func (r Report) ofStatus() bool { return r.Status != nil }
func (r Report) ofDeploy() bool { return r.Deploy != nil }

// reportStatus reports the status. While one waits, the newest follows it when that one is acknowledged.
func (s *State) reportStatus(m ledger.Meta) {
	if s.StatusLate = s.waiting(Report.ofStatus) > 0; !s.StatusLate {
		status := s.Status
		s.report(Report{At: m.At, Status: &status})
	}
}

// reportDeploy reports an edge of the deployment. While many wait, only the newest follows them.
func (s *State) reportDeploy(m ledger.Meta) {
	if s.DeployLate = s.waiting(Report.ofDeploy) >= MaxDeployEdges; !s.DeployLate {
		d := s.Deploy.ForVendor()
		s.report(Report{At: m.At, Deploy: &d})
		s.DeployTold = d
	}
}

// DeployUnreported reports whether the vendor may know the state of the deployment and it was not reported, because observing was off.
func (s State) DeployUnreported(at time.Time) bool {
	return !s.DeployLate && s.DeployTold != s.Deploy.ForVendor() && s.Decision(fleet.Observe, at).Allow
}

// reportDeployAgain reports the state of the deployment if that was not reported: once, and nothing of what came before it.
func (s *State) reportDeployAgain(m ledger.Meta) {
	if s.DeployUnreported(m.At) {
		s.reportDeploy(m)
	}
}

// catchUp reports what was held back, as far as there is room and the customer still permits it.
func (s *State) catchUp(m ledger.Meta) {
	if !s.StatusLate && !s.DeployLate {
		return
	}
	if !s.Decision(fleet.Observe, m.At).Allow {
		s.StatusLate, s.DeployLate = false, false
		return
	}
	if s.DeployLate {
		s.reportDeploy(m)
	}
	if s.StatusLate {
		s.reportStatus(m)
	}
}

// ReportsSent is the number of the newest report.
func (s State) ReportsSent() uint64 { return s.ReportsDone + uint64(len(s.Reports)) }

type plain State // without methods

type stateJSON struct {
	plain
	Operations []Operation
}

// MarshalJSON writes the state in a canonical order.
func (s State) MarshalJSON() ([]byte, error) {
	return json.Marshal(stateJSON{plain(s), s.Operations()})
}

// UnmarshalJSON reads a state strictly.
func (s *State) UnmarshalJSON(b []byte) error {
	var p stateJSON
	if err := seal.StrictJSON(b, &p); err != nil {
		return fault.At("appliance.State", "", err)
	}
	n := State(p.plain)
	n.operations = immutable.NewSortedMap[string, Operation](nil)
	for _, o := range p.Operations {
		n.operations = n.operations.Set(o.ID, o)
	}
	*s = n
	return nil
}

// Unapproved returns the newest offer if it waits for the customer's approval.
func (s State) Unapproved() (Offer, bool) {
	o, err := s.Offer("")
	return o, err == nil && o.Digest != s.Approved.Release && o.Digest != s.Good.Release
}

// CurrentRelease is the release whose secrets matter: the one that is being deployed, or the one that runs.
func (s State) CurrentRelease() fleet.Digest {
	if s.Approved.ID != "" {
		return s.Approved.Release
	}
	return s.Good.Release
}

// TransportFailure is a failing transport, as far as the vendor may know it: the values of both fields are of closed sets.
type TransportFailure struct {
	Kind   string      `json:"kind"`
	Reason mesh.Reason `json:"reason"`
}
