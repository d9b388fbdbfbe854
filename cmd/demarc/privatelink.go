// SPDX-License-Identifier: Apache-2.0

package main

import (
	"net/netip"
	"regexp"
	"strconv"

	"github.com/hashicorp/hcl/v2"
	"github.com/hashicorp/hcl/v2/hclsyntax"
	"github.com/hashicorp/hcl/v2/hclwrite"
	"github.com/spf13/cobra"
	"github.com/zclconf/go-cty/cty"

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
	service         string   // customer: the name that the vendor tells
	groups, cidrs   []string // customer: where the appliance is
}

func (a *app) privateLink() *cobra.Command {
	var in linkOptions
	c := &cobra.Command{Use: "privatelink", Short: "Write the Terraform of one side of an AWS PrivateLink endpoint service", Args: exactly(0, "no arguments"),
		Long: "privatelink prints Terraform for one side of the road privatelink. The vendor's side is a network load balancer before the control\n" +
			"plane's nodes and an endpoint service that lets the customers' accounts ask. The customer's side is an endpoint that only the\n" +
			"appliance reaches. TLS is not ended anywhere on the way: who answers is proven by its certificate, not by the endpoint.\n\n" +
			"Nothing is sent to AWS: read what is printed, then apply it with terraform or tofu.",
		Example: "  demarc mesh privatelink --side vendor --name acme --vpc-id vpc-0a1b2c3d --subnet-id subnet-0a1b2c3d \\\n    --target 10.0.1.10 --customer-account 210987654321 > vendor.tf\n" +
			"  demarc mesh privatelink --side customer --name acme --vpc-id vpc-0d3c2b1a --subnet-id subnet-0d3c2b1a \\\n    --service com.amazonaws.vpce.eu-central-1.vpce-svc-0123456789abcdef0 --appliance-cidr 10.1.2.3/32 > endpoint.tf"}
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
		_, err = a.out.Write(b)
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
		return usage("name at least one %s", flag)
	}
	if len(values) > maxLinks {
		return usage("%s: %d are given, at most %d are taken", flag, len(values), maxLinks)
	}
	seen := map[string]bool{}
	for _, v := range values {
		if !forms[flag].MatchString(v) {
			return usage("%s %.64q is not of the form %s", flag, v, forms[flag])
		}
		if seen[v] {
			return usage("%s %s is given twice", flag, v)
		}
		seen[v] = true
	}
	return nil
}

func (in *linkOptions) check() error {
	if in.side != sideVendor && in.side != sideCustomer {
		return usage("--side %.32q: use %s or %s", in.side, sideVendor, sideCustomer)
	}
	if err := fleet.CheckName("name", in.name); err != nil || len(in.name) > 20 {
		return usage("--name %.64q: use at most 20 lower-case letters, digits and hyphens", in.name)
	}
	if in.port == 0 {
		return usage("--port 0: name the control plane's port")
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
		return usage("--service, --appliance-security-group and --appliance-cidr belong to the customer's side")
	}
	if err := inForm("--customer-account", true, in.accounts...); err != nil {
		return err
	}
	if err := inForm("--partition", true, in.partition); err != nil {
		return err
	}
	if len(in.targets) == 0 || len(in.targets) > maxLinks {
		return usage("name 1 to %d nodes with --target", maxLinks)
	}
	for _, t := range in.targets {
		if ip, err := netip.ParseAddr(t); err != nil || ip.Zone() != "" || ip.IsLoopback() || ip.IsUnspecified() || ip.IsMulticast() {
			return usage("--target %.64q: use the address of a node in the VPC", t)
		}
	}
	return nil
}

func (in *linkOptions) checkCustomer() error {
	if len(in.targets)+len(in.accounts) > 0 {
		return usage("--target and --customer-account belong to the vendor's side")
	}
	if err := inForm("--service", true, in.service); err != nil {
		return err
	}
	if err := inForm("--appliance-security-group", false, in.groups...); err != nil {
		return err
	}
	if len(in.groups)+len(in.cidrs) == 0 || len(in.cidrs) > maxLinks {
		return usage("say where the appliance is, with --appliance-security-group or --appliance-cidr")
	}
	for _, c := range in.cidrs {
		if p, err := netip.ParsePrefix(c); err != nil || p.Bits() == 0 || p != p.Masked() {
			return usage("--appliance-cidr %.64q: use the network of the appliance, for instance 10.1.2.3/32; the whole internet is none", c)
		}
	}
	return nil
}

// terraform writes the file of one side.
func (in *linkOptions) terraform() ([]byte, error) {
	if err := in.check(); err != nil {
		return nil, err
	}
	f := hclwrite.NewEmptyFile()
	if in.side == sideVendor {
		in.vendorSide(f.Body())
	} else {
		in.customerSide(f.Body())
	}
	return hclwrite.Format(f.Bytes()), nil
}

func (in *linkOptions) vendorSide(b *hclwrite.Body) {
	say(b, "Vendor's side of the road privatelink: customers' appliances reach the control plane without the public network.")
	say(b, "A network load balancer carries TCP; TLS runs from the appliance to the node. Its idle timeout is 350 s: a channel says something more often.")
	providers(b)
	lb := block(b, "resource", "aws_lb", in.name)
	text(lb, "name", in.name)
	lb.SetAttributeValue("internal", cty.True)
	text(lb, "load_balancer_type", "network")
	lb.SetAttributeValue("subnets", words(in.subnets))
	lb.SetAttributeValue("enable_cross_zone_load_balancing", cty.True)

	tg := block(b, "resource", "aws_lb_target_group", in.name)
	text(tg, "name", in.name)
	text(tg, "target_type", "ip")
	text(tg, "protocol", "TCP")
	number(tg, "port", int64(in.port))
	text(tg, "vpc_id", in.vpc)
	tg.SetAttributeValue("proxy_protocol_v2", cty.False)
	number(tg, "deregistration_delay", 30)
	health := tg.AppendNewBlock("health_check", nil).Body()
	text(health, "protocol", "TCP")
	number(health, "interval", 10)

	at := block(b, "resource", "aws_lb_target_group_attachment", in.name)
	at.SetAttributeRaw("for_each", call("toset", words(in.targets)))
	refer(at, "target_group_arn", "aws_lb_target_group", in.name, "arn")
	refer(at, "target_id", "each", "value")
	number(at, "port", int64(in.port))

	ls := block(b, "resource", "aws_lb_listener", in.name)
	refer(ls, "load_balancer_arn", "aws_lb", in.name, "arn")
	text(ls, "protocol", "TCP")
	number(ls, "port", int64(in.port))
	act := ls.AppendNewBlock("default_action", nil).Body()
	text(act, "type", "forward")
	refer(act, "target_group_arn", "aws_lb_target_group", in.name, "arn")

	var who []string
	for _, a := range in.accounts {
		who = append(who, "arn:"+in.partition+":iam::"+a+":root")
	}
	b.AppendNewline()
	say(b, "These accounts may ask for an endpoint, and each request waits until you accept it. It opens a path for bytes, and proves nobody.")
	es := b.AppendNewBlock("resource", []string{"aws_vpc_endpoint_service", in.name}).Body()
	es.SetAttributeValue("acceptance_required", cty.True)
	es.SetAttributeRaw("network_load_balancer_arns", list(path("aws_lb", in.name, "arn")))
	es.SetAttributeValue("allowed_principals", words(who))

	out := block(b, "output", "service_name")
	text(out, "description", "Tell it your customers: demarc mesh privatelink --side customer --service NAME")
	refer(out, "value", "aws_vpc_endpoint_service", in.name, "service_name")
}

func (in *linkOptions) customerSide(b *hclwrite.Body) {
	say(b, "Customer's side of the road privatelink: one endpoint that the appliance reaches, and nobody else. Nothing comes in from the vendor.")
	providers(b)
	sg := block(b, "resource", "aws_security_group", in.name)
	text(sg, "name", in.name+"-endpoint")
	text(sg, "description", "the appliance reaches the vendor's control plane")
	text(sg, "vpc_id", in.vpc)
	for i, from := range append(append([]string{}, in.groups...), in.cidrs...) {
		r := block(b, "resource", "aws_vpc_security_group_ingress_rule", in.name+"_"+strconv.Itoa(i+1))
		refer(r, "security_group_id", "aws_security_group", in.name, "id")
		switch p, err := netip.ParsePrefix(from); {
		case err != nil:
			text(r, "referenced_security_group_id", from)
		case p.Addr().Is4():
			text(r, "cidr_ipv4", from)
		default:
			text(r, "cidr_ipv6", from)
		}
		text(r, "ip_protocol", "tcp")
		number(r, "from_port", int64(in.port))
		number(r, "to_port", int64(in.port))
	}
	ep := block(b, "resource", "aws_vpc_endpoint", in.name)
	text(ep, "vpc_endpoint_type", "Interface")
	text(ep, "service_name", in.service)
	text(ep, "vpc_id", in.vpc)
	ep.SetAttributeValue("subnet_ids", words(in.subnets))
	ep.SetAttributeRaw("security_group_ids", list(path("aws_security_group", in.name, "id")))
	say(ep, "No private DNS name: the appliance verifies the control plane by its certificate, whatever the address is called.")
	ep.SetAttributeValue("private_dns_enabled", cty.False)

	out := block(b, "output", "endpoint_dns_name")
	text(out, "description", "For the appliance's file, with :"+strconv.Itoa(int(in.port))+" after it: transports, kind privatelink, addresses")
	// The first entry is the endpoint's regional name; it answers with an address in each zone.
	out.SetAttributeTraversal("value", hcl.Traversal{hcl.TraverseRoot{Name: "aws_vpc_endpoint"}, hcl.TraverseAttr{Name: in.name},
		hcl.TraverseAttr{Name: "dns_entry"}, hcl.TraverseIndex{Key: cty.NumberIntVal(0)}, hcl.TraverseAttr{Name: "dns_name"}})
}

func providers(b *hclwrite.Body) {
	tf := b.AppendNewBlock("terraform", nil).Body()
	text(tf, "required_version", ">= 1.6")
	tf.AppendNewBlock("required_providers", nil).Body().SetAttributeValue("aws", cty.ObjectVal(map[string]cty.Value{
		"source": cty.StringVal("hashicorp/aws"), "version": cty.StringVal(">= 5.0")}))
}

func block(b *hclwrite.Body, kind string, labels ...string) *hclwrite.Body {
	b.AppendNewline()
	return b.AppendNewBlock(kind, labels).Body()
}

func say(b *hclwrite.Body, line string) {
	b.AppendUnstructuredTokens(hclwrite.Tokens{{Type: hclsyntax.TokenComment, Bytes: []byte("# " + line + "\n")}})
}

func text(b *hclwrite.Body, key, v string)         { b.SetAttributeValue(key, cty.StringVal(v)) }
func number(b *hclwrite.Body, key string, v int64) { b.SetAttributeValue(key, cty.NumberIntVal(v)) }

func refer(b *hclwrite.Body, key string, parts ...string) { b.SetAttributeRaw(key, path(parts...)) }

func path(parts ...string) hclwrite.Tokens {
	t := hcl.Traversal{hcl.TraverseRoot{Name: parts[0]}}
	for _, p := range parts[1:] {
		t = append(t, hcl.TraverseAttr{Name: p})
	}
	return hclwrite.TokensForTraversal(t)
}

func list(one hclwrite.Tokens) hclwrite.Tokens {
	return hclwrite.TokensForTuple([]hclwrite.Tokens{one})
}

func call(name string, v cty.Value) hclwrite.Tokens {
	return hclwrite.TokensForFunctionCall(name, hclwrite.TokensForValue(v))
}

func words(ss []string) cty.Value {
	var out []cty.Value
	for _, s := range ss {
		out = append(out, cty.StringVal(s))
	}
	return cty.ListVal(out)
}
