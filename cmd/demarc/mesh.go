// SPDX-License-Identifier: Apache-2.0

package main

import (
	"github.com/spf13/cobra"

	"github.com/demarc-dev/demarc/mesh"
)

// mesh is what the vendor's operator needs to set up the paths. It speaks to nobody.
func (a *app) mesh() *cobra.Command {
	top := &cobra.Command{Use: "mesh", Short: "Set up the paths between appliances and the control plane", Args: known, RunE: helpless}
	var port uint16
	var customers []string
	acl := &cobra.Command{
		Use: "acl", Short: "Print the policy of the vendor's tailnet, which keeps customers apart", Args: exactly(0, "no arguments"),
		Long: "Print the policy of the vendor's tailnet: appliances reach the control plane's port and nothing else, and nothing reaches\n" +
			"an appliance. The policy carries its own tests. See docs/tailnet.md.",
		Example: "  demarc mesh acl --port 7443 --customer globex --customer initech > policy.json",
		RunE: func(*cobra.Command, []string) error {
			b, err := mesh.ACL(port, customers...)
			if err != nil {
				return err
			}
			_, err = a.out.Write(b)
			return err
		},
	}
	acl.Flags().Uint16Var(&port, "port", 7443, "the control plane's port on the tailnet: that of listen")
	acl.Flags().StringArrayVar(&customers, "customer", nil, "a customer with a tag of its own; may come again")
	top.AddCommand(acl, a.privateLink())
	return top
}
