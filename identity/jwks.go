// SPDX-License-Identifier: Apache-2.0

package identity

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"net/url"
	"strings"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"

	"github.com/demarc-dev/demarc/fault"
)

// Keys is the public keys of an issuer of tokens (RFC 7517). The zero Keys holds none.
type Keys struct{ set jose.JSONWebKeySet }

// ParseKeys reads a JWKS of at most 64 KiB and 16 keys, each with a kid of its own, each good for one algorithm.
func ParseKeys(jwks []byte) (Keys, error) {
	const op = "identity.ParseKeys"
	if len(jwks) > MaxJWKS {
		return Keys{}, fault.New(op, fault.Invalid, "the JWKS has %d bytes, the limit is %d", len(jwks), MaxJWKS)
	}
	var k Keys
	d := json.NewDecoder(bytes.NewReader(jwks))
	if err := d.Decode(&k.set); err != nil || d.More() {
		return Keys{}, fault.Because(err, op, fault.Invalid, "the JWKS does not parse: give the output of kubectl get --raw /openid/v1/jwks")
	}
	if n := len(k.set.Keys); n == 0 || n > maxKeys {
		return Keys{}, fault.New(op, fault.Invalid, "the JWKS holds %d keys: 1 to %d are needed", n, maxKeys)
	}
	seen := map[string]bool{}
	for i, key := range k.set.Keys {
		if key.KeyID == "" || seen[key.KeyID] {
			return Keys{}, fault.New(op, fault.Invalid, "JWKS key %d: each key needs a kid of its own", i)
		}
		seen[key.KeyID] = true
		if _, err := algorithm(key); err != nil {
			return Keys{}, err
		}
	}
	return k, nil
}

// Has tells whether there is exactly one key of this ID.
func (k Keys) Has(kid string) bool { return kid != "" && len(k.set.Key(kid)) == 1 }

// algorithm is the one algorithm that a key may be used with: the token does not choose.
func algorithm(k jose.JSONWebKey) (jose.SignatureAlgorithm, error) {
	var alg jose.SignatureAlgorithm
	switch pub := k.Key.(type) {
	case *rsa.PublicKey:
		if n := pub.N.BitLen(); n >= 2048 && n <= 4096 {
			alg = jose.RS256
		}
	case *ecdsa.PublicKey:
		if pub.Curve == elliptic.P256() {
			alg = jose.ES256
		}
	}
	if alg == "" || !k.Valid() || (k.Algorithm != "" && k.Algorithm != string(alg)) || (k.Use != "" && k.Use != "sig") {
		return "", fault.New("identity.Expect", fault.Invalid, "JWKS key %q: use public RSA keys of 2048 to 4096 bits (RS256) or P-256 keys "+
			"(ES256), for signatures", fault.Clip(k.KeyID))
	}
	return alg, nil
}

// parse reads a token's header. Of what it says, only the algorithm and the key's ID are ever looked at.
func parse(token string) (*jwt.JSONWebToken, jose.Header, error) {
	const op = "identity.Verify"
	if len(token) > MaxToken {
		return nil, jose.Header{}, fault.New(op, fault.Invalid, "the token has %d bytes, the limit is %d", len(token), MaxToken)
	}
	t, err := jwt.ParseSigned(token, []jose.SignatureAlgorithm{jose.RS256, jose.ES256})
	if err != nil {
		return nil, jose.Header{}, fault.Because(err, op, fault.Invalid, "this is not a token signed with RS256 or ES256")
	}
	if len(t.Headers) != 1 {
		return nil, jose.Header{}, fault.New(op, fault.Invalid, "the token must carry one signature")
	}
	return t, t.Headers[0], nil
}

// KeyOf is the ID of the key that a token names. It proves nothing: it tells whether keys that are held may be too old.
func KeyOf(token string) (string, error) {
	_, h, err := parse(token)
	return h.KeyID, err
}

// open checks the type, and the signature with the known key that the token names, and only then reads the claims into c. typ is
// the one type that is taken; "": any but [DevTokenType].
func (k Keys) open(token, typ string, c any) error {
	const op = "identity.Verify"
	t, h, err := parse(token)
	if err != nil {
		return err
	}
	switch got, _ := h.ExtraHeaders[jose.HeaderType].(string); {
	case typ == "" && got == DevTokenType:
		return fault.New(op, fault.Denied, "this is a development token (demarc platform dev), and the appliance is registered with a platform")
	case typ != "" && got != typ:
		return fault.New(op, fault.Denied, "the token is of the type %q, and %q is needed: use demarc platform dev token", fault.Clip(got), typ)
	}
	if !k.Has(h.KeyID) {
		return fault.New(op, fault.Denied, "the token names key %q, which is not pinned: the cluster's keys were rotated, or it is another "+
			"cluster", fault.Clip(h.KeyID))
	}
	key := k.set.Key(h.KeyID)[0]
	alg, err := algorithm(key)
	if err != nil {
		return err
	}
	if h.Algorithm != string(alg) {
		return fault.New(op, fault.Denied, "the token is signed with %s, and its key is for %s", fault.Clip(h.Algorithm), alg)
	}
	// The bare key is passed, so that nothing in the token's header has a say in which key it is.
	if err := t.Claims(key.Key, c); err != nil {
		return fault.Because(err, op, fault.Denied, "the token's signature is not that of the pinned key, or its claims do not parse")
	}
	return nil
}

// KeysAudience is what a token must be made out to, so that it vouches for these keys, once, at this trust domain.
func KeysAudience(trustDomain, nonce string, jwks []byte) (string, error) {
	if err := CheckTrustDomain(trustDomain); err != nil {
		return "", err
	}
	if nonce == "" {
		return "", fault.New("identity.KeysAudience", fault.Invalid, "there is no nonce: ask for one first")
	}
	sum := sha256.Sum256(jwks)
	return "demarc://" + trustDomain + "/keys?nonce=" + url.QueryEscape(nonce) + "&jwks=" + base64.RawURLEncoding.EncodeToString(sum[:]), nil
}

// KeyName is how people tell a key of an issuer.
type KeyName struct {
	ID         string // kid
	Thumbprint string // SHA-256 (RFC 7638), base64url
}

// Names lists the keys, in the order of the JWKS.
func (k Keys) Names() ([]KeyName, error) {
	var out []KeyName
	for _, key := range k.set.Keys {
		sum, err := key.Thumbprint(crypto.SHA256)
		if err != nil {
			return nil, fault.At("identity.Names", fault.Invalid, err)
		}
		out = append(out, KeyName{ID: key.KeyID, Thumbprint: base64.RawURLEncoding.EncodeToString(sum)})
	}
	return out, nil
}

// CheckIssuer returns nil if keys can be fetched from an issuer: https, a host, and nothing but a path; else a fault with a [FieldError].
func CheckIssuer(issuer string) error {
	u, err := url.Parse(issuer)
	if err != nil || len(issuer) > 512 || u.Scheme != "https" || u.Host == "" || u.Hostname() == "" || u.User != nil || u.RawQuery != "" ||
		u.ForceQuery || u.Fragment != "" ||
		u.Opaque != "" || u.String() != issuer || strings.HasSuffix(issuer, "#") || !plainHost(u.Host) {
		return wrong("issuer", err, " %q: to fetch its keys, an https URL without user, query or fragment is needed", fault.Clip(issuer))
	}
	return nil
}

// plainHost admits what a host and port are written with: no percent signs, no upper case, no unicode.
func plainHost(h string) bool {
	for i := range len(h) {
		c := h[i]
		if (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '.' && c != '-' && c != ':' && c != '[' && c != ']' {
			return false
		}
	}
	return true
}

// DiscoveryURL is where an issuer tells where its keys are (OpenID Connect Discovery 1.0, section 4).
func DiscoveryURL(issuer string) string {
	return strings.TrimSuffix(issuer, "/") + "/.well-known/openid-configuration"
}

// KeysURL reads an issuer's discovery document, of at most 64 KiB, and gives the place of its keys. It must speak for
// exactly this issuer, and its keys must be at the same host and port, over https: a document sends nobody elsewhere.
func KeysURL(doc []byte, issuer string) (string, error) {
	const op = "identity.KeysURL"
	if err := CheckIssuer(issuer); err != nil {
		return "", err
	}
	if len(doc) > MaxJWKS {
		return "", fault.New(op, fault.Invalid, "the discovery document has %d bytes, the limit is %d", len(doc), MaxJWKS)
	}
	var d struct {
		Issuer  string `json:"issuer"`
		JWKSURI string `json:"jwks_uri"`
	}
	if err := json.Unmarshal(doc, &d); err != nil {
		return "", fault.Because(err, op, fault.Invalid, "the issuer's discovery document does not parse")
	}
	if d.Issuer != issuer {
		return "", fault.New(op, fault.Denied, "the discovery document is that of %q, and %q is registered", fault.Clip(d.Issuer),
			fault.Clip(issuer))
	}
	from, _ := url.Parse(issuer)
	to, err := url.Parse(d.JWKSURI)
	if err != nil || to.Scheme != "https" || to.Host != from.Host || to.User != nil || to.Fragment != "" || to.Opaque != "" ||
		to.String() != d.JWKSURI {
		return "", fault.Because(err, op, fault.Denied, "the discovery document sends us to %q for keys: they must be at the issuer's own "+
			"host, over https", fault.Clip(d.JWKSURI))
	}
	return d.JWKSURI, nil
}
