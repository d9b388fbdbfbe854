// SPDX-License-Identifier: Apache-2.0

package appliance

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"net"
	"time"

	"connectrpc.com/connect"

	"github.com/demarc-dev/demarc/api"
	boundaryv1 "github.com/demarc-dev/demarc/api/boundary/v1"
	"github.com/demarc-dev/demarc/daemon/appliance/platform"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/identity"
	"github.com/demarc-dev/demarc/mesh"
	"github.com/demarc-dev/demarc/seal"
)

// recover asks for the signed bundle and takes its CAs and its time. It is for an appliance that slept through a change
// of CA, or whose clock is off: by what it holds it can't recognise the vendor's nodes any more.
// It reports whether either was news: where neither was, it is not the vendor that could not be recognised.
func (a *Appliance) recover(ctx context.Context, route string) (bool, error) {
	const op = "appliance.recover"
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	pinned, err := seal.ParseKey(a.book.View().VendorLogKey)
	if err != nil {
		return false, err
	}
	c, err := a.routes[route].Dial(ctx, "")
	if err != nil {
		return false, err
	}
	nonce := make([]byte, identity.MaxBundleNonce)
	_, _ = rand.Read(nonce) // crypto/rand.Read never fails
	sealed, err := a.askAnyone(ctx, route, c, nonce)
	if err != nil {
		return false, fault.At(op, "", err)
	}
	b, err := identity.OpenBundle(sealed, pinned, a.cfg.TrustDomain, nonce, a.creds.BundleNumber())
	if err != nil {
		return false, fault.At(op, "", err)
	}
	clock := a.setClock(b.At)
	cas, err := a.takeBundle(b, sealed)
	return clock || cas, err
}

// askAnyone asks WHOEVER ANSWERS for the signed bundle. THIS CONNECTION IS NOT VERIFIED; but for a node's
// same question to its peers it is the only one in the program that is not. That is safe because:
//
//   - nothing goes out on it but 32 random bytes, made for this question: no certificate is shown, no name, no report;
//   - nothing that comes back on it is believed but a document that the pinned key of the vendor's log signed, over that
//     nonce, for this trust domain, and no older than the bundle that is held;
//   - it is closed then. The channel is dialled anew and proven as always, with what the signature vouched for.
//
// Who stands in the middle can keep the answer back, as it can cut the wire, and can do nothing else.
func (a *Appliance) askAnyone(ctx context.Context, route string, c net.Conn, nonce []byte) ([]byte, error) {
	const op = "appliance.askAnyone"
	blind := &tls.Config{MinVersion: tls.VersionTLS13, NextProtos: []string{"h2"}, InsecureSkipVerify: true}
	t, err := a.shake(ctx, route, mesh.LayerBlind, c, blind)
	if err != nil {
		return nil, err
	}
	l, err := speakHTTP2("", t, op)
	if err != nil {
		return nil, err
	}
	defer l.cc.Close()
	client := l.bootstrap(2 * identity.MaxBundle)
	res, err := client.Bundle(ctx, connect.NewRequest(&boundaryv1.BundleRequest{Nonce: nonce}))
	if err != nil {
		return nil, api.FromWire(op, err)
	}
	return res.Msg.GetSealed(), nil
}

// proof asks the platform for a proof of this appliance's identity, made for this audience. at is the control plane's time.
func (a *Appliance) proof(ctx context.Context, audience string, at time.Time) (platform.Proof, error) {
	if a.opts.Proof != nil {
		token, err := a.opts.Proof(ctx, audience)
		return platform.Proof{Token: token}, mesh.For(mesh.NoProof, err)
	}
	p, err := platform.Prove(ctx, a.cfg.Proof, audience, at)
	return p, mesh.For(mesh.NoProof, err)
}
