// SPDX-License-Identifier: Apache-2.0

package identity

import (
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"slices"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
)

// keyBytes is how much of the digest of a public key is in a [fleet.Serial]: 128 bits.
const keyBytes = 16

// SerialOf spells the serial number of a certificate in hex without leading zeros, a point, and the first 128 bits of the SHA-256 of
// its public key (SubjectPublicKeyInfo). A book that holds it admits that key and no other: who has the key of the CA, and gives the
// same serial number to a certificate of a key of their own, is not the one on record. Both parts are signed by the CA, so there is one
// spelling for each certificate.
func SerialOf(c *x509.Certificate) fleet.Serial {
	if c == nil || c.SerialNumber == nil {
		return ""
	}
	key := sha256.Sum256(c.RawSubjectPublicKeyInfo)
	return fleet.Serial(c.SerialNumber.Text(16) + "." + hex.EncodeToString(key[:keyBytes]))
}

// IssuerOf names the CA that the peer of a verified connection proved itself with, by the digest of its certificate; "" if the peer
// proved nothing.
func IssuerOf(state *tls.ConnectionState) fleet.Digest {
	if state == nil || !state.HandshakeComplete || len(state.VerifiedChains) == 0 {
		return ""
	}
	chain := state.VerifiedChains[0]
	return fleet.DigestOf(chain[len(chain)-1].Raw)
}

// PrincipalOf tells who is at the other end of a connection that a [Server] config accepted. It reads
// VerifiedChains[0][0] and nothing else: never a certificate that was merely presented. On a connection that a
// [Client] config made there is no such chain; there the principal was told to want.
func PrincipalOf(state *tls.ConnectionState) (fleet.Principal, fleet.Serial, error) {
	if state == nil || !state.HandshakeComplete || len(state.VerifiedChains) == 0 {
		return "", "", fault.New("identity.PrincipalOf", fault.Denied,
			"the peer proved no identity: call with a client certificate of this trust domain")
	}
	return principalOfChain(state.VerifiedChains[0])
}

// principalOfChain reads a verified chain, leaf first.
func principalOfChain(chain []*x509.Certificate) (fleet.Principal, fleet.Serial, error) {
	const op = "identity.PrincipalOf"
	if len(chain) < 2 {
		return "", "", fault.New(op, fault.Denied,
			"the peer's certificate is its own issuer: a leaf signed by a CA of the trust domain is needed")
	}
	leaf, root := chain[0], chain[len(chain)-1]
	if leaf.IsCA {
		return "", "", fault.New(op, fault.Denied, "the peer's certificate is a CA's: a leaf is needed")
	}
	who, err := principalOfLeaf(leaf)
	if err != nil {
		return "", "", err
	}
	td, _, _, _ := who.Split()
	issuer, err := TrustDomainOf(root)
	if err != nil {
		return "", "", err
	}
	if td != issuer {
		return "", "", fault.New(op, fault.Denied, "the certificate names trust domain %q, and its CA is that of %q", td, issuer)
	}
	return who, SerialOf(leaf), nil
}

func principalOfLeaf(leaf *x509.Certificate) (fleet.Principal, error) {
	const op = "identity.PrincipalOf"
	id, err := soleID(leaf)
	if err != nil {
		return "", err
	}
	who := fleet.Principal(id.String())
	if _, _, _, ok := who.Split(); !ok {
		return "", fault.New(op, fault.Denied, "%q is not spiffe://<trust domain>/{node,operator,appliance}/<name>", fault.Clip(id.String()))
	}
	return who, nil
}

// TrustDomainOf reads the trust domain that a CA certificate speaks for.
func TrustDomainOf(ca *x509.Certificate) (string, error) {
	const op = "identity.TrustDomainOf"
	if ca == nil || !ca.IsCA || !ca.BasicConstraintsValid {
		return "", fault.New(op, fault.Denied, "the certificate is not a CA's")
	}
	id, err := soleID(ca)
	if err != nil {
		return "", err
	}
	if id.Path() != "" {
		return "", fault.New(op, fault.Denied, "the CA's certificate names %q: a CA names only its trust domain, spiffe://<trust domain>",
			fault.Clip(id.String()))
	}
	return id.TrustDomain().Name(), nil
}

func soleID(c *x509.Certificate) (spiffeid.ID, error) {
	const op = "identity.soleID"
	if n := len(c.URIs); n != 1 {
		return spiffeid.ID{}, fault.New(op, fault.Denied, "the certificate carries %d URI names: exactly one SPIFFE ID is needed", n)
	}
	id, err := spiffeid.FromURI(c.URIs[0])
	if err != nil {
		return spiffeid.ID{}, fault.Because(err, op, fault.Denied, "the certificate's URI name is not a SPIFFE ID")
	}
	return id, nil
}

// named reports whether the leaf itself lists the usage: crypto/x509 also passes a leaf that lists none, or any.
func named(leaf *x509.Certificate, usage x509.ExtKeyUsage) bool {
	return slices.Contains(leaf.ExtKeyUsage, usage)
}
