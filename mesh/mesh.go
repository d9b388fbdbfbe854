// SPDX-License-Identifier: Apache-2.0

// Package mesh carries bytes to a peer over public HTTPS, PrivateLink or a tailnet (tsnet). It proves nobody.
//
// The promise: what is not on a route's list is never dialled, and no route is trusted with more than bytes: the same mutual
// TLS runs over each of them, and this package neither makes nor checks an identity. A switch carries one session over an
// ordered list of routes; it fails over, fails back, and changes live: the new session is up before the old one ends.
//
// On the wire there is nothing of this package's own: TCP, an HTTP CONNECT where a proxy stands in the way, a WebSocket where
// one opens TLS and the customer allows it, or WireGuard inside the process, with no interface on the host, no port mapping at the gateway
// and no log upload.
package mesh

import (
	"context"
	"errors"
	"net"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/demarc-dev/demarc/fault"
)

// Names of the routes, as the operator's file spells them.
const (
	NameHTTPS       = "https"
	NamePrivateLink = "privatelink"
	NameTailscale   = "tailscale"
)

// MaxAddresses is how many addresses a route may list.
const MaxAddresses = 32

// Route is one way to a peer. Dial with addr "" takes the route's own addresses in order; any other addr must be one of
// them. Safe for concurrent use.
type Route interface {
	Name() string
	Dial(ctx context.Context, addr string) (net.Conn, error)
}

// HTTPS is the configuration of the route over the public network.
type HTTPS struct {
	Addresses []string // host:port, tried in order
	Proxy     *Proxy   // nil: straight
	// ProxyFor gives the proxy for an address, nil for none. It goes before Proxy; nil: Proxy for all.
	ProxyFor func(addr string) (*Proxy, error)
	Inner    *Inner // nil: the bytes go as they are
	Hello    *Hello // of the TLS to a proxy and of the outer TLS; nil: one with the defaults
	Wait     time.Duration
}

// PrivateLink is the configuration of the route through a private endpoint: its DNS names or addresses, host:port. Only
// where the bytes go differs: the name that TLS asks for, and its verification, stay the control plane's.
type PrivateLink struct {
	Addresses []string
	Wait      time.Duration
}

// NewHTTPS gives the route over the public network, by the system's resolver, through a proxy where one is set.
func NewHTTPS(c HTTPS) (Route, error) {
	if c.Proxy != nil {
		if err := c.Proxy.check(); err != nil {
			return nil, err
		}
	}
	if c.ProxyFor == nil {
		c.ProxyFor = func(string) (*Proxy, error) { return c.Proxy, nil }
	}
	if c.Inner != nil {
		if _, err := c.Inner.parse(); err != nil {
			return nil, err
		}
	}
	d, err := newDirect(NameHTTPS, c.Addresses, c.Wait)
	if err != nil {
		return nil, err
	}
	d.proxy, d.inner, d.hello = c.ProxyFor, c.Inner, c.Hello
	if d.hello == nil {
		d.hello = NewHello(HelloConfig{})
	}
	return d, nil
}

// NewPrivateLink gives the route through a private endpoint. It never uses a proxy.
func NewPrivateLink(c PrivateLink) (Route, error) {
	d, err := newDirect(NamePrivateLink, c.Addresses, c.Wait)
	if err != nil {
		return nil, err
	}
	return d, nil
}

// direct is a route that dials from the host.
type direct struct {
	name      string
	addresses []string
	proxy     func(addr string) (*Proxy, error) // nil: none
	inner     *Inner
	hello     *Hello // not nil where there is a proxy or an inner connection
	dialer    *net.Dialer
	wait      time.Duration // for one address
}

func newDirect(name string, addresses []string, wait time.Duration) (*direct, error) {
	if err := checkAddresses(name, addresses); err != nil {
		return nil, err
	}
	if wait <= 0 {
		wait = 10 * time.Second
	}
	alive := net.KeepAliveConfig{Enable: true, Idle: 10 * time.Second, Interval: 5 * time.Second, Count: 3}
	return &direct{name: name, addresses: slices.Clone(addresses), dialer: &net.Dialer{KeepAliveConfig: alive}, wait: wait}, nil
}

func checkAddresses(name string, addresses []string) error {
	const op = "mesh.Route"
	if len(addresses) == 0 || len(addresses) > MaxAddresses {
		return fault.New(op, fault.Invalid, "route %s: name 1 to %d addresses", name, MaxAddresses)
	}
	for _, a := range addresses {
		host, port, err := net.SplitHostPort(a)
		if n, perr := strconv.ParseUint(port, 10, 16); err != nil || perr != nil || host == "" || n == 0 {
			return fault.New(op, fault.Invalid, "route %s: address %.64q: use host:port", name, a)
		}
	}
	return nil
}

// Name names the route.
func (d *direct) Name() string { return d.name }

// Dial connects to addr, or to the first of the route's addresses that answers.
func (d *direct) Dial(ctx context.Context, addr string) (net.Conn, error) {
	return dialList(ctx, d.name, addr, d.addresses, d.wait, func(ctx context.Context, a string) (net.Conn, error) {
		c, err := d.tcp(ctx, a)
		if err != nil || d.inner == nil {
			return c, err
		}
		return d.inner.over(ctx, d.hello, c, func(ctx context.Context) (net.Conn, error) { return d.tcp(ctx, a) })
	})
}

// tcp connects to a, through a proxy where one is set.
func (d *direct) tcp(ctx context.Context, a string) (net.Conn, error) {
	if d.proxy != nil {
		p, err := d.proxy(a)
		if err != nil {
			return nil, err
		}
		if p != nil {
			return p.dial(ctx, d.dialer, d.hello, a)
		}
	}
	return d.dialer.DialContext(ctx, "tcp", a)
}

// dialList dials what is listed, and nothing else.
func dialList(ctx context.Context, name, addr string, listed []string, wait time.Duration,
	dial func(context.Context, string) (net.Conn, error)) (net.Conn, error) {
	const op = "mesh.Dial"
	if addr != "" {
		if !slices.Contains(listed, addr) {
			return nil, fault.New(op, fault.Denied, "route %s: %.64q is not on its list, and is not dialled", name, addr)
		}
		listed = []string{addr}
	}
	var errs []error
	for _, a := range listed {
		one, cancel := context.WithTimeout(ctx, wait)
		c, err := dial(one, a)
		cancel()
		if err == nil {
			return c, nil
		}
		errs = append(errs, err)
		if ctx.Err() != nil {
			break
		}
	}
	err := errors.Join(errs...)
	for _, e := range errs { // what needs a human is told before what may pass
		if k := fault.Of(e); k == fault.Denied || k == fault.Invalid || k == fault.Expired || ReasonOf(e).NeedsHuman() {
			return nil, fault.Because(For(ReasonOf(e), err), op, k, "route %s: %s", name, fault.Text(e))
		}
	}
	why, met := reasonsOf(errs), make([]string, len(errs))
	for i, e := range errs {
		met[i] = listed[i] + ": " + words(e, wait)
	}
	return nil, fault.Because(For(why, err), op, fault.Unavailable, "route %s: none of its %d addresses answers: %s", name, len(listed),
		strings.Join(met, "; "))
}

// reasonsOf is the reason that all errors have, [Unreached] where they differ.
func reasonsOf(errs []error) Reason {
	why := Unreached
	for i, e := range errs {
		r := ReasonOf(e)
		if r == Other || i > 0 && r != why {
			return Unreached
		}
		why = r
	}
	return why
}

// words says in a few words what was met at an address within wait.
func words(err error, wait time.Duration) string {
	var told *fault.Error
	var name *net.DNSError
	var slow net.Error
	var no syscall.Errno
	switch {
	case errors.As(err, &told) && told.Text != "":
		return fault.ClipTo(told.Text, 200)
	case errors.As(err, &name):
		return "the name does not resolve (" + fault.ClipTo(name.Err, 100) + ")"
	case errors.As(err, &no):
		return no.Error()
	case errors.As(err, &slow) && slow.Timeout(), errors.Is(err, context.DeadlineExceeded):
		return "no answer within " + wait.String()
	}
	return fault.ClipTo(err.Error(), 200)
}
