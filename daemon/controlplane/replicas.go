// SPDX-License-Identifier: Apache-2.0

package controlplane

import (
	"context"
	"crypto/tls"
	"net"
	"net/http"
	"sync"
	"time"

	"connectrpc.com/connect"

	"github.com/demarc-dev/demarc/api"
	boundaryv1 "github.com/demarc-dev/demarc/api/boundary/v1"
	"github.com/demarc-dev/demarc/api/boundary/v1/boundaryv1connect"
	controlv1 "github.com/demarc-dev/demarc/api/control/v1"
	"github.com/demarc-dev/demarc/api/control/v1/controlv1connect"
	"github.com/demarc-dev/demarc/daemon/controlplane/book"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
)

const (
	nodeDial  = 3 * time.Second // for another node to take a connection
	nodeIdle  = time.Minute     // after which a connection to another node is closed
	nodePing  = 5 * time.Second // of silence on it, before the other node is asked whether it is there
	holdStall = 15 * time.Second
)

// nodeWays is the ways to the other nodes, one connection each, made when it is needed.
type nodeWays struct {
	dial func(ctx context.Context, network, addr string) (net.Conn, error) // nil: TCP
	conf func(node string) *tls.Config

	mu sync.Mutex
	of map[string]*wayTo
}

// wayTo is the way to one node. It implements [Remote].
type wayTo struct {
	addr   string
	way    *http.Transport
	bytes  boundaryv1connect.BoundaryClient
	copies controlv1connect.ReplicasClient
}

// Reach has this server's node bring artifacts from the other nodes, which must prove themselves as conf wants it. It is called
// once, before the server is used.
func (s *Server) Reach(conf func(node string) *tls.Config) {
	s.depot.reach = (&nodeWays{dial: s.Dial, conf: conf, of: map[string]*wayTo{}}).to
}

// TendArtifacts keeps the artifacts that the book's releases name on this node, until ctx ends.
func (s *Server) TendArtifacts(ctx context.Context, ready func()) error {
	if s.depot.store == nil {
		ready()
		<-ctx.Done()
		return nil
	}
	return s.depot.run(ctx, ready)
}

// to is the way to a node, wherever it is now.
func (h *nodeWays) to(m book.Member) Remote {
	h.mu.Lock()
	defer h.mu.Unlock()
	if w := h.of[m.Name]; w != nil {
		if w.addr == m.API {
			return w
		}
		w.way.CloseIdleConnections()
	}
	dial := h.dial
	if dial == nil {
		dial = new(net.Dialer).DialContext
	}
	tr := &http.Transport{TLSClientConfig: h.conf(m.Name), TLSHandshakeTimeout: nodeDial, IdleConnTimeout: nodeIdle,
		HTTP2: &http.HTTP2Config{SendPingTimeout: nodePing, PingTimeout: nodePing}, Protocols: new(http.Protocols),
		DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
			ctx, cancel := context.WithTimeout(ctx, nodeDial)
			defer cancel()
			return dial(ctx, network, addr)
		}}
	tr.Protocols.SetHTTP2(true)
	c := &http.Client{Transport: api.Sent(tr)}
	w := &wayTo{m.API, tr, boundaryv1connect.NewBoundaryClient(c, "https://"+m.API, connect.WithReadMaxBytes(1<<20)),
		controlv1connect.NewReplicasClient(c, "https://"+m.API, connect.WithReadMaxBytes(64<<10))}
	h.of[m.Name] = w
	return w
}

// Fetch implements [Remote].
func (w *wayTo) Fetch(ctx context.Context, d fleet.Digest, offset int64, give func(total int64, piece []byte) error) error {
	const op = "controlplane.fetch"
	stream, err := w.bytes.Artifact(ctx, connect.NewRequest(&boundaryv1.ArtifactRequest{Digest: string(d), Offset: offset}))
	if err != nil {
		return api.FromWire(op, err)
	}
	defer stream.Close()
	for stream.Receive() {
		if err := give(stream.Msg().GetTotal(), stream.Msg().GetData()); err != nil {
			return err
		}
	}
	return api.FromWire(op, stream.Err())
}

// Hold implements [Remote].
func (w *wayTo) Hold(ctx context.Context, d fleet.Digest, from []string, told func(arrived int64)) error {
	const op = "controlplane.Hold"
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stalled := time.AfterFunc(holdStall, cancel)
	defer stalled.Stop()
	stream, err := w.copies.Hold(ctx, connect.NewRequest(&controlv1.HoldRequest{Digest: string(d), From: from}))
	if err != nil {
		return api.FromWire(op, err)
	}
	defer stream.Close()
	for stream.Receive() {
		stalled.Reset(holdStall)
		if stream.Msg().GetHeld() {
			return nil
		}
		told(stream.Msg().GetArrived())
	}
	if err := stream.Err(); err != nil {
		return api.FromWire(op, err)
	}
	return fault.New(op, fault.Unavailable, "it ended before it had all of it")
}
