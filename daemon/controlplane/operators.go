// SPDX-License-Identifier: Apache-2.0

package controlplane

import (
	"crypto/subtle"
	"time"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
)

// Operator statuses.
const (
	Invited        = "invited" // has no certificate yet
	ActiveOperator = "active"
	BannedOperator = "banned" // its serials are empty; its sessions are closed
)

// How an operator came to be one.
const (
	ViaInit       = "init"       // the first of the book
	ViaAdopted    = "adopted"    // the first who called where an older build made the book; see [AdoptOperator]
	ViaInvitation = "invitation" //
	ViaRecovery   = "recovery"   // with the key-encryption key and a node's files; see [RecoverAdmin]
	ViaOIDC       = "oidc"       // the vendor's OpenID Connect issuer; each login gives another certificate and the role anew
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
	By     fleet.Principal `json:"by"` // who invited
	Reason string          `json:"reason,omitempty"`

	// Current passes; Next passes and becomes current on first use. Both empty is a ban, or not yet accepted.
	Current       fleet.Serial `json:"current,omitempty"`
	CurrentTill   time.Time    `json:"current_till,omitzero"`
	CurrentIssuer fleet.Digest `json:"current_issuer,omitempty"`
	Next          fleet.Serial `json:"next,omitempty"`
	NextTill      time.Time    `json:"next_till,omitzero"`
	NextIssuer    fleet.Digest `json:"next_issuer,omitempty"`

	Seen   time.Time `json:"seen,omitzero"`    // when it called last; see seenEvery
	Bundle uint64    `json:"bundle,omitempty"` // number of the bundle that its command line has stored

	Invitation *OperatorInvitation `json:"invitation,omitempty"` // replaced whole

	Subject fleet.Digest `json:"subject,omitempty"` // of issuer and subject, where it logs in
	Claim   string       `json:"claim,omitempty"`   // what the issuer calls it
}

// OperatorInvitation is one that was handed out. Once it is accepted it is good for the key that accepted it only, so that a
// lost answer can be asked for again and nobody else gets in.
type OperatorInvitation struct {
	Verifier fleet.Digest `json:"verifier"` // of the public key that the secret gives
	Till     time.Time    `json:"till"`
	Key      fleet.Digest `json:"key,omitempty"` // of the public key that accepted, as PKIX in DER
}

// Operator looks one up.
func (s State) Operator(name string) (Operator, error) {
	o, ok := s.operators.Get(name)
	if !ok {
		return Operator{}, fault.New("controlplane.Operator", fault.NotFound, "there is no operator %q: demarc operator list", fault.Clip(name))
	}
	return o, nil
}

// Operators lists all, by name.
func (s State) Operators() []Operator { return values(s.operators) }

// Accepts reports whether a certificate of the operator may come in: it and its CA are those on record. issuer is "" if it is not known.
func (o Operator) Accepts(serial fleet.Serial, issuer fleet.Digest) error {
	const op = "controlplane.operator"
	switch {
	case o.Status == BannedOperator:
		return fault.New(op, fault.Denied, "operator %q is banned", o.Name)
	case o.Status == ActiveOperator && o.Current == "" && o.Next == "":
		return fault.New(op, fault.Denied, "the certificate of operator %q was of a CA that was retired: log in again, or ask an admin for an invitation (demarc operator invite %s)", o.Name, o.Name)
	case o.Status != ActiveOperator:
		return fault.New(op, fault.Denied, "operator %q has not accepted its invitation", o.Name)
	}
	recorded := o.CurrentIssuer
	if serial != o.Current {
		recorded = o.NextIssuer
	}
	if serial == "" || serial != o.Current && serial != o.Next || issuer != "" && recorded != "" && issuer != recorded {
		return fault.New(op, fault.Denied, "certificate %s of operator %q was replaced, or is not on record: use the newest file, or ask an admin for an invitation", fault.Clip(string(serial)), o.Name)
	}
	return nil
}

// takes tells whether an invitation may be accepted now with a verifier and a key.
func (o Operator) takes(verifier, key fleet.Digest, at time.Time) error {
	const op = "operator.enrol"
	i := o.Invitation
	// Whoever has no invitation is told the same for an unknown name, a name without one and a wrong secret.
	if i == nil || o.Status == BannedOperator || subtle.ConstantTimeCompare([]byte(i.Verifier), []byte(verifier)) != 1 {
		return errNoInvitation(op)
	}
	switch {
	case at.After(i.Till):
		return fault.New(op, fault.Expired, "the invitation ran out at %s: ask for another", i.Till.UTC().Format(time.RFC3339))
	case i.Key != "" && i.Key != key:
		return fault.New(op, fault.Denied, "this invitation was accepted already, with another key: if that was not you, have an admin ban operator %q at once", o.Name)
	}
	return nil
}

func errNoInvitation(op string) error {
	return fault.New(op, fault.Denied, "there is no such invitation: it was withdrawn, replaced or never made; ask an admin for one")
}

// unknown refuses an operator that the book has no record of.
func unknownOperator(name string) error {
	return fault.New("controlplane.operator", fault.Denied, "the book has no operator %q: ask an admin for an invitation (demarc operator invite)", fault.Clip(name))
}

// admins counts those who can still call as admin, but for one. Who logs in is not counted: the issuer may be away.
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

// keepsAnAdmin refuses what would leave nobody who can admit others.
func (s State) keepsAnAdmin(op, but string, at time.Time) error {
	o, _ := s.operators.Get(but)
	if o.Role == fleet.Admin && o.Via != ViaOIDC && o.Status == ActiveOperator && s.admins(but, at) == 0 {
		return fault.New(op, fault.Conflict, "operator %q is the last admin: invite another one first, and have them accept", but)
	}
	return nil
}
