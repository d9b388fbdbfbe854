// SPDX-License-Identifier: Apache-2.0

// Package privatelink writes Terraform for both sides of an AWS endpoint service, over which appliances reach a control plane
// without the public network.
//
// The promise: what is written holds checked values only, as HCL literals made by hclwrite, so that no input can become an
// expression. Nothing is applied, and no cloud is asked.
package privatelink

import (
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strconv"

	"github.com/hashicorp/hcl/v2"
	"github.com/hashicorp/hcl/v2/hclsyntax"
	"github.com/hashicorp/hcl/v2/hclwrite"
	"github.com/zclconf/go-cty/cty"

	"github.com/demarc-dev/demarc/fault"
)

// maxList bounds each list of an input.
const maxList = 256

// Vendor is what the vendor's side is made of. The control plane's nodes are the targets of a load balancer that passes TCP on.
type Vendor struct {
	Name      string   // of the resources: 1 to 24 lower-case letters, digits and inner hyphens
	VPC       string   // vpc-...
	Subnets   []string // subnet-..., of the load balancer
	Targets   []string // addresses of the nodes, in that VPC
	Port      uint16   // of the control plane
	Customers []string // account ids (12 digits), or ARNs of roles or users: who may ask for a connection
}

// Customer is what the customer's side is made of.
type Customer struct {
	Name    string   // of the resources
	Service string   // com.amazonaws.vpce.REGION.vpce-svc-..., as the vendor's output tells it
	VPC     string   // vpc-...
	Subnets []string // subnet-..., one for each zone
	Group   string   // sg-... of the appliance, or "" where From names its network
	From    []string // networks of the appliance, as CIDR
	Port    uint16   // of the control plane
}

var (
	nameIs    = regexp.MustCompile(`^[a-z]([a-z0-9-]{0,22}[a-z0-9])?$`)
	vpcIs     = regexp.MustCompile(`^vpc-([0-9a-f]{8}|[0-9a-f]{17})$`)
	subnetIs  = regexp.MustCompile(`^subnet-([0-9a-f]{8}|[0-9a-f]{17})$`)
	groupIs   = regexp.MustCompile(`^sg-([0-9a-f]{8}|[0-9a-f]{17})$`)
	accountIs = regexp.MustCompile(`^[0-9]{12}$`)
	arnIs     = regexp.MustCompile(`^arn:aws(-[a-z]{2,3}(-[a-z]{2,3})?)?:iam::[0-9]{12}:(root|(role|user)/[A-Za-z0-9+=,.@_/-]{1,512})$`)
	serviceIs = regexp.MustCompile(`^(com|cn\.com)\.amazonaws\.vpce\.([a-z]{2}(-[a-z]{2,4})?-[a-z]{4,12}-[0-9])\.vpce-svc-([0-9a-f]{8}|[0-9a-f]{17})$`)
)

func bad(what, got, want string) error {
	return fault.New("privatelink", fault.Invalid, "%s %.80q: %s", what, got, want)
}

func one(what string, is *regexp.Regexp, got, want string) error {
	if len(got) > 700 || !is.MatchString(got) {
		return bad(what, got, want)
	}
	return nil
}

func each(what string, list []string, check func(string) error) error {
	if len(list) == 0 || len(list) > maxList {
		return fault.New("privatelink", fault.Invalid, "%s: name 1 to %d", what, maxList)
	}
	for i, v := range list {
		if err := check(v); err != nil {
			return err
		}
		if slices.Contains(list[:i], v) {
			return bad(what, v, "it is named twice")
		}
	}
	return nil
}

func checkPort(p uint16) error {
	if p == 0 {
		return bad("port", "0", "name the control plane's port")
	}
	return nil
}

func subnets(list []string) error {
	return each("subnet", list, func(s string) error {
		return one("subnet", subnetIs, s, "use subnet- and 8 or 17 hexadecimal digits")
	})
}

func (v *Vendor) check() error {
	for _, err := range []error{
		one("name", nameIs, v.Name, "use 1 to 24 lower-case letters, digits and inner hyphens"),
		one("vpc", vpcIs, v.VPC, "use vpc- and 8 or 17 hexadecimal digits"), subnets(v.Subnets), checkPort(v.Port),
		each("target", v.Targets, func(s string) error {
			if a, err := netip.ParseAddr(s); err != nil || !a.Is4() || !a.IsGlobalUnicast() || a.String() != s {
				return bad("target", s, "use the IPv4 address of a node of the control plane")
			}
			return nil
		}),
		each("customer", v.Customers, func(s string) error {
			if accountIs.MatchString(s) {
				return nil
			}
			return one("customer", arnIs, s, "use an account id of 12 digits, or the ARN of a role or user")
		}),
	} {
		if err != nil {
			return err
		}
	}
	return nil
}

func (c *Customer) check() error {
	for _, err := range []error{
		one("name", nameIs, c.Name, "use 1 to 24 lower-case letters, digits and inner hyphens"),
		one("service", serviceIs, c.Service, "use com.amazonaws.vpce.REGION.vpce-svc-ID, as the vendor's output service_name tells it"),
		one("vpc", vpcIs, c.VPC, "use vpc- and 8 or 17 hexadecimal digits"), subnets(c.Subnets), checkPort(c.Port),
	} {
		if err != nil {
			return err
		}
	}
	if (c.Group == "") == (len(c.From) == 0) {
		return fault.New("privatelink", fault.Invalid, "name who may use the endpoint: the appliance's security group, or its networks, and not both")
	}
	if c.Group != "" {
		return one("security group", groupIs, c.Group, "use sg- and 8 or 17 hexadecimal digits")
	}
	return each("network", c.From, func(s string) error {
		p, err := netip.ParsePrefix(s)
		if err != nil || !p.Addr().Is4() || p.Masked().String() != s || p.Bits() < 8 {
			return bad("network", s, "use an IPv4 network such as 10.1.2.0/24, no wider than /8")
		}
		return nil
	})
}

// Write gives the vendor's side as one file of Terraform.
func (v Vendor) Write() ([]byte, error) {
	if err := v.check(); err != nil {
		return nil, err
	}
	f := begin("The vendor's side of AWS PrivateLink. Written by demarc mesh privatelink: change its arguments, not this file.")
	b := f.Body()

	sg := block(b, "resource", "aws_security_group", "demarc")
	text(sg, "name", v.Name+"-privatelink")
	text(sg, "description", "demarc: what the load balancer may reach")
	text(sg, "vpc_id", v.VPC)
	for _, t := range v.Targets {
		r := block(b, "resource", "aws_vpc_security_group_egress_rule", "node_"+label(t))
		ref(r, "security_group_id", "aws_security_group", "demarc", "id")
		text(r, "cidr_ipv4", t+"/32")
		ports(r, v.Port)
	}

	lb := block(b, "resource", "aws_lb", "demarc")
	text(lb, "name", v.Name+"-pl")
	text(lb, "load_balancer_type", "network")
	lb.SetAttributeValue("internal", cty.True)
	lb.SetAttributeValue("subnets", texts(v.Subnets))
	lb.SetAttributeRaw("security_groups", list(traversal("aws_security_group", "demarc", "id")))
	lb.SetAttributeValue("enable_cross_zone_load_balancing", cty.True)
	text(lb, "enforce_security_group_inbound_rules_on_private_link_traffic", "off")

	tg := block(b, "resource", "aws_lb_target_group", "demarc")
	text(tg, "name", v.Name+"-pl")
	number(tg, "port", v.Port)
	text(tg, "protocol", "TCP") // the TLS of the channel ends in the control plane, nowhere else
	text(tg, "target_type", "ip")
	text(tg, "vpc_id", v.VPC)
	text(tg, "preserve_client_ip", "false")
	hc := tg.AppendNewBlock("health_check", nil).Body()
	text(hc, "protocol", "TCP")

	for _, t := range v.Targets {
		at := block(b, "resource", "aws_lb_target_group_attachment", "node_"+label(t))
		ref(at, "target_group_arn", "aws_lb_target_group", "demarc", "arn")
		text(at, "target_id", t)
		number(at, "port", v.Port)
	}

	ln := block(b, "resource", "aws_lb_listener", "demarc")
	ref(ln, "load_balancer_arn", "aws_lb", "demarc", "arn")
	number(ln, "port", v.Port)
	text(ln, "protocol", "TCP")
	act := ln.AppendNewBlock("default_action", nil).Body()
	text(act, "type", "forward")
	ref(act, "target_group_arn", "aws_lb_target_group", "demarc", "arn")

	sv := block(b, "resource", "aws_vpc_endpoint_service", "demarc")
	sv.SetAttributeValue("acceptance_required", cty.True)
	sv.SetAttributeRaw("network_load_balancer_arns", list(traversal("aws_lb", "demarc", "arn")))
	sv.SetAttributeValue("tags", cty.ObjectVal(map[string]cty.Value{"Name": cty.StringVal(v.Name)}))

	block(b, "data", "aws_partition", "current")
	for _, c := range v.Customers {
		p := block(b, "resource", "aws_vpc_endpoint_service_allowed_principal", "customer_"+label(c))
		ref(p, "vpc_endpoint_service_id", "aws_vpc_endpoint_service", "demarc", "id")
		if accountIs.MatchString(c) {
			p.SetAttributeRaw("principal_arn", rootOf(c))
		} else {
			text(p, "principal_arn", c)
		}
	}
	output(b, "service_name", "Give this to the customer: demarc mesh privatelink --side customer --service", "aws_vpc_endpoint_service", "demarc", "service_name")
	return f.Bytes(), nil
}

// Write gives the customer's side as one file of Terraform.
func (c Customer) Write() ([]byte, error) {
	if err := c.check(); err != nil {
		return nil, err
	}
	f := begin("The customer's side of AWS PrivateLink. Written by demarc mesh privatelink: change its arguments, not this file.")
	b := f.Body()

	sg := block(b, "resource", "aws_security_group", "demarc")
	text(sg, "name", c.Name+"-privatelink")
	text(sg, "description", "demarc: who may use the endpoint of the vendor's control plane")
	text(sg, "vpc_id", c.VPC) // it has no rule of egress: the endpoint calls nobody
	if c.Group != "" {
		r := block(b, "resource", "aws_vpc_security_group_ingress_rule", "appliance")
		ref(r, "security_group_id", "aws_security_group", "demarc", "id")
		text(r, "referenced_security_group_id", c.Group)
		ports(r, c.Port)
	}
	for _, n := range c.From {
		r := block(b, "resource", "aws_vpc_security_group_ingress_rule", "appliance_"+label(n))
		ref(r, "security_group_id", "aws_security_group", "demarc", "id")
		text(r, "cidr_ipv4", n)
		ports(r, c.Port)
	}

	ep := block(b, "resource", "aws_vpc_endpoint", "demarc")
	text(ep, "vpc_id", c.VPC)
	text(ep, "service_name", c.Service)
	text(ep, "vpc_endpoint_type", "Interface")
	ep.SetAttributeValue("subnet_ids", texts(c.Subnets))
	ep.SetAttributeRaw("security_group_ids", list(traversal("aws_security_group", "demarc", "id")))
	ep.SetAttributeValue("private_dns_enabled", cty.False) // the vendor's name is not taken over: the appliance's file names the endpoint
	ep.SetAttributeValue("tags", cty.ObjectVal(map[string]cty.Value{"Name": cty.StringVal(c.Name)}))

	o := block(b, "output", "address")
	text(o, "description", "Write this into transports[].addresses of the appliance's file, kind privatelink; the vendor accepts the connection first")
	dns := hclwrite.TokensForTraversal(hcl.Traversal{hcl.TraverseRoot{Name: "aws_vpc_endpoint"}, hcl.TraverseAttr{Name: "demarc"}, hcl.TraverseAttr{Name: "dns_entry"},
		hcl.TraverseIndex{Key: cty.NumberIntVal(0)}, hcl.TraverseAttr{Name: "dns_name"}})
	o.SetAttributeRaw("value", hclwrite.TokensForFunctionCall("join", hclwrite.TokensForValue(cty.StringVal(":")),
		hclwrite.TokensForTuple([]hclwrite.Tokens{dns, hclwrite.TokensForValue(cty.StringVal(strconv.Itoa(int(c.Port))))})))
	output(b, "endpoint", "The vendor accepts this connection", "aws_vpc_endpoint", "demarc", "id")
	output(b, "state", "pendingAcceptance until the vendor has accepted", "aws_vpc_endpoint", "demarc", "state")
	return f.Bytes(), nil
}

func begin(comment string) *hclwrite.File {
	f := hclwrite.NewEmptyFile()
	b := f.Body()
	b.AppendUnstructuredTokens(hclwrite.Tokens{{Type: hclsyntax.TokenComment, Bytes: []byte("# " + comment + "\n")}})
	t := b.AppendNewBlock("terraform", nil).Body()
	text(t, "required_version", ">= 1.6")
	t.AppendNewBlock("required_providers", nil).Body().SetAttributeValue("aws", cty.ObjectVal(map[string]cty.Value{
		"source": cty.StringVal("hashicorp/aws"), "version": cty.StringVal(">= 5.60")}))
	return f
}

func block(b *hclwrite.Body, kind string, labels ...string) *hclwrite.Body {
	b.AppendNewline()
	return b.AppendNewBlock(kind, labels).Body()
}

func text(b *hclwrite.Body, key, value string) { b.SetAttributeValue(key, cty.StringVal(value)) }

func number(b *hclwrite.Body, key string, n uint16) {
	b.SetAttributeValue(key, cty.NumberUIntVal(uint64(n)))
}

func ports(b *hclwrite.Body, p uint16) {
	text(b, "ip_protocol", "tcp")
	number(b, "from_port", p)
	number(b, "to_port", p)
}

func texts(list []string) cty.Value {
	var out []cty.Value
	for _, s := range list {
		out = append(out, cty.StringVal(s))
	}
	return cty.TupleVal(out)
}

func traversal(root string, rest ...string) hclwrite.Tokens {
	return hclwrite.TokensForTraversal(path(root, rest...))
}

func path(root string, rest ...string) hcl.Traversal {
	t := hcl.Traversal{hcl.TraverseRoot{Name: root}}
	for _, r := range rest {
		t = append(t, hcl.TraverseAttr{Name: r})
	}
	return t
}

func ref(b *hclwrite.Body, key, root string, rest ...string) {
	b.SetAttributeTraversal(key, path(root, rest...))
}

func list(items ...hclwrite.Tokens) hclwrite.Tokens { return hclwrite.TokensForTuple(items) }

func output(b *hclwrite.Body, name, description, root string, rest ...string) {
	o := block(b, "output", name)
	text(o, "description", description)
	ref(o, "value", root, rest...)
}

// rootOf is the ARN of an account in the partition that the vendor is in.
func rootOf(account string) hclwrite.Tokens {
	return hclwrite.TokensForFunctionCall("join", hclwrite.TokensForValue(cty.StringVal(":")), list(
		hclwrite.TokensForValue(cty.StringVal("arn")), traversal("data", "aws_partition", "current", "partition"),
		hclwrite.TokensForValue(cty.StringVal("iam:")), hclwrite.TokensForValue(cty.StringVal(account)), hclwrite.TokensForValue(cty.StringVal("root"))))
}

// label makes part of a resource's name of a checked value; two values never share one.
func label(s string) string {
	var b []byte
	for _, c := range []byte(s) {
		if c >= 'a' && c <= 'z' || c >= '0' && c <= '9' {
			b = append(b, c)
		} else {
			b = fmt.Appendf(b, "_%02x", c)
		}
	}
	return string(b)
}
