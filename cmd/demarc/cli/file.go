// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/demarc-dev/demarc/configs"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/seal"
	"github.com/demarc-dev/demarc/smallfile"
)

// MaxKeyFile bounds the file of a key, in bytes.
const MaxKeyFile = 64 << 10

// Create writes a file that must not exist yet, whole or not at all. The fault is Conflict if it does.
func Create(path string, b []byte, mode fs.FileMode) error {
	return creating(path, smallfile.Create(path, b, mode))
}

// CanCreate returns the error that [Create] would return now, and leaves nothing behind.
func CanCreate(path string) error { return creating(path, smallfile.CanCreate(path)) }

// Absent refuses a path where something is: the fault is Conflict.
func Absent(path string) error {
	if _, err := os.Lstat(path); err == nil {
		return creating(path, fs.ErrExist)
	}
	return nil
}

func creating(path string, err error) error {
	const op = "demarc.create"
	switch {
	case err == nil:
		return nil
	case errors.Is(err, fs.ErrExist):
		return fault.New(op, fault.Conflict, "%s is there already: nothing is overwritten", path)
	}
	return fault.Because(err, op, fault.Unavailable, "can't write %s: %s", path, fault.Disk(err))
}

// ReadFile reads a file of at most so many bytes. The fault is NotFound if there is none, and Invalid if it is larger.
func ReadFile(file string, most int64) ([]byte, error) {
	const op = "demarc.read"
	b, err := smallfile.Read(file, most)
	switch {
	case err == nil:
		return b, nil
	case errors.Is(err, fs.ErrNotExist):
		return nil, fault.New(op, fault.NotFound, "there is no file %s", file)
	case errors.Is(err, smallfile.ErrTooLarge):
		return nil, fault.New(op, fault.Invalid, "%s has more than %d bytes", file, most)
	}
	return nil, fault.Because(err, op, fault.Unavailable, "can't read %s", file)
}

// ReadKey reads a public key.
func ReadKey(file string) (seal.Key, error) {
	b, err := ReadFile(file, MaxKeyFile)
	if err != nil {
		return seal.Key{}, err
	}
	k, err := seal.ParseKey(b)
	if err != nil {
		return k, fault.Because(err, "demarc.ReadKey", fault.Of(err), "%s: %s", file, fault.Text(err))
	}
	return k, nil
}

// ReadNode reads the file of a node of a control plane, with another data directory if dir is not empty.
func ReadNode(path, dir string) (*configs.Control, error) {
	if path == "" {
		return nil, Usage("name the node's file with --config FILE")
	}
	c, err := configs.Load(path, nil)
	if err != nil {
		return nil, err
	}
	cfg, ok := c.(*configs.Control)
	if !ok {
		return nil, fault.New("demarc.config", fault.Invalid, "%s is not the file of a node of a control plane", path)
	}
	if dir != "" {
		cfg.Dir = dir
	}
	return cfg, fleet.CheckName("node", cfg.Name)
}

// Folder is where files are made, none of which may be there.
type Folder string

// Path joins names to the folder's.
func (f Folder) Path(parts ...string) string {
	return filepath.Join(append([]string{string(f)}, parts...)...)
}

// Write creates a file in the folder, and the folders that it needs.
func (f Folder) Write(b []byte, mode fs.FileMode, parts ...string) error {
	p := f.Path(parts...)
	if err := os.MkdirAll(filepath.Dir(p), 0o700); err != nil {
		return fault.Because(err, "demarc.write", fault.Unavailable, "can't make the folder of %s", p)
	}
	return Create(p, b, mode)
}
