// SPDX-License-Identifier: Apache-2.0

// Package book is the vendor's ledger, called the book: the state of the control plane as a replicated state machine, the closed set of
// changes that may be made to it, and one node's copy of it.
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
	return ledger.NewBook(NewState(), append(more, ledger.Learn[Genesis](), ledger.Learn[RegisterCustomer](), ledger.Learn[RegisterAppliance](),
		ledger.Learn[Enrol](), ledger.Learn[Refuse](), ledger.Learn[Renew](), ledger.Learn[Edge](), ledger.Learn[Ban](), ledger.Learn[Publish](),
		ledger.Learn[Ask](), ledger.Learn[Countersign](), ledger.Learn[RequestOperation](), ledger.Learn[OrdersDone](), ledger.Learn[Report](), ledger.Learn[Troubles](),
		ledger.Learn[EnrolProven](), ledger.Learn[RollKeys](), ledger.Learn[SetExpect](),
		ledger.Learn[PrepareCA](), ledger.Learn[ActivateCA](), ledger.Learn[RetireCA](), ledger.Learn[RenewBy](), ledger.Learn[HoldsBundle](), ledger.Learn[NodeBundle](),
		ledger.Learn[AddNode](), ledger.Learn[NodeIs](), ledger.Learn[RemoveNode](), ledger.Learn[AddAnother](), ledger.Learn[RemoveAnother](), ledger.Learn[NodeChanged](), ledger.Learn[SetAutopilot](),
		ledger.Learn[GenesisWith](), ledger.Learn[AdoptOperator](), ledger.Learn[InviteOperator](), ledger.Learn[EnrolOperator](), ledger.Learn[RenewOperator](), ledger.Learn[OperatorUses](),
		ledger.Learn[SetOperatorRole](), ledger.Learn[BanOperator](), ledger.Learn[RemoveOperator](),
		ledger.Learn[KeepSecrets](), ledger.Learn[HoldsKEK](), ledger.Learn[RotateKEK](), ledger.Learn[PrepareCAWith](), ledger.Learn[LoginOperator](),
		ledger.Learn[NodeStops](), ledger.Learn[NodeRoll](),
		ledger.Learn[ReportKeys](), ledger.Learn[ConfirmKeys](), ledger.Learn[ForgetKeys](),
		ledger.Learn[ledger.SetTime[State]](),
		ledger.Learn[RecoverAdmin](), ledger.Learn[PutSecret](), ledger.Learn[ForgetSecret](), ledger.Learn[NodeLeaf](), ledger.Learn[CertifyNode](), ledger.Learn[OperatorSeen](),
		ledger.Learn[BeginEpoch](), ledger.Learn[Meet]())...)
}

// State is one page of the vendor's book. A copy by assignment is a copy: every map in it is persistent.
type State struct {
	TrustDomain string
	Development bool            // made by its genesis to take development identities; no change sets it later
	Slots       []identity.Slot // replaced whole, never edited in place
	number      uint64          // of the bundle that Slots make; see Bundle
	nodes       *immutable.SortedMap[string, uint64]
	peers       *immutable.SortedMap[string, Peer]      // see members_changes.go
	certs       *immutable.SortedMap[string, NodeCerts] // by node; see certs.go
	pilot       Autopilot
	stopped     *immutable.SortedMap[string, time.Time] // nodes that stopped and have not called the roll since
	customers   *immutable.SortedMap[fleet.CustomerID, Customer]
	appliances  applianceIndex
	releases    *immutable.SortedMap[fleet.Digest, Release]
	operations  *immutable.SortedMap[string, Operation] // by appliance, a slash, and the operation's id
	operators   *immutable.SortedMap[string, Operator]  // by name
	Epochs      []Epoch                                 // that the book had since the first, the present one last; replaced whole
	KEK         string                                  // name of the key that seals the keys of Slots and Secrets; "" in a book of an older build
	Secrets     []Secret                                // by name; replaced whole, never edited in place
	given       *immutable.SortedMap[string, Given]     // by name: those of Secrets that the vendor gave
	keks        *immutable.SortedMap[string, []string]  // by node: the keys that it holds
	nonces      *immutable.SortedMap[string, time.Time] // spent ones, until they would have expired anyway
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

	// Current passes; Next passes and becomes current on first use. Both empty is a ban, or not yet enrolled.
	Current     fleet.Serial `json:"current,omitempty"`
	CurrentTill time.Time    `json:"current_till,omitzero"`
	Next        fleet.Serial `json:"next,omitempty"`
	NextTill    time.Time    `json:"next_till,omitzero"`

	// The CAs that issued them; empty where an older build recorded none.
	CurrentIssuer fleet.Digest `json:"current_issuer,omitempty"`
	NextIssuer    fleet.Digest `json:"next_issuer,omitempty"`

	Bundle uint64 `json:"bundle,omitempty"` // number of the bundle that it has stored

	// Edges, not weather.
	Online  bool         `json:"online,omitempty"`
	Node    string       `json:"node,omitempty"`
	Route   string       `json:"route,omitempty"`
	Release fleet.Digest `json:"release,omitempty"`
	Version string       `json:"version,omitempty"`
	State   fleet.State  `json:"state,omitempty"`
	Why     fleet.Reason `json:"why,omitzero"`     // of State
	Reason  string       `json:"reason,omitempty"` // of a ban: what the vendor's operator typed
	Plan    fleet.Digest `json:"plan,omitempty"`
	Health  Status       `json:"health,omitzero"`
	Roads   []Trouble    `json:"roads,omitempty"` // that do not work; replaced whole

	// Orders waits for the appliance's acknowledgement; numbers run from OrdersDone+1.
	Orders      []Order `json:"orders,omitempty"` // replaced whole, never edited in place
	OrdersDone  uint64  `json:"orders_done,omitempty"`
	ReportsDone uint64  `json:"reports_done,omitempty"`

	Offered numberSet `json:"offered,omitempty"` // numbers of the releases that were offered to it

	// Met is the epoch in which it was heard last. Of Orders, the last Unmet were made since another epoch began, and no number of theirs
	// was told to anybody.
	Met     fleet.Epoch `json:"met,omitzero"`
	Unmet   int         `json:"unmet,omitempty"`
	Meeting Meeting     `json:"meeting,omitzero"`

	LogFrom *int64 `json:"log_from,omitempty"` // size of the head of this log that the next proof for it begins with; nil: the last of Cosigned

	Probe Probe `json:"probe,omitzero"` // the newest one

	// Keys of its cluster that came after the registration; see [ReportKeys].
	Rolled   json.RawMessage `json:"rolled,omitempty"`   // JWKS that counts in place of the pinned one
	Reported json.RawMessage `json:"reported,omitempty"` // JWKS that waits for the operator's word; it proves nothing

	UID       string   `json:"uid,omitempty"`       // of the platform's account or role, as it was proven first; see [SetExpect]
	LogKey    []byte   `json:"log_key,omitempty"`   // PEM; signs the checkpoints of the customer's log
	Witnessed [][]byte `json:"witnessed,omitempty"` // the customer's heads that this control plane countersigned, oldest first
	Cosigned  [][]byte `json:"cosigned,omitempty"`  // the vendor's heads that the appliance countersigned, oldest first
	Asked     [][]byte `json:"asked,omitempty"`     // heads that it was asked to countersign and has not yet, oldest first, at most [MaxAsked]
}

// OrdersSent is the number of the newest order.
func (a Appliance) OrdersSent() uint64 { return a.OrdersDone + uint64(len(a.Orders)) }

// Order is one numbered thing that the vendor asks, as it waits in the book. Exactly one of its fields is set.
type Order struct {
	Release    []byte      `json:"release,omitempty"`
	Operation  []byte      `json:"operation,omitempty"`
	Cancel     string      `json:"cancel,omitempty"`
	Probe      *ProbeIndex `json:"probe,omitempty"`
	Checkpoint *Checkpoint `json:"checkpoint,omitempty"`
	Cosigned   []byte      `json:"cosigned,omitempty"`
	Withdrawn  bool        `json:"withdrawn,omitempty"` // it spoke of a former epoch: its number counts
}

// Checkpoint is a signed head with the proof that its log only grew since the last one that was countersigned.
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

// Probe counts the echoes of a series of numbered messages: it measures that none is lost and none comes twice.
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

// Operation is the vendor's side of an operation: the statements that the appliance let out, and no output in clear.
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

// NewState is the empty first page.
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

// Appliance looks one up.
func (s State) Appliance(name fleet.ApplianceID) (Appliance, error) {
	a, ok := s.appliances.Get(name)
	if !ok {
		return Appliance{}, fault.New("controlplane.Appliance", fault.NotFound, "no appliance is registered under the name %q", fault.Clip(string(name)))
	}
	return a, nil
}

// Appliances lists all, by name.
func (s State) Appliances() []Appliance {
	return slices.AppendSeq(make([]Appliance, 0, s.appliances.Len()), s.appliances.all())
}

// Customers lists all, by name.
func (s State) Customers() []Customer { return values(s.customers) }

// Release looks one up by its digest.
func (s State) Release(d fleet.Digest) (Release, bool) { return s.releases.Get(d) }

// Operations lists those of one appliance, by id.
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

// stateJSON is State as it stands in a snapshot.
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

// MarshalJSON writes the page in a canonical order.
func (s State) MarshalJSON() ([]byte, error) {
	p := stateJSON{TrustDomain: s.TrustDomain, Development: s.Development, Slots: s.Slots, Customers: s.Customers(), Appliances: s.Appliances(), Releases: values(s.releases),
		Operations: values(s.operations), Nonces: map[string]time.Time{}, Bundle: s.number, Epochs: s.Epochs, Nodes: map[string]uint64{}, Operators: s.Operators(),
		Peers: values(s.peers), Pilot: s.pilot, KEK: s.KEK, Secrets: s.Secrets, KEKs: map[string][]string{}, Stopped: map[string]time.Time{}, Given: map[string]Given{}, Certs: map[string]NodeCerts{}}
	for it := s.stopped.Iterator(); !it.Done(); {
		k, v, _ := it.Next()
		p.Stopped[k] = v
	}
	for it := s.certs.Iterator(); !it.Done(); {
		k, v, _ := it.Next()
		p.Certs[k] = v
	}
	for it := s.given.Iterator(); !it.Done(); {
		k, v, _ := it.Next()
		p.Given[k] = v
	}
	for it := s.nodes.Iterator(); !it.Done(); {
		k, v, _ := it.Next()
		p.Nodes[k] = v
	}
	for it := s.keks.Iterator(); !it.Done(); {
		k, v, _ := it.Next()
		p.KEKs[k] = v
	}
	for it := s.nonces.Iterator(); !it.Done(); {
		k, v, _ := it.Next()
		p.Nonces[k] = v
	}
	return json.Marshal(p)
}

// UnmarshalJSON reads a page strictly.
func (s *State) UnmarshalJSON(b []byte) error {
	var p stateJSON
	if err := seal.StrictJSON(b, &p); err != nil {
		return fault.At("controlplane.State", "", err)
	}
	n := NewState()
	n.Development = p.Development
	n.TrustDomain, n.Slots, n.number, n.Epochs, n.pilot, n.KEK, n.Secrets = p.TrustDomain, p.Slots, p.Bundle, p.Epochs, p.Pilot, p.KEK, p.Secrets
	for _, x := range p.Peers {
		n.peers = n.peers.Set(x.Name, x)
	}
	for k, v := range p.Nodes {
		n.nodes = n.nodes.Set(k, v)
	}
	for k, v := range p.Stopped {
		n.stopped = n.stopped.Set(k, v)
	}
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
	for k, v := range p.Certs {
		n.certs = n.certs.Set(k, v)
	}
	for k, v := range p.Given {
		n.given = n.given.Set(k, v)
	}
	for k, v := range p.KEKs {
		n.keks = n.keks.Set(k, v)
	}
	for k, v := range p.Nonces {
		n.nonces = n.nonces.Set(k, v)
	}
	*s = n
	return nil
}

// ask appends orders to the appliance's outbox, all of them or none. The outbox is copied once.
func (s *State) ask(name fleet.ApplianceID, orders ...Order) error {
	a, err := s.Appliance(name)
	if err != nil {
		return err
	}
	if a.Status == Banned {
		return fault.New("controlplane.ask", fault.Denied, "appliance %q is banned", name)
	}
	if len(a.Orders)+len(orders) > MaxOutbox {
		return fault.New("controlplane.ask", fault.Busy, "%d orders wait for appliance %q already: it has not acknowledged them", len(a.Orders), name)
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
