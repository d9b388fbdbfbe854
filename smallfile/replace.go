// SPDX-License-Identifier: Apache-2.0

package smallfile

import (
	"errors"
	"os"
	"path/filepath"
)

// replacement is what the order of a replacement can be seen at.
type replacement struct {
	write  func(f *os.File, b []byte) error // and sync, and close
	rename func(from, to string) error
	sync   func(dir string) error
}

var onDisk = replacement{
	write: func(f *os.File, b []byte) error {
		_, err := f.Write(b)
		return errors.Join(err, f.Sync(), f.Close())
	},
	rename: os.Rename,
	sync: func(dir string) error {
		d, err := os.Open(dir)
		if err != nil {
			return err
		}
		defer d.Close()
		return d.Sync()
	},
}

// Replace puts b in the place of a file, readable by its owner only. It is there as a whole or not at all, and once Replace
// has returned nil it is there after a crash too. What is on its way has a name that begins with ".new-" beside the file.
func Replace(path string, b []byte) error { return onDisk.replace(path, b) }

func (d replacement) replace(path string, b []byte) error {
	f, err := os.CreateTemp(filepath.Dir(path), ".new-*") // 0600
	if err != nil {
		return err
	}
	defer os.Remove(f.Name()) // after the rename there is nothing to remove
	if err := d.write(f, b); err != nil {
		return err
	}
	if err := d.rename(f.Name(), path); err != nil {
		return err
	}
	return d.sync(filepath.Dir(path)) // the name is the folder's: without this, a crash may bring the old file back
}
