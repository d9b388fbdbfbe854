// SPDX-License-Identifier: Apache-2.0

package raft

import (
	hraft "github.com/hashicorp/raft"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/raft/store"
)

// bootstrap begins a cluster if the directory holds nothing, this node is not one that joins, and its caller allows it. The
// caller's own error is returned as it is.
func bootstrap(cfg *Config, logs hraft.LogStore, disk *store.Disk, trans hraft.Transport) error {
	had, err := hraft.HasExistingState(logs, disk.Log, disk.Snapshots)
	if err == nil && !had && !cfg.Join && cfg.Begin != nil {
		if err := cfg.Begin(); err != nil {
			return err
		}
	}
	if err == nil {
		err = writeFirst(cfg, logs, disk, trans, had)
	}
	if err != nil {
		return fault.Because(err, "raft.bootstrap", fault.Unavailable, "the first configuration can't be written")
	}
	return nil
}

// writeFirst writes the first configuration if there is nothing. It completes a start that was interrupted between the
// library's two writes, the term and the configuration: a node that has voted is beyond term 1.
func writeFirst(cfg *Config, logs hraft.LogStore, disk *store.Disk, trans hraft.Transport, had bool) error {
	var first hraft.Configuration
	for _, m := range cfg.First {
		first.Servers = append(first.Servers,
			hraft.Server{Suffrage: hraft.Voter, ID: hraft.ServerID(m.ID), Address: hraft.ServerAddress(m.Addr)})
	}
	if !had && cfg.Join {
		return nil
	}
	if !had {
		return hraft.BootstrapCluster(cfg.library(), logs, disk.Log, disk.Snapshots, trans, first)
	}
	if last, err := logs.LastIndex(); err != nil || last > 0 {
		return err
	}
	if snaps, err := disk.Snapshots.List(); err != nil || len(snaps) > 0 {
		return err
	}
	if term, err := disk.Log.GetUint64([]byte("CurrentTerm")); err != nil || term != 1 || cfg.Join {
		return err
	}
	return logs.StoreLog(&hraft.Log{Index: 1, Term: 1, Type: hraft.LogConfiguration, Data: hraft.EncodeConfiguration(first)})
}
