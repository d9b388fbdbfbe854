// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/demarc-dev/demarc/mesh/privatelink"
)

func (a *app) privatelink() *cobra.Command {
	var side, name, vpc, service, sg string
	var subnets, targets, customers, from []string
	var port uint16
	c := &cobra.Command{Use: "privatelink", Short: "Write Terraform for one side of an AWS endpoint service", Args: exactly(0, "no arguments"),
		Long: "privatelink writes Terraform on standard output. It asks no cloud and changes nothing.\n\n" +
			"The vendor's side is a load balancer that passes TCP on to the control plane, and an endpoint service that only the named accounts may\n" +
			"ask for; each connection is accepted by hand. The customer's side is an endpoint that only the appliance may reach; its output address\n" +
			"goes into transports[].addresses of the appliance's file.",
		Example: "  demarc mesh privatelink --side vendor --vpc vpc-0123456789abcdef0 --subnet subnet-0123456789abcdef0 --target 10.0.0.1 --customer 111122223333\n" +
			"  demarc mesh privatelink --side customer --service com.amazonaws.vpce.eu-central-1.vpce-svc-0123456789abcdef0 \\\n    --vpc vpc-0123456789abcdef0 --subnet subnet-0123456789abcdef0 --security-group sg-0123456789abcdef0"}
	f := c.Flags()
	f.StringVar(&side, "side", "", "vendor or customer")
	f.StringVar(&name, "name", "demarc", "of the resources")
	f.StringVar(&vpc, "vpc", "", "the side's own VPC")
	f.StringArrayVar(&subnets, "subnet", nil, "subnet of the load balancer, or of the endpoint; once for each")
	f.Uint16Var(&port, "port", 7443, "of the control plane")
	f.StringArrayVar(&targets, "target", nil, "vendor: address of a node; once for each")
	f.StringArrayVar(&customers, "customer", nil, "vendor: account id or ARN that may ask for a connection; once for each")
	f.StringVar(&service, "service", "", "customer: the service's name, as the vendor tells it")
	f.StringVar(&sg, "security-group", "", "customer: that of the appliance, or --from")
	f.StringArrayVar(&from, "from", nil, "customer: network of the appliance, as CIDR; once for each")
	_ = c.RegisterFlagCompletionFunc("side", cobra.FixedCompletions([]string{"vendor", "customer"}, cobra.ShellCompDirectiveNoFileComp))
	c.RunE = func(*cobra.Command, []string) error {
		var text []byte
		var err error
		switch side {
		case "vendor":
			if service != "" || sg != "" || len(from) > 0 {
				return usage("--service, --security-group and --from belong to --side customer")
			}
			text, err = privatelink.Vendor{Name: name, VPC: vpc, Subnets: subnets, Targets: targets, Port: port, Customers: customers}.Write()
		case "customer":
			if len(targets) > 0 || len(customers) > 0 {
				return usage("--target and --customer belong to --side vendor")
			}
			text, err = privatelink.Customer{Name: name, Service: service, VPC: vpc, Subnets: subnets, Group: sg, From: from, Port: port}.Write()
		default:
			return usage("--side %q: use vendor or customer", side)
		}
		if err != nil {
			return err
		}
		return a.emit(map[string]string{"side": side, "terraform": string(text)}, func(w io.Writer) { fmt.Fprint(w, string(text)) })
	}
	return c
}
