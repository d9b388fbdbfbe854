// SPDX-License-Identifier: Apache-2.0

package vendor

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	controlv1 "github.com/demarc-dev/demarc/api/control/v1"
	"github.com/demarc-dev/demarc/identity"
	"github.com/demarc-dev/demarc/identity/identitytest"
)

// TestRegistrationNamesTheFlag: what is wrong with a registration is said about the flag that was typed, not about a field
// of a document that nobody saw.
func TestRegistrationNamesTheFlag(t *testing.T) {
	i, err := identitytest.NewIssuer("https://cluster.example")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	file := func(name string, b []byte) string {
		p := filepath.Join(dir, name)
		if err := os.WriteFile(p, b, 0o600); err != nil {
			t.Fatal(err)
		}
		return p
	}
	jwks := file("keys.json", i.JWKS())
	kube := func(change func(x *expectFlags)) expectFlags {
		x := expectFlags{jwks: jwks, e: identity.Expect{Issuer: i.URL, Namespace: "demarc", ServiceAccount: "appliance"}}
		change(&x)
		return x
	}
	aws := func(change func(x *expectFlags)) expectFlags {
		x := expectFlags{e: identity.Expect{Account: "123456789012", RoleARN: "arn:aws:iam::123456789012:role/appliance"}}
		change(&x)
		return x
	}
	gcp := func(change func(x *expectFlags)) expectFlags {
		x := expectFlags{e: identity.Expect{Project: "acme-prod", ServiceAccount: "appliance@acme-prod.iam.gserviceaccount.com"}}
		change(&x)
		return x
	}
	for flag, x := range map[string]expectFlags{
		"--kubernetes-issuer":    kube(func(x *expectFlags) { x.e.Issuer = strings.Repeat("x", 600) }),
		"--kubernetes-issuer ":   aws(func(x *expectFlags) { x.e.Issuer = "x" }),
		"--namespace":            kube(func(x *expectFlags) { x.e.Namespace = "" }),
		"--namespace ":           aws(func(x *expectFlags) { x.e.Namespace = "x" }),
		"--service-account":      kube(func(x *expectFlags) { x.e.ServiceAccount = "A" }),
		"--jwks":                 kube(func(x *expectFlags) { x.jwks = file("none.json", []byte(`{"keys":[]}`)) }),
		"--discovery":            kube(func(x *expectFlags) { x.e.Discovery = true }),
		"--aws-account":          aws(func(x *expectFlags) { x.e.Account = "1" }),
		"--aws-role-arn":         aws(func(x *expectFlags) { x.e.RoleARN = "x" }),
		"--aws-role-arn ":        aws(func(x *expectFlags) { x.e.Account = "210987654321" }),
		"--aws-region":           aws(func(x *expectFlags) { x.e.Regions = []string{"mars-1"} }),
		"--gcp-project":          gcp(func(x *expectFlags) { x.e.Project = "A" }),
		"--gcp-service-account":  gcp(func(x *expectFlags) { x.e.ServiceAccount = "x" }),
		"--gcp-unique-id":        gcp(func(x *expectFlags) { x.e.UniqueID = "x" }),
		"--gcp-zone":             gcp(func(x *expectFlags) { x.e.Zone = "x y" }),
		"--gcp-instance":         gcp(func(x *expectFlags) { x.e.Instance = "A" }),
		"--gcp-zone ":            aws(func(x *expectFlags) { x.e.Zone = "europe-west3-a" }),
		"--gcp-unique-id ":       aws(func(x *expectFlags) { x.e.UniqueID = "1" }),
		"--aws-region ":          gcp(func(x *expectFlags) { x.e.Regions = []string{"eu-central-1"} }),
		"--gcp-service-account ": aws(func(x *expectFlags) { x.e.ServiceAccount = "x" }),
	} {
		_, err := x.compose()
		if err == nil {
			t.Errorf("%s: taken", flag)
			continue
		}
		if text := err.Error(); !strings.Contains(text, strings.TrimSpace(flag)) || strings.Contains(text, "role_arn") ||
			strings.Contains(text, "unique_id") || strings.Contains(text, "service_account") {
			t.Errorf("%s: %s", flag, text)
		}
	}
}

// TestShowKeys shows which keys are pinned, which count and which wait, and how the latter are confirmed.
func TestShowKeys(t *testing.T) {
	i, err := identitytest.NewIssuer("https://cluster.example")
	if err != nil {
		t.Fatal(err)
	}
	e, err := json.Marshal(i.Expect("demarc", "appliance"))
	if err != nil {
		t.Fatal(err)
	}
	s, err := describe("eu-1", &controlv1.GetExpectResponse{Expect: e, Reported: i.JWKS(), Digest: "sha256:0f"})
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	s.print(&b)
	for _, want := range []string{"pinned\trsa-1\tthumbprint " + s.Pinned[0].Thumbprint,
		"reported\tec-1\tthumbprint " + s.Pinned[1].Thumbprint, "expect eu-1 --confirm-keys sha256:0f", `"service_account":"appliance"`} {
		if !strings.Contains(b.String(), want) {
			t.Errorf("no %q in\n%s", want, b.String())
		}
	}
	if strings.Contains(b.String(), "in use") || len(s.Pinned[0].Thumbprint) != 43 || s.Pinned[0].Thumbprint == s.Pinned[1].Thumbprint {
		t.Errorf("%s", b.String())
	}
}
