// SPDX-License-Identifier: Apache-2.0

package demarc_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// mostBytes is how large a tracked file may be. What is larger is built, or fetched by version, into a cache outside of the tree.
const mostBytes = 400 << 10

// programs are the first bytes of what a compiler makes and nobody can review.
var programs = []struct{ first, name string }{
	{"\x7fELF", "an ELF binary"},
	{"MZ", "a program for Windows"},
	{"\xcf\xfa\xed\xfe", "a Mach-O binary"},
	{"\xca\xfe\xba\xbe", "a Mach-O binary for several machines"},
	{"!<arch>\n", "an archive of object files"},
}

// heavy gives one line a file that must not be in the tree: by its size, or by its first bytes.
func heavy(root string, files []string) ([]string, error) {
	var out []string
	for _, name := range files {
		st, err := os.Lstat(filepath.Join(root, name))
		if errors.Is(err, fs.ErrNotExist) || err == nil && !st.Mode().IsRegular() {
			continue // deleted and not yet committed, or a link
		}
		if err != nil {
			return nil, err
		}
		if st.Size() > mostBytes {
			out = append(out, fmt.Sprintf("%s has %d bytes: a tracked file has %d at most", name, st.Size(), mostBytes))
		}
		f, err := os.Open(filepath.Join(root, name))
		if err != nil {
			return nil, err
		}
		first := make([]byte, 8)
		n, err := io.ReadFull(f, first)
		_ = f.Close()
		if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
			return nil, err
		}
		for _, p := range programs {
			if bytes.HasPrefix(first[:n], []byte(p.first)) {
				out = append(out, fmt.Sprintf("%s is %s: what is built is never committed", name, p.name))
			}
		}
	}
	return out, nil
}

// TestTreeHoldsOnlySource looks at what git tracks, or is about to (staged files are in the list).
func TestTreeHoldsOnlySource(t *testing.T) {
	if _, err := os.Lstat(".git"); errors.Is(err, fs.ErrNotExist) {
		t.Skip("not a git work tree: there is no list of tracked files")
	}
	if _, err := exec.LookPath("git"); err != nil {
		t.Skip("there is no git to ask for the list of tracked files")
	}
	list, err := exec.Command("git", "ls-files", "-z").Output()
	if err != nil {
		t.Fatalf("git ls-files: %v", err)
	}
	files := strings.Split(strings.TrimSuffix(string(list), "\x00"), "\x00")
	if len(files) < 100 {
		t.Fatalf("git tracks %d files: the test looks at the wrong folder", len(files))
	}
	out, err := heavy(".", files)
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range out {
		t.Error(line)
	}
}

// TestTreeSeesABinary keeps the test above honest.
func TestTreeSeesABinary(t *testing.T) {
	for name, tc := range map[string]struct{ content, want string }{
		"text":          {"package p\n", ""},
		"empty":         {"", ""},
		"short":         {"M", ""},
		"as large":      {strings.Repeat("x", mostBytes), ""},
		"larger":        {strings.Repeat("x", mostBytes+1), "has 409601 bytes"},
		"ELF":           {"\x7fELF\x02\x01\x01", "an ELF binary"},
		"Windows":       {"MZ\x90\x00\x03\x00\x00\x00", "a program for Windows"},
		"Mach-O":        {"\xcf\xfa\xed\xfe\x0c\x00\x00\x01", "a Mach-O binary"},
		"several":       {"\xca\xfe\xba\xbe\x00\x00\x00\x02", "for several machines"},
		"archive":       {"!<arch>\nx", "an archive"},
		"ELF in a text": {"a \x7fELF", ""},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			if err := os.WriteFile(filepath.Join(dir, "file"), []byte(tc.content), 0o600); err != nil {
				t.Fatal(err)
			}
			out, err := heavy(dir, []string{"file", "gone"})
			if err != nil {
				t.Fatal(err)
			}
			got := strings.Join(out, "\n")
			if (tc.want == "" && got != "") || !strings.Contains(got, tc.want) {
				t.Errorf("heavy = %q, want %q", got, tc.want)
			}
		})
	}
}
