// SPDX-License-Identifier: Apache-2.0

package wal

import (
	"os"

	"golang.org/x/sys/unix"
)

// dataSync forces the bytes of a file to the disk, and of its other data what is needed to read them, its size included.
func dataSync(f *os.File) error {
	for {
		if err := unix.Fdatasync(int(f.Fd())); err != unix.EINTR {
			return err
		}
	}
}
