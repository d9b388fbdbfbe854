// SPDX-License-Identifier: Apache-2.0

package book

import (
	"crypto/subtle"
	"time"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/identity"
	"github.com/demarc-dev/demarc/ledger"
)

// Operator statuses.
const (
	Invited        = "invited" // has no certificate yet
	ActiveOperator = "active"
	BannedOperator = "banned" // its serials are empty; its sessions are closed
)

// How an operator was created.
const (
	ViaInit       = "init"       // the first of the book
	ViaAdopted    = "adopted"    // the first caller, if an older build made the book; see [AdoptOperator]
	ViaInvitation = "invitation" //
	ViaRecovery   = "recovery"   // with the key-encryption key and a node's files; see [RecoverAdmin]
	ViaOIDC       = "oidc"       // the vendor's OpenID Connect issuer; each login sets another certificate and the role
)

// MaxOperators bounds the operators of a book.
const MaxOperators = 4096

// Operator is what the vendor's book knows of one operator.
type Operator struct {
	Name   string          `json:"name"`
	Role   fleet.Rank      `json:"role"`
	Status string          `json:"status"`
	Via    string          `json:"via"`
	Since  time.Time       `json:"since"`
	By     fleet.Principal `json:"by"` // the inviting operator
	Reason string          `json:"reason,omitempty"`

	// Current is valid; Next is valid and becomes Current on first use. Both are empty if banned or not yet accepted.
	Current       fleet.Serial `json:"current,omitempty"`
	CurrentTill   time.Time    `json:"current_till,omitzero"`
	CurrentIssuer fleet.Digest `json:"current_issuer,omitempty"`
	Next          fleet.Serial `json:"next,omitempty"`
	NextTill      time.Time    `json:"next_till,omitzero"`
	NextIssuer    fleet.Digest `json:"next_issuer,omitempty"`

	Seen   time.Time `json:"seen,omitzero"`    // when it called last; see [SeenEvery]
	Bundle uint64    `json:"bundle,omitempty"` // number of the bundle that its command line has stored

	Invitation *OperatorInvitation `json:"invitation,omitempty"` // replaced whole

	Subject fleet.Digest `json:"subject,omitempty"` // of issuer and subject, if it logs in
	Claim   string       `json:"claim,omitempty"`   // what the issuer calls it
}

// OperatorInvitation is an invitation. Once accepted it is valid only for the key that accepted it, so that a lost response can be
// requested again and no other key is admitted.
type OperatorInvitation struct {
	Verifier fleet.Digest `json:"verifier"` // of the public key that the secret gives
	Till     time.Time    `json:"till"`
	Key      fleet.Digest `json:"key,omitempty"` // of the public key that accepted, as PKIX in DER
}

// Operator returns an operator by name, or the error of [UnknownOperator].
func (s State) Operator(name string) (Operator, error) {
	o, ok := s.operators.Get(name)
	if !ok {
		return Operator{}, fault.New("controlplane.Operator", fault.NotFound, "there is no operator %q: demarc operator list", fault.Clip(name))
	}
	return o, nil
}

// Operators lists all, by name.
func (s State) Operators() []Operator { return values(s.operators) }

// Accepts returns nil if a certificate of the operator is valid: it and its CA are those on record. issuer is "" if it is not known.
func (o Operator) Accepts(serial fleet.Serial, issuer fleet.Digest) error {
	const op = "controlplane.operator"
	switch {
	case o.Status == BannedOperator:
		return fault.New(op, fault.Denied, "operator %q is banned", o.Name)
	case o.Status == ActiveOperator && o.Current == "" && o.Next == "":
		return fault.New(op, fault.Denied, "the certificate of operator %q was of a CA that was retired: log in again, or ask an admin "+
			"for an invitation (demarc operator invite %s)", o.Name, o.Name)
	case o.Status != ActiveOperator:
		return fault.New(op, fault.Denied, "operator %q has not accepted its invitation", o.Name)
	}
	recorded := o.CurrentIssuer
	if serial != o.Current {
		recorded = o.NextIssuer
	}
	if serial == "" || serial != o.Current && serial != o.Next || issuer != "" && recorded != "" && issuer != recorded {
		return fault.New(op, fault.Denied, "certificate %s of operator %q was replaced, or is not on record: use the newest file, or ask "+
			"an admin for an invitation", fault.Clip(string(serial)), o.Name)
	}
	return nil
}

// Takes returns nil if the invitation may be accepted now with a verifier and a key.
func (o Operator) Takes(verifier, key fleet.Digest, at time.Time) error {
	const op = "operator.enrol"
	i := o.Invitation
	// A caller without an invitation gets the same error for an unknown name, a name without one, and a wrong secret.
	if i == nil || o.Status == BannedOperator || subtle.ConstantTimeCompare([]byte(i.Verifier), []byte(verifier)) != 1 {
		return errNoInvitation(op)
	}
	switch {
	case at.After(i.Till):
		return fault.New(op, fault.Expired, "the invitation ran out at %s: ask for another", i.Till.UTC().Format(time.RFC3339))
	case i.Key != "" && i.Key != key:
		return fault.New(op, fault.Denied,
			"this invitation was accepted already, with another key: if that was not you, have an admin ban operator %q at once", o.Name)
	}
	return nil
}

func errNoInvitation(op string) error {
	return fault.New(op, fault.Denied, "there is no such invitation: it was withdrawn, replaced or never made; ask an admin for one")
}

// UnknownOperator is the error for an operator that the book has no record of.
func UnknownOperator(name string) error {
	return fault.New("controlplane.operator", fault.Denied,
		"the book has no operator %q: ask an admin for an invitation (demarc operator invite)", fault.Clip(name))
}

// admins counts the operators that can still call as admin, except one. Those that log in are not counted: the issuer may be unreachable.
func (s State) admins(but string, at time.Time) int {
	n := 0
	for it := s.operators.Iterator(); !it.Done(); {
		name, o, _ := it.Next()
		till := o.CurrentTill
		if o.NextTill.After(till) {
			till = o.NextTill
		}
		if name != but && o.Via != ViaOIDC && o.Role == fleet.Admin && o.Status == ActiveOperator && o.Current != "" && till.After(at) {
			n++
		}
	}
	return n
}

// keepsAnAdmin refuses a change of an operator that would leave no admin.
func (s State) keepsAnAdmin(op, but string, at time.Time) error {
	o, _ := s.operators.Get(but)
	if o.Role == fleet.Admin && o.Via != ViaOIDC && o.Status == ActiveOperator && s.admins(but, at) == 0 {
		return fault.New(op, fault.Conflict, "operator %q is the last admin: invite another one first, and have them accept", but)
	}
	return nil
}

// FirstOperator is the certificate of the operator that a book begins with.
type FirstOperator struct {
	Name   string       `json:"name"`
	Serial fleet.Serial `json:"serial"`
	Till   time.Time    `json:"till"`
	Issuer fleet.Digest `json:"issuer"`
}

func (f FirstOperator) check(op string) error {
	if f.Serial == "" || f.Till.IsZero() {
		return fault.New(op, fault.Invalid, "the operator has no certificate")
	}
	return fleet.CheckName("operator", f.Name)
}

func (f FirstOperator) record(via string, m ledger.Meta) Operator {
	return Operator{Name: f.Name, Role: fleet.Admin, Status: ActiveOperator, Via: via, Since: m.At, By: m.By,
		Current: f.Serial, CurrentTill: f.Till, CurrentIssuer: f.Issuer, Seen: m.At}
}

// GenesisWith is the first change of a book that begins with its first operator.
type GenesisWith struct {
	Genesis
	Operator FirstOperator `json:"operator"`
}

func (GenesisWith) Kind() string { return "genesis/2" }

// Apply is that of [Genesis], and makes the first operator an admin.
func (c GenesisWith) Apply(s *State, m ledger.Meta) (Nothing, error) {
	fresh := s.TrustDomain == ""
	if err := c.Operator.check("genesis"); err != nil {
		return Nothing{}, err
	}
	if _, err := c.Genesis.Apply(s, m); err != nil || !fresh {
		return Nothing{}, err
	}
	s.operators = s.operators.Set(c.Operator.Name, c.Operator.record(ViaInit, m))
	return Nothing{}, nil
}

// AdoptOperator makes the first admin in a book that an older build began. Such a book has no operators, and exactly one certificate was
// made with it: the first caller with an operator's certificate is its holder.
type AdoptOperator struct {
	FirstOperator
}

func (AdoptOperator) Kind() string { return "operator.adopt/1" }

// Apply refuses once the book has an operator: the second one is invited.
func (c AdoptOperator) Apply(s *State, m ledger.Meta) (Nothing, error) {
	const op = "operator.adopt"
	if err := c.check(op); err != nil {
		return Nothing{}, err
	}
	if s.TrustDomain == "" || m.By != fleet.PrincipalOf(s.TrustDomain, fleet.Operator, c.Name) {
		return Nothing{}, fault.New(op, fault.Invalid, "an operator is adopted by its own call")
	}
	if s.operators.Len() > 0 {
		return Nothing{}, UnknownOperator(c.Name)
	}
	s.operators = s.operators.Set(c.Name, c.record(ViaAdopted, m))
	return Nothing{}, nil
}

// InviteOperator hands out an invitation.
type InviteOperator struct {
	Name     string       `json:"name"`
	Role     fleet.Rank   `json:"role"`
	Verifier fleet.Digest `json:"verifier"` // of the public key that the secret gives; the secret is nowhere in the book
	Till     time.Time    `json:"till"`
}

func (InviteOperator) Kind() string { return "operator.invite/1" }

// Apply takes the place of an invitation that was not accepted, and of an operator whose CA was retired; one that has a certificate, or
// logs in, is not invited again.
func (c InviteOperator) Apply(s *State, m ledger.Meta) (Nothing, error) {
	const op = "operator.invite"
	if err := fleet.CheckName("operator", c.Name); err != nil {
		return Nothing{}, err
	}
	if err := c.Role.Check(); err != nil {
		return Nothing{}, err
	}
	if err := c.Verifier.Check(); err != nil {
		return Nothing{}, err
	}
	if !c.Till.After(m.At) || c.Till.Sub(m.At) > identity.MaxInviteLife {
		return Nothing{}, fault.New(op, fault.Invalid, "an invitation is good for more than no time and for %s at most", identity.MaxInviteLife)
	}
	o, known := s.operators.Get(c.Name)
	switch {
	case known && o.Status == BannedOperator:
		return Nothing{}, fault.New(op, fault.Conflict, "operator %q is banned: remove it first, or choose another name", c.Name)
	case known && o.Via == ViaOIDC:
		return Nothing{}, fault.New(op, fault.Conflict, "operator %q is one who logs in: choose another name", c.Name)
	case known && o.Status == ActiveOperator && (o.Current != "" || o.Next != ""):
		return Nothing{}, fault.New(op, fault.Conflict, "operator %q has a certificate already: remove it first if it lost its file", c.Name)
	case !known && s.operators.Len() >= MaxOperators:
		return Nothing{}, fault.New(op, fault.Busy, "the book has %d operators: remove some first", MaxOperators)
	}
	s.operators = s.operators.Set(c.Name, Operator{Name: c.Name, Role: c.Role, Status: Invited, Via: ViaInvitation, Since: m.At, By: m.By,
		Invitation: &OperatorInvitation{Verifier: c.Verifier, Till: c.Till}})
	return Nothing{}, nil
}

// EnrolOperator records that an invitation was accepted, and with which certificate.
type EnrolOperator struct {
	Name     string       `json:"name"`
	Verifier fleet.Digest `json:"verifier"`
	Key      fleet.Digest `json:"key"` // of the public key in the certificate
	Serial   fleet.Serial `json:"serial"`
	Till     time.Time    `json:"till"`
	Issuer   fleet.Digest `json:"issuer"`
	Bundle   uint64       `json:"bundle,omitempty"` // that it verified before the request
}

func (EnrolOperator) Kind() string { return "operator.enrol/1" }

// Apply binds the invitation to the key: the same key may repeat the request until the invitation ends, any other is refused.
func (c EnrolOperator) Apply(s *State, m ledger.Meta) (fleet.Rank, error) {
	const op = "operator.enrol"
	if err := s.issues(op, c.Issuer); err != nil {
		return "", err
	}
	if err := c.Key.Check(); err != nil {
		return "", err
	}
	if c.Serial == "" {
		return "", fault.New(op, fault.Invalid, "no serial")
	}
	o, _ := s.operators.Get(c.Name)
	if err := o.Takes(c.Verifier, c.Key, m.At); err != nil {
		return "", err
	}
	spent := *o.Invitation
	spent.Key = c.Key
	o.Invitation, o.Status = &spent, ActiveOperator
	o.Current, o.CurrentTill, o.CurrentIssuer = c.Serial, c.Till, c.Issuer
	o.Next, o.NextTill, o.NextIssuer = "", time.Time{}, ""
	o.Seen, o.Bundle = m.At, min(c.Bundle, s.Bundle())
	s.operators = s.operators.Set(c.Name, o)
	return o.Role, nil
}

// RenewOperator records the next certificate of an operator.
type RenewOperator struct {
	Name   string       `json:"name"`
	Using  fleet.Serial `json:"using"` // the certificate that the request was made with: a stale one is not renewed
	Serial fleet.Serial `json:"serial"`
	Till   time.Time    `json:"till"`
	Issuer fleet.Digest `json:"issuer"`
}

func (RenewOperator) Kind() string { return "operator.renew/1" }

// Apply sets the next serial; the current one stays valid until the next is used. An invitation can't be accepted again
// after it.
func (c RenewOperator) Apply(s *State, _ ledger.Meta) (Nothing, error) {
	if err := s.issues("operator.renew", c.Issuer); err != nil {
		return Nothing{}, err
	}
	o, err := s.Operator(c.Name)
	if err != nil {
		return Nothing{}, err
	}
	if o.Via == ViaOIDC {
		return Nothing{}, fault.New("operator.renew", fault.Denied,
			"the certificate of one who logs in is not renewed: log in again (demarc operator login)")
	}
	if err := o.Accepts(c.Using, ""); err != nil {
		return Nothing{}, err
	}
	o.Next, o.NextTill, o.NextIssuer, o.Invitation = c.Serial, c.Till, c.Issuer, nil
	s.operators = s.operators.Set(c.Name, o)
	return Nothing{}, nil
}

// OperatorUses records the first use of an operator's next certificate: the one before is no longer valid.
type OperatorUses struct {
	Name   string       `json:"name"`
	Serial fleet.Serial `json:"serial"`
}

func (OperatorUses) Kind() string { return "operator.use/1" }

// Apply makes the next serial the current one.
func (c OperatorUses) Apply(s *State, _ ledger.Meta) (Nothing, error) {
	o, err := s.Operator(c.Name)
	if err != nil {
		return Nothing{}, err
	}
	if err := o.Accepts(c.Serial, ""); err != nil {
		return Nothing{}, err
	}
	if c.Serial == o.Next {
		o.Current, o.CurrentTill, o.CurrentIssuer = o.Next, o.NextTill, o.NextIssuer
		o.Next, o.NextTill, o.NextIssuer = "", time.Time{}, ""
	}
	s.operators = s.operators.Set(c.Name, o)
	return Nothing{}, nil
}

// SetOperatorRole changes what an operator may do, from its next call on.
type SetOperatorRole struct {
	Name string     `json:"name"`
	Role fleet.Rank `json:"role"`
}

func (SetOperatorRole) Kind() string { return "operator.role/1" }

// Apply refuses to take the last admin's role, and to change a banned operator.
func (c SetOperatorRole) Apply(s *State, m ledger.Meta) (Nothing, error) {
	const op = "operator.role"
	if err := c.Role.Check(); err != nil {
		return Nothing{}, err
	}
	o, err := s.Operator(c.Name)
	if err != nil {
		return Nothing{}, err
	}
	if o.Status == BannedOperator {
		return Nothing{}, fault.New(op, fault.Conflict, "operator %q is banned", c.Name)
	}
	if o.Via == ViaOIDC {
		return Nothing{}, fault.New(op, fault.Conflict,
			"operator %q has the role that its groups at the issuer give: change them there, or ban it", c.Name)
	}
	if c.Role != fleet.Admin {
		if err := s.keepsAnAdmin(op, c.Name, m.At); err != nil {
			return Nothing{}, err
		}
	}
	o.Role = c.Role
	s.operators = s.operators.Set(c.Name, o)
	return Nothing{}, nil
}

// BanOperator clears an operator's serials: none of its certificates is valid any more, and no invitation.
type BanOperator struct {
	Name   string `json:"name"`
	Reason string `json:"reason"`
}

func (BanOperator) Kind() string { return "operator.ban/1" }

// Apply refuses to ban the last admin.
func (c BanOperator) Apply(s *State, m ledger.Meta) (Nothing, error) {
	const op = "operator.ban"
	o, err := s.Operator(c.Name)
	if err != nil {
		return Nothing{}, err
	}
	if err := s.keepsAnAdmin(op, c.Name, m.At); err != nil {
		return Nothing{}, err
	}
	o.Status, o.Reason, o.Invitation = BannedOperator, c.Reason, nil
	o.Current, o.CurrentTill, o.CurrentIssuer = "", time.Time{}, ""
	o.Next, o.NextTill, o.NextIssuer = "", time.Time{}, ""
	s.operators = s.operators.Set(c.Name, o)
	return Nothing{}, nil
}

// RemoveOperator removes an operator: none of its certificates is valid, and the name may be invited again.
type RemoveOperator struct {
	Name string `json:"name"`
}

func (RemoveOperator) Kind() string { return "operator.remove/1" }

// Apply refuses to remove the last admin.
func (c RemoveOperator) Apply(s *State, m ledger.Meta) (Nothing, error) {
	if _, err := s.Operator(c.Name); err != nil {
		return Nothing{}, err
	}
	if err := s.keepsAnAdmin("operator.remove", c.Name, m.At); err != nil {
		return Nothing{}, err
	}
	s.operators = s.operators.Delete(c.Name)
	return Nothing{}, nil
}
