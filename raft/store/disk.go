// SPDX-License-Identifier: Apache-2.0

// Package store writes to disk what one member of a Raft cluster must not lose: its log, its votes, and its snapshots, in
// the shapes that hashicorp/raft asks for.
//
// A directory holds "lock", which is held while the member runs; "log/wal", the files of package wal, in which the term,
// the vote and the owner of the directory are too; "snapshots", hashicorp/raft's own file store with a checksum of each
// description added; and "damaged", for snapshots that were altered. A directory serves one member for ever, and one
// process at a time.
//
// [Async] lets a leader answer the library before its own disk has an entry, and holds back what would follow from that.
package store

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/hashicorp/go-hclog"
	hraft "github.com/hashicorp/raft"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/raft/wal"
)

const (
	lockName = "lock"
	logDir   = "log"
	walDir   = "wal" // in logDir
	ownerKey = "demarc-self"
)

// Options of a directory.
type Options struct {
	Dir   string
	Self  string      // id of the member
	Log   wal.Options // of the files of the log
	Files wal.Files   // the log and the votes, if they are not in Dir; nil: in Dir
}

// Disk is the open directory of a member.
type Disk struct {
	Log       Log
	Snapshots *Snapshots

	lock *os.File
}

// WALDir is the directory of the files of the log in a member's directory.
func WALDir(dir string) string { return filepath.Join(dir, logDir, walDir) }

// Open opens the directory of a member, or makes one. It is [fault.Conflict] if another process has it open or it belongs
// to another member, [fault.Internal] if the log and the snapshots that can be read don't meet, and [fault.Unavailable] if
// the disk fails.
func Open(o Options, log hclog.Logger) (_ *Disk, err error) {
	const op = "store.Open"
	d := &Disk{}
	defer func() {
		if err != nil {
			err = errors.Join(err, d.Close())
		}
	}()
	if err := os.MkdirAll(WALDir(o.Dir), 0o700); err != nil {
		return nil, fault.Because(err, op, fault.Unavailable, "can't make the directory of the log")
	}
	if err := wal.Dir(filepath.Join(o.Dir, logDir)).SyncDir(); err != nil {
		return nil, fault.Because(err, op, fault.Unavailable, "the directory of the log can't be synced")
	}
	if d.lock, err = os.OpenFile(filepath.Join(o.Dir, lockName), os.O_RDWR|os.O_CREATE, 0o600); err != nil {
		return nil, fault.Because(err, op, fault.Unavailable, "can't make the lock of the directory")
	}
	if err := lockFile(d.lock); err != nil {
		return nil, fault.Because(err, op, fault.Conflict, "the directory is in use by another process: stop it first")
	}
	files := o.Files
	if files == nil {
		files = wal.Dir(WALDir(o.Dir))
	}
	if d.Log.Log, err = wal.Open(files, o.Log); err != nil {
		return nil, fault.Because(err, op, fault.Unavailable, "the log can't be opened: %s", fault.Text(err))
	}
	if d.Log.Repaired() {
		log.Warn("one copy of the votes was altered on disk; it was written anew from the other: look after the disk")
	}
	if d.Snapshots, err = openSnapshots(o.Dir, log); err != nil {
		return nil, err
	}
	if err := d.claim(o.Self); err != nil {
		return nil, err
	}
	if err := d.checkWhole(); err != nil {
		return nil, err
	}
	return d, nil
}

// claim makes sure that the directory is this member's.
func (d *Disk) claim(self string) error {
	const op = "store.claim"
	owner, err := d.Log.Get([]byte(ownerKey))
	if err != nil {
		return fault.Because(err, op, fault.Unavailable, "the log can't be read")
	}
	if string(owner) == self {
		return nil
	}
	if len(owner) > 0 {
		return fault.New(op, fault.Conflict, "the directory belongs to node %q, this is %q: two nodes can't share one", owner, self)
	}
	had, err := d.HasState()
	switch {
	case err != nil:
		return fault.Because(err, op, fault.Unavailable, "the log can't be read")
	case had:
		return fault.New(op, fault.Conflict, "the directory holds a log and does not say whose: give this node another one")
	}
	return fault.At(op, fault.Unavailable, d.Log.Set([]byte(ownerKey), []byte(self)))
}

// HasState reports whether the directory holds a term, an entry or a snapshot.
func (d *Disk) HasState() (bool, error) { return hraft.HasExistingState(d.Log, d.Log, d.Snapshots) }

// Close closes the files and releases the lock. It may be called on what Open could not complete, and on nil.
func (d *Disk) Close() error {
	if d == nil {
		return nil
	}
	var errs []error
	if d.Log.Log != nil {
		errs = append(errs, d.Log.Close())
	}
	if d.lock != nil {
		errs = append(errs, d.lock.Close())
	}
	return errors.Join(errs...)
}

// ConfigurationIndex is the index of the newest configuration on disk, committed or not; 0 if there is none.
func (d *Disk) ConfigurationIndex() (uint64, error) {
	for i, first := d.Log.Last(), d.Log.First(); i >= first && i > 0; i-- {
		var l hraft.Log
		if err := d.Log.GetLog(i, &l); err != nil {
			return 0, err
		}
		if l.Type == hraft.LogConfiguration {
			return i, nil
		}
	}
	return d.Snapshots.ConfigurationIndex()
}

// CheckUnused is [fault.Conflict] if another process has a member's directory open; nil if there is no such directory.
func CheckUnused(dir string) error {
	const op = "store.CheckUnused"
	f, err := os.OpenFile(filepath.Join(dir, lockName), os.O_RDWR, 0o600)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fault.Because(err, op, fault.Unavailable, "the lock of the directory can't be read")
	}
	defer f.Close()
	if err := lockFile(f); err != nil {
		return fault.Because(err, op, fault.Conflict, "the directory is in use by another process: stop it first")
	}
	return nil
}
