// SPDX-License-Identifier: Apache-2.0

package mesh

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"

	"github.com/demarc-dev/demarc/fault"
)

// Explain names a failed TLS handshake: a proxy that opens TLS, a portal that answers in its place, a clock that is off.
func Explain(err error) error {
	const op = "mesh.Handshake"
	if err == nil {
		return nil
	}
	if errors.Is(err, errUnanswered) {
		return fault.Because(err, op, fault.Unavailable, "the connection opens, and no answer comes to the first message of TLS")
	}
	var expired x509.CertificateInvalidError
	if errors.As(err, &expired) && expired.Reason == x509.Expired {
		return For(ClockOff, fault.Because(err, op, fault.Expired, "the other side's certificate is not valid at this machine's time: check "+
			"the clock first"))
	}
	if cert, ok := stranger(err); ok {
		return For(TLSOpened, fault.Because(err, op, fault.Denied, "the certificate was issued by %s, which is not your vendor: a proxy on the "+
			"path opens TLS; "+
			"ask its administrator to let this address through unopened, or choose another route", issuer(cert)))
	}
	var record tls.RecordHeaderError
	if errors.As(err, &record) {
		return For(TLSOpened, fault.Because(err, op, fault.Denied, "what answers does not speak TLS: a portal or a proxy answers in the place "+
			"of your vendor"))
	}
	var remote *net.OpError // crypto/tls keeps the type of an alert to itself
	if errors.As(err, &remote) && remote.Op == "remote error" && remote.Err.Error() == "tls: no application protocol" {
		return For(TLSOpened, fault.Because(err, op, fault.Denied,
			"what answers speaks TLS and not the vendor's protocol: a proxy on the path opens TLS, or the address is that of another service"))
	}
	return fault.At(op, "", orUnavailable(err))
}

// orUnavailable keeps a written kind; a broken connection has none, and may be tried again.
func orUnavailable(err error) error {
	var f *fault.Error
	if errors.As(err, &f) {
		return err
	}
	return fault.At("mesh.Handshake", fault.Unavailable, err)
}

// stranger gives the certificate that no known authority has issued.
func stranger(err error) (*x509.Certificate, bool) {
	var unknown x509.UnknownAuthorityError
	if !errors.As(err, &unknown) {
		return nil, false
	}
	var failed *tls.CertificateVerificationError
	if errors.As(err, &failed) && len(failed.UnverifiedCertificates) > 0 {
		return failed.UnverifiedCertificates[0], true
	}
	return unknown.Cert, unknown.Cert != nil
}

// issuer spells the issuer, which a stranger chose: quoted and short.
func issuer(c *x509.Certificate) string {
	name := c.Issuer.CommonName
	if len(c.Issuer.Organization) > 0 {
		name = c.Issuer.Organization[0] + ": " + name
	}
	if name == "" || name == ": " {
		return "an authority without a name"
	}
	return fmt.Sprintf("%.100q", name)
}
