// SPDX-License-Identifier: Apache-2.0

// Package login verifies ID tokens of the vendor's OpenID Connect issuer (OpenID Connect Core 1.0). Which issuer, and where its
// keys are, is fixed by the operator's file: no token and no caller has a say in whom it asks.
package login

import (
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/coreos/go-oidc/v3/oidc"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
)

// Bounds.
const (
	MaxToken   = 16 << 10         // bytes
	maxAnswer  = 256 << 10        // bytes of the issuer's documents
	maxAge     = 10 * time.Minute // of a token when it is shown
	maxSkew    = 2 * time.Minute  // that the issuer's clock may be ahead
	askTimeout = 10 * time.Second
)

// Role is what those in a group may do.
type Role struct {
	Group string
	Rank  fleet.Rank
}

// Options says which tokens are good.
type Options struct {
	Issuer      string
	ClientID    string
	KeyHosts    []string       // where the issuer's keys may be beside its own host
	Roots       *x509.CertPool // nil: the system's
	NameClaim   string
	Domains     []string // of addresses, where NameClaim is email
	GroupsClaim string
	Roles       []Role
	Now         func() time.Time
}

// Person is who a token is about.
type Person struct {
	Name    string       // of the operator: a readable part, and one that no other person of the issuer has
	Rank    fleet.Rank   // the most that the groups give
	Subject fleet.Digest // of issuer and sub
	Claim   string       // what the person is called after, for the record
	Token   fleet.Digest // of the token's signed part
	Till    time.Time    // when the token ends
}

// Verifier verifies tokens. Its methods may be called concurrently. The issuer is asked when the first token comes.
type Verifier struct {
	Options
	client *http.Client
	mu     sync.Mutex
	keys   oidc.KeySet
}

// New makes a verifier. It asks nobody yet.
func New(o Options) *Verifier {
	tr := &http.Transport{TLSClientConfig: &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: o.Roots}, ForceAttemptHTTP2: true,
		TLSHandshakeTimeout: askTimeout, MaxIdleConns: 2, IdleConnTimeout: 30 * time.Second, Proxy: http.ProxyFromEnvironment}
	return &Verifier{Options: o, client: &http.Client{Transport: bounded{tr}, Timeout: askTimeout,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}} // an answer sends nobody elsewhere
}

// bounded cuts answers that are too long, which then do not parse.
type bounded struct{ way *http.Transport }

// RoundTrip implements http.RoundTripper.
func (b bounded) RoundTrip(r *http.Request) (*http.Response, error) {
	if r.URL.Scheme != "https" {
		return nil, fault.New("login.ask", fault.Denied, "the issuer is asked over https only")
	}
	res, err := b.way.RoundTrip(r)
	if err == nil {
		res.Body = struct {
			io.Reader
			io.Closer
		}{io.LimitReader(res.Body, maxAnswer), res.Body}
	}
	return res, err
}

// Close lets the connections to the issuer go.
func (v *Verifier) Close() {
	v.client.CloseIdleConnections()
	v.client.Transport.(bounded).way.CloseIdleConnections()
}

// Nonce is what a token must carry so that it is good for one key, which is given as PKIX in DER.
func Nonce(spki []byte) string {
	sum := sha256.Sum256(append([]byte("demarc-operator-login/1\n"), spki...))
	return base64.RawURLEncoding.EncodeToString(sum[:])
}

// keySet discovers where the issuer's keys are, once.
func (v *Verifier) keySet(ctx context.Context) (oidc.KeySet, error) {
	const op = "login.keys"
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.keys != nil {
		return v.keys, nil
	}
	p, err := oidc.NewProvider(oidc.ClientContext(ctx, v.client), v.Issuer)
	if err != nil {
		return nil, fault.Because(err, op, fault.Unavailable, "the issuer does not say where its keys are: try again, or have an admin look at oidc.issuer")
	}
	var doc struct {
		Keys string `json:"jwks_uri"`
	}
	if err := p.Claims(&doc); err != nil {
		return nil, fault.Because(err, op, fault.Unavailable, "the issuer's document does not parse")
	}
	own, _ := url.Parse(v.Issuer)
	at, err := url.Parse(doc.Keys)
	if err != nil || at.Scheme != "https" || at.User != nil || own == nil || at.Host != own.Host && !slices.Contains(v.KeyHosts, at.Host) {
		return nil, fault.Because(err, op, fault.Denied, "the issuer's keys are on a host that is neither its own nor in oidc.key_hosts")
	}
	v.keys = oidc.NewRemoteKeySet(oidc.ClientContext(context.WithoutCancel(ctx), v.client), doc.Keys) // it outlives this call; the client bounds its time
	return v.keys, nil
}

// claims is what is read of a token beside the standard part, after its signature was checked.
type claims struct {
	AZP      string `json:"azp"`
	Verified *bool  `json:"email_verified"`
}

// Verify checks a token that must carry this nonce, and tells who it is about. fault.Denied where it is not good, Expired where
// it was, Unavailable where the issuer can't be asked.
func (v *Verifier) Verify(ctx context.Context, token, nonce string) (Person, error) {
	const op = "login.Verify"
	if len(token) > MaxToken {
		return Person{}, fault.New(op, fault.Invalid, "the token has %d bytes, the limit is %d", len(token), MaxToken)
	}
	keys, err := v.keySet(ctx)
	if err != nil {
		return Person{}, err
	}
	t, err := oidc.NewVerifier(v.Issuer, keys, &oidc.Config{ClientID: v.ClientID, SupportedSigningAlgs: []string{oidc.RS256, oidc.ES256}, Now: v.Now}).Verify(ctx, token)
	if err != nil {
		return Person{}, refusal(err)
	}
	var c claims
	all := map[string]any{}
	if err := errors.Join(t.Claims(&c), t.Claims(&all)); err != nil {
		return Person{}, fault.Because(err, op, fault.Denied, "the token's claims do not parse")
	}
	now := v.Now()
	switch {
	case subtle.ConstantTimeCompare([]byte(t.Nonce), []byte(nonce)) != 1:
		return Person{}, fault.New(op, fault.Denied, "the token was not made for this key: its nonce is another one")
	case len(t.Audience) != 1 && c.AZP != v.ClientID, c.AZP != "" && c.AZP != v.ClientID:
		return Person{}, fault.New(op, fault.Denied, "the token was made for another client")
	case t.Subject == "" || len(t.Subject) > 255:
		return Person{}, fault.New(op, fault.Denied, "the token names nobody")
	case t.IssuedAt.After(now.Add(maxSkew)):
		return Person{}, fault.New(op, fault.Denied, "the token was issued in the future: compare the clocks of the issuer and of this control plane")
	case now.Sub(t.IssuedAt) > maxAge:
		return Person{}, fault.New(op, fault.Expired, "the token is more than %s old: log in again", maxAge)
	}
	called, err := v.called(all, c)
	if err != nil {
		return Person{}, err
	}
	rank := v.rank(all)
	if rank == "" {
		return Person{}, fault.New(op, fault.Denied, "none of your groups has a role here: ask who keeps the groups of the issuer")
	}
	subject := sha256.Sum256([]byte(v.Issuer + "\x00" + t.Subject))
	signed := token[:strings.LastIndexByte(token, '.')] // an ECDSA signature has two spellings, what it signs has one
	return Person{Name: name(called, hex.EncodeToString(subject[:5])), Rank: rank, Subject: fleet.DigestOf([]byte(v.Issuer + "\x00" + t.Subject)), Claim: called,
		Token: fleet.DigestOf([]byte(signed)), Till: t.Expiry}, nil
}

func refusal(err error) error {
	const op = "login.Verify"
	var expired *oidc.TokenExpiredError
	var way *url.Error
	switch {
	case errors.As(err, &expired):
		return fault.Because(err, op, fault.Expired, "the token ran out: log in again")
	case errors.As(err, &way):
		return fault.Because(err, op, fault.Unavailable, "the issuer's keys can't be fetched: try again")
	}
	return fault.Because(err, op, fault.Denied, "the token is not one of the issuer for this client, or its signature is not good")
}

// called is what the person is called after.
func (v *Verifier) called(all map[string]any, c claims) (string, error) {
	const op = "login.Verify"
	s, _ := all[v.NameClaim].(string)
	if s == "" || len(s) > 320 {
		return "", fault.New(op, fault.Denied, "the token has no claim %q", v.NameClaim)
	}
	if v.NameClaim != "email" {
		return s, nil
	}
	at := strings.LastIndexByte(s, '@')
	switch {
	case c.Verified == nil || !*c.Verified:
		return "", fault.New(op, fault.Denied, "the issuer has not verified the address in the token")
	case at < 1 || !slices.Contains(v.Domains, strings.ToLower(s[at+1:])):
		return "", fault.New(op, fault.Denied, "the address in the token is of a domain that is not let in")
	}
	return s, nil
}

// rank is the most that the groups give, "" where none gives anything.
func (v *Verifier) rank(all map[string]any) (most fleet.Rank) {
	var groups []any
	switch g := all[v.GroupsClaim].(type) {
	case []any:
		groups = g
	case string:
		groups = []any{g}
	}
	for _, r := range v.Roles {
		if slices.Contains(groups, any(r.Group)) && (most == "" || r.Rank.Covers(most)) {
			most = r.Rank
		}
	}
	return most
}

// name makes the name of an operator, in the letters that a name may have.
func name(called, unique string) string {
	local, _, _ := strings.Cut(called, "@")
	var b strings.Builder
	for _, r := range strings.ToLower(local) {
		switch {
		case r >= 'a' && r <= 'z', r >= '0' && r <= '9':
			b.WriteRune(r)
		case b.Len() > 0 && !strings.HasSuffix(b.String(), "-"):
			b.WriteByte('-')
		}
	}
	readable := strings.Trim(b.String()[:min(b.Len(), 40)], "-")
	if readable == "" {
		readable = "operator"
	}
	return readable + "-" + unique
}
