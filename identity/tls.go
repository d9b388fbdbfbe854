// SPDX-License-Identifier: Apache-2.0

package identity

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"slices"
	"sync/atomic"
	"time"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
)

// Source is the own certificate and the CAs that are trusted, at this moment: both are asked anew in each
// handshake, so that a rotation needs no restart. It must be safe for concurrent calls.
//
// Leaf may answer nil, nil where there is no certificate yet: a client then presents none.
// A Source that also has Now() time.Time brings the clock of its handshakes.
type Source interface {
	Leaf() (*tls.Certificate, error)
	Roots() *x509.CertPool
}

// Fixed is a Source that never changes.
func Fixed(leaf *tls.Certificate, roots *x509.CertPool) Source { return fixed{leaf, roots} }

type fixed struct {
	leaf  *tls.Certificate
	roots *x509.CertPool
}

func (f fixed) Leaf() (*tls.Certificate, error) { return f.leaf, nil }
func (f fixed) Roots() *x509.CertPool           { return f.roots }

func base(s Source, protos []string) *tls.Config {
	c := &tls.Config{
		MinVersion:             tls.VersionTLS13,
		CurvePreferences:       []tls.CurveID{tls.X25519MLKEM768, tls.X25519, tls.CurveP256},
		NextProtos:             slices.Clone(protos),
		SessionTicketsDisabled: true, // each connection proves itself: a ban holds from the next handshake on
	}
	if t, ok := s.(interface{ Now() time.Time }); ok {
		c.Time = t.Now
	}
	return c
}

// roots never gives nil: crypto/tls takes nil for the roots of the host.
func roots(s Source) *x509.CertPool {
	if p := s.Roots(); p != nil {
		return p
	}
	return x509.NewCertPool()
}

// Server is the config of a door. It speaks TLS 1.3 only. A caller with a certificate is let in when the chain
// ends in a trusted CA of the leaf's own trust domain, the leaf is for clients, and admit agrees; a caller without
// one only when needClient is false, and then [PrincipalOf] names nobody. With protos, a caller must choose one.
// The clones that crypto/tls makes a handshake are its own: do not change ClientAuth or GetConfigForClient.
func Server(s Source, admit func(fleet.Principal, fleet.Serial) error, needClient bool, protos ...string) *tls.Config {
	const op = "identity.Server"
	c := base(s, protos)
	c.ClientAuth = tls.VerifyClientCertIfGiven
	if needClient {
		c.ClientAuth = tls.RequireAndVerifyClientCert
	}
	c.ClientCAs = x509.NewCertPool() // trusts nobody, should GetConfigForClient be lost
	c.GetCertificate = func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
		leaf, err := s.Leaf()
		if err == nil && leaf == nil {
			err = fault.New(op, fault.Unavailable, "this node has no certificate yet")
		}
		return leaf, err
	}
	c.VerifyConnection = func(state tls.ConnectionState) error {
		if len(protos) > 0 && state.NegotiatedProtocol == "" {
			return fault.New(op, fault.Denied, "the caller chose none of the protocols %q (ALPN)", protos)
		}
		if len(state.PeerCertificates) == 0 && !needClient {
			return nil
		}
		if len(state.VerifiedChains) == 0 {
			return fault.New(op, fault.Denied, "the caller proved no identity: call with a client certificate of this trust domain")
		}
		who, serial, err := principalOfChain(state.VerifiedChains[0])
		if err != nil {
			return err
		}
		if !named(state.VerifiedChains[0][0], x509.ExtKeyUsageClientAuth) {
			return fault.New(op, fault.Denied, "the certificate of %s is not for clients", who)
		}
		if admit == nil {
			return fault.New(op, fault.Denied, "this door admits nobody")
		}
		return admit(who, serial)
	}
	whole := c.Clone()
	var latest atomic.Pointer[tls.Config] // every connection keeps its config: those with the same CAs share one
	c.GetConfigForClient = func(*tls.ClientHelloInfo) (*tls.Config, error) {
		cas := roots(s)
		if now := latest.Load(); now != nil && now.ClientCAs == cas {
			return now, nil
		}
		now := whole.Clone()
		now.ClientCAs = cas
		latest.Store(now)
		return now, nil
	}
	return c
}

// Client is the config of a caller. Who answers is proven by its SPIFFE ID in a chain that ends in a trusted CA of
// the same trust domain, and want decides whether that is whom the caller meant; the DNS name and the address
// decide nothing, so any route will do. With protos, the answerer must choose one.
//
// A certificate of a foreign CA, as a proxy that opens TLS shows, is an error that names its issuer and holds an
// [x509.UnknownAuthorityError]; a certificate that is not valid now is fault.Expired.
func Client(s Source, want func(fleet.Principal) error, protos ...string) *tls.Config {
	const op = "identity.Client"
	c := base(s, protos)
	// The verification that this switches off matches a DNS name. VerifyConnection below does all the rest of it.
	c.InsecureSkipVerify = true
	c.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
		leaf, err := s.Leaf()
		if err == nil && leaf == nil {
			leaf = &tls.Certificate{}
		}
		return leaf, err
	}
	c.VerifyConnection = func(state tls.ConnectionState) error {
		if len(state.PeerCertificates) == 0 {
			return fault.New(op, fault.Denied, "the answerer presented no certificate")
		}
		opts := x509.VerifyOptions{
			Roots:         roots(s),
			Intermediates: Pool(state.PeerCertificates[1:]),
			KeyUsages:     []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		}
		if c.Time != nil {
			opts.CurrentTime = c.Time()
		}
		chains, err := state.PeerCertificates[0].Verify(opts)
		if err != nil {
			return untrusted(op, state.PeerCertificates[0], err)
		}
		// After the chain: a proxy that opens TLS mostly knows no ALPN of ours, and is told by its certificate.
		if len(protos) > 0 && state.NegotiatedProtocol == "" {
			return fault.New(op, fault.Denied, "the answerer chose none of the protocols %q (ALPN)", protos)
		}
		who, _, err := principalOfChain(chains[0])
		if err != nil {
			return err
		}
		if !named(chains[0][0], x509.ExtKeyUsageServerAuth) {
			return fault.New(op, fault.Denied, "the certificate of %s is not for servers", who)
		}
		if want == nil {
			return fault.New(op, fault.Denied, "this caller wants nobody")
		}
		return want(who)
	}
	return c
}

func untrusted(op string, leaf *x509.Certificate, err error) error {
	var invalid x509.CertificateInvalidError
	var foreign x509.UnknownAuthorityError
	switch {
	case errors.As(err, &invalid) && invalid.Reason == x509.Expired:
		return fault.Because(err, op, fault.Expired, "the certificate is valid from %s to %s, and by the clock of this host it is not so now: "+
			"compare the clocks", stamp(leaf.NotBefore), stamp(leaf.NotAfter))
	case errors.As(err, &foreign):
		return fault.Because(err, op, fault.Denied, "the certificate was issued by %q, which is not your vendor: a proxy on the path opens "+
			"TLS, or the bundle is that of another control plane", fault.Clip(leaf.Issuer.String()))
	}
	return fault.Because(err, op, fault.Denied, "the certificate issued by %q does not verify", fault.Clip(leaf.Issuer.String()))
}

// WantNode accepts the nodes of a trust domain: any of them, or only the named ones.
func WantNode(trustDomain string, names ...string) func(fleet.Principal) error {
	return func(who fleet.Principal) error {
		td, role, name, ok := who.Split()
		if ok && td == trustDomain && role == fleet.Node && (len(names) == 0 || slices.Contains(names, name)) {
			return nil
		}
		return fault.New("identity.WantNode", fault.Denied, "%s answered, and a node of trust domain %q was wanted", fault.Clip(string(who)),
			trustDomain)
	}
}
