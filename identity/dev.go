// SPDX-License-Identifier: Apache-2.0

package identity

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"io"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
)

// What tells a development token from that of any platform: its issuer and its type are fixed, and both are checked.
const (
	DevIssuer    = "demarc:development" // iss; no cluster can be registered under it
	DevTokenType = "demarc-dev+jwt"     // typ of the header; a token of another kind must not carry it
	DevTokenLife = 5 * time.Minute
)

// DevKey signs development tokens: it stands in for a platform on a laptop. Whoever has its file is any appliance that is
// registered with it, so only a trust domain that was made for development takes it.
type DevKey struct {
	key *ecdsa.PrivateKey
	kid string
}

// NewDevKey draws a P-256 key.
func NewDevKey(rand io.Reader) (DevKey, error) {
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand)
	if err != nil {
		return DevKey{}, fault.At("identity.NewDevKey", fault.Internal, err)
	}
	return newDevKey(k)
}

// ParseDevKey reads what [DevKey.PEM] wrote.
func ParseDevKey(b []byte) (DevKey, error) {
	const op = "identity.ParseDevKey"
	block, rest := pem.Decode(b)
	if block == nil || block.Type != devKeyBlock || len(rest) > 0 {
		return DevKey{}, fault.New(op, fault.Invalid, "this is no key of demarc platform dev init")
	}
	k, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return DevKey{}, fault.At(op, fault.Invalid, err)
	}
	ec, ok := k.(*ecdsa.PrivateKey)
	if !ok || ec.Curve != elliptic.P256() {
		return DevKey{}, fault.New(op, fault.Invalid, "the key is not on P-256")
	}
	return newDevKey(ec)
}

const devKeyBlock = "DEMARC DEVELOPMENT PRIVATE KEY"

func newDevKey(k *ecdsa.PrivateKey) (DevKey, error) {
	spki, err := x509.MarshalPKIXPublicKey(&k.PublicKey)
	if err != nil {
		return DevKey{}, fault.At("identity.DevKey", fault.Internal, err)
	}
	sum := sha256.Sum256(spki)
	return DevKey{key: k, kid: "dev-" + base64.RawURLEncoding.EncodeToString(sum[:12])}, nil
}

// PEM is the private key, PKCS #8 in a block of its own name.
func (k DevKey) PEM() ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(k.key)
	if err != nil {
		return nil, fault.At("identity.DevKey", fault.Internal, err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: devKeyBlock, Bytes: der}), nil
}

// JWKS is the public key, as it is registered.
func (k DevKey) JWKS() ([]byte, error) {
	b, err := json.Marshal(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: &k.key.PublicKey, KeyID: k.kid,
		Algorithm: string(jose.ES256), Use: "sig"}}})
	return b, fault.At("identity.DevKey", fault.Internal, err)
}

// Token signs that the caller is name, for one audience of at most 1 KiB, for [DevTokenLife].
func (k DevKey) Token(name, audience string, now time.Time) (string, error) {
	const op = "identity.DevToken"
	if err := fleet.CheckName("development", name); err != nil {
		return "", err
	}
	if audience == "" || len(audience) > 1<<10 {
		return "", fault.New(op, fault.Invalid, "the audience has %d bytes: 1 to %d are taken", len(audience), 1<<10)
	}
	s, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: k.key, KeyID: k.kid}},
		(&jose.SignerOptions{}).WithType(DevTokenType))
	if err != nil {
		return "", fault.At(op, fault.Internal, err)
	}
	token, err := jwt.Signed(s).Claims(map[string]any{"iss": DevIssuer, "sub": name, "aud": []string{audience},
		"iat": now.Unix(), "nbf": now.Unix(), "exp": now.Add(DevTokenLife).Unix()}).Serialize()
	return token, fault.At(op, fault.Internal, err)
}

func (e Expect) checkDev() error {
	if err := fleet.CheckName("development", e.Subject); err != nil {
		return wrong("subject", err, ": %s", fault.Text(err))
	}
	return e.checkJWKS()
}

// verifyDev compares a development token. It is as strict as that of Kubernetes, and bounds the token's whole life, too.
func (e Expect) verifyDev(keys Keys, token, audience string, now time.Time) (Proven, error) {
	const op = "identity.Verify"
	var c claims
	if err := keys.open(token, DevTokenType, &c); err != nil {
		return Proven{}, err
	}
	switch {
	case c.Issuer != DevIssuer:
		return Proven{}, fault.New(op, fault.Denied,
			"the token was issued by %q, and only demarc platform dev issues those of development", fault.Clip(c.Issuer))
	case len(c.Audience) != 1 || c.Audience[0] != audience:
		return Proven{}, wrongAudience()
	case c.Subject != e.Subject:
		return Proven{}, fault.New(op, fault.Denied, "the token is that of %q, and %q is registered", fault.Clip(c.Subject), e.Subject)
	}
	till, err := c.times.check(now, "use demarc platform dev token")
	if err != nil {
		return Proven{}, err
	}
	if c.IssuedAt == nil || till.Sub(c.IssuedAt.Time()) > DevTokenLife {
		return Proven{}, fault.New(op, fault.Denied, "the token lives for more than %s: use demarc platform dev token", DevTokenLife)
	}
	return Proven{Kind: e.Kind, Issuer: c.Issuer, Subject: c.Subject, Expires: till}, nil
}
