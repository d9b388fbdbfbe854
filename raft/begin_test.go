// SPDX-License-Identifier: Apache-2.0

package raft_test

import (
	"os"
	"testing"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/raft"
)

// A node is asked whether it may begin a cluster if its directory is empty, and only then; if it may not it writes nothing
// that a later start would take for a beginning.
func TestBeginIsAsked(t *testing.T) {
	asked, refuses := 0, false
	c := start(t, 1, func(_ int, cfg *raft.Config) {
		cfg.Begin = func() error {
			if asked++; refuses {
				return fault.New("test", fault.Conflict, "the disk was lost")
			}
			return nil
		}
	})
	c.leader()
	c.propose(0, "one")
	c.stop(0)
	refuses = true
	c.open(0) // it has a log
	c.leader()
	if c.stop(0); asked != 1 {
		t.Fatalf("it was asked %d times: once at the first start, and not if there is a log", asked)
	}
	if err := os.RemoveAll(c.dirs[0]); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		cfg := c.config(0)
		n, err := raft.Open(cfg)
		_ = cfg.Listener.Close()
		if fault.Of(err) != fault.Conflict || fault.Text(err) != "the disk was lost" {
			t.Fatalf("with an empty directory: %v, %v", n, err)
		}
	}
	join := c.config(0)
	join.Join = true
	n, err := raft.Open(join)
	if err != nil || len(n.IDs()) != 0 || asked != 3 {
		t.Fatalf("a node that joins begins nothing, and is not asked: %v, asked %d times", err, asked)
	}
	if err := n.Close(within(t)); err != nil {
		t.Fatal(err)
	}
	refuses = false
	c.open(0)
	c.leader()
	c.same([]string{})
}
