// SPDX-License-Identifier: Apache-2.0

package setup

import (
	"net/netip"
	"strconv"

	"github.com/hashicorp/hcl/v2"
	"github.com/hashicorp/hcl/v2/hclsyntax"
	"github.com/hashicorp/hcl/v2/hclwrite"
	"github.com/zclconf/go-cty/cty"
)

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
	say(b, "Vendor's side of the transport privatelink: customers' appliances reach the control plane without the public network.")
	say(b, "A network load balancer carries TCP; TLS runs from the appliance to the node. Its idle timeout is 350 s: a channel says "+
		"something more often.")
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

	var principals []string
	for _, a := range in.accounts {
		principals = append(principals, "arn:"+in.partition+":iam::"+a+":root")
	}
	b.AppendNewline()
	say(b, "These accounts may ask for an endpoint, and each request waits until you accept it. It opens a path for bytes, and proves nobody.")
	es := b.AppendNewBlock("resource", []string{"aws_vpc_endpoint_service", in.name}).Body()
	es.SetAttributeValue("acceptance_required", cty.True)
	es.SetAttributeRaw("network_load_balancer_arns", list(path("aws_lb", in.name, "arn")))
	es.SetAttributeValue("allowed_principals", words(principals))

	out := block(b, "output", "service_name")
	text(out, "description", "Tell it your customers: demarc mesh privatelink --side customer --service NAME")
	refer(out, "value", "aws_vpc_endpoint_service", in.name, "service_name")
}

func (in *linkOptions) customerSide(b *hclwrite.Body) {
	say(b,
		"Customer's side of the transport privatelink: one endpoint that the appliance reaches, and nothing else. Nothing comes in from the "+
			"vendor.")
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
	text(out, "description",
		"For the appliance's file, with :"+strconv.Itoa(int(in.port))+" after it: transports, kind privatelink, addresses")
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

func text(b *hclwrite.Body, key, v string) { b.SetAttributeValue(key, cty.StringVal(v)) }

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
