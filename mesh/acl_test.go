// SPDX-License-Identifier: Apache-2.0

package mesh_test

import (
	"context"
	"encoding/json"
	"net"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/mesh"
	"github.com/demarc-dev/demarc/mesh/meshtest"
)

func policy(t *testing.T, customers ...string) *meshtest.Policy {
	t.Helper()
	b, err := mesh.ACL(8443, customers...)
	if err != nil {
		t.Fatal(err)
	}
	p, err := meshtest.ParsePolicy(b)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestACLDeniesBetweenAppliances(t *testing.T) {
	p := policy(t, "globex", "initech", "acme")
	tags := []string{mesh.TagAppliance, mesh.CustomerTag("acme"), mesh.CustomerTag("globex"), mesh.CustomerTag("initech")}
	if len(p.ACLs) != 1 || !slices.Equal(p.ACLs[0].Src, tags) || !slices.Equal(p.ACLs[0].Dst, []string{mesh.TagControl + ":8443"}) ||
		p.ACLs[0].Proto != "tcp" {
		t.Errorf("the policy accepts more than appliance to control plane: %+v", p.ACLs)
	}
	for _, from := range append(tags, mesh.TagControl) { // no pair is forgotten in the tests
		for _, proto := range []string{"tcp", "udp"} {
			i := slices.IndexFunc(p.Tests, func(x meshtest.Test) bool { return x.Src == from && x.Proto == proto })
			for _, to := range tags {
				for _, port := range []string{":22", ":443", ":8443"} {
					if i < 0 || !slices.Contains(p.Tests[i].Deny, to+port) {
						t.Errorf("no test denies %s over %s to %s", from, proto, to+port)
					}
				}
			}
		}
	}
	for _, x := range []struct {
		port      uint16
		customers []string
	}{{0, nil}, {1, []string{"Globex"}}, {1, []string{"a", "a"}}, {1, make([]string, mesh.MaxACLCustomers+1)}, {1, []string{"a:b"}},
		{1, []string{""}}} {
		if _, err := mesh.ACL(x.port, x.customers...); fault.Of(err) != fault.Invalid {
			t.Errorf("ACL(%d, %q) = %v, want invalid", x.port, x.customers, err)
		}
	}
}

// TestACLTestsCatchWidening changes the policy as a tired administrator might: its own tests must refuse each of it.
func TestACLTestsCatchWidening(t *testing.T) {
	if err := policy(t, "globex", "initech").Verify(); err != nil {
		t.Fatalf("the policy fails its own tests: %v", err)
	}
	a, b := mesh.CustomerTag("globex"), mesh.CustomerTag("initech")
	add := func(proto, src, dst string) func(*meshtest.Policy) {
		return func(p *meshtest.Policy) {
			p.ACLs = append(p.ACLs, meshtest.Rule{Action: "accept", Proto: proto, Src: []string{src}, Dst: []string{dst}})
		}
	}
	for name, change := range map[string]func(*meshtest.Policy){
		"everything":          add("", "*", "*:*"),
		"one to another":      add("tcp", a, b+":8443"),
		"back":                add("tcp", b, a+":22"),
		"within a customer":   add("tcp", a, a+":*"),
		"common tag":          add("tcp", a, mesh.TagAppliance+":443"),
		"vendor to appliance": add("tcp", mesh.TagControl, a+":22"),
		"udp":                 add("udp", a, b+":1-1024"),
		"shell of the vendor": add("tcp", a, mesh.TagControl+":22"),
		"port changed":        func(p *meshtest.Policy) { p.ACLs[0].Dst[0] = mesh.TagControl + ":8444" },
		"any port":            func(p *meshtest.Policy) { p.ACLs[0].Dst[0] = mesh.TagControl + ":*" },
		"next port":           func(p *meshtest.Policy) { p.ACLs[0].Dst[0] = mesh.TagControl + ":8443-8444" },
		"any protocol":        func(p *meshtest.Policy) { p.ACLs[0].Proto = "" },
		"any source":          func(p *meshtest.Policy) { p.ACLs[0].Src = []string{"*"} },
		"a customer left out": func(p *meshtest.Policy) { p.ACLs[0].Src = []string{mesh.TagAppliance, a} },
		"no rule":             func(p *meshtest.Policy) { p.ACLs = nil },
	} {
		p := policy(t, "globex", "initech")
		change(p)
		if p.Verify() == nil {
			t.Errorf("%s: the policy's own tests do not notice", name)
		}
	}
	for _, s := range []string{`{"ssh":[]}`, `{"autoApprovers":{}}`,
		`{"acls":[{"action":"accept","proto":"tcp","src":["tag:x"],"dst":["*:1"]}]}`, `{} {}`} {
		if _, err := meshtest.ParsePolicy([]byte(s)); err == nil {
			t.Errorf("the evaluator takes %s", s)
		}
	}
	raw, err := mesh.ACL(8443)
	if err != nil {
		t.Fatal(err)
	}
	var keys map[string]json.RawMessage
	if err := json.Unmarshal(raw, &keys); err != nil || len(keys) != 3 {
		t.Errorf("the policy has other sections than tagOwners, acls, tests: %v, %v", keys, err)
	}
}

// reach dials and tells whether anybody answered. A dropped packet has no answer: the bound ends the wait.
func reach(t *testing.T, n *mesh.Node, addr string, bound time.Duration) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), bound)
	defer cancel()
	c, err := n.Dial(ctx, addr)
	if err == nil {
		_ = c.Close()
	}
	return err
}

// hold keeps a listener busy accepting.
func hold(t *testing.T, n *mesh.Node, port string) {
	t.Helper()
	l, err := n.Listen(t.Context(), port)
	if err != nil {
		t.Fatal(err)
	}
	go echoAll(l)
}

func TestTailnetIsolation(t *testing.T) {
	strict := policy(t, "globex", "initech")
	open := meshtest.Open(strict)
	tn, err := meshtest.StartWith("key-for-tests", open)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = tn.Close() })
	all := func(n *mesh.Node, port int) string {
		return net.JoinHostPort(n.Addrs()[0].String(), strconv.Itoa(port))
	}
	control := join(t, tn, mesh.TailnetConfig{Hostname: "control", Doors: true, Tags: []string{mesh.TagControl},
		Addresses: []string{"100.64.0.2:22", "100.64.0.3:22", "100.64.0.4:22"}, Wait: 30 * time.Second})
	b := join(t, tn, mesh.TailnetConfig{Hostname: "b", Doors: true, Tags: []string{mesh.CustomerTag("initech")}})
	door, other, across := all(control, 8443), all(control, 22), all(b, 8443)
	a := join(t, tn, mesh.TailnetConfig{Hostname: "a", Tags: []string{mesh.CustomerTag("globex")},
		Addresses: []string{door, other, across, all(b, 22)}, Wait: 30 * time.Second})
	for _, n := range []*mesh.Node{control, b} {
		hold(t, n, ":8443")
		hold(t, n, ":22")
	}
	// Everybody listens, and the open policy lets them: a later drop is the filter's work.
	for _, addr := range []string{door, other, across, all(b, 22)} {
		if err := reach(t, a, addr, 30*time.Second); err != nil {
			t.Fatalf("open policy: dial of %s: %v", addr, err)
		}
	}
	if err := reach(t, control, all(b, 22), 30*time.Second); err != nil {
		t.Fatalf("open policy: the vendor dials b: %v", err)
	}
	t.Run("no doors under an open policy", func(t *testing.T) { closed(t, tn, a, control) })
	tn.SetPolicy(strict)
	deadline := time.Now().Add(20 * time.Second)
	for reach(t, a, across, time.Second) == nil { // until the new filters are there
		if time.Now().After(deadline) {
			t.Fatal("b still accepts from a, 20 s after the policy forbids it")
		}
	}
	if err := reach(t, a, door, 30*time.Second); err != nil {
		t.Errorf("the control plane's door: %v", err)
	}
	for _, addr := range []string{across, all(b, 22), other} {
		if err := reach(t, a, addr, 1500*time.Millisecond); err == nil || !strings.Contains(err.Error(), "deadline") {
			t.Errorf("a reaches %s, or is told no instead of nothing: %v", addr, err)
		}
	}
	if err := reach(t, control, all(b, 22), 1500*time.Millisecond); err == nil {
		t.Error("the vendor reaches an appliance")
	}
	if err := reach(t, a, door, 30*time.Second); err != nil {
		t.Errorf("the control plane's door, afterwards: %v", err)
	}
}

// closed scans a node without doors from a peer, under a policy that lets everything through.
func closed(t *testing.T, tn *meshtest.Tailnet, a, control *mesh.Node) {
	ports := []int{1, 22, 53, 80, 443, 5252, 8080, 8443, 32768, 41641, 65535}
	var addrs []string
	for _, p := range ports {
		addrs = append(addrs, net.JoinHostPort(a.Addrs()[0].String(), strconv.Itoa(p)))
	}
	scan := join(t, tn, mesh.TailnetConfig{Hostname: "scan", Tags: []string{mesh.TagControl}, Addresses: addrs, Wait: 30 * time.Second})
	if err := reach(t, a, net.JoinHostPort(control.Addrs()[0].String(), "8443"), 30*time.Second); err != nil {
		t.Fatal(err)
	}
	results := make(chan error, len(addrs))
	for _, addr := range addrs {
		go func() { results <- reach(t, scan, addr, 3*time.Second) }()
	}
	for range addrs {
		if err := <-results; err == nil || !strings.Contains(err.Error(), "deadline") {
			t.Errorf("a node without doors answers: %v", err)
		}
	}
	if _, err := a.Listen(t.Context(), ":443"); fault.Of(err) != fault.Denied {
		t.Errorf("Listen = %v, want denied", err)
	}
}
