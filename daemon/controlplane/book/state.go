// SPDX-License-Identifier: Apache-2.0

// Package book is the vendor's ledger, called the book: the state of the control plane as a replicated state machine, the closed set of
// changes that may be made to it, and one node's copy of it. The Kind of a change is its name in the log.
//
// Each change is an entry in the order that the consensus log gives it, and most are an entry of the audit log too. Apply is a pure
// function of the state, the change and its stamp: every node that applies the same entries has the same state. Nothing in this package
// knows of a network, a file, or another node.
package book

import (
	"encoding/json"
	"slices"
	"strings"
	"time"

	"github.com/benbjohnson/immutable"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/identity"
	"github.com/demarc-dev/demarc/ledger"
	"github.com/demarc-dev/demarc/seal"
)

// NewBook makes the vendor's book with every change that this build knows, and with more: those of a later build, in tests.
func NewBook(more ...ledger.Learned[State]) *ledger.Book[State] {
	return ledger.NewBook(NewState(), append(more,
		ledger.Learn[Genesis](), ledger.Learn[RegisterCustomer](), ledger.Learn[RegisterAppliance](), ledger.Learn[Enrol](),
		ledger.Learn[Refuse](), ledger.Learn[Renew](), ledger.Learn[Edge](), ledger.Learn[Ban](), ledger.Learn[Publish](), ledger.Learn[Ask](),
		ledger.Learn[Countersign](), ledger.Learn[RequestOperation](), ledger.Learn[OrdersDone](), ledger.Learn[Report](),
		ledger.Learn[Troubles](), ledger.Learn[EnrolProven](), ledger.Learn[RollKeys](), ledger.Learn[SetExpect](), ledger.Learn[PrepareCA](),
		ledger.Learn[ActivateCA](), ledger.Learn[RetireCA](), ledger.Learn[RenewBy](), ledger.Learn[HoldsBundle](), ledger.Learn[NodeBundle](),
		ledger.Learn[AddNode](), ledger.Learn[NodeIs](), ledger.Learn[RemoveNode](), ledger.Learn[AddAnother](), ledger.Learn[RemoveAnother](),
		ledger.Learn[NodeChanged](), ledger.Learn[SetAutopilot](), ledger.Learn[GenesisWith](), ledger.Learn[AdoptOperator](),
		ledger.Learn[InviteOperator](), ledger.Learn[EnrolOperator](), ledger.Learn[RenewOperator](), ledger.Learn[OperatorUses](),
		ledger.Learn[SetOperatorRole](), ledger.Learn[BanOperator](), ledger.Learn[RemoveOperator](), ledger.Learn[KeepSecrets](),
		ledger.Learn[HoldsKEK](), ledger.Learn[RotateKEK](), ledger.Learn[PrepareCAWith](), ledger.Learn[LoginOperator](),
		ledger.Learn[NodeStops](), ledger.Learn[NodeRoll](), ledger.Learn[ReportKeys](), ledger.Learn[ConfirmKeys](),
		ledger.Learn[ForgetKeys](), ledger.Learn[ledger.SetTime[State]](), ledger.Learn[RecoverAdmin](), ledger.Learn[PutSecret](),
		ledger.Learn[ForgetSecret](), ledger.Learn[NodeLeaf](), ledger.Learn[CertifyNode](), ledger.Learn[OperatorSeen](),
		ledger.Learn[BeginEpoch](), ledger.Learn[Meet]())...)
}

// State is an immutable state of the vendor's book. Assignment copies it: every map in it is persistent.
type State struct {
	TrustDomain string
	Development bool            // development identities are accepted: set by genesis, and by no later change
	Slots       []identity.Slot // replaced whole, never edited in place
	number      uint64          // of the bundle that Slots make; see [State.Bundle]
	nodes       *immutable.SortedMap[string, uint64]
	peers       *immutable.SortedMap[string, Peer]      // see members.go
	certs       *immutable.SortedMap[string, NodeCerts] // by node; see nodecerts.go
	pilot       Autopilot
	stopped     *immutable.SortedMap[string, time.Time] // nodes that stopped and have not reconciled their appliances since
	customers   *immutable.SortedMap[fleet.CustomerID, Customer]
	appliances  applianceIndex
	releases    *immutable.SortedMap[fleet.Digest, Release]
	operations  *immutable.SortedMap[string, Operation] // by appliance, a slash, and the operation's id
	operators   *immutable.SortedMap[string, Operator]  // by name
	Epochs      []Epoch                                 // since the first one, the current one last; replaced whole
	KEK         string                                  // name of the key that seals Slots and Secrets; "" in a book of an older build
	Secrets     []Secret                                // by name; replaced whole, never edited in place
	given       *immutable.SortedMap[string, Given]     // by name: those of Secrets that the vendor supplied
	keks        *immutable.SortedMap[string, []string]  // by node: the keys that it has
	nonces      *immutable.SortedMap[string, time.Time] // spent ones, until they expire
}

// Customer is one customer of the vendor.
type Customer struct {
	Name  fleet.CustomerID `json:"name"`
	Since time.Time        `json:"since"`
}

// Appliance statuses.
const (
	Registered = "registered" // expected, has not enrolled
	Enrolled   = "enrolled"
	Banned     = "banned" // its serials are empty; its channel is closed
)

// Appliance is what the vendor's book knows of one appliance.
type Appliance struct {
	Name     fleet.ApplianceID `json:"name"`
	Customer fleet.CustomerID  `json:"customer"`
	Expect   json.RawMessage   `json:"expect"` // the platform identity that it must prove, as the vendor registered it
	Status   string            `json:"status"`
	Since    time.Time         `json:"since"`

	// Current is valid; Next is valid and becomes Current on first use. Both are empty if banned or not yet enrolled.
	Current     fleet.Serial `json:"current,omitempty"`
	CurrentTill time.Time    `json:"current_till,omitzero"`
	Next        fleet.Serial `json:"next,omitempty"`
	NextTill    time.Time    `json:"next_till,omitzero"`

	// The CAs that issued them; empty if an older build recorded none.
	CurrentIssuer fleet.Digest `json:"current_issuer,omitempty"`
	NextIssuer    fleet.Digest `json:"next_issuer,omitempty"`

	Bundle uint64 `json:"bundle,omitempty"` // number of the bundle that it has stored

	// Recorded only when they change.
	Online  bool         `json:"online,omitempty"`
	Node    string       `json:"node,omitempty"`
	Route   string       `json:"route,omitempty"`
	Release fleet.Digest `json:"release,omitempty"`
	Version string       `json:"version,omitempty"`
	State   fleet.State  `json:"state,omitempty"`
	Why     fleet.Reason `json:"why,omitzero"`     // of State
	Reason  string       `json:"reason,omitempty"` // of a ban: the text of the vendor's operator
	Plan    fleet.Digest `json:"plan,omitempty"`
	Health  Status       `json:"health,omitzero"`
	Roads   []Trouble    `json:"roads,omitempty"` // that do not work; replaced whole

	// Orders wait for the appliance's acknowledgement; they are numbered from OrdersDone+1.
	Orders      []Order `json:"orders,omitempty"` // replaced whole, never edited in place
	OrdersDone  uint64  `json:"orders_done,omitempty"`
	ReportsDone uint64  `json:"reports_done,omitempty"`

	Offered numberSet `json:"offered,omitempty"` // numbers of the releases that were offered to it

	// Met is the epoch in which it last reported. The last Unmet of Orders were made since another epoch began, and their numbers were not
	// sent to the appliance yet.
	Met     fleet.Epoch `json:"met,omitzero"`
	Unmet   int         `json:"unmet,omitempty"`
	Meeting Meeting     `json:"meeting,omitzero"`

	LogFrom *int64 `json:"log_from,omitempty"` // size of the head that the next proof for it begins with; nil: the last of Cosigned

	Probe Probe `json:"probe,omitzero"` // the newest one

	// Keys of its cluster that were reported after the registration; see [ReportKeys].
	Rolled   json.RawMessage `json:"rolled,omitempty"`   // trusted JWKS in place of the pinned one
	Reported json.RawMessage `json:"reported,omitempty"` // JWKS that waits for an operator's confirmation; it proves nothing

	UID       string   `json:"uid,omitempty"`       // of the platform's account or role, as first proven; see [SetExpect]
	LogKey    []byte   `json:"log_key,omitempty"`   // PEM; signs the checkpoints of the customer's log
	Witnessed [][]byte `json:"witnessed,omitempty"` // the customer's heads that this control plane countersigned, oldest first
	Cosigned  [][]byte `json:"cosigned,omitempty"`  // the vendor's heads that the appliance countersigned, oldest first
	Asked     [][]byte `json:"asked,omitempty"`     // heads that wait for its countersignature, oldest first, at most [MaxAsked]
}

// OrdersSent is the number of the newest order.
func (a Appliance) OrdersSent() uint64 { return a.OrdersDone + uint64(len(a.Orders)) }

// Order is a numbered request of the vendor to an appliance, pending in the book. Exactly one of its fields is set.
type Order struct {
	Release    []byte      `json:"release,omitempty"`
	Operation  []byte      `json:"operation,omitempty"`
	Cancel     string      `json:"cancel,omitempty"`
	Probe      *ProbeIndex `json:"probe,omitempty"`
	Checkpoint *Checkpoint `json:"checkpoint,omitempty"`
	Cosigned   []byte      `json:"cosigned,omitempty"`
	Withdrawn  bool        `json:"withdrawn,omitempty"` // it was about a former epoch: only its number counts
}

// Checkpoint is a signed head with the proof that its log extends the one that was countersigned last.
type Checkpoint struct {
	Note  []byte   `json:"note"`
	From  int64    `json:"from"`
	Proof [][]byte `json:"proof,omitempty"`
}

// ProbeIndex is one message of a probe.
type ProbeIndex struct {
	ID    string `json:"id"`
	Index uint64 `json:"index"`
}

// Probe counts the echoes of a series of numbered messages: it shows whether any was lost or duplicated.
type Probe struct {
	ID         string `json:"id"`
	Sent       uint64 `json:"sent"`
	Echoed     uint64 `json:"echoed"`
	Doubled    uint64 `json:"doubled,omitempty"`
	OutOfOrder uint64 `json:"out_of_order,omitempty"`
	Last       uint64 `json:"last"`
}

// Release is a published release: the sealed document, by its digest.
type Release struct {
	Digest  fleet.Digest    `json:"digest"`
	App     string          `json:"app"`
	Version string          `json:"version"`
	Sealed  []byte          `json:"sealed"`
	At      time.Time       `json:"at"`
	By      fleet.Principal `json:"by"`
	Number  uint64          `json:"number"` // 1, 2, 3, ... in the order of their publication
}

// Operation is the vendor's side of an operation: the statements that the appliance released, and no output in clear.
type Operation struct {
	ID         string            `json:"id"`
	Appliance  fleet.ApplianceID `json:"appliance"`
	State      string            `json:"state"`
	Why        fleet.Reason      `json:"why,omitzero"`
	Request    []byte            `json:"request"`
	Statements [][]byte          `json:"statements,omitempty"` // replaced whole
	Output     []byte            `json:"output,omitempty"`     // encrypted to the operator who asked
	At         time.Time         `json:"at"`
	By         fleet.Principal   `json:"by"`
}

// byName orders keys that are strings. The library compares those of a named type by reflection.
type byName[K ~string] struct{}

// Compare implements immutable.Comparer.
func (byName[K]) Compare(a, b K) int { return strings.Compare(string(a), string(b)) }

func sorted[K ~string, V any]() *immutable.SortedMap[K, V] {
	return immutable.NewSortedMap[K, V](byName[K]{})
}

// NewState returns the empty state.
func NewState() State {
	return State{
		nodes:      sorted[string, uint64](),
		peers:      sorted[string, Peer](),
		stopped:    sorted[string, time.Time](),
		certs:      sorted[string, NodeCerts](),
		customers:  sorted[fleet.CustomerID, Customer](),
		appliances: newApplianceIndex(),
		releases:   sorted[fleet.Digest, Release](),
		operations: sorted[string, Operation](),
		operators:  sorted[string, Operator](),
		given:      sorted[string, Given](),
		keks:       sorted[string, []string](),
		nonces:     sorted[string, time.Time](),
	}
}

// Appliance returns an appliance by name, or fault.NotFound.
func (s State) Appliance(name fleet.ApplianceID) (Appliance, error) {
	a, ok := s.appliances.Get(name)
	if !ok {
		return Appliance{}, fault.New("controlplane.Appliance", fault.NotFound,
			"no appliance is registered under the name %q", fault.Clip(string(name)))
	}
	return a, nil
}

// Appliances lists all appliances by name.
func (s State) Appliances() []Appliance {
	return slices.AppendSeq(make([]Appliance, 0, s.appliances.Len()), s.appliances.all())
}

// Customers lists all customers by name.
func (s State) Customers() []Customer { return values(s.customers) }

// Release returns a release by its digest.
func (s State) Release(d fleet.Digest) (Release, bool) { return s.releases.Get(d) }

// Operations lists the operations of one appliance by id.
func (s State) Operations(a fleet.ApplianceID) []Operation {
	var out []Operation
	prefix := string(a) + "/"
	for it := seek(s.operations, prefix); !it.Done(); {
		k, o, _ := it.Next()
		if !strings.HasPrefix(k, prefix) {
			break
		}
		out = append(out, o)
	}
	return out
}

func seek[V any](m *immutable.SortedMap[string, V], from string) *immutable.SortedMapIterator[string, V] {
	it := m.Iterator()
	it.Seek(from)
	return it
}

func values[K interface {
	~string
}, V any](m *immutable.SortedMap[K, V]) []V {
	out := make([]V, 0, m.Len())
	for it := m.Iterator(); !it.Done(); {
		_, v, _ := it.Next()
		out = append(out, v)
	}
	return out
}

// plain returns a map with the same content.
func plain[V any](m *immutable.SortedMap[string, V]) map[string]V {
	out := make(map[string]V, m.Len())
	for it := m.Iterator(); !it.Done(); {
		k, v, _ := it.Next()
		out[k] = v
	}
	return out
}

// persistent is the reverse of plain.
func persistent[V any](m map[string]V) *immutable.SortedMap[string, V] {
	out := sorted[string, V]()
	for k, v := range m {
		out = out.Set(k, v)
	}
	return out
}

// stateJSON is [State] as written in a snapshot.
type stateJSON struct {
	TrustDomain string               `json:"trust_domain"`
	Development bool                 `json:"development,omitempty"`
	Slots       []identity.Slot      `json:"slots"`
	Customers   []Customer           `json:"customers"`
	Appliances  []Appliance          `json:"appliances"`
	Releases    []Release            `json:"releases"`
	Operations  []Operation          `json:"operations"`
	Nonces      map[string]time.Time `json:"nonces"`

	Bundle uint64            `json:"bundle,omitempty"`
	Epochs []Epoch           `json:"epochs,omitempty"`
	Nodes  map[string]uint64 `json:"nodes,omitempty"`

	Peers []Peer    `json:"peers,omitempty"`
	Pilot Autopilot `json:"autopilot,omitzero"`

	Operators []Operator           `json:"operators,omitempty"`
	KEK       string               `json:"kek,omitempty"`
	Secrets   []Secret             `json:"secrets,omitempty"`
	Certs     map[string]NodeCerts `json:"node_certificates,omitempty"`
	Given     map[string]Given     `json:"given,omitempty"`
	KEKs      map[string][]string  `json:"keks,omitempty"`
	Stopped   map[string]time.Time `json:"stopped,omitempty"`
}

// MarshalJSON writes the state in a canonical order.
func (s State) MarshalJSON() ([]byte, error) {
	p := stateJSON{
		TrustDomain: s.TrustDomain, Development: s.Development, Slots: s.Slots, Bundle: s.number, Epochs: s.Epochs,
		Customers: s.Customers(), Appliances: s.Appliances(), Releases: values(s.releases), Operations: values(s.operations),
		Operators: s.Operators(), Peers: values(s.peers), Pilot: s.pilot, KEK: s.KEK, Secrets: s.Secrets,
		Nonces: plain(s.nonces), Nodes: plain(s.nodes), KEKs: plain(s.keks), Stopped: plain(s.stopped), Given: plain(s.given),
		Certs: plain(s.certs),
	}
	return json.Marshal(p)
}

// UnmarshalJSON reads a state strictly.
func (s *State) UnmarshalJSON(b []byte) error {
	var p stateJSON
	if err := seal.StrictJSON(b, &p); err != nil {
		return fault.At("controlplane.State", "", err)
	}
	n := NewState()
	n.Development = p.Development
	n.TrustDomain, n.Slots, n.number, n.Epochs = p.TrustDomain, p.Slots, p.Bundle, p.Epochs
	n.pilot, n.KEK, n.Secrets = p.Pilot, p.KEK, p.Secrets
	for _, x := range p.Peers {
		n.peers = n.peers.Set(x.Name, x)
	}
	n.nodes = persistent(p.Nodes)
	n.stopped = persistent(p.Stopped)
	for _, c := range p.Customers {
		n.customers = n.customers.Set(c.Name, c)
	}
	for _, a := range p.Appliances {
		n.appliances = n.appliances.Set(a.Name, a)
	}
	for _, r := range p.Releases {
		n.releases = n.releases.Set(r.Digest, r)
	}
	for _, o := range p.Operations {
		n.operations = n.operations.Set(string(o.Appliance)+"/"+o.ID, o)
	}
	for _, o := range p.Operators {
		n.operators = n.operators.Set(o.Name, o)
	}
	n.certs = persistent(p.Certs)
	n.given = persistent(p.Given)
	n.keks = persistent(p.KEKs)
	n.nonces = persistent(p.Nonces)
	*s = n
	return nil
}

// enqueue appends orders to the appliance's outbox, all of them or none. The outbox is copied once.
func (s *State) enqueue(name fleet.ApplianceID, orders ...Order) error {
	a, err := s.Appliance(name)
	if err != nil {
		return err
	}
	if a.Status == Banned {
		return fault.New("controlplane.ask", fault.Denied, "appliance %q is banned", name)
	}
	if len(a.Orders)+len(orders) > MaxOutbox {
		return fault.New("controlplane.ask", fault.Busy,
			"%d orders wait for appliance %q already: it has not acknowledged them", len(a.Orders), name)
	}
	a.Orders = append(slices.Clip(a.Orders), orders...)
	if a.Met != s.Epoch().Epoch {
		a.Unmet += len(orders)
	}
	s.appliances = s.appliances.Set(name, a)
	return nil
}

// MaxOutbox is how many orders may wait for one appliance.
const MaxOutbox = 4096
