// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"crypto/tls"
	"errors"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"time"

	"connectrpc.com/connect"

	"github.com/demarc-dev/demarc/api"
	"github.com/demarc-dev/demarc/api/control/v1/controlv1connect"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/identity"
)

// vendor speaks to the control plane as cmd/demarc does: mTLS with the operator's certificate, one request id for all tries of
// a call, the next node after each failure that may pass. Beside, it tells what is certain about a call that failed.
type vendor struct {
	names   []string
	clients []controlv1connect.ControlClient
	ways    []*http.Transport
	at      int // asked first
	total   time.Duration
	try     time.Duration
	expect  []byte // what the appliances that it registers would have to prove
}

// dialer reaches the nodes.
type dialer func(ctx context.Context, network, addr string) (net.Conn, error)

// newVendor reads the operator's folder that init wrote.
func newVendor(dir, domain string, nodes map[string]string, dial dialer, total time.Duration) (*vendor, error) {
	leaf, err := tls.LoadX509KeyPair(filepath.Join(dir, "operator", "cert.pem"), filepath.Join(dir, "operator", "cert.key"))
	if err != nil {
		return nil, err
	}
	b, err := os.ReadFile(filepath.Join(dir, "bundle.pem"))
	if err != nil {
		return nil, err
	}
	cas, err := identity.ParseBundle(b, domain)
	if err != nil {
		return nil, err
	}
	conf := identity.Client(identity.Fixed(&leaf, identity.Pool(cas)), identity.WantNode(domain), "h2")
	v := &vendor{total: total, try: total / time.Duration(len(nodes))}
	for name := range nodes {
		v.names = append(v.names, name)
	}
	slices.Sort(v.names)
	for _, name := range v.names {
		t := &http.Transport{TLSClientConfig: conf.Clone(), TLSHandshakeTimeout: 3 * time.Second, DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
			ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
			defer cancel()
			return dial(ctx, network, addr)
		}, HTTP2: &http.HTTP2Config{SendPingTimeout: 5 * time.Second, PingTimeout: 5 * time.Second}, Protocols: new(http.Protocols)}
		t.Protocols.SetHTTP2(true)
		v.ways = append(v.ways, t)
		v.clients = append(v.clients, controlv1connect.NewControlClient(&http.Client{Transport: t}, "https://"+nodes[name], connect.WithReadMaxBytes(64<<20)))
	}
	return v, nil
}

func (v *vendor) close() {
	for _, t := range v.ways {
		t.CloseIdleConnections()
	}
}

// crew is a vendor for the nodes that are there: nodes come and go.
type crew struct {
	run  *run
	turn int
	v    *vendor
}

// refresh makes another vendor where the nodes are others since. It keeps the old one where that fails.
func (c *crew) refresh() error {
	c.run.mu.Lock()
	turn, nodes := c.run.turn, slices.Clone(c.run.nodes)
	c.run.mu.Unlock()
	if c.v != nil && turn == c.turn {
		return nil
	}
	v, err := c.run.only(12*time.Second, nodes...)
	if err != nil {
		return err
	}
	if c.v != nil {
		v.at = c.v.at % len(v.clients)
		c.v.close()
	}
	c.v, c.turn = v, turn
	return nil
}

func (c *crew) close() { c.v.close() }

// ending is how a call ended.
type ending struct {
	outcome, fault, detail, node string
	tries                        int
}

// ask calls one node after another until one answers or the time is up.
func ask(ctx context.Context, v *vendor, do func(ctx context.Context, c controlv1connect.ControlClient) error) ending {
	ctx, cancel := context.WithTimeout(ctx, v.total)
	defer cancel()
	e := ending{outcome: undone}
	for round := 1; ; round++ {
		for range v.clients {
			e.tries++
			e.node = v.names[v.at]
			one, stop := context.WithTimeout(ctx, v.try)
			err := do(one, v.clients[v.at])
			stop()
			kind := fault.Of(api.FromWire("robust.ask", err))
			switch {
			case err == nil:
				e.outcome, e.fault, e.detail = done, "", ""
				return e
			case connect.IsWireError(err) && !passing(kind):
				e.outcome, e.fault, e.detail = refused, string(kind), err.Error()
				return e
			case mayHappen(err, kind):
				e.outcome = unknown
			}
			e.fault, e.detail = string(kind), err.Error()
			v.at = (v.at + 1) % len(v.clients)
		}
		most := min(100*time.Millisecond<<min(round, 5), 2*time.Second)
		t := time.NewTimer(most/2 + rand.N(most/2+1))
		select {
		case <-ctx.Done():
			t.Stop()
			return e
		case <-t.C:
		}
	}
}

func passing(k fault.Kind) bool {
	return slices.Contains([]fault.Kind{fault.Unavailable, fault.NotLeader, fault.Unsure, fault.Busy}, k)
}

// mayHappen tells whether what was asked for may come about in spite of the error: a node says so, or the way to it broke after
// the question could have left.
func mayHappen(err error, k fault.Kind) bool {
	if connect.IsWireError(err) {
		return k == fault.Unsure
	}
	var op *net.OpError
	return !errors.As(err, &op) || op.Op != "dial"
}
