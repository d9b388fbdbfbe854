// SPDX-License-Identifier: Apache-2.0

// Package ingress turns a posture and a manifest into a plan of doors; the gate keeps the open doors equal to the plan.
//
// The promise: a door stands open only where both the vendor's manifest and the customer's posture allow it, to the
// sources that the plan spells out and to nobody else, and each port left shut is listed with its reason. Whether a
// source may enter is settled when its connection is accepted, before a byte of it is read (from a trusted balancer:
// after its PROXY protocol header and before anything else). A change of plan is all or nothing: a failed one leaves the
// old doors as they were. Across a change an established connection is kept where the new plan still allows it, and cut
// where it does not.
//
// A plan is one JSON document, version "demarc-doors/1", with doors and shut ports sorted by name.
package ingress

import (
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
)

// Version is the intro of a plan. It is never edited: another shape gets another number.
const Version = "demarc-doors/1"

// MaxPorts is how many ports one application may have.
const MaxPorts = 64

// Protocols of a port.
const (
	HTTP = "http" // HTTP/1.1, HTTP/2, WebSocket, gRPC and streaming, through a reverse proxy
	TCP  = "tcp"  // bytes passed through as they are
)

// Side is the network that a door opens on.
type Side string

// The closed set of sides.
const (
	Host    Side = "host"
	Tailnet Side = "tailnet"
)

// What is done with TLS at a door.
const (
	TLSNone  = "none"  // HTTP in the clear (over a tailnet it is inside WireGuard), or TCP passed through
	TLSFiles = "files" // TLS ends at the door, with the customer's certificate
)

// Port is one way into the application: what the vendor allows, and where the customer's site puts it.
type Port struct {
	Name        string         `json:"name"`
	Protocol    string         `json:"protocol"`
	Widest      fleet.Exposure `json:"widest"`                 // the vendor's limit
	Upstream    string         `json:"upstream"`               // host:port where the application listens
	HostAddr    string         `json:"host_addr,omitempty"`    // where a door on the host stands; empty: it can't have one
	TailnetAddr string         `json:"tailnet_addr,omitempty"` // ":port" on the tailnet; empty: the port of HostAddr
}

// Site is what the customer's site can carry.
type Site struct {
	TLS       bool           `json:"tls"`                 // a certificate is at hand: HTTP doors end TLS
	Tailnet   bool           `json:"tailnet"`             // a tailnet is configured
	Balancers []netip.Prefix `json:"balancers,omitempty"` // balancers whose PROXY protocol header is believed; all others' is not
}

// Door is one listener that the plan wants: sources in From reach To. From is never empty.
type Door struct {
	Name      string         `json:"name"`
	Side      Side           `json:"side"`
	Addr      string         `json:"addr"`
	Protocol  string         `json:"protocol"`
	TLS       string         `json:"tls"`
	From      []netip.Prefix `json:"from"`
	Balancers []netip.Prefix `json:"balancers,omitempty"`
	To        string         `json:"to"`
}

// Shut is a port that gets no door, and why.
type Shut struct {
	Port string `json:"port"`
	Why  string `json:"why"`
}

// Plan is the doors that shall stand open: exactly these, no other.
type Plan struct {
	Version string        `json:"version"`
	Posture fleet.Posture `json:"posture"`
	Doors   []Door        `json:"doors"`
	Shut    []Shut        `json:"shut"`
}

// everyone is the public, spelled out.
func everyone() []netip.Prefix {
	return []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0"), netip.MustParsePrefix("::/0")}
}

// tailnetRanges is where the addresses of a tailnet's nodes come from.
func tailnetRanges() []netip.Prefix {
	return []netip.Prefix{netip.MustParsePrefix("100.64.0.0/10"), netip.MustParsePrefix("fd7a:115c:a1e0::/48")}
}

// Compile gives the plan for a posture. It is pure: the same input gives the same plan, whatever the order of ports.
func Compile(p fleet.Posture, ports []Port, site Site) (Plan, error) {
	const op = "ingress.Compile"
	if err := p.Check(); err != nil {
		return Plan{}, fault.At(op, "", err)
	}
	if len(ports) > MaxPorts {
		return Plan{}, fault.New(op, fault.Invalid, "%d ports: an application may have %d at most", len(ports), MaxPorts)
	}
	ports = slices.Clone(ports)
	slices.SortStableFunc(ports, func(a, b Port) int { return strings.Compare(a.Name, b.Name) })
	plan := Plan{Version: Version, Posture: p, Doors: []Door{}, Shut: []Shut{}}
	tailnet := map[string]string{} // address -> port
	for i, port := range ports {
		if err := port.check(); err != nil {
			return Plan{}, err
		}
		if i > 0 && ports[i-1].Name == port.Name {
			return Plan{}, fault.New(op, fault.Invalid, "port %q is written twice: give each port its own name", port.Name)
		}
		door, why := open(p, port, site)
		if other, taken := tailnet[door.Addr]; why == "" && door.Side == Tailnet && taken {
			why = "port " + other + " has the address " + door.Addr + " on the tailnet: name another in ingress.tailnet_ports"
		}
		if why == "" && door.Side == Tailnet {
			tailnet[door.Addr] = port.Name
		}
		if why != "" {
			plan.Shut = append(plan.Shut, Shut{Port: port.Name, Why: why})
			continue
		}
		plan.Doors = append(plan.Doors, door)
	}
	if err := plan.Check(); err != nil {
		return Plan{}, err
	}
	return plan, nil
}

// open gives the door of one port, or the reason why it stays shut.
func open(p fleet.Posture, port Port, site Site) (Door, string) {
	exposure := p.Exposure
	limited := port.Widest.Narrower(exposure)
	if limited {
		exposure = port.Widest
	}
	door := Door{Name: port.Name, Protocol: port.Protocol, TLS: TLSNone, To: port.Upstream}
	if port.Protocol == HTTP && site.TLS {
		door.TLS = TLSFiles
	}
	switch exposure {
	case fleet.Private:
		if !site.Tailnet {
			if limited {
				return Door{}, "the vendor allows private at most, and no tailnet is configured: add ingress.tailnet to the appliance's file"
			}
			return Door{}, "the posture is private, and no tailnet is configured: add ingress.tailnet to the appliance's file"
		}
		door.Side, door.Addr, door.From = Tailnet, port.TailnetAddr, tailnetRanges()
		if door.Addr == "" {
			if port.HostAddr == "" {
				return Door{}, "the port has no address on the tailnet: name one in ingress.ports"
			}
			_, number, _ := net.SplitHostPort(port.HostAddr)
			door.Addr = ":" + number
		}
		return door, ""
	case fleet.Allowlist:
		if limited {
			return Door{}, "the vendor allows allowlist at most, and the posture is " + string(p.Exposure) +
				" without a list of networks: choose the posture allowlist"
		}
		door.From = slices.Clone(p.Allow)
	case fleet.Public:
		door.From = everyone()
	default:
		if limited {
			return Door{}, "the vendor keeps this port closed"
		}
		return Door{}, "the posture is closed"
	}
	if port.HostAddr == "" {
		return Door{}, "the port has no address on the host: name one in ingress.ports"
	}
	door.Side, door.Addr, door.Balancers = Host, port.HostAddr, slices.Clone(site.Balancers)
	return door, ""
}

func (p Port) check() error {
	const op = "ingress.Port"
	if err := fleet.CheckName("port", p.Name); err != nil {
		return fault.At(op, "", err)
	}
	if p.Protocol != HTTP && p.Protocol != TCP {
		return fault.New(op, fault.Invalid, "port %s: protocol %.32q: use http or tcp", p.Name, p.Protocol)
	}
	if err := p.Widest.Check(); err != nil {
		return fault.Because(err, op, fault.Invalid, "port %s: widest %.32q: use closed, private, allowlist or public", p.Name, string(p.Widest))
	}
	if err := checkAddr(p.Upstream, true); err != nil {
		return fault.Because(err, op, fault.Invalid, "port %s: upstream %.64q: use host:port", p.Name, p.Upstream)
	}
	for what, addr := range map[string]string{"host": p.HostAddr, "tailnet": p.TailnetAddr} {
		if addr == "" {
			continue
		}
		if err := checkAddr(addr, false); err != nil {
			return fault.Because(err, op, fault.Invalid, "port %s: %s address %.64q: use address:port or :port", p.Name, what, addr)
		}
	}
	return nil
}

func checkAddr(addr string, dialled bool) error {
	host, number, err := net.SplitHostPort(addr)
	if err != nil {
		return err
	}
	n, err := strconv.ParseUint(number, 10, 16)
	if err != nil {
		return err
	}
	if dialled && (host == "" || n == 0) {
		return fault.New("ingress.Port", fault.Invalid, "%.64q names no host and port", addr)
	}
	if host == "" || dialled {
		return nil
	}
	_, err = netip.ParseAddr(host)
	return err
}

// Check tells whether the plan is whole. A gate refuses a plan that is not.
func (p Plan) Check() error {
	const op = "ingress.Plan"
	if p.Version != Version {
		return fault.New(op, fault.Invalid, "version %.32q: this build knows %s", p.Version, Version)
	}
	if len(p.Doors) > MaxPorts {
		return fault.New(op, fault.Invalid, "%d doors: a plan may have %d at most", len(p.Doors), MaxPorts)
	}
	if p.Posture.Exposure == fleet.Closed && len(p.Doors) > 0 {
		return fault.New(op, fault.Invalid, "door %q in a plan whose posture is closed", p.Doors[0].Name)
	}
	names, places := map[string]bool{}, map[place]string{}
	for _, d := range p.Doors {
		if err := d.check(); err != nil {
			return err
		}
		if names[d.Name] {
			return fault.New(op, fault.Invalid, "door %q is written twice", d.Name)
		}
		names[d.Name] = true
		if other, taken := places[d.place()]; taken {
			return fault.New(op, fault.Invalid, "doors %q and %q share the address %s on the %s: give each its own", other, d.Name, d.Addr, d.Side)
		}
		places[d.place()] = d.Name
		if p.Posture.Exposure == fleet.Private && d.Side != Tailnet {
			return fault.New(op, fault.Invalid, "door %q on the host in a plan whose posture is private", d.Name)
		}
		if p.Posture.Exposure == fleet.Allowlist && d.Side == Host && !covered(d.From, p.Posture.Allow) {
			return fault.New(op, fault.Invalid, "door %q lets in more than the posture's list of networks", d.Name)
		}
	}
	return nil
}

// covered tells whether each network lies inside one of the others.
func covered(networks, by []netip.Prefix) bool {
	return !slices.ContainsFunc(networks, func(n netip.Prefix) bool {
		return !slices.ContainsFunc(by, func(b netip.Prefix) bool { return b.Bits() <= n.Bits() && b.Contains(n.Addr()) })
	})
}

func (d Door) check() error {
	const op = "ingress.Door"
	port := Port{Name: d.Name, Protocol: d.Protocol, Widest: fleet.Public, Upstream: d.To, HostAddr: d.Addr}
	if err := port.check(); err != nil {
		return err
	}
	switch {
	case d.Addr == "":
		return fault.New(op, fault.Invalid, "door %q has no address", d.Name)
	case d.Side != Host && d.Side != Tailnet:
		return fault.New(op, fault.Invalid, "door %q: side %.32q: use host or tailnet", d.Name, string(d.Side))
	case d.TLS != TLSNone && d.TLS != TLSFiles:
		return fault.New(op, fault.Invalid, "door %q: tls %.32q: use none or files", d.Name, d.TLS)
	case d.TLS != TLSNone && d.Protocol != HTTP:
		return fault.New(op, fault.Invalid, "door %q: tcp is passed through as it is: tls is none", d.Name)
	case len(d.From) == 0:
		return fault.New(op, fault.Invalid, "door %q names no source: a door without a list is not a door for all", d.Name)
	case len(d.Balancers) > 0 && d.Side != Host:
		return fault.New(op, fault.Invalid, "door %q: balancers stand before doors on the host only", d.Name)
	}
	for _, n := range slices.Concat(d.From, d.Balancers) {
		if !n.IsValid() || n != n.Masked() {
			return fault.New(op, fault.Invalid, "door %q: %s is not a network in its canonical form", d.Name, n)
		}
		if n.Addr().Is4In6() {
			return fault.New(op, fault.Invalid, "door %q: %s is IPv4 written as IPv6, and lets nobody in", d.Name, n)
		}
	}
	return nil
}

// place is where a door stands; one listener a place.
type place struct {
	side Side
	addr string
}

func (d Door) place() place { return place{d.Side, d.Addr} }

// admits tells whether a source may use the door.
func (d Door) admits(source netip.Addr) bool { return within(source, d.From) }

// keeps tells whether a connection that came through the old door o may go on under d.
func (d Door) keeps(o Door, source netip.Addr) bool {
	return d.Name == o.Name && d.Side == o.Side && d.Protocol == o.Protocol && d.TLS == o.TLS && d.admits(source)
}

// within compares addresses without zone, and IPv4 in IPv6 as IPv4.
func within(a netip.Addr, networks []netip.Prefix) bool {
	a = a.Unmap().WithZone("")
	return a.IsValid() && slices.ContainsFunc(networks, func(n netip.Prefix) bool { return n.Contains(a) })
}
