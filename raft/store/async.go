// SPDX-License-Identifier: Apache-2.0

package store

import (
	"sync"
	"sync/atomic"
	"time"

	hraft "github.com/hashicorp/raft"

	"github.com/demarc-dev/demarc/fault"
)

// A leader writes to its disk while its followers write to theirs (Ongaro, Consensus: Bridging Theory and Practice, 10.2.1).
// The library has a leader write first and send then. So StoreLogs returns once an entry with proposals is in the page
// cache; a background fsync follows. The library then counts the leader's own copy too early, and takes for committed what
// may be on the disks of one less than a majority. Two gates hold back what would follow from that, until the entry is on
// the leader's own disk too, and with that on a majority's:
//
//   - The machine applies nothing that is not on this disk: see [Async.WaitSynced]. Proposals are answered by the machine,
//     and reads wait for it.
//   - Followers hear of no commit that is not on this disk: see [ClampCommits].
//
// What else the library does with a commit, an election or a change of members, is in entries of other types; these are
// synced before it hears of them, with all before them. A node that lost leadership may still hold entries that are not on
// its disk, and tell the next leader that it has them. That counts for nothing: a leader commits by counting copies of
// entries of its own term, and such an entry is synced by a follower, with all before it, before it is acknowledged.
//
// A leader that crashes loses what it had not synced. Only followers had heard of it, and for them it is an entry of a
// leader that is gone. The same place in the same term is never given to another entry: the term, which is on disk before,
// is never led again by the node that voted for itself in it.

// BufferedLog is a log that can be written now and synced later.
type BufferedLog interface {
	hraft.LogStore
	WriteLogs([]*hraft.Log) error // StoreLogs without the wait for the disk
	Sync() error                  // what was written before the call is on disk
	Synced() uint64               // the index up to which it is
}

// AsyncConfig is what an asynchronous log calls.
type AsyncConfig struct {
	Wrote func(time.Duration) // after each write or sync, with the time that it took
	Fail  func(error)         // the log takes nothing more
}

// Async is a log store that syncs a leader's proposals in the background, and knows since when a write has been going on.
type Async struct {
	BufferedLog
	cfg AsyncConfig

	grew    chan struct{} // holds a token after a write
	writing atomic.Int64  // Unix nanoseconds of the start of the write that is going on, 0: none is
	syncing atomic.Int64  // the same of a background sync
	raft    atomic.Pointer[hraft.Raft]

	pending chan struct{} // holds a token while something waits for a sync
	stop    chan struct{}
	done    sync.WaitGroup // the background sync

	mu    sync.Mutex
	moved chan struct{} // closed when more is on disk
}

// NewAsync starts the background sync of a log; Close ends it.
func NewAsync(l BufferedLog, cfg AsyncConfig) *Async {
	a := &Async{BufferedLog: l, cfg: cfg, grew: make(chan struct{}, 1), pending: make(chan struct{}, 1), stop: make(chan struct{}),
		moved: make(chan struct{})}
	a.done.Go(a.syncPending)
	return a
}

// Lead sets whose leadership counts. Until then every entry is synced at once.
func (a *Async) Lead(r *hraft.Raft) { a.raft.Store(r) }

// Close ends the background sync, and waits for it. It may be called on nil.
func (a *Async) Close() {
	if a != nil {
		close(a.stop)
		a.done.Wait()
	}
}

// Grew holds a token after a write.
func (a *Async) Grew() <-chan struct{} { return a.grew }

// BusySince is when the write or sync began that has been going on for longest, zero if none is.
func (a *Async) BusySince() time.Time {
	w, s := a.writing.Load(), a.syncing.Load()
	switch {
	case w == 0 && s == 0:
		return time.Time{}
	case w == 0 || s != 0 && s < w:
		w = s
	}
	return time.Unix(0, w)
}

// StoreLogs implements hraft.LogStore; the library calls it from one goroutine. It returns when the entries are on disk,
// except on a leader if all of them are proposals: then it returns when they are written.
func (a *Async) StoreLogs(logs []*hraft.Log) error {
	defer wake(a.grew)
	if a.leadsWith(logs) {
		err := a.timed(&a.writing, false, func() error { return a.WriteLogs(logs) })
		if err == nil {
			wake(a.pending)
		} else {
			a.announce()
		}
		return err
	}
	err := a.timed(&a.writing, true, func() error { return a.BufferedLog.StoreLogs(logs) })
	a.announce()
	return err
}

// leadsWith reports whether entries are proposals that this node puts into the log as the leader. The library changes its
// state in the goroutine that writes.
func (a *Async) leadsWith(logs []*hraft.Log) bool {
	for _, l := range logs {
		if l.Type != hraft.LogCommand {
			return false
		}
	}
	r := a.raft.Load()
	return r != nil && r.State() == hraft.Leader
}

// timed does something with the disk, and notes since when, for [Async.BusySince].
func (a *Async) timed(began *atomic.Int64, observe bool, do func() error) error {
	start := time.Now()
	began.Store(start.UnixNano())
	err := do()
	began.Store(0)
	if observe {
		a.cfg.Wrote(time.Since(start))
	}
	if err != nil && fault.Of(err) == fault.Internal {
		a.cfg.Fail(err)
	}
	return err
}

// StoreLog implements hraft.LogStore.
func (a *Async) StoreLog(l *hraft.Log) error { return a.StoreLogs([]*hraft.Log{l}) }

// IsMonotonic implements hraft.MonotonicLogStore: a log with a gap must be emptied before a snapshot takes its place.
func (a *Async) IsMonotonic() bool { return true }

// syncPending syncs what a leader wrote. Whatever is written during one sync shares the next.
func (a *Async) syncPending() {
	for {
		select {
		case <-a.stop:
			return
		case <-a.pending:
		}
		if a.timed(&a.syncing, true, a.Sync) != nil {
			return // the log is broken, and the node ends
		}
		a.announce()
	}
}

func (a *Async) announce() {
	a.mu.Lock()
	defer a.mu.Unlock()
	close(a.moved)
	a.moved = make(chan struct{})
}

// WaitSynced waits until the log is on disk up to index; false if end was closed before.
func (a *Async) WaitSynced(index uint64, end <-chan struct{}) bool {
	for a.Synced() < index {
		a.mu.Lock()
		moved := a.moved
		a.mu.Unlock()
		if a.Synced() >= index {
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

// wake puts a token into a channel that has room for one.
func wake(c chan<- struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// ClampCommits is a transport that announces no commit beyond synced to followers. They hear of it with the next entry, or
// within the library's CommitTimeout.
func ClampCommits(t *hraft.NetworkTransport, synced func() uint64) hraft.Transport {
	return commitClamp{t, synced}
}

type commitClamp struct {
	*hraft.NetworkTransport
	synced func() uint64
}

// AppendEntries implements hraft.Transport.
func (t commitClamp) AppendEntries(
	id hraft.ServerID, target hraft.ServerAddress, args *hraft.AppendEntriesRequest, resp *hraft.AppendEntriesResponse,
) error {
	args.LeaderCommitIndex = min(args.LeaderCommitIndex, t.synced())
	return t.NetworkTransport.AppendEntries(id, target, args, resp)
}

// AppendEntriesPipeline implements hraft.Transport.
func (t commitClamp) AppendEntriesPipeline(id hraft.ServerID, target hraft.ServerAddress) (hraft.AppendPipeline, error) {
	p, err := t.NetworkTransport.AppendEntriesPipeline(id, target)
	if err != nil {
		return nil, err
	}
	return pipelineClamp{p, t.synced}, nil
}

type pipelineClamp struct {
	hraft.AppendPipeline
	synced func() uint64
}

// AppendEntries implements hraft.AppendPipeline.
func (p pipelineClamp) AppendEntries(args *hraft.AppendEntriesRequest, resp *hraft.AppendEntriesResponse) (hraft.AppendFuture, error) {
	args.LeaderCommitIndex = min(args.LeaderCommitIndex, p.synced())
	return p.AppendPipeline.AppendEntries(args, resp)
}
