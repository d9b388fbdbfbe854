// SPDX-License-Identifier: Apache-2.0

package identity

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"encoding/json"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
)

// KindKubernetes is the proof by a projected service-account token.
const KindKubernetes = "kubernetes"

// Bounds of a proof.
const (
	MaxToken = 16 << 10
	MaxJWKS  = 64 << 10
	maxKeys  = 16
	skew     = 2 * time.Minute
)

// Expect is what the vendor registers before an appliance calls: where its tokens come from, and whose they are.
// The issuer's keys are pinned here: nothing is ever fetched, so no token can send us anywhere.
type Expect struct {
	Kind           string          `json:"kind"` // "kubernetes"
	Issuer         string          `json:"issuer"`
	JWKS           json.RawMessage `json:"jwks"`
	Namespace      string          `json:"namespace"`
	ServiceAccount string          `json:"service_account"`
}

// Proven is what a platform vouched for.
type Proven struct {
	Kind    string
	Issuer  string
	Subject string
	UID     string // of the service account: another one of the same name has another
	Pod     string // "" where the token is bound to none
	Expires time.Time
}

// Check tells whether a registration can ever be met.
func (e Expect) Check() error {
	_, err := e.keys()
	return err
}

func (e Expect) keys() (*jose.JSONWebKeySet, error) {
	const op = "identity.Expect"
	if e.Kind != KindKubernetes {
		return nil, fault.New(op, fault.Invalid, "proof of kind %q: use %q", clip(e.Kind), KindKubernetes)
	}
	if e.Issuer == "" || len(e.Issuer) > 512 {
		return nil, fault.New(op, fault.Invalid, "issuer: give the cluster's --service-account-issuer, in at most 512 bytes")
	}
	if err := fleet.CheckName("namespace", e.Namespace); err != nil {
		return nil, err
	}
	if !subdomain(e.ServiceAccount) {
		return nil, fault.New(op, fault.Invalid, "service account %q: use lower-case letters, digits, dots and hyphens", clip(e.ServiceAccount))
	}
	if len(e.JWKS) > MaxJWKS {
		return nil, fault.New(op, fault.Invalid, "the JWKS has %d bytes, the limit is %d", len(e.JWKS), MaxJWKS)
	}
	var set jose.JSONWebKeySet
	d := json.NewDecoder(bytes.NewReader(e.JWKS))
	if err := d.Decode(&set); err != nil || d.More() {
		return nil, fault.Because(err, op, fault.Invalid, "the JWKS does not parse: give the output of kubectl get --raw /openid/v1/jwks")
	}
	if n := len(set.Keys); n == 0 || n > maxKeys {
		return nil, fault.New(op, fault.Invalid, "the JWKS holds %d keys: 1 to %d are needed", n, maxKeys)
	}
	seen := map[string]bool{}
	for i, k := range set.Keys {
		if k.KeyID == "" || seen[k.KeyID] {
			return nil, fault.New(op, fault.Invalid, "JWKS key %d: each key needs a kid of its own", i)
		}
		seen[k.KeyID] = true
		if _, err := algorithm(k); err != nil {
			return nil, err
		}
	}
	return &set, nil
}

// algorithm is the one algorithm that a pinned key may be used with: the token does not choose.
func algorithm(k jose.JSONWebKey) (jose.SignatureAlgorithm, error) {
	var alg jose.SignatureAlgorithm
	switch pub := k.Key.(type) {
	case *rsa.PublicKey:
		if n := pub.N.BitLen(); n >= 2048 && n <= 8192 {
			alg = jose.RS256
		}
	case *ecdsa.PublicKey:
		if pub.Curve == elliptic.P256() {
			alg = jose.ES256
		}
	}
	if alg == "" || !k.Valid() || (k.Algorithm != "" && k.Algorithm != string(alg)) || (k.Use != "" && k.Use != "sig") {
		return "", fault.New("identity.Expect", fault.Invalid, "JWKS key %q: use public RSA keys of 2048 to 8192 bits (RS256) or P-256 keys (ES256), for signatures", clip(k.KeyID))
	}
	return alg, nil
}

// subdomain is the form of a Kubernetes object name (RFC 1123).
func subdomain(s string) bool {
	if s == "" || len(s) > 253 {
		return false
	}
	edge := func(c byte) bool { return c >= 'a' && c <= 'z' || c >= '0' && c <= '9' }
	for i := range len(s) {
		if c := s[i]; !edge(c) && (c != '-' && c != '.' || i == 0 || !edge(s[i-1]) && c == '.') {
			return false
		}
	}
	return edge(s[len(s)-1])
}

type claims struct {
	Issuer    string           `json:"iss"`
	Subject   string           `json:"sub"`
	Audience  jwt.Audience     `json:"aud"`
	Expiry    *jwt.NumericDate `json:"exp"`
	NotBefore *jwt.NumericDate `json:"nbf"`
	IssuedAt  *jwt.NumericDate `json:"iat"`
	Cluster   struct {
		Namespace string `json:"namespace"`
		Account   struct {
			Name string `json:"name"`
			UID  string `json:"uid"`
		} `json:"serviceaccount"`
		Pod struct {
			Name string `json:"name"`
		} `json:"pod"`
	} `json:"kubernetes.io"`
}

// Verify tells whether the token, made out to exactly the audience, proves what was registered. The caller makes
// the audience with [Audience] from the nonce that it drew and the CSR that it received, never from the token.
//
// The kinds: invalid (no token at all), denied (signature, issuer, audience or subject; the sentence says which),
// expired (the clock: renewing or waiting helps).
func (e Expect) Verify(token, audience string, now time.Time) (Proven, error) {
	const op = "identity.Verify"
	set, err := e.keys()
	if err != nil {
		return Proven{}, err
	}
	if audience == "" {
		return Proven{}, fault.New(op, fault.Internal, "no audience was given to compare with")
	}
	if len(token) > MaxToken {
		return Proven{}, fault.New(op, fault.Invalid, "the token has %d bytes, the limit is %d", len(token), MaxToken)
	}
	c, err := open(token, set)
	if err != nil {
		return Proven{}, err
	}
	subject := "system:serviceaccount:" + e.Namespace + ":" + e.ServiceAccount
	switch {
	case c.Issuer != e.Issuer:
		return Proven{}, fault.New(op, fault.Denied, "the token was issued by %q, and %q is registered", clip(c.Issuer), e.Issuer)
	case len(c.Audience) != 1 || c.Audience[0] != audience:
		return Proven{}, fault.New(op, fault.Denied, "the token is not made out to this nonce, this key and this trust domain: its audience must be exactly the one that was asked for")
	case c.Subject != subject:
		return Proven{}, fault.New(op, fault.Denied, "the token is that of %q, and %q is registered", clip(c.Subject), subject)
	case c.Cluster.Namespace != "" && c.Cluster.Namespace != e.Namespace,
		c.Cluster.Account.Name != "" && c.Cluster.Account.Name != e.ServiceAccount:
		return Proven{}, fault.New(op, fault.Denied, "the token contradicts itself about its service account")
	case c.Expiry == nil:
		return Proven{}, fault.New(op, fault.Denied, "the token never expires: use a projected token, not a Secret's")
	case !now.Add(-skew).Before(c.Expiry.Time()):
		return Proven{}, fault.New(op, fault.Expired, "the token ran out at %s, and it is %s here: request another, and compare the clocks", stamp(c.Expiry.Time()), stamp(now))
	case c.NotBefore != nil && now.Add(skew).Before(c.NotBefore.Time()),
		c.IssuedAt != nil && now.Add(skew).Before(c.IssuedAt.Time()):
		return Proven{}, fault.New(op, fault.Expired, "the token is not valid yet, and it is %s here: compare the clocks", stamp(now))
	}
	return Proven{
		Kind: e.Kind, Issuer: c.Issuer, Subject: c.Subject,
		UID: c.Cluster.Account.UID, Pod: c.Cluster.Pod.Name, Expires: c.Expiry.Time().UTC(),
	}, nil
}

// open checks the signature with the pinned key that the token names, and only then reads the claims.
func open(token string, set *jose.JSONWebKeySet) (claims, error) {
	const op = "identity.Verify"
	t, err := jwt.ParseSigned(token, []jose.SignatureAlgorithm{jose.RS256, jose.ES256})
	if err != nil {
		return claims{}, fault.Because(err, op, fault.Invalid, "this is not a token signed with RS256 or ES256")
	}
	if len(t.Headers) != 1 {
		return claims{}, fault.New(op, fault.Invalid, "the token must carry one signature")
	}
	h := t.Headers[0]
	found := set.Key(h.KeyID)
	if h.KeyID == "" || len(found) != 1 {
		return claims{}, fault.New(op, fault.Denied, "the token names key %q, which is not pinned: the cluster's keys were rotated, or it is another cluster", clip(h.KeyID))
	}
	alg, err := algorithm(found[0])
	if err != nil {
		return claims{}, err
	}
	if h.Algorithm != string(alg) {
		return claims{}, fault.New(op, fault.Denied, "the token is signed with %s, and its key is for %s", clip(h.Algorithm), alg)
	}
	var c claims
	// The bare key is passed, so that nothing in the token's header has a say in which key it is.
	if err := t.Claims(found[0].Key, &c); err != nil {
		return claims{}, fault.Because(err, op, fault.Denied, "the token's signature is not that of the pinned key, or its claims do not parse")
	}
	return c, nil
}
