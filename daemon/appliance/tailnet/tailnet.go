// SPDX-License-Identifier: Apache-2.0

// Package tailnet is a node that joins a tailnet when it is first needed, and again after its key has expired.
package tailnet

import (
	"context"
	"net"
	"sync"
	"time"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/mesh"
)

// joinWait bounds one try to join a tailnet. A try outlives the dial that began it, so that dials do not start over with a slow
// coordinator.
const joinWait = time.Minute

// Node is a node that joins a tailnet when it is first needed, and again when its key has expired. Its methods may be called
// concurrently: a caller waits for the join in progress as long as its own context allows, without a lock.
type Node struct {
	whose string // tailnet, in errors
	cfg   mesh.TailnetConfig
	life  context.Context // ends with stop
	Stop  context.CancelFunc
	work  sync.WaitGroup

	mu     sync.Mutex
	node   *mesh.Node
	try    *joinTry // under way; nil for none
	failed error    // of the last try that ended; nil after a success
	closed bool
}

// joinTry is one try to join; err may be read when done is closed.
type joinTry struct {
	done chan struct{}
	err  error
}

// New makes a node; whose names the tailnet in errors. It joins when it is first needed.
func New(whose string, cfg mesh.TailnetConfig) *Node {
	r := &Node{whose: whose, cfg: cfg}
	r.life, r.Stop = context.WithCancel(context.Background())
	return r
}

// Transport is the transport over the vendor's tailnet. Its node does not listen there.
type Transport struct{ *Node }

// NewTransport makes the transport over the vendor's tailnet.
func NewTransport(cfg mesh.TailnetConfig) Transport {
	return Transport{New("the vendor's tailnet", cfg)}
}

// Name implements [mesh.Route].
func (Transport) Name() string { return mesh.NameTailscale }

// Dial implements [mesh.Route].
func (r Transport) Dial(ctx context.Context, addr string) (net.Conn, error) {
	n, err := r.Up(ctx)
	if err != nil {
		return nil, err
	}
	return n.Dial(ctx, addr)
}

// Up returns the node, joined.
func (r *Node) Up(ctx context.Context) (*mesh.Node, error) {
	const op = "appliance.tailnet"
	for {
		r.mu.Lock()
		if r.closed || r.life.Err() != nil {
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
			if err := r.Err(); mesh.ReasonOf(err).NeedsHuman() {
				return nil, err // of the last try: this one may fail in the same way
			}
			return nil, mesh.For(mesh.TailnetUnreached, fault.Because(ctx.Err(), op, fault.Unavailable,
				"%s is not joined yet: its coordinator does not answer, or does not let the node in", r.whose))
		}
	}
}

func (r *Node) join(old *mesh.Node, try *joinTry) {
	if old != nil {
		_ = old.Close() // its key has expired
	}
	ctx, cancel := context.WithTimeout(r.life, joinWait)
	defer cancel()
	n, err := mesh.Join(ctx, r.cfg)
	r.mu.Lock()
	r.node, r.try, try.err, r.failed = n, nil, err, err
	r.mu.Unlock()
	close(try.done)
}

// Joining reports whether a try to join is in progress.
func (r *Node) Joining() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.try != nil
}

// Err returns the error of the last try to join; nil if it succeeded, or there was none.
func (r *Node) Err() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.failed
}

// Joined returns the node if it is up, else nil. It does not wait.
func (r *Node) Joined() *mesh.Node {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.node == nil || isClosed(r.node.Gone()) {
		return nil
	}
	return r.node
}

func isClosed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// Close takes the node off the tailnet and ends a join in progress.
func (r *Node) Close() {
	r.mu.Lock()
	r.closed = true
	r.mu.Unlock()
	r.Stop()
	r.work.Wait()
	r.mu.Lock()
	n := r.node
	r.node = nil
	r.mu.Unlock()
	if n != nil {
		_ = n.Close()
	}
}
