// SPDX-License-Identifier: Apache-2.0

package client

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"net/http"
	"os"

	"connectrpc.com/connect"

	"github.com/demarc-dev/demarc/api"
	boundaryv1 "github.com/demarc-dev/demarc/api/boundary/v1"
	"github.com/demarc-dev/demarc/api/boundary/v1/boundaryv1connect"
	"github.com/demarc-dev/demarc/api/control/v1/controlv1connect"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/identity"
	"github.com/demarc-dev/demarc/seal"
	"github.com/demarc-dev/demarc/smallfile"
)

// ControlPlane is what recognises a control plane for a caller who has no certificate yet. None of it is a secret; that it is the right one
// matters.
type ControlPlane struct {
	TrustDomain string
	Nodes       []string // host:port, tried in order
	LogKey      []byte   // public key of the vendor's log, PEM
}

// Anonymous is what a node answers to a caller without a certificate, and the bundle whose CAs prove the node.
type Anonymous struct {
	Roots SignedBundle
	controlv1connect.OperatorBootstrapClient
	boundaryv1connect.BootstrapClient
}

// SignedBundle is a bundle of CAs whose signature was verified.
type SignedBundle struct {
	identity.SignedBundle
	sealed []byte // as it came
}

// Store puts the bundle in the place of a bundle file, each of the two files as a whole. If that is cut short between them, the bundle file
// is of another number than the signed one, its number is not known, and the client fetches it again.
func (b SignedBundle) Store(path string) error {
	const op = "client.Store"
	err := errors.Join(smallfile.Replace(signedFile(path), b.sealed), smallfile.Replace(path, CertificatesPEM(b.CAs...)))
	if err != nil {
		return fault.Because(err, op, fault.Unavailable, "the vendor's newest CAs can't be written to %s", path)
	}
	return fault.At(op, fault.Unavailable, os.Chmod(path, 0o644)) // no secret, and others are told to copy it
}

// CallAnonymous calls one node after another without a certificate until one answers. It first fetches the CAs, signed with the key that is
// pinned, over a connection that proves nothing; do then calls over one that those CAs prove.
func CallAnonymous[Res any](ctx context.Context, to ControlPlane, do func(ctx context.Context, a Anonymous) (Res, error)) (Res, error) {
	var res Res
	pinned, err := seal.ParseKey(to.LogKey)
	if err != nil {
		return res, err
	}
	first := 0
	err = attempt(ctx, to.Nodes, &first, 0, func(i int) error {
		ctx, cancel := context.WithTimeout(ctx, tryTimeout)
		defer cancel()
		bundle, err := FetchBundle(ctx, to.TrustDomain, to.Nodes[i], pinned, 0)
		if err != nil {
			return err
		}
		cas, err := identity.ParseDER(bundle.CAs, to.TrustDomain)
		if err != nil {
			return err
		}
		t := newTransport()
		t.TLSClientConfig = identity.Client(identity.Fixed(nil, identity.Pool(cas)), identity.WantNode(to.TrustDomain), "h2")
		defer t.CloseIdleConnections()
		h, at := &http.Client{Transport: api.Sent(t)}, "https://"+to.Nodes[i]
		opts := connect.WithClientOptions(connect.WithReadMaxBytes(4*identity.MaxBundle), api.Doubt())
		res, err = do(ctx, Anonymous{
			bundle, controlv1connect.NewOperatorBootstrapClient(h, at, opts), boundaryv1connect.NewBootstrapClient(h, at, opts),
		})
		return err
	})
	return res, err
}

// FetchBundle fetches the signed bundle from WHOEVER ANSWERS at a node's address; it must not be older than number. THIS CONNECTION IS
// NOT VERIFIED. That is safe as it is at the appliance, which does the same: nothing is sent on it but random bytes, and nothing that
// comes back is believed but a document that the pinned key signed over them. The fault is Denied for anything else.
func FetchBundle(ctx context.Context, trustDomain, node string, pinned seal.Key, number uint64) (SignedBundle, error) {
	ctx, cancel := context.WithTimeout(ctx, tryTimeout)
	defer cancel()
	nonce := make([]byte, identity.MaxBundleNonce)
	_, _ = rand.Read(nonce) // crypto/rand.Read never fails
	unverified := newTransport()
	unverified.TLSClientConfig = &tls.Config{MinVersion: tls.VersionTLS13, InsecureSkipVerify: true, NextProtos: []string{"h2"}}
	defer unverified.CloseIdleConnections()
	h := &http.Client{Transport: unverified}
	c := boundaryv1connect.NewBootstrapClient(h, "https://"+node, connect.WithReadMaxBytes(4*identity.MaxBundle))
	m, err := Do(ctx, c.Bundle, &boundaryv1.BundleRequest{Nonce: nonce})
	if err != nil {
		return SignedBundle{}, err
	}
	b, err := identity.OpenBundle(m.GetSealed(), pinned, trustDomain, nonce, number)
	if err != nil {
		return SignedBundle{}, fault.Because(nodeError{err}, "client.FetchBundle", fault.Of(err), "whoever answers is not the control plane "+
			"of the invitation, or of the log key that is pinned here, or a proxy on the path opens TLS: %s", fault.Text(err))
	}
	return SignedBundle{b, m.GetSealed()}, nil
}
