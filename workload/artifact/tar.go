// SPDX-License-Identifier: Apache-2.0

package artifact

import (
	"archive/tar"
	"crypto/sha256"
	"encoding/hex"
	"io"
	"io/fs"
	"os"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
)

// Pack writes a folder as an archive and gives its digest. The same files give the same bytes. Links, sockets and devices
// are refused by name.
func Pack(dir string, w io.Writer) (fleet.Digest, error) {
	const op = "artifact.Pack"
	sum := sha256.New()
	out := tar.NewWriter(&bounded{w: io.MultiWriter(w, sum), left: MaxArtifact})
	root, err := os.OpenRoot(dir)
	if err != nil {
		return "", fault.Because(err, op, fault.NotFound, "the folder of the artifact can't be read: %s", dir)
	}
	defer root.Close()
	files, entries := 0, 0
	err = fs.WalkDir(root.FS(), ".", func(name string, e fs.DirEntry, err error) error {
		if err != nil || name == "." {
			return err
		}
		if err := checkName(name); err != nil {
			return err
		}
		if entries++; entries > MaxEntries {
			return fault.New(op, fault.Invalid, "the folder has more than %d entries", MaxEntries)
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
		h.Typeflag, h.Mode, h.Size = tar.TypeReg, int64(fileMode(info.Mode())), info.Size()
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

func fileMode(m fs.FileMode) fs.FileMode {
	if m&0o111 != 0 {
		return 0o755
	}
	return 0o644
}

// checkName refuses each name that means something else than itself on some system: absolute, with .. or an empty part,
// not UTF-8, or with a control character or backslash.
func checkName(name string) error {
	bad := !fs.ValidPath(name) || strings.Count(name, "/") >= maxDepth || name == "." || len(name) > 1024 || !utf8.ValidString(name) ||
		strings.ContainsFunc(name, func(r rune) bool { return r < 0x20 || r == 0x7f || r == '\\' })
	for part := range strings.SplitSeq(name, "/") {
		bad = bad || len(part) > 255
	}
	if bad {
		return fault.New("artifact.checkName", fault.Invalid, "%.64q can't be the name of a file in an artifact: use a relative path of at "+
			"most %d parts, without .., backslash or control characters", name, maxDepth)
	}
	return nil
}

// bounded refuses to write more than left bytes.
type bounded struct {
	w    io.Writer
	left int64
}

func (b *bounded) Write(p []byte) (int, error) {
	if int64(len(p)) > b.left {
		return 0, fault.New("artifact.Pack", fault.Invalid, "the artifact is larger than %d bytes", int64(MaxArtifact))
	}
	b.left -= int64(len(p))
	return b.w.Write(p)
}
