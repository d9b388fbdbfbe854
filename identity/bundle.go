// SPDX-License-Identifier: Apache-2.0

package identity

import (
	"bytes"
	"crypto"
	"crypto/x509"
	"encoding/pem"
	"time"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/seal"
)

// Bounds of the nonce of a signed bundle, in bytes.
const (
	MinBundleNonce = 16
	MaxBundleNonce = 32
)

// SignedBundle is the CAs of a trust domain at one moment, as the vendor signs them with the key of its log (DSSE). An
// appliance that holds that key trusts the signature and not the connection that the bundle came over.
type SignedBundle struct {
	TrustDomain string       `json:"trust_domain"`
	Number      uint64       `json:"number"` // grows with each change of the CAs: a lower one than held is refused
	CAs         [][]byte     `json:"cas"`    // DER, all that are trusted
	Issuer      fleet.Digest `json:"issuer"` // of the CA that issues now: what others issued is renewed
	At          time.Time    `json:"at"`     // the vendor's clock; it counts for a clock only where the nonce is the asker's
	Nonce       []byte       `json:"nonce,omitempty"`
}

// PayloadType names the document.
func (SignedBundle) PayloadType() string { return "application/vnd.demarc.bundle+json;v=1" }

// CheckBundleNonce bounds what a stranger may have signed.
func CheckBundleNonce(nonce []byte) error {
	if n := len(nonce); n < MinBundleNonce || n > MaxBundleNonce {
		return fault.New("identity.CheckBundleNonce", fault.Invalid, "the nonce has %d bytes: draw %d to %d random ones", n, MinBundleNonce,
			MaxBundleNonce)
	}
	return nil
}

// SealBundle signs the CAs of slots that are trusted now. The nonce is nil where nobody asked.
func SealBundle(trustDomain string, number uint64, slots []Slot, at time.Time, nonce []byte, key crypto.Signer) ([]byte, error) {
	certs, err := trusted(slots)
	if err != nil {
		return nil, err
	}
	var cas [][]byte
	for _, c := range certs {
		cas = append(cas, c.Raw)
	}
	var issuer fleet.Digest
	if s, err := Issuer(slots); err == nil {
		issuer = s.ID()
	}
	return SealCAs(trustDomain, number, cas, issuer, at, nonce, key)
}

// SealCAs signs CAs (DER) that are trusted now, of which one issues. The nonce is nil where nobody asked.
func SealCAs(trustDomain string, number uint64, cas [][]byte, issuer fleet.Digest, at time.Time, nonce []byte,
	key crypto.Signer) ([]byte, error) {
	return seal.Seal(SignedBundle{TrustDomain: trustDomain, Number: number, CAs: cas, Issuer: issuer, At: at.UTC(), Nonce: nonce}, key)
}

// OpenBundle verifies a signed bundle with the pinned key of the vendor's log, then reads it. It must be of the trust
// domain, repeat the nonce, and be no older than the one that is held: fault.Denied where it is not.
func OpenBundle(sealed []byte, pinned seal.Key, trustDomain string, nonce []byte, held uint64) (SignedBundle, error) {
	const op = "identity.OpenBundle"
	b, err := OpenKeptBundle(sealed, pinned, trustDomain)
	switch {
	case err != nil:
		return SignedBundle{}, err
	case !bytes.Equal(b.Nonce, nonce):
		return SignedBundle{}, fault.New(op, fault.Denied, "the signed bundle answers another question than the one that was asked")
	case b.Number < held:
		return SignedBundle{}, fault.New(op, fault.Denied, "the signed bundle is number %d, and number %d is held already: an old one is not "+
			"taken back", b.Number, held)
	}
	return b, nil
}

// OpenKeptBundle is OpenBundle for one that was verified once and kept since: whether it was asked for, and whether it is
// the newest, is known no more. Its time says nothing.
func OpenKeptBundle(sealed []byte, pinned seal.Key, trustDomain string) (SignedBundle, error) {
	const op = "identity.OpenBundle"
	if len(sealed) > 2*MaxBundle {
		return SignedBundle{}, fault.New(op, fault.Invalid, "the signed bundle has %d bytes, the limit is %d", len(sealed), 2*MaxBundle)
	}
	b, _, err := seal.Open[SignedBundle](sealed, []seal.Key{pinned})
	if err != nil {
		return SignedBundle{}, fault.At(op, "", err)
	}
	if b.TrustDomain != trustDomain {
		return SignedBundle{}, fault.New(op, fault.Denied, "the signed bundle is of trust domain %q, not %q", fault.Clip(b.TrustDomain),
			trustDomain)
	}
	if _, err := ParseDER(b.CAs, trustDomain); err != nil {
		return SignedBundle{}, fault.At(op, "", err)
	}
	return b, nil
}

// ParseDER reads CA certificates by the rules of [ParseBundle].
func ParseDER(ders [][]byte, trustDomain string) ([]*x509.Certificate, error) {
	var text bytes.Buffer
	for _, der := range ders {
		text.Write(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
	}
	return ParseBundle(text.Bytes(), trustDomain)
}
