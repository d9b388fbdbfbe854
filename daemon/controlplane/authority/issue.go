// SPDX-License-Identifier: Apache-2.0

package authority

import (
	"context"
	"crypto/rand"
	"crypto/x509"
	"time"

	"github.com/demarc-dev/demarc/daemon/controlplane/book"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/identity"
	"github.com/demarc-dev/demarc/ledger"
	"github.com/demarc-dev/demarc/seal"
)

// Certificate is an issued certificate as a change of the book records it.
type Certificate struct {
	Leaf   *x509.Certificate
	Serial fleet.Serial
	From   time.Time
	Till   time.Time
	Issuer fleet.Digest // the CA that signed it
}

// Issue signs a certificate with the active CA. It is not accepted anywhere before the book has its serial.
func (s *Store) Issue(csrDER []byte, role fleet.Role, name string, life time.Duration) (Certificate, error) {
	csr, err := identity.ParseCSR(csrDER)
	if err != nil {
		return Certificate{}, err
	}
	st := s.replica.View()
	slot, err := identity.Issuer(st.Slots)
	if err != nil {
		return Certificate{}, err
	}
	k, err := s.keyring.Get(st.KEK)
	if err != nil {
		return Certificate{}, err
	}
	ca, err := identity.OpenAuthority(slot.CertDER, slot.SealedKey, k.Key)
	if err != nil {
		return Certificate{}, err
	}
	leaf, err := ca.Issue(csr, fleet.PrincipalOf(st.TrustDomain, role, name), s.replica.Now(), life,
		identity.IssueOptions{Rand: rand.Reader, Backdate: s.Backdate})
	if err != nil {
		return Certificate{}, err
	}
	return Certificate{Leaf: leaf, Serial: identity.SerialOf(leaf), From: leaf.NotBefore, Till: leaf.NotAfter, Issuer: slot.ID()}, nil
}

// Certify issues a certificate, DER, and returns it once the book has the change that records it, in the name of its holder. The caller
// checks the holder's proof and its right to the name before: nothing is signed for a refused caller.
func Certify[R any](ctx context.Context, s *Store, csr []byte, role fleet.Role, name string, life time.Duration,
	change func(Certificate) ledger.Change[book.State, R]) ([]byte, R, error) {
	var none R
	is, err := s.Issue(csr, role, name, life)
	if err != nil {
		return nil, none, err
	}
	r, err := book.Submit(ctx, s.replica, fleet.PrincipalOf(s.replica.View().TrustDomain, role, name), "", change(is))
	if err != nil {
		return nil, none, err
	}
	return is.Leaf.Raw, r, nil
}

// KeyOf is the digest of the public key in a request, and the key itself as it is encoded in a certificate.
func KeyOf(op string, csrDER []byte) (fleet.Digest, []byte, error) {
	csr, err := identity.ParseCSR(csrDER)
	if err != nil {
		return "", nil, err
	}
	spki, err := x509.MarshalPKIXPublicKey(csr.PublicKey)
	if err != nil {
		return "", nil, fault.At(op, fault.Invalid, err)
	}
	return fleet.DigestOf(spki), spki, nil
}

// LogPublicKey is the PEM form of the key that signs the vendor's checkpoints.
func (s *Store) LogPublicKey() []byte {
	key, err := s.LogSigner()
	if err != nil {
		s.log.Error("the key of the vendor's log can't be opened", "err", err)
		return nil
	}
	k, err := seal.KeyOf(key.Public())
	if err != nil {
		return nil // an Ed25519 key always has one
	}
	return k.PEM()
}

// FirstLogKey is the public half, PEM, of the key that signs the checkpoints of the vendor's log, for a book that begins with this
// key-encryption key: auditors pin it.
func FirstLogKey(kek []byte) ([]byte, error) {
	key, err := logKey(kek)
	if err != nil {
		return nil, err
	}
	k, err := seal.KeyOf(key.Public())
	if err != nil {
		return nil, err
	}
	return k.PEM(), nil
}
