// SPDX-License-Identifier: Apache-2.0

package artifact_test

import (
	"bytes"
	"context"
	"errors"
	"os"
	"strings"
	"syscall"
	"testing"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/workload/artifact"
)

// TestFullDiskSaysSo (FAULTS.md J7): an artifact that the disk has no room for is refused with that reason, leaves nothing behind that
// takes room from others, and comes once there is space.
func TestFullDiskSaysSo(t *testing.T) {
	if os.Getenv("DEMARC_DISK") == "" {
		t.Skip("needs root, and mounts a small file system: make test-disk")
	}
	dir := t.TempDir()
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size=1m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(dir, syscall.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	s, err := artifact.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	big, small := bytes.Repeat([]byte("b"), 2<<20), bytes.Repeat([]byte("s"), 500<<10)
	_, err = s.Put(context.Background(), fleet.DigestOf(big), bytes.NewReader(big))
	if !errors.Is(err, fault.Unavailable) || !strings.Contains(fault.Text(err), "full") {
		t.Fatalf("%v does not say that the disk is full", err)
	}
	if n := s.Arrived(fleet.DigestOf(big)); n != 0 || s.Durable(fleet.DigestOf(big)) {
		t.Errorf("%d bytes of it are left", n)
	}
	if d := put(t, s, small); !s.Durable(d) {
		t.Error("what fits does not come")
	}
}
