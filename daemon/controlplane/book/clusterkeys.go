// SPDX-License-Identifier: Apache-2.0

package book

import (
	"bytes"
	"encoding/json"
	"time"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/identity"
	"github.com/demarc-dev/demarc/ledger"
	"github.com/demarc-dev/demarc/seal"
)

// RollKeys replaced the pinned keys of an appliance's cluster on the authority of the appliance's certificate alone. It is in older logs;
// [ReportKeys] replaced it.
type RollKeys struct {
	Name   fleet.ApplianceID `json:"name"`
	Expect fleet.Digest      `json:"expect"` // of the registration that the new keys were compared with
	JWKS   json.RawMessage   `json:"jwks"`
}

// ReportKeys records the keys that an appliance's cluster publishes now, beside those that the vendor registered. They are trusted from
// now on if a trusted key vouches for them: it signed a token of the registered service account for this nonce and these keys. A caller
// with only the appliance's certificate and key has no such token: keys that it reports wait for an operator's confirmation, and prove
// nothing.
type ReportKeys struct {
	Name      fleet.ApplianceID `json:"name"`
	Expect    fleet.Digest      `json:"expect"` // see mustProve: what the token was compared with
	JWKS      json.RawMessage   `json:"jwks"`
	Vouched   bool              `json:"vouched"`
	Nonce     string            `json:"nonce"`
	NonceTill time.Time         `json:"nonce_till"`
}

// ConfirmKeys makes the reported keys the trusted ones, on an operator's decision.
type ConfirmKeys struct {
	Name   fleet.ApplianceID `json:"name"`
	Digest fleet.Digest      `json:"digest"` // of the keys that the operator checked
}

// ForgetKeys returns to the keys that the vendor registered.
type ForgetKeys struct {
	Name fleet.ApplianceID `json:"name"`
}

func (RollKeys) Kind() string { return "appliance.keys/1" }

// Apply changes nothing else of the registration.
func (c RollKeys) Apply(s *State, _ ledger.Meta) (Nothing, error) {
	const op = "appliance.keys"
	a, err := s.Appliance(c.Name)
	if err != nil {
		return Nothing{}, err
	}
	if a.Status != Enrolled {
		return Nothing{}, fault.New(op, fault.Denied, "appliance %q is not enrolled", c.Name)
	}
	if fleet.DigestOf(a.Expect) != c.Expect {
		return Nothing{}, fault.New(op, fault.Conflict, "what appliance %q must prove was changed a moment ago: try again", c.Name)
	}
	var e identity.Expect
	if err := seal.StrictJSON(a.Expect, &e); err != nil {
		return Nothing{}, fault.At(op, fault.Internal, err)
	}
	e.JWKS = c.JWKS
	if err := e.Check(); err != nil {
		return Nothing{}, err
	}
	if a.Expect, err = json.Marshal(e); err != nil {
		return Nothing{}, fault.At(op, fault.Internal, err)
	}
	s.appliances = s.appliances.Set(c.Name, a)
	return Nothing{}, nil
}

// Expected is what the appliance must prove, with the keys that are trusted now.
func (a Appliance) Expected() (identity.Expect, error) {
	var e identity.Expect
	if err := seal.StrictJSON(a.Expect, &e); err != nil {
		return e, fault.At("controlplane.expected", fault.Internal, err)
	}
	if len(a.Rolled) > 0 {
		e.JWKS = a.Rolled
	}
	return e, nil
}

// ExpectDigest identifies what the appliance must prove: another registration or other keys have another digest.
func (a Appliance) ExpectDigest() fleet.Digest {
	if len(a.Rolled) == 0 {
		return fleet.DigestOf(a.Expect)
	}
	return fleet.DigestOf(bytes.Join([][]byte{a.Expect, a.Rolled}, []byte{'\n'}))
}

func (ReportKeys) Kind() string { return "appliance.keys/2" }

// Apply spends the nonce.
func (c ReportKeys) Apply(s *State, m ledger.Meta) (Nothing, error) {
	const op = "appliance.keys"
	if err := s.spend(op, "report of keys", c.Nonce, c.NonceTill, m.At); err != nil {
		return Nothing{}, err
	}
	a, err := s.Appliance(c.Name)
	if err != nil {
		return Nothing{}, err
	}
	if a.Status != Enrolled {
		return Nothing{}, fault.New(op, fault.Denied, "appliance %q is not enrolled", c.Name)
	}
	if a.ExpectDigest() != c.Expect {
		return Nothing{}, fault.New(op, fault.Conflict, "what appliance %q must prove was changed a moment ago: try again", c.Name)
	}
	if c.Vouched {
		return Nothing{}, s.countKeys(a, c.JWKS)
	}
	a.Reported = c.JWKS
	s.appliances = s.appliances.Set(c.Name, a)
	return Nothing{}, nil
}

// countKeys makes keys the trusted ones.
func (s *State) countKeys(a Appliance, jwks json.RawMessage) error {
	e, err := a.Expected()
	if err != nil {
		return err
	}
	e.JWKS = jwks
	if err := e.Check(); err != nil {
		return err
	}
	a.Rolled, a.Reported = jwks, nil
	s.appliances = s.appliances.Set(a.Name, a)
	return nil
}

func (ConfirmKeys) Kind() string { return "appliance.keys.confirm/1" }

// Apply refuses if the waiting keys are not those that the operator checked.
func (c ConfirmKeys) Apply(s *State, _ ledger.Meta) (Nothing, error) {
	const op = "appliance.keys.confirm"
	a, err := s.Appliance(c.Name)
	switch {
	case err != nil:
		return Nothing{}, err
	case len(a.Reported) == 0:
		return Nothing{}, fault.New(op, fault.NotFound, "no keys of appliance %q wait to be confirmed", c.Name)
	case fleet.DigestOf(a.Reported) != c.Digest:
		return Nothing{}, fault.New(op, fault.Conflict, "appliance %q reported other keys than %s: look at them again", c.Name, c.Digest.Short())
	}
	return Nothing{}, s.countKeys(a, a.Reported)
}

func (ForgetKeys) Kind() string { return "appliance.keys.forget/1" }

// Apply drops the keys that replaced the registered ones, and those that wait for confirmation.
func (c ForgetKeys) Apply(s *State, _ ledger.Meta) (Nothing, error) {
	a, err := s.Appliance(c.Name)
	if err != nil {
		return Nothing{}, err
	}
	if len(a.Rolled) == 0 && len(a.Reported) == 0 {
		return Nothing{}, fault.New("appliance.keys.forget", fault.NotFound, "of appliance %q nothing is known but what was registered", c.Name)
	}
	a.Rolled, a.Reported = nil, nil
	s.appliances = s.appliances.Set(c.Name, a)
	return Nothing{}, nil
}
