// SPDX-License-Identifier: Apache-2.0

package book

import (
	"encoding/json"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/identity"
	"github.com/demarc-dev/demarc/ledger"
)

// EnrolProven is [Enrol] with what else the platform attested, and the issuing CA.
type EnrolProven struct {
	Enrol  Enrol        `json:"enrol"`
	UID    string       `json:"uid,omitempty"` // of the account or role; "" if the platform attested none
	Expect fleet.Digest `json:"expect"`        // of the registration that the proof was compared with
	Issuer fleet.Digest `json:"issuer"`        // the CA
}

// SetExpect replaces what an appliance must prove, on an operator's decision. It also forgets the keys that were reported since, and
// which account proved the identity before: the next account with the registered name is accepted.
type SetExpect struct {
	Name   fleet.ApplianceID `json:"name"`
	Expect json.RawMessage   `json:"expect"`
}

// PlatformOf is the platform kind of a registration, "" if it has none.
func PlatformOf(expect json.RawMessage) string {
	kind, err := kindOf(expect)
	if err != nil {
		return "" // it can't be met: see [Appliance.Expected]
	}
	return kind
}

func (EnrolProven) Kind() string { return "appliance.enrol/2" }

// Apply refuses an account or role with the same name that is not the one that enrolled before, a proof of what is no longer registered,
// and a certificate of a CA that is no longer active.
func (c EnrolProven) Apply(s *State, m ledger.Meta) (Nothing, error) {
	if err := s.issues("appliance.enrol", c.Issuer); err != nil {
		return Nothing{}, err
	}
	a, err := s.Appliance(c.Enrol.Name)
	if err != nil {
		return Nothing{}, err
	}
	if err := a.SameAccount(c.UID); err != nil {
		return Nothing{}, err
	}
	if a.ExpectDigest() != c.Expect {
		return Nothing{}, fault.New("appliance.enrol", fault.Conflict,
			"what appliance %q must prove was changed a moment ago: try again", c.Enrol.Name)
	}
	if _, err := c.Enrol.Apply(s, m); err != nil {
		return Nothing{}, err
	}
	a, _ = s.appliances.Get(c.Enrol.Name)
	if c.UID != "" {
		a.UID = c.UID
	}
	s.appliances = s.appliances.Set(a.Name, a)
	return Nothing{}, s.issued(a.Name, c.Enrol.Serial, c.Issuer)
}

// SameAccount refuses an account whose unique id at the platform is not the one that was proven first. A platform that attested an id
// once must attest it again.
func (a Appliance) SameAccount(uid string) error {
	if a.UID == "" || a.UID == uid {
		return nil
	}
	return fault.New("appliance.enrol", fault.Denied, "appliance %q proved itself with the account %s of its platform before, and %s "+
		"has the same name now: it was deleted and made anew, or it is an impostor; the vendor lifts this with demarc appliance expect",
		a.Name, fault.Clip(a.UID), fault.Clip(uid))
}

func (SetExpect) Kind() string { return "appliance.expect/1" }

// Apply refuses a banned appliance: a ban is permanent. It refuses a development identity as [RegisterAppliance] does.
func (c SetExpect) Apply(s *State, _ ledger.Meta) (Nothing, error) {
	a, err := s.Appliance(c.Name)
	if err != nil {
		return Nothing{}, err
	}
	if err := s.TakesPlatform(PlatformOf(c.Expect)); err != nil {
		return Nothing{}, err
	}
	if a.Status == Banned {
		return Nothing{}, fault.New("appliance.expect", fault.Denied, "appliance %q is banned: register it again under another name", c.Name)
	}
	a.Expect, a.UID, a.Rolled, a.Reported = c.Expect, "", nil, nil
	s.appliances = s.appliances.Set(c.Name, a)
	return Nothing{}, nil
}

// TakesPlatform refuses a development identity if the trust domain was not created for development. Such an identity is a key in a file:
// whoever has the file is the appliance, and no platform attests it.
func (s State) TakesPlatform(kind string) error {
	if kind != identity.KindDev || s.Development {
		return nil
	}
	return fault.New("controlplane.takes", fault.Denied,
		"the trust domain %q was not made for development, and takes no development identity: "+
			"register the appliance's platform, or make another trust domain with demarc control-plane init --development", s.TrustDomain)
}
