// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"errors"
	"os"
	"path/filepath"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
)

const maxSecret = 1 << 20 // bytes

// createSecret writes a secret into the folder, whole, readable by the owner only. One that is there is replaced.
func createSecret(dir, name string, value []byte) error {
	const op = "cli.createSecret"
	if err := fleet.CheckName("secret", name); err != nil {
		return err
	}
	if len(value) == 0 || len(value) > maxSecret {
		return fault.New(op, fault.Invalid, "secret %s: the value has %d bytes, give 1 to %d", name, len(value), maxSecret)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fault.Because(err, op, fault.Unavailable, "the folder of secrets can't be made")
	}
	f, err := os.CreateTemp(dir, ".new-*") // mode 0600; no secret can have such a name
	if err != nil {
		return fault.Because(err, op, fault.Unavailable, "can't write in the folder of secrets")
	}
	defer os.Remove(f.Name())
	_, err = f.Write(value)
	if err = errors.Join(err, f.Sync(), f.Close()); err == nil {
		err = os.Rename(f.Name(), filepath.Join(dir, name))
	}
	if err != nil {
		return fault.Because(err, op, fault.Unavailable, "secret %s can't be written", name)
	}
	return nil
}
