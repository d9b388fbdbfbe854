// SPDX-License-Identifier: Apache-2.0

package artifact

import (
	"archive/tar"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
)

// Unpack makes the folder into, from an artifact: all of it, or nothing. A folder that is there is left as it is. It takes only what Pack
// makes: files and folders with plain relative names, each once. Links, devices, sparse files, names that lead
// elsewhere, and more than [MaxEntries] or [MaxUnpacked] are [fault.Invalid]. The bytes are hashed again on the way: an artifact
// that changed on the disk is [fault.Internal].
func (s *Store) Unpack(d fleet.Digest, into string) error {
	const op = "artifact.Unpack"
	b, err := s.Get(d)
	if err != nil {
		return fault.At(op, "", err)
	}
	defer b.Close()
	if _, err := os.Lstat(into); err == nil {
		return nil
	}
	parent := filepath.Dir(into)
	if err := os.MkdirAll(parent, 0o700); err != nil {
		return fault.At(op, fault.Unavailable, err)
	}
	tmp, err := os.MkdirTemp(parent, ".unpack-*")
	if err != nil {
		return fault.At(op, fault.Unavailable, err)
	}
	defer os.RemoveAll(tmp) // after the rename there is nothing to remove
	root, err := os.OpenRoot(tmp)
	if err != nil {
		return fault.At(op, fault.Unavailable, err)
	}
	err = extract(io.NewSectionReader(b, 0, b.Size()), d, rooted{root})
	_ = root.Close()
	if err != nil {
		return fault.At(op, "", err)
	}
	if err := os.Chmod(tmp, 0o755); err != nil {
		return fault.At(op, fault.Unavailable, err)
	}
	if err := os.Rename(tmp, into); err != nil && !errors.Is(err, fs.ErrExist) { // another caller was faster
		return fault.Because(err, op, fault.Unavailable, "the unpacked artifact can't be put in its place")
	}
	return nil
}

// place is the folder that is unpacked into. Its errors are those of package os.
type place interface {
	mkdir(name string) error
	create(name string, perm fs.FileMode) (file, error) // exclusively
}

type file interface {
	io.WriteCloser
	Chmod(fs.FileMode) error
}

// rooted is a place on the disk that no name leads out of.
type rooted struct{ *os.Root }

func (r rooted) mkdir(name string) error { return r.Mkdir(name, 0o755) }

func (r rooted) create(name string, perm fs.FileMode) (file, error) {
	return r.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, perm)
}

func extract(r io.Reader, d fleet.Digest, into place) error {
	const op = "artifact.Unpack"
	sum := sha256.New()
	all := io.TeeReader(r, sum)
	u := &unpacker{into: into, tar: tar.NewReader(all), left: MaxUnpacked, made: map[string]bool{".": true}}
	if err := u.run(); err != nil {
		return err
	}
	if _, err := io.Copy(io.Discard, all); err != nil { // what follows the end of the tar is in the digest too
		return fault.At(op, fault.Unavailable, err)
	}
	if got := fleet.Digest("sha256:" + hex.EncodeToString(sum.Sum(nil))); got != d {
		return fault.New(op, fault.Internal, "artifact %s changed on the disk: its digest is %s; remove it and fetch it again", d.Short(),
			got.Short())
	}
	return nil
}

type unpacker struct {
	into    place
	tar     *tar.Reader
	left    int64 // bytes that may still be written
	entries int
	made    map[string]bool // folders
}

func (u *unpacker) run() error {
	const op = "artifact.Unpack"
	for {
		h, err := u.tar.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fault.Because(err, op, fault.Invalid, "the artifact is not a tar")
		}
		if u.entries++; u.entries > MaxEntries {
			return fault.New(op, fault.Invalid, "the artifact has more than %d entries", MaxEntries)
		}
		if err := u.entry(h); err != nil {
			return err
		}
	}
}

func (u *unpacker) entry(h *tar.Header) error {
	const op = "artifact.Unpack"
	for k := range h.PAXRecords {
		if k != "path" && k != "size" { // what Pack needs for long names and large files; not sparse files, not attributes
			return fault.New(op, fault.Invalid, "%.200q has the record %.64q, which artifacts don't have", h.Name, k)
		}
	}
	name := h.Name
	if h.Typeflag == tar.TypeDir {
		name = strings.TrimSuffix(name, "/")
	}
	if err := checkName(name); err != nil {
		return err
	}
	switch h.Typeflag {
	case tar.TypeDir:
		return u.mkdir(name)
	case tar.TypeReg:
		return u.file(name, h)
	default:
		return fault.New(op, fault.Invalid, "%.200q is a link, a device or another thing (type %q) that artifacts don't hold", name, h.Typeflag)
	}
}

// mkdir makes a folder and those above it. Those count as entries: a name of many parts is many folders.
func (u *unpacker) mkdir(name string) error {
	const op = "artifact.Unpack"
	if u.made[name] {
		return nil
	}
	if err := u.mkdir(path.Dir(name)); err != nil {
		return err
	}
	if len(u.made) > MaxEntries {
		return fault.New(op, fault.Invalid, "the artifact has more than %d folders", MaxEntries)
	}
	if err := u.into.mkdir(name); err != nil {
		if errors.Is(err, fs.ErrExist) {
			return fault.New(op, fault.Invalid, "%.200q is there twice", name)
		}
		return fault.Because(err, op, fault.Unavailable, "%.200q can't be made", name)
	}
	u.made[name] = true
	return nil
}

func (u *unpacker) file(name string, h *tar.Header) error {
	const op = "artifact.Unpack"
	if h.Size < 0 || h.Size > u.left {
		return fault.New(op, fault.Invalid, "the artifact unpacks to more than %d bytes", int64(MaxUnpacked))
	}
	if err := u.mkdir(path.Dir(name)); err != nil {
		return err
	}
	perm := fileMode(fs.FileMode(h.Mode))
	f, err := u.into.create(name, perm)
	if errors.Is(err, fs.ErrExist) {
		return fault.New(op, fault.Invalid, "%.200q is there twice", name)
	}
	if err != nil {
		return fault.Because(err, op, fault.Unavailable, "%.200q can't be made", name)
	}
	n, err := io.Copy(f, io.LimitReader(u.tar, u.left))
	u.left -= n
	err = errors.Join(err, f.Chmod(perm), f.Close()) // Chmod: whatever the umask took away
	if errors.Is(err, io.ErrUnexpectedEOF) {
		return fault.New(op, fault.Invalid, "%.200q is cut short", name)
	}
	if err != nil {
		return fault.Because(err, op, fault.Unavailable, "%.200q can't be written", name)
	}
	return nil
}
