// SPDX-License-Identifier: Apache-2.0

package book

import (
	"slices"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/identity"
	"github.com/demarc-dev/demarc/ledger"
)

// Names of the secrets of the vendor's book.
const (
	SecretLogKey   = "log-key"   // seed of the Ed25519 key that signs the checkpoints of the vendor's log
	SecretNonceKey = "nonce-key" // 32 bytes that authenticate the nonces of the bootstrap
)

// Secret is one secret of the vendor, sealed with the key-encryption key that [State.KEK] names.
type Secret struct {
	Name   string `json:"name"`
	Sealed []byte `json:"sealed"`
}

func checkSecrets(op string, secrets []Secret) error {
	if len(secrets) > MaxSecrets {
		return fault.New(op, fault.Invalid, "%d secrets: %d at most", len(secrets), MaxSecrets)
	}
	for i, s := range secrets {
		if err := fleet.CheckName("secret", s.Name); err != nil {
			return err
		}
		if len(s.Sealed) == 0 || len(s.Sealed) > 2*identity.MaxSecret {
			return fault.New(op, fault.Invalid, "secret %q has %d bytes", s.Name, len(s.Sealed))
		}
		if i > 0 && secrets[i-1].Name >= s.Name {
			return fault.New(op, fault.Invalid, "the secrets are not in order, or one comes twice")
		}
	}
	return nil
}

// Holds lists the key-encryption keys that a node recorded that it has, by name.
func (s State) Holds(node string) []string {
	ids, _ := s.keks.Get(node)
	return ids
}

// NodesWithoutKEK names the nodes that do not have a key-encryption key.
func (s State) NodesWithoutKEK(nodes []string, kek string) []string {
	var out []string
	for _, n := range nodes {
		if !slices.Contains(s.Holds(n), kek) {
			out = append(out, "node "+n)
		}
	}
	return out
}

// KeepSecrets adds the control plane's own secrets to a book that has none, and names the key that seals them and the CAs' keys. In a
// book of an older build they were derived from that key: they are stored as they were, so that a later rotation of the key does not
// change them.
type KeepSecrets struct {
	KEK     string   `json:"kek"`
	Secrets []Secret `json:"secrets"` // by name
}

func (KeepSecrets) Kind() string { return "secrets.keep/1" }

// Private keeps what is sealed out of the audit log, which outsiders read.
func (KeepSecrets) Private() bool { return true }

// Apply changes nothing in a book that has them: each node proposes the same.
func (c KeepSecrets) Apply(s *State, _ ledger.Meta) (Nothing, error) {
	const op = "secrets.keep"
	if s.TrustDomain == "" || c.KEK == "" || len(c.Secrets) == 0 {
		return Nothing{}, fault.New(op, fault.Invalid, "a book with a trust domain, a key's name and secrets are needed")
	}
	if err := checkSecrets(op, c.Secrets); err != nil {
		return Nothing{}, err
	}
	if s.KEK == "" {
		s.KEK, s.Secrets = c.KEK, c.Secrets
	}
	return Nothing{}, nil
}

// HoldsKEK records which key-encryption keys a node holds.
type HoldsKEK struct {
	Node string   `json:"node"`
	IDs  []string `json:"ids"`
}

func (HoldsKEK) Kind() string { return "kek.holds/1" }

// Apply records what the node reports.
func (c HoldsKEK) Apply(s *State, _ ledger.Meta) (Nothing, error) {
	if err := fleet.CheckName("node", c.Node); err != nil {
		return Nothing{}, err
	}
	if n := len(c.IDs); n == 0 || n > 2 || len(c.IDs[0]) != 16 || len(c.IDs[n-1]) != 16 {
		return Nothing{}, fault.New("kek.holds", fault.Invalid, "a node holds one key or two")
	}
	s.keks = s.keks.Set(c.Node, c.IDs)
	return Nothing{}, nil
}

// RotateKEK seals all sealed values with another key.
type RotateKEK struct {
	From    string                  `json:"from"`
	To      string                  `json:"to"`
	Nodes   []string                `json:"nodes"` // all of the cluster: each must hold To
	CAs     map[fleet.Digest][]byte `json:"cas"`   // the CAs' keys, by the CA's id
	Secrets []Secret                `json:"secrets"`
}

func (RotateKEK) Kind() string { return "kek.rotate/1" }

// Private keeps what is sealed out of the audit log, which outsiders read.
func (RotateKEK) Private() bool { return true }

// Apply refuses while a node does not have the new key, and names it. It also refuses if a sealed value is missing in the change, since
// it would be lost with the old key.
func (c RotateKEK) Apply(s *State, _ ledger.Meta) (Nothing, error) {
	const op = "kek.rotate"
	if s.KEK == "" || c.From != s.KEK {
		return Nothing{}, fault.New(op, fault.Conflict,
			"the book's keys are sealed with key %q, and not with %q any more: look at demarc control-plane kek", s.KEK, fault.Clip(c.From))
	}
	if c.To == c.From || len(c.To) != 16 || len(c.Nodes) == 0 {
		return Nothing{}, fault.New(op, fault.Invalid, "another key is needed, and all nodes")
	}
	nodes := slices.Clone(c.Nodes)
	for _, p := range s.Peers() { // one that was added since
		if !p.Removed && !slices.Contains(nodes, p.Name) {
			nodes = append(nodes, p.Name)
		}
	}
	if names := s.NodesWithoutKEK(nodes, c.To); len(names) > 0 {
		return Nothing{}, fault.New(op, fault.Conflict,
			"%d do not hold key %s, and could not open the keys: %s", len(names), c.To, JoinNames(names))
	}
	if err := checkSecrets(op, c.Secrets); err != nil {
		return Nothing{}, err
	}
	slots := slices.Clone(s.Slots)
	for i := range slots {
		if slots[i].SealedKey == nil {
			continue
		}
		sealed := c.CAs[slots[i].ID()]
		if len(sealed) == 0 {
			return Nothing{}, fault.New(op, fault.Unavailable, "CA %s was added meanwhile: try again", slots[i].ID().Short())
		}
		slots[i].SealedKey = sealed
	}
	same := slices.EqualFunc(s.Secrets, c.Secrets, func(a, b Secret) bool { return a.Name == b.Name })
	if !same {
		return Nothing{}, fault.New(op, fault.Unavailable, "the secrets were changed meanwhile: try again")
	}
	s.Slots, s.Secrets, s.KEK = slots, c.Secrets, c.To // the bundle is the same: its number stays
	return Nothing{}, nil
}

// PrepareCAWith is [PrepareCA] with the name of the key that seals the CA's key: if that was replaced in the meantime, the CA's key would
// be lost.
type PrepareCAWith struct {
	PrepareCA
	KEK string `json:"kek"`
}

func (PrepareCAWith) Kind() string { return "ca.prepare/2" }

// Apply refuses a key of the CA that is sealed with another key than the book's.
func (c PrepareCAWith) Apply(s *State, m ledger.Meta) (Prepared, error) {
	if c.KEK != s.KEK {
		return Prepared{}, fault.New("ca.prepare", fault.Unavailable, "the key that seals the CAs' keys was replaced meanwhile: try again")
	}
	return c.PrepareCA.Apply(s, m)
}

// SealedCount is the number of sealed values.
func (s State) SealedCount() uint32 {
	n := len(s.Secrets)
	for _, one := range s.Slots {
		if one.SealedKey != nil {
			n++
		}
	}
	return uint32(n)
}

// UnsettledNodes lists the nodes that may need another key than the one in use. A node no longer needs an old key once everything that it
// starts from is sealed with the one in use.
func (s State) UnsettledNodes(nodes []string) []string {
	var out []string
	for _, n := range nodes {
		if !slices.Equal(s.Holds(n), []string{s.KEK}) {
			out = append(out, n)
		}
	}
	return out
}

// OtherKEKs lists the keys that nodes have besides the one in use.
func (s State) OtherKEKs(nodes []string) []string {
	var out []string
	for _, n := range nodes {
		for _, id := range s.Holds(n) {
			if id != s.KEK && !slices.Contains(out, id) {
				out = append(out, id)
			}
		}
	}
	return out
}
