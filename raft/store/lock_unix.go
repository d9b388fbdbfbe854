// SPDX-License-Identifier: Apache-2.0

//go:build unix

package store

import (
	"os"

	"golang.org/x/sys/unix"
)

// lockFile holds until the file is closed or the process ends.
func lockFile(f *os.File) error {
	return unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
}
