// SPDX-License-Identifier: Apache-2.0

// Package artifact keeps what runs by its digest, and unpacks it without leaving its folder.
//
// # Promise
//
// What [Store.Get] and [Store.Unpack] give has the digest that was asked for: it was checked when it came in, while it was
// streamed, and nothing is kept of what did not match. What [Store.Durable] tells of outlasts a loss of power. An archive can't write
// outside of its own folder, make a link or a device, or grow beyond its bounds.
//
// # On disk
//
// The folder is laid out as an OCI image layout (https://github.com/opencontainers/image-spec/blob/main/image-layout.md):
// oci-layout, index.json, and blobs/sha256/<hex>, with an image manifest of artifact type application/vnd.demarc.artifact.v1
// around each artifact, its only layer. The layer is a tar archive with plain files and folders only, sorted by
// name, without times and owners, so that the same folder has the same digest on every machine. What is on its way lies
// in partial/<hex>, to be gone on with.
package artifact

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"hash"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
)

// Bounds.
const (
	MaxArtifact = 1 << 30 // bytes of an archive
	MaxUnpacked = 4 << 30 // bytes of what is in it
	MaxEntries  = 100_000
	maxDepth    = 32 // parts of a name: each is walked for each file
)

// Store is a folder of artifacts. Its methods may be called concurrently.
type Store struct {
	dir string
	mu  sync.Mutex // guards busy
	// busy are the digests that are being written now
	busy map[fleet.Digest]bool

	list    sync.Mutex // guards indexed and index.json
	indexed map[fleet.Digest]bool
}

// Open makes or opens a store.
func Open(dir string) (*Store, error) {
	const op = "artifact.Open"
	for _, d := range []string{"blobs/sha256", "partial"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o700); err != nil {
			return nil, fault.Because(err, op, fault.Unavailable, "can't make the folder of artifacts")
		}
	}
	s := &Store{dir: dir, busy: map[fleet.Digest]bool{}, indexed: map[fleet.Digest]bool{}}
	if err := s.loadIndex(); err != nil {
		return nil, fault.At(op, "", err)
	}
	if err := syncDir(filepath.Join(dir, "blobs/sha256")); err != nil { // a process may have died between a rename and this
		return nil, fault.At(op, fault.Unavailable, err)
	}
	return s, nil
}

// full explains a write that failed because the disk has no room, and passes other errors on.
func full(op string, err error) error {
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		return fault.Because(err, op, fault.Unavailable, "the disk that keeps artifacts is full: nothing of this artifact was kept, make space "+
			"and try again")
	}
	return fault.At(op, fault.Unavailable, err)
}

func (s *Store) path(part string, d fleet.Digest) (string, error) {
	if err := d.Check(); err != nil {
		return "", err
	}
	return filepath.Join(s.dir, part, strings.TrimPrefix(string(d), "sha256:")), nil
}

// Has tells whether an artifact is there, whole.
func (s *Store) Has(d fleet.Digest) bool {
	p, err := s.path("blobs/sha256", d)
	if err != nil {
		return false
	}
	_, err = os.Stat(p)
	return err == nil
}

// Durable reports whether an artifact is there, whole, and outlasts a loss of power: nobody is still writing it.
func (s *Store) Durable(d fleet.Digest) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return !s.busy[d] && s.Has(d)
}

// Arrived is how many bytes of an artifact are here: all of them, or so many as came until now.
func (s *Store) Arrived(d fleet.Digest) int64 {
	for _, part := range []string{"blobs/sha256", "partial"} {
		if p, err := s.path(part, d); err == nil {
			if info, err := os.Stat(p); err == nil {
				return info.Size()
			}
		}
	}
	return 0
}

// Blob is an open artifact.
type Blob struct {
	*os.File
	size int64
}

// Size is in bytes.
func (b *Blob) Size() int64 { return b.size }

// Get opens an artifact.
func (s *Store) Get(d fleet.Digest) (*Blob, error) {
	const op = "artifact.Get"
	p, err := s.path("blobs/sha256", d)
	if err != nil {
		return nil, err
	}
	f, err := os.Open(p)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fault.New(op, fault.NotFound, "artifact %s is not here", d.Short())
	}
	if err != nil {
		return nil, fault.At(op, fault.Unavailable, err)
	}
	info, err := f.Stat()
	if err != nil {
		f.Close()
		return nil, fault.At(op, fault.Unavailable, err)
	}
	return &Blob{f, info.Size()}, nil
}

// Put takes an artifact from a stream. One that is there already is not read.
func (s *Store) Put(ctx context.Context, d fleet.Digest, r io.Reader) (int64, error) {
	p, err := s.Begin(d)
	if err != nil {
		return 0, err
	}
	defer p.Close()
	if p.done {
		return p.at, s.index(d, p.at)
	}
	if err := p.Restart(); err != nil {
		return 0, err
	}
	buf := make([]byte, 256<<10)
	for ctx.Err() == nil {
		n, err := r.Read(buf)
		if _, err := p.Write(buf[:n]); err != nil {
			return 0, err
		}
		if errors.Is(err, io.EOF) {
			return p.at, p.Commit()
		}
		if err != nil {
			return 0, fault.At("artifact.Put", "", err)
		}
	}
	return 0, fault.At("artifact.Put", fault.Unavailable, ctx.Err())
}

// Partial is an artifact on its way. What came so far is kept when it is closed, unless it turned out to be another.
type Partial struct {
	s    *Store
	d    fleet.Digest
	f    *os.File
	sum  hash.Hash
	at   int64
	done bool
}

// Begin starts or goes on with an artifact. One writer of one digest at a time: another is told that it is busy.
func (s *Store) Begin(d fleet.Digest) (*Partial, error) {
	const op = "artifact.Begin"
	path, err := s.path("partial", d)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.Has(d) {
		b, err := s.Get(d)
		if err != nil {
			return nil, err
		}
		defer b.Close()
		now := time.Now()
		_ = os.Chtimes(b.Name(), now, now) // it is wanted again: see Collect
		return &Partial{s: s, d: d, at: b.Size(), done: true}, nil
	}
	if s.busy[d] {
		return nil, fault.New(op, fault.Busy, "artifact %s is being written by another caller: try again in a moment", d.Short())
	}
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, full(op, err)
	}
	p := &Partial{s: s, d: d, f: f, sum: sha256.New()}
	if p.at, err = io.Copy(p.sum, f); err != nil {
		f.Close()
		return nil, fault.At(op, fault.Unavailable, err)
	}
	s.busy[d] = true
	return p, nil
}

// Offset is how many bytes are there already.
func (p *Partial) Offset() int64 { return p.at }

// Done tells that the artifact was there already.
func (p *Partial) Done() bool { return p.done }

// Restart throws away what came so far.
func (p *Partial) Restart() error {
	const op = "artifact.Restart"
	if p.done || p.f == nil {
		return fault.New(op, fault.Conflict, "the artifact is whole already, or closed")
	}
	p.sum.Reset()
	p.at = 0
	if err := p.f.Truncate(0); err != nil {
		return fault.At(op, fault.Unavailable, err)
	}
	_, err := p.f.Seek(0, io.SeekStart)
	return fault.At(op, fault.Unavailable, err)
}

// Write appends. Where the disk is full nothing of the artifact is kept, so that others who need the disk have it.
func (p *Partial) Write(b []byte) (int, error) {
	const op = "artifact.Write"
	if p.done || p.f == nil {
		return 0, fault.New(op, fault.Conflict, "the artifact is whole already, or closed")
	}
	if p.at+int64(len(b)) > MaxArtifact {
		return 0, fault.New(op, fault.Invalid, "the artifact has more than %d bytes, and that is the most", MaxArtifact)
	}
	n, err := p.f.Write(b)
	p.sum.Write(b[:n])
	p.at += int64(n)
	return n, p.failed(op, err)
}

// failed gives up what came so far where the disk is full.
func (p *Partial) failed(op string, err error) error {
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		_ = os.Remove(p.f.Name())
		_ = p.f.Close() // a later write fails
	}
	return full(op, err)
}

// Commit puts the artifact into the store if it is the one that was announced; if not, nothing of it is kept.
func (p *Partial) Commit() error {
	const op = "artifact.Commit"
	if p.done {
		return fault.At(op, "", p.s.index(p.d, p.at))
	}
	if p.f == nil {
		return fault.New(op, fault.Conflict, "the artifact is closed")
	}
	from, to := filepath.Join(p.s.dir, "partial", strings.TrimPrefix(string(p.d), "sha256:")), ""
	if got := fleet.Digest("sha256:" + hex.EncodeToString(p.sum.Sum(nil))); got != p.d {
		_ = os.Remove(from)
		return fault.New(op, fault.Invalid, "the bytes have the digest %s, and %s was announced: nothing was kept", got.Short(), p.d.Short())
	}
	to, err := p.s.path("blobs/sha256", p.d)
	if err != nil {
		return err
	}
	if err := p.f.Sync(); err != nil {
		return p.failed(op, err)
	}
	if err := os.Rename(from, to); err != nil {
		return p.failed(op, err)
	}
	if err := syncDir(filepath.Dir(to)); err != nil {
		_ = os.Remove(to) // it may not outlast a loss of power
		return fault.At(op, fault.Unavailable, err)
	}
	p.done = true
	return fault.At(op, "", p.s.index(p.d, p.at))
}

// Close ends the writing.
func (p *Partial) Close() {
	if p.f == nil {
		return
	}
	_ = p.f.Close()
	p.f = nil
	p.s.mu.Lock()
	defer p.s.mu.Unlock()
	delete(p.s.busy, p.d)
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}
