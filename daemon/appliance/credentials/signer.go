// SPDX-License-Identifier: Apache-2.0

package credentials

import (
	"crypto/ed25519"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/seal"
)

// OpenSigner reads or creates the key that signs this appliance's log and results.
func OpenSigner(path string) (ed25519.PrivateKey, error) {
	const op = "appliance.signer"
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		_, key, err := ed25519.GenerateKey(rand.Reader)
		if err != nil {
			return nil, fault.At(op, fault.Internal, err)
		}
		der, err := x509.MarshalPKCS8PrivateKey(key)
		if err != nil {
			return nil, fault.At(op, fault.Internal, err)
		}
		pub, err := seal.KeyOf(key.Public())
		if err != nil {
			return nil, err
		}
		if err := writeFile(filepath.Join(filepath.Dir(path), "log.pub"), pub.PEM()); err != nil { // auditors pin it
			return nil, err
		}
		return key, writeFile(path, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}))
	}
	if err != nil {
		return nil, fault.Because(err, op, fault.Unavailable, "the appliance's signing key can't be read: %s", path)
	}
	block, _ := pem.Decode(b)
	if block == nil {
		return nil, fault.New(op, fault.Invalid, "%s holds no key", path)
	}
	key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, fault.At(op, fault.Invalid, err)
	}
	ed, ok := key.(ed25519.PrivateKey)
	if !ok {
		return nil, fault.New(op, fault.Invalid, "%s holds a key that is not Ed25519", path)
	}
	return ed, nil
}
