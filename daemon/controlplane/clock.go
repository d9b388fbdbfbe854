// SPDX-License-Identifier: Apache-2.0

package controlplane

import (
	"context"
	"time"

	"github.com/demarc-dev/demarc/daemon/controlplane/book"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/ledger"
	"github.com/demarc-dev/demarc/raft"
)

// Clocks are those of the voters.
type Clocks interface {
	// Agreed is what a majority of them says, and how many agree; 0 where that is not known.
	Agreed() (time.Time, int)
}

// When the book's time is set back. The wait is longer than the life of a nonce: one that was spent before the time was
// lifted has lapsed when it is set back, whatever the book says.
const (
	timeEvery = 10 * time.Second
	timeWait  = 10 * time.Minute
)

// TendTime sets the book's time back where it is ahead of what the voters' clocks agree upon, until ctx ends: an older
// build took the time of a node whose clock was ahead, and from then on invitations and nonces had run out before they were
// made. It does so as the leader, when that has been so for 10 minutes, and two clocks at the least agree: a single node has
// nobody to ask, and its book waits until its clock is there.
func (s *Server) TendTime(ctx context.Context) error {
	tick := time.NewTicker(timeEvery)
	defer tick.Stop()
	var since time.Time
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		if s.Clocks == nil || s.replica.Leader() != s.replica.Node {
			since = time.Time{}
			continue
		}
		now, agree := s.Clocks.Agreed()
		at := s.replica.Book.At()
		switch {
		case agree < 2 || at.Sub(now) <= raft.MaxStamp:
			since = time.Time{}
			continue
		case since.IsZero():
			since = time.Now()
			s.log.Warn("the book's time is ahead of the voters' clocks: it is set back, if it stays so", "book", at, "clocks", now, "in", timeWait)
		}
		if time.Since(since) < timeWait {
			continue
		}
		if err := s.setTime(ctx, at, now); err != nil {
			s.log.Warn("the book's time is not set back", "err", fault.Text(err))
			continue
		}
		since = time.Time{}
		s.log.Warn("the book's time is set back", "from", at, "to", now)
	}
}

func (s *Server) setTime(ctx context.Context, from, to time.Time) error {
	ctx, cancel := context.WithTimeout(ctx, timeEvery)
	defer cancel()
	c := ledger.SetTime[book.State]{From: from, To: to.UTC()}
	_, err := ledger.Submit(ctx, s.replica.Consensus, c.Meta(s.replica.Self(), book.DrawRequestID()), c)
	return err
}

// now is the time that this node stamps with: see [raft.Node.Now].
func (n *node) now() time.Time {
	if !n.up.Load() {
		return time.Now()
	}
	return n.raft.Now()
}

// Agreed implements [Clocks].
func (n *node) Agreed() (time.Time, int) { return n.raft.Agreed() }
