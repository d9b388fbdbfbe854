// SPDX-License-Identifier: Apache-2.0

package raft_test

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/demarc-dev/demarc/raft"
)

// refused opens a node and wants these words, and nothing applied.
func (c *cluster) refused(i int, words ...string) {
	c.t.Helper()
	c.lists[i] = &list{}
	cfg := c.config(i)
	defer cfg.Listener.Close()
	n, err := raft.Open(cfg)
	if err == nil {
		_ = n.Close(within(c.t))
		c.t.Fatal("it opened")
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			c.t.Fatalf("%v: it does not say %q", err, w)
		}
	}
	if got := c.lists[i].all(); len(got) > 0 {
		c.t.Fatalf("%q was applied", got)
	}
}

// alter changes one byte of a file, at the place at which its present content is found.
func alter(t *testing.T, path, what string, at int) {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	i := bytes.Index(b, []byte(what))
	if i < 0 {
		t.Fatalf("%s does not hold %q", path, what)
	}
	b[i+at] ^= 1
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
}

func covered(s string) string {
	b := []byte(s)
	for i := range b {
		b[i] ^= 0xA5 // as it lies in the log
	}
	return string(b)
}

// A byte of the log that was altered prevents the node from starting: it names the file and the entry, and applies nothing.
func TestAnAlteredLogIsNamed(t *testing.T) {
	c := start(t, 1, nil)
	c.leader()
	var want []string
	for i := range 10 {
		c.propose(0, fmt.Sprint("line", i))
		want = append(want, fmt.Sprint("line", i))
	}
	c.stop(0)
	files, err := filepath.Glob(filepath.Join(c.dirs[0], "log", "wal", "*.segment"))
	if err != nil {
		t.Fatal(err)
	}
	var file string
	for _, f := range files { // one of them is the next one, still empty
		if b, err := os.ReadFile(f); err == nil && bytes.Contains(b, []byte(covered("line7"))) {
			file = f
		}
	}
	alter(t, file, covered("line7"), 3)
	c.refused(0, filepath.Base(file), "entry 10 ", "join again from its peers") // entries 1 and 2 are the library's
	alter(t, file, covered("lin")+string([]byte{"e"[0] ^ 0xA5 ^ 1}), 3)
	c.open(0)
	c.leader()
	c.same(want)
}

func newest(t *testing.T, dir string) string {
	t.Helper()
	found, err := filepath.Glob(filepath.Join(dir, "snapshots", "*", "state.bin"))
	if err != nil || len(found) == 0 {
		t.Fatalf("no snapshot in %s: %v", dir, err)
	}
	slices.Sort(found)
	return filepath.Dir(found[len(found)-1])
}

// A snapshot that was altered, or what is said about it, is put aside and named; the older one and the log take its
// place if they reach far enough; if they don't the node says what to do.
func TestAnAlteredSnapshotIsPutAside(t *testing.T) {
	for name, alters := range map[string]func(*testing.T, string){
		"state":    func(t *testing.T, dir string) { alter(t, filepath.Join(dir, "state.bin"), "line2", 2) },
		"index":    func(t *testing.T, dir string) { alter(t, filepath.Join(dir, "meta.json"), `"Index":`, 8) },
		"members":  func(t *testing.T, dir string) { alter(t, filepath.Join(dir, "meta.json"), `"Configuration":`, 20) },
		"its seal": func(t *testing.T, dir string) { alter(t, filepath.Join(dir, "meta.sha256"), "", 3) },
	} {
		for _, trailing := range []uint64{1000, 1} {
			t.Run(fmt.Sprint(name, " ", trailing), func(t *testing.T) {
				c := start(t, 1, func(_ int, cfg *raft.Config) { cfg.Timing.Trailing = trailing })
				c.leader()
				var want []string
				for i := range 12 {
					line := fmt.Sprint("line", i)
					c.propose(0, line)
					want = append(want, line)
					if i%4 == 3 {
						if err := c.nodes[0].TakeSnapshot(); err != nil {
							t.Fatal(err)
						}
					}
				}
				c.stop(0)
				bad := newest(t, c.dirs[0])
				alters(t, bad)
				if trailing == 1 {
					c.refused(0, filepath.Base(bad), "is damaged", "join again from its peers")
					return
				}
				c.open(0)
				c.leader()
				c.same(want)
				if _, err := os.Stat(filepath.Join(c.dirs[0], "damaged", filepath.Base(bad))); err != nil {
					t.Error(err)
				}
			})
		}
	}
}
