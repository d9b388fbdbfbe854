// SPDX-License-Identifier: Apache-2.0

package appliance

import (
	"crypto/x509"
	"log/slog"
	"os"
	"strings"

	"github.com/demarc-dev/demarc/configs"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/mesh"
)

// httpsRoute makes the route over the public network that the customer's file describes, and nothing that it does not.
func httpsRoute(t configs.Transport, addresses []string, hello *mesh.Hello, log *slog.Logger) (mesh.Route, error) {
	h := mesh.HTTPS{Addresses: addresses, Hello: hello}
	if t.Proxy == nil && mesh.EnvironmentNamesProxy() {
		log.Info("HTTPS_PROXY is set and not used: the file alone decides; write proxy: {from: environment} to use it", "transport", t.Name)
	}
	if t.Proxy != nil {
		p, err := proxyOf(t)
		if err != nil {
			return nil, err
		}
		if t.Proxy.From == configs.ProxyFromEnvironment {
			if h.ProxyFor, err = mesh.EnvironmentProxy(*p); err != nil {
				return nil, err
			}
		} else {
			h.Proxy = p
		}
	}
	if t.InnerTLS != nil {
		h.Inner = &mesh.Inner{URL: t.InnerTLS.URL}
		if t.InnerTLS.CAFile != "" {
			var err error
			if h.Inner.CAs, err = x509.SystemCertPool(); err != nil {
				h.Inner.CAs = x509.NewCertPool()
			}
			if err := addCAs(h.Inner.CAs, "inner_tls.ca_file", t.InnerTLS.CAFile); err != nil {
				return nil, err
			}
		}
	}
	return mesh.NewHTTPS(h)
}

// proxyOf reads what the file names about a proxy.
func proxyOf(t configs.Transport) (*mesh.Proxy, error) {
	const op = "appliance.transports"
	p := &mesh.Proxy{URL: t.Proxy.URL}
	if t.Proxy.AuthFile != "" {
		b, err := os.ReadFile(t.Proxy.AuthFile)
		if err != nil {
			return nil, fault.Because(err, op, fault.Invalid, "proxy.auth_file can't be read: %s", t.Proxy.AuthFile)
		}
		var ok bool
		if p.User, p.Password, ok = strings.Cut(trimmed(b), ":"); !ok {
			return nil, fault.New(op, fault.Invalid, "proxy.auth_file must hold user:password: %s", t.Proxy.AuthFile)
		}
	}
	if t.CAFile != "" {
		p.CAs = x509.NewCertPool()
		return p, addCAs(p.CAs, "ca_file", t.CAFile)
	}
	return p, nil
}

func addCAs(to *x509.CertPool, key, file string) error {
	b, err := os.ReadFile(file)
	if err != nil || !to.AppendCertsFromPEM(b) {
		return fault.Because(err, "appliance.transports", fault.Invalid, "%s holds no certificate: %s", key, file)
	}
	return nil
}
