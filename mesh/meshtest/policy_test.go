// SPDX-License-Identifier: Apache-2.0

package meshtest

import (
	"math/rand/v2"
	"net/netip"
	"strconv"
	"testing"

	"go4.org/netipx"
	"tailscale.com/tailcfg"
	"tailscale.com/types/ipproto"
	"tailscale.com/wgengine/filter"
)

// TestTheEvaluatorAgreesWithTheFilter: what a policy's own tests are told is what the library's packet filter does with the rules that a
// node is handed, for policies that a tired administrator might write and for each pair of nodes, port and protocol.
func TestTheEvaluatorAgreesWithTheFilter(t *testing.T) {
	rng := rand.New(rand.NewPCG(4, 2))
	tags := []string{"tag:control", "tag:a", "tag:b"}
	owners := map[string][]string{}
	var nodes []*tailcfg.Node
	for i, tag := range tags {
		owners[tag] = nil
		v4 := netip.AddrFrom4([4]byte{100, 64, 0, byte(i + 1)})
		nodes = append(nodes, &tailcfg.Node{Tags: []string{tag}, Addresses: []netip.Prefix{netip.PrefixFrom(v4, 32)}})
	}
	ports := []string{"22", "443", "8443", "*", "1-1024", "8443-8444"}
	pick := func(of []string) string { return of[rng.IntN(len(of))] }
	var passed, dropped int
	for range 500 {
		p := &Policy{TagOwners: owners}
		for range rng.IntN(4) {
			p.ACLs = append(p.ACLs, Rule{Action: "accept", Proto: pick([]string{"", "tcp", "udp"}), Src: []string{pick(append(tags, "*"))},
				Dst: []string{pick(append(tags, "*")) + ":" + pick(ports)}})
		}
		if err := p.check(); err != nil {
			t.Fatal(err)
		}
		for _, to := range nodes {
			matches, err := filter.MatchesFromFilterRules(p.filter(to, nodes))
			if err != nil {
				t.Fatal(err)
			}
			var local netipx.IPSetBuilder
			local.Add(to.Addresses[0].Addr())
			set, err := local.IPSet()
			if err != nil {
				t.Fatal(err)
			}
			f := filter.New(matches, nil, set, nil, nil, t.Logf)
			for _, from := range nodes {
				for _, port := range []uint16{1, 22, 443, 1024, 1025, 8443, 8444, 65535} {
					for name, proto := range map[string]ipproto.Proto{"tcp": ipproto.TCP, "udp": ipproto.UDP} {
						dst := to.Tags[0] + ":" + strconv.Itoa(int(port))
						says := p.accepts(from.Tags[0], name, dst)
						does := f.Check(from.Addresses[0].Addr(), to.Addresses[0].Addr(), port, proto) == filter.Accept
						if says != does {
							t.Fatalf("%s over %s to %s: the evaluator says %t, the filter %t: %+v", from.Tags[0], name, dst, says, does, p.ACLs)
						}
						if does {
							passed++
						} else {
							dropped++
						}
					}
				}
			}
		}
	}
	if passed < 1000 || dropped < 1000 {
		t.Errorf("%d pass, %d are dropped: the test shows little", passed, dropped)
	}
}
