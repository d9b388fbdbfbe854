// SPDX-License-Identifier: Apache-2.0

package raft

import (
	"time"

	hraft "github.com/hashicorp/raft"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/raft/forward"
	"github.com/demarc-dev/demarc/raft/store"
	"github.com/demarc-dev/demarc/raft/wal"
)

// What a full disk leaves of the log's room: reserve is kept for the entries of elections, headroom for the packs that are
// on their way while the next one is being asked about. Votes have their place already.
const (
	headroom = packers * packBytes

	fullRetry = time.Second      // how often it is looked whether there is space again
	fullYield = 30 * time.Second // how often a leader whose disk is full tries to make another one lead
)

// errFull is not retried: to ask again at once does not help.
var errFull = forward.Permanent(fault.New("raft.Propose", fault.Unavailable,
	"the disk of the leader is full, so it takes no changes: make space, it continues by itself; reads are answered"))

// room makes sure that an entry of size bytes can be written and leaves enough; otherwise it is refused before the library
// has it, which would step down.
func (n *Node) room(size int) error {
	need := wal.SizeOf(wal.Entry{}) + int64(size) + store.Reserve + headroom
	if n.disk.Log.Room() >= need {
		return nil
	}
	err := n.disk.Log.Grow(need)
	switch {
	case err == nil:
		return nil
	case wal.Full(err):
		n.setFull(true, err)
		return errFull
	}
	return fault.At("raft.room", "", err)
}

func (n *Node) setFull(on bool, err error) {
	switch was := n.full.Swap(on); {
	case on && !was:
		n.log.Error("the disk is full: this node takes no changes until there is space; reads go on", "err", err)
	case was && !on:
		n.log.Warn("there is space again: this node takes changes")
	}
}

// tendLog makes the next file of the log before it is needed. While that fails it tries again, and lets another member
// lead where there is one.
func (n *Node) tendLog() {
	var yielded time.Time
	tick := time.NewTicker(fullRetry)
	defer tick.Stop()
	for {
		select {
		case <-n.ctx.Done():
			return
		case <-n.store.Grew():
			if n.full.Load() {
				continue // not at each entry of an election
			}
		case <-tick.C:
		}
		err := n.disk.Log.Prepare()
		if err == nil && n.full.Load() {
			err = n.disk.Log.Grow(store.Reserve + headroom + packBytes) // more than what was refused for
		}
		if err == nil {
			n.setFull(false, nil)
			continue
		}
		if !wal.Full(err) {
			continue // who writes meets it
		}
		// Nothing is refused before the present file is filled, see room.
		if n.full.Load() && n.raft.State() == hraft.Leader && time.Since(yielded) > fullYield {
			yielded = time.Now()
			if err := n.raft.LeadershipTransfer().Error(); err != nil {
				n.log.Info("no other member takes the lead from this one, whose disk is full", "err", err)
			}
		}
	}
}
