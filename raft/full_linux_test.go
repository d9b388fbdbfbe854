// SPDX-License-Identifier: Apache-2.0

package raft_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/raft"
)

// disks starts three members, each on a small file system of its own.
func disks(t *testing.T) (*cluster, []string) {
	t.Helper()
	if os.Getenv("DEMARC_DISK") == "" {
		t.Skip("needs root, and mounts small file systems: make test-disk")
	}
	var mounts []string
	c := start(t, 3, func(i int, cfg *raft.Config) {
		for len(mounts) <= i {
			dir := t.TempDir()
			if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size=10m"); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() {
				if err := syscall.Unmount(dir, syscall.MNT_DETACH); err != nil {
					t.Error(err)
				}
			})
			mounts = append(mounts, dir)
		}
		cfg.Dir = filepath.Join(mounts[i], "raft")
		raft.SmallLog(cfg, 2<<20)
		cfg.Timing.DiskHang = 5 * time.Second
	})
	return c, mounts
}

func fill(t *testing.T, dir string) {
	t.Helper()
	f, err := os.Create(filepath.Join(dir, "ballast"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for b := make([]byte, 4096); err == nil; {
		_, err = f.Write(b)
	}
	if !errors.Is(err, syscall.ENOSPC) {
		t.Fatal(err)
	}
}

func empty(t *testing.T, dir string) {
	t.Helper()
	if err := os.Remove(filepath.Join(dir, "ballast")); err != nil {
		t.Fatal(err)
	}
}

// write proposes until it is refused, and returns what was answered.
func (c *cluster) write(i int, from int) (want []string, refused error) {
	c.t.Helper()
	for k := from; k < from+2000; k++ {
		line := fmt.Sprintf("%06d %s", k, strings.Repeat("x", 4000))
		ctx, cancel := context.WithTimeout(c.t.Context(), 20*time.Second)
		_, err := c.nodes[i].Propose(ctx, []byte(line))
		cancel()
		if err != nil {
			return want, err
		}
		want = append(want, line)
	}
	return want, nil
}

// On a real file system without space on any node: changes are refused as unavailable and say why, reads are answered, the
// leader stays, a restart works, nothing is lost, and when there is space changes are taken again without a
// restart.
func TestFullDisksRefuseAndComeBack(t *testing.T) {
	c, mounts := disks(t)
	lead := c.leader()
	c.propose(lead, "before")
	for _, m := range mounts {
		fill(t, m)
	}
	got, _ := c.write(lead, 0)
	want := append([]string{"before"}, got...)
	for _, i := range []int{0, 1, 2} { // the leader itself, and those that ask it
		got, err := c.write(i, 5000+1000*i)
		want = append(want, got...)
		if !errors.Is(err, fault.Unavailable) || !strings.Contains(fault.Text(err), "the disk of the leader is full") {
			t.Fatalf("n%d: refused with %v", i, err)
		}
	}
	c.same(want)
	for i := range 3 {
		c.stop(i)
		c.open(i) // a member starts on a full disk: it has votes to cast
	}
	c.leader()
	c.same(want)
	for _, m := range mounts {
		empty(t, m)
	}
	for deadline := time.Now().Add(20 * time.Second); ; {
		_, err := c.nodes[c.leader()].Propose(within(t), []byte("after"))
		if err == nil {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("there is space, and still: %v", err)
		}
	}
	want = append(want, "after")
	c.same(want)
	more, err := c.write(c.leader(), 10000)
	if len(more) < 100 {
		t.Fatalf("%d more, then %v", len(more), err)
	}
	want = append(want, more...)
	c.same(want)
}

// A leader whose disk alone is full lets another one lead, and changes are taken.
func TestALeaderWithAFullDiskYields(t *testing.T) {
	c, mounts := disks(t)
	lead := c.leader()
	fill(t, mounts[lead])
	want, _ := c.write(lead, 0)
	if len(want) > 1000 {
		t.Fatal("the disk is not full")
	}
	if !poll(30*time.Second, func() bool { return c.leader() != lead }) {
		t.Fatal("a leader whose disk is full still leads")
	}
	other := c.leader()
	line := c.propose(other, "elsewhere")
	if !strings.HasSuffix(line, ":elsewhere") {
		t.Fatalf("%q", line)
	}
	want = append(want, "elsewhere")
	empty(t, mounts[lead])
	c.same(want)
}
