// SPDX-License-Identifier: Apache-2.0

package estate

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/demarc-dev/demarc/fault"
)

// Write makes the folder with all files, or nothing. A folder that holds anything is left alone.
func Write(dir string, files []File) error {
	const op = "estate.Write"
	abs, err := filepath.Abs(dir)
	if err != nil {
		return fault.At(op, fault.Internal, err)
	}
	switch list, err := os.ReadDir(abs); {
	case err == nil && len(list) > 0:
		return fault.New(op, fault.Conflict, "the folder %s is not empty, and nothing is overwritten: name another one", dir)
	case err != nil && !errors.Is(err, fs.ErrNotExist):
		return fault.Because(err, op, fault.Unavailable, "%s can't be used as a folder", dir)
	}
	if err := os.MkdirAll(filepath.Dir(abs), 0o755); err != nil {
		return fault.Because(err, op, fault.Unavailable, "the folder of %s can't be made", dir)
	}
	tmp, err := os.MkdirTemp(filepath.Dir(abs), ".estate-*") // mode 0700, as the estate has
	if err != nil {
		return fault.Because(err, op, fault.Unavailable, "can't write beside %s", dir)
	}
	defer os.RemoveAll(tmp)
	for _, f := range files {
		if err := put(filepath.Join(tmp, filepath.FromSlash(f.Path)), f); err != nil {
			return fault.Because(err, op, fault.Unavailable, "%s can't be written", f.Path)
		}
	}
	_ = os.Remove(abs) // an empty folder; anything else stays, and then the rename says so
	if err := os.Rename(tmp, abs); err != nil {
		return fault.Because(err, op, fault.Conflict, "the folder %s can't be made: something else came to be there", dir)
	}
	return nil
}

func put(path string, f File) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	mode := fs.FileMode(0o644)
	if f.Private {
		mode = 0o600
	}
	w, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, mode)
	if err != nil {
		return err
	}
	_, err = w.Write(f.Bytes)
	return errors.Join(err, w.Sync(), w.Close())
}
