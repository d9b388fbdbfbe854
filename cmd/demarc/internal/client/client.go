// SPDX-License-Identifier: Apache-2.0

// Package client calls a vendor's control plane: any node that answers will do.
//
// The promise: a call is made once, however often it is tried. Each try of one call carries the same request id, so that
// a node that lost its answer, or its leadership, gives it again. Who answers is proven by its certificate, never by its
// address.
package client

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"math/rand/v2"
	"net/http"
	"strings"
	"time"

	"connectrpc.com/connect"

	"github.com/demarc-dev/demarc/api"
	"github.com/demarc-dev/demarc/api/control/v1/controlv1connect"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/identity"
)

// RPC is the calls of one node.
type RPC = controlv1connect.ControlClient

// Options is whom to call, and as whom.
type Options struct {
	TrustDomain string
	Nodes       []string // host:port
	Leaf        *tls.Certificate
	Roots       *x509.CertPool
	Timeout     time.Duration // of a call, all tries together
	TryTimeout  time.Duration // of one try, and of silence on a stream; 10 s where it is zero
}

// Control is a control plane. Its methods may be called concurrently, except for Only.
type Control struct {
	Options
	nodes []node
}

type node struct {
	addr string
	rpc  RPC
	http *http.Client
}

// New makes a client. It calls nobody yet.
func New(o Options) (*Control, error) {
	if len(o.Nodes) == 0 {
		return nil, fault.New("client.New", fault.Invalid, "no node of the control plane is known: give --node HOST:PORT, or --context FILE")
	}
	if o.TryTimeout == 0 {
		o.TryTimeout = 10 * time.Second
	}
	c := &Control{Options: o}
	for _, addr := range o.Nodes {
		tr := &http.Transport{
			TLSClientConfig:     identity.Client(identity.Fixed(o.Leaf, o.Roots), identity.WantNode(o.TrustDomain), "h2"),
			TLSHandshakeTimeout: o.TryTimeout,
			HTTP2:               &http.HTTP2Config{SendPingTimeout: 5 * time.Second, PingTimeout: 5 * time.Second},
			Protocols:           new(http.Protocols),
		}
		tr.Protocols.SetHTTP2(true)
		h := &http.Client{Transport: tr}
		c.nodes = append(c.nodes, node{addr: addr, http: h, rpc: controlv1connect.NewControlClient(h, "https://"+addr)})
	}
	return c, nil
}

// Close drops the connections.
func (c *Control) Close() {
	for _, n := range c.nodes {
		n.http.CloseIdleConnections()
	}
}

// Only gives a client of some of the nodes.
func (c *Control) Only(addrs []string) *Control {
	out := &Control{Options: c.Options}
	for _, n := range c.nodes {
		for _, a := range addrs {
			if n.addr == a {
				out.nodes = append(out.nodes, n)
			}
		}
	}
	return out
}

// Do makes a call: a node that is down, that has lost its leader or does not know what came of the call gives way to the
// next, until one answers or the time is over.
func Do[Res any](ctx context.Context, c *Control, op string, call func(context.Context, RPC) (*connect.Response[Res], error)) (*Res, error) {
	var out *Res
	err := c.Try(ctx, op, func(ctx context.Context, rpc RPC) error {
		ctx, cancel := context.WithTimeout(ctx, c.TryTimeout)
		defer cancel()
		res, err := call(ctx, rpc)
		if err == nil {
			out = res.Msg
		}
		return err
	})
	return out, err
}

// Try is Do for calls that are not one question and one answer: do is called again from its beginning.
func (c *Control) Try(ctx context.Context, op string, do func(context.Context, RPC) error) error {
	deadline, cancel := context.WithTimeout(ctx, c.Timeout)
	defer cancel()
	var last error
	for round := 0; ; round++ {
		hope := false
		for _, n := range c.nodes {
			err := c.explain(op, n.addr, do(deadline, n.rpc))
			if err == nil {
				return nil
			}
			if ctx.Err() != nil {
				return fault.Because(ctx.Err(), op, fault.Unavailable, "interrupted")
			}
			again, next := promising(err)
			if !again && !next {
				return err
			}
			// The answer that may have been lost is told rather than that nobody could be reached.
			if last == nil || !errors.Is(last, fault.Unsure) || errors.Is(err, fault.Unsure) {
				last = err
			}
			hope = hope || again
			if deadline.Err() != nil {
				break
			}
		}
		if !hope || !pause(deadline, round) {
			return c.giveUp(op, last)
		}
	}
}

// promising tells whether another try may go better, here or at another node.
func promising(err error) (again, next bool) {
	switch fault.Of(err) {
	case fault.Unavailable, fault.NotLeader, fault.Unsure, fault.Busy:
		return true, true
	}
	return false, errors.Is(err, errNode)
}

// errNode marks what is wrong with one node, and not with the call.
var errNode = errors.New("this node only")

// explain makes a fault of what a node, or the way to it, answered.
func (c *Control) explain(op, addr string, err error) error {
	if err == nil {
		return nil
	}
	var own *fault.Error
	var wire *connect.Error
	ours := errors.As(err, &own)
	switch {
	case !errors.As(err, &wire):
		return fault.At(op, "", err)
	case ours: // our side of the handshake says that the node is not whom we want
		return fault.Because(errors.Join(err, errNode), op, own.Kind, "node %s: %s", addr, fault.Text(own))
	}
	var alert tls.AlertError
	if errors.As(err, &alert) || strings.Contains(err.Error(), "remote error: tls:") {
		return fault.Because(errors.Join(err, errNode), op, fault.Denied,
			"node %s refused this operator's certificate: it ran out, was banned, or is of another trust domain", addr)
	}
	return api.FromWire(op, err)
}

func (c *Control) giveUp(op string, last error) error {
	k := fault.Of(last)
	switch {
	case errors.Is(last, errNode):
		return last
	case k == fault.Unsure:
		return fault.Because(last, op, fault.Unsure, "it may have happened, and no node could say so within %s: look before you try again (%s)", c.Timeout, fault.Text(last))
	}
	var addrs []string
	for _, n := range c.nodes {
		addrs = append(addrs, n.addr)
	}
	return fault.Because(last, op, k, "none of %s answered within %s: %s", strings.Join(addrs, ", "), c.Timeout, fault.Text(last))
}

// pause waits between rounds, longer each time, and each caller differently long. It is false where the time is over.
func pause(ctx context.Context, round int) bool {
	most := min(100*time.Millisecond<<min(round, 5), 2*time.Second)
	t := time.NewTimer(most/2 + rand.N(most/2+1))
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}
