// SPDX-License-Identifier: Apache-2.0

package workload

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/smallfile"
)

// Secrets is where the customer keeps secrets. It tells that one is there, and where a program finds it; it never reads one.
type Secrets interface {
	Present(name string) (bool, error)
	Path(name string) string
}

// MaxSecret bounds the value of a secret in bytes.
const MaxSecret = 1 << 20

// Files is a folder with one file for each secret.
type Files struct{ dir string }

// NewFiles is the secrets in dir, which needs not exist yet.
func NewFiles(dir string) *Files {
	if abs, err := filepath.Abs(dir); err == nil {
		dir = abs
	}
	return &Files{dir}
}

// Present tells whether a secret is there: a regular file that is not empty. It looks at the folder only, and never opens
// the file. A link is not present, for it could lead to what is no secret.
func (f *Files) Present(name string) (bool, error) {
	const op = "workload.Present"
	if err := fleet.CheckName("secret", name); err != nil {
		return false, fault.At(op, fault.Invalid, err)
	}
	st, err := os.Lstat(filepath.Join(f.dir, name))
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fault.Because(err, op, fault.Unavailable, "can't tell whether secret %q is present: look at the rights on the folder of "+
			"secrets", name)
	}
	return st.Mode().IsRegular() && st.Size() > 0, nil
}

// Path is the file of a secret, "" for what can't be a name.
func (f *Files) Path(name string) string {
	if fleet.CheckName("secret", name) != nil {
		return ""
	}
	return filepath.Join(f.dir, name)
}

// CreateFile writes a secret into the folder, as a whole, readable by the owner only. One that is there is replaced.
func CreateFile(dir, name string, value []byte) error {
	const op = "workload.CreateFile"
	if err := fleet.CheckName("secret", name); err != nil {
		return fault.At(op, fault.Invalid, err)
	}
	if len(value) == 0 || len(value) > MaxSecret {
		return fault.New(op, fault.Invalid, "secret %q: the value has %d bytes, give 1 to %d", name, len(value), MaxSecret)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fault.Because(err, op, fault.Unavailable, "the folder of secrets can't be made")
	}
	if st, err := os.Stat(dir); err != nil || st.Mode().Perm()&0o022 != 0 {
		return fault.Because(err, op, fault.Denied, "others may write to the folder of secrets: chmod 700 it")
	}
	if err := smallfile.Replace(filepath.Join(dir, name), value); err != nil {
		return fault.Because(err, op, fault.Unavailable, "secret %q can't be written", name)
	}
	return nil
}
