// SPDX-License-Identifier: Apache-2.0

package appliance

import (
	"bytes"
	"context"
	"time"

	"connectrpc.com/connect"

	"github.com/demarc-dev/demarc/api"
	boundaryv1 "github.com/demarc-dev/demarc/api/boundary/v1"
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
	return &boundaryv1.SignedIdentity{Region: s.Region, Date: s.Date, AccessKeyId: s.AccessKeyID, SessionToken: s.SessionToken,
		Signature: s.Signature}
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

// tellKeys returns the keys that the control plane has now, after it told them where they are others than before. Keys that
// wait for the operator there are told again: they may be vouched for meanwhile.
func (a *Appliance) tellKeys(ctx context.Context, l *link, told []byte) ([]byte, error) {
	const op = "appliance.tellKeys"
	jwks, token, err := a.keys(ctx)
	if err != nil || jwks == nil || bytes.Equal(jwks, told) {
		return told, err
	}
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	ch, err := l.bootstrap(64<<10).Challenge(ctx, connect.NewRequest(&boundaryv1.ChallengeRequest{}))
	if err != nil {
		return told, api.FromWire(op, err)
	}
	audience, err := identity.KeysAudience(a.cfg.TrustDomain, ch.Msg.GetNonce(), jwks)
	if err != nil {
		return told, err
	}
	t, err := token(ctx, audience)
	if err != nil {
		return told, err
	}
	res, err := l.boundary(64<<10).RollKeys(ctx, connect.NewRequest(&boundaryv1.RollKeysRequest{Jwks: jwks, Token: t,
		Nonce: ch.Msg.GetNonce()}))
	if err != nil {
		return told, api.FromWire(op, err)
	}
	if res.Msg.GetWaiting() {
		a.log.Warn("this cluster signs with a key that the control plane does not know: its new keys wait there until the vendor confirms them (demarc appliance expect " + a.cfg.Name + ")")
		return told, nil
	}
	a.log.Info("the control plane has the keys of this cluster")
	return jwks, nil
}

// keys asks the cluster for its keys; nil where none are pinned.
func (a *Appliance) keys(ctx context.Context) ([]byte, func(ctx context.Context, audience string) (string, error), error) {
	if a.opts.Keys != nil {
		return a.opts.Keys(ctx)
	}
	return platform.Keys(ctx, a.cfg.Proof)
}
