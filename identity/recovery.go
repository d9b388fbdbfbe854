// SPDX-License-Identifier: Apache-2.0

package identity

import (
	"crypto/ed25519"
	"crypto/hkdf"
	"crypto/sha256"

	"github.com/demarc-dev/demarc/fault"
)

// Recovery is what makes an admin of somebody where no admin is left who can call: an act of whoever holds the key-encryption
// key that seals the vendor's keys now, and the sealed keys of a node.
type Recovery struct {
	TrustDomain string
	Name        string // of the operator
	Node        string // whose files were used
	Nonce       string // of the control plane, good once
	CSR         []byte // DER; the certificate will be of its key
}

// RecoveryKey is the key pair that proves a recovery. The seed of the vendor's log key comes sealed from the data of a node, and
// only the key-encryption key opens it; that key is in it once more, so that one which was replaced proves nothing, whatever it
// still opens in an old copy.
func RecoveryKey(logSeed, kek []byte) (ed25519.PrivateKey, error) {
	const op = "identity.RecoveryKey"
	if len(logSeed) != ed25519.SeedSize || len(kek) != 32 {
		return nil, fault.New(op, fault.Invalid, "a recovery needs the seed of the log's key and the key-encryption key, of 32 bytes each")
	}
	seed, err := hkdf.Key(sha256.New, logSeed, kek, "demarc-recover-admin-key/1", ed25519.SeedSize)
	if err != nil {
		return nil, fault.At(op, fault.Internal, err)
	}
	return ed25519.NewKeyFromSeed(seed), nil
}

// Sign proves a recovery with [RecoveryKey].
func (r Recovery) Sign(key ed25519.PrivateKey) []byte { return ed25519.Sign(key, r.spelled()) }

// Check checks the proof of [Recovery.Sign]. That the nonce is fresh is for others to say.
func (r Recovery) Check(key ed25519.PublicKey, proof []byte) error {
	if len(key) != ed25519.PublicKeySize || !ed25519.Verify(key, r.spelled(), proof) {
		return fault.New("identity.Recovery", fault.Denied, "the proof is not made of this control plane's key-encryption key and keys, or is "+
			"of another name, node or key")
	}
	return nil
}

func (r Recovery) spelled() []byte {
	sum := sha256.Sum256(r.CSR)
	return spell("demarc-recover-admin/1\n", []byte(r.TrustDomain), []byte(r.Name), []byte(r.Node), []byte(r.Nonce), sum[:])
}

// spell writes parts behind an intro. The length of each comes before it, so that no two questions have one spelling.
func spell(intro string, parts ...[]byte) []byte {
	out := []byte(intro)
	for _, part := range parts {
		out = append(out, byte(len(part)>>8), byte(len(part)))
		out = append(out, part...)
	}
	return out
}
