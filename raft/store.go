// SPDX-License-Identifier: Apache-2.0

package raft

import (
	"errors"
	"os"
	"path/filepath"

	"github.com/hashicorp/go-hclog"
	hraft "github.com/hashicorp/raft"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/raft/wal"
)

const walName = "wal"

// disk is what a member keeps.
type disk struct {
	lock  *os.File
	wal   store
	snaps *snapshots
}

// openDisk opens the directory of a member. A directory serves one member for ever, and one process at a time.
func openDisk(dir, self string, log hclog.Logger) (*disk, error) {
	return openDiskWith(dir, self, wal.Options{}, nil, log)
}

func openDiskWith(dir, self string, o wal.Options, files wal.Files, log hclog.Logger) (_ *disk, err error) {
	const op = "raft.openDisk"
	d := &disk{}
	defer func() {
		if err != nil {
			err = errors.Join(err, d.close())
		}
	}()
	logs := filepath.Join(dir, "log")
	if err := os.MkdirAll(filepath.Join(logs, walName), 0o700); err != nil {
		return nil, fault.Because(err, op, fault.Unavailable, "can't make the directory of the log")
	}
	if err := wal.Dir(logs).SyncDir(); err != nil {
		return nil, fault.Because(err, op, fault.Unavailable, "the directory of the log can't be synced")
	}
	if d.lock, err = os.OpenFile(filepath.Join(dir, "lock"), os.O_RDWR|os.O_CREATE, 0o600); err != nil {
		return nil, fault.Because(err, op, fault.Unavailable, "can't make the lock of the directory")
	}
	if err := lockFile(d.lock); err != nil {
		return nil, fault.Because(err, op, fault.Conflict, "the directory is in use by another process: stop it first")
	}
	if files != nil {
		d.wal.Log, err = wal.Open(files, o)
	} else {
		d.wal.Log, err = wal.Open(wal.Dir(filepath.Join(logs, walName)), o)
	}
	if err != nil {
		return nil, fault.Because(err, op, fault.Unavailable, "the log can't be opened: %s", fault.Text(err))
	}
	if d.wal.Repaired() {
		log.Warn("one copy of the votes was altered on disk; it was written anew from the other: look after the disk")
	}
	if d.snaps, err = openSnapshots(dir, log); err != nil {
		return nil, err
	}
	if err := d.claim(self); err != nil {
		return nil, err
	}
	return d, d.whole()
}

// claim makes sure that the directory is this member's.
func (d *disk) claim(self string) error {
	const op = "raft.openDisk"
	key := []byte("demarc-self")
	was, err := d.wal.Get(key)
	if err != nil {
		return fault.Because(err, op, fault.Unavailable, "the log can't be read")
	}
	if string(was) == self {
		return nil
	}
	if len(was) > 0 {
		return fault.New(op, fault.Conflict, "the directory belongs to node %q, this is %q: two nodes can't share one", was, self)
	}
	had, err := hraft.HasExistingState(d.wal, d.wal, d.snaps)
	switch {
	case err != nil:
		return fault.Because(err, op, fault.Unavailable, "the log can't be read")
	case had:
		return fault.New(op, fault.Conflict, "the directory holds a log and does not say whose: give this node another one")
	}
	return fault.At(op, fault.Unavailable, d.wal.Set(key, []byte(self)))
}

func (d *disk) close() error {
	if d == nil {
		return nil
	}
	var errs []error
	if d.wal.Log != nil {
		errs = append(errs, d.wal.Close())
	}
	if d.lock != nil {
		errs = append(errs, d.lock.Close())
	}
	return errors.Join(errs...)
}
