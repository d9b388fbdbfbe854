// SPDX-License-Identifier: Apache-2.0

package credentials

import (
	"crypto/rand"
	"crypto/x509"
	"path/filepath"
	"testing"
	"time"

	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/identity"
)

// TestANewBundleFileCountsUntilTheFirstEnrolment: a wallet that holds a pending key and no certificate yet does not keep the
// CAs of an older file.
func TestANewBundleFileCountsUntilTheFirstEnrolment(t *testing.T) {
	path := filepath.Join(t.TempDir(), "wallet.json")
	cas := [2]*identity.Authority{}
	for i := range cas {
		ca, err := identity.NewCA(testDomain, time.Now(), rand.Reader, time.Hour)
		if err != nil {
			t.Fatal(err)
		}
		cas[i] = ca
	}
	open := func(ca *identity.Authority) *Store {
		t.Helper()
		w, _, err := Open(path, testDomain, []*x509.Certificate{ca.Cert}, nil, time.Now)
		if err != nil {
			t.Fatal(err)
		}
		return w
	}
	trusts := func(w *Store, ca *identity.Authority) bool {
		_, err := ca.Cert.Verify(x509.VerifyOptions{Roots: w.Roots(), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}})
		return err == nil
	}
	w := open(cas[0])
	key, request, err := w.PendingKey() // it asked, and no certificate came
	if err != nil {
		t.Fatal(err)
	}
	w = open(cas[1])
	if trusts(w, cas[0]) || !trusts(w, cas[1]) {
		t.Fatal("it trusts the CAs of the file that was replaced")
	}
	csr, err := identity.ParseCSR(request)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := cas[1].Issue(csr, fleet.PrincipalOf(testDomain, fleet.Appliance, "eu-1"), time.Now(), time.Hour,
		identity.IssueOptions{Rand: rand.Reader})
	if err != nil {
		t.Fatal(err)
	}
	if err := w.StoreCertificate(key, leaf.Raw, [][]byte{cas[1].Cert.Raw}, 2); err != nil {
		t.Fatal(err)
	}
	if w = open(cas[0]); trusts(w, cas[0]) || !trusts(w, cas[1]) {
		t.Error("after the first enrolment a file takes the place of what the vendor signed")
	}
}

// TestClockIsMeasured keeps what was measured, also where it is too little to act on.
func TestClockIsMeasured(t *testing.T) {
	host := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	ca, err := identity.NewCA(testDomain, host, rand.Reader, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	w, _, err := Open(filepath.Join(t.TempDir(), "wallet.json"), testDomain, []*x509.Certificate{ca.Cert}, nil,
		func() time.Time { return host })
	if err != nil {
		t.Fatal(err)
	}
	if w.ClockOffset() != nil {
		t.Error("measured before anybody was heard")
	}
	for _, off := range []time.Duration{3 * time.Second, -10 * time.Hour, 4 * time.Minute} {
		w.SetTime(host.Add(off))
		if got := w.ClockOffset(); got == nil || *got != off {
			t.Errorf("measured %v, want %s", got, off)
		}
	}
	if !w.Now().Equal(host) {
		t.Errorf("four minutes are acted on: %s", w.Now())
	}
}
