// SPDX-License-Identifier: Apache-2.0

package controlplane

import "github.com/demarc-dev/demarc/seal"

import "github.com/demarc-dev/demarc/daemon/controlplane/authority"

// LogKey is the public half, in PEM, of the key that signs the checkpoints of the vendor's log, for a book that begins with this
// key-encryption key: auditors pin it.
func LogKey(kek []byte) ([]byte, error) {
	key, err := authority.LogKey(kek)
	if err != nil {
		return nil, err
	}
	k, err := seal.KeyOf(key.Public())
	if err != nil {
		return nil, err
	}
	return k.PEM(), nil
}
