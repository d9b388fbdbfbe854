// SPDX-License-Identifier: Apache-2.0

package setup

import (
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/hashicorp/hcl/v2"
	"github.com/hashicorp/hcl/v2/hclsyntax"

	"github.com/demarc-dev/demarc/cmd/demarc/cli"
)

func vendorLink() linkOptions {
	return linkOptions{side: sideVendor, name: "acme", vpc: "vpc-0a1b2c3d", subnets: []string{"subnet-0a1b2c3d", "subnet-0a1b2c3e"},
		port:     7443,
		accounts: []string{"210987654321"}, targets: []string{"10.0.1.10", "10.0.2.10", "10.0.3.10"}, partition: "aws"}
}

func customerLink() linkOptions {
	return linkOptions{side: sideCustomer, name: "acme", vpc: "vpc-0d3c2b1a", subnets: []string{"subnet-0d3c2b1a"}, port: 7443,
		service: "com.amazonaws.vpce.eu-central-1.vpce-svc-0123456789abcdef0", groups: []string{"sg-0123456789abcdef0"},
		cidrs: []string{"10.1.2.3/32", "fd00::/64"}, partition: "aws"}
}

// TestPrivateLinkHoldsTogether reads the files as Terraform does: they parse, and all that one resource says of another is there.
func TestPrivateLinkHoldsTogether(t *testing.T) {
	for _, in := range []linkOptions{vendorLink(), customerLink()} {
		b, err := in.terraform()
		if err != nil {
			t.Fatal(err)
		}
		f, diags := hclsyntax.ParseConfig(b, in.side+".tf", hcl.InitialPos)
		if diags.HasErrors() {
			t.Fatalf("%v\n%s", diags, b)
		}
		there := map[string]bool{"each": true}
		var used []hcl.Traversal
		for _, bl := range f.Body.(*hclsyntax.Body).Blocks {
			if bl.Type == "resource" {
				there[strings.Join(bl.Labels, ".")] = true
			}
			used = append(used, variables(bl.Body)...)
		}
		for _, v := range used {
			name := v.RootName()
			if name != "each" {
				name += "." + v[1].(hcl.TraverseAttr).Name
			}
			if !there[name] {
				t.Errorf("%s: %s is used and not there", in.side, name)
			}
		}
		if len(used) < 3 {
			t.Errorf("%s: only %d references were seen", in.side, len(used))
		}
	}
}

func variables(b *hclsyntax.Body) (out []hcl.Traversal) {
	for _, a := range b.Attributes {
		out = append(out, a.Expr.Variables()...)
	}
	for _, bl := range b.Blocks {
		out = append(out, variables(bl.Body)...)
	}
	return out
}

// TestPrivateLinkRefuses: what is not of the one form is not written, whatever it would do in the file.
func TestPrivateLinkRefuses(t *testing.T) {
	for name, tc := range map[string]struct {
		of     linkOptions
		change func(*linkOptions)
	}{
		"no side":             {vendorLink(), func(l *linkOptions) { l.side = "" }},
		"a quote in the name": {vendorLink(), func(l *linkOptions) { l.name = `a" {}` }},
		"a template":          {vendorLink(), func(l *linkOptions) { l.vpc = "vpc-${file(\"/etc/passwd\")}" }},
		"a line end":          {vendorLink(), func(l *linkOptions) { l.accounts = []string{"210987654321\n"} }},
		"a short account":     {vendorLink(), func(l *linkOptions) { l.accounts = []string{"21098765432"} }},
		"everybody's account": {vendorLink(), func(l *linkOptions) { l.accounts = []string{"*"} }},
		"an account twice":    {vendorLink(), func(l *linkOptions) { l.accounts = []string{"210987654321", "210987654321"} }},
		"no account":          {vendorLink(), func(l *linkOptions) { l.accounts = nil }},
		"no target":           {vendorLink(), func(l *linkOptions) { l.targets = nil }},
		"a loopback target":   {vendorLink(), func(l *linkOptions) { l.targets = []string{"127.0.0.1"} }},
		"the other's flag":    {vendorLink(), func(l *linkOptions) { l.cidrs = []string{"10.0.0.0/8"} }},
		"another partition":   {vendorLink(), func(l *linkOptions) { l.partition = "aws-x" }},
		"no port":             {vendorLink(), func(l *linkOptions) { l.port = 0 }},
		"no subnet":           {customerLink(), func(l *linkOptions) { l.subnets = nil }},
		"another's service":   {customerLink(), func(l *linkOptions) { l.service = "com.amazonaws.eu-central-1.s3" }},
		"the whole internet":  {customerLink(), func(l *linkOptions) { l.cidrs = []string{"0.0.0.0/0"} }},
		"a host in a network": {customerLink(), func(l *linkOptions) { l.cidrs = []string{"10.1.2.3/8"} }},
		"nobody let in":       {customerLink(), func(l *linkOptions) { l.cidrs, l.groups = nil, nil }},
		"a target":            {customerLink(), func(l *linkOptions) { l.targets = []string{"10.0.1.10"} }},
		"too many": {customerLink(), func(l *linkOptions) {
			l.cidrs = slices.Repeat([]string{"10.1.2.3/32"}, maxLinks+1)
		}},
	} {
		tc.change(&tc.of)
		if b, err := tc.of.terraform(); !errors.Is(err, cli.ErrUsage) {
			t.Errorf("%s: %v\n%s", name, err, b)
		}
	}
}
