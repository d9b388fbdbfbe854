// SPDX-License-Identifier: Apache-2.0

package client

import (
	"context"
	"net"
	"net/http"
	"time"

	"connectrpc.com/connect"

	"github.com/demarc-dev/demarc/api"
	"github.com/demarc-dev/demarc/api/control/v1/controlv1connect"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/identity"
)

// Options say how a client calls.
type Options struct {
	Timeout time.Duration // of a call, all its tries together
	// Warn is told what went wrong beside a call that has its answer, for instance a bundle that could not be stored. It may be nil.
	Warn func(format string, args ...any)
}

// Client calls the nodes of one control plane. It is for one goroutine at a time.
type Client struct {
	Operator
	nodes []Node
	at    int // the node that answered last is called first

	trust     *trust // nil: the CAs are fixed
	refreshed bool   // the newest bundle was asked for after an answer, whatever came of it
	warn      func(format string, args ...any)

	timeout time.Duration // of a call, all tries together
	try     time.Duration // of one try, and of silence on a stream
}

// Node is one node of the control plane, with all services that it has for operators.
type Node struct {
	controlv1connect.ControlClient
	controlv1connect.IssuerKeysClient
	controlv1connect.OperatorServiceClient
	controlv1connect.KeyServiceClient
	controlv1connect.ClusterClient

	address   string // host:port
	transport *http.Transport
}

const (
	tryTimeout  = 10 * time.Second
	dialTimeout = 3 * time.Second
	// handshakeTimeout and pingTimeout bound how long a node that hangs is waited for.
	handshakeTimeout, pingTimeout = 5 * time.Second, 5 * time.Second
)

// Open makes a client of an operator's file. It reads the certificate, the key and the bundle that the file names, and makes no call.
func Open(o Operator, opts Options) (*Client, error) {
	leaf, err := LoadPair(o.Certificate, o.Key)
	if err != nil {
		return nil, fault.Because(err, "client.Open", fault.Invalid,
			"the operator's certificate and key can't be read: see certificate and key in %s", o.File)
	}
	t, err := openTrust(o, &leaf)
	if err != nil {
		return nil, err
	}
	c := New(o, t, opts)
	c.trust = t
	return c, nil
}

// New makes a client with this certificate and these CAs, which it does not keep up to date.
func New(o Operator, source identity.Source, opts Options) *Client {
	c := &Client{Operator: o, warn: opts.Warn, timeout: opts.Timeout}
	c.try = min(tryTimeout, opts.Timeout/time.Duration(max(1, len(o.Nodes)))) // so that one that hangs leaves time for the others
	conf := identity.Client(source, identity.WantNode(o.TrustDomain), "h2")
	for _, address := range o.Nodes {
		t := newTransport()
		t.TLSClientConfig = conf.Clone()
		t.HTTP2 = &http.HTTP2Config{SendPingTimeout: pingTimeout, PingTimeout: pingTimeout}
		h, at := &http.Client{Transport: announcing{c, api.Sent(t)}}, "https://"+address
		most := func(bytes int) connect.ClientOption {
			return connect.WithClientOptions(connect.WithReadMaxBytes(bytes), api.Doubt())
		}
		c.nodes = append(c.nodes, Node{
			ControlClient:         controlv1connect.NewControlClient(h, at, most(64<<20)),
			IssuerKeysClient:      controlv1connect.NewIssuerKeysClient(h, at, most(1<<20)),
			OperatorServiceClient: controlv1connect.NewOperatorServiceClient(h, at, most(8<<20)),
			KeyServiceClient:      controlv1connect.NewKeyServiceClient(h, at, most(8<<20)),
			ClusterClient:         controlv1connect.NewClusterClient(h, at, most(4<<20)),
			address:               address,
			transport:             t,
		})
	}
	return c
}

func newTransport() *http.Transport {
	t := &http.Transport{
		TLSHandshakeTimeout: handshakeTimeout,
		DialContext:         (&net.Dialer{Timeout: dialTimeout}).DialContext,
		Protocols:           new(http.Protocols),
	}
	t.Protocols.SetHTTP2(true)
	return t
}

// Close ends the connections.
func (c *Client) Close() {
	for _, n := range c.nodes {
		n.transport.CloseIdleConnections()
	}
}

// Timeout is how long a call may take, all its tries together.
func (c *Client) Timeout() time.Duration { return c.timeout }

// Call calls a procedure of one node after another until one answers, for instance Call(ctx, c, Node.Status, &controlv1.StatusRequest{}).
// The request is the same at each, so that its id makes it happen once.
func Call[Req, Res any](ctx context.Context, c *Client,
	procedure func(Node, context.Context, *connect.Request[Req]) (*connect.Response[Res], error), req *Req) (*Res, error) {
	var res *Res
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	err := c.each(ctx, 0, func(n Node) (err error) {
		ctx, cancel := context.WithTimeout(ctx, c.try)
		defer cancel()
		res, err = Result(procedure(n, ctx, connect.NewRequest(req)))
		return err
	})
	return res, err
}

// Stream is Call for a stream, which do opens and reads at one node after another, three times each at most. Its time is not bounded as
// long as it moves, which do reports by calling alive.
func (c *Client) Stream(ctx context.Context, do func(ctx context.Context, n Node, alive func()) error) error {
	const rounds = 3
	return c.each(ctx, rounds, func(n Node) error {
		sub, cancel := context.WithCancel(ctx)
		defer cancel()
		stalled := time.AfterFunc(c.try, cancel)
		defer stalled.Stop()
		err := do(sub, n, func() { stalled.Reset(c.try) })
		if err != nil && sub.Err() != nil && ctx.Err() == nil {
			return fault.New("client.Stream", fault.Unavailable, "nothing moved for %s", c.try)
		}
		return err
	})
}

// each tries the nodes in turn, the one that answered last first, and stores a newer bundle after the answer.
func (c *Client) each(ctx context.Context, rounds int, do func(n Node) error) error {
	err := attempt(ctx, c.Nodes, &c.at, rounds, func(i int) error {
		err := do(c.nodes[i])
		if c.recognise(ctx, c.nodes[i], err) {
			err = do(c.nodes[i])
		}
		return err
	})
	if err == nil {
		c.refresh(ctx)
	}
	return err
}
