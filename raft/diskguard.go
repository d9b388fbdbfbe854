// SPDX-License-Identifier: Apache-2.0

package raft

import (
	"log/slog"
	"sync/atomic"
	"time"

	hraft "github.com/hashicorp/raft"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/raft/forward"
	"github.com/demarc-dev/demarc/raft/store"
	"github.com/demarc-dev/demarc/raft/wal"
)

const (
	// headroom is left in the log for the packs that are on their way while room is made sure of for the next one.
	headroom = packers * packBytes

	fullRetry = time.Second      // how often a full disk is tried again
	fullYield = 30 * time.Second // how often a leader whose disk is full tries to hand leadership over
)

// errFull is not retried: the disk is still full a moment later.
var errFull = forward.Permanent(fault.New("raft.Propose", fault.Unavailable,
	"the disk of the leader is full, so it takes no changes: make space, no restart is needed; reads are answered"))

// diskGuard cuts a node off while its disk hangs, and refuses its proposals while its disk is full.
type diskGuard struct {
	lib    *consensus
	life   *lifetime
	log    *slog.Logger
	hang   time.Duration
	cutOff func(on bool) // ends the connections with the peers, and refuses new ones
	refuse func(error)   // the queued proposals
	store  *store.Disk   // nil before it is open
	logs   *store.Async  // nil before it is open
	full   atomic.Bool   // the node takes no proposals
}

// close ends the background sync, and closes the directory.
func (g *diskGuard) close() error {
	g.logs.Close()
	return g.store.Close()
}

// watch cuts the node off from its peers while a write to its disk hangs.
func (g *diskGuard) watch() {
	tick := time.NewTicker(max(g.hang/4, time.Millisecond))
	defer tick.Stop()
	for {
		select {
		case <-g.life.ctx.Done():
			return
		case <-tick.C:
		}
		since := g.logs.BusySince()
		hangs := !since.IsZero() && time.Since(since) > g.hang
		if hangs == g.lib.hung.Load() {
			continue
		}
		g.lib.hung.Store(hangs)
		g.cutOff(hangs)
		if hangs {
			g.log.Error("a write to the disk hangs: this node is cut off from its peers until it returns", "since", since)
			g.refuse(errHung)
		} else {
			g.log.Warn("the disk writes again: this node is back")
		}
	}
}

// ensureRoom makes sure that an entry of size bytes can be written and leaves enough; otherwise it is refused before the
// library has it, which would step down.
func (g *diskGuard) ensureRoom(size int) error {
	need := wal.SizeOf(wal.Entry{}) + int64(size) + store.Reserve + headroom
	if g.store.Log.Room() >= need {
		return nil
	}
	err := g.store.Log.Grow(need)
	switch {
	case err == nil:
		return nil
	case wal.Full(err):
		g.setFull(true, err)
		return errFull
	}
	return fault.At("raft.ensureRoom", "", err)
}

func (g *diskGuard) setFull(on bool, err error) {
	switch was := g.full.Swap(on); {
	case on && !was:
		g.log.Error("the disk is full: this node takes no changes until there is space; reads are answered", "err", err)
	case was && !on:
		g.log.Warn("there is space again: this node takes changes")
	}
}

// prepare makes the next file of the log before it is needed. While that fails it retries, and hands leadership to another
// member if there is one.
func (g *diskGuard) prepare() {
	var yielded time.Time
	tick := time.NewTicker(fullRetry)
	defer tick.Stop()
	for {
		select {
		case <-g.life.ctx.Done():
			return
		case <-g.logs.Grew():
			if g.full.Load() {
				continue // not at each entry of an election
			}
		case <-tick.C:
		}
		err := g.store.Log.Prepare()
		if err == nil && g.full.Load() {
			err = g.store.Log.Grow(store.Reserve + headroom + packBytes) // more than what was refused for
		}
		if err == nil {
			g.setFull(false, nil)
			continue
		}
		if !wal.Full(err) {
			continue // the next write meets it
		}
		// Nothing is refused before the present file is filled, see ensureRoom.
		if g.full.Load() && g.lib.raft.State() == hraft.Leader && time.Since(yielded) > fullYield {
			yielded = time.Now()
			if err := g.lib.raft.LeadershipTransfer().Error(); err != nil {
				g.log.Info("no other member takes leadership from this one, whose disk is full", "err", err)
			}
		}
	}
}
