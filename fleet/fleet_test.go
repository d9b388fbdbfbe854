// SPDX-License-Identifier: Apache-2.0

package fleet_test

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
)

func TestPrincipal(t *testing.T) {
	p := fleet.PrincipalOf("acme.example", fleet.Appliance, "eu-1")
	td, r, id, ok := p.Split()
	if !ok || td != "acme.example" || r != fleet.Appliance || id != "eu-1" {
		t.Fatalf("Split(%q) = %q %q %q %v", p, td, r, id, ok)
	}
	for _, bad := range []fleet.Principal{"", "local", "spiffe://acme.example", "spiffe:///node/a", "spiffe://a/node/", "spiffe://a/node/b/c",
		"spiffe://a/root/b", "spiffe://a/node/B", "https://a/node/b", "spiffe://a/node/b?x"} {
		if _, _, _, ok := bad.Split(); ok {
			t.Errorf("Split(%q) is accepted", bad)
		}
	}
}

func TestNames(t *testing.T) {
	for s, want := range map[string]bool{"a": true, "a-b": true, "0": true, strings.Repeat("a", 63): true,
		"": false, "-a": false, "a-": false, "A": false, "a.b": false, "a/b": false, "a\n": false, strings.Repeat("a", 64): false} {
		if got := fleet.CheckName("customer", s) == nil; got != want {
			t.Errorf("CheckName(%q) = %v, want %v", s, got, want)
		}
	}
}

func TestDigest(t *testing.T) {
	d := fleet.DigestOf([]byte("x"))
	if err := d.Check(); err != nil {
		t.Error(err)
	}
	for _, bad := range []fleet.Digest{"", "sha256:", d[:70], d + "0", "sha512:" + d[7:], fleet.Digest(strings.ToUpper(string(d)))} {
		if bad.Check() == nil {
			t.Errorf("%q is accepted", bad)
		}
	}
}

func TestPosture(t *testing.T) {
	n := []netip.Prefix{netip.MustParsePrefix("127.0.0.2/32")}
	for name, tc := range map[string]struct {
		p  fleet.Posture
		ok bool
	}{
		"closed":          {fleet.Posture{Exposure: fleet.Closed}, true},
		"public":          {fleet.Posture{Exposure: fleet.Public}, true},
		"allowlist":       {fleet.Posture{Exposure: fleet.Allowlist, Allow: n}, true},
		"empty allowlist": {fleet.Posture{Exposure: fleet.Allowlist}, false},
		"public with net": {fleet.Posture{Exposure: fleet.Public, Allow: n}, false},
		"unmasked":        {fleet.Posture{Exposure: fleet.Allowlist, Allow: []netip.Prefix{netip.MustParsePrefix("10.1.2.3/8")}}, false},
		"nothing":         {fleet.Posture{}, false},
	} {
		if got := tc.p.Check() == nil; got != tc.ok {
			t.Errorf("%s: Check ok = %v, want %v", name, got, tc.ok)
		}
	}
	if !fleet.Closed.Narrower(fleet.Private) || fleet.Public.Narrower(fleet.Allowlist) {
		t.Error("the order of exposures is wrong")
	}
}

func TestRanks(t *testing.T) {
	all := fleet.Ranks()
	for i, have := range all {
		if err := have.Check(); err != nil {
			t.Error(err)
		}
		for j, need := range all {
			if got, want := have.Covers(need), i >= j; got != want {
				t.Errorf("%s covers %s: %v, want %v", have, need, got, want)
			}
		}
		if have.Covers("") || have.Covers("root") || fleet.Rank("").Covers(have) || fleet.Rank("root").Covers(have) {
			t.Errorf("%s: a rank outside of the set covers, or is covered", have)
		}
	}
	if err := fleet.Rank("root").Check(); fault.Of(err) != fault.Invalid {
		t.Errorf("%v, want %s", err, fault.Invalid)
	}
}
