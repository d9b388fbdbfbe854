// SPDX-License-Identifier: Apache-2.0

package mesh

import (
	"encoding/json"

	"github.com/demarc-dev/demarc/fault"
)

// Tags of the vendor's tailnet.
const (
	TagControl   = "tag:demarc-control"
	TagAppliance = "tag:demarc-appliance"
)

// ACL gives the tailnet policy that keeps customers apart: an appliance reaches the control plane's port and nothing else,
// nothing reaches an appliance, and the policy's own tests say so to the tailnet that loads it. What is not accepted in a
// tailnet policy is denied.
func ACL(controlPort uint16) ([]byte, error) {
	if controlPort == 0 {
		return nil, fault.New("mesh.ACL", fault.Invalid, "name the control plane's port on the tailnet")
	}
	type rule struct {
		Action string   `json:"action"`
		Proto  string   `json:"proto"`
		Src    []string `json:"src"`
		Dst    []string `json:"dst"`
	}
	type test struct {
		Src    string   `json:"src"`
		Proto  string   `json:"proto"`
		Accept []string `json:"accept,omitempty"`
		Deny   []string `json:"deny,omitempty"`
	}
	port := func(tag, p string) string { return tag + ":" + p }
	number, err := json.Marshal(controlPort)
	if err != nil {
		return nil, fault.At("mesh.ACL", fault.Internal, err)
	}
	door := port(TagControl, string(number))
	b, err := json.MarshalIndent(struct {
		TagOwners map[string][]string `json:"tagOwners"`
		ACLs      []rule              `json:"acls"`
		Tests     []test              `json:"tests"`
	}{
		TagOwners: map[string][]string{TagControl: {"autogroup:admin"}, TagAppliance: {"autogroup:admin"}},
		ACLs:      []rule{{Action: "accept", Proto: "tcp", Src: []string{TagAppliance}, Dst: []string{door}}},
		Tests: []test{
			{Src: TagAppliance, Proto: "tcp", Accept: []string{door}, Deny: []string{port(TagAppliance, "22"), port(TagAppliance, string(number)), port(TagControl, "22")}},
			{Src: TagControl, Proto: "tcp", Deny: []string{port(TagAppliance, "22"), port(TagAppliance, string(number))}},
		},
	}, "", "  ")
	return append(b, '\n'), fault.At("mesh.ACL", fault.Internal, err)
}
