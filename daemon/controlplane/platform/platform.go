// SPDX-License-Identifier: Apache-2.0

// Package platform asks the platforms about a proof: AWS STS about a signed request, Google and allow-listed clusters for
// the keys that they sign with. Where it asks is fixed by this package and by the operator's file, never by an appliance,
// a registration or a token.
package platform

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"syscall"
	"time"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/identity"
)

// GoogleKeys is where Google publishes the keys of its identity tokens.
const GoogleKeys = "https://www.googleapis.com/oauth2/v3/certs"

// Bounds of a question to a platform.
const (
	askTimeout  = 10 * time.Second
	dialTimeout = 5 * time.Second
	maxHead     = 16 << 10
)

// Issuer is a Kubernetes issuer whose keys may be fetched.
type Issuer struct {
	URL         string         // exactly as it is registered
	Roots       *x509.CertPool // nil: the system's
	PrivateHost string         // the issuer's host, where it may have a private or loopback address; "": it may not
}

// Options is what a node of the control plane may ask.
type Options struct {
	GoogleKeys string // where Google's keys are; "": [GoogleKeys]
	Issuers    []Issuer
	Now        func() time.Time

	// For tests. Dial replaces the dialling of AWS and Google; Roots is what they are verified by, nil for the system's.
	Dial  func(ctx context.Context, network, addr string) (net.Conn, error)
	Roots *x509.CertPool
}

// Proof is what an appliance handed over: a token or, on AWS, a signed identity.
type Proof struct {
	Token string
	AWS   *identity.SignedIdentity
}

// Verifier verifies proofs. Its methods may be called concurrently. It starts no goroutine of its own.
type Verifier struct {
	sts     *http.Client
	google  *keyring
	issuers map[string]*keyring
}

// New makes a verifier. It asks nobody yet.
func New(o Options) (*Verifier, error) {
	const op = "platform.New"
	if o.GoogleKeys == "" {
		o.GoogleKeys = GoogleKeys
	}
	if u, err := url.Parse(o.GoogleKeys); err != nil || u.Scheme != "https" || u.Host == "" || u.User != nil {
		return nil, fault.Because(err, op, fault.Invalid, "the address of Google's keys must be an https URL")
	}
	dial := o.Dial
	if dial == nil {
		dial = dialer(privateToo).DialContext
	}
	fixed := client(dial, o.Roots)
	v := &Verifier{sts: fixed, issuers: map[string]*keyring{}}
	v.google = &keyring{now: o.Now, fetch: func(ctx context.Context) (identity.Keys, error) {
		b, err := get(ctx, fixed, o.GoogleKeys)
		if err != nil {
			return identity.Keys{}, err
		}
		return identity.ParseKeys(b)
	}}
	for _, i := range o.Issuers {
		k, err := newIssuer(i, o.Now)
		if err != nil {
			return nil, err
		}
		v.issuers[i.URL] = k
	}
	return v, nil
}

func newIssuer(i Issuer, now func() time.Time) (*keyring, error) {
	const op = "platform.New"
	if err := identity.CheckIssuer(i.URL); err != nil {
		return nil, fault.At(op, "", err)
	}
	u, err := url.Parse(i.URL)
	if err != nil {
		return nil, fault.At(op, fault.Invalid, err)
	}
	may := publicOnly
	if i.PrivateHost != "" {
		if i.PrivateHost != u.Hostname() {
			return nil, fault.New(op, fault.Invalid, "private_host %q is not the host of the issuer %s", i.PrivateHost, i.URL)
		}
		may = loopbackToo
	}
	c := client(dialer(may).DialContext, i.Roots)
	return &keyring{now: now, fetch: func(ctx context.Context) (identity.Keys, error) {
		doc, err := get(ctx, c, identity.DiscoveryURL(i.URL))
		if err != nil {
			return identity.Keys{}, err
		}
		at, err := identity.KeysURL(doc, i.URL)
		if err != nil {
			return identity.Keys{}, err
		}
		b, err := get(ctx, c, at)
		if err != nil {
			return identity.Keys{}, err
		}
		return identity.ParseKeys(b)
	}}, nil
}

// CheckExpect tells whether this node can verify what is registered: an issuer whose keys are to be fetched must be listed.
func (v *Verifier) CheckExpect(e identity.Expect) error {
	if err := e.Check(); err != nil || !e.Discovery {
		return err
	}
	if v == nil || v.issuers[e.Issuer] == nil {
		return fault.New("platform.CheckExpect", fault.Denied, "the issuer is not listed under platforms.kubernetes.issuers of the control plane: list it there exactly as it is spelled, or pin its keys")
	}
	return nil
}

// Verify tells whether the proof, made out to exactly the audience, proves what is registered. A nil verifier knows
// pinned keys only.
func (v *Verifier) Verify(ctx context.Context, e identity.Expect, p Proof, audience string, now time.Time) (identity.Proven, error) {
	const op = "platform.Verify"
	if (p.AWS != nil) != (e.Kind == identity.KindAWS) || (p.AWS != nil && p.Token != "") {
		return identity.Proven{}, fault.New(op, fault.Invalid, "the appliance is registered with a proof of kind %s, and shows another: see proof.kind in its file", e.Kind)
	}
	if e.Kind == identity.KindDev || e.Kind == identity.KindKubernetes && !e.Discovery {
		return e.Verify(p.Token, audience, now)
	}
	if err := v.CheckExpect(e); err != nil {
		return identity.Proven{}, err
	}
	if v == nil {
		return identity.Proven{}, fault.New(op, fault.Internal, "this node asks no platform")
	}
	if e.Kind == identity.KindAWS {
		req, err := e.STSRequest(*p.AWS, audience, now)
		if err != nil {
			return identity.Proven{}, err
		}
		return v.ask(ctx, e, req)
	}
	kid, err := identity.KeyOf(p.Token)
	if err != nil {
		return identity.Proven{}, err
	}
	ring := v.google
	if e.Kind == identity.KindKubernetes {
		ring = v.issuers[e.Issuer]
	}
	keys, err := ring.get(ctx, kid)
	if err != nil {
		return identity.Proven{}, err
	}
	return e.VerifyToken(keys, p.Token, audience, now)
}

// ask sends the request that was written anew to STS.
func (v *Verifier) ask(ctx context.Context, e identity.Expect, q identity.STSRequest) (identity.Proven, error) {
	const op = "platform.AWS"
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, "https://"+q.Host+"/", strings.NewReader(q.Body))
	if err != nil {
		return identity.Proven{}, fault.At(op, fault.Internal, err)
	}
	for _, h := range q.Headers {
		r.Header.Set(h.Name, h.Value)
	}
	res, err := v.sts.Do(r)
	if err != nil {
		return identity.Proven{}, fault.Because(err, op, fault.Unavailable, "the control plane can't reach %s: try again", q.Host)
	}
	defer res.Body.Close()
	b, err := io.ReadAll(io.LimitReader(res.Body, identity.MaxSTSAnswer+1))
	if err != nil {
		return identity.Proven{}, fault.Because(err, op, fault.Unavailable, "the answer of %s was cut off: try again", q.Host)
	}
	return e.VerifySTS(q, res.StatusCode, b)
}

// client follows no redirect, uses no proxy, verifies TLS and keeps few connections.
func client(dial func(ctx context.Context, network, addr string) (net.Conn, error), roots *x509.CertPool) *http.Client {
	return &http.Client{
		Timeout:       askTimeout,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		Transport: &http.Transport{
			DialContext:            dial,
			TLSClientConfig:        &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: roots},
			TLSHandshakeTimeout:    dialTimeout,
			ResponseHeaderTimeout:  askTimeout,
			MaxResponseHeaderBytes: maxHead,
			DisableCompression:     true,
			DisableKeepAlives:      true,
		},
	}
}

// get fetches a small document. A redirect is an answer like any other that is not 200.
func get(ctx context.Context, c *http.Client, at string) ([]byte, error) {
	const op = "platform.get"
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, at, nil)
	if err != nil {
		return nil, fault.At(op, fault.Internal, err)
	}
	res, err := c.Do(r)
	var no *refusedAddr
	if errors.As(err, &no) {
		return nil, fault.Because(err, op, fault.Denied, "the issuer's host has the address %s, which is not a public one: list the host as private_host if that is meant", no.addr)
	}
	if err != nil {
		return nil, fault.Because(err, op, fault.Unavailable, "the control plane can't fetch the platform's keys: try again")
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		return nil, fault.New(op, fault.Unavailable, "the platform answers %d in place of its keys", res.StatusCode)
	}
	b, err := io.ReadAll(io.LimitReader(res.Body, identity.MaxJWKS+1))
	if err != nil || len(b) > identity.MaxJWKS {
		return nil, fault.Because(err, op, fault.Unavailable, "the platform's keys were cut off, or have more than %d bytes", identity.MaxJWKS)
	}
	return b, nil
}

// refusedAddr is an address that is not dialled.
type refusedAddr struct{ addr netip.Addr }

func (e *refusedAddr) Error() string { return "address " + e.addr.String() + " is not dialled" }

// dialer asks about each address after names were resolved, at the moment of the dial: a name can't resolve to one thing
// when it is checked and to another when it is used.
func dialer(may func(netip.Addr) bool) *net.Dialer {
	return &net.Dialer{Timeout: dialTimeout, Control: func(_, address string, _ syscall.RawConn) error {
		ap, err := netip.ParseAddrPort(address)
		if err != nil {
			return fault.At("platform.dial", fault.Internal, err)
		}
		if a := ap.Addr().WithZone("").Unmap(); !may(a) {
			return &refusedAddr{a}
		}
		return nil
	}}
}

// Addresses that carry another inside, or belong to nobody (RFC 6890), and those of the metadata services of clouds.
var (
	neverPublic = prefixes("0.0.0.0/8", "100.64.0.0/10", "192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "198.18.0.0/15", "198.51.100.0/24",
		"203.0.113.0/24", "240.0.0.0/4", "64:ff9b::/96", "64:ff9b:1::/48", "100::/64", "2001::/23", "2001:db8::/32", "2002::/16", "fec0::/10")
	metadata = prefixes("169.254.0.0/16", "fe80::/10", "fd00:ec2::/32", "fd20:ce::/32", "168.63.129.16/32", "100.100.100.200/32")
)

func prefixes(list ...string) []netip.Prefix {
	var out []netip.Prefix
	for _, s := range list {
		out = append(out, netip.MustParsePrefix(s))
	}
	return out
}

func within(a netip.Addr, list []netip.Prefix) bool {
	for _, p := range list {
		if p.Contains(a) {
			return true
		}
	}
	return false
}

// loopbackToo is for a host that the operator named: all but what no issuer ever is.
func loopbackToo(a netip.Addr) bool {
	return a.IsValid() && !a.IsUnspecified() && !a.IsMulticast() && !a.IsLinkLocalUnicast() && !within(a, metadata)
}

// privateToo is for AWS and Google, which a private network may offer at an address of its own.
func privateToo(a netip.Addr) bool { return loopbackToo(a) && !a.IsLoopback() }

func publicOnly(a netip.Addr) bool {
	return privateToo(a) && a.IsGlobalUnicast() && !a.IsPrivate() && !within(a, neverPublic)
}
