// SPDX-License-Identifier: Apache-2.0

package wal_test

import (
	"os"
	"strconv"
	"testing"

	"github.com/demarc-dev/demarc/raft/wal"
	"github.com/demarc-dev/demarc/raft/wal/waltest"
)

// A machine that crashes at any step of a schedule of appends, cuts, drops and votes comes back with all that was
// answered, with nothing that was deleted, and with its votes, whichever of the unsynced sectors reached the disk. And
// the same again when it crashes while it comes back.
func TestCrashAtEachStep(t *testing.T) {
	seeds := 4
	if s := os.Getenv("DEMARC_CRASH_SEEDS"); s != "" {
		var err error
		if seeds, err = strconv.Atoi(s); err != nil {
			t.Fatal(err)
		}
	}
	states, wrong := waltest.Sweep(seeds, 36, 4, func(s *waltest.Script) (waltest.Store, error) {
		return wal.Open(s, wal.Options{SegmentBytes: 8 << 10})
	})
	for _, err := range wrong[:min(len(wrong), 5)] {
		t.Error(err)
	}
	t.Logf("%d crash states, %d wrong", states, len(wrong))
}
