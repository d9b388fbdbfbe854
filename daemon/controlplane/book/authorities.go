// SPDX-License-Identifier: Apache-2.0

package book

import (
	"fmt"
	"slices"
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

// reslot replaces the slots, which makes a new bundle.
func (s *State) reslot(slots []identity.Slot) { s.number, s.Slots = s.Bundle()+1, slots }

// CA returns a certificate authority by its id, or fault.NotFound.
func (s State) CA(op string, id fleet.Digest) (identity.Slot, error) {
	for _, one := range s.Slots {
		if one.ID() == id {
			return one, nil
		}
	}
	return identity.Slot{}, fault.New(op, fault.NotFound, "there is no CA %s", fault.Clip(string(id)))
}

// Holder is a party that must hold a bundle: a node, an enrolled appliance, or an operator with a valid certificate.
type Holder struct {
	Name   string
	Kind   string // node, appliance or operator
	Online bool   // activation waits for it: a node, a connected appliance, an operator who called within [Lately]
	Holds  uint64
	Seen   time.Time // of an operator: its last call, to within [SeenEvery]
}

// Lately is how recently an operator must have called for the activation of a CA to wait for them: the default life of an operator's
// certificate. After a longer absence the command line fetches the signed bundle at the next call, as it always does.
const Lately = 30 * 24 * time.Hour

// SeenEvery is how often the calls of an operator are recorded, if nothing else about it changes.
const SeenEvery = 24 * time.Hour

// Missing lists the nodes, the enrolled appliances, and the operators with a valid certificate that have not acknowledged the bundle with
// this number.
func (s State) Missing(nodes []string, number uint64, at time.Time) []Holder {
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
	for _, o := range s.Operators() {
		till := o.CurrentTill
		if o.NextTill.After(till) {
			till = o.NextTill
		}
		if o.Status == ActiveOperator && till.After(at) && o.Bundle < number {
			out = append(out, Holder{Name: o.Name, Kind: "operator", Online: at.Sub(o.Seen) <= Lately, Holds: o.Bundle, Seen: o.Seen})
		}
	}
	return out
}

// spelled is the most names in an error.
const spelled = 20

// JoinNames joins names for an error: the first 20, and how many more there are.
func JoinNames(names []string) string {
	text := strings.Join(names[:min(len(names), spelled)], ", ")
	if more := len(names) - spelled; more > 0 {
		text += fmt.Sprintf(" and %d more", more)
	}
	return text
}

// PrepareCA adds a CA that is trusted from now on and issues nothing yet.
type PrepareCA struct {
	Cert      []byte `json:"cert"`
	SealedKey []byte `json:"sealed_key"`
}

// Prepared is the result of [PrepareCA].
type Prepared struct {
	ID     fleet.Digest `json:"id"`
	Bundle uint64       `json:"bundle"`
}

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
	ID      fleet.Digest `json:"id"`
	Nodes   []string     `json:"nodes"`             // all of the cluster: each must hold the CA
	Without []string     `json:"without,omitempty"` // operators that activation does not wait for
}

func (ActivateCA) Kind() string { return "ca.activate/1" }

// Apply refuses while a node, a connected appliance, or an operator who called within [Lately] does not hold the CA. The error names them
// and says what to do.
func (c ActivateCA) Apply(s *State, m ledger.Meta) (Nothing, error) {
	const op = "ca.activate"
	ca, err := s.CA(op, c.ID)
	if err != nil {
		return Nothing{}, err
	}
	slots, err := identity.Activate(s.Slots, c.ID)
	if err != nil {
		return Nothing{}, fault.At(op, "", err)
	}
	for _, name := range c.Without {
		if _, err := s.Operator(name); err != nil {
			return Nothing{}, fault.At(op, "", err)
		}
	}
	var names, operators []string
	for _, h := range s.Missing(c.Nodes, ca.Since, m.At) {
		switch {
		case !h.Online || h.Kind == "operator" && slices.Contains(c.Without, h.Name):
		case h.Kind == "operator":
			operators = append(operators, h.Kind+" "+h.Name)
		default:
			names = append(names, h.Kind+" "+h.Name)
		}
	}
	if n := len(names) + len(operators); n > 0 {
		todo := "nodes and appliances take it by themselves, wait for them"
		if len(operators) > 0 {
			todo = "have each operator run any command, for instance demarc status, or name them with --without"
		}
		return Nothing{}, fault.New(op, fault.Conflict,
			"%d do not hold CA %s yet: %s; %s", n, c.ID.Short(), JoinNames(append(operators, names...)), todo)
	}
	s.reslot(slots)
	return Nothing{}, nil
}

// RetireCA ends the trust in a CA.
type RetireCA struct {
	ID          fleet.Digest `json:"id"`
	Nodes       []string     `json:"nodes"`
	Compromised bool         `json:"compromised,omitempty"` // at once: its certificates are invalid from now on
}

func (RetireCA) Kind() string { return "ca.retire/1" }

// Apply refuses while certificates of the CA are in use, and names their holders. Expired certificates do not count. All certificates of
// a compromised CA are invalid from this change on.
func (c RetireCA) Apply(s *State, m ledger.Meta) (Nothing, error) {
	const op = "ca.retire"
	ca, err := s.CA(op, c.ID)
	if err != nil {
		return Nothing{}, err
	}
	if ca.Stage == identity.Retired {
		return Nothing{}, fault.New(op, fault.Conflict, "CA %s is retired already", c.ID.Short())
	}
	slots, err := identity.Retire(s.Slots, c.ID)
	if err != nil {
		return Nothing{}, fault.At(op, "", err)
	}
	if ca.Stage == identity.Tainted { // a prepared one has issued nothing
		if names := s.usersOf(c.ID, c.Nodes, m.At); len(names) > 0 && !c.Compromised {
			return Nothing{}, fault.New(op, fault.Conflict, "%d still use certificates of CA %s: %s; wait until nodes and appliances "+
				"renewed, have operators run demarc operator renew, or say that it is compromised",
				len(names), c.ID.Short(), JoinNames(names))
		}
		s.emptyOf(c.ID)
	}
	s.reslot(slots)
	return Nothing{}, nil
}

// usersOf names the nodes that do not use a certificate of the active CA, and the appliances and operators whose current certificate is
// of this CA and has not expired.
func (s State) usersOf(ca fleet.Digest, nodes []string, at time.Time) (names []string) {
	for _, n := range nodes {
		if has, _ := s.nodes.Get(n); has < s.Bundle() { // it acknowledges a bundle once it uses a certificate of the active CA
			names = append(names, "node "+n)
		}
	}
	for _, a := range s.Appliances() {
		if a.Status == Enrolled && a.CurrentTill.After(at) && (a.CurrentIssuer == ca || a.CurrentIssuer == "") {
			names = append(names, "appliance "+string(a.Name))
		}
	}
	for _, o := range s.Operators() {
		if o.Current != "" && o.CurrentIssuer == ca && o.CurrentTill.After(at) {
			names = append(names, "operator "+o.Name)
		}
	}
	return names
}

// emptyOf clears the serials of appliances and operators whose certificates are of a CA.
func (s *State) emptyOf(ca fleet.Digest) {
	for _, a := range s.Appliances() {
		current, next := a.CurrentIssuer == ca || a.CurrentIssuer == "", a.NextIssuer == ca || a.NextIssuer == ""
		if current {
			a.Current, a.CurrentTill, a.CurrentIssuer = "", time.Time{}, ""
		}
		if next {
			a.Next, a.NextTill, a.NextIssuer = "", time.Time{}, ""
		}
		if current || next {
			s.appliances = s.appliances.Set(a.Name, a)
		}
	}
	for _, o := range s.Operators() {
		current, next := o.Current != "" && o.CurrentIssuer == ca, o.Next != "" && o.NextIssuer == ca
		if current {
			o.Current, o.CurrentTill, o.CurrentIssuer = "", time.Time{}, ""
		}
		if next {
			o.Next, o.NextTill, o.NextIssuer = "", time.Time{}, ""
		}
		if current || next {
			s.operators = s.operators.Set(o.Name, o)
		}
	}
}

// RenewBy is [Renew] with the issuing CA, so that a CA is not retired while its certificates are in use.
type RenewBy struct {
	Renew
	Issuer fleet.Digest `json:"issuer"`
}

func (RenewBy) Kind() string { return "appliance.renew/2" }

// Apply refuses a certificate of a CA that is no longer active: another was activated in the meantime.
func (c RenewBy) Apply(s *State, m ledger.Meta) (Nothing, error) {
	if err := s.issues("appliance.renew", c.Issuer); err != nil {
		return Nothing{}, err
	}
	if _, err := c.Renew.Apply(s, m); err != nil {
		return Nothing{}, err
	}
	return Nothing{}, s.issued(c.Renew.Name, c.Renew.Serial, c.Issuer)
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

func (HoldsBundle) Kind() string { return "appliance.bundle/1" }

// Apply refuses a number that no bundle had yet; a lower one than before changes nothing.
func (c HoldsBundle) Apply(s *State, _ ledger.Meta) (Nothing, error) {
	a, err := s.Appliance(c.Name)
	if err != nil {
		return Nothing{}, err
	}
	if c.Number > s.Bundle() {
		return Nothing{}, fault.New("appliance.bundle", fault.Conflict,
			"appliance %q acknowledges bundle %d, and %d is the newest", c.Name, c.Number, s.Bundle())
	}
	a.Bundle = max(a.Bundle, c.Number)
	s.appliances = s.appliances.Set(c.Name, a)
	return Nothing{}, nil
}

// OperatorSeen records that an operator called, and which bundle its command line has stored.
type OperatorSeen struct {
	Name   string       `json:"name"`
	Serial fleet.Serial `json:"serial"` // of the certificate that it called with
	Bundle uint64       `json:"bundle"` // 0: not known
}

func (OperatorSeen) Kind() string { return "operator.seen/1" }

// Apply refuses a number that no bundle had yet; a lower one than before changes nothing.
func (c OperatorSeen) Apply(s *State, m ledger.Meta) (Nothing, error) {
	o, err := s.Operator(c.Name)
	if err != nil {
		return Nothing{}, err
	}
	if err := o.Accepts(c.Serial, ""); err != nil {
		return Nothing{}, err
	}
	if c.Bundle > s.Bundle() {
		return Nothing{}, fault.New("operator.seen", fault.Conflict,
			"operator %q acknowledges bundle %d, and %d is the newest", c.Name, c.Bundle, s.Bundle())
	}
	o.Bundle, o.Seen = max(o.Bundle, c.Bundle), m.At
	s.operators = s.operators.Set(c.Name, o)
	return Nothing{}, nil
}

// NodeBundle records that a node trusts a bundle and uses a certificate of its active CA.
type NodeBundle struct {
	Name   string `json:"name"`
	Number uint64 `json:"number"`
}

func (NodeBundle) Kind() string { return "node.bundle/1" }

// Apply refuses a number that no bundle had yet.
func (c NodeBundle) Apply(s *State, _ ledger.Meta) (Nothing, error) {
	if err := fleet.CheckName("node", c.Name); err != nil {
		return Nothing{}, err
	}
	if c.Number > s.Bundle() {
		return Nothing{}, fault.New("node.bundle", fault.Conflict,
			"node %q acknowledges bundle %d, and %d is the newest", c.Name, c.Number, s.Bundle())
	}
	if had, _ := s.nodes.Get(c.Name); c.Number > had {
		s.nodes = s.nodes.Set(c.Name, c.Number)
	}
	return Nothing{}, nil
}
