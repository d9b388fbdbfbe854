// SPDX-License-Identifier: Apache-2.0

package smallfile_test

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"github.com/demarc-dev/demarc/smallfile"
)

func TestReadHasABound(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a")
	if _, err := smallfile.Read(path, 4); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a file that is not there: %v", err)
	}
	if err := os.WriteFile(path, []byte("four"), 0o600); err != nil {
		t.Fatal(err)
	}
	if b, err := smallfile.Read(path, 4); err != nil || string(b) != "four" {
		t.Errorf("%q, %v", b, err)
	}
	if b, err := smallfile.Read(path, 3); !errors.Is(err, smallfile.ErrTooLarge) || b != nil {
		t.Errorf("%q, %v", b, err)
	}
}

// TestCreateReplacesNothing: what is there stays, and neither call leaves anything beside it.
func TestCreateReplacesNothing(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "a")
	if err := smallfile.CanCreate(path); err != nil {
		t.Fatal(err)
	}
	if err := smallfile.Create(path, []byte("one"), 0o640); err != nil {
		t.Fatal(err)
	}
	if st, err := os.Stat(path); err != nil || st.Mode().Perm() != 0o640 {
		t.Errorf("%v, %v", st, err)
	}
	if err := smallfile.CanCreate(path); !errors.Is(err, fs.ErrExist) {
		t.Errorf("it could be created again: %v", err)
	}
	if err := smallfile.Create(path, []byte("two"), 0o600); !errors.Is(err, fs.ErrExist) {
		t.Errorf("it was created again: %v", err)
	}
	if b, _ := os.ReadFile(path); string(b) != "one" {
		t.Errorf("it holds %q", b)
	}
	if err := smallfile.Create(filepath.Join(dir, "no", "a"), nil, 0o600); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("without its folder: %v", err)
	}
	if all, _ := os.ReadDir(dir); len(all) != 1 {
		t.Errorf("%v is there", all)
	}
}
