// SPDX-License-Identifier: Apache-2.0

package mesh

import (
	"encoding/json"
	"slices"
	"strconv"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
)

// Tags of the vendor's tailnet.
const (
	TagControl   = "tag:demarc-control"
	TagAppliance = "tag:demarc-appliance"
)

// MaxACLCustomers is how many customers may have a tag of their own. Each pair of them is in the policy's tests.
const MaxACLCustomers = 64

// CustomerTag is the tag of one customer's appliances.
func CustomerTag(customer string) string { return TagAppliance + "-" + customer }

type aclRule struct {
	Action string   `json:"action"`
	Proto  string   `json:"proto"`
	Src    []string `json:"src"`
	Dst    []string `json:"dst"`
}

type aclTest struct {
	Src    string   `json:"src"`
	Proto  string   `json:"proto"`
	Accept []string `json:"accept,omitempty"`
	Deny   []string `json:"deny,omitempty"`
}

// ACL gives the tailnet policy that keeps customers apart: an appliance reaches the control plane's port and nothing else,
// nothing reaches an appliance, and the policy's own tests say so to the tailnet that loads it. What is not accepted in a
// tailnet policy is denied. Each customer named gets a tag, [CustomerTag], beside the common one: it isolates no better, but
// an administrator sees whose node is whose, and the control plane's tag may hand it out, so that an OAuth client of the
// control plane's can make a key for one customer only.
//
// The rules are "acls", not the newer "grants": what is said here needs none of what grants add, Tailscale keeps accepting
// acls, and Headscale reads acls in every version but grants only in new ones. The output is JSON without comments, which is
// HuJSON too. There is no ssh section (absent: nobody gets a shell), no autoApprovers (nothing routes subnets here) and no
// nodeAttrs (they would only switch features on).
func ACL(controlPort uint16, customers ...string) ([]byte, error) {
	const op = "mesh.ACL"
	if controlPort == 0 {
		return nil, fault.New(op, fault.Invalid, "name the control plane's port on the tailnet")
	}
	if len(customers) > MaxACLCustomers {
		return nil, fault.New(op, fault.Invalid, "%d customers: name %d at most, or none: the common tag keeps them apart as well",
			len(customers), MaxACLCustomers)
	}
	owners := map[string][]string{TagControl: {"autogroup:admin"}, TagAppliance: {"autogroup:admin", TagControl}}
	tags := []string{TagAppliance}
	for _, c := range slices.Sorted(slices.Values(customers)) {
		if err := fleet.CheckName("customer", c); err != nil {
			return nil, fault.At(op, fault.Invalid, err)
		}
		if slices.Contains(tags, CustomerTag(c)) {
			return nil, fault.New(op, fault.Invalid, "customer %s is named twice", c)
		}
		tags = append(tags, CustomerTag(c))
		owners[CustomerTag(c)] = []string{"autogroup:admin", TagControl}
	}
	door := TagControl + ":" + strconv.Itoa(int(controlPort))
	b, err := json.MarshalIndent(struct {
		TagOwners map[string][]string `json:"tagOwners"`
		ACLs      []aclRule           `json:"acls"`
		Tests     []aclTest           `json:"tests"`
	}{owners, []aclRule{{Action: "accept", Proto: "tcp", Src: tags, Dst: []string{door}}}, aclTests(controlPort, tags)}, "", "  ")
	return append(b, '\n'), fault.At(op, fault.Internal, err)
}

// aclTests says what the policy must accept and deny: the door alone, and nothing towards an appliance from anybody.
func aclTests(door uint16, tags []string) []aclTest {
	at := func(tag string, port uint16) string { return tag + ":" + strconv.Itoa(int(port)) }
	var appliances []string // each of them, where a shell, the web and the door would be
	for _, t := range tags {
		appliances = append(appliances, at(t, 22), at(t, 443))
		if door != 22 && door != 443 {
			appliances = append(appliances, at(t, door))
		}
	}
	around := []string{} // the control plane's other ports
	for _, p := range []uint16{22, 443, door - 1, door + 1} {
		if p != door && p != 0 && !slices.Contains(around, at(TagControl, p)) {
			around = append(around, at(TagControl, p))
		}
	}
	var out []aclTest
	for _, t := range tags {
		out = append(out,
			aclTest{Src: t, Proto: "tcp", Accept: []string{at(TagControl, door)}, Deny: slices.Concat(appliances, around)},
			aclTest{Src: t, Proto: "udp", Deny: slices.Concat(appliances, around, []string{at(TagControl, door)})})
	}
	return append(out,
		aclTest{Src: TagControl, Proto: "tcp", Deny: slices.Concat(appliances, around, []string{at(TagControl, door)})},
		aclTest{Src: TagControl, Proto: "udp", Deny: slices.Concat(appliances, around, []string{at(TagControl, door)})})
}
