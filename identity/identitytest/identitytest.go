// SPDX-License-Identifier: Apache-2.0

// Package identitytest is a platform and a CA to test against: an issuer of service-account tokens, and leaves.
//
// It stands in for a Kubernetes API server in tests and in the demo. It is no part of a product's trust.
package identitytest

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"encoding/json"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/identity"
)

// The key IDs of an issuer.
const (
	RSA = "rsa-1" // signs with RS256
	EC  = "ec-1"  // signs with ES256
)

// Issuer signs tokens as a cluster does. It is safe for concurrent calls.
type Issuer struct {
	URL string
	rsa *rsa.PrivateKey
	ec  *ecdsa.PrivateKey
}

// NewIssuer draws the keys of a cluster whose --service-account-issuer is url.
func NewIssuer(url string) (*Issuer, error) {
	const op = "identitytest.NewIssuer"
	r, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		return nil, fault.At(op, fault.Internal, err)
	}
	e, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fault.At(op, fault.Internal, err)
	}
	return &Issuer{URL: url, rsa: r, ec: e}, nil
}

// JWKS is the public half, as /openid/v1/jwks serves it.
func (i *Issuer) JWKS() json.RawMessage {
	b, err := json.Marshal(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{
		{Key: &i.rsa.PublicKey, KeyID: RSA, Algorithm: "RS256", Use: "sig"},
		{Key: &i.ec.PublicKey, KeyID: EC, Algorithm: "ES256", Use: "sig"},
	}})
	if err != nil {
		panic(err) // the keys are our own
	}
	return b
}

// Expect is the registration that tokens of this issuer meet.
func (i *Issuer) Expect(namespace, account string) identity.Expect {
	return identity.Expect{Kind: identity.KindKubernetes, Issuer: i.URL, JWKS: i.JWKS(), Namespace: namespace, ServiceAccount: account}
}

// Claims are those of a projected token that lives ten minutes.
func (i *Issuer) Claims(namespace, account, audience string, now time.Time) map[string]any {
	return map[string]any{
		"iss": i.URL, "aud": []string{audience}, "sub": "system:serviceaccount:" + namespace + ":" + account,
		"iat": now.Unix(), "nbf": now.Unix(), "exp": now.Add(10 * time.Minute).Unix(),
		"kubernetes.io": map[string]any{
			"namespace":      namespace,
			"serviceaccount": map[string]any{"name": account, "uid": "6a1ff6d1-0000-4000-8000-000000000001"},
			"pod":            map[string]any{"name": account + "-0", "uid": "6a1ff6d1-0000-4000-8000-000000000002"},
		},
	}
}

// Mint signs claims, whatever they say, with the key of the given ID.
func (i *Issuer) Mint(key string, claims map[string]any) (string, error) {
	const op = "identitytest.Mint"
	k := jose.SigningKey{Algorithm: jose.RS256, Key: jose.JSONWebKey{Key: i.rsa, KeyID: RSA}}
	if key == EC {
		k = jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: i.ec, KeyID: EC}}
	}
	s, err := jose.NewSigner(k, nil)
	if err != nil {
		return "", fault.At(op, fault.Internal, err)
	}
	token, err := jwt.Signed(s).Claims(claims).Serialize()
	return token, fault.At(op, fault.Internal, err)
}

// Token is a good token, as the kubelet would project it.
func (i *Issuer) Token(namespace, account, audience string, now time.Time) (string, error) {
	return i.Mint(RSA, i.Claims(namespace, account, audience, now))
}

// Leaf issues a certificate with a fresh key for who, in one step.
func Leaf(ca *identity.Authority, who fleet.Principal, now time.Time, ttl time.Duration) (*tls.Certificate, error) {
	const op = "identitytest.Leaf"
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fault.At(op, fault.Internal, err)
	}
	der, err := identity.NewCSR(key, rand.Reader)
	if err != nil {
		return nil, err
	}
	csr, err := identity.ParseCSR(der)
	if err != nil {
		return nil, err
	}
	cert, err := ca.Issue(csr, who, now, ttl, identity.IssueOptions{Rand: rand.Reader})
	if err != nil {
		return nil, err
	}
	return &tls.Certificate{Certificate: [][]byte{cert.Raw}, PrivateKey: key, Leaf: cert}, nil
}
