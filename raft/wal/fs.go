// SPDX-License-Identifier: Apache-2.0

package wal

import (
	"errors"
	"io"
	"os"
	"path/filepath"
)

// Files is one directory, as the log uses it. What was written is on disk after Sync of its file; that a file was made
// or removed is on disk after SyncDir. [Dir] is the real one; a test has one that crashes.
type Files interface {
	List() ([]string, error)
	Open(name string) (File, error)   // fails with [os.ErrNotExist] if there is none
	Create(name string) (File, error) // empty, replaces one that is there
	Remove(name string) error
	SyncDir() error
}

// File is one open file.
type File interface {
	io.ReaderAt
	io.WriterAt
	io.Closer
	Sync() error
	Size() (int64, error)
}

// Dir is a directory of the operating system; it must exist.
func Dir(path string) Files { return dir(path) }

type dir string

func (d dir) List() ([]string, error) {
	found, err := os.ReadDir(string(d))
	names := make([]string, 0, len(found))
	for _, f := range found {
		names = append(names, f.Name())
	}
	return names, err
}

func (d dir) Open(name string) (File, error) {
	f, err := os.OpenFile(filepath.Join(string(d), name), os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	return file{f}, nil
}

func (d dir) Create(name string) (File, error) {
	f, err := os.OpenFile(filepath.Join(string(d), name), os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return nil, err
	}
	return file{f}, nil
}

func (d dir) Remove(name string) error { return os.Remove(filepath.Join(string(d), name)) }

func (d dir) SyncDir() error {
	f, err := os.Open(string(d))
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

type file struct{ *os.File }

func (f file) Size() (int64, error) {
	s, err := f.Stat()
	if err != nil {
		return 0, err
	}
	return s.Size(), nil
}

// Sync forces the bytes to the disk.
func (f file) Sync() error { return dataSync(f.File) }
