// SPDX-License-Identifier: Apache-2.0

package main

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// TestRecoverAdminByCommand: the only admin's files are gone. With the kek and the data of a node there is an admin again, while the
// node runs. One who has the data directory without the kek, or the kek without the data directory, gets nothing.
func TestRecoverAdminByCommand(t *testing.T) {
	n := newRealNode(t)
	n.until("the node said which key it holds", func() bool { use, held := n.holds(); return use != "" && slices.Equal(held, []string{use}) })
	config, again := filepath.Join(n.dir, "cp-1", "node.yaml"), filepath.Join(n.dir, "again.yaml")
	lost := n.ann()
	kek := n.read("kek")

	if err := os.WriteFile(filepath.Join(n.dir, "kek"), make([]byte, 32), 0o600); err != nil {
		t.Fatal(err)
	}
	if got := n.types("", 3, "control-plane", "recover-admin", "ann", "--config", config, "--out", again); !strings.Contains(got,
		"does not open the keys of this node") {
		t.Fatal(got)
	}
	if err := os.WriteFile(filepath.Join(n.dir, "kek"), kek, 0o600); err != nil {
		t.Fatal(err)
	}
	if got := n.types("", 1, "control-plane", "recover-admin", "ann", "--config", config, "--dir", t.TempDir(), "--out",
		again); !strings.Contains(got, "the sealed keys of the node can't be read") {
		t.Fatal(got)
	}
	if got := n.types("", 2, "control-plane", "recover-admin", "ann", "--config", config); !strings.Contains(got, "--out") {
		t.Fatal(got)
	}
	if _, err := os.Stat(again); err == nil {
		t.Fatal("a refused recovery left an operator's file")
	}

	if got := n.types("", 0, "control-plane", "recover-admin", "ann", "--config", config, "--out", again); !strings.Contains(got,
		"you are operator ann with the role admin") {
		t.Fatal(got)
	}
	if got := n.as(again, 0, "operator", "list"); !strings.Contains(got, "ann") {
		t.Fatal(got)
	}
	n.as(again, 0, "operator", "invite", "ben", "--role", "viewer", "--out", filepath.Join(n.dir, "ben.invitation"))
	if got := n.as(lost, 3, "status"); !strings.Contains(got, "refused this operator's certificate") {
		t.Fatalf("the lost certificate: %s", got)
	}
	if got := n.as(again, 0, "operator", "show", "ann"); !strings.Contains(got, "recovery") {
		t.Fatal(got)
	}
}
