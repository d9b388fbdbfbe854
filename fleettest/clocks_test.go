// SPDX-License-Identifier: Apache-2.0

package fleettest

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/demarc-dev/demarc/api"
	controlv1 "github.com/demarc-dev/demarc/api/control/v1"
	"github.com/demarc-dev/demarc/daemon/controlplane"
	"github.com/demarc-dev/demarc/daemon/controlplane/book"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/ledger"
	"github.com/demarc-dev/demarc/raft"
)

// world is what goes wrong around the nodes of a trio: their clocks, the wires between them, and a node that is paused.
type world struct {
	mu    *sync.Mutex
	skew  map[string]time.Duration
	older map[string]bool // nodes that judge no stamps, as the build before did
	away  map[string]bool // nodes that no peer reaches
	wires map[net.Conn][2]string
	holds map[string]*holder
}

func newWorld() world {
	return world{&sync.Mutex{}, map[string]time.Duration{}, map[string]bool{}, map[string]bool{}, map[net.Conn][2]string{},
		map[string]*holder{}}
}

// set moves a node's clock.
func (w *world) set(node string, by time.Duration) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.skew[node] = by
}

// old has nodes behave as the build before: they stamp by their own clocks, and judge nothing.
func (w *world) old(is bool, nodes ...string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, n := range nodes {
		w.older[n] = is
	}
}

func (w *world) isOld(node string) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.older[node]
}

// dial brings a node to a peer, unless one of them is away.
func (w *world) dial(ctx context.Context, from, addr string, to func(context.Context, string) (net.Conn, error)) (net.Conn, error) {
	name, _, _ := strings.Cut(addr, ":")
	w.mu.Lock()
	away := w.away[from] || w.away[name]
	w.mu.Unlock()
	if away {
		return nil, fault.New("fleettest.dial", fault.Unavailable, "no way to %s", addr)
	}
	c, err := to(ctx, addr)
	if err == nil {
		w.mu.Lock()
		defer w.mu.Unlock()
		w.wires[c] = [2]string{from, name}
	}
	return c, err
}

// cut keeps all peers from a node, and breaks what it has with them.
func (w *world) cut(node string, on bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.away[node] = on
	for c, ends := range w.wires {
		if on && (ends[0] == node || ends[1] == node) {
			_ = c.Close()
			delete(w.wires, c)
		}
	}
}

// voters is the clock of a node, and what it knows of the others'.
type voters struct {
	world *world
	node  string
	raft  atomic.Pointer[raft.Node]
}

func (v *voters) up(n *raft.Node) { v.raft.Store(n) }

func (v *voters) own() time.Time {
	v.world.mu.Lock()
	defer v.world.mu.Unlock()
	return time.Now().Add(v.world.skew[v.node])
}

func (v *voters) Now() time.Time {
	if n := v.raft.Load(); n != nil && !v.world.isOld(v.node) {
		return n.Now()
	}
	return v.own()
}

func (v *voters) Agreed() (time.Time, int) {
	if n := v.raft.Load(); n != nil && !v.world.isOld(v.node) {
		return n.Agreed()
	}
	return time.Time{}, 0
}

func (v *voters) voting() book.Voting {
	if n := v.raft.Load(); n != nil && !v.world.isOld(v.node) {
		return n
	}
	return nil
}

func aboutOf(book *ledger.Book[book.State]) []byte {
	b, err := json.Marshal(map[string]any{"build": "test", "knows": book.Kinds()})
	if err != nil {
		panic(err) // of strings
	}
	return b
}

// call asks a node as an operator does.
func call[Res any](c *trio, node string,
	do func(ctx context.Context, s *controlplane.Server) (*connect.Response[Res], error)) (*Res, error) {
	c.mu.Lock()
	p := c.peers[node]
	c.mu.Unlock()
	ctx := api.With(context.Background(),
		api.Who{Class: api.Operator, Rank: fleet.Admin, Principal: fleet.PrincipalOf(Domain, fleet.Operator, "ops")})
	res, err := do(ctx, p.server)
	if err != nil {
		return nil, err
	}
	return res.Msg, nil
}

func (c *trio) customer(node, request, name string) error {
	_, err := call(c, node, func(ctx context.Context, s *controlplane.Server) (*connect.Response[controlv1.RegisterCustomerResponse], error) {
		return s.RegisterCustomer(ctx, connect.NewRequest(&controlv1.RegisterCustomerRequest{RequestId: request, Name: name}))
	})
	return err
}

// leads names the leader that all nodes know.
func (c *trio) leads() string {
	c.t.Helper()
	var name string
	c.Wait("a leader", time.Minute, func() bool {
		c.mu.Lock()
		defer c.mu.Unlock()
		for _, p := range c.peers {
			id, ok := p.raft.Leader()
			if !ok || name != "" && name != id {
				name = ""
				return false
			}
			name = id
		}
		return name != "" && c.peers[name].raft.State().Role == "leader"
	})
	return name
}

func (c *trio) node(name string) *peer {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.peers[name]
}

// A node whose clock jumps far ahead, the leader or another one, goes on taking changes, stamped with the others' time: so
// the book forgets nothing, and a request that is repeated after it is not done twice.
func TestThreeNodesClockJump(t *testing.T) {
	for _, who := range []string{"the leader", "a follower"} {
		t.Run(who, func(t *testing.T) {
			playTrio(t, func(t *testing.T, c *trio) {
				bad := c.leads()
				other := c.members[0].Name
				if other == bad {
					other = c.members[1].Name
				}
				if who == "a follower" {
					bad, other = other, bad
				}
				c.must(c.customer(other, "first", "initech"))
				c.world.set(bad, 10*time.Hour)
				for i := range 30 {
					c.must(c.customer(bad, "", "jumped-"+string(rune('a'+i%26))+string(rune('a'+i/26))))
					time.Sleep(time.Second)
				}
				if d := time.Until(c.node(other).book.At()).Abs(); d > time.Minute {
					t.Errorf("the book's time is %s off", d)
				}
				size := c.node(other).book.Log().Size()
				c.must(c.customer(other, "first", "initech")) // done again, it would say that there is one already
				c.must(c.customer(bad, "first", "initech"))
				if now := c.node(other).book.Log().Size(); now != size {
					t.Errorf("%d more entries", now-size)
				}
				if now := c.leads(); now == bad {
					t.Error("the node whose clock is off leads")
				}
				if err := c.node(bad).raft.Clock(); !errors.Is(err, fault.Unavailable) {
					t.Errorf("it says of its clock: %v", err)
				}
			})
		})
	}
}

// A book whose time was lifted by a build that judged no stamps goes on: in its clusters of more than one node it is set back
// on record after 10 minutes, and appliances enrol again, whose nonces had run out before they were made.
func TestThreeNodesLiftedBook(t *testing.T) {
	playTrio(t, func(t *testing.T, c *trio) {
		all := []string{"cp-1", "cp-2", "cp-3"}
		c.world.old(true, all...)
		c.world.set("cp-1", 10*time.Hour)
		c.must(c.customer("cp-1", "lift", "lifted"))
		c.world.set("cp-1", 0)
		c.world.old(false, all...)
		ahead := func() time.Duration { return time.Until(c.node(c.leads()).book.At()) }
		if d := ahead(); d < 9*time.Hour {
			t.Fatalf("the book is %s ahead: nothing is tested", d)
		}
		c.must(c.customer("cp-2", "meanwhile", "meanwhile")) // it takes changes all the time
		took := c.Wait("the book's time is set back", 15*time.Minute, func() bool { return ahead() < time.Minute })
		if took < 9*time.Minute {
			t.Errorf("it was set back after %s: nonces that were spent before may not have lapsed", took)
		}
		var found bool
		log := c.node(c.leads()).book.Log()
		for i := range log.Size() {
			found = found || bytes.Contains(log.Entry(i), []byte(`"book.time/1"`))
		}
		if !found {
			t.Error("it is not on record")
		}
		size := c.Size()
		for _, r := range []string{"lift", "meanwhile"} { // by the book's time they are just now
			name := map[string]string{"lift": "lifted", "meanwhile": "meanwhile"}[r]
			c.must(c.customer("cp-3", r, name))
		}
		if c.Size() != size {
			t.Error("a repeated request was done again")
		}
		a := c.AddAppliance("eu-1")
		a.Start()
		a.WaitUp(time.Minute)
		a.Stop()
	})
}

// holder holds a node up: the library's loop of a leader ends up in its logger, where it begins a change of the members.
type holder struct {
	slog.Handler
	armed   atomic.Bool
	held    chan struct{}
	release chan struct{}
}

func (*holder) Enabled(context.Context, slog.Level) bool { return true }

func (h *holder) Handle(ctx context.Context, r slog.Record) error {
	if strings.Contains(r.Message, "updating configuration") && h.armed.CompareAndSwap(true, false) {
		close(h.held)
		<-h.release
	}
	if h.Handler.Enabled(ctx, r.Level) {
		return h.Handler.Handle(ctx, r)
	}
	return nil
}

func (w *world) logger(node string, log *slog.Logger) *slog.Logger {
	h := &holder{Handler: log.Handler(), held: make(chan struct{}), release: make(chan struct{})}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.holds[node] = h
	return slog.New(h)
}

// The API of a leader that was paused, while another was elected and took changes, is asked at the moment at which it wakes:
// it must not answer from its old book. This runs in real time: a lock of the library's logger is held meanwhile.
func TestThreeNodesOldLeaderWakes(t *testing.T) {
	c := newTrio(t, raft.Timing{})
	old := c.leads()
	c.must(c.customer(old, "before", "before"))
	list := func(node string, wait time.Duration) (int64, error) {
		st, err := call(c, node, func(ctx context.Context, s *controlplane.Server) (*connect.Response[controlv1.StatusResponse], error) {
			ctx, cancel := context.WithTimeout(ctx, wait)
			defer cancel()
			return s.Status(ctx, connect.NewRequest(&controlv1.StatusRequest{}))
		})
		return st.GetAuditSize(), err
	}
	if _, err := list(old, 20*time.Second); err != nil { // it has settled in its term
		t.Fatal(err)
	}
	h := c.world.holds[old]
	h.armed.Store(true)
	var wg sync.WaitGroup
	wg.Go(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
		defer cancel()
		_ = c.node(old).raft.Change(ctx, raft.Change{Do: raft.Add, ID: "cp-4", Addr: "cp-4:1"}) // it may or may not happen
	})
	release := sync.OnceFunc(func() { close(h.release) })
	defer wg.Wait()
	defer release()
	<-h.held
	c.world.cut(old, true)
	other := "cp-1"
	if other == old {
		other = "cp-2"
	}
	c.Wait("the others elect", time.Minute, func() bool { id, ok := c.node(other).raft.Leader(); return ok && id != old })
	c.must(c.customer(other, "new", "new"))
	size, err := list(other, 20*time.Second)
	c.must(err)
	c.world.cut(old, false)
	if c.node(old).raft.State().Role != "leader" {
		t.Fatal("the old leader knows already: nothing is tested")
	}
	if got, err := list(old, time.Second); err == nil && got < size {
		t.Errorf("the API of the old leader shows a log of %d entries, after %d were shown", got, size)
	}
	release()
	wg.Wait()
	if got, err := list(old, 20*time.Second); err != nil || got < size {
		t.Errorf("later: %d of %d entries, %v", got, size, err)
	}
}
