// SPDX-License-Identifier: Apache-2.0

package meshtest

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"tailscale.com/tailcfg"

	"github.com/demarc-dev/demarc/fault"
)

// Policy is a tailnet policy in the words that mesh.ACL uses: tags and *, ports and *, tcp and udp. A policy that says more
// is refused, not guessed at.
type Policy struct {
	TagOwners map[string][]string `json:"tagOwners"`
	ACLs      []Rule              `json:"acls"`
	Tests     []Test              `json:"tests"`
}

// Rule lets Src reach Dst. Proto "" is any.
type Rule struct {
	Action string   `json:"action"`
	Proto  string   `json:"proto"`
	Src    []string `json:"src"`
	Dst    []string `json:"dst"`
}

// Test is what the policy says of itself.
type Test struct {
	Src    string   `json:"src"`
	Proto  string   `json:"proto"`
	Accept []string `json:"accept"`
	Deny   []string `json:"deny"`
}

// Open is the policy in which everybody reaches everybody, with the tags of another.
func Open(of *Policy) *Policy {
	return &Policy{TagOwners: of.TagOwners, ACLs: []Rule{{Action: "accept", Src: []string{"*"}, Dst: []string{"*:*"}}}}
}

// ParsePolicy reads a policy.
func ParsePolicy(b []byte) (*Policy, error) {
	const op = "meshtest.ParsePolicy"
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	p := new(Policy)
	if err := d.Decode(p); err != nil {
		return nil, fault.Because(err, op, fault.Invalid, "no policy: %v", err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return nil, fault.New(op, fault.Invalid, "something follows the policy")
	}
	return p, fault.At(op, fault.Invalid, p.check())
}

func (p *Policy) check() error {
	known := func(who string) error {
		if _, ok := p.TagOwners[who]; !ok && who != "*" {
			return fmt.Errorf("nobody owns %q", who)
		}
		return nil
	}
	var errs []error
	dst := func(list []string) {
		for _, d := range list {
			who, _, err := split(d)
			errs = append(errs, err, known(who))
		}
	}
	for _, r := range p.ACLs {
		if r.Action != "accept" || protocol(r.Proto) == nil {
			errs = append(errs, fmt.Errorf("rule %q %q: not known here", r.Action, r.Proto))
		}
		for _, s := range r.Src {
			errs = append(errs, known(s))
		}
		dst(r.Dst)
	}
	for _, t := range p.Tests {
		errs = append(errs, known(t.Src))
		dst(t.Accept)
		dst(t.Deny)
	}
	return errors.Join(errs...)
}

// Verify runs the policy's own tests, as the tailnet does before it takes the policy.
func (p *Policy) Verify() error {
	var errs []error
	for _, t := range p.Tests {
		for _, d := range t.Accept {
			if !p.accepts(t.Src, t.Proto, d) {
				errs = append(errs, fmt.Errorf("%s over %s does not reach %s", t.Src, t.Proto, d))
			}
		}
		for _, d := range t.Deny {
			if p.accepts(t.Src, t.Proto, d) {
				errs = append(errs, fmt.Errorf("%s over %s reaches %s", t.Src, t.Proto, d))
			}
		}
	}
	return fault.At("meshtest.Verify", fault.Denied, errors.Join(errs...))
}

func (p *Policy) accepts(src, proto, dst string) bool {
	who, port, err := split(dst)
	if err != nil {
		return false
	}
	return slices.ContainsFunc(p.ACLs, func(r Rule) bool {
		from := slices.Contains(r.Src, src) || slices.Contains(r.Src, "*")
		over := r.Proto == "" || slices.Contains(protocol(r.Proto), protocol(proto)[0])
		return from && over && slices.ContainsFunc(r.Dst, func(d string) bool {
			w, ports, err := split(d)
			return err == nil && (w == who || w == "*") && ports.First <= port.First && port.Last <= ports.Last
		})
	})
}

// filter compiles the policy into what one node lets in, given all nodes.
func (p *Policy) filter(self *tailcfg.Node, all []*tailcfg.Node) []tailcfg.FilterRule {
	is := func(n *tailcfg.Node, who string) bool { return who == "*" || slices.Contains(n.Tags, who) }
	out := []tailcfg.FilterRule{}
	for _, r := range p.ACLs {
		rule := tailcfg.FilterRule{IPProto: protocol(r.Proto)}
		for _, n := range all {
			if slices.ContainsFunc(r.Src, func(who string) bool { return is(n, who) }) {
				rule.SrcIPs = append(rule.SrcIPs, ips(n)...)
			}
		}
		for _, d := range r.Dst {
			who, ports, err := split(d)
			if err != nil || !is(self, who) {
				continue
			}
			for _, ip := range ips(self) {
				rule.DstPorts = append(rule.DstPorts, tailcfg.NetPortRange{IP: ip, Ports: ports})
			}
		}
		if len(rule.SrcIPs) > 0 && len(rule.DstPorts) > 0 {
			out = append(out, rule)
		}
	}
	return out
}

func ips(n *tailcfg.Node) []string {
	var out []string
	for _, a := range n.Addresses {
		out = append(out, netip.Prefix(a).Addr().String())
	}
	return out
}

// protocol gives the numbers of a protocol, nil for one that is not known.
func protocol(name string) []int {
	switch name {
	case "":
		return []int{6, 17, 1, 58}
	case "tcp":
		return []int{6}
	case "udp":
		return []int{17}
	}
	return nil
}

func split(dst string) (who string, ports tailcfg.PortRange, err error) {
	i := strings.LastIndexByte(dst, ':')
	if i < 0 {
		return "", ports, fmt.Errorf("%q names no port", dst)
	}
	who, s := dst[:i], dst[i+1:]
	if s == "*" {
		return who, tailcfg.PortRange{First: 0, Last: 65535}, nil
	}
	low, high, isRange := strings.Cut(s, "-")
	if !isRange {
		high = low
	}
	a, errA := strconv.ParseUint(low, 10, 16)
	b, errB := strconv.ParseUint(high, 10, 16)
	if errA != nil || errB != nil || a > b {
		return "", ports, fmt.Errorf("%q: no port", dst)
	}
	return who, tailcfg.PortRange{First: uint16(a), Last: uint16(b)}, nil
}
