// SPDX-License-Identifier: Apache-2.0

package fleettest

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/json"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/demarc-dev/demarc/daemon/controlplane/book"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/ledger"
)

// cluster is the platform of every appliance of a fleet: the keys that it signs tokens with.
type cluster struct {
	signs string // ID of the key that signs
	keys  map[string]*ecdsa.PrivateKey
	shown []string // IDs that it publishes
}

// Keys has the cluster sign with the first key and publish all of them. A key that it did not have is drawn.
func (f *Fleet) Keys(ids ...string) {
	f.t.Helper()
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, id := range ids {
		if f.cluster.keys[id] == nil {
			key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
			f.must(err)
			f.cluster.keys[id] = key
		}
	}
	f.cluster.signs, f.cluster.shown = ids[0], ids
}

// JWKS is what the cluster publishes.
func (f *Fleet) JWKS() json.RawMessage {
	f.mu.Lock()
	defer f.mu.Unlock()
	var set jose.JSONWebKeySet
	for _, id := range f.cluster.shown {
		set.Keys = append(set.Keys, jose.JSONWebKey{Key: f.cluster.keys[id].Public(), KeyID: id, Algorithm: "ES256", Use: "sig"})
	}
	b, err := json.Marshal(set)
	f.must(err)
	return b
}

// keys is what an appliance asks its cluster for when it looks whether the keys were rotated.
func (a *Appliance) keys(context.Context) ([]byte, func(context.Context, string) (string, error), error) {
	return a.f.JWKS(), func(_ context.Context, audience string) (string, error) {
		a.told.Add(1)
		return a.token(audience)
	}, nil
}

// proof is the platform: it vouches for the appliance.
func (a *Appliance) proof(_ context.Context, audience string) (string, error) {
	a.f.mu.Lock()
	a.proofs.Add(1)
	mute := a.mute
	a.f.mu.Unlock()
	if mute {
		return "", fault.New("fleettest.Proof", fault.Unavailable, "the platform does not answer")
	}
	return a.token(audience)
}

// token signs a projected token of the appliance's service account.
func (a *Appliance) token(audience string) (string, error) {
	a.f.mu.Lock()
	id := a.f.cluster.signs
	key := a.f.cluster.keys[id]
	a.f.mu.Unlock()
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: key, KeyID: id}}, nil)
	if err != nil {
		return "", err
	}
	now := time.Now() // the platform's clock is right
	b, err := json.Marshal(
		map[string]any{"iss": "https://cluster.example", "sub": "system:serviceaccount:demarc:" + a.Name, "aud": []string{audience},
			"exp": now.Add(10 * time.Minute).Unix(), "iat": now.Unix()})
	if err != nil {
		return "", err
	}
	o, err := signer.Sign(b)
	if err != nil {
		return "", err
	}
	return o.CompactSerialize()
}

// ConfirmKeys makes the keys that an appliance reported count, at an operator's word.
func (f *Fleet) ConfirmKeys(name string, digest fleet.Digest) error {
	_, err := ledger.Submit(f.t.Context(), order{f}, f.meta(), book.ConfirmKeys{Name: fleet.ApplianceID(name), Digest: digest})
	return err
}
