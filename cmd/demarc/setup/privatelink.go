// SPDX-License-Identifier: Apache-2.0

package setup

import (
	"net/netip"
	"regexp"

	"github.com/spf13/cobra"

	"github.com/demarc-dev/demarc/cmd/demarc/cli"
	"github.com/demarc-dev/demarc/fleet"
)

// The two sides of an endpoint service.
const (
	sideVendor   = "vendor"
	sideCustomer = "customer"
)

// linkOptions is what the Terraform of one side is made of. All of it is checked before a byte is written.
type linkOptions struct {
	side, name, vpc string
	subnets         []string
	port            uint16
	accounts        []string // vendor: who may ask for an endpoint
	targets         []string // vendor: addresses of the control plane's nodes
	partition       string   // vendor: of the customers' accounts
	service         string   // customer: the name that the vendor sends
	groups, cidrs   []string // customer: where the appliance is
}

func privateLinkCommand(a *cli.App) *cobra.Command {
	var in linkOptions
	c := &cobra.Command{
		Use:   "privatelink",
		Short: "Write the Terraform of one side of an AWS PrivateLink endpoint service",
		Args:  cli.Exactly(0, "no arguments"),
		Long: "privatelink prints Terraform for one side of the transport privatelink. The vendor's side is a network load balancer before\n" +
			"the control plane's nodes and an endpoint service that lets the customers' accounts ask. The customer's side is an\n" +
			"endpoint that only the appliance reaches. TLS is not ended anywhere in between: the other side is proven by its\n" +
			"certificate, not by the endpoint.\n\n" +
			"Nothing is sent to AWS: read what is printed, then apply it with terraform or tofu.",
		Example: "  demarc mesh privatelink --side vendor --name acme --vpc-id vpc-0a1b2c3d --subnet-id subnet-0a1b2c3d \\\n" +
			"    --target 10.0.1.10 --customer-account 210987654321 > vendor.tf\n" +
			"  demarc mesh privatelink --side customer --name acme --vpc-id vpc-0d3c2b1a --subnet-id subnet-0d3c2b1a \\\n" +
			"    --service com.amazonaws.vpce.eu-central-1.vpce-svc-0123456789abcdef0 --appliance-cidr 10.1.2.3/32 > endpoint.tf",
	}
	f := c.Flags()
	f.StringVar(&in.side, "side", "", "vendor or customer")
	f.StringVar(&in.name, "name", "demarc", "of the resources, at most 20 letters, digits and hyphens")
	f.StringVar(&in.vpc, "vpc-id", "", "the VPC of this side")
	f.StringArrayVar(&in.subnets, "subnet-id", nil, "a subnet of this side; once for each availability zone")
	f.Uint16Var(&in.port, "port", 7443, "the control plane's port, the same on each node")
	f.StringArrayVar(&in.targets, "target", nil, "vendor: address of a control plane's node; once for each")
	f.StringArrayVar(&in.accounts, "customer-account", nil, "vendor: AWS account that may ask for an endpoint; once for each customer")
	f.StringVar(&in.partition, "partition", "aws", "vendor: aws, aws-cn or aws-us-gov")
	f.StringVar(&in.service, "service", "", "customer: name of the vendor's endpoint service")
	f.StringArrayVar(&in.groups, "appliance-security-group", nil, "customer: security group of the appliance")
	f.StringArrayVar(&in.cidrs, "appliance-cidr", nil, "customer: network of the appliance")
	_ = c.RegisterFlagCompletionFunc("side", cobra.FixedCompletions([]string{sideVendor, sideCustomer}, cobra.ShellCompDirectiveNoFileComp))
	c.RunE = func(*cobra.Command, []string) error {
		b, err := in.terraform()
		if err != nil {
			return err
		}
		_, err = a.Out.Write(b)
		return err
	}
	return c
}

// forms is the one form of each kind of name that is written into the file.
var forms = map[string]*regexp.Regexp{
	"--vpc-id":                   regexp.MustCompile(`^vpc-[0-9a-f]{8,17}$`),
	"--subnet-id":                regexp.MustCompile(`^subnet-[0-9a-f]{8,17}$`),
	"--appliance-security-group": regexp.MustCompile(`^sg-[0-9a-f]{8,17}$`),
	"--customer-account":         regexp.MustCompile(`^[0-9]{12}$`),
	"--partition":                regexp.MustCompile(`^aws(-cn|-us-gov)?$`),
	"--service":                  regexp.MustCompile(`^(cn\.)?com\.amazonaws\.vpce\.[a-z]{2}(-[a-z]+)+-[0-9]\.vpce-svc-[0-9a-f]{8,17}$`),
}

// maxLinks bounds each list.
const maxLinks = 100

func inForm(flag string, need bool, values ...string) error {
	if need && len(values) == 0 {
		return cli.Usage("name at least one %s", flag)
	}
	if len(values) > maxLinks {
		return cli.Usage("%s: %d are given, at most %d are taken", flag, len(values), maxLinks)
	}
	seen := map[string]bool{}
	for _, v := range values {
		if !forms[flag].MatchString(v) {
			return cli.Usage("%s %.64q is not of the form %s", flag, v, forms[flag])
		}
		if seen[v] {
			return cli.Usage("%s %s is given twice", flag, v)
		}
		seen[v] = true
	}
	return nil
}

func (in *linkOptions) check() error {
	if in.side != sideVendor && in.side != sideCustomer {
		return cli.Usage("--side %.32q: use %s or %s", in.side, sideVendor, sideCustomer)
	}
	if err := fleet.CheckName("name", in.name); err != nil || len(in.name) > 20 {
		return cli.Usage("--name %.64q: use at most 20 lower-case letters, digits and hyphens", in.name)
	}
	if in.port == 0 {
		return cli.Usage("--port 0: name the control plane's port")
	}
	vendor := in.side == sideVendor
	if err := inForm("--vpc-id", true, in.vpc); err != nil {
		return err
	}
	if err := inForm("--subnet-id", true, in.subnets...); err != nil {
		return err
	}
	if vendor {
		return in.checkVendor()
	}
	return in.checkCustomer()
}

func (in *linkOptions) checkVendor() error {
	if in.service != "" || len(in.groups)+len(in.cidrs) > 0 {
		return cli.Usage("--service, --appliance-security-group and --appliance-cidr belong to the customer's side")
	}
	if err := inForm("--customer-account", true, in.accounts...); err != nil {
		return err
	}
	if err := inForm("--partition", true, in.partition); err != nil {
		return err
	}
	if len(in.targets) == 0 || len(in.targets) > maxLinks {
		return cli.Usage("name 1 to %d nodes with --target", maxLinks)
	}
	for _, t := range in.targets {
		if ip, err := netip.ParseAddr(t); err != nil || ip.Zone() != "" || ip.IsLoopback() || ip.IsUnspecified() || ip.IsMulticast() {
			return cli.Usage("--target %.64q: use the address of a node in the VPC", t)
		}
	}
	return nil
}

func (in *linkOptions) checkCustomer() error {
	if len(in.targets)+len(in.accounts) > 0 {
		return cli.Usage("--target and --customer-account belong to the vendor's side")
	}
	if err := inForm("--service", true, in.service); err != nil {
		return err
	}
	if err := inForm("--appliance-security-group", false, in.groups...); err != nil {
		return err
	}
	if len(in.groups)+len(in.cidrs) == 0 || len(in.cidrs) > maxLinks {
		return cli.Usage("say where the appliance is, with --appliance-security-group or --appliance-cidr")
	}
	for _, c := range in.cidrs {
		if p, err := netip.ParsePrefix(c); err != nil || p.Bits() == 0 || p != p.Masked() {
			return cli.Usage("--appliance-cidr %.64q: use the network of the appliance, for instance 10.1.2.3/32; the whole internet is none", c)
		}
	}
	return nil
}
