// SPDX-License-Identifier: Apache-2.0

package store

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io"
	"os"
	"path/filepath"

	"github.com/hashicorp/go-hclog"
	hraft "github.com/hashicorp/raft"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/raft/wal"
)

// Snapshots is the library's file store, which has a checksum of each state and none of its description: the index, the
// term, the members. The description has one in a file of its own, "meta.sha256" beside "meta.json". A snapshot that was
// altered is moved aside, and named.
type Snapshots struct {
	*hraft.FileSnapshotStore
	dir string
	log hclog.Logger
}

const (
	snapshotsDir = "snapshots" // the library's name
	damagedDir   = "damaged"
	metaFile     = "meta.json" // the library's name
	metaSum      = "meta.sha256"
	retained     = 2
)

func openSnapshots(dir string, log hclog.Logger) (*Snapshots, error) {
	inner, err := hraft.NewFileSnapshotStoreWithLogger(dir, retained, log)
	if err != nil {
		return nil, fault.Because(err, "store.openSnapshots", fault.Unavailable, "can't store snapshots")
	}
	return &Snapshots{inner, dir, log}, nil
}

// Create implements hraft.SnapshotStore.
func (s *Snapshots) Create(
	v hraft.SnapshotVersion, index, term uint64, c hraft.Configuration, at uint64, t hraft.Transport,
) (hraft.SnapshotSink, error) {
	sink, err := s.FileSnapshotStore.Create(v, index, term, c, at, t)
	if err != nil {
		return nil, err
	}
	return &sealedSink{sink, s}, nil
}

// sealedSink is a snapshot that gets the checksum of its description when it is complete.
type sealedSink struct {
	hraft.SnapshotSink
	s *Snapshots
}

// Close implements hraft.SnapshotSink.
func (k *sealedSink) Close() error {
	if err := k.SnapshotSink.Close(); err != nil {
		return err
	}
	return k.s.seal(k.ID())
}

func (s *Snapshots) path(id string) string { return filepath.Join(s.dir, snapshotsDir, id) }

// seal writes the checksum of a description.
func (s *Snapshots) seal(id string) error {
	const op = "store.seal"
	meta, err := os.ReadFile(filepath.Join(s.path(id), metaFile))
	if err != nil {
		return fault.At(op, fault.Internal, err)
	}
	sum := sha256.Sum256(meta)
	f, err := os.OpenFile(filepath.Join(s.path(id), metaSum), os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return fault.At(op, fault.Unavailable, err)
	}
	_, err = f.WriteString(hex.EncodeToString(sum[:]) + "\n")
	return fault.At(op, fault.Unavailable, errors.Join(err, f.Sync(), f.Close(), wal.Dir(s.path(id)).SyncDir()))
}

// checkMeta compares a description with its checksum. One that has none was cut off just before the end: it gets one.
func (s *Snapshots) checkMeta(id string) error {
	meta, err := os.ReadFile(filepath.Join(s.path(id), metaFile))
	if err != nil {
		return err
	}
	want, err := os.ReadFile(filepath.Join(s.path(id), metaSum))
	if errors.Is(err, os.ErrNotExist) || (err == nil && len(want) == 0) {
		return s.seal(id)
	}
	if sum := sha256.Sum256(meta); err == nil && string(want) != hex.EncodeToString(sum[:])+"\n" {
		err = fault.New("store.checkMeta", fault.Internal, "%s does not have the checksum that it was written with", metaFile)
	}
	return err
}

// Open implements hraft.SnapshotStore. It reads all of the snapshot before it returns it.
func (s *Snapshots) Open(id string) (*hraft.SnapshotMeta, io.ReadCloser, error) {
	err := s.checkMeta(id)
	if err == nil {
		meta, r, err := s.FileSnapshotStore.Open(id)
		if err == nil {
			return meta, r, nil
		}
		return nil, nil, s.quarantine(id, err)
	}
	return nil, nil, s.quarantine(id, err)
}

// ConfigurationIndex is the index of the configuration in the newest snapshot; 0 if there is none.
func (s *Snapshots) ConfigurationIndex() (uint64, error) {
	list, err := s.List()
	if err != nil || len(list) == 0 {
		return 0, err
	}
	return list[0].ConfigurationIndex, nil
}

// quarantine moves a snapshot to a place at which it is not found again, and returns an error that names it.
func (s *Snapshots) quarantine(id string, cause error) error {
	s.log.Error("a snapshot is damaged", "snapshot", id, "err", cause)
	to := filepath.Join(s.dir, damagedDir)
	err := os.MkdirAll(to, 0o700)
	if err == nil {
		err = os.Rename(s.path(id), filepath.Join(to, id))
	}
	return fault.Because(errors.Join(cause, err), "store.Snapshots", fault.Internal,
		"the snapshot %s is damaged: it is not used, and is put into the directory %s", id, damagedDir)
}

// checkWhole makes sure that the newest snapshot that can be read and the log meet. The library looks for entries that are
// not there and panics.
func (d *Disk) checkWhole() error {
	const op = "store.checkWhole"
	found, err := os.ReadDir(filepath.Join(d.Snapshots.dir, snapshotsDir))
	var bad error
	for _, e := range found { // the library does not list one whose description it can't read
		if id := e.Name(); e.IsDir() && filepath.Ext(id) != ".tmp" {
			if err := d.Snapshots.checkMeta(id); err != nil {
				bad = d.Snapshots.quarantine(id, err)
			}
		}
	}
	list, lerr := d.Snapshots.List()
	if err = errors.Join(err, lerr); err != nil {
		return fault.Because(err, op, fault.Unavailable, "the snapshots can't be listed")
	}
	have := uint64(0)
	for _, m := range list { // newest first
		meta, r, err := d.Snapshots.Open(m.ID)
		if err != nil {
			bad = err
			continue
		}
		_ = r.Close()
		have = meta.Index
		break
	}
	first := d.Log.First()
	switch {
	case bad != nil && first == 0, first > have+1:
		return fault.Because(bad, op, fault.Internal,
			"%s, and without it the log does not reach back far enough: it begins at entry %d, and the newest snapshot that can be read "+
				"ends at %d. Remove this node's directory and let it join again from its peers", damageText(bad), first, have)
	}
	return nil
}

func damageText(err error) string {
	if err == nil {
		return "a snapshot is missing"
	}
	return fault.Text(err)
}
