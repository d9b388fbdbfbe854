// SPDX-License-Identifier: Apache-2.0

package raft

import (
	"sync"
	"sync/atomic"
	"time"

	hraft "github.com/hashicorp/raft"

	"github.com/demarc-dev/demarc/fault"
)

// A leader writes to its disk while its followers write to theirs (Ongaro, Consensus: Bridging Theory and Practice, 10.2.1).
// The library has a leader write first and send then. So it is told that an entry with proposals is written when it is in the
// file, and this file syncs it meanwhile. The library then counts the leader's own copy too early, and takes for committed
// what may be on the disks of one less than a majority. Two gates hold back what would follow from that, until it is on the
// leader's own disk too, and with that on a majority's:
//
//   - The machine applies nothing that is not on this disk. Proposals are answered by the machine, and reads wait for it.
//   - Followers are told of nothing as committed that is not on this disk.
//
// What else the library does with a commit, an election or a change of members, stands in entries of other types; these are
// synced before it hears of them, with all before them. A node that lost the lead may still hold entries that are not on its
// disk, and say to the next leader that it has them. That counts for nothing: a leader commits by counting copies of
// entries of its own term, and such an entry is synced by a follower, with all before it, before it says so.
//
// A leader that crashes loses what it had not synced. Nobody was told of it but followers, and for them it is an entry of a leader that
// is gone. The same place in the same term is never given to another entry: the term, which is on disk before, is never
// led again by the one that voted for itself in it.

// diskLog is a log that can be written now and synced later.
type diskLog interface {
	hraft.LogStore
	WriteLogs([]*hraft.Log) error // StoreLogs without the wait for the disk
	Sync() error                  // what was written before the call is on disk
	Synced() uint64               // the index up to which it is
}

// watched is a log store that knows since when a write has been going on, and lets the entries of a leader be synced late.
type watched struct {
	diskLog
	wrote func(time.Duration) // every write or sync that returned
	fail  func(error)         // the log takes nothing more
	grew  chan struct{}       // something was written
	began atomic.Int64        // Unix nanoseconds, 0: no write is going on
	syncs atomic.Int64        // the same of a late sync
	lib   atomic.Pointer[hraft.Raft]

	late chan struct{} // holds a token while something waits for a sync
	stop chan struct{}
	done sync.WaitGroup

	mu    sync.Mutex
	moved chan struct{} // closed when more is on disk
}

func newWatched(l diskLog, wrote func(time.Duration), fail func(error)) *watched {
	w := &watched{diskLog: l, wrote: wrote, fail: fail, grew: make(chan struct{}, 1), late: make(chan struct{}, 1), stop: make(chan struct{}), moved: make(chan struct{})}
	w.done.Go(w.syncLate)
	return w
}

// close ends the late syncs. What was written is synced before.
func (w *watched) close() {
	if w != nil {
		close(w.stop)
		w.done.Wait()
	}
}

// since is when the write or sync began that has been going on for longest, zero where none is.
func (w *watched) since() time.Time {
	a, b := w.began.Load(), w.syncs.Load()
	switch {
	case a == 0 && b == 0:
		return time.Time{}
	case a == 0 || b != 0 && b < a:
		a = b
	}
	return time.Unix(0, a)
}

// StoreLogs implements hraft.LogStore; the library calls it from one goroutine. It returns when the entries are on disk, except
// on a leader where all of them are proposals.
func (w *watched) StoreLogs(logs []*hraft.Log) error {
	late := w.leads(logs)
	err := w.timed(&w.began, late, func() error {
		if late {
			return w.diskLog.WriteLogs(logs)
		}
		return w.diskLog.StoreLogs(logs)
	})
	if late && err == nil {
		wake(w.late)
	} else {
		w.announce()
	}
	wake(w.grew)
	return err
}

// leads tells whether entries are proposals that this node puts into the log as the leader. The library changes the state in
// the goroutine that writes.
func (w *watched) leads(logs []*hraft.Log) bool {
	for _, l := range logs {
		if l.Type != hraft.LogCommand {
			return false
		}
	}
	lib := w.lib.Load()
	return lib != nil && lib.State() == hraft.Leader
}

// timed does something with the disk, by the clock that watchDisk reads.
func (w *watched) timed(began *atomic.Int64, late bool, do func() error) error {
	begin := time.Now()
	began.Store(begin.UnixNano())
	err := do()
	began.Store(0)
	if !late {
		w.wrote(time.Since(begin))
	}
	if err != nil && fault.Of(err) == fault.Internal {
		w.fail(err)
	}
	return err
}

// StoreLog implements hraft.LogStore.
func (w *watched) StoreLog(l *hraft.Log) error { return w.StoreLogs([]*hraft.Log{l}) }

// IsMonotonic tells hashicorp/raft that a log with a gap must be emptied before a snapshot takes its place.
func (w *watched) IsMonotonic() bool { return true }

// syncLate syncs what a leader wrote. Whatever is written during one sync shares the next.
func (w *watched) syncLate() {
	for {
		select {
		case <-w.stop:
			return
		case <-w.late:
		}
		if w.timed(&w.syncs, false, w.Sync) != nil {
			return // the log is broken, and the node ends
		}
		w.announce()
	}
}

func (w *watched) announce() {
	w.mu.Lock()
	defer w.mu.Unlock()
	close(w.moved)
	w.moved = make(chan struct{})
}

// wait returns when the log is on disk up to index, or end is closed.
func (w *watched) wait(index uint64, end <-chan struct{}) bool {
	for w.Synced() < index {
		w.mu.Lock()
		moved := w.moved
		w.mu.Unlock()
		if w.Synced() >= index {
			return true
		}
		select {
		case <-moved:
		case <-end:
			return false
		}
	}
	return true
}

func wake(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// telling is a transport that tells followers of no commit that is not on this disk. They hear of it with the next entry,
// or within [Timing].Commit.
type telling struct {
	*hraft.NetworkTransport
	synced func() uint64
}

// AppendEntries implements hraft.Transport.
func (t telling) AppendEntries(id hraft.ServerID, target hraft.ServerAddress, args *hraft.AppendEntriesRequest, resp *hraft.AppendEntriesResponse) error {
	args.LeaderCommitIndex = min(args.LeaderCommitIndex, t.synced())
	return t.NetworkTransport.AppendEntries(id, target, args, resp)
}

// AppendEntriesPipeline implements hraft.Transport.
func (t telling) AppendEntriesPipeline(id hraft.ServerID, target hraft.ServerAddress) (hraft.AppendPipeline, error) {
	p, err := t.NetworkTransport.AppendEntriesPipeline(id, target)
	if err != nil {
		return nil, err
	}
	return tellingPipeline{p, t.synced}, nil
}

type tellingPipeline struct {
	hraft.AppendPipeline
	synced func() uint64
}

// AppendEntries implements hraft.AppendPipeline.
func (p tellingPipeline) AppendEntries(args *hraft.AppendEntriesRequest, resp *hraft.AppendEntriesResponse) (hraft.AppendFuture, error) {
	args.LeaderCommitIndex = min(args.LeaderCommitIndex, p.synced())
	return p.AppendPipeline.AppendEntries(args, resp)
}
