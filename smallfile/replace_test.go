// SPDX-License-Identifier: Apache-2.0

package smallfile

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"
)

// TestReplaceIsOnDiskWhenItSaysSo looks at the order of calls: the content is synced before the name, the name before the
// answer; and what fails in between leaves the old file and nothing else.
func TestReplaceIsOnDiskWhenItSaysSo(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "state.json")
	if err := Replace(path, []byte("old")); err != nil {
		t.Fatal(err)
	}
	var calls []string
	broken := ""
	step := func(name string, do func() error) error {
		calls = append(calls, name)
		if name == broken {
			return errors.New("the disk is gone")
		}
		return do()
	}
	d := replacement{
		write:  func(f *os.File, b []byte) error { return step("write", func() error { return onDisk.write(f, b) }) },
		rename: func(from, to string) error { return step("rename", func() error { return onDisk.rename(from, to) }) },
		sync: func(of string) error {
			if of != dir {
				t.Errorf("the folder %s is synced, want %s", of, dir)
			}
			return step("sync", func() error { return onDisk.sync(of) })
		},
	}
	all := []string{"write", "rename", "sync"}
	for i, at := range all {
		calls, broken = nil, at
		if err := d.replace(path, []byte("new")); err == nil {
			t.Errorf("%s fails, and it says that the file is there", at)
		}
		if !slices.Equal(calls, all[:i+1]) {
			t.Errorf("%s fails: %q", at, calls)
		}
		if b, _ := os.ReadFile(path); string(b) != "old" && at != "sync" {
			t.Errorf("%s fails: the file holds %q", at, b)
		}
		if left, _ := filepath.Glob(filepath.Join(dir, ".new-*")); len(left) > 0 {
			t.Errorf("%s fails: %q is left", at, left)
		}
	}
	calls, broken = nil, ""
	if err := d.replace(path, []byte("newest")); err != nil || !slices.Equal(calls, all) {
		t.Errorf("%v, %q", err, calls)
	}
	i, err := os.Stat(path)
	if err != nil || i.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", i.Mode(), err)
	}
}
