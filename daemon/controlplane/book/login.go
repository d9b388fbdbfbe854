// SPDX-License-Identifier: Apache-2.0

package book

import (
	"time"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/ledger"
)

// LoginOperator records that a person logged in, as which operator, and with which certificate. It spends the token.
type LoginOperator struct {
	Name      string       `json:"name"`
	Role      fleet.Rank   `json:"role"`
	Subject   fleet.Digest `json:"subject"`
	Claim     string       `json:"claim"`
	Token     fleet.Digest `json:"token"`
	TokenTill time.Time    `json:"token_till"`
	Serial    fleet.Serial `json:"serial"`
	Till      time.Time    `json:"till"`
	Issuer    fleet.Digest `json:"issuer"`
	Bundle    uint64       `json:"bundle,omitempty"` // that it verified before the request
}

func (LoginOperator) Kind() string { return "operator.login/1" }

// Apply spends the token and makes the certificate the current one: an earlier one of this person is no longer valid.
func (c LoginOperator) Apply(s *State, m ledger.Meta) (Nothing, error) {
	const op = "operator.login"
	if err := s.issues(op, c.Issuer); err != nil {
		return Nothing{}, err
	}
	if err := fleet.CheckName("operator", c.Name); err != nil {
		return Nothing{}, err
	}
	if err := c.Role.Check(); err != nil {
		return Nothing{}, err
	}
	if c.Serial == "" || c.Token.Check() != nil || c.Subject.Check() != nil {
		return Nothing{}, fault.New(op, fault.Invalid, "a serial, a token and a subject are needed")
	}
	spent := "oidc/" + string(c.Token)
	if _, used := s.nonces.Get(spent); used {
		return Nothing{}, fault.New(op, fault.Denied, "this token was used before: log in again")
	}
	for it := s.nonces.Iterator(); !it.Done(); {
		if k, till, _ := it.Next(); till.Before(m.At) {
			s.nonces = s.nonces.Delete(k)
		}
	}
	if name, banned := s.OperatorName(c.Subject, c.Name); banned {
		return Nothing{}, fault.New(op, fault.Denied, "operator %q is banned", name)
	} else if name != c.Name {
		return Nothing{}, fault.New(op, fault.Unavailable, "this person is operator %q here: log in again", name)
	}
	o, known := s.operators.Get(c.Name)
	switch {
	case known && o.Status == BannedOperator:
		return Nothing{}, fault.New(op, fault.Denied, "operator %q is banned", c.Name)
	case known && (o.Via != ViaOIDC || o.Subject != c.Subject):
		return Nothing{}, fault.New(op, fault.Conflict, "the name %q is another operator's: have an admin remove that one", c.Name)
	case !known:
		s.dropLapsed(m.At)
		if s.operators.Len() >= MaxOperators {
			return Nothing{}, fault.New(op, fault.Busy, "the book has %d operators: have an admin remove some", MaxOperators)
		}
		o = Operator{Name: c.Name, Status: ActiveOperator, Via: ViaOIDC, Since: m.At, By: m.By, Subject: c.Subject}
	}
	s.nonces = s.nonces.Set(spent, c.TokenTill)
	o.Role, o.Claim, o.Seen, o.Bundle = c.Role, c.Claim, m.At, max(o.Bundle, min(c.Bundle, s.Bundle()))
	o.Current, o.CurrentTill, o.CurrentIssuer = c.Serial, c.Till, c.Issuer
	s.operators = s.operators.Set(c.Name, o)
	return Nothing{}, nil
}

// OperatorName returns the name of the operator with a subject, and whether it is banned: the name of its first login, whatever the
// issuer calls the person now; called if there was no login before.
func (s State) OperatorName(subject fleet.Digest, called string) (name string, banned bool) {
	name = called
	for it := s.operators.Iterator(); !it.Done(); {
		if _, o, _ := it.Next(); o.Subject == subject && o.Subject != "" {
			if o.Status == BannedOperator {
				return o.Name, true
			}
			name = o.Name
		}
	}
	return name, false
}

// dropLapsed removes operators that have not logged in for 90 days, if the book has no room for another. Banned ones stay.
func (s *State) dropLapsed(at time.Time) {
	if s.operators.Len() < MaxOperators {
		return
	}
	for _, o := range s.Operators() {
		if o.Via == ViaOIDC && o.Status == ActiveOperator && o.CurrentTill.Before(at.Add(-90*24*time.Hour)) {
			s.operators = s.operators.Delete(o.Name)
		}
	}
}
