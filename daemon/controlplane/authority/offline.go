// SPDX-License-Identifier: Apache-2.0

package authority

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/demarc-dev/demarc/configs"
	"github.com/demarc-dev/demarc/daemon/controlplane/book"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/identity"
	"github.com/demarc-dev/demarc/seal"
)

// ForgetCredentials removes the node's saved credentials from its former cluster: it is the only member now, and the CAs of the snapshot
// apply.
func ForgetCredentials(cfg *configs.Control) error {
	if err := os.Remove(filepath.Join(cfg.Dir, CredentialsFile)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fault.Because(err, "controlplane.RestoreSnapshot", fault.Unavailable, "the credentials that the node kept can't be taken away")
	}
	return nil
}

// OpenAll opens everything that is sealed in a book with the key files of a node.
func OpenAll(cfg *configs.Control, st book.State) error {
	const op = "controlplane.RestoreSnapshot"
	keks, err := KEKFiles{cfg.KEKFile}.Read()
	if err != nil {
		return err
	}
	held := Keyring{keys: keks}
	k, err := held.Get(st.KEK)
	if err != nil {
		return fault.New(op, fault.Denied, "the keys in this snapshot are sealed with key %s, and %s is key %s: nothing was changed; put "+
			"the right one there", st.KEK, cfg.KEKFile, keks[0].ID)
	}
	for _, slot := range st.Slots {
		if len(slot.SealedKey) == 0 {
			continue
		}
		if _, err := identity.OpenAuthority(slot.CertDER, slot.SealedKey, k.Key); err != nil {
			return fault.Because(err, op, fault.Denied,
				"%s does not open the key of CA %s in this snapshot: nothing was changed", cfg.KEKFile, slot.ID().Short())
		}
	}
	for _, one := range st.Secrets {
		if _, err := identity.OpenSecret(one.Name, one.Sealed, k.Key); err != nil {
			return fault.Because(err, op, fault.Denied,
				"%s does not open the secret %q in this snapshot: nothing was changed", cfg.KEKFile, one.Name)
		}
	}
	return nil
}

// MetBefore is the number of the newest epoch that the disk of a node knows, beside its log; 0 if unknown.
func MetBefore(cfg *configs.Control) uint64 {
	var c credentials
	b, err := os.ReadFile(filepath.Join(cfg.Dir, CredentialsFile))
	if err != nil || len(b) > maxCredentials || seal.StrictJSON(b, &c) != nil {
		return 0
	}
	return c.Epoch
}
