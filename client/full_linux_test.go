// SPDX-License-Identifier: Apache-2.0

package client

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/demarc-dev/demarc/fault"
)

// TestAFullDiskLeavesNoHalfPair (FAULTS.md G5): a full disk leaves nothing of a renewal behind.
func TestAFullDiskLeavesNoHalfPair(t *testing.T) {
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
	large := bytes.Repeat([]byte("x"), 64<<10)
	if err := ReplaceFiles(map[string][]byte{key: large}); !errors.Is(err, fault.Unavailable) ||
		!strings.Contains(fault.Text(err), "the disk is full") {
		t.Fatalf("%v", err)
	}
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 1 {
		t.Fatalf("left behind: %v, %v", entries, err)
	}
}
