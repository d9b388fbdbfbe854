// SPDX-License-Identifier: Apache-2.0

package book

import (
	"time"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/ledger"
)

// RecoverAdmin makes an admin of a caller that proved possession of the key-encryption key and of a node's sealed keys. It restores
// access if every admin's certificate has expired or is lost.
type RecoverAdmin struct {
	Name      string       `json:"name"`
	Node      string       `json:"node"` // whose files were used
	Nonce     string       `json:"nonce"`
	NonceTill time.Time    `json:"nonce_till"`
	Key       fleet.Digest `json:"key"` // of the public key in the certificate
	Serial    fleet.Serial `json:"serial"`
	Till      time.Time    `json:"till"`
	Issuer    fleet.Digest `json:"issuer"`
	Bundle    uint64       `json:"bundle,omitempty"` // that it verified before the request
}

func (RecoverAdmin) Kind() string { return "operator.recover/1" }

// Apply accepts each nonce once. Earlier certificates of an operator with this name are no longer valid. A ban remains: a banned name
// can't be used.
func (c RecoverAdmin) Apply(s *State, m ledger.Meta) (Nothing, error) {
	const op = "operator.recover"
	if err := s.issues(op, c.Issuer); err != nil {
		return Nothing{}, err
	}
	if err := c.Key.Check(); err != nil {
		return Nothing{}, err
	}
	first := FirstOperator{Name: c.Name, Serial: c.Serial, Till: c.Till, Issuer: c.Issuer}
	if err := first.check(op); err != nil {
		return Nothing{}, err
	}
	if err := fleet.CheckName("node", c.Node); err != nil {
		return Nothing{}, err
	}
	if err := s.TakesAdmin(op, c.Name); err != nil {
		return Nothing{}, err
	}
	if err := s.spend(op, "recovery", c.Nonce, c.NonceTill, m.At); err != nil {
		return Nothing{}, err
	}
	o := first.record(ViaRecovery, m)
	o.Bundle = min(c.Bundle, s.Bundle())
	s.operators = s.operators.Set(c.Name, o)
	return Nothing{}, nil
}

// TakesAdmin returns nil if a name may become that of an admin by recovery, else fault.Conflict.
func (s State) TakesAdmin(op, name string) error {
	switch o, known := s.operators.Get(name); {
	case known && o.Status == BannedOperator:
		return fault.New(op, fault.Conflict, "operator %q is banned: choose another name", name)
	case known && o.Via == ViaOIDC:
		return fault.New(op, fault.Conflict, "operator %q is one who logs in: choose another name", name)
	case !known && s.operators.Len() >= MaxOperators:
		return fault.New(op, fault.Conflict, "the book has %d operators: choose the name of one of them", MaxOperators)
	}
	return nil
}
