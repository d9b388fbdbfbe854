// SPDX-License-Identifier: Apache-2.0

package controlplane

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sync/errgroup"

	"github.com/demarc-dev/demarc/api"
	boundaryv1 "github.com/demarc-dev/demarc/api/boundary/v1"
	controlv1 "github.com/demarc-dev/demarc/api/control/v1"
	"github.com/demarc-dev/demarc/api/control/v1/controlv1connect"
	"github.com/demarc-dev/demarc/daemon/controlplane/book"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/manifest"
	"github.com/demarc-dev/demarc/raft"
)

// Bounds of how a node has others take an artifact.
const (
	replicateStall = 30 * time.Second // in which no node gets further, before it is given up
	holdAgain      = time.Second      // after a node that failed
	publishWait    = 7 * time.Second  // for the artifacts of a release, within one call
	maxHolders     = 16               // names of nodes in one message
)

// copies is how far the nodes are with one artifact. Its methods may be called concurrently.
type copies struct {
	mu     sync.Mutex
	all    []*controlv1.ArtifactCopy
	needed int
	size   int64
	moved  time.Time     // when a node got further last
	news   chan struct{} // holds a token where something is new
}

// note takes what is new of one node.
func (c *copies) note(one *controlv1.ArtifactCopy, arrived int64, held bool, trouble string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if held || arrived > one.GetArrived() {
		c.moved = time.Now()
	}
	one.Arrived, one.Held, one.Trouble = arrived, held, trouble
	select {
	case c.news <- struct{}{}:
	default:
	}
}

// answer is the state as a message, and whether enough voters have the artifact.
func (c *copies) answer() (m *controlv1.ReplicateArtifactResponse, enough bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	m = &controlv1.ReplicateArtifactResponse{Needed: uint32(c.needed), Size: c.size}
	voters := 0
	for _, o := range c.all {
		m.Copies = append(m.Copies, &controlv1.ArtifactCopy{Node: o.GetNode(), Voter: o.GetVoter(), Held: o.GetHeld(), Arrived: o.GetArrived(), Trouble: o.GetTrouble()})
		if o.GetVoter() && o.GetHeld() {
			voters++
		}
	}
	return m, voters >= c.needed
}

// short says who lacks the artifact and why.
func short(x fleet.Digest, m *controlv1.ReplicateArtifactResponse) error {
	var held, voters int
	var lack []string
	for _, o := range m.GetCopies() {
		if o.GetVoter() {
			voters++
		}
		switch {
		case o.GetHeld() && o.GetVoter():
			held++
		case o.GetVoter() && o.GetTrouble() != "":
			lack = append(lack, fmt.Sprintf("node %s: %s", o.GetNode(), o.GetTrouble()))
		case o.GetVoter():
			lack = append(lack, fmt.Sprintf("node %s has %d of %d bytes", o.GetNode(), o.GetArrived(), m.GetSize()))
		}
	}
	return fault.New("controlplane.replicate", fault.Unavailable, "artifact %s is on the disks of %d of %d voters, and a release needs %d: %s",
		x.Short(), held, voters, m.GetNeeded(), strings.Join(lack, "; "))
}

// members lists who may hold artifacts, this node included, with who votes.
func (d *depot) members(ctx context.Context) (*copies, map[string]book.Member, error) {
	c, where := &copies{moved: time.Now(), news: make(chan struct{}, 1)}, map[string]book.Member{}
	for _, m := range d.s.replica.Roster() {
		where[m.Name] = m
	}
	add := func(name string, voter bool) {
		c.all = append(c.all, &controlv1.ArtifactCopy{Node: name, Voter: voter})
	}
	if d.s.Cluster == nil {
		for _, m := range d.s.Members {
			add(m.Name, true)
		}
		if len(c.all) == 0 {
			add(d.s.replica.Node, true)
		}
	} else {
		all, err := d.s.Cluster.Members(ctx)
		if err != nil {
			return nil, nil, err
		}
		for _, m := range all.Members {
			add(m.ID, m.Role == raft.Voter)
		}
	}
	voters := 0
	for _, o := range c.all {
		if o.GetVoter() {
			voters++
		}
	}
	c.needed = voters/2 + 1
	return c, where, nil
}

// replicate has the other nodes take an artifact, and tells how far they are, until a majority of the voters has it on disk. The
// others go on by themselves. It fails where no node gets further for a while, or with ctx.
func (d *depot) replicate(ctx context.Context, x fleet.Digest, told func(*controlv1.ReplicateArtifactResponse) error) error {
	if err := d.hold(ctx, x, nil, func(int64) error { return told(&controlv1.ReplicateArtifactResponse{}) }); err != nil {
		return err
	}
	d.want(x)
	c, where, err := d.members(ctx)
	if err != nil {
		return err
	}
	c.size = d.store.Arrived(x)
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	for _, one := range c.all {
		if one.GetNode() == d.s.replica.Node {
			c.note(one, c.size, true, "")
			continue
		}
		wg.Go(func() { d.push(ctx, x, c, one, where[one.GetNode()]) })
	}
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		m, enough := c.answer()
		if err := told(m); err != nil || enough {
			return err
		}
		c.mu.Lock()
		stalled := time.Since(c.moved) > replicateStall
		c.mu.Unlock()
		if stalled || ctx.Err() != nil {
			return short(x, m)
		}
		select {
		case <-c.news:
		case <-tick.C:
		case <-ctx.Done():
		}
	}
}

// push has one node take an artifact, again and again until it has it or ctx ends.
func (d *depot) push(ctx context.Context, x fleet.Digest, c *copies, one *controlv1.ArtifactCopy, m book.Member) {
	if d.reach == nil || m.API == "" {
		c.note(one, 0, false, "it is not known where it serves")
		return
	}
	for ctx.Err() == nil {
		err := d.reach(m).Hold(ctx, x, []string{d.s.replica.Node}, func(arrived int64) { c.note(one, arrived, false, "") })
		if err == nil {
			c.note(one, c.size, true, "")
			return
		}
		if ctx.Err() == nil {
			c.note(one, one.GetArrived(), false, fault.Text(err)) // nobody else writes it
		}
		select {
		case <-ctx.Done():
		case <-time.After(holdAgain):
		}
	}
}

// want marks an artifact that is here as one that a release is about to name: it is not collected meanwhile.
func (d *depot) want(x fleet.Digest) {
	if p, err := d.store.Begin(x); err == nil {
		p.Close()
	}
}

// replicateAll is replicate for the artifacts of a release.
func (d *depot) replicateAll(ctx context.Context, rel manifest.Release) error {
	const op = "controlplane.PublishRelease"
	ctx, cancel := context.WithTimeout(ctx, publishWait)
	defer cancel()
	var g errgroup.Group
	g.SetLimit(fetchesMax)
	for service, x := range rel.Artifacts {
		g.Go(func() error {
			err := x.Check()
			if err == nil {
				err = d.replicate(ctx, x, func(*controlv1.ReplicateArtifactResponse) error { return nil })
			}
			if fault.Of(err) == fault.NotFound {
				return fault.Because(err, op, fault.NotFound, "the artifact of service %q, %s, is on no node: upload it first", fault.Clip(service), x.Short())
			}
			return err
		})
	}
	return g.Wait()
}

// ReplicateArtifact tells how far the nodes are with an artifact, until enough of them have it.
func (s *Server) ReplicateArtifact(ctx context.Context, req *connect.Request[controlv1.ReplicateArtifactRequest], stream *connect.ServerStream[controlv1.ReplicateArtifactResponse]) error {
	x := fleet.Digest(req.Msg.GetDigest())
	if err := s.keeps(x); err != nil {
		return err
	}
	return s.depot.replicate(ctx, x, stream.Send)
}

// keeps refuses a digest that is none, and all of them where this node keeps no artifacts.
func (s *Server) keeps(x fleet.Digest) error {
	if err := x.Check(); err != nil {
		return err
	}
	if s.depot.store == nil {
		return fault.New("controlplane.artifacts", fault.Unavailable, "this node keeps no artifacts")
	}
	return nil
}

// replicas serves the other nodes.
type replicas struct {
	*Server
	controlv1connect.UnimplementedReplicasHandler
}

// Hold brings an artifact here, and tells how far it is.
func (r replicas) Hold(ctx context.Context, req *connect.Request[controlv1.HoldRequest], stream *connect.ServerStream[controlv1.HoldResponse]) error {
	x := fleet.Digest(req.Msg.GetDigest())
	if err := r.keeps(x); err != nil {
		return err
	}
	if len(req.Msg.GetFrom()) > maxHolders {
		return fault.New("controlplane.Hold", fault.Invalid, "%d nodes are named, and %d is the most", len(req.Msg.GetFrom()), maxHolders)
	}
	err := r.depot.hold(ctx, x, req.Msg.GetFrom(), func(arrived int64) error { return stream.Send(&controlv1.HoldResponse{Arrived: arrived}) })
	if err != nil {
		return err
	}
	r.depot.want(x)
	return stream.Send(&controlv1.HoldResponse{Arrived: r.depot.store.Arrived(x), Held: true})
}

// chunk is how much of an artifact one message carries, in bytes.
const chunk = 256 << 10

// UploadArtifact takes an artifact; nothing is kept unless its bytes have the digest that was announced.
func (s *Server) UploadArtifact(ctx context.Context, stream *connect.ClientStream[controlv1.UploadArtifactRequest]) (*connect.Response[controlv1.UploadArtifactResponse], error) {
	if !stream.Receive() {
		if err := stream.Err(); err != nil {
			return nil, err
		}
		return nil, fault.New("controlplane.UploadArtifact", fault.Invalid, "an upload begins with the artifact's digest")
	}
	d := fleet.Digest(stream.Msg().GetDigest())
	if err := s.keeps(d); err != nil {
		return nil, err
	}
	first := true
	n, err := s.depot.store.Put(ctx, d, &pulled{next: func() ([]byte, error) {
		if first {
			first = false
			return stream.Msg().GetData(), nil
		}
		if !stream.Receive() {
			if err := stream.Err(); err != nil {
				return nil, err
			}
			return nil, io.EOF
		}
		return stream.Msg().GetData(), nil
	}})
	if err != nil {
		return nil, err
	}
	s.depot.forget(d) // it was on no node a moment ago, perhaps
	return connect.NewResponse(&controlv1.UploadArtifactResponse{Size: n}), nil
}

// pulled makes a reader of messages.
type pulled struct {
	next func() ([]byte, error)
	rest []byte
}

// Read implements io.Reader.
func (p *pulled) Read(b []byte) (int, error) {
	for len(p.rest) == 0 {
		data, err := p.next()
		if err != nil {
			return 0, err
		}
		p.rest = slices.Clone(data)
	}
	n := copy(b, p.rest)
	p.rest = p.rest[n:]
	return n, nil
}

// Artifact streams an artifact from an offset: to a node, or to an appliance to which a release was offered that names it.
func (s *Server) Artifact(ctx context.Context, req *connect.Request[boundaryv1.ArtifactRequest], stream *connect.ServerStream[boundaryv1.ArtifactChunk]) error {
	const op = "controlplane.Artifact"
	d, who := fleet.Digest(req.Msg.GetDigest()), api.From(ctx)
	if err := s.keeps(d); err != nil {
		return err
	}
	pace := func(int) error { return nil }
	if who.Class == api.Appliance {
		if err := s.offered(who, d); err != nil {
			return err
		}
		_, _, id, _ := who.Principal.Split()
		var done func()
		var err error
		if pace, done, err = s.stream(ctx, fleet.ApplianceID(id)); err != nil {
			return err
		}
		defer done()
		if err := s.depot.bring(ctx, d); err != nil {
			return fault.At(op, "", err)
		}
	}
	f, err := s.depot.store.Get(d)
	if err != nil {
		return fault.At(op, "", err)
	}
	defer f.Close()
	total, off := f.Size(), req.Msg.GetOffset()
	if off < 0 || off > total {
		return fault.New(op, fault.Invalid, "offset %d is outside of the artifact's %d bytes", off, total)
	}
	buf := make([]byte, chunk)
	for first := true; first || off < total; first = false {
		if err := barred(s.replica.View(), who); err != nil {
			return err
		}
		n := min(int64(len(buf)), total-off)
		if err := pace(int(n)); err != nil {
			return err
		}
		if _, err := f.ReadAt(buf[:n], off); err != nil && n > 0 {
			return fault.At(op, fault.Internal, err)
		}
		if err := stream.Send(&boundaryv1.ArtifactChunk{Total: total, Data: buf[:n]}); err != nil {
			return err
		}
		off += n
	}
	return nil
}
