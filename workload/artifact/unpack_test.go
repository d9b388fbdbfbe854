// SPDX-License-Identifier: Apache-2.0

package artifact

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"path/filepath"
	"strings"
	"testing"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
)

// shelf is a place in memory. It keeps what is made, and whether anything was asked of it that leads out of it.
type shelf struct {
	folders map[string]bool
	files   map[string]*page
	strayed string
}

type page struct {
	bytes.Buffer
	perm   fs.FileMode
	closed bool
}

func (p *page) Chmod(m fs.FileMode) error { p.perm = m; return nil }
func (p *page) Close() error              { p.closed = true; return nil }

func newShelf() *shelf { return &shelf{folders: map[string]bool{".": true}, files: map[string]*page{}} }

func (s *shelf) new(name string) error {
	switch {
	case !filepath.IsLocal(name) || path.Clean(name) != name || strings.ContainsRune(name, 0):
		s.strayed = name
		return fs.ErrInvalid
	case s.folders[name] || s.files[name] != nil:
		return fs.ErrExist
	case !s.folders[path.Dir(name)]:
		return fs.ErrNotExist
	}
	return nil
}

func (s *shelf) mkdir(name string) error {
	if err := s.new(name); err != nil {
		return err
	}
	s.folders[name] = true
	return nil
}

func (s *shelf) create(name string, perm fs.FileMode) (file, error) {
	if err := s.new(name); err != nil {
		return nil, err
	}
	p := &page{perm: perm}
	s.files[name] = p
	return p, nil
}

// plain reads an archive as anybody would, and tells what is in its files. It knows nothing but files and folders.
func plain(b []byte) (files map[string]string, err error) {
	files = map[string]string{}
	for r := tar.NewReader(bytes.NewReader(b)); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return files, nil
		}
		if err != nil {
			return nil, err
		}
		text, err := io.ReadAll(r)
		if err != nil {
			return nil, err
		}
		for k := range h.PAXRecords {
			if k != "path" && k != "size" {
				return nil, fmt.Errorf("%q has the record %q", h.Name, k)
			}
		}
		switch h.Typeflag {
		case tar.TypeDir:
		case tar.TypeReg:
			files[h.Name] = string(text)
		default:
			return nil, fmt.Errorf("%q is of type %q", h.Name, h.Typeflag)
		}
	}
}

// FuzzUnpack: whatever the archive, nothing is made outside of the folder, no link, and nothing that the archive does not hold. What is
// taken is all that anybody reads in it. Half of the inputs get headers whose checksums are right, else few are read beyond the first.
func FuzzUnpack(f *testing.F) {
	archive := func(headers ...*tar.Header) []byte {
		var b bytes.Buffer
		w := tar.NewWriter(&b)
		for _, h := range headers {
			if h.Typeflag == tar.TypeReg {
				h.Size = 5
			}
			if err := w.WriteHeader(h); err != nil {
				f.Fatal(err)
			}
			if h.Typeflag == tar.TypeReg {
				_, _ = io.WriteString(w, "bytes") // into memory
			}
		}
		if err := w.Close(); err != nil {
			f.Fatal(err)
		}
		return b.Bytes()
	}
	f.Add(archive(&tar.Header{Name: "a/b", Typeflag: tar.TypeReg, Mode: 0o755}, &tar.Header{Name: "c/", Typeflag: tar.TypeDir}), false)
	f.Add(archive(&tar.Header{Name: "a", Typeflag: tar.TypeReg}, &tar.Header{Name: "b/c", Typeflag: tar.TypeReg}), true)
	f.Add(archive(&tar.Header{Name: strings.Repeat("long/", 30) + "name", Typeflag: tar.TypeReg, Format: tar.FormatPAX}), true)
	f.Add(archive(&tar.Header{Name: "noted", Typeflag: tar.TypeReg, PAXRecords: map[string]string{"comment": "x"}}), false)
	f.Add(archive(&tar.Header{Name: "link", Typeflag: tar.TypeLink, Linkname: "/etc/passwd"}), false)
	f.Add(archive(&tar.Header{Name: "../up", Typeflag: tar.TypeReg}), true)
	f.Add(archive(&tar.Header{Name: "link", Typeflag: tar.TypeSymlink, Linkname: "/etc"}, &tar.Header{Name: "link/a", Typeflag: tar.TypeReg}),
		true)
	f.Fuzz(func(t *testing.T, b []byte, mend bool) {
		if mend {
			b = mended(b)
		}
		s := newShelf()
		err := extract(bytes.NewReader(b), fleet.DigestOf(b), s)
		if s.strayed != "" {
			t.Fatalf("%q was to be made", s.strayed)
		}
		var held int
		for name, p := range s.files {
			if held += p.Len(); !p.closed {
				t.Fatalf("%q is left open", name)
			}
			if p.perm != 0o644 && p.perm != 0o755 && err == nil {
				t.Fatalf("%q has the mode %o", name, p.perm)
			}
		}
		if held > len(b) {
			t.Fatalf("%d bytes were unpacked from %d", held, len(b))
		}
		if err != nil {
			if !errors.Is(err, fault.Invalid) {
				t.Fatalf("refused as %v: the archive is at fault, not this machine", err)
			}
			return
		}
		want, err := plain(b)
		if err != nil || len(want) != len(s.files) {
			t.Fatalf("%d files were unpacked, anybody reads %d, %v", len(s.files), len(want), err)
		}
		for name, text := range want {
			if p := s.files[name]; p == nil || p.String() != text {
				t.Fatalf("%q holds %q", name, text)
			}
		}
		if err := extract(bytes.NewReader(b), fleet.DigestOf([]byte("other bytes")), newShelf()); !errors.Is(err, fault.Internal) {
			t.Fatalf("with the digest of other bytes: %v", err)
		}
	})
}

// TestWhatIsUnpackedIsBounded (MUTANTS.md: unpack.go:174): over all files together, by what their headers say and by what is written.
func TestWhatIsUnpackedIsBounded(t *testing.T) {
	for name, row := range map[string]struct {
		sizes []int64
		want  bool
	}{
		"as much as there may be": {[]int64{6, 0, 4}, true},
		"one byte more":           {[]int64{6, 5}, false},
		"one file alone":          {[]int64{11}, false},
		"many small ones":         {[]int64{1, 2, 3, 4, 1}, false},
		"a header of a tebibyte":  {[]int64{1 << 40}, false},
	} {
		var b bytes.Buffer
		w := tar.NewWriter(&b)
		for i, n := range row.sizes {
			if err := w.WriteHeader(&tar.Header{Name: fmt.Sprint(i), Typeflag: tar.TypeReg, Mode: 0o644, Size: n}); err != nil {
				t.Fatal(err)
			}
			if _, err := w.Write(make([]byte, min(n, 64))); err != nil {
				t.Fatal(err)
			}
		}
		if row.sizes[0] < 1<<40 { // else the archive ends early, and is refused before that is met
			if err := w.Close(); err != nil {
				t.Fatal(err)
			}
		}
		s := newShelf()
		u := &unpacker{into: s, tar: tar.NewReader(&b), left: 10, made: map[string]bool{".": true}}
		err := u.run()
		if refused := errors.Is(err, fault.Invalid) && strings.Contains(fault.Text(err), "unpacks to more than"); refused == row.want ||
			(err == nil) != row.want {
			t.Errorf("%s: %v", name, err)
		}
		held := 0
		for _, p := range s.files {
			held += p.Len()
		}
		if held > 10 {
			t.Errorf("%s: %d bytes were written", name, held)
		}
	}
}

// mended writes the right checksums into the headers of an archive, as far as their sizes lead.
func mended(b []byte) []byte {
	const block, at, end, size = 512, 148, 156, 124
	b = bytes.Clone(b)
	for head := b; len(head) >= block; {
		sum := 0
		for i, c := range head[:block] {
			if i >= at && i < end {
				c = ' '
			}
			sum += int(c)
		}
		if sum == ' '*(end-at) { // the end of an archive
			break
		}
		copy(head[at:end], []byte{'0' + byte(sum>>15&7), '0' + byte(sum>>12&7), '0' + byte(sum>>9&7), '0' + byte(sum>>6&7), '0' + byte(sum>>3&7),
			'0' + byte(sum&7), 0, ' '})
		n := 0
		for _, c := range head[size : size+11] {
			if c < '0' || c > '7' || n > len(b) {
				break
			}
			n = n*8 + int(c-'0')
		}
		head = head[min(len(head), block+(n+block-1)/block*block):]
	}
	return b
}
