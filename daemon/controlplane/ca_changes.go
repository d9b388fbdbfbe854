// SPDX-License-Identifier: Apache-2.0

package controlplane

import (
	"fmt"
	"strings"
	"time"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/identity"
	"github.com/demarc-dev/demarc/ledger"
)

// Bundle is the number of the bundle that the slots make: 1 at genesis, one more with each change of them.
func (s State) Bundle() uint64 {
	if len(s.Slots) == 0 {
		return 0
	}
	return max(1, s.number)
}

// reslot makes the slots that are given the book's.
func (s *State) reslot(slots []identity.Slot) { s.number, s.Slots = s.Bundle()+1, slots }

func (s State) slot(op string, id fleet.Digest) (identity.Slot, error) {
	for _, one := range s.Slots {
		if one.ID() == id {
			return one, nil
		}
	}
	return identity.Slot{}, fault.New(op, fault.NotFound, "there is no CA %s", fault.Clip(string(id)))
}

// Holder is one who must hold a bundle: an enrolled appliance, or a node.
type Holder struct {
	Name   string
	Kind   string // appliance or node
	Online bool
	Holds  uint64
}

// Missing lists the nodes, and the enrolled appliances, that have not acknowledged the bundle of this number.
func (s State) Missing(nodes []string, number uint64) []Holder {
	var out []Holder
	for _, n := range nodes {
		if has, _ := s.nodes.Get(n); has < number {
			out = append(out, Holder{Name: n, Kind: "node", Online: true, Holds: has})
		}
	}
	for _, a := range s.Appliances() {
		if a.Status == Enrolled && a.Bundle < number {
			out = append(out, Holder{Name: string(a.Name), Kind: "appliance", Online: a.Online, Holds: a.Bundle})
		}
	}
	return out
}

// spelled is how many names an error spells out.
const spelled = 20

func naming(names []string) string {
	text := strings.Join(names[:min(len(names), spelled)], ", ")
	if more := len(names) - spelled; more > 0 {
		text += fmt.Sprintf(" and %d more", more)
	}
	return text
}

// PrepareCA announces a CA: it is trusted from now on, and issues nothing yet.
type PrepareCA struct {
	Cert      []byte `json:"cert"`
	SealedKey []byte `json:"sealed_key"`
}

// Prepared is the answer.
type Prepared struct {
	ID     fleet.Digest `json:"id"`
	Bundle uint64       `json:"bundle"`
}

// Kind names the change in the log.
func (PrepareCA) Kind() string { return "ca.prepare/1" }

// Private keeps the sealed key out of the audit log, which outsiders read.
func (PrepareCA) Private() bool { return true }

// Apply refuses a CA of another domain, a second prepared one, and more CAs than a bundle holds.
func (c PrepareCA) Apply(s *State, m ledger.Meta) (Prepared, error) {
	const op = "ca.prepare"
	slots, err := identity.Prepare(s.Slots, c.Cert, c.SealedKey)
	if err != nil {
		return Prepared{}, fault.At(op, "", err)
	}
	trusted := 0
	for _, one := range slots {
		if one.Stage != identity.Retired {
			trusted++
		}
	}
	if trusted > identity.MaxBundleCerts/2 {
		return Prepared{}, fault.New(op, fault.Conflict, "%d CAs are trusted already: retire the tainted ones first", trusted-1)
	}
	for _, one := range s.Slots {
		if one.Stage == identity.Prepared {
			return Prepared{}, fault.New(op, fault.Conflict, "CA %s is prepared already: activate or retire it first", one.ID().Short())
		}
	}
	s.reslot(slots)
	mine := &s.Slots[len(s.Slots)-1]
	mine.Since, mine.By, mine.Request = s.Bundle(), m.By, m.Request
	return Prepared{ID: fleet.DigestOf(c.Cert), Bundle: s.Bundle()}, nil
}

// ActivateCA makes a prepared CA the one that issues.
type ActivateCA struct {
	ID    fleet.Digest `json:"id"`
	Nodes []string     `json:"nodes"` // all of the cluster: each must hold the CA
}

// Kind names the change in the log.
func (ActivateCA) Kind() string { return "ca.activate/1" }

// Apply refuses while a node, or an appliance that is connected, does not hold the CA, and names them.
func (c ActivateCA) Apply(s *State, _ ledger.Meta) (none, error) {
	const op = "ca.activate"
	ca, err := s.slot(op, c.ID)
	if err != nil {
		return none{}, err
	}
	slots, err := identity.Activate(s.Slots, c.ID)
	if err != nil {
		return none{}, fault.At(op, "", err)
	}
	var names []string
	for _, h := range s.Missing(c.Nodes, ca.Since) {
		if h.Online {
			names = append(names, h.Kind+" "+h.Name)
		}
	}
	if len(names) > 0 {
		return none{}, fault.New(op, fault.Conflict, "%d do not hold CA %s yet, and would be cut off: %s", len(names), c.ID.Short(), naming(names))
	}
	s.reslot(slots)
	return none{}, nil
}

// RetireCA ends the trust in a CA.
type RetireCA struct {
	ID          fleet.Digest `json:"id"`
	Nodes       []string     `json:"nodes"`
	Compromised bool         `json:"compromised,omitempty"` // at once: who uses its certificates proves itself again
}

// Kind names the change in the log.
func (RetireCA) Kind() string { return "ca.retire/1" }

// Apply refuses while certificates of the CA are in use, and names whose. A certificate that ran out holds nothing up.
// Of a compromised CA no certificate is good any more.
func (c RetireCA) Apply(s *State, m ledger.Meta) (none, error) {
	const op = "ca.retire"
	ca, err := s.slot(op, c.ID)
	if err != nil {
		return none{}, err
	}
	if ca.Stage == identity.Retired {
		return none{}, fault.New(op, fault.Conflict, "CA %s is retired already", c.ID.Short())
	}
	slots, err := identity.Retire(s.Slots, c.ID)
	if err != nil {
		return none{}, fault.At(op, "", err)
	}
	var names []string
	if ca.Stage == identity.Tainted { // a prepared one has issued nothing
		for _, h := range s.Missing(c.Nodes, s.Bundle()) {
			if h.Kind == "node" { // its acknowledgement says that it shows a leaf of the CA that issues now
				names = append(names, "node "+h.Name)
			}
		}
		for _, a := range s.Appliances() {
			if a.Status == Enrolled && a.CurrentTill.After(m.At) && (a.CurrentIssuer == c.ID || a.CurrentIssuer == "") {
				names = append(names, "appliance "+string(a.Name))
			}
		}
	}
	if len(names) > 0 && !c.Compromised {
		return none{}, fault.New(op, fault.Conflict, "%d still use certificates of CA %s: %s; wait until they renewed, or say that it is compromised",
			len(names), c.ID.Short(), naming(names))
	}
	for _, a := range s.Appliances() {
		if ca.Stage != identity.Tainted {
			break
		}
		if a.CurrentIssuer == c.ID || a.CurrentIssuer == "" {
			a.Current, a.CurrentTill, a.CurrentIssuer = "", time.Time{}, ""
		}
		if a.NextIssuer == c.ID || a.NextIssuer == "" {
			a.Next, a.NextTill, a.NextIssuer = "", time.Time{}, ""
		}
		s.appliances = s.appliances.Set(a.Name, a)
	}
	s.reslot(slots)
	return none{}, nil
}

// RenewBy is Renew with the CA that issued, so that a CA is not retired under those who use it.
type RenewBy struct {
	Renew
	Issuer fleet.Digest `json:"issuer"`
}

// Kind names the change in the log.
func (RenewBy) Kind() string { return "appliance.renew/2" }

// Apply refuses a certificate of a CA that no longer issues: it was changed while this one was on its way.
func (c RenewBy) Apply(s *State, m ledger.Meta) (none, error) {
	if err := s.issues("appliance.renew", c.Issuer); err != nil {
		return none{}, err
	}
	if _, err := c.Renew.Apply(s, m); err != nil {
		return none{}, err
	}
	return none{}, s.issued(c.Renew.Name, c.Renew.Serial, c.Issuer)
}

func (s State) issues(op string, id fleet.Digest) error {
	if ca, err := identity.Issuer(s.Slots); err != nil || ca.ID() != id {
		return fault.Because(err, op, fault.Unavailable, "the CA was changed meanwhile: try again")
	}
	return nil
}

func (s *State) issued(name fleet.ApplianceID, serial fleet.Serial, by fleet.Digest) error {
	a, err := s.Appliance(name)
	if err != nil {
		return err
	}
	if a.Current == serial {
		a.CurrentIssuer = by
	} else {
		a.NextIssuer = by
	}
	s.appliances = s.appliances.Set(name, a)
	return nil
}

// HoldsBundle records that an appliance has stored a bundle.
type HoldsBundle struct {
	Name   fleet.ApplianceID `json:"name"`
	Number uint64            `json:"number"`
}

// Kind names the change in the log.
func (HoldsBundle) Kind() string { return "appliance.bundle/1" }

// Apply refuses a number that was never given out; a lower one than before changes nothing.
func (c HoldsBundle) Apply(s *State, _ ledger.Meta) (none, error) {
	a, err := s.Appliance(c.Name)
	if err != nil {
		return none{}, err
	}
	if c.Number > s.Bundle() {
		return none{}, fault.New("appliance.bundle", fault.Conflict, "appliance %q acknowledges bundle %d, and %d is the newest", c.Name, c.Number, s.Bundle())
	}
	a.Bundle = max(a.Bundle, c.Number)
	s.appliances = s.appliances.Set(c.Name, a)
	return none{}, nil
}

// NodeBundle records that a node trusts a bundle and shows a certificate of the CA that issues in it.
type NodeBundle struct {
	Name   string `json:"name"`
	Number uint64 `json:"number"`
}

// Kind names the change in the log.
func (NodeBundle) Kind() string { return "node.bundle/1" }

// Apply refuses a number that was never given out.
func (c NodeBundle) Apply(s *State, _ ledger.Meta) (none, error) {
	if err := fleet.CheckName("node", c.Name); err != nil {
		return none{}, err
	}
	if c.Number > s.Bundle() {
		return none{}, fault.New("node.bundle", fault.Conflict, "node %q acknowledges bundle %d, and %d is the newest", c.Name, c.Number, s.Bundle())
	}
	if had, _ := s.nodes.Get(c.Name); c.Number > had {
		s.nodes = s.nodes.Set(c.Name, c.Number)
	}
	return none{}, nil
}
