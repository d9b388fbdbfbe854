// SPDX-License-Identifier: Apache-2.0

package privatelink_test

import (
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/hashicorp/hcl/v2/hclparse"
	"github.com/hashicorp/hcl/v2/hclsyntax"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/mesh/privatelink"
)

var update = flag.Bool("update", false, "write the golden files")

type writer interface{ Write() ([]byte, error) }

func vendor() privatelink.Vendor {
	return privatelink.Vendor{Name: "acme", VPC: "vpc-0123456789abcdef0", Subnets: []string{"subnet-0123456789abcdef0", "subnet-0123456789abcdef1"},
		Targets: []string{"10.0.0.1", "10.0.0.2", "10.0.0.3"}, Port: 7443, Customers: []string{"111122223333", "arn:aws:iam::444455556666:role/network/Admin"}}
}

func customer() privatelink.Customer {
	return privatelink.Customer{Name: "demarc", Service: "com.amazonaws.vpce.eu-central-1.vpce-svc-0123456789abcdef0", VPC: "vpc-0123456789abcdef0",
		Subnets: []string{"subnet-0123456789abcdef0"}, Group: "sg-0123456789abcdef0", Port: 7443}
}

// TestGolden: what is written is what was reviewed, and it parses. No Terraform ran over it: no provider is to be had offline.
func TestGolden(t *testing.T) {
	net := customer()
	net.Group, net.From = "", []string{"10.1.2.0/24", "10.1.3.0/24"}
	for name, w := range map[string]writer{"vendor": vendor(), "customer-group": customer(), "customer-network": net} {
		t.Run(name, func(t *testing.T) {
			got, err := w.Write()
			if err != nil {
				t.Fatal(err)
			}
			if _, diag := hclparse.NewParser().ParseHCL(got, name+".tf"); diag.HasErrors() {
				t.Fatal(diag)
			}
			file := filepath.Join("testdata", name+".tf")
			if *update {
				if err := os.WriteFile(file, got, 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(file)
			if err != nil || string(got) != string(want) {
				t.Errorf("it differs from %s (%v): run go test ./mesh/privatelink -update and review\n%s", file, err, got)
			}
		})
	}
}

// TestWhatMatters reads the written files for what keeps others out.
func TestWhatMatters(t *testing.T) {
	blocks := func(w writer) map[string]*hclsyntax.Body {
		t.Helper()
		b, err := w.Write()
		if err != nil {
			t.Fatal(err)
		}
		f, diag := hclparse.NewParser().ParseHCL(b, "x.tf")
		if diag.HasErrors() {
			t.Fatal(diag)
		}
		out := map[string]*hclsyntax.Body{}
		for _, b := range f.Body.(*hclsyntax.Body).Blocks {
			key := b.Type + " " + strings.Join(b.Labels, " ")
			if out[key] != nil {
				t.Fatalf("%s is written twice", key)
			}
			out[key] = b.Body
		}
		return out
	}
	value := func(b *hclsyntax.Body, key string) string {
		t.Helper()
		if b == nil || b.Attributes[key] == nil {
			t.Fatalf("no %s", key)
		}
		v, diag := b.Attributes[key].Expr.Value(nil)
		if diag.HasErrors() {
			t.Fatal(diag)
		}
		return v.GoString()
	}
	v, c := blocks(vendor()), blocks(customer())
	if got := value(v["resource aws_vpc_endpoint_service demarc"], "acceptance_required"); got != "cty.True" {
		t.Errorf("acceptance_required = %s", got)
	}
	for key, want := range map[string]string{"listener": "aws_lb_listener demarc", "target group": "aws_lb_target_group demarc"} {
		if got := value(v["resource "+want], "protocol"); got != `cty.StringVal("TCP")` {
			t.Errorf("%s: protocol = %s: TLS must end in the control plane", key, got)
		}
	}
	in := c["resource aws_vpc_security_group_ingress_rule appliance"]
	if value(in, "referenced_security_group_id") != `cty.StringVal("sg-0123456789abcdef0")` || value(in, "from_port") != "cty.NumberIntVal(7443)" || value(in, "to_port") != "cty.NumberIntVal(7443)" {
		t.Error("the endpoint is open to others than the appliance")
	}
	for key := range c {
		if strings.Contains(key, "egress") {
			t.Errorf("%s: the endpoint calls nobody", key)
		}
	}
}

// TestRefused: nothing that is not what it claims to be is written, least of all HCL.
func TestRefused(t *testing.T) {
	inject := []string{"", "x\"\n}\nresource \"a\" \"b\" {", "${file(\"/etc/passwd\")}", "%{ if true }", "vpc-0123456789abcdef0\n", "vpc-XYZ", "a b", strings.Repeat("a", 1000), "\x00", "vpc-0123456789abcdef0 "}
	for _, s := range inject {
		for name, w := range map[string]writer{
			"vendor.name":      func() writer { v := vendor(); v.Name = s; return v }(),
			"vendor.vpc":       func() writer { v := vendor(); v.VPC = s; return v }(),
			"vendor.subnet":    func() writer { v := vendor(); v.Subnets = []string{s}; return v }(),
			"vendor.target":    func() writer { v := vendor(); v.Targets = []string{s}; return v }(),
			"vendor.customer":  func() writer { v := vendor(); v.Customers = []string{s}; return v }(),
			"customer.name":    func() writer { c := customer(); c.Name = s; return c }(),
			"customer.service": func() writer { c := customer(); c.Service = s; return c }(),
			"customer.vpc":     func() writer { c := customer(); c.VPC = s; return c }(),
			"customer.subnet":  func() writer { c := customer(); c.Subnets = []string{s}; return c }(),
			"customer.group":   func() writer { c := customer(); c.Group = s; return c }(),
			"customer.from":    func() writer { c := customer(); c.Group, c.From = "", []string{s}; return c }(),
		} {
			if len(s) > 0 && s == "vpc-0123456789abcdef0" && strings.HasSuffix(name, ".vpc") {
				continue
			}
			if b, err := w.Write(); fault.Of(err) != fault.Invalid || b != nil {
				t.Errorf("%s = %.40q: %v, want invalid and nothing written", name, s, err)
			}
		}
	}
	for name, w := range map[string]writer{
		"port":              func() writer { v := vendor(); v.Port = 0; return v }(),
		"twice":             func() writer { v := vendor(); v.Customers = []string{"111122223333", "111122223333"}; return v }(),
		"anyone":            func() writer { v := vendor(); v.Customers = []string{"*"}; return v }(),
		"short account":     func() writer { v := vendor(); v.Customers = []string{"11112222333"}; return v }(),
		"none":              func() writer { v := vendor(); v.Customers = nil; return v }(),
		"too many":          func() writer { v := vendor(); v.Subnets = make([]string, 257); return v }(),
		"loopback":          func() writer { v := vendor(); v.Targets = []string{"127.0.0.1"}; return v }(),
		"the whole world":   func() writer { c := customer(); c.Group, c.From = "", []string{"0.0.0.0/0"}; return c }(),
		"not masked":        func() writer { c := customer(); c.Group, c.From = "", []string{"10.0.0.1/24"}; return c }(),
		"group and network": func() writer { c := customer(); c.From = []string{"10.0.0.0/24"}; return c }(),
		"foreign service":   func() writer { c := customer(); c.Service = "com.amazonaws.eu-central-1.s3"; return c }(),
	} {
		if b, err := w.Write(); fault.Of(err) != fault.Invalid || b != nil {
			t.Errorf("%s: %v, want invalid", name, err)
		}
	}
}
