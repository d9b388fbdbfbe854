// SPDX-License-Identifier: Apache-2.0

package artifact

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
)

const (
	artifactType = "application/vnd.demarc.artifact.v1"
	refName      = "org.opencontainers.image.ref.name"
	layoutText   = `{"imageLayoutVersion":"1.0.0"}`
	emptyConfig  = "{}"
	maxIndex     = 16 << 20
)

// The layout's own package of go-containerregistry writes blobs and the index in place, where a crash leaves half a file
// under the name of a digest. Only its types are used here; each file is written beside its place, synced and renamed.

// loadIndex reads index.json, and begins a layout where there is none.
func (s *Store) loadIndex() error {
	const op = "artifact.Open"
	layout, err := s.read("oci-layout", 1<<10)
	if errors.Is(err, fs.ErrNotExist) {
		if err := s.write("oci-layout", []byte(layoutText)); err != nil {
			return err
		}
		return s.write("index.json", encode(newIndex()))
	}
	if err != nil {
		return fault.At(op, fault.Unavailable, err)
	}
	var version struct {
		V string `json:"imageLayoutVersion"`
	}
	if json.Unmarshal(layout, &version) != nil || version.V != "1.0.0" {
		return fault.New(op, fault.Invalid, "oci-layout: the folder is not an OCI image layout of version 1.0.0")
	}
	index, err := s.readIndex()
	if err != nil {
		return err
	}
	for _, m := range index.Manifests {
		if d := fleet.Digest(m.Annotations[refName]); d.Check() == nil {
			s.indexed[d] = true
		}
	}
	return nil
}

func newIndex() *v1.IndexManifest {
	return &v1.IndexManifest{SchemaVersion: 2, MediaType: types.OCIImageIndex, Manifests: []v1.Descriptor{}}
}

// readIndex reads the index. It only lists what is there: one that is lost or damaged begins anew, and no artifact with it.
func (s *Store) readIndex() (*v1.IndexManifest, error) {
	b, err := s.read("index.json", maxIndex)
	if errors.Is(err, fs.ErrNotExist) {
		return newIndex(), nil
	}
	if err != nil {
		return nil, fault.At("artifact.index", fault.Unavailable, err)
	}
	index, err := v1.ParseIndexManifest(bytes.NewReader(b))
	if err != nil || index.SchemaVersion != 2 {
		return newIndex(), nil
	}
	return index, nil
}

// index lists an artifact that is in the store: a manifest around it, and the manifest's descriptor in index.json.
func (s *Store) index(d fleet.Digest, size int64) error {
	s.list.Lock()
	defer s.list.Unlock()
	if s.indexed[d] {
		return nil
	}
	config, err := s.writeBlob([]byte(emptyConfig), types.OCIEmptyJSON)
	if err != nil {
		return err
	}
	hash, err := v1.NewHash(string(d))
	if err != nil {
		return fault.At("artifact.index", fault.Invalid, err)
	}
	manifest, err := s.writeBlob(encode(v1.Manifest{
		SchemaVersion: 2, MediaType: types.OCIManifestSchema1, ArtifactType: artifactType, Config: config,
		Layers: []v1.Descriptor{{MediaType: types.OCIUncompressedLayer, Size: size, Digest: hash}},
	}), types.OCIManifestSchema1)
	if err != nil {
		return err
	}
	index, err := s.readIndex()
	if err != nil {
		return err
	}
	manifest.ArtifactType = artifactType
	manifest.Annotations = map[string]string{refName: string(d)}
	index.Manifests = append(index.Manifests, manifest)
	if err := s.write("index.json", encode(index)); err != nil {
		return err
	}
	s.indexed[d] = true
	return nil
}

func (s *Store) writeBlob(b []byte, media types.MediaType) (v1.Descriptor, error) {
	d := fleet.DigestOf(b)
	hash, err := v1.NewHash(string(d))
	if err != nil {
		return v1.Descriptor{}, fault.At("artifact.index", fault.Internal, err)
	}
	desc := v1.Descriptor{MediaType: media, Size: int64(len(b)), Digest: hash}
	if s.Has(d) {
		return desc, nil
	}
	return desc, s.write(filepath.Join("blobs/sha256", hash.Hex), b)
}

// write replaces a small file as a whole.
func (s *Store) write(name string, b []byte) error {
	const op = "artifact.write"
	f, err := os.CreateTemp(s.dir, ".write-*")
	if err != nil {
		return fault.Because(err, op, fault.Unavailable, "the disk did not take %s of the store", name)
	}
	defer os.Remove(f.Name()) // after the rename there is nothing to remove
	_, err = f.Write(b)
	err = errors.Join(err, f.Sync(), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), filepath.Join(s.dir, name))
	}
	if err == nil {
		err = syncDir(filepath.Dir(filepath.Join(s.dir, name)))
	}
	if err != nil {
		return fault.Because(err, op, fault.Unavailable, "the disk did not take %s of the store", name)
	}
	return nil
}

func (s *Store) read(name string, limit int64) ([]byte, error) {
	f, err := os.Open(filepath.Join(s.dir, name))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err == nil && int64(len(b)) > limit {
		return nil, fault.New("artifact.read", fault.Invalid, "%s has more than %d bytes", name, limit)
	}
	return b, err
}

func encode(v any) []byte {
	b, err := json.Marshal(v)
	if err != nil { // structs of strings and numbers
		return nil
	}
	return b
}
