// SPDX-License-Identifier: Apache-2.0

package book

import (
	"iter"

	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/identity"
)

// Version identifies the content of one part of a State. Two states of one book with equal versions of a part have the same content in
// it. Compare it with ==. It is not part of the state, and means nothing in another process.
type Version struct{ parts [4]any }

// CAVersion is the version of the certificate authorities and their stages.
func (s State) CAVersion() Version { return Version{[4]any{first(s.Slots)}} }

// SecretsVersion is the version of the sealed secrets.
func (s State) SecretsVersion() Version { return Version{[4]any{first(s.Secrets)}} }

// KEKVersion is the version of which key is in use, and which keys each node holds.
func (s State) KEKVersion() Version { return Version{[4]any{s.KEK, s.keks, s.TrustDomain}} }

// ReleasesVersion is the version of the releases.
func (s State) ReleasesVersion() Version { return Version{[4]any{s.releases}} }

// PassesVersion is the version of everything that decides which certificates are accepted, except those of appliances: see
// [State.ChangedSince].
func (s State) PassesVersion() Version {
	return Version{[4]any{first(s.Slots), s.operators, s.certs, s.peers}}
}

// first is the address of the first element: a list that is replaced whole has another one.
func first[T any](list []T) *T {
	if len(list) == 0 {
		return nil
	}
	return &list[0]
}

// ApplianceVersion is a point in the sequence of changes of appliances. The zero value is before all of them.
type ApplianceVersion struct{ last *change }

// ApplianceVersion is the point that this state has reached.
func (s State) ApplianceVersion() ApplianceVersion { return ApplianceVersion{s.appliances.last} }

// ChangedSince names the appliances that changed after a point, newest first and perhaps repeatedly. ok is false if the sequence does
// not reach back that far: then any of them may have changed.
func (s State) ChangedSince(v ApplianceVersion) (names []fleet.ApplianceID, ok bool) {
	return s.appliances.since(v.last)
}

// ApplianceCount is the number of registered appliances.
func (s State) ApplianceCount() int { return s.appliances.Len() }

// CustomerCount is the number of customers.
func (s State) CustomerCount() int { return s.customers.Len() }

// ReleaseCount is the number of releases.
func (s State) ReleaseCount() int { return s.releases.Len() }

// Releases iterates over the releases by digest.
func (s State) Releases() iter.Seq2[fleet.Digest, Release] {
	return func(yield func(fleet.Digest, Release) bool) {
		for it := s.releases.Iterator(); !it.Done(); {
			if d, r, _ := it.Next(); !yield(d, r) {
				return
			}
		}
	}
}

// VendorSecrets iterates over the names of the secrets that the vendor supplied, with when and by whom.
func (s State) VendorSecrets() iter.Seq2[string, Given] {
	return func(yield func(string, Given) bool) {
		for it := s.given.Iterator(); !it.Done(); {
			if name, g, _ := it.Next(); !yield(name, g) {
				return
			}
		}
	}
}

// FindOperator looks an operator up by name.
func (s State) FindOperator(name string) (Operator, bool) { return s.operators.Get(name) }

// OperatorCount is the number of operators, invited and banned ones included.
func (s State) OperatorCount() int { return s.operators.Len() }

// NodeBundle is the number of the newest CA bundle that a node acknowledged; 0 if none.
func (s State) NodeBundle(node string) uint64 {
	number, _ := s.nodes.Get(node)
	return number
}

// Stopped reports whether a node recorded that it stops, and has not reported its appliances since.
func (s State) Stopped(node string) bool {
	_, is := s.stopped.Get(node)
	return is
}

// ActiveCAs returns the certificates of all authorities that are trusted now, DER, and the number of that bundle.
func (s State) ActiveCAs() ([][]byte, uint64) {
	var out [][]byte
	for _, slot := range s.Slots {
		if slot.Stage == identity.Prepared || slot.Stage == identity.Active || slot.Stage == identity.Tainted {
			out = append(out, slot.CertDER)
		}
	}
	return out, s.Bundle()
}
