// SPDX-License-Identifier: Apache-2.0

package identity

import (
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
)

// Serials is which certificates of one principal pass. It is state in a book, so revocation needs no list: an
// empty Current is a ban.
type Serials struct {
	Current fleet.Serial `json:"current,omitempty"`
	Next    fleet.Serial `json:"next,omitempty"` // issued, and not seen in use yet
}

// Admit passes the current serial, and the next one, which thereby becomes current. A reply that was lost on its
// way to the owner locks nobody out: until the new certificate is used the old one passes.
// Where the answer differs from s, the caller must record it before it lets the peer in.
func (s Serials) Admit(serial fleet.Serial) (Serials, error) {
	const op = "identity.Admit"
	switch {
	case s.Current == "":
		return s, fault.New(op, fault.Denied, "this identity is revoked: only its registration can lift that")
	case serial == s.Current:
		return s, nil
	case serial != "" && serial == s.Next:
		return Serials{Current: s.Next}, nil
	}
	return s, fault.New(op, fault.Denied, "certificate %s was replaced: prove the identity again to get another", fault.Clip(string(serial)))
}

// Renew notes that a certificate was issued. Another that was issued before it and never used is forgotten.
func (s Serials) Renew(serial fleet.Serial) (Serials, error) {
	if s.Current == "" {
		return s, fault.New("identity.Renew", fault.Denied, "this identity is revoked: only its registration can lift that")
	}
	return Serials{Current: s.Current, Next: serial}, nil
}
