// SPDX-License-Identifier: Apache-2.0

package identity

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/x509"
	"crypto/x509/pkix"
	"io"
	"math/big"
	"net"
	"net/netip"
	"net/url"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
)

// Lives of certificates. Each is a default: the callers' settings go before them.
const (
	DefaultLeafLife = 30 * 24 * time.Hour
	DefaultCALife   = 5 * 365 * 24 * time.Hour
	// DefaultBackdate lets a peer whose clock is ten hours slow accept a certificate that was issued just now.
	DefaultBackdate = 12 * time.Hour
	// MaxCSR bounds a certificate request from a stranger.
	MaxCSR = 16 << 10
)

// Authority is a CA: its certificate, and the key that issues.
type Authority struct {
	Cert *x509.Certificate
	Key  crypto.Signer
}

// NewCA makes the CA of a trust domain with a fresh ECDSA P-256 key. It signs leaves only, for that domain only.
func NewCA(trustDomain string, now time.Time, rand io.Reader, ttl time.Duration) (*Authority, error) {
	const op = "identity.NewCA"
	if err := CheckTrustDomain(trustDomain); err != nil {
		return nil, err
	}
	if ttl <= 0 {
		return nil, fault.New(op, fault.Invalid, "a CA that lives %s: its life must be positive", ttl)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand)
	if err != nil {
		return nil, fault.At(op, fault.Internal, err)
	}
	serial, err := newSerial(rand)
	if err != nil {
		return nil, err
	}
	t := &x509.Certificate{
		SerialNumber: serial,
		// The serial in the name keeps two CAs of one domain apart for people and for path building.
		Subject:               pkix.Name{Organization: []string{"demarc"}, CommonName: cn(trustDomain) + " CA " + serial.Text(16)[:8]},
		NotBefore:             now.Add(-DefaultBackdate).UTC(),
		NotAfter:              now.Add(ttl).UTC(),
		URIs:                  []*url.URL{{Scheme: "spiffe", Host: trustDomain}},
		IsCA:                  true,
		BasicConstraintsValid: true,
		MaxPathLenZero:        true,
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		// Any verifier of X.509, not only ours, refuses a leaf of this CA for another domain.
		PermittedDNSDomainsCritical: true,
		PermittedURIDomains:         []string{trustDomain},
	}
	der, err := x509.CreateCertificate(rand, t, t, key.Public(), key)
	if err != nil {
		return nil, fault.At(op, fault.Internal, err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fault.At(op, fault.Internal, err)
	}
	return &Authority{Cert: cert, Key: key}, nil
}

func cn(s string) string { return s[:min(40, len(s))] }

// CheckTrustDomain tells whether s may be a trust domain: a DNS name in lower case, and no address. SPIFFE allows
// more; a name constraint in X.509, which holds a CA to its domain, does not.
func CheckTrustDomain(s string) error {
	const op = "identity.CheckTrustDomain"
	_, notAddr := netip.ParseAddr(s)
	ok := len(s) <= 253 && notAddr != nil
	for label := range strings.SplitSeq(s, ".") {
		ok = ok && fleet.CheckName("label", label) == nil
	}
	if !ok {
		return fault.New(op, fault.Invalid, "trust domain %q: use a DNS name in lower case, for instance acme.example", fault.Clip(s))
	}
	return nil
}

// IssueOptions is what a leaf may carry besides its principal. DNS names and addresses are for nodes only.
type IssueOptions struct {
	DNSNames []string
	IPs      []netip.Addr
	Backdate time.Duration // zero means DefaultBackdate
	Rand     io.Reader     // required: draws the serial
}

// Issue signs a leaf for who. Of the request only the public key is used, once its signature shows that the asker
// holds the private half; the names in the request count for nothing. The life is cut where the CA's ends.
func (a *Authority) Issue(csr *x509.CertificateRequest, who fleet.Principal, now time.Time, ttl time.Duration,
	extra IssueOptions) (*x509.Certificate, error) {
	const op = "identity.Issue"
	if err := checkCSR(csr); err != nil {
		return nil, err
	}
	ours, err := TrustDomainOf(a.Cert)
	if err != nil {
		return nil, err
	}
	td, role, name, ok := who.Split()
	if !ok || td != ours {
		return nil, fault.New(op, fault.Invalid, "%q is no principal of trust domain %q", fault.Clip(string(who)), ours)
	}
	id, err := spiffeid.FromString(string(who))
	if err != nil {
		return nil, fault.Because(err, op, fault.Invalid, "%q is not a SPIFFE ID", fault.Clip(string(who)))
	}
	if extra.Rand == nil {
		return nil, fault.New(op, fault.Internal, "no source of randomness was given for the serial")
	}
	if now.After(a.Cert.NotAfter) || now.Before(a.Cert.NotBefore) {
		return nil, fault.New(op, fault.Expired, "the CA is valid from %s to %s, and it is %s: make another slot active", stamp(a.Cert.NotBefore),
			stamp(a.Cert.NotAfter), stamp(now))
	}
	if ttl <= 0 || extra.Backdate < 0 {
		return nil, fault.New(op, fault.Invalid, "a certificate that lives %s, backdated %s: life must be positive and backdating not negative",
			ttl, extra.Backdate)
	}
	usage := []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
	if role == fleet.Node {
		usage = append(usage, x509.ExtKeyUsageServerAuth)
	} else if len(extra.DNSNames)+len(extra.IPs) > 0 {
		return nil, fault.New(op, fault.Invalid, "a certificate for the role %s carries no DNS name or address: only nodes serve", role)
	}
	serial, err := newSerial(extra.Rand)
	if err != nil {
		return nil, err
	}
	back := extra.Backdate
	if back == 0 {
		back = DefaultBackdate
	}
	t := &x509.Certificate{
		SerialNumber:          serial,
		Subject:               pkix.Name{CommonName: name},
		NotBefore:             later(now.Add(-back), a.Cert.NotBefore).UTC(),
		NotAfter:              earlier(now.Add(ttl), a.Cert.NotAfter).UTC(),
		URIs:                  []*url.URL{id.URL()},
		DNSNames:              extra.DNSNames,
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           usage,
	}
	for _, ip := range extra.IPs {
		t.IPAddresses = append(t.IPAddresses, net.IP(ip.AsSlice()))
	}
	der, err := x509.CreateCertificate(extra.Rand, t, a.Cert, csr.PublicKey, a.Key)
	if err != nil {
		return nil, fault.At(op, fault.Internal, err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fault.At(op, fault.Internal, err)
	}
	return cert, nil
}

// NewCSR asks for a certificate for the key. It carries no name: who the asker is, is proven beside it.
func NewCSR(key crypto.Signer, rand io.Reader) ([]byte, error) {
	const op = "identity.NewCSR"
	if err := checkKey(key.Public()); err != nil {
		return nil, err
	}
	der, err := x509.CreateCertificateRequest(rand, &x509.CertificateRequest{}, key)
	return der, fault.At(op, fault.Internal, err)
}

// ParseCSR reads a stranger's request (DER) and checks that the asker holds the key.
func ParseCSR(der []byte) (*x509.CertificateRequest, error) {
	const op = "identity.ParseCSR"
	if len(der) > MaxCSR {
		return nil, fault.New(op, fault.Invalid, "the certificate request has %d bytes, the limit is %d", len(der), MaxCSR)
	}
	csr, err := x509.ParseCertificateRequest(der)
	if err != nil {
		return nil, fault.Because(err, op, fault.Invalid, "the certificate request is not PKCS #10 in DER")
	}
	return csr, checkCSR(csr)
}

func checkCSR(csr *x509.CertificateRequest) error {
	const op = "identity.ParseCSR"
	if csr == nil {
		return fault.New(op, fault.Invalid, "there is no certificate request")
	}
	if err := checkKey(csr.PublicKey); err != nil {
		return err
	}
	if err := csr.CheckSignature(); err != nil {
		return fault.Because(err, op, fault.Denied, "the certificate request is not signed by the key that it names")
	}
	return nil
}

func checkKey(pub crypto.PublicKey) error {
	switch k := pub.(type) {
	case ed25519.PublicKey:
		return nil
	case *ecdsa.PublicKey:
		if k.Curve == elliptic.P256() {
			return nil
		}
	}
	return fault.New("identity.checkKey", fault.Invalid, "the key is neither ECDSA P-256 nor Ed25519")
}

// RenewFrom is when a leaf begins to be renewed: half way from its issue to its end. The backdating before the
// issue is not part of its life; it is given by the caller that chose it.
func RenewFrom(leaf *x509.Certificate, backdate time.Duration) time.Time {
	issued := leaf.NotBefore.Add(backdate)
	if !issued.Before(leaf.NotAfter) {
		issued = leaf.NotBefore
	}
	return issued.Add(leaf.NotAfter.Sub(issued) / 2)
}

// newSerial draws 127 random bits with the top one set: positive, never short, 16 bytes at most.
func newSerial(rand io.Reader) (*big.Int, error) {
	var b [16]byte
	if _, err := io.ReadFull(rand, b[:]); err != nil {
		return nil, fault.At("identity.newSerial", fault.Internal, err)
	}
	b[0] = b[0]&0x7f | 0x40
	return new(big.Int).SetBytes(b[:]), nil
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

func earlier(a, b time.Time) time.Time {
	if a.Before(b) {
		return a
	}
	return b
}

func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }
