// SPDX-License-Identifier: Apache-2.0

package controlplane_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"log/slog"
	"os"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/demarc-dev/demarc/api"
	boundaryv1 "github.com/demarc-dev/demarc/api/boundary/v1"
	"github.com/demarc-dev/demarc/daemon/controlplane"
	"github.com/demarc-dev/demarc/daemon/controlplane/book"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/identity"
)

// The two files of testdata were written by the build before bundles had numbers and certificates had issuers in the book:
// log-0.jsonl is its log of changes, snapshot-0 its snapshot after them.
const oldRoot = "d448c9824286b1d4f6995b41c315bcc79b2fb0b6299ab5707ef22629d3dfc3d4"

// replay applies the old log to a new book, after changing it.
func replay(t *testing.T, change ...string) *order {
	t.Helper()
	b, err := os.ReadFile("testdata/log-0.jsonl")
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i < len(change); i += 2 {
		if !bytes.Contains(b, []byte(change[i])) {
			t.Fatalf("the log has no %q", change[i])
		}
		b = bytes.ReplaceAll(b, []byte(change[i]), []byte(change[i+1]))
	}
	o := &order{book: book.NewBook()}
	for line := range bytes.Lines(b) {
		if _, err := o.Propose(t.Context(), bytes.TrimSpace(line)); err != nil {
			t.Fatalf("%s: %v", line, err)
		}
	}
	return o
}

// TestOldLogAndSnapshotLoad has this build read what an older one wrote: both files give the same page and the same audit log.
func TestOldLogAndSnapshotLoad(t *testing.T) {
	replayed := replay(t).book
	f, err := os.Open("testdata/snapshot-0")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	restored := book.NewBook()
	if err := restored.Restore(f); err != nil {
		t.Fatal(err)
	}
	one, err := json.Marshal(replayed.View())
	if err != nil {
		t.Fatal(err)
	}
	two, err := json.Marshal(restored.View())
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(one, two) {
		t.Errorf("the log gives\n%s\nand the snapshot\n%s", one, two)
	}
	for what, root := range map[string][32]byte{"log": replayed.Log().Root(), "snapshot": restored.Log().Root()} {
		if got := hex.EncodeToString(root[:]); got != oldRoot {
			t.Errorf("the audit log of the %s has the root %s, want that of the older build, %s", what, got, oldRoot)
		}
	}
	page := restored.View()
	if page.Bundle() != 1 || len(page.Slots) != 1 {
		t.Errorf("bundle %d of %d CAs, want the first", page.Bundle(), len(page.Slots))
	}
	for name, want := range map[fleet.ApplianceID]book.Appliance{
		"eu-1": {Status: book.Enrolled, Current: "serial-of-eu-1"},
		"eu-2": {Status: book.Enrolled, Current: "serial-of-eu-2", Next: "next-of-eu-2"},
		"eu-3": {Status: book.Registered},
	} {
		a, err := page.Appliance(name)
		if err != nil {
			t.Fatal(err)
		}
		if a.Status != want.Status || a.Current != want.Current || a.Next != want.Next || a.CurrentIssuer != "" || a.NextIssuer != "" || a.Bundle != 0 || a.UID != "" {
			t.Errorf("%s: %+v, want %+v", name, a, want)
		}
	}
	if missing := page.Missing([]string{"cp-1"}, page.Bundle(), start); len(missing) != 3 {
		t.Errorf("%d are missing the bundle, want the node and both enrolled appliances: none of them has acknowledged it", len(missing))
	}
}

// TestOldApplianceRenews has an appliance of the old log, whose certificate has no issuer on record, get its next one from
// a server of this build and use it.
func TestOldApplianceRenews(t *testing.T) {
	kek := make([]byte, 32)
	ca, err := identity.NewCA("acme.example", start, rand.Reader, identity.DefaultCALife)
	if err != nil {
		t.Fatal(err)
	}
	sealed, err := ca.SealKey(kek, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	base := base64.StdEncoding
	l := &line{order: *replay(t, base.EncodeToString([]byte("certificate of the CA")), base.EncodeToString(ca.Cert.Raw), base.EncodeToString([]byte("sealed key of the CA")), base.EncodeToString(sealed))}
	o := &l.order
	s, err := controlplane.NewServer(controlplane.Options{Name: "cp-1", Book: o.book, Consensus: l, KEK: kek, LeafLife: time.Hour, Now: func() time.Time { return start.Add(time.Hour) },
		Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	renew := func(name string, using fleet.Serial) error {
		t.Helper()
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		csr, err := identity.NewCSR(key, rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		p := fleet.PrincipalOf("acme.example", fleet.Appliance, name)
		res, err := s.Renew(api.With(t.Context(), api.Who{Class: api.Appliance, Principal: p, Serial: using}), connect.NewRequest(&boundaryv1.RenewRequest{Csr: csr}))
		if err == nil && (res.Msg.GetBundleNumber() != 1 || len(res.Msg.GetBundle()) != 1) {
			t.Errorf("%s: bundle %d of %d CAs, want the first", name, res.Msg.GetBundleNumber(), len(res.Msg.GetBundle()))
		}
		return err
	}
	issuer := o.book.View().Slots[0].ID()
	for _, name := range []string{"eu-1", "eu-2"} {
		using := fleet.Serial("serial-of-" + name)
		if err := s.Admit(fleet.PrincipalOf("acme.example", fleet.Appliance, name), using); err != nil {
			t.Fatal(err)
		}
		if err := renew(name, using); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		a, _ := o.book.View().Appliance(fleet.ApplianceID(name))
		if a.Current != using || a.CurrentIssuer != "" || a.Next == "" || a.Next == "next-of-eu-2" || a.NextIssuer != issuer {
			t.Fatalf("%+v", a)
		}
		if name == "eu-2" {
			break // it does not use it: its old certificate stays the current one
		}
		must(t, o, book.Edge{Name: "eu-1", Serial: a.Next, Online: true, Node: "cp-1", Route: "https"})
		if a, _ = o.book.View().Appliance("eu-1"); a.CurrentIssuer != issuer {
			t.Fatalf("%+v", a)
		}
		if err := renew("eu-1", using); fault.Of(err) != fault.Denied {
			t.Fatalf("the old certificate: %v, want %s", err, fault.Denied)
		}
	}
}
