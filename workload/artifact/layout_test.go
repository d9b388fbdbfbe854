// SPDX-License-Identifier: Apache-2.0

package artifact_test

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/workload/artifact"
)

// TestLayoutIsWhole walks the folder as a tool for OCI layouts does: index, manifest, layer, each by size and digest.
func TestLayoutIsWhole(t *testing.T) {
	s, dir := open(t)
	want := map[fleet.Digest]bool{}
	var wg sync.WaitGroup
	for i := range 8 {
		b := fmt.Appendf(nil, "artifact %d", i/2) // each comes twice, at once
		want[fleet.DigestOf(b)] = true
		wg.Go(func() {
			if _, err := s.Put(context.Background(), fleet.DigestOf(b), bytes.NewReader(b)); err != nil && !errors.Is(err, fault.Busy) {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	s, err := artifact.Open(dir) // a second opening adds nothing
	if err != nil {
		t.Fatal(err)
	}
	put(t, s, []byte("artifact 0"))
	blob := func(d v1.Descriptor) []byte {
		b, err := os.ReadFile(filepath.Join(dir, "blobs", d.Digest.Algorithm, d.Digest.Hex))
		if err != nil || int64(len(b)) != d.Size || string(fleet.DigestOf(b)) != d.Digest.String() {
			t.Fatalf("%s: %d bytes of %d, %v", d.Digest, len(b), d.Size, err)
		}
		return b
	}
	raw, err := os.ReadFile(filepath.Join(dir, "index.json"))
	if err != nil {
		t.Fatal(err)
	}
	var index v1.IndexManifest
	if err := json.Unmarshal(raw, &index); err != nil || len(index.Manifests) != len(want) {
		t.Fatalf("%d manifests for %d artifacts, %v", len(index.Manifests), len(want), err)
	}
	for _, d := range index.Manifests {
		var m v1.Manifest
		if err := json.Unmarshal(blob(d), &m); err != nil || len(m.Layers) != 1 {
			t.Fatal(m, err)
		}
		blob(m.Config)
		blob(m.Layers[0])
		if !want[fleet.Digest(m.Layers[0].Digest.String())] || m.Layers[0].Digest.String() != d.Annotations["org.opencontainers.image.ref.name"] {
			t.Errorf("the index lists %v", m.Layers[0])
		}
	}
}

func TestAnotherFolderIsNotTaken(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "oci-layout"), []byte(`{"imageLayoutVersion":"9"}`), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := artifact.Open(dir); !errors.Is(err, fault.Invalid) {
		t.Fatal(err)
	}
}

func TestWhatChangedOnTheDiskIsNotUnpacked(t *testing.T) {
	s, dir := open(t)
	var b bytes.Buffer
	d, err := artifact.Pack(folder(t, map[string]string{"bin/app": "program"}), &b)
	if err != nil {
		t.Fatal(err)
	}
	put(t, s, b.Bytes())
	at := filepath.Join(dir, "blobs/sha256", strings.TrimPrefix(string(d), "sha256:"))
	if err := os.WriteFile(at, bytes.Replace(b.Bytes(), []byte("program"), []byte("evil   "), 1), 0o600); err != nil {
		t.Fatal(err)
	}
	parent := t.TempDir()
	if err := s.Unpack(d, filepath.Join(parent, "into")); !errors.Is(err, fault.Internal) {
		t.Fatal(err)
	}
	if left, _ := os.ReadDir(parent); len(left) != 0 {
		t.Fatalf("%v is left", left)
	}
}

// sparse is a PAX sparse file: 3 blocks of archive that unpack to 1 TiB.
func sparse(t *testing.T) []byte {
	t.Helper()
	var b bytes.Buffer
	record := func(k, v string) string {
		for n := len(k) + len(v) + 3; ; n++ {
			if r := fmt.Sprintf("%d %s=%s\n", n, k, v); len(r) == n {
				return r
			}
		}
	}
	pax := record("GNU.sparse.major", "1") + record("GNU.sparse.minor", "0") + record("GNU.sparse.name", "bomb") +
		record("GNU.sparse.realsize", "1099511627776")
	block := func(name string, typ byte, data []byte) {
		h := make([]byte, 512)
		copy(h, name)
		copy(h[100:], "0000644\x000000000\x000000000\x00")
		copy(h[124:], fmt.Sprintf("%011o\x00", len(data)))
		copy(h[136:], "00000000000\x00        ")
		h[156] = typ
		copy(h[257:], "ustar\x0000")
		sum := 0
		for _, c := range h {
			sum += int(c)
		}
		copy(h[148:], fmt.Sprintf("%06o\x00 ", sum))
		b.Write(h)
		b.Write(data)
		b.Write(make([]byte, (512-len(data)%512)%512))
	}
	block("pax", 'x', []byte(pax))
	data := make([]byte, 512)
	copy(data, "1\n1099511627776\n0\n")
	block("bomb", '0', data)
	b.Write(make([]byte, 1024))
	if h, err := tar.NewReader(bytes.NewReader(b.Bytes())).Next(); err != nil || h.Size != 1<<40 {
		t.Fatalf("the test's own archive is not a bomb: %v, %v", h, err)
	}
	return b.Bytes()
}

func TestBombs(t *testing.T) {
	many := make([]*tar.Header, artifact.MaxEntries+1)
	for i := range many {
		many[i] = &tar.Header{Name: "a/", Typeflag: tar.TypeDir}
	}
	for name, b := range map[string][]byte{
		"sparse": sparse(t), "many entries": archive(t, many...),
		"deep":       archive(t, &tar.Header{Name: strings.Repeat("d/", 400), Typeflag: tar.TypeDir}),
		"attributes": archive(t, &tar.Header{Name: "a", Typeflag: tar.TypeReg, PAXRecords: map[string]string{"SCHILY.xattr.user.x": "y"}}),
		"cut short":  archive(t, &tar.Header{Name: "a", Typeflag: tar.TypeReg, Size: 4096})[:1500],
	} {
		s, _ := open(t)
		parent := t.TempDir()
		err := s.Unpack(put(t, s, b), filepath.Join(parent, "into"))
		left, _ := os.ReadDir(parent)
		if !errors.Is(err, fault.Invalid) || len(left) != 0 {
			t.Errorf("%s: %v, %v is left", name, err, left)
		}
	}
}

func TestTooLarge(t *testing.T) {
	if testing.Short() {
		t.Skip("hashes 1 GiB")
	}
	s, dir := open(t)
	d := fleet.DigestOf([]byte("anything"))
	f, err := os.Create(filepath.Join(dir, "partial", strings.TrimPrefix(string(d), "sha256:")))
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(f.Truncate(artifact.MaxArtifact-1), f.Close()); err != nil {
		t.Fatal(err)
	}
	p, err := s.Begin(d)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	if _, err := p.Write([]byte("x")); err != nil {
		t.Error("the last byte:", err)
	}
	if _, err := p.Write([]byte("x")); !errors.Is(err, fault.Invalid) {
		t.Error("one more:", err)
	}
}

func TestPutEndsWithItsContext(t *testing.T) {
	s, _ := open(t)
	ctx, cancel := context.WithCancel(context.Background())
	d := fleet.DigestOf([]byte("ab"))
	if _, err := s.Put(ctx, d, &cancelling{cancel}); !errors.Is(err, fault.Unavailable) || s.Has(d) {
		t.Fatal(err)
	}
	put(t, s, []byte("ab")) // and leaves nobody busy
}

type cancelling struct{ cancel func() }

func (c *cancelling) Read(p []byte) (int, error) { c.cancel(); return copy(p, "a"), nil }
