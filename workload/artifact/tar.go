// SPDX-License-Identifier: Apache-2.0

package artifact

import (
	"archive/tar"
	"bufio"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
)

// Pack writes a folder as an archive and gives its digest. The same files give the same bytes. Links, sockets and devices
// are refused by name.
func Pack(dir string, w io.Writer) (fleet.Digest, error) {
	const op = "artifact.Pack"
	sum := sha256.New()
	out := tar.NewWriter(io.MultiWriter(w, sum))
	root, err := os.OpenRoot(dir)
	if err != nil {
		return "", fault.Because(err, op, fault.NotFound, "the folder of the artifact can't be read: %s", dir)
	}
	defer root.Close()
	files := 0
	err = fs.WalkDir(root.FS(), ".", func(name string, e fs.DirEntry, err error) error {
		if err != nil || name == "." {
			return err
		}
		info, err := e.Info()
		if err != nil {
			return err
		}
		h := &tar.Header{Name: name, Format: tar.FormatPAX, ModTime: time.Unix(0, 0).UTC()}
		switch {
		case info.IsDir():
			h.Typeflag, h.Name, h.Mode = tar.TypeDir, name+"/", 0o755
			return out.WriteHeader(h)
		case !info.Mode().IsRegular():
			return fault.New(op, fault.Invalid, "%s is neither a file nor a folder: links and devices are not taken", name)
		}
		files++
		h.Typeflag, h.Mode, h.Size = tar.TypeReg, 0o644, info.Size()
		if info.Mode()&0o111 != 0 {
			h.Mode = 0o755
		}
		if err := out.WriteHeader(h); err != nil {
			return err
		}
		f, err := root.Open(name)
		if err != nil {
			return err
		}
		defer f.Close()
		_, err = io.Copy(out, f)
		return err
	})
	if err == nil && files == 0 {
		err = fault.New(op, fault.Invalid, "the folder %s has no file in it", dir)
	}
	if err == nil {
		err = out.Close()
	}
	if err != nil {
		return "", fault.At(op, "", err)
	}
	return fleet.Digest("sha256:" + hex.EncodeToString(sum.Sum(nil))), nil
}

// Unpack makes the folder into of an artifact, whole or not at all. A folder that is there already is left as it is.
func (s *Store) Unpack(d fleet.Digest, into string) error {
	const op = "artifact.Unpack"
	if _, err := os.Stat(into); err == nil {
		return nil
	}
	b, err := s.Get(d)
	if err != nil {
		return err
	}
	defer b.Close()
	if err := os.MkdirAll(filepath.Dir(into), 0o700); err != nil {
		return fault.At(op, fault.Unavailable, err)
	}
	tmp, err := os.MkdirTemp(filepath.Dir(into), ".unpack-")
	if err != nil {
		return fault.At(op, fault.Unavailable, err)
	}
	defer os.RemoveAll(tmp)
	if err := unpack(b, tmp); err != nil {
		return fault.At(op, "", err)
	}
	if err := os.Chmod(tmp, 0o755); err != nil {
		return fault.At(op, fault.Unavailable, err)
	}
	if err := os.Rename(tmp, into); err != nil && !errors.Is(err, fs.ErrExist) {
		return fault.At(op, fault.Unavailable, err)
	}
	return nil
}

// unpack writes an archive below a folder that exists. os.Root keeps every name inside.
func unpack(r io.Reader, dir string) error {
	const op = "artifact.unpack"
	root, err := os.OpenRoot(dir)
	if err != nil {
		return fault.At(op, fault.Unavailable, err)
	}
	defer root.Close()
	in := tar.NewReader(bufio.NewReaderSize(r, 256<<10))
	left := int64(MaxUnpacked)
	for n := 0; ; n++ {
		h, err := in.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fault.Because(err, op, fault.Invalid, "not an archive, or cut off")
		}
		if n >= MaxEntries {
			return fault.New(op, fault.Invalid, "the archive has more than %d entries", MaxEntries)
		}
		name := strings.TrimSuffix(h.Name, "/")
		if !filepath.IsLocal(name) || strings.ContainsRune(name, 0) || len(name) > 1024 {
			return fault.New(op, fault.Invalid, "the archive holds the name %.64q, which leaves its folder", h.Name)
		}
		switch h.Typeflag {
		case tar.TypeDir:
			err = root.MkdirAll(name, 0o755)
		case tar.TypeReg:
			if left -= h.Size; h.Size < 0 || left < 0 {
				return fault.New(op, fault.Invalid, "the archive unpacks to more than %d bytes", int64(MaxUnpacked))
			}
			err = file(root, name, h, in)
		default:
			return fault.New(op, fault.Invalid, "the archive holds %.64q, which is neither a file nor a folder", h.Name)
		}
		if err != nil {
			return fault.Because(err, op, fault.Invalid, "%.64q can't be unpacked", h.Name)
		}
	}
}

func file(root *os.Root, name string, h *tar.Header, r io.Reader) error {
	if dir := filepath.Dir(name); dir != "." {
		if err := root.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	mode := fs.FileMode(0o644)
	if h.Mode&0o111 != 0 {
		mode = 0o755
	}
	f, err := root.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode)
	if err != nil {
		return err
	}
	_, err = io.CopyN(f, r, h.Size)
	return errors.Join(err, f.Close())
}
