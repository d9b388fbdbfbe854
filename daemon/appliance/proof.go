// SPDX-License-Identifier: Apache-2.0

package appliance

import (
	"bytes"
	"context"
	"time"

	"connectrpc.com/connect"

	"github.com/demarc-dev/demarc/api"
	boundaryv1 "github.com/demarc-dev/demarc/api/boundary/v1"
	"github.com/demarc-dev/demarc/api/boundary/v1/boundaryv1connect"
	"github.com/demarc-dev/demarc/daemon/appliance/platform"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/identity"
)

// How often the cluster is asked which keys it signs tokens with. A rotation of a cluster keeps the old key for longer
// than its tokens live, which is an hour and more.
const (
	keysEvery = 10 * time.Minute
	keysSoon  = 15 * time.Second // after a start, and after a failure
)

func awsToWire(s *identity.SignedIdentity) *boundaryv1.SignedIdentity {
	if s == nil {
		return nil
	}
	return &boundaryv1.SignedIdentity{Region: s.Region, Date: s.Date, AccessKeyId: s.AccessKeyID, SessionToken: s.SessionToken, Signature: s.Signature}
}

// clusterKeys tells the control plane when the cluster has rotated the keys that it pinned, so that the next proof is
// still understood there.
func (a *Appliance) clusterKeys(ctx context.Context, ready func()) error {
	ready()
	var told []byte
	for wait := keysSoon; ; {
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(wait):
		}
		l := a.link.Load()
		if l == nil {
			wait = keysSoon
			continue
		}
		next, err := a.tellKeys(ctx, l, told)
		if wait = keysEvery; err != nil {
			wait = keysSoon
			if k := fault.Of(err); k == fault.Invalid || k == fault.Denied {
				wait = keysEvery
			}
			a.log.Warn("the keys of this cluster were not told to the control plane", "err", fault.Text(err))
			continue
		}
		told = next
	}
}

// tellKeys gives the keys that the control plane has now, after it told them where they are others than before.
func (a *Appliance) tellKeys(ctx context.Context, l *link, told []byte) ([]byte, error) {
	const op = "appliance.tellKeys"
	jwks, token, err := platform.Keys(ctx, a.cfg.Proof, func(jwks []byte) (string, error) { return identity.KeysAudience(a.cfg.TrustDomain, jwks) })
	if err != nil || jwks == nil || bytes.Equal(jwks, told) {
		return told, err
	}
	t, err := token(ctx)
	if err != nil {
		return told, err
	}
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	_, err = boundaryv1connect.NewBoundaryClient(l.http, base, connect.WithReadMaxBytes(64<<10)).RollKeys(ctx, connect.NewRequest(&boundaryv1.RollKeysRequest{Jwks: jwks, Token: t}))
	if err != nil {
		return told, api.FromWire(op, err)
	}
	a.log.Info("the control plane has the keys of this cluster")
	return jwks, nil
}
