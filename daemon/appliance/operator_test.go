// SPDX-License-Identifier: Apache-2.0

package appliance_test

import (
	"crypto"
	"crypto/ed25519"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/demarc-dev/demarc/configs"
	"github.com/demarc-dev/demarc/daemon/appliance"
	"github.com/demarc-dev/demarc/daemon/appliance/book"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/grant"
	"github.com/demarc-dev/demarc/operation"
	"github.com/demarc-dev/demarc/seal"
)

const theBen = `forbid (principal == Vendor::"spiffe://acme.example/operator/ben", action, resource);`

// TestWhoAsksIsTheFilesWord (FAULTS.md A13, J9; MUTANTS.md orders.go:164 and 223): an operator asks in the name that the
// customer's file gives to the key, and a deny of that name can't be passed by under another one.
func TestWhoAsksIsTheFilesWord(t *testing.T) {
	named := func(name string) func(*operation.Request, time.Time) {
		return func(r *operation.Request, _ time.Time) {
			r.Operator = fleet.PrincipalOf("acme.example", fleet.Operator, name)
		}
	}
	nothing := func(*operation.Request, time.Time) {}
	for _, c := range []struct {
		name string
		edit func(*operation.Request, time.Time)
		by   []crypto.Signer
		want string // "" where it waits for the customer
	}{
		{"ann asks", nothing, []crypto.Signer{ann}, ""},
		{"ben is denied", named("ben"), []crypto.Signer{ben}, "forbidden by no-ben"},
		{"ben says that ann asks", nothing, []crypto.Signer{ben}, "in their own name"},
		{"ann says that ben asks", named("ben"), []crypto.Signer{ann}, "in their own name"},
		{"somebody whom the file does not name", named("eve"), []crypto.Signer{ann}, "in their own name"},
		{"ann of another trust domain", func(r *operation.Request, _ time.Time) {
			r.Operator = fleet.PrincipalOf("enemy.example", fleet.Operator, "ann")
		}, []crypto.Signer{ann}, "in their own name"},
		{"ann's name on a node", func(r *operation.Request, _ time.Time) {
			r.Operator = fleet.PrincipalOf("acme.example", fleet.Node, "ann")
		}, []crypto.Signer{ann}, "in their own name"},
		{"signed by both, ann asks", nothing, []crypto.Signer{ben, ann}, ""},
		{"signed by both, ben asks", named("ben"), []crypto.Signer{ben, ann}, "forbidden by no-ben"},
		{"a key that signs releases", nothing, []crypto.Signer{vendor}, "not signed by any"},
		{"a key of nobody", nothing, []crypto.Signer{thief}, "not signed by any"},
		{"the customer's key", nothing, []crypto.Signer{customer}, "not signed by any"},
		{"dated a minute ahead", func(r *operation.Request, now time.Time) { r.At = now.Add(time.Minute) }, []crypto.Signer{ann}, ""},
		{"dated an hour ahead", func(r *operation.Request, now time.Time) { r.At, r.NotAfter = now.Add(time.Hour), now.Add(2*time.Hour) },
			[]crypto.Signer{ann}, "dated"},
		{"dated a hundred years ahead", func(r *operation.Request, now time.Time) {
			r.At, r.NotAfter = now.AddDate(100, 0, 0), now.AddDate(100, 0, 1)
		}, []crypto.Signer{ann}, "days from now"},
		{"good for a hundred years", func(r *operation.Request, now time.Time) { r.NotAfter = now.AddDate(100, 0, 0) }, []crypto.Signer{ann},
			"90 days"},
		{"out of time", func(r *operation.Request, now time.Time) {
			r.At, r.NotAfter = now.Add(-2*time.Hour), now.Add(-time.Hour)
		}, []crypto.Signer{ann}, "was good until"},
	} {
		o := deployed(t)
		must(t, o, consent(t, granted(fleet.OperateRead, 0), customer))
		must(t, o, consent(t, grant.Deny{Appliance: "eu-1", Name: "no-ben", Cedar: theBen, At: start, Nonce: nonce()}, customer))
		r, err := seal.Peek[operation.Request](o.request(t, "op-1"))
		if err != nil {
			t.Fatal(err)
		}
		c.edit(&r, o.now())
		signed, err := seal.Seal(r, c.by...)
		if err != nil {
			t.Fatal(err)
		}
		why := take(t, o, book.Take{Operation: signed})
		want := operation.Requested
		if c.want != "" {
			want = operation.Rejected
		}
		if (why == "") != (c.want == "") || !strings.Contains(why, c.want) || o.state(t, "op-1") != want {
			t.Errorf("%s: %q, %s; want %q", c.name, why, o.state(t, "op-1"), c.want)
		}
	}
}

// site is what the file of newBook says, with an edit.
func site(t *testing.T, edit func(*book.Site)) book.SetSite {
	s := book.Site{TrustDomain: "acme.example", Runtime: fleet.RuntimeProcess, ReleaseKeys: [][]byte{pem(t, vendor)},
		Operators: []book.Operator{{Name: "ann", Keys: [][]byte{pem(t, ann)}}, {Name: "ben", Keys: [][]byte{pem(t, ben)}}}}
	edit(&s)
	return book.SetSite{Site: s}
}

// TestAnOperatorWhoIsNamedNoMore: what was asked by somebody whom the file does not name any more does not begin.
func TestAnOperatorWhoIsNamedNoMore(t *testing.T) {
	o := deployed(t)
	must(t, o, consent(t, granted(fleet.OperateRead, 0), customer))
	for _, id := range []string{"op-1", "op-2"} {
		take(t, o, book.Take{Operation: o.request(t, id)})
	}
	must(t, o, o.approve(t, "op-1"))
	must(t, o, site(t, func(s *book.Site) { s.Operators = s.Operators[1:] }))
	if s := must(t, o, book.Start{ID: "op-1"}); s != operation.Cancelled {
		t.Errorf("op-1 is %s", s)
	}
	refused(t, o, fault.Denied, o.approve(t, "op-2"))
}

// TestAKeySpeaksForOne (FAULTS.md A13; MUTANTS.md orders.go:82): no key signs releases and requests, or for two people, or for
// the vendor and the customer.
func TestAKeySpeaksForOne(t *testing.T) {
	o := newBook(t)
	must(t, o, site(t, func(*book.Site) {}))
	spaced := append([]byte("\n"), pem(t, vendor)...) // another file, the same key
	for name, edit := range map[string]func(*book.Site){
		"releases and requests":           func(s *book.Site) { s.Operators[0].Keys = [][]byte{pem(t, vendor)} },
		"the same, in another file":       func(s *book.Site) { s.Operators[0].Keys = [][]byte{pem(t, ann), spaced} },
		"two people":                      func(s *book.Site) { s.Operators[1].Keys = [][]byte{pem(t, ann)} },
		"twice for releases":              func(s *book.Site) { s.ReleaseKeys = append(s.ReleaseKeys, spaced) },
		"a person named twice":            func(s *book.Site) { s.Operators[1].Name = "ann" },
		"a person without a key":          func(s *book.Site) { s.Operators[1].Keys = nil },
		"no name":                         func(s *book.Site) { s.Operators[1].Name = "" },
		"a name that is a whole identity": func(s *book.Site) { s.Operators[1].Name = "spiffe://acme.example/operator/ben" },
		"no key":                          func(s *book.Site) { s.Operators[1].Keys = [][]byte{[]byte("x")} },
	} {
		if _, err := put(t, o, site(t, edit)); !errors.Is(err, fault.Invalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	refused(t, o, fault.Denied, book.Pin{Public: pem(t, vendor)})
	refused(t, o, fault.Denied, book.Pin{Public: pem(t, ann)})
	must(t, o, book.Pin{Public: pem(t, customer)})
	refused(t, o, fault.Denied, site(t, func(s *book.Site) { s.Operators[0].Keys = [][]byte{pem(t, customer)} }))
	refused(t, o, fault.Denied, site(t, func(s *book.Site) { s.ReleaseKeys = [][]byte{pem(t, customer)} }))
	if why := take(t, o, book.Take{Release: sealed(t, release(t, "1.0.0"), ann)}); why == "" || len(o.book.View().Offers) != 0 {
		t.Error("a release that an operator signed is on offer")
	}
}

// TestCheckReadsTheVendorsKeys: demarcd check finds what demarcd run would refuse.
func TestCheckReadsTheVendorsKeys(t *testing.T) {
	dir := t.TempDir()
	file := func(name string, k ed25519.PrivateKey) string {
		p := filepath.Join(dir, name)
		if err := os.WriteFile(p, pem(t, k), 0o600); err != nil {
			t.Fatal(err)
		}
		return p
	}
	cfg := &configs.Appliance{TrustDomain: "acme.example", ControlPlane: configs.Vendor{ReleaseKeys: []string{file("release.pub", vendor)},
		Operators: []configs.Operator{{Name: "ann", Keys: []string{file("ann.pub", ann)}}}}}
	if err := appliance.Check(cfg); err != nil {
		t.Fatal(err)
	}
	cfg.ControlPlane.Operators[0].Keys[0] = file("copy.pub", vendor)
	if err := appliance.Check(cfg); !errors.Is(err, fault.Invalid) || !strings.Contains(fault.Text(err), "one key speaks for one") {
		t.Errorf("%v", err)
	}
	cfg.ControlPlane.Operators[0].Keys[0] = filepath.Join(dir, "none.pub")
	if err := appliance.Check(cfg); !errors.Is(err, fault.Invalid) {
		t.Errorf("%v", err)
	}
}
