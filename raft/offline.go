// SPDX-License-Identifier: Apache-2.0

package raft

import (
	"errors"
	"io"
	"log/slog"

	hraft "github.com/hashicorp/raft"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/raft/store"
)

// Offline is the directory of a node that is stopped.
type Offline struct {
	Dir     string
	Self    Member
	Machine Machine
	Logger  *slog.Logger // nil: none
}

func (o Offline) open() (*store.Disk, error) {
	const op = "raft.Offline"
	if o.Dir == "" || o.Self.ID == "" || o.Self.Addr == "" || o.Machine == nil {
		return nil, fault.New(op, fault.Invalid, "a node has a directory, a name, an address and a machine")
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	return store.Open(store.Options{Dir: o.Dir, Self: o.Self.ID}, hclogger(o.Logger))
}

func (o Offline) alone() hraft.Configuration {
	return hraft.Configuration{Servers: []hraft.Server{
		{Suffrage: hraft.Voter, ID: hraft.ServerID(o.Self.ID), Address: hraft.ServerAddress(o.Self.Addr)},
	}}
}

// Recover makes the node of a directory the only member of its cluster, with all that its snapshot and log hold. What is
// in its log and was never committed counts as committed from then on. The other nodes must be stopped for good: two
// clusters that continue from one history can't be made one again. The machine has the state afterwards.
func (o Offline) Recover() error {
	const op = "raft.Recover"
	d, err := o.open()
	if err != nil {
		return err
	}
	had, err := d.HasState()
	if err != nil || !had {
		_ = d.Close()
		return fault.Because(err, op, fault.NotFound, "the directory holds no log of a cluster: there is nothing to recover")
	}
	_, trans := hraft.NewInmemTransport(hraft.ServerAddress(o.Self.Addr))
	cfg := Config{Self: o.Self, Logger: slog.New(slog.DiscardHandler)}
	cfg.Timing.fill()
	fsm := newMachine(o.Machine)
	err = hraft.RecoverCluster(cfg.library(), fsm, d.Log, d.Log, d.Snapshots, trans, o.alone())
	if failed := fsm.failure(); failed != nil {
		err = failed
	} else if err != nil {
		err = fault.Because(err, op, fault.Internal, "the log of this directory can't be recovered")
	}
	return errors.Join(err, d.Close())
}

// Install makes the node of an empty directory the only member of a new cluster that begins with a state. Index and term
// are those of the state in the cluster that it is from.
func (o Offline) Install(index, term uint64, state io.WriterTo) error {
	d, err := o.open()
	if err != nil {
		return err
	}
	return errors.Join(o.install(d, index, term, state), d.Close())
}

func (o Offline) install(d *store.Disk, index, term uint64, state io.WriterTo) error {
	const op = "raft.Install"
	had, err := d.HasState()
	switch {
	case err != nil:
		return fault.Because(err, op, fault.Unavailable, "the directory can't be read")
	case had:
		return fault.New(op, fault.Conflict, "the directory holds the log of a cluster: nothing is overwritten")
	case index == 0 || term == 0:
		return fault.New(op, fault.Invalid, "a state of the index %d and the term %d", index, term)
	}
	if err := d.Log.SetUint64([]byte("CurrentTerm"), term); err != nil {
		return fault.Because(err, op, fault.Unavailable, "the term can't be written")
	}
	_, trans := hraft.NewInmemTransport(hraft.ServerAddress(o.Self.Addr))
	sink, err := d.Snapshots.Create(hraft.SnapshotVersionMax, index, term, o.alone(), 1, trans)
	if err != nil {
		return fault.Because(err, op, fault.Unavailable, "the state can't be written")
	}
	return (&snapshot{state, index}).Persist(sink)
}

// CheckUnused is [fault.Conflict] if another process has a node's directory open.
func CheckUnused(dir string) error { return store.CheckUnused(dir) }
