// SPDX-License-Identifier: Apache-2.0

package artifact

import (
	"errors"
	"io/fs"
	"os"

	"github.com/demarc-dev/demarc/fault"
)

// CheckProgram says what is wrong with a program of an artifact's folder, named by its path inside: it must be a file that may
// be executed. [Pack] takes no links, so that the name leads nowhere else.
func CheckProgram(dir, program string) error {
	const op = "artifact.CheckProgram"
	root, err := os.OpenRoot(dir)
	if err != nil {
		return fault.Because(err, op, fault.NotFound, "the folder of the artifact can't be read")
	}
	defer root.Close()
	info, err := root.Lstat(program)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return fault.New(op, fault.NotFound, "the artifact has no file %.100q", program)
	case err != nil:
		return fault.Because(err, op, fault.Invalid, "the program %.100q is not one of the artifact", program)
	case !info.Mode().IsRegular():
		return fault.New(op, fault.Invalid, "%.100q is no file", program)
	case info.Mode()&0o111 == 0:
		return fault.New(op, fault.Invalid, "%.100q may not be executed: chmod +x", program)
	}
	return nil
}
