// SPDX-License-Identifier: Apache-2.0

package mesh

import (
	"net/url"
	"os"

	"golang.org/x/net/http/httpproxy"

	"github.com/demarc-dev/demarc/fault"
)

// EnvironmentProxy reads HTTPS_PROXY and NO_PROXY (or https_proxy and no_proxy) once, by the rules of golang.org/x/net/http/httpproxy:
// loopback is never proxied. It gives what [HTTPS] takes as ProxyFor. A user and password in the URL are taken from there and sent
// to the proxy alone. like brings the CAs. What is wrong is told without the URL: it may hold a password.
func EnvironmentProxy(like Proxy) (func(addr string) (*Proxy, error), error) {
	const op = "mesh.EnvironmentProxy"
	c := httpproxy.FromEnvironment()
	if c.HTTPSProxy == "" {
		return func(string) (*Proxy, error) { return nil, nil }, nil
	}
	find := c.ProxyFunc()
	u, err := find(&url.URL{Scheme: "https", Host: "probe.invalid:443"})
	if err != nil {
		return nil, fault.New(op, fault.Invalid, "HTTPS_PROXY in the environment is no URL of the form http://[user:password@]host:port")
	}
	if u != nil {
		if err := fromURL(like, u).check(); err != nil {
			return nil, fault.Because(err, op, fault.Invalid, "HTTPS_PROXY in the environment: %s", fault.Text(err))
		}
	}
	return func(addr string) (*Proxy, error) {
		u, err := find(&url.URL{Scheme: "https", Host: addr})
		if err != nil || u == nil {
			return nil, fault.At(op, fault.Invalid, err)
		}
		return fromURL(like, u), nil
	}, nil
}

// EnvironmentNamesProxy tells whether the environment sets HTTPS_PROXY.
func EnvironmentNamesProxy() bool {
	return os.Getenv("HTTPS_PROXY") != "" || os.Getenv("https_proxy") != ""
}

func fromURL(like Proxy, u *url.URL) *Proxy {
	p := like
	if u.User != nil {
		p.User = u.User.Username()
		p.Password, _ = u.User.Password()
	}
	bare := *u
	bare.User = nil
	p.URL = bare.String()
	return &p
}
