// SPDX-License-Identifier: Apache-2.0

package raft

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

// snapshots is the library's file store, which has a checksum of each state and none of what it says about it: the index,
// the term, the members. That has one in a file of its own, "meta.sha256" beside "meta.json". A snapshot that was altered
// is put aside, and named.
type snapshots struct {
	*hraft.FileSnapshotStore
	dir string
	log hclog.Logger
}

const (
	snapshotsDir = "snapshots" // the library's name
	damagedDir   = "damaged"
	metaFile     = "meta.json" // the library's name
	metaSum      = "meta.sha256"
)

func openSnapshots(dir string, log hclog.Logger) (*snapshots, error) {
	inner, err := hraft.NewFileSnapshotStoreWithLogger(dir, 2, log)
	if err != nil {
		return nil, fault.Because(err, "raft.openSnapshots", fault.Unavailable, "can't keep snapshots")
	}
	return &snapshots{inner, dir, log}, nil
}

// Create implements hraft.SnapshotStore.
func (s *snapshots) Create(v hraft.SnapshotVersion, index, term uint64, c hraft.Configuration, at uint64, t hraft.Transport) (hraft.SnapshotSink, error) {
	sink, err := s.FileSnapshotStore.Create(v, index, term, c, at, t)
	if err != nil {
		return nil, err
	}
	return &sealed{sink, s}, nil
}

// sealed is a snapshot that gets the checksum of its description when it is complete.
type sealed struct {
	hraft.SnapshotSink
	s *snapshots
}

// Close implements hraft.SnapshotSink.
func (k *sealed) Close() error {
	if err := k.SnapshotSink.Close(); err != nil {
		return err
	}
	return k.s.seal(k.ID())
}

func (s *snapshots) path(id string) string { return filepath.Join(s.dir, snapshotsDir, id) }

// seal writes the checksum of a description.
func (s *snapshots) seal(id string) error {
	const op = "raft.seal"
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

// checkMeta compares a description with its checksum. One that has none is of an older build, or its making was cut off
// just before the end: it gets one.
func (s *snapshots) checkMeta(id string) error {
	meta, err := os.ReadFile(filepath.Join(s.path(id), metaFile))
	if err != nil {
		return err
	}
	want, err := os.ReadFile(filepath.Join(s.path(id), metaSum))
	if errors.Is(err, os.ErrNotExist) || (err == nil && len(want) == 0) {
		return s.seal(id)
	}
	if sum := sha256.Sum256(meta); err == nil && string(want) != hex.EncodeToString(sum[:])+"\n" {
		err = fault.New("raft.checkMeta", fault.Internal, "%s does not have the checksum that it was written with", metaFile)
	}
	return err
}

// Open implements hraft.SnapshotStore. It reads all of the snapshot before it gives it out.
func (s *snapshots) Open(id string) (*hraft.SnapshotMeta, io.ReadCloser, error) {
	err := s.checkMeta(id)
	if err == nil {
		meta, r, err := s.FileSnapshotStore.Open(id)
		if err == nil {
			return meta, r, nil
		}
		return nil, nil, s.aside(id, err)
	}
	return nil, nil, s.aside(id, err)
}

// aside puts a snapshot where it is not found again, and names it.
func (s *snapshots) aside(id string, why error) error {
	s.log.Error("a snapshot is damaged", "snapshot", id, "why", why)
	to := filepath.Join(s.dir, damagedDir)
	err := os.MkdirAll(to, 0o700)
	if err == nil {
		err = os.Rename(s.path(id), filepath.Join(to, id))
	}
	return fault.Because(errors.Join(why, err), "raft.snapshots", fault.Internal, "the snapshot %s is damaged: it is not used, and is put into the directory %s", id, damagedDir)
}

// SnapshotAt returns once a snapshot that has all entries up to index is on disk, and takes one if there is none yet. The node must
// have applied them. It is fault.Unavailable where none can be taken now.
func (n *Node) SnapshotAt(index uint64) error {
	const op = "raft.SnapshotAt"
	for tried := false; ; tried = true {
		list, err := n.disk.snaps.List()
		switch {
		case err != nil:
			return fault.Because(err, op, fault.Unavailable, "the snapshots can't be listed")
		case len(list) > 0 && list[0].Index >= index:
			return nil
		case tried:
			return fault.New(op, fault.Unavailable, "this node has not applied entry %d yet", index)
		}
		if err := n.raft.Snapshot().Error(); err != nil && !errors.Is(err, hraft.ErrNothingNewToSnapshot) {
			return fault.Because(err, op, fault.Unavailable, "a snapshot can't be taken")
		}
	}
}

// whole makes sure that the newest snapshot that can be read and the log meet. The library looks for entries that are not
// there and panics.
func (d *disk) whole() error {
	const op = "raft.whole"
	found, err := os.ReadDir(filepath.Join(d.snaps.dir, snapshotsDir))
	var bad error
	for _, e := range found { // the library does not list one whose description it can't read
		if id := e.Name(); e.IsDir() && filepath.Ext(id) != ".tmp" {
			if err := d.snaps.checkMeta(id); err != nil {
				bad = d.snaps.aside(id, err)
			}
		}
	}
	list, lerr := d.snaps.List()
	if err = errors.Join(err, lerr); err != nil {
		return fault.Because(err, op, fault.Unavailable, "the snapshots can't be listed")
	}
	have := uint64(0)
	for _, m := range list { // newest first
		meta, r, err := d.snaps.Open(m.ID)
		if err != nil {
			bad = err
			continue
		}
		_ = r.Close()
		have = meta.Index
		break
	}
	first := d.wal.First()
	switch {
	case bad != nil && first == 0, first > have+1:
		return fault.Because(bad, op, fault.Internal, "%s, and without it the log does not reach back far enough: it begins at entry %d, and the newest snapshot that can be read ends at %d. Remove this node's directory and let it join again from its peers", named(bad), first, have)
	}
	return nil
}

func named(err error) string {
	if err == nil {
		return "a snapshot is missing"
	}
	return fault.Text(err)
}
