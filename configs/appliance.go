// SPDX-License-Identifier: Apache-2.0

package configs

import (
	"fmt"
	"maps"
	"net"
	"net/url"
	"path/filepath"
	"slices"
	"strings"

	"github.com/demarc-dev/demarc/fault"
)

// Appliance configures the customer's side.
type Appliance struct {
	Version      string      `yaml:"version"`
	Role         string      `yaml:"role"`
	Name         string      `yaml:"name" is:"name" need:"yes"`
	Customer     string      `yaml:"customer" is:"name" need:"yes"`
	TrustDomain  string      `yaml:"trust_domain" is:"domain" need:"yes"` // the vendor's
	Dir          string      `yaml:"dir" is:"path" need:"yes"`
	Socket       string      `yaml:"socket" is:"path" need:"yes"` // who opens it is the customer's administrator
	ControlPlane Vendor      `yaml:"control_plane"`
	Transports   []Transport `yaml:"transports" need:"yes"` // in this order; what is not listed is never dialled
	Proof        Proof       `yaml:"proof"`
	Runtime      Runtime     `yaml:"runtime"`
	Secrets      Secrets     `yaml:"secrets"`
	Ingress      Ingress     `yaml:"ingress"`
	Metrics      *Metrics    `yaml:"metrics,omitempty"` // absent: nothing listens
}

// Vendor is the control plane, and what it is recognised by.
type Vendor struct {
	Addresses   []string   `yaml:"addresses" is:"addr" need:"yes"`
	BundleFile  string     `yaml:"bundle_file" is:"path" need:"yes"`
	ReleaseKeys []string   `yaml:"release_keys" is:"path" need:"yes"` // who may sign releases: public keys, a file each
	Operators   []Operator `yaml:"operators,omitempty"`               // who may ask for operations; absent: nobody
}

// Operator is a person of the vendor who may ask for operations. Who asks is the word of this file: a request counts as that
// of the one whose key signed it.
type Operator struct {
	Name string   `yaml:"name" is:"name" need:"yes"` // as in the vendor's certificates: spiffe://TRUST_DOMAIN/operator/NAME
	Keys []string `yaml:"keys" is:"path" need:"yes"` // public keys that this person signs requests with, a file each
}

// Transport is one way to the control plane.
type Transport struct {
	Name      string    `yaml:"name,omitempty" is:"name"` // the kind where absent; each its own
	Kind      string    `yaml:"kind" need:"yes"`
	Addresses []string  `yaml:"addresses,omitempty" is:"addr"` // those of control_plane where absent
	Proxy     *Proxy    `yaml:"proxy,omitempty"`
	CAFile    string    `yaml:"ca_file,omitempty" is:"path"` // a private CA of the path, for instance of the proxy
	PQ        string    `yaml:"pq,omitempty"`                // "required": the first message of TLS is never made small by leaving ML-KEM out
	InnerTLS  *InnerTLS `yaml:"inner_tls,omitempty"`         // absent: never tried
	Tailnet   *Tailnet  `yaml:"tailnet,omitempty"`
}

// Proxy is an HTTP proxy that is asked to CONNECT.
type Proxy struct {
	URL      string `yaml:"url,omitempty" is:"url"`
	From     string `yaml:"from,omitempty"`                // "environment": HTTPS_PROXY and NO_PROXY
	AuthFile string `yaml:"auth_file,omitempty" is:"path"` // user:password
}

// ProxyFromEnvironment is the one value of Proxy.From.
const ProxyFromEnvironment = "environment"

// PQRequired is the one value of Transport.PQ.
const PQRequired = "required"

// InnerTLS allows an inspecting proxy to open an outer TLS, in which the TLS of the channel runs.
type InnerTLS struct {
	URL    string `yaml:"url" is:"wss" need:"yes"`     // wss://host[:port][/path], or host:port
	CAFile string `yaml:"ca_file,omitempty" is:"path"` // the proxy's CA, beside those of the system
}

// InnerPath is the path of the vendor's inner door where the file names none.
const InnerPath = "/demarc/inner"

// complete writes the URL out and gives the host and port that it names.
func (i *InnerTLS) complete() string {
	if i == nil || wrong("wss", i.URL) != "" {
		return ""
	}
	if !strings.Contains(i.URL, "://") {
		i.URL = "wss://" + i.URL
	}
	u, err := url.Parse(i.URL)
	if err != nil {
		return ""
	}
	if u.Path == "" || u.Path == "/" {
		u.Path = InnerPath
	}
	i.URL = u.String()
	port := u.Port()
	if port == "" {
		port = "443"
	}
	return net.JoinHostPort(u.Hostname(), port)
}

// Runtime is what carries the application.
type Runtime struct {
	Kind string `yaml:"kind" need:"yes"`
}

// Secrets is where the customer keeps secrets; they are looked at from outside only.
type Secrets struct {
	Kind string `yaml:"kind" need:"yes"`
	Dir  string `yaml:"dir" is:"path" need:"yes"`
}

// Ingress is where a posture may open doors for end users.
type Ingress struct {
	Host         string            `yaml:"host" is:"host" need:"yes"`
	Ports        map[string]string `yaml:"ports,omitempty"` // name of the release's port -> address on this host
	TLS          *IngressTLS       `yaml:"tls,omitempty"`
	Tailnet      *Tailnet          `yaml:"tailnet,omitempty"`       // the customer's own, for the posture private
	TailnetPorts map[string]string `yaml:"tailnet_ports,omitempty"` // name of the release's port -> :port on that tailnet
	Limits       IngressLimits     `yaml:"limits,omitempty"`
}

// IngressLimits bounds what end users may hold at the doors at once. Zero is the default of the package ingress.
type IngressLimits struct {
	Connections          int `yaml:"connections,omitempty"`            // of all sources; 8192
	ConnectionsPerSource int `yaml:"connections_per_source,omitempty"` // an eighth of the former
	Requests             int `yaml:"requests,omitempty"`               // under way, of all sources; twice the connections
	RequestsPerSource    int `yaml:"requests_per_source,omitempty"`    // an eighth of the former
}

// maxLimit bounds each of the limits.
const maxLimit = 1 << 20

func (l IngressLimits) problems(bad badFunc) {
	for _, x := range []struct {
		key   string
		value int
	}{{"connections", l.Connections}, {"connections_per_source", l.ConnectionsPerSource},
		{"requests", l.Requests}, {"requests_per_source", l.RequestsPerSource}} {
		if x.value < 0 || x.value > maxLimit {
			bad("ingress.limits."+x.key, "%d: use 1 to %d", x.value, maxLimit)
		}
	}
	for _, x := range []struct {
		key       string
		each, all int
	}{{"connections_per_source", l.ConnectionsPerSource, l.Connections}, {"requests_per_source", l.RequestsPerSource, l.Requests}} {
		if x.all > 0 && x.each > x.all {
			bad("ingress.limits."+x.key, "%d: more than all sources together may hold, %d", x.each, x.all)
		}
	}
}

// IngressTLS is the certificate that end users see.
type IngressTLS struct {
	CertFile string `yaml:"cert_file" is:"path" need:"yes"`
	KeyFile  string `yaml:"key_file" is:"path" need:"yes"`
}

func (c *Appliance) problems() (out []problem) {
	bad := func(key, format string, args ...any) { out = append(out, problem{key, fmt.Sprintf(format, args...)}) }
	for i := range c.Transports {
		t := &c.Transports[i]
		key := fmt.Sprintf("transports[%d]", i)
		switch t.Kind {
		case HTTPS, "":
		case PrivateLink:
			if len(t.Addresses) == 0 {
				bad(key+".addresses", "missing: name the endpoint's own DNS name or address")
			}
		case Tailscale:
			if t.Tailnet == nil {
				bad(key+".tailnet", "missing: the appliance joins the vendor's tailnet with it")
			}
		default:
			bad(key+".kind", "%q: use %s, %s or %s", fault.Clip(t.Kind), HTTPS, PrivateLink, Tailscale)
		}
		if t.Kind != Tailscale && t.Tailnet != nil {
			bad(key+".tailnet", "belongs to the kind %s only", Tailscale)
		}
		if t.Kind != HTTPS && t.Proxy != nil {
			bad(key+".proxy", "belongs to the kind %s only", HTTPS)
		}
		if t.Kind != HTTPS && t.InnerTLS != nil {
			bad(key+".inner_tls", "belongs to the kind %s only", HTTPS)
		}
		if p := t.Proxy; p != nil && (p.URL == "") == (p.From == "") {
			bad(key+".proxy", "name one of url and from")
		} else if p != nil {
			only(bad, key+".proxy.from", p.From, ProxyFromEnvironment)
		}
		only(bad, key+".pq", t.PQ, PQRequired)
		fill(&t.Name, t.Kind)
		if at := t.InnerTLS.complete(); at != "" && len(t.Addresses) == 0 {
			t.Addresses = []string{at}
		}
		if len(t.Addresses) == 0 {
			t.Addresses = slices.Clone(c.ControlPlane.Addresses)
		}
		if t.Tailnet != nil {
			fill(&t.Tailnet.Dir, filepath.Join(c.Dir, "transport-"+t.Name))
			t.Tailnet.problems(bad, key+".tailnet")
		}
	}
	once(bad, "transports", c.Transports, "name", func(t Transport) string { return t.Name })
	c.ControlPlane.problems(bad)
	c.Proof.problems(bad)
	only(bad, "runtime.kind", c.Runtime.Kind, RuntimeProcess)
	only(bad, "secrets.kind", c.Secrets.Kind, SecretsFiles)
	c.ingress(bad)
	socket(bad, c.Socket)
	return out
}

// problems holds the vendor's keys apart: one key speaks for one person, or signs releases. That two files hold the same key
// shows when they are read.
func (v *Vendor) problems(bad badFunc) {
	once(bad, "control_plane.operators", v.Operators, "name", func(o Operator) string { return o.Name })
	taken := map[string]string{}
	one := func(key, path string) {
		if other, is := taken[path]; is && path != "" {
			bad(key, "%s is that of %s too: a key signs releases, or requests of one person", path, other)
		}
		taken[path] = key
	}
	for i, path := range v.ReleaseKeys {
		one(fmt.Sprintf("control_plane.release_keys[%d]", i), path)
	}
	for i, o := range v.Operators {
		for j, path := range o.Keys {
			one(fmt.Sprintf("control_plane.operators[%d].keys[%d]", i, j), path)
		}
	}
}

func (c *Appliance) ingress(bad badFunc) {
	at := map[string]string{}
	for _, name := range slices.Sorted(maps.Keys(c.Ingress.Ports)) {
		key, addr := "ingress.ports."+name, c.Ingress.Ports[name]
		if why := wrong("listen", addr); why != "" {
			bad(key, "%q: %s", fault.Clip(addr), why)
		} else if other, taken := at[addr]; taken {
			bad(key, "%s is that of %s too", addr, other)
		}
		at[addr] = key
	}
	at = map[string]string{}
	for _, name := range slices.Sorted(maps.Keys(c.Ingress.TailnetPorts)) {
		key, addr := "ingress.tailnet_ports."+name, c.Ingress.TailnetPorts[name]
		if host, port, err := net.SplitHostPort(addr); err != nil || host != "" || wrong("addr", "a:"+port) != "" {
			bad(key, "%q: use :port, with a port from 1 to 65535", fault.Clip(addr))
		} else if other, taken := at[addr]; taken {
			bad(key, "%s is that of %s too", addr, other)
		}
		at[addr] = key
	}
	c.Ingress.Limits.problems(bad)
	if c.Ingress.Tailnet == nil && len(c.Ingress.TailnetPorts) > 0 {
		bad("ingress.tailnet_ports", "without ingress.tailnet there is no tailnet to have ports on")
	}
	if c.Ingress.Tailnet != nil {
		fill(&c.Ingress.Tailnet.Dir, filepath.Join(c.Dir, "ingress-tailnet"))
		c.Ingress.Tailnet.problems(bad, "ingress.tailnet")
		c.ownDirs(bad)
	}
}

// ownDirs holds the customer's tailnet and the vendor's apart: one node's state is no other's.
func (c *Appliance) ownDirs(bad badFunc) {
	for i, t := range c.Transports {
		if t.Tailnet != nil && filepath.Clean(t.Tailnet.Dir) == filepath.Clean(c.Ingress.Tailnet.Dir) {
			bad("ingress.tailnet.dir", "that of transports[%d] too: the customer's node and the one that reaches the vendor are two", i)
		}
	}
}

func only(bad badFunc, key, got, want string) {
	if got != "" && got != want {
		bad(key, "%q: this build knows %s", fault.Clip(got), want)
	}
}

// Effective implements Config. Arguments of token_command are left out: people put tokens there.
func (c *Appliance) Effective() ([]byte, error) {
	shown := *c
	if n := len(c.Proof.TokenCommand); n > 1 {
		shown.Proof.TokenCommand = []string{c.Proof.TokenCommand[0], fmt.Sprintf("(%d arguments not shown)", n-1)}
	}
	return effective(shown)
}
