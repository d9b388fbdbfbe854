// SPDX-License-Identifier: Apache-2.0

package artifact_test

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/workload/artifact"
)

func open(t testing.TB) (*artifact.Store, string) {
	t.Helper()
	dir := t.TempDir()
	s, err := artifact.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	return s, dir
}

func folder(t testing.TB, files map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for name, text := range files {
		p := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(p), 0o700); err != nil {
			t.Fatal(err)
		}
		mode := os.FileMode(0o600)
		if strings.HasPrefix(name, "bin/") {
			mode = 0o700
		}
		if err := os.WriteFile(p, []byte(text), mode); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func put(t testing.TB, s *artifact.Store, b []byte) fleet.Digest {
	t.Helper()
	d := fleet.DigestOf(b)
	if _, err := s.Put(context.Background(), d, bytes.NewReader(b)); err != nil {
		t.Fatal(err)
	}
	return d
}

func TestPackAndUnpack(t *testing.T) {
	files := map[string]string{"bin/app": "program", "etc/a/b.txt": "text", "z": ""}
	var one, two bytes.Buffer
	d, err := artifact.Pack(folder(t, files), &one)
	if err != nil {
		t.Fatal(err)
	}
	again, err := artifact.Pack(folder(t, files), &two)
	if err != nil || again != d || d != fleet.DigestOf(one.Bytes()) || !bytes.Equal(one.Bytes(), two.Bytes()) {
		t.Fatalf("the same files give %s and %s, %v", d, again, err)
	}
	s, _ := open(t)
	put(t, s, one.Bytes())
	into := filepath.Join(t.TempDir(), "x", "app")
	for range 2 {
		if err := s.Unpack(d, into); err != nil {
			t.Fatal(err)
		}
	}
	for name, text := range files {
		b, err := os.ReadFile(filepath.Join(into, name))
		info, _ := os.Stat(filepath.Join(into, name))
		if err != nil || string(b) != text || (info.Mode()&0o111 != 0) != strings.HasPrefix(name, "bin/") {
			t.Errorf("%s: %q, %v, %v", name, b, info.Mode(), err)
		}
	}
	dir := folder(t, files)
	if err := os.Symlink("/etc/passwd", filepath.Join(dir, "link")); err != nil {
		t.Fatal(err)
	}
	if _, err := artifact.Pack(dir, &one); !errors.Is(err, fault.Invalid) || !strings.Contains(err.Error(), "link") {
		t.Fatal(err)
	}
	if _, err := artifact.Pack(t.TempDir(), &one); !errors.Is(err, fault.Invalid) {
		t.Fatal(err)
	}
}

func TestOnlyWhatWasAnnouncedIsKept(t *testing.T) {
	s, dir := open(t)
	want := fleet.DigestOf([]byte("good"))
	if _, err := s.Put(context.Background(), want, strings.NewReader("evil")); !errors.Is(err, fault.Invalid) {
		t.Fatal(err)
	}
	if s.Has(want) {
		t.Fatal("kept")
	}
	if left, _ := os.ReadDir(filepath.Join(dir, "partial")); len(left) != 0 {
		t.Fatalf("%v is left", left)
	}
	if _, err := s.Get(want); !errors.Is(err, fault.NotFound) {
		t.Fatal(err)
	}
	for _, d := range []fleet.Digest{"", "sha256:../../etc/passwd", "md5:00"} {
		if _, err := s.Put(context.Background(), d, strings.NewReader("")); err == nil {
			t.Errorf("%q was taken", d)
		}
		if _, err := s.Get(d); err == nil {
			t.Errorf("%q was given", d)
		}
	}
	put(t, s, []byte("good"))
	put(t, s, []byte("good"))
	b, err := s.Get(want)
	if err != nil || b.Size() != 4 {
		t.Fatal(err)
	}
	b.Close()
}

func TestAnInterruptedTransferGoesOn(t *testing.T) {
	s, _ := open(t)
	text := strings.Repeat("x", 1000)
	d := fleet.DigestOf([]byte(text))
	p, err := s.Begin(d)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.Write([]byte(text[:400])); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Begin(d); !errors.Is(err, fault.Busy) {
		t.Fatal("two writers of one artifact:", err)
	}
	p.Close()
	if p, err = s.Begin(d); err != nil || p.Offset() != 400 || p.Done() {
		t.Fatal(p, err)
	}
	if _, err := p.Write([]byte(text[400:])); err != nil {
		t.Fatal(err)
	}
	if err := p.Commit(); err != nil || !s.Has(d) {
		t.Fatal(err)
	}
	p.Close()
	if p, err = s.Begin(d); err != nil || !p.Done() {
		t.Fatal(err)
	}
	p.Close()
}

func archive(t testing.TB, headers ...*tar.Header) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, h := range headers {
		if h.Typeflag == tar.TypeReg && h.Size == 0 {
			h.Size = 4
		}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if h.Typeflag == tar.TypeReg {
			if _, err := w.Write(make([]byte, h.Size)); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func TestHostileArchives(t *testing.T) {
	for name, hs := range map[string][]*tar.Header{
		"up":              {{Name: "../evil", Typeflag: tar.TypeReg}},
		"up in between":   {{Name: "a/../../evil", Typeflag: tar.TypeReg}},
		"absolute":        {{Name: "/tmp/evil", Typeflag: tar.TypeReg}},
		"symlink":         {{Name: "a", Typeflag: tar.TypeSymlink, Linkname: "/etc"}, {Name: "a/evil", Typeflag: tar.TypeReg}},
		"hard link":       {{Name: "a", Typeflag: tar.TypeLink, Linkname: "/etc/passwd"}},
		"device":          {{Name: "a", Typeflag: tar.TypeChar}},
		"pipe":            {{Name: "a", Typeflag: tar.TypeFifo}},
		"twice":           {{Name: "a", Typeflag: tar.TypeReg}, {Name: "a", Typeflag: tar.TypeReg}},
		"file and folder": {{Name: "a", Typeflag: tar.TypeReg}, {Name: "a/b", Typeflag: tar.TypeReg}},
		"no name":         {{Name: "", Typeflag: tar.TypeReg}},
	} {
		s, _ := open(t)
		d := put(t, s, archive(t, hs...))
		parent := t.TempDir()
		err := s.Unpack(d, filepath.Join(parent, "into"))
		left, _ := os.ReadDir(parent)
		if !errors.Is(err, fault.Invalid) || len(left) != 0 {
			t.Errorf("%s: %v, %v is left", name, err, left)
		}
	}
	s, _ := open(t)
	if err := s.Unpack(put(t, s, []byte("not an archive")), filepath.Join(t.TempDir(), "into")); !errors.Is(err, fault.Invalid) {
		t.Error(err)
	}
}
