// SPDX-License-Identifier: Apache-2.0

package book

import (
	"slices"
	"strings"
	"time"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/ledger"
)

// PutSecret adds a secret that the vendor supplied, sealed, or replaces its value.
type PutSecret struct {
	KEK    string `json:"kek"` // that sealed it
	Name   string `json:"name"`
	Sealed []byte `json:"sealed"`
}

// ForgetSecret removes a secret that the vendor supplied. Old entries of the log, snapshots and backups still contain it, sealed.
type ForgetSecret struct {
	Name string `json:"name"`
}

// MaxSecrets bounds the secrets of a book, those of the control plane itself included.
const MaxSecrets = 64

// Given records when a secret was supplied and by whom. Nothing in it is derived from the value.
type Given struct {
	At time.Time       `json:"at"`
	By fleet.Principal `json:"by"`
}

func (PutSecret) Kind() string { return "secrets.put/1" }

// Private keeps what is sealed out of the audit log, which outsiders read. The log has its digest, the principal and the time.
func (PutSecret) Private() bool { return true }

// Apply refuses what is sealed with another key than the book's, and the names of the control plane's own secrets.
func (c PutSecret) Apply(s *State, m ledger.Meta) (Nothing, error) {
	const op = "secrets.put"
	if err := OwnSecret(op, c.Name); err != nil {
		return Nothing{}, err
	}
	if c.KEK == "" || c.KEK != s.KEK {
		return Nothing{}, fault.New(op, fault.Unavailable, "the key that seals the secrets was replaced meanwhile: try again")
	}
	i, is := slices.BinarySearchFunc(s.Secrets, c.Name, func(one Secret, name string) int { return strings.Compare(one.Name, name) })
	secrets := slices.Clone(s.Secrets)
	if is {
		secrets[i].Sealed = c.Sealed
	} else if secrets = slices.Insert(secrets, i, Secret{c.Name, c.Sealed}); len(secrets) > MaxSecrets {
		return Nothing{}, fault.New(op, fault.Conflict, "the book holds %d secrets, as many as it may: forget one first", len(s.Secrets))
	}
	if err := checkSecrets(op, secrets); err != nil {
		return Nothing{}, err
	}
	s.Secrets, s.given = secrets, s.given.Set(c.Name, Given{m.At, m.By})
	return Nothing{}, nil
}

func (ForgetSecret) Kind() string { return "secrets.forget/1" }

// Apply refuses the control plane's own secrets.
func (c ForgetSecret) Apply(s *State, _ ledger.Meta) (Nothing, error) {
	const op = "secrets.forget"
	if err := OwnSecret(op, c.Name); err != nil {
		return Nothing{}, err
	}
	if _, ok := s.given.Get(c.Name); !ok {
		return Nothing{}, NoSecret(op, c.Name)
	}
	s.Secrets = slices.DeleteFunc(slices.Clone(s.Secrets), func(one Secret) bool { return one.Name == c.Name })
	s.given = s.given.Delete(c.Name)
	return Nothing{}, nil
}

// NoSecret is the error for a secret that the book does not have.
func NoSecret(op, name string) error {
	return fault.New(op, fault.NotFound, "there is no secret %q: demarc control-plane secret list", fault.Clip(name))
}

// OwnSecret refuses the name of a secret of the control plane itself, and an invalid name.
func OwnSecret(op, name string) error {
	if name == SecretLogKey || name == SecretNonceKey {
		return fault.New(op, fault.Denied, "%q is a key of the control plane itself: it is neither replaced nor forgotten", name)
	}
	return fleet.CheckName("secret", name)
}

// Given returns when a secret that the vendor supplied was put into the book, and by whom.
func (s State) Given(name string) (Given, bool) { return s.given.Get(name) }
