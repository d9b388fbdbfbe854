// SPDX-License-Identifier: Apache-2.0

package book

import (
	"bytes"
	"encoding/json"
	"slices"
	"time"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/identity"
	"github.com/demarc-dev/demarc/ledger"
)

// Nothing is the result of a change without one.
type Nothing struct{}

// Genesis is the first change of a book: the trust domain and its certificate authorities, their keys sealed.
type Genesis struct {
	TrustDomain string          `json:"trust_domain"`
	Slots       []identity.Slot `json:"slots"`
	Development bool            `json:"development,omitempty"` // see State.Development
}

func (Genesis) Kind() string { return "genesis/1" }

// Private keeps the sealed keys out of the audit log, which outsiders read.
func (Genesis) Private() bool { return true }

// Apply refuses a second genesis of another trust domain; the same one again changes nothing.
func (c Genesis) Apply(s *State, _ ledger.Meta) (Nothing, error) {
	switch {
	case s.TrustDomain == c.TrustDomain:
		return Nothing{}, nil
	case s.TrustDomain != "":
		return Nothing{}, fault.New("genesis", fault.Conflict, "this book belongs to the trust domain %q", s.TrustDomain)
	case c.TrustDomain == "" || len(c.Slots) == 0:
		return Nothing{}, fault.New("genesis", fault.Invalid, "a trust domain and at least one certificate authority are needed")
	}
	s.TrustDomain, s.Slots, s.Development = c.TrustDomain, c.Slots, c.Development
	return Nothing{}, nil
}

// RegisterCustomer adds a customer.
type RegisterCustomer struct {
	Name fleet.CustomerID `json:"name"`
}

func (RegisterCustomer) Kind() string { return "customer.register/1" }

// Apply refuses a name that is taken.
func (c RegisterCustomer) Apply(s *State, m ledger.Meta) (Nothing, error) {
	if err := fleet.CheckName("customer", string(c.Name)); err != nil {
		return Nothing{}, err
	}
	if _, ok := s.customers.Get(c.Name); ok {
		return Nothing{}, fault.New("customer.register", fault.Conflict, "customer %q is registered already", c.Name)
	}
	s.customers = s.customers.Set(c.Name, Customer{Name: c.Name, Since: m.At})
	return Nothing{}, nil
}

// RegisterAppliance adds an appliance and the platform identity that it must prove.
type RegisterAppliance struct {
	Name     fleet.ApplianceID `json:"name"`
	Customer fleet.CustomerID  `json:"customer"`
	Expect   json.RawMessage   `json:"expect"`
}

func (RegisterAppliance) Kind() string { return "appliance.register/1" }

// Apply refuses a name that is taken, an unknown customer, and a development identity in a trust domain that was not made for it.
func (c RegisterAppliance) Apply(s *State, m ledger.Meta) (Nothing, error) {
	if err := fleet.CheckName("appliance", string(c.Name)); err != nil {
		return Nothing{}, err
	}
	if err := s.TakesPlatform(PlatformOf(c.Expect)); err != nil {
		return Nothing{}, err
	}
	if _, ok := s.customers.Get(c.Customer); !ok {
		return Nothing{}, fault.New("appliance.register", fault.NotFound, "no customer %q: register it first", fault.Clip(string(c.Customer)))
	}
	if _, ok := s.appliances.Get(c.Name); ok {
		return Nothing{}, fault.New("appliance.register", fault.Conflict, "appliance %q is registered already", c.Name)
	}
	s.appliances = s.appliances.Set(c.Name, Appliance{Name: c.Name, Customer: c.Customer, Expect: c.Expect, Status: Registered, Since: m.At})
	return Nothing{}, nil
}

// Enrol records that an appliance proved its identity and which certificate was issued. It spends the nonce: of two attempts with one
// nonce, one is refused.
type Enrol struct {
	Name      fleet.ApplianceID `json:"name"`
	Nonce     string            `json:"nonce"`
	NonceTill time.Time         `json:"nonce_till"`
	Proven    string            `json:"proven"` // the platform identity, as text
	Serial    fleet.Serial      `json:"serial"`
	Till      time.Time         `json:"till"`
	LogKey    []byte            `json:"log_key"` // PEM; a different one than before is refused
}

func (Enrol) Kind() string { return "appliance.enrol/1" }

// Apply spends the nonce and makes the serial the next one, or the current one of a new appliance.
func (c Enrol) Apply(s *State, m ledger.Meta) (Nothing, error) {
	if err := s.spend("appliance.enrol", "enrolment", c.Nonce, c.NonceTill, m.At); err != nil {
		return Nothing{}, err
	}
	a, err := s.Appliance(c.Name)
	if err != nil {
		return Nothing{}, err
	}
	if err := s.TakesPlatform(PlatformOf(a.Expect)); err != nil {
		return Nothing{}, err
	}
	if a.Status == Banned {
		return Nothing{}, fault.New("appliance.enrol", fault.Denied,
			"appliance %q is banned: the vendor must register it again under another name", c.Name)
	}
	if a.LogKey != nil && !bytes.Equal(a.LogKey, c.LogKey) {
		return Nothing{}, fault.New("appliance.enrol", fault.Denied, "appliance %q enrolled with another log key before: its state was "+
			"lost or it is an impostor; the vendor must register it under a new name", c.Name)
	}
	a.LogKey = c.LogKey
	a.Status = Enrolled
	if a.Current == "" || a.CurrentTill.Before(m.At) {
		a.Current, a.CurrentTill, a.Next, a.NextTill = c.Serial, c.Till, "", time.Time{}
		a.CurrentIssuer, a.NextIssuer = "", ""
	} else {
		a.Next, a.NextTill, a.NextIssuer = c.Serial, c.Till, ""
	}
	s.appliances = s.appliances.Set(c.Name, a)
	return Nothing{}, nil
}

// spend accepts a nonce once, and drops expired ones.
func (s *State) spend(op, act, nonce string, till, now time.Time) error {
	if _, spent := s.nonces.Get(nonce); spent {
		return fault.New(op, fault.Denied, "this nonce was used before: a proof is good for one %s, ask for a new challenge", act)
	}
	for it := s.nonces.Iterator(); !it.Done(); {
		if k, till, _ := it.Next(); till.Before(now) {
			s.nonces = s.nonces.Delete(k)
		}
	}
	s.nonces = s.nonces.Set(nonce, till)
	return nil
}

// Refuse records a refused bootstrap or a refused call.
type Refuse struct {
	What   string     `json:"what"` // "enrol", or the procedure
	Name   string     `json:"name"` // as claimed, cut to 64 bytes
	Fault  fault.Kind `json:"fault"`
	Reason string     `json:"reason"`
}

func (Refuse) Kind() string { return "refused/1" }

// Apply changes nothing: the record is the entry in the audit log.
func (Refuse) Apply(*State, ledger.Meta) (Nothing, error) { return Nothing{}, nil }

// Renew records the next certificate of an enrolled appliance.
type Renew struct {
	Name   fleet.ApplianceID `json:"name"`
	Using  fleet.Serial      `json:"using"` // the certificate that the request was made with: a stale one is not renewed
	Serial fleet.Serial      `json:"serial"`
	Till   time.Time         `json:"till"`
}

func (Renew) Kind() string { return "appliance.renew/1" }

// Apply sets the next serial; the current one stays valid until the next is used.
func (c Renew) Apply(s *State, _ ledger.Meta) (Nothing, error) {
	a, err := s.Appliance(c.Name)
	if err != nil {
		return Nothing{}, err
	}
	if err := a.Accepts(c.Using); err != nil {
		return Nothing{}, err
	}
	a.Next, a.NextTill, a.NextIssuer = c.Serial, c.Till, ""
	s.appliances = s.appliances.Set(c.Name, a)
	return Nothing{}, nil
}

// Edge records that an appliance connected, disconnected, or used its next certificate for the first time.
type Edge struct {
	Name   fleet.ApplianceID `json:"name"`
	Serial fleet.Serial      `json:"serial"`
	Online bool              `json:"online"`
	Node   string            `json:"node"`
	Route  string            `json:"route"`
}

func (Edge) Kind() string { return "appliance.edge/1" }

// Apply makes the next serial the current one, and accepts a disconnect only from the node that holds the channel.
func (c Edge) Apply(s *State, _ ledger.Meta) (Nothing, error) {
	a, err := s.Appliance(c.Name)
	if err != nil {
		return Nothing{}, err
	}
	if !c.Online {
		if a.Node == c.Node {
			a.Online = false
		}
		s.appliances = s.appliances.Set(c.Name, a)
		return Nothing{}, nil
	}
	switch c.Serial {
	case "":
		return Nothing{}, fault.New("appliance.edge", fault.Denied, "no serial")
	case a.Current:
	case a.Next:
		a.Current, a.CurrentTill, a.Next, a.NextTill = a.Next, a.NextTill, "", time.Time{}
		a.CurrentIssuer, a.NextIssuer = a.NextIssuer, ""
	default:
		return Nothing{}, fault.New("appliance.edge", fault.Denied,
			"certificate %s of appliance %q is no longer, or not yet, the valid one", c.Serial, c.Name)
	}
	a.Online, a.Node, a.Route = true, c.Node, c.Route
	s.appliances = s.appliances.Set(c.Name, a)
	return Nothing{}, nil
}

// Ban clears an appliance's serials: no certificate of it is valid any more.
type Ban struct {
	Name   fleet.ApplianceID `json:"name"`
	Reason string            `json:"reason"`
}

func (Ban) Kind() string { return "appliance.ban/1" }

// Apply bans permanently.
func (c Ban) Apply(s *State, _ ledger.Meta) (Nothing, error) {
	a, err := s.Appliance(c.Name)
	if err != nil {
		return Nothing{}, err
	}
	a.Status, a.Current, a.Next, a.Reason = Banned, "", "", c.Reason
	a.Rolled, a.Reported = nil, nil // what it reported no longer counts
	s.appliances = s.appliances.Set(c.Name, a)
	return Nothing{}, nil
}

// Publish adds a signed release and offers it to appliances. An offer deploys nothing: the customer's grants decide.
type Publish struct {
	Digest  fleet.Digest        `json:"digest"`
	App     string              `json:"app"`
	Version string              `json:"version"`
	Sealed  []byte              `json:"sealed"`
	To      []fleet.ApplianceID `json:"to"`
}

func (Publish) Kind() string { return "release.publish/1" }

// Apply offers the release to each appliance, or to none if one of them can't take it.
func (c Publish) Apply(s *State, m ledger.Meta) (Nothing, error) {
	if fleet.DigestOf(c.Sealed) != c.Digest {
		return Nothing{}, fault.New("release.publish", fault.Invalid, "the release does not have the digest %s", c.Digest)
	}
	for _, r := range values(s.releases) {
		if r.App == c.App && r.Version == c.Version && r.Digest != c.Digest {
			return Nothing{}, fault.New("release.publish", fault.Conflict,
				"%s %s is published already with other content: a release is immutable, choose a new version", c.App, c.Version)
		}
	}
	number := uint64(s.releases.Len()) + 1
	if old, ok := s.releases.Get(c.Digest); ok {
		number = old.Number
	}
	s.releases = s.releases.Set(c.Digest, Release{Digest: c.Digest, App: c.App, Version: c.Version, Sealed: c.Sealed, At: m.At,
		By: m.By, Number: number})
	for _, to := range c.To {
		if err := s.enqueue(to, Order{Release: c.Sealed}); err != nil {
			return Nothing{}, err
		}
		a, _ := s.appliances.Get(to)
		a.Offered = a.Offered.with(number)
		s.appliances = s.appliances.Set(to, a)
	}
	return Nothing{}, nil
}

// Ask sends a series of probes to an appliance.
type Ask struct {
	To    fleet.ApplianceID `json:"to"`
	ID    string            `json:"id"`
	First uint64            `json:"first"`
	Count uint32            `json:"count"`
}

// MaxProbe is how many probes one call may send.
const MaxProbe = 1000

func (Ask) Kind() string { return "probe.send/1" }

// Apply queues the probes; a new id begins a new count.
func (c Ask) Apply(s *State, _ ledger.Meta) (Nothing, error) {
	if c.Count == 0 || c.Count > MaxProbe || c.ID == "" || len(c.ID) > 64 {
		return Nothing{}, fault.New("probe.send", fault.Invalid, "a probe has an id of at most 64 bytes and 1 to %d messages", MaxProbe)
	}
	orders := make([]Order, c.Count)
	for i := range orders {
		orders[i].Probe = &ProbeIndex{c.ID, c.First + uint64(i)}
	}
	if err := s.enqueue(c.To, orders...); err != nil {
		return Nothing{}, err
	}
	a, _ := s.appliances.Get(c.To)
	if a.Probe.ID != c.ID {
		a.Probe = Probe{ID: c.ID}
	}
	a.Probe.Sent += uint64(c.Count)
	s.appliances = s.appliances.Set(c.To, a)
	return Nothing{}, nil
}

// Countersign sends evidence to an appliance: a checkpoint of the vendor's log to countersign, or the appliance's own checkpoint,
// countersigned.
type Countersign struct {
	To         fleet.ApplianceID `json:"to"`
	Checkpoint *Checkpoint       `json:"checkpoint,omitempty"`
	Cosigned   []byte            `json:"cosigned,omitempty"`
}

func (Countersign) Kind() string { return "checkpoint.send/1" }

// Apply queues it, and stores what was countersigned: the next one must extend it.
func (c Countersign) Apply(s *State, _ ledger.Meta) (Nothing, error) {
	if (c.Checkpoint == nil) == (c.Cosigned == nil) {
		return Nothing{}, fault.New("checkpoint.send", fault.Invalid, "one checkpoint at a time")
	}
	if err := s.enqueue(c.To, Order{Checkpoint: c.Checkpoint, Cosigned: c.Cosigned}); err != nil {
		return Nothing{}, err
	}
	a, _ := s.appliances.Get(c.To)
	switch n := len(a.Witnessed); {
	case c.Checkpoint != nil:
		a.Asked = append(slices.Clip(a.Asked), c.Checkpoint.Note)
		a.Asked = a.Asked[max(0, len(a.Asked)-MaxAsked):]
	case n > 0 && bytes.Equal(a.Witnessed[n-1], c.Cosigned): // sent again: the appliance did not have it
	default:
		a.Witnessed = keep(a.Witnessed, c.Cosigned)
	}
	s.appliances = s.appliances.Set(c.To, a)
	return Nothing{}, nil
}

// MaxAsked is how many heads of the vendor's log may wait for a countersignature of one appliance; the oldest is dropped first.
const MaxAsked = 4

// maxStored is how many checkpoints of each appliance are stored, of each kind; the oldest is dropped first.
const maxStored = 64

func keep(kept [][]byte, b []byte) [][]byte {
	kept = append(slices.Clip(kept), b)
	return kept[max(0, len(kept)-maxStored):]
}

// RequestOperation sends a sealed request to an appliance.
type RequestOperation struct {
	ID     string            `json:"id"`
	To     fleet.ApplianceID `json:"to"`
	Sealed []byte            `json:"sealed"`
}

func (RequestOperation) Kind() string { return "operation.request/1" }

// Apply queues the request.
func (c RequestOperation) Apply(s *State, m ledger.Meta) (Nothing, error) {
	key := string(c.To) + "/" + c.ID
	if _, ok := s.operations.Get(key); ok {
		return Nothing{}, fault.New("operation.request", fault.Conflict, "operation %q was requested already", fault.Clip(c.ID))
	}
	if err := s.enqueue(c.To, Order{Operation: c.Sealed}); err != nil {
		return Nothing{}, err
	}
	s.operations = s.operations.Set(key, Operation{ID: c.ID, Appliance: c.To, State: "requested", Request: c.Sealed, At: m.At, By: m.By})
	return Nothing{}, nil
}

// OrdersDone drops the orders that the appliance has in its own book.
type OrdersDone struct {
	Name fleet.ApplianceID `json:"name"`
	Upto uint64            `json:"upto"`
}

func (OrdersDone) Kind() string { return "orders.done/1" }

// Apply refuses an acknowledgement of what was never sent; an old one changes nothing.
func (c OrdersDone) Apply(s *State, _ ledger.Meta) (Nothing, error) {
	a, err := s.Appliance(c.Name)
	if err != nil {
		return Nothing{}, err
	}
	if c.Upto > a.OrdersSent() {
		return Nothing{}, fault.New("orders.done", fault.Conflict,
			"appliance %q acknowledges order %d, and %d is the last that was sent", c.Name, c.Upto, a.OrdersSent())
	}
	if c.Upto > a.OrdersDone {
		a.Orders = a.Orders[c.Upto-a.OrdersDone:] // the memory of those that are done is freed with the next order, or with the last
		if len(a.Orders) == 0 {
			a.Orders = nil
		}
		a.OrdersDone = c.Upto
		s.met(&a)
		s.appliances = s.appliances.Set(c.Name, a)
	}
	return Nothing{}, nil
}
