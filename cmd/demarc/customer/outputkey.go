// SPDX-License-Identifier: Apache-2.0

package customer

import (
	"crypto"
	"crypto/ed25519"
	"crypto/hkdf"
	"crypto/sha256"
	"strings"

	"filippo.io/age"

	"github.com/demarc-dev/demarc/fault"
)

// outputInfo is part of a format: what is encrypted to a customer today is opened with it tomorrow.
const outputInfo = "demarc-output-key/1"

// OutputKey derives the key that opens the output of operations from the customer's signing key, so that one file and
// one passphrase is all that a customer must keep: HKDF-SHA256(Ed25519 seed, no salt, outputInfo), 32 bytes, is the
// X25519 key of age.
func OutputKey(s crypto.Signer) (*age.X25519Identity, error) {
	const op = "demarc.OutputKey"
	k, ok := s.(ed25519.PrivateKey)
	if !ok || len(k) != ed25519.PrivateKeySize {
		return nil, fault.New(op, fault.Invalid, "a key of type %T opens no output: only Ed25519 keys do", s)
	}
	secret, err := hkdf.Key(sha256.New, k.Seed(), nil, outputInfo, 32)
	if err != nil {
		return nil, fault.At(op, fault.Internal, err)
	}
	id, err := age.ParseX25519Identity(strings.ToUpper(bech32("age-secret-key-", secret)))
	return id, fault.At(op, fault.Internal, err)
}

const alphabet = "qpzry9x8gf2tvdw0s3jn54khce6mua7l"

// bech32 spells data as BIP 173 does, in lower case. age keeps its own encoder to itself.
func bech32(hrp string, data []byte) string {
	var words []byte // five bits each
	acc, bits := uint32(0), 0
	for _, b := range data {
		acc, bits = acc<<8|uint32(b), bits+8
		for bits >= 5 {
			bits -= 5
			words = append(words, byte(acc>>bits)&31)
		}
	}
	if bits > 0 {
		words = append(words, byte(acc<<(5-bits))&31)
	}
	var out strings.Builder
	out.WriteString(hrp + "1")
	for _, w := range append(words, checksum(hrp, words)...) {
		out.WriteByte(alphabet[w])
	}
	return out.String()
}

func checksum(hrp string, words []byte) []byte {
	chk := uint32(1)
	step := func(v byte) {
		top := chk >> 25
		chk = (chk&0x1ffffff)<<5 ^ uint32(v)
		for i, g := range [...]uint32{0x3b6a57b2, 0x26508e6d, 0x1ea119fa, 0x3d4233dd, 0x2a1462b3} {
			if top>>i&1 == 1 {
				chk ^= g
			}
		}
	}
	for _, c := range []byte(hrp) {
		step(c >> 5)
	}
	step(0)
	for _, c := range []byte(hrp) {
		step(c & 31)
	}
	for _, w := range words {
		step(w)
	}
	for range 6 {
		step(0)
	}
	chk ^= 1
	out := make([]byte, 6)
	for i := range out {
		out[i] = byte(chk>>(5*(5-i))) & 31
	}
	return out
}
