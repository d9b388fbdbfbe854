// SPDX-License-Identifier: Apache-2.0

package appliance

import (
	"context"
	"net"
	"sync"
	"time"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/mesh"
)

// joinWait bounds one try to join a tailnet. A try outlives the dial that began it, so that a slow coordinator is not asked
// from the start again by each dial.
const joinWait = time.Minute

// tailnetRoute joins the vendor's tailnet when it is first dialled, and again when the node's key has expired. It listens
// for nothing there. Safe for concurrent use: a dial waits for the join under way as long as its own context allows, and
// holds no lock meanwhile.
type tailnetRoute struct {
	cfg  mesh.TailnetConfig
	life context.Context // ends with close
	stop context.CancelFunc
	work sync.WaitGroup

	mu     sync.Mutex
	node   *mesh.Node
	try    *joinTry // under way; nil for none
	closed bool
}

// joinTry is one try to join; err may be read when done is closed.
type joinTry struct {
	done chan struct{}
	err  error
}

func newTailnetRoute(cfg mesh.TailnetConfig) *tailnetRoute {
	r := &tailnetRoute{cfg: cfg}
	r.life, r.stop = context.WithCancel(context.Background())
	return r
}

// Name implements [mesh.Route].
func (*tailnetRoute) Name() string { return mesh.NameTailscale }

// Dial implements [mesh.Route].
func (r *tailnetRoute) Dial(ctx context.Context, addr string) (net.Conn, error) {
	n, err := r.up(ctx)
	if err != nil {
		return nil, err
	}
	return n.Dial(ctx, addr)
}

// up gives the node, joined.
func (r *tailnetRoute) up(ctx context.Context) (*mesh.Node, error) {
	const op = "appliance.tailnet"
	for {
		r.mu.Lock()
		if r.closed {
			r.mu.Unlock()
			return nil, fault.New(op, fault.Unavailable, "this appliance is stopping")
		}
		if n := r.node; n != nil && !isClosed(n.Gone()) {
			r.mu.Unlock()
			return n, nil
		}
		if r.try == nil {
			r.try = &joinTry{done: make(chan struct{})}
			old, try := r.node, r.try
			r.node = nil
			r.work.Go(func() { r.join(old, try) })
		}
		try := r.try
		r.mu.Unlock()
		select {
		case <-try.done:
			if try.err != nil {
				return nil, try.err
			}
		case <-ctx.Done():
			return nil, fault.Because(ctx.Err(), op, fault.Unavailable, "the vendor's tailnet is not joined yet: its coordinator does not answer, or does not let the node in")
		}
	}
}

func (r *tailnetRoute) join(old *mesh.Node, try *joinTry) {
	if old != nil {
		_ = old.Close() // its key has expired
	}
	ctx, cancel := context.WithTimeout(r.life, joinWait)
	defer cancel()
	n, err := mesh.Join(ctx, r.cfg)
	r.mu.Lock()
	r.node, r.try, try.err = n, nil, err
	r.mu.Unlock()
	close(try.done)
}

func isClosed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// close takes the node off the tailnet and ends a join under way.
func (r *tailnetRoute) close() {
	r.mu.Lock()
	r.closed = true
	r.mu.Unlock()
	r.stop()
	r.work.Wait()
	r.mu.Lock()
	n := r.node
	r.node = nil
	r.mu.Unlock()
	if n != nil {
		_ = n.Close()
	}
}
