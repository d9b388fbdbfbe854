// SPDX-License-Identifier: Apache-2.0

package fleettest

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net"
	"net/http"
	"strconv"
	"sync/atomic"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/demarc-dev/demarc/api"
	boundaryv1 "github.com/demarc-dev/demarc/api/boundary/v1"
	"github.com/demarc-dev/demarc/api/boundary/v1/boundaryv1connect"
	controlv1 "github.com/demarc-dev/demarc/api/control/v1"
	"github.com/demarc-dev/demarc/api/control/v1/controlv1connect"
	"github.com/demarc-dev/demarc/identity"
	"github.com/demarc-dev/demarc/seal"
)

// operator calls the nodes as cmd/demarc does: with a certificate, and the CAs of the newest signed bundle that it verified. It says in
// each call which bundle it holds; when a node speaks of a newer one, or can't be recognised, it asks for the signed bundle. It makes one
// call at a time.
type operator struct {
	t    *testing.T
	dial func(ctx context.Context, addr string) (net.Conn, error)
	key  *ecdsa.PrivateKey
	leaf *tls.Certificate

	pinned *seal.Key // of the vendor's log; nil until the first answer
	pool   *x509.CertPool
	number uint64 // of the bundle; 0: the file of the beginning
	newest uint64 // that a node has spoken of
}

// asked is one call of an operator to one node.
type asked func(ctx context.Context, h *http.Client, url string) error

// newOperator draws a key. The bundle is the file that the vendor began with.
func newOperator(t *testing.T, bundle []byte, dial func(ctx context.Context, addr string) (net.Conn, error)) (*operator, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	cas, err := identity.ParseBundle(bundle, Domain)
	if err != nil {
		return nil, err
	}
	return &operator{t: t, dial: dial, key: key, pool: identity.Pool(cas)}, nil
}

// take goes on with another certificate.
func (p *operator) take(leaf *x509.Certificate) {
	p.leaf = &tls.Certificate{Certificate: [][]byte{leaf.Raw}, PrivateKey: p.key, Leaf: leaf}
}

// call calls one node. What a node says of a newer bundle is followed once the call has its answer.
func (p *operator) call(node string, do asked) error {
	err := p.once(node, do)
	var unknown x509.UnknownAuthorityError
	if errors.As(err, &unknown) && p.pinned != nil && p.follow(node) == nil {
		err = p.once(node, do)
	}
	if err == nil {
		if err := p.settle(node); err != nil {
			p.t.Logf("node %s: bundle %d is not taken yet: %v", node, p.newest, err)
		}
	}
	return err
}

// once makes a call over a proven connection, with the number of the bundle that is held.
func (p *operator) once(node string, do asked) error {
	way := p.way(node, identity.Client(identity.Fixed(p.leaf, p.pool), identity.WantNode(Domain, node), "h2"))
	defer way.CloseIdleConnections()
	ctx, cancel := context.WithTimeout(p.t.Context(), 40*time.Second)
	defer cancel()
	s := &saying{way: way, held: p.number}
	err := do(ctx, &http.Client{Transport: s}, "https://"+node+":2")
	p.newest = max(p.newest, s.newest.Load())
	return err
}

func (p *operator) way(node string, conf *tls.Config) *http.Transport {
	return &http.Transport{ForceAttemptHTTP2: true, DisableKeepAlives: true, TLSClientConfig: conf,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) { return p.dial(ctx, node+":2") }}
}

// saying says which bundle is held and hears which is the newest.
type saying struct {
	way    http.RoundTripper
	held   uint64
	newest atomic.Uint64
}

// RoundTrip implements [http.RoundTripper].
func (s *saying) RoundTrip(r *http.Request) (*http.Response, error) {
	r = r.Clone(r.Context())
	r.Header.Set(api.BundleHeader, strconv.FormatUint(s.held, 10))
	res, err := s.way.RoundTrip(r)
	if err == nil {
		if n, err := strconv.ParseUint(res.Header.Get(api.BundleHeader), 10, 64); err == nil {
			s.newest.Store(n)
		}
	}
	return res, err
}

// settle takes the newest bundle and acknowledges it. The first time it pins the key of the vendor's log.
func (p *operator) settle(node string) error {
	if p.pinned != nil && p.newest <= p.number {
		return nil
	}
	var logKey []byte
	door := func(ctx context.Context, h *http.Client, url string) error {
		res, err := controlv1connect.NewOperatorServiceClient(h, url).GetDoor(ctx, connect.NewRequest(&controlv1.GetDoorRequest{}))
		if err == nil {
			logKey = res.Msg.GetLogKey()
		}
		return err
	}
	if p.pinned == nil {
		if err := p.once(node, door); err != nil {
			return err
		}
		key, err := seal.ParseKey(logKey)
		if err != nil {
			return err
		}
		p.pinned = &key
	}
	if err := p.follow(node); err != nil {
		return err
	}
	return p.once(node, door) // the header says that it is held
}

// follow asks whoever answers for the signed bundle, and takes it if the pinned key signed it and it is no older than the one that is held.
func (p *operator) follow(node string) error {
	// As at cmd/demarc the connection is not verified: what comes is, by its signature.
	way := p.way(node, &tls.Config{MinVersion: tls.VersionTLS13, InsecureSkipVerify: true, NextProtos: []string{"h2"}})
	defer way.CloseIdleConnections()
	ctx, cancel := context.WithTimeout(p.t.Context(), 40*time.Second)
	defer cancel()
	nonce := make([]byte, identity.MaxBundleNonce)
	_, _ = rand.Read(nonce)
	c := boundaryv1connect.NewBootstrapClient(&http.Client{Transport: way}, "https://"+node+":2")
	res, err := c.Bundle(ctx, connect.NewRequest(&boundaryv1.BundleRequest{Nonce: nonce}))
	if err != nil {
		return err
	}
	b, err := identity.OpenBundle(res.Msg.GetSealed(), *p.pinned, Domain, nonce, p.number)
	if err != nil {
		return err
	}
	cas, err := identity.ParseDER(b.CAs, Domain)
	if err != nil {
		return err
	}
	p.pool, p.number = identity.Pool(cas), b.Number
	return nil
}
