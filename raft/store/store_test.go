// SPDX-License-Identifier: Apache-2.0

package store_test

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	hraft "github.com/hashicorp/raft"
	"go.uber.org/goleak"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/raft/store"
	"github.com/demarc-dev/demarc/raft/wal"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func open(dir, self string) (*store.Disk, error) {
	return store.Open(store.Options{Dir: dir, Self: self, Log: wal.Options{SegmentBytes: 64 << 10}}, hclog.NewNullLogger())
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// A directory is open once, and belongs to the first member that opened it.
func TestADirectoryHasOneOwner(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "raft")
	must(t, store.CheckUnused(dir))
	d, err := open(dir, "n0")
	must(t, err)
	if err := store.CheckUnused(dir); !errors.Is(err, fault.Conflict) {
		t.Errorf("while it is open: %v", err)
	}
	if _, err := open(dir, "n0"); !errors.Is(err, fault.Conflict) {
		t.Errorf("opened twice: %v", err)
	}
	must(t, d.Close())
	must(t, store.CheckUnused(dir))
	if _, err := open(dir, "n1"); !errors.Is(err, fault.Conflict) {
		t.Errorf("by another member: %v", err)
	}
	d, err = open(dir, "n0")
	must(t, err)
	if had, err := d.HasState(); had || err != nil {
		t.Errorf("a directory in which nothing was written: %v, %v", had, err)
	}
	must(t, d.Close())
}

// A log that does not say whose it is has no owner.
func TestALogWithoutAnOwnerIsRefused(t *testing.T) {
	dir := t.TempDir()
	must(t, os.MkdirAll(store.WALDir(dir), 0o700))
	l, err := wal.Open(wal.Dir(store.WALDir(dir)), wal.Options{SegmentBytes: 64 << 10})
	must(t, err)
	must(t, errors.Join(l.Append([]wal.Entry{{Index: 1, Term: 1}}), l.Close()))
	if _, err := open(dir, "n0"); !errors.Is(err, fault.Conflict) {
		t.Fatal(err)
	}
}

// What does not lead syncs before it returns, and a wait for it ends.
func TestAFollowersEntriesAreSynced(t *testing.T) {
	d, err := open(t.TempDir(), "n0")
	must(t, err)
	writes := 0
	a := store.NewAsync(d.Log, store.AsyncConfig{Wrote: func(time.Duration) { writes++ }, Fail: func(err error) { t.Error(err) }})
	defer func() { a.Close(); must(t, d.Close()) }()
	waited, end := make(chan bool, 1), make(chan struct{})
	go func() { waited <- a.WaitSynced(2, end) }()
	must(t, a.StoreLogs([]*hraft.Log{{Index: 1, Term: 1, Type: hraft.LogConfiguration}, {Index: 2, Term: 1, Data: []byte("x")}}))
	if !<-waited {
		t.Error("the wait ended before its time")
	}
	if a.Synced() != 2 || writes != 1 || !a.BusySince().IsZero() {
		t.Errorf("%d on disk after %d writes, busy since %v", a.Synced(), writes, a.BusySince())
	}
	select {
	case <-a.Grew():
	default:
		t.Error("no token says that the log grew")
	}
	if at, err := d.ConfigurationIndex(); at != 1 || err != nil {
		t.Errorf("the configuration is entry %d, %v", at, err)
	}
	go func() { waited <- a.WaitSynced(3, end) }()
	close(end)
	if <-waited {
		t.Error("a wait for what was never written")
	}
}
