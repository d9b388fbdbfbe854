// SPDX-License-Identifier: Apache-2.0

package main

import (
	"crypto/rand"
	"encoding/json"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/demarc-dev/demarc/configs"
	"github.com/demarc-dev/demarc/daemon/controlplane"
	"github.com/demarc-dev/demarc/daemon/controlplane/book"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/identity"
)

// TestALostDiskBeginsNoCluster: a node that has run, and comes back with an empty disk while nobody else is there, does not begin
// anew from the file that it began with: it says what to do, each time. On the first day it begins.
func TestALostDiskBeginsNoCluster(t *testing.T) {
	n := newRealNode(t)
	n.halt()
	data := filepath.Join(n.dir, "cp-1", "data")
	if err := os.RemoveAll(data); err != nil {
		t.Fatal(err)
	}
	n.start() // the first day is not over: as if nothing had been
	n.halt()

	fresh := n.ages(25 * time.Hour)
	n.start() // with its log it may be as old as it likes
	n.halt()
	for _, lost := range []string{filepath.Join(data, "raft"), data} {
		if err := os.RemoveAll(lost); err != nil {
			t.Fatal(err)
		}
		for range 2 { // also when a service manager tries again
			cfg, err := configs.Load(filepath.Join(n.dir, "cp-1", "node.yaml"), nil)
			if err != nil {
				t.Fatal(err)
			}
			_, err = controlplane.Parts(cfg.(*configs.Control), "test", slog.New(slog.DiscardHandler))
			if fault.Of(err) != fault.Conflict {
				t.Fatalf("without %s it starts, or says %v", lost, err)
			}
			for _, want := range []string{"holds no log", "control-plane certify", "join: true", "snapshot restore", "control-plane init"} {
				if !strings.Contains(fault.Text(err), want) {
					t.Errorf("no %q in %q", want, fault.Text(err))
				}
			}
		}
	}
	if err := os.WriteFile(filepath.Join(n.dir, "genesis.json"), fresh, 0o600); err != nil {
		t.Fatal(err)
	}
	n.start()
}

// ages puts a genesis in the place of the node's that was made so long ago, and returns the one that was there.
func (n *realNode) ages(by time.Duration) []byte {
	n.t.Helper()
	path := filepath.Join(n.dir, "genesis.json")
	was, err := os.ReadFile(path)
	if err != nil {
		n.t.Fatal(err)
	}
	var g book.GenesisWith
	if err := json.Unmarshal(was, &g); err != nil {
		n.t.Fatal(err)
	}
	old, err := identity.NewCA(trustDomain, time.Now().Add(-by), rand.Reader, 1000*time.Hour)
	if err != nil {
		n.t.Fatal(err)
	}
	g.Slots[0].CertDER = old.Cert.Raw
	b, err := json.Marshal(g)
	if err != nil {
		n.t.Fatal(err)
	}
	if err := os.WriteFile(path, b, 0o600); err != nil {
		n.t.Fatal(err)
	}
	return was
}
