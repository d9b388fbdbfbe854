// SPDX-License-Identifier: Apache-2.0

// Package smallfile reads and writes small files as a whole.
//
// A file that it writes has all of its bytes or is not there, or is what it was before: whatever is cut short, by a full disk or by a
// crash, leaves no half of a file behind. Errors are those of the os package, and wrap fs.ErrExist and fs.ErrNotExist as these do.
package smallfile

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
)

// ErrTooLarge is the error of [Read] for a file that has more bytes than the bound.
var ErrTooLarge = errors.New("the file is too large")

// Read returns the bytes of a file that has at most that many.
func Read(path string, most int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, most+1))
	if err != nil {
		return nil, err
	}
	if int64(len(b)) > most {
		return nil, fmt.Errorf("%w: more than %d bytes", ErrTooLarge, most)
	}
	return b, nil
}

// Create writes a file that must not exist yet; if it does, the error wraps [fs.ErrExist].
func Create(path string, b []byte, mode fs.FileMode) error {
	if _, err := os.Lstat(path); err == nil {
		return exists(path)
	}
	w, err := os.CreateTemp(filepath.Dir(path), ".new-*") // mode 0600
	if err != nil {
		return err
	}
	defer os.Remove(w.Name())
	_, err = w.Write(b)
	if err = errors.Join(err, w.Chmod(mode), w.Sync(), w.Close()); err != nil {
		return err
	}
	err = os.Link(w.Name(), path) // a link replaces nothing that came meanwhile
	if errors.Is(err, errors.ErrUnsupported) || errors.Is(err, fs.ErrPermission) {
		return os.Rename(w.Name(), path) // a file system without links
	}
	return err
}

// probe is as much as [CanCreate] writes: a small file, for a disk that is full.
const probe = 4 << 10

// CanCreate returns the error that [Create] would return now, and leaves nothing behind.
func CanCreate(path string) error {
	if _, err := os.Lstat(path); err == nil {
		return exists(path)
	}
	w, err := os.CreateTemp(filepath.Dir(path), ".new-*")
	if err != nil {
		return err
	}
	_, err = w.Write(make([]byte, probe))
	return errors.Join(err, w.Sync(), w.Close(), os.Remove(w.Name()))
}

func exists(path string) error { return &fs.PathError{Op: "create", Path: path, Err: fs.ErrExist} }
