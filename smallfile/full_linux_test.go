// SPDX-License-Identifier: Apache-2.0

package smallfile_test

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/demarc-dev/demarc/smallfile"
)

// TestAFullDiskLeavesNoHalfFile (FAULTS.md G5): a full disk left an empty key or evidence file behind, which blocked the next try.
func TestAFullDiskLeavesNoHalfFile(t *testing.T) {
	if os.Getenv("DEMARC_DISK") == "" {
		t.Skip("needs root, and mounts small file systems: make test-disk")
	}
	dir := t.TempDir()
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size=256k"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(dir, syscall.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	ballast := filepath.Join(dir, "ballast")
	if err := os.WriteFile(ballast, make([]byte, 248<<10), 0o600); err != nil {
		t.Fatal(err)
	}
	key := filepath.Join(dir, "key")
	there := func() (names []string) {
		entries, err := os.ReadDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			names = append(names, e.Name())
		}
		return names
	}
	large := bytes.Repeat([]byte("x"), 64<<10)
	err := smallfile.Create(key, large, 0o644)
	if !errors.Is(err, syscall.ENOSPC) {
		t.Fatalf("%v", err)
	}
	if err := smallfile.Replace(key, large); !errors.Is(err, syscall.ENOSPC) {
		t.Fatalf("%v", err)
	}
	if got := there(); len(got) != 1 {
		t.Fatalf("left behind: %q", got)
	}
	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	if err := smallfile.Create(key, large, 0o644); err != nil {
		t.Fatalf("there is space again: %v", err)
	}
	if st, err := os.Stat(key); err != nil || st.Mode().Perm() != 0o644 || st.Size() != int64(len(large)) {
		t.Fatalf("%v, %v", st, err)
	}
	if err := smallfile.Create(key, []byte("other"), 0o600); !errors.Is(err, fs.ErrExist) {
		t.Fatalf("a file was overwritten: %v", err)
	}
	if got := there(); len(got) != 1 {
		t.Fatalf("left behind: %q", got)
	}
}
