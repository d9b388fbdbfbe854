// SPDX-License-Identifier: Apache-2.0

package artifact

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
)

// Collect removes the artifacts that keep does not want, and what is left of writes that were given up, where nobody has wanted
// them since before. It returns how many files it removed. What is being written, or read, is not disturbed.
func (s *Store) Collect(keep func(fleet.Digest) bool, before time.Time) (removed int, err error) {
	const op = "artifact.Collect"
	s.list.Lock()
	defer s.list.Unlock()
	index, err := s.readIndex()
	if err != nil {
		return 0, err
	}
	used := map[string]bool{hexOf(fleet.DigestOf([]byte(emptyConfig))): true}
	var stay []v1.Descriptor
	for _, m := range index.Manifests {
		d := fleet.Digest(m.Annotations[refName])
		if d.Check() == nil && !keep(d) && s.unused(d, before) {
			continue
		}
		stay = append(stay, m)
		used[hexOf(d)], used[m.Digest.Hex] = true, true
	}
	if len(stay) < len(index.Manifests) { // the list first: what it names is there
		index.Manifests = append([]v1.Descriptor{}, stay...)
		if err := s.write("index.json", encode(index)); err != nil {
			return 0, err
		}
		clear(s.indexed)
		for _, m := range stay {
			s.indexed[fleet.Digest(m.Annotations[refName])] = true
		}
	}
	for _, part := range []string{"blobs/sha256", "partial"} {
		all, err := os.ReadDir(filepath.Join(s.dir, part))
		if err != nil {
			return removed, fault.At(op, fault.Unavailable, err)
		}
		for _, e := range all {
			d := fleet.Digest("sha256:" + e.Name())
			if part != "partial" && (used[e.Name()] || d.Check() == nil && keep(d)) {
				continue
			}
			gone, err := s.drop(part, d, e, before)
			if err != nil {
				return removed, fault.At(op, fault.Unavailable, err)
			}
			if gone {
				removed++
			}
		}
	}
	return removed, nil
}

func hexOf(d fleet.Digest) string { return strings.TrimPrefix(string(d), "sha256:") }

// unused reports whether nobody writes an artifact, and nobody has wanted it since before.
func (s *Store) unused(d fleet.Digest, before time.Time) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	p, err := s.path("blobs/sha256", d)
	if err != nil || s.busy[d] {
		return false
	}
	info, err := os.Stat(p)
	return errors.Is(err, fs.ErrNotExist) || err == nil && info.ModTime().Before(before)
}

// drop removes one file that is not in use, where it is older than before.
func (s *Store) drop(part string, d fleet.Digest, e fs.DirEntry, before time.Time) (bool, error) {
	s.mu.Lock() // nobody begins to write, or to want, it meanwhile
	defer s.mu.Unlock()
	info, err := e.Info()
	if errors.Is(err, fs.ErrNotExist) || err == nil && (s.busy[d] || !info.ModTime().Before(before)) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	return true, os.Remove(filepath.Join(s.dir, part, e.Name()))
}
