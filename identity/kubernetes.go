// SPDX-License-Identifier: Apache-2.0

package identity

import (
	"time"

	"github.com/go-jose/go-jose/v4/jwt"

	"github.com/demarc-dev/demarc/fault"
)

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
	Issuer   string       `json:"iss"`
	Subject  string       `json:"sub"`
	Audience jwt.Audience `json:"aud"`
	times
	Cluster struct {
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

// Verify tells whether the token, made out to exactly the audience, proves what was registered, by the keys that were
// pinned. The caller makes the audience with [Audience] from the nonce that it drew and the CSR that it received, never
// from the token.
//
// The kinds: invalid (no token at all), denied (signature, issuer, audience or subject; the sentence says which),
// expired (the clock: renewing or waiting helps).
func (e Expect) Verify(token, audience string, now time.Time) (Proven, error) {
	if err := e.Check(); err != nil {
		return Proven{}, err
	}
	if e.Kind != KindKubernetes && e.Kind != KindDev || e.Discovery {
		return Proven{}, fault.New("identity.Verify", fault.Internal, "no keys are pinned for this proof: they must be fetched first")
	}
	keys, err := ParseKeys(e.JWKS)
	if err != nil {
		return Proven{}, err
	}
	return e.VerifyToken(keys, token, audience, now)
}

// VerifyToken is [Expect.Verify] with keys that the caller fetched from the one place that belongs to the kind: the
// registered issuer's, or Google's. What a token says must have had no part in where.
func (e Expect) VerifyToken(keys Keys, token, audience string, now time.Time) (Proven, error) {
	if err := e.Check(); err != nil {
		return Proven{}, err
	}
	if audience == "" {
		return Proven{}, fault.New("identity.Verify", fault.Internal, "no audience was given to compare with")
	}
	switch e.Kind {
	case KindKubernetes:
		return e.verifyKubernetes(keys, token, audience, now)
	case KindDev:
		return e.verifyDev(keys, token, audience, now)
	case KindGCP:
		return e.verifyGCP(keys, token, audience, now)
	}
	return Proven{}, fault.New("identity.Verify", fault.Invalid, "an appliance on %s proves itself by a signed request, not by a token",
		e.Kind)
}

func (e Expect) verifyKubernetes(keys Keys, token, audience string, now time.Time) (Proven, error) {
	const op = "identity.Verify"
	var c claims
	if err := keys.open(token, "", &c); err != nil {
		return Proven{}, err
	}
	subject := "system:serviceaccount:" + e.Namespace + ":" + e.ServiceAccount
	switch {
	case c.Issuer != e.Issuer:
		return Proven{}, fault.New(op, fault.Denied, "the token was issued by %q, and %q is registered", fault.Clip(c.Issuer), e.Issuer)
	case len(c.Audience) != 1 || c.Audience[0] != audience:
		return Proven{}, wrongAudience()
	case c.Subject != subject:
		return Proven{}, fault.New(op, fault.Denied, "the token is that of %q, and %q is registered", fault.Clip(c.Subject), subject)
	case c.Cluster.Namespace != "" && c.Cluster.Namespace != e.Namespace,
		c.Cluster.Account.Name != "" && c.Cluster.Account.Name != e.ServiceAccount:
		return Proven{}, fault.New(op, fault.Denied, "the token contradicts itself about its service account")
	}
	till, err := c.times.check(now, "use a projected token, not a Secret's")
	if err != nil {
		return Proven{}, err
	}
	if len(c.Cluster.Account.UID) > maxUID {
		return Proven{}, fault.New(op, fault.Denied, "the token names a service account whose UID has more than %d bytes", maxUID)
	}
	return Proven{Kind: e.Kind, Issuer: c.Issuer, Subject: c.Subject, UID: c.Cluster.Account.UID, Pod: c.Cluster.Pod.Name, Expires: till}, nil
}

// maxUID bounds what is remembered of an account, in bytes.
const maxUID = 128

func wrongAudience() error {
	return fault.New("identity.Verify", fault.Denied, "the token is not made out to this nonce, this key and this trust domain: its "+
		"audience must be exactly the one that was asked for")
}

// times is when a token is good.
type times struct {
	Expiry    *jwt.NumericDate `json:"exp"`
	NotBefore *jwt.NumericDate `json:"nbf"`
	IssuedAt  *jwt.NumericDate `json:"iat"`
}

// check gives the end of the token's life.
func (c times) check(now time.Time, instead string) (time.Time, error) {
	const op = "identity.Verify"
	switch {
	case c.Expiry == nil:
		return time.Time{}, fault.New(op, fault.Denied, "the token never expires: %s", instead)
	case !now.Add(-skew).Before(c.Expiry.Time()):
		return time.Time{}, fault.New(op, fault.Expired, "the token ran out at %s, and it is %s here: request another, and compare the clocks",
			stamp(c.Expiry.Time()), stamp(now))
	case c.NotBefore != nil && now.Add(skew).Before(c.NotBefore.Time()),
		c.IssuedAt != nil && now.Add(skew).Before(c.IssuedAt.Time()):
		return time.Time{}, fault.New(op, fault.Expired, "the token is not valid yet, and it is %s here: compare the clocks", stamp(now))
	}
	return c.Expiry.Time().UTC(), nil
}
