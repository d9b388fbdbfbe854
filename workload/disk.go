// SPDX-License-Identifier: Apache-2.0

package workload

import (
	"crypto/rand"
	"encoding/json"
	"errors"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"sync"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/seal"
	"github.com/demarc-dev/demarc/smallfile"
)

const (
	recordVersion = "demarc-workload/1"
	maxRecord     = 8 << 20
)

// record is state.json: what the next process must know.
type record struct {
	Version string            `json:"version"`
	Mark    string            `json:"mark"`            // in the environment of all that this run started
	Addrs   map[string]string `json:"addrs,omitempty"` // service:port -> host:port
	Good    json.RawMessage   `json:"good,omitempty"`  // the last plan that was well
}

// disk keeps the record and the lock of the folder.
type disk struct {
	dir  string
	lock *os.File

	mu  sync.Mutex // guards rec
	rec record
}

func openDisk(dir string) (*disk, error) {
	const op = "workload.Open"
	lock, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fault.Because(err, op, fault.Unavailable, "the folder of the runtime can't be written")
	}
	if err := lockFile(lock); err != nil {
		lock.Close()
		return nil, fault.Because(err, op, fault.Conflict, "the folder of the runtime is in use by another process")
	}
	d := &disk{dir: dir, lock: lock, rec: record{Version: recordVersion}}
	if err := d.load(); err != nil {
		lock.Close()
		return nil, err
	}
	return d, nil
}

func (d *disk) load() error {
	const op = "workload.Open"
	path := filepath.Join(d.dir, "state.json")
	st, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err == nil && st.Size() > maxRecord {
		return fault.New(op, fault.Invalid, "state.json has %d bytes, the limit is %d", st.Size(), maxRecord)
	}
	b, rerr := os.ReadFile(path)
	if err = errors.Join(err, rerr); err != nil {
		return fault.Because(err, op, fault.Unavailable, "state.json can't be read")
	}
	var r record
	if err := seal.StrictJSON(b, &r); err != nil {
		return fault.Because(err, op, fault.Invalid, "state.json is damaged: stop what runs, move the file away and start again")
	}
	if r.Version != recordVersion {
		return fault.New(op, fault.Invalid, "state.json has version %.32q: this build reads %s", r.Version, recordVersion)
	}
	d.rec = r
	return nil
}

// change writes the changed record before it is seen.
func (d *disk) change(f func(*record)) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	next := d.rec
	next.Addrs = maps.Clone(next.Addrs)
	if next.Addrs == nil {
		next.Addrs = map[string]string{}
	}
	f(&next)
	b, err := json.Marshal(next)
	if err == nil {
		err = smallfile.Replace(filepath.Join(d.dir, "state.json"), b)
	}
	if err != nil {
		return fault.Because(err, "workload.record", fault.Unavailable, "the state of the runtime can't be written: %s", fault.Disk(err))
	}
	d.rec = next
	return nil
}

// mark draws a new mark for what this process starts.
func (d *disk) mark() error { return d.change(func(r *record) { r.Mark = rand.Text() }) }

// get gives the record; its maps and slices must not be changed.
func (d *disk) get() record {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.rec
}

func (d *disk) close() error { return d.lock.Close() }
