// SPDX-License-Identifier: Apache-2.0

package artifact_test

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/workload/artifact"
)

// TestWhatNobodyNamesIsCollected (FAULTS.md J7): what no release names goes, once it is old, with all that lies around it; what is
// wanted, new, or on its way stays, and the layout stays one.
func TestWhatNobodyNamesIsCollected(t *testing.T) {
	s, dir := open(t)
	named, orphan, again, fresh := put(t, s, []byte("named")), put(t, s, []byte("orphan")), put(t, s, []byte("again")), fleet.Digest("")
	half := fleet.DigestOf([]byte("half"))
	p, err := s.Begin(half)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.Write([]byte("ha")); err != nil {
		t.Fatal(err)
	}
	if s.Durable(half) || s.Arrived(half) != 2 {
		t.Fatalf("half of it has %d bytes here, durable %t", s.Arrived(half), s.Durable(half))
	}
	old := time.Now().Add(-48 * time.Hour)
	for _, part := range []string{"blobs/sha256", "partial"} {
		all, err := filepath.Glob(filepath.Join(dir, part, "*"))
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range all {
			if err := os.Chtimes(name, old, old); err != nil {
				t.Fatal(err)
			}
		}
	}
	put(t, s, []byte("again")) // another release is about to name it
	fresh = put(t, s, []byte("fresh"))
	keep := func(d fleet.Digest) bool { return d == named }
	collect := func() int {
		t.Helper()
		n, err := s.Collect(keep, time.Now().Add(-24*time.Hour))
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	if n := collect(); n != 2 { // the artifact and the manifest around it
		t.Errorf("%d files were removed, want 2", n)
	}
	if n := collect(); n != 0 {
		t.Errorf("a second time %d files were removed", n)
	}
	for d, want := range map[fleet.Digest]bool{named: true, orphan: false, again: true, fresh: true} {
		if s.Has(d) != want || s.Durable(d) != want {
			t.Errorf("%s is here: %t, want %t", d.Short(), s.Has(d), want)
		}
	}
	if _, err := p.Write([]byte("lf")); err != nil {
		t.Fatal(err)
	}
	if err := p.Commit(); err != nil {
		t.Fatal("what was being written was disturbed:", err)
	}
	p.Close()
	if s, err = artifact.Open(dir); err != nil || !s.Durable(half) {
		t.Fatal(err)
	}
	raw, err := os.ReadFile(filepath.Join(dir, "index.json"))
	if err != nil || strings.Contains(string(raw), string(orphan)) || !strings.Contains(string(raw), string(named)) {
		t.Fatalf("%s, %v", raw, err)
	}
	put(t, s, []byte("orphan")) // it may come back
	if b, err := s.Get(orphan); err != nil {
		t.Fatal(err)
	} else {
		b.Close()
	}
	left := fleet.DigestOf([]byte("left"))
	if err := os.WriteFile(filepath.Join(dir, "partial", strings.TrimPrefix(string(left), "sha256:")), []byte("le"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chtimes(filepath.Join(dir, "partial", strings.TrimPrefix(string(left), "sha256:")), old, old); err != nil {
		t.Fatal(err)
	}
	if n := collect(); n != 1 || s.Arrived(left) != 0 {
		t.Errorf("%d files were removed, want the half that nobody went on with", n)
	}
}

// TestHalfAnArtifactNeverCounts (FAULTS.md J7): what came so far is neither served nor durable, whatever ended it.
func TestHalfAnArtifactNeverCounts(t *testing.T) {
	s, dir := open(t)
	b := bytes.Repeat([]byte("x"), 1000)
	d := fleet.DigestOf(b)
	p, err := s.Begin(d)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.Write(b[:999]); err != nil {
		t.Fatal(err)
	}
	check := func(s *artifact.Store, when string) {
		t.Helper()
		if _, err := s.Get(d); s.Durable(d) || s.Has(d) || !errors.Is(err, fault.NotFound) {
			t.Fatalf("%s half of it counts: %v", when, err)
		}
	}
	check(s, "while it comes")
	p.Close()
	check(s, "after its end")
	s, err = artifact.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	check(s, "after a restart")
	if p, err = s.Begin(d); err != nil || p.Offset() != 999 {
		t.Fatalf("it goes on at %d, %v", p.Offset(), err)
	}
	if _, err := p.Write(b[999:]); err != nil {
		t.Fatal(err)
	}
	if err := p.Commit(); err != nil {
		t.Fatal(err)
	}
	if s.Durable(d) { // its writer has not let go of it
		t.Fatal("it counts before its writer ended")
	}
	p.Close()
	if !s.Durable(d) {
		t.Fatal("it does not count when it is whole")
	}
}
