// SPDX-License-Identifier: Apache-2.0

package seal

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"

	"github.com/demarc-dev/demarc/fault"
)

// KeyID names a public key: "SHA256:" and the unpadded base64 of the SHA-256 of its PKIX form.
type KeyID string

// Key is a public key that documents are checked with: Ed25519, or ECDSA on P-256. KeyOf and ParseKey make one.
type Key struct {
	ID     KeyID
	Public crypto.PublicKey
}

const (
	maxKeyPEM = 4 << 10
	pemPublic = "PUBLIC KEY"
)

// KeyOf computes the ID of a public key and refuses each algorithm but the two.
func KeyOf(pub crypto.PublicKey) (Key, error) {
	const op = "seal.KeyOf"
	switch p := pub.(type) {
	case ed25519.PublicKey:
		if len(p) != ed25519.PublicKeySize {
			return Key{}, fault.New(op, fault.Invalid, "the Ed25519 key has %d bytes, not %d", len(p), ed25519.PublicKeySize)
		}
	case *ecdsa.PublicKey:
		if p == nil || p.Curve != elliptic.P256() {
			return Key{}, fault.New(op, fault.Invalid, "the ECDSA key is not on the curve P-256")
		}
		if _, err := p.ECDH(); err != nil { // refuses a point that is not on the curve
			return Key{}, fault.Because(err, op, fault.Invalid, "the ECDSA key is not a point of the curve P-256")
		}
	default:
		return Key{}, fault.New(op, fault.Invalid, "a key of type %T: use Ed25519, or ECDSA on P-256", pub)
	}
	der, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		return Key{}, fault.Because(err, op, fault.Invalid, "the public key has no PKIX form")
	}
	h := sha256.Sum256(der)
	return Key{ID: KeyID("SHA256:" + base64.RawStdEncoding.EncodeToString(h[:])), Public: pub}, nil
}

// ParseKey reads exactly one PEM block "PUBLIC KEY" (PKIX), with nothing around it but white space.
func ParseKey(file []byte) (Key, error) {
	const op = "seal.ParseKey"
	if len(file) > maxKeyPEM {
		return Key{}, fault.New(op, fault.Invalid, "the public key file has %d bytes, at most %d are allowed", len(file), maxKeyPEM)
	}
	if LooksReadable(file) {
		return Key{}, fault.New(op, fault.Invalid, "the file holds a private key: give its public half, a PEM block %q", pemPublic)
	}
	block, rest := pem.Decode(file)
	if block == nil || block.Type != pemPublic || len(block.Headers) != 0 || len(bytes.TrimSpace(rest)) != 0 ||
		!bytes.HasPrefix(bytes.TrimSpace(file), []byte("-----BEGIN ")) {
		return Key{}, fault.New(op, fault.Invalid, "not a public key: give one PEM block %q and nothing else", pemPublic)
	}
	pub, err := x509.ParsePKIXPublicKey(block.Bytes)
	if err != nil {
		return Key{}, fault.Because(err, op, fault.Invalid, "the PEM block %q holds no public key", pemPublic)
	}
	return KeyOf(pub)
}

// PEM is the PKIX form of the key; ParseKey is its inverse. The zero Key has none.
func (k Key) PEM() []byte {
	der, err := x509.MarshalPKIXPublicKey(k.Public)
	if err != nil {
		return nil
	}
	return pem.EncodeToMemory(&pem.Block{Type: pemPublic, Bytes: der})
}
