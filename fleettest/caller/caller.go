// SPDX-License-Identifier: Apache-2.0

// Package caller calls a control plane for tests, as cmd/demarc does: mTLS with the operator's certificate, one request id for
// all tries of a call, the next node after each failure that may pass. Beside, it tells what is certain about a call that failed.
package caller

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"connectrpc.com/connect"

	"github.com/demarc-dev/demarc/api"
	"github.com/demarc-dev/demarc/api/control/v1/controlv1connect"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/identity"
)

// Vendor speaks to nodes. One call is made at a time.
type Vendor struct {
	Names   []string // sorted
	Clients []controlv1connect.ControlClient
	At      int // the place of the node that is asked first

	ways       []*http.Transport
	total, try time.Duration
}

// Dialer reaches the nodes.
type Dialer func(ctx context.Context, network, addr string) (net.Conn, error)

// New reads the operator's folder that init wrote into dir. The nodes are addresses by name. A call ends after total at the latest.
func New(dir, domain string, nodes map[string]string, dial Dialer, total time.Duration) (*Vendor, error) {
	own := &files{dir: dir, domain: domain}
	if err := own.read(); err != nil {
		return nil, err
	}
	conf := identity.Client(own, identity.WantNode(domain), "h2")
	v := &Vendor{total: total, try: total / time.Duration(len(nodes))}
	for name := range nodes {
		v.Names = append(v.Names, name)
	}
	slices.Sort(v.Names)
	for _, name := range v.Names {
		t := &http.Transport{TLSClientConfig: conf.Clone(), TLSHandshakeTimeout: 3 * time.Second,
			DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
				ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
				defer cancel()
				return dial(ctx, network, addr)
			}, HTTP2: &http.HTTP2Config{SendPingTimeout: 5 * time.Second, PingTimeout: 5 * time.Second}, Protocols: new(http.Protocols)}
		t.Protocols.SetHTTP2(true)
		v.ways = append(v.ways, t)
		v.Clients = append(v.Clients,
			controlv1connect.NewControlClient(&http.Client{Transport: t}, "https://"+nodes[name], connect.WithReadMaxBytes(64<<20)))
	}
	return v, nil
}

// files is the operator's certificate and the CAs, as they stand on disk at each handshake: renewals and changes of CA are followed.
type files struct {
	dir, domain string

	mu   sync.Mutex
	leaf *tls.Certificate
	pool *x509.CertPool
}

// read keeps what it has where the files are being written at this moment.
func (f *files) read() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	leaf, err := tls.LoadX509KeyPair(filepath.Join(f.dir, "operator", "cert.pem"), filepath.Join(f.dir, "operator", "cert.key"))
	if err != nil {
		return err
	}
	b, err := os.ReadFile(filepath.Join(f.dir, "bundle.pem"))
	if err != nil {
		return err
	}
	cas, err := identity.ParseBundle(b, f.domain)
	if err != nil {
		return err
	}
	f.leaf, f.pool = &leaf, identity.Pool(cas)
	return nil
}

// Leaf implements [identity.Source].
func (f *files) Leaf() (*tls.Certificate, error) {
	_ = f.read() // the one before
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.leaf, nil
}

// Roots implements [identity.Source].
func (f *files) Roots() *x509.CertPool {
	_ = f.read()
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.pool
}

// Close lets the connections go.
func (v *Vendor) Close() {
	for _, t := range v.ways {
		t.CloseIdleConnections()
	}
}

// How a call ended, as the caller knows it.
const (
	Done    = "done"    // it happened
	Refused = "refused" // the book answered with a fault, which is on record
	Undone  = "undone"  // no node took it: it did not happen
	Unknown = "unknown" // it may happen yet
)

// Ending is how a call ended.
type Ending struct {
	Outcome, Fault, Detail, Node string
	Tries                        int
}

// Ask calls one node after another until one answers or the time is up.
func Ask(ctx context.Context, v *Vendor, do func(ctx context.Context, c controlv1connect.ControlClient) error) Ending {
	ctx, cancel := context.WithTimeout(ctx, v.total)
	defer cancel()
	e := Ending{Outcome: Undone}
	for round := 1; ; round++ {
		for range v.Clients {
			e.Tries++
			e.Node = v.Names[v.At]
			one, stop := context.WithTimeout(ctx, v.try)
			err := do(one, v.Clients[v.At])
			stop()
			kind := fault.Of(api.FromWire("caller.Ask", err))
			switch {
			case err == nil:
				e.Outcome, e.Fault, e.Detail = Done, "", ""
				return e
			case connect.IsWireError(err) && !passing(kind):
				e.Outcome, e.Fault, e.Detail = Refused, string(kind), err.Error()
				return e
			case mayHappen(err, kind):
				e.Outcome = Unknown
			}
			e.Fault, e.Detail = string(kind), err.Error()
			v.At = (v.At + 1) % len(v.Clients)
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
