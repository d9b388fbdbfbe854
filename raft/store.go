// SPDX-License-Identifier: Apache-2.0

package raft

import (
	"errors"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-hclog"
	hraft "github.com/hashicorp/raft"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/raft/wal"
)

// disk is what a member keeps.
type disk struct {
	lock  *os.File
	wal   store
	snaps *snapshots
}

// openDisk opens the directory of a member. A directory serves one member for ever, and one process at a time.
func openDisk(dir, self string, o wal.Options, log hclog.Logger) (_ *disk, err error) {
	const op = "raft.openDisk"
	d := &disk{}
	defer func() {
		if err != nil {
			err = errors.Join(err, d.close())
		}
	}()
	logs := filepath.Join(dir, "log")
	if err := os.MkdirAll(logs, 0o700); err != nil {
		return nil, fault.Because(err, op, fault.Unavailable, "can't make the directory of the log")
	}
	if d.lock, err = os.OpenFile(filepath.Join(dir, "lock"), os.O_RDWR|os.O_CREATE, 0o600); err != nil {
		return nil, fault.Because(err, op, fault.Unavailable, "can't make the lock of the directory")
	}
	if err := lockFile(d.lock); err != nil {
		return nil, fault.Because(err, op, fault.Conflict, "the directory is in use by another process: stop it first")
	}
	if d.wal, err = openStore(logs, o); err != nil {
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

// watched is a log store that knows since when a write has been going on.
type watched struct {
	hraft.LogStore
	wrote func(time.Duration) // every write that returned
	fail  func(error)         // the log takes nothing more
	grew  chan struct{}       // something was written
	began atomic.Int64        // Unix nanoseconds, 0: no write is going on
}

func (w *watched) since() time.Time {
	if b := w.began.Load(); b != 0 {
		return time.Unix(0, b)
	}
	return time.Time{}
}

// StoreLogs implements hraft.LogStore; the library calls it from one goroutine.
func (w *watched) StoreLogs(logs []*hraft.Log) error {
	begin := time.Now()
	w.began.Store(begin.UnixNano())
	err := w.LogStore.StoreLogs(logs)
	w.began.Store(0)
	w.wrote(time.Since(begin))
	if err != nil && fault.Of(err) == fault.Internal {
		w.fail(err)
	}
	select {
	case w.grew <- struct{}{}:
	default:
	}
	return err
}

// StoreLog implements hraft.LogStore.
func (w *watched) StoreLog(l *hraft.Log) error { return w.StoreLogs([]*hraft.Log{l}) }

// IsMonotonic tells hashicorp/raft that a log with a gap must be emptied before a snapshot takes its place.
func (w *watched) IsMonotonic() bool { return true }
