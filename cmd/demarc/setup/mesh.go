// SPDX-License-Identifier: Apache-2.0

package setup

import (
	"github.com/spf13/cobra"

	"github.com/demarc-dev/demarc/cmd/demarc/cli"
	"github.com/demarc-dev/demarc/mesh"
)

// MeshCommand is demarc mesh: what the vendor's operator needs to set up transports. It calls nobody.
func MeshCommand(a *cli.App) *cobra.Command {
	var port uint16
	var customers []string
	acl := &cobra.Command{
		Use:   "acl",
		Short: "Print the policy of the vendor's tailnet, which keeps customers apart",
		Args:  cli.Exactly(0, "no arguments"),
		Long: "Print the policy of the vendor's tailnet: appliances reach the control plane's port and nothing else, and nothing\n" +
			"reaches an appliance. The policy carries its own tests. See docs/tailnet.md.",
		Example: "  demarc mesh acl --port 7443 --customer globex --customer initech > policy.json",
		RunE: func(*cobra.Command, []string) error {
			b, err := mesh.ACL(port, customers...)
			if err != nil {
				return err
			}
			_, err = a.Out.Write(b)
			return err
		},
	}
	acl.Flags().Uint16Var(&port, "port", 7443, "the control plane's port on the tailnet: that of listen")
	acl.Flags().StringArrayVar(&customers, "customer", nil, "a customer with a tag of its own; may come again")
	return cli.Group("mesh", "Set up the transports between appliances and the control plane", acl, privateLinkCommand(a))
}
