// SPDX-License-Identifier: Apache-2.0

package identity

import (
	"bytes"
	"crypto/hkdf"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"io"

	"github.com/demarc-dev/demarc/fault"
)

const (
	secretIntro = "demarc-sealed-secret/1\n"
	// MaxSecret bounds a secret that is sealed, in bytes.
	MaxSecret = 4 << 10
)

// KEKID names a key-encryption key without telling anything of it: 16 hex digits. Two keys have two names.
func KEKID(kek []byte) (string, error) {
	const op = "identity.KEKID"
	if len(kek) != 32 {
		return "", fault.New(op, fault.Invalid, "the key that seals the keys has %d bytes: 32 random bytes are needed", len(kek))
	}
	id, err := hkdf.Key(sha256.New, kek, nil, "demarc-kek-id/1", 8)
	return hex.EncodeToString(id), fault.At(op, fault.Internal, err)
}

// SealSecret seals a secret of this name with a key-encryption key (AES-256-GCM, a fresh nonce each time). It opens under the
// same name only.
func SealSecret(name string, secret, kek []byte, rand io.Reader) ([]byte, error) {
	const op = "identity.SealSecret"
	if len(secret) == 0 || len(secret) > MaxSecret {
		return nil, fault.New(op, fault.Invalid, "a secret of %d bytes: 1 to %d can be sealed", len(secret), MaxSecret)
	}
	gcm, err := sealer(op, kek)
	if err != nil {
		return nil, err
	}
	nonce := make([]byte, gcm.NonceSize())
	if _, err := io.ReadFull(rand, nonce); err != nil {
		return nil, fault.At(op, fault.Internal, err)
	}
	box := gcm.Seal(nonce, nonce, secret, []byte(secretIntro+name))
	return []byte(secretIntro + base64.StdEncoding.EncodeToString(box) + "\n"), nil
}

// OpenSecret opens what [SealSecret] sealed.
func OpenSecret(name string, sealed, kek []byte) ([]byte, error) {
	const op = "identity.OpenSecret"
	gcm, err := sealer(op, kek)
	if err != nil {
		return nil, err
	}
	body, ok := bytes.CutPrefix(sealed, []byte(secretIntro))
	if !ok || len(sealed) > 2*MaxSecret {
		return nil, fault.New(op, fault.Invalid, "this is no sealed secret: its first line must be %q", secretIntro[:len(secretIntro)-1])
	}
	box, err := base64.StdEncoding.Strict().DecodeString(string(bytes.TrimSuffix(body, []byte("\n"))))
	if err != nil || len(box) < gcm.NonceSize() {
		return nil, fault.Because(err, op, fault.Invalid, "the second line of the sealed secret is not base64 of a box")
	}
	out, err := gcm.Open(nil, box[:gcm.NonceSize()], box[gcm.NonceSize():], []byte(secretIntro+name))
	if err != nil {
		return nil, fault.New(op, fault.Denied, "the sealed secret %q does not open: another key file sealed it, it has another name, or it "+
			"was altered", fault.Clip(name))
	}
	return out, nil
}
