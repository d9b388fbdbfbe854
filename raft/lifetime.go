// SPDX-License-Identifier: Apache-2.0

package raft

import (
	"context"
	"errors"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/raft/forward"
)

// lifetime is the goroutines of a node, and its end.
type lifetime struct {
	ctx   context.Context // ends when all that was given to the library has been answered
	stop  context.CancelFunc
	work  sync.WaitGroup // ends with ctx, and needs the library to run until then
	tasks sync.WaitGroup // ends with ctx

	once    sync.Once
	closing chan struct{} // closed when the node takes nothing new
	ended   chan struct{} // closed when nothing is left
	err     error         // of the end; read after ended
}

func newLifetime() *lifetime {
	l := &lifetime{closing: make(chan struct{}), ended: make(chan struct{})}
	l.ctx, l.stop = context.WithCancel(context.Background())
	return l
}

// close makes the node take nothing new, and end.
func (l *lifetime) close() { l.once.Do(func() { close(l.closing) }) }

// retry calls f again while it fails without having done anything, until ctx ends.
func (l *lifetime) retry(ctx context.Context, f func() error) error {
	wait := 10 * time.Millisecond
	for {
		err := f()
		if !retryable(err) {
			return err
		}
		t := time.NewTimer(wait/2 + rand.N(wait))
		select {
		case <-ctx.Done():
			t.Stop()
			return fault.Because(errors.Join(ctx.Err(), err), "raft.retry", fault.Unavailable,
				"no leader was found in time: a majority of the nodes must be up and reach each other")
		case <-l.closing:
			t.Stop()
			return errClosing
		case <-t.C:
		}
		wait = min(2*wait, 200*time.Millisecond)
	}
}

// retryable reports whether nothing was done, and the same may succeed in a moment.
func retryable(err error) bool {
	switch fault.Of(err) {
	case fault.NotLeader, fault.Unavailable:
		return !forward.IsPermanent(err) && !errors.Is(err, errClosing) && !errors.Is(err, forward.ErrClosed)
	}
	return false
}

// wake puts a token into a channel that has room for one.
func wake(c chan<- struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}
