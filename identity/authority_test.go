// SPDX-License-Identifier: Apache-2.0

package identity_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"net/netip"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/identity"
)

func parsedCSR(t testing.TB) *x509.CertificateRequest {
	t.Helper()
	csr, err := identity.ParseCSR(newCSR(t))
	if err != nil {
		t.Fatal(err)
	}
	return csr
}

func TestIssue(t *testing.T) {
	ca := newCA(t, td)
	// A request that asks for everything gets its key certified, and nothing else.
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{
		Subject: pkix.Name{CommonName: "root"}, DNSNames: []string{"cp.acme.example"}, URIs: uris(t, "spiffe://"+td+"/node/n1"),
	}, key)
	if err != nil {
		t.Fatal(err)
	}
	greedy, err := identity.ParseCSR(der)
	if err != nil {
		t.Fatal(err)
	}
	who := fleet.PrincipalOf(td, fleet.Appliance, "eu-1")
	c, err := ca.Issue(greedy, who, now, 30*24*time.Hour, identity.IssueOptions{Rand: rand.Reader})
	if err != nil {
		t.Fatal(err)
	}
	if len(c.DNSNames) != 0 || len(c.URIs) != 1 || c.URIs[0].String() != string(who) || c.Subject.CommonName != "eu-1" || c.IsCA ||
		len(c.ExtKeyUsage) != 1 || c.ExtKeyUsage[0] != x509.ExtKeyUsageClientAuth || !key.Public().(ed25519.PublicKey).Equal(c.PublicKey) {
		t.Errorf("the leaf is %v %v %v", c.Subject, c.URIs, c.ExtKeyUsage)
	}
	if !c.NotBefore.Equal(now.Add(-identity.DefaultBackdate)) || !c.NotAfter.Equal(now.Add(30*24*time.Hour)) {
		t.Errorf("valid from %s to %s", c.NotBefore, c.NotAfter)
	}
	if at := identity.RenewFrom(c, identity.DefaultBackdate); !at.Equal(now.Add(15 * 24 * time.Hour)) {
		t.Errorf("renewed from %s", at)
	}
	// At the end of the CA's life the leaf ends with it.
	late := ca.Cert.NotAfter.Add(-time.Hour)
	node, err := ca.Issue(parsedCSR(t), fleet.PrincipalOf(td, fleet.Node, "n1"), late, 24*time.Hour,
		identity.IssueOptions{Rand: rand.Reader, DNSNames: []string{"cp.acme.example"},
			IPs: []netip.Addr{netip.MustParseAddr("127.0.0.1"), netip.MustParseAddr("::1")}})
	if err != nil {
		t.Fatal(err)
	}
	if !node.NotAfter.Equal(ca.Cert.NotAfter) || len(node.IPAddresses) != 2 || len(node.ExtKeyUsage) != 2 {
		t.Errorf("node leaf: ends %s, %v, %v", node.NotAfter, node.IPAddresses, node.ExtKeyUsage)
	}
	if s := identity.SerialOf(node); len(s) != 32+1+32 || s == identity.SerialOf(c) {
		t.Errorf("serial %q", s)
	}

	rnd := identity.IssueOptions{Rand: rand.Reader}
	tampered := parsedCSR(t)
	tampered.PublicKey = greedy.PublicKey
	for name, tc := range map[string]struct {
		csr  *x509.CertificateRequest
		who  fleet.Principal
		at   time.Time
		ttl  time.Duration
		opt  identity.IssueOptions
		kind fault.Kind
	}{
		"no CSR":             {nil, who, now, time.Hour, rnd, fault.Invalid},
		"key swapped":        {tampered, who, now, time.Hour, rnd, fault.Denied},
		"foreign domain":     {greedy, fleet.PrincipalOf("evil.example", fleet.Node, "n1"), now, time.Hour, rnd, fault.Invalid},
		"nobody":             {greedy, "", now, time.Hour, rnd, fault.Invalid},
		"local":              {greedy, fleet.Local, now, time.Hour, rnd, fault.Invalid},
		"no life":            {greedy, who, now, 0, rnd, fault.Invalid},
		"forward dated":      {greedy, who, now, time.Hour, identity.IssueOptions{Rand: rand.Reader, Backdate: -time.Hour}, fault.Invalid},
		"after the CA":       {greedy, who, ca.Cert.NotAfter.Add(time.Second), time.Hour, rnd, fault.Expired},
		"before the CA":      {greedy, who, ca.Cert.NotBefore.Add(-time.Second), time.Hour, rnd, fault.Expired},
		"an appliance's DNS": {greedy, who, now, time.Hour, identity.IssueOptions{Rand: rand.Reader, DNSNames: []string{"a"}}, fault.Invalid},
		"no randomness":      {greedy, who, now, time.Hour, identity.IssueOptions{}, fault.Internal},
		"short randomness":   {greedy, who, now, time.Hour, identity.IssueOptions{Rand: strings.NewReader("x")}, fault.Internal},
	} {
		if got, err := ca.Issue(tc.csr, tc.who, tc.at, tc.ttl, tc.opt); fault.Of(err) != tc.kind || got != nil {
			t.Errorf("%s: %v, want %q", name, err, tc.kind)
		}
	}
	weak, err := ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := identity.NewCSR(weak, rand.Reader); fault.Of(err) != fault.Invalid {
		t.Errorf("P-224: %v", err)
	}
	for _, bad := range []string{"", "ACME.example", "acme.example/x", "spiffe://acme.example", "a b", "a..b", "acme_corp.example", "10.0.0.1",
		"::1", "acme.example.", strings.Repeat("a.", 127) + "aa"} {
		if _, err := identity.NewCA(bad, now, rand.Reader, time.Hour); fault.Of(err) != fault.Invalid {
			t.Errorf("trust domain %q: %v", bad, err)
		}
	}
	for _, good := range []string{"acme", "1.2.3", "xn--bcher-kva.example", strings.Repeat("a", 63) + ".example"} {
		if ca, err := identity.NewCA(good, now, rand.Reader, time.Hour); err != nil {
			t.Errorf("trust domain %q: %v", good, err)
		} else if c, err := ca.Issue(parsedCSR(t), fleet.PrincipalOf(good, fleet.Node, "n1"), now, time.Hour, rnd); err != nil {
			t.Errorf("a leaf of trust domain %q: %v", good, err)
		} else if _, err := c.Verify(x509.VerifyOptions{Roots: identity.Pool([]*x509.Certificate{ca.Cert}), CurrentTime: now}); err != nil {
			t.Errorf("a leaf of trust domain %q does not verify: %v", good, err)
		}
	}
}

func TestSealedKey(t *testing.T) {
	ca, other := newCA(t, td), newCA(t, td)
	kek, wrong := bytes.Repeat([]byte{7}, 32), bytes.Repeat([]byte{8}, 32)
	sealed, err := ca.SealKey(kek, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	back, err := identity.OpenAuthority(ca.Cert.Raw, sealed, kek)
	if err != nil || !back.Key.(*ecdsa.PrivateKey).Equal(ca.Key) {
		t.Fatal(err)
	}
	again, err := ca.SealKey(kek, rand.Reader)
	if err != nil || bytes.Equal(again, sealed) {
		t.Errorf("sealing twice gives the same bytes, %v", err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(ca.Key)
	if err != nil || bytes.Contains(sealed, der) {
		t.Fatal("the key is readable", err)
	}
	// Another CA's key under this certificate's data: what opens must still be the certificate's own key.
	mixed, err := (&identity.Authority{Cert: ca.Cert, Key: other.Key}).SealKey(kek, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		cert, sealed, kek []byte
		kind              fault.Kind
	}{
		"wrong KEK":       {ca.Cert.Raw, sealed, wrong, fault.Denied},
		"short KEK":       {ca.Cert.Raw, sealed, kek[:16], fault.Invalid},
		"another CA":      {other.Cert.Raw, sealed, kek, fault.Denied},
		"another's key":   {ca.Cert.Raw, mixed, kek, fault.Invalid},
		"other version":   {ca.Cert.Raw, bytes.Replace(sealed, []byte("/1"), []byte("/2"), 1), kek, fault.Invalid},
		"empty":           {ca.Cert.Raw, nil, kek, fault.Invalid},
		"cut":             {ca.Cert.Raw, sealed[:len(sealed)-9], kek, fault.Denied},
		"trailing":        {ca.Cert.Raw, append(bytes.Clone(sealed), "x"...), kek, fault.Invalid},
		"too large":       {ca.Cert.Raw, append(bytes.Clone(sealed), make([]byte, 8<<10)...), kek, fault.Invalid},
		"a leaf as a CA":  {leaf(t, ca, fleet.Node, "n1").Certificate[0], sealed, kek, fault.Denied},
		"no certificate":  {nil, sealed, kek, fault.Invalid},
		"only the header": {ca.Cert.Raw, []byte("demarc-ca-key/1\n"), kek, fault.Invalid},
	} {
		if a, err := identity.OpenAuthority(tc.cert, tc.sealed, tc.kek); fault.Of(err) != tc.kind || a != nil {
			t.Errorf("%s: %v, want %q", name, err, tc.kind)
		}
	}
}

func TestBundleFile(t *testing.T) {
	a, b := newCA(t, td), newCA(t, td)
	file := func(c *x509.Certificate) []byte {
		return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})
	}
	slots := []identity.Slot{{Stage: identity.Active, CertDER: a.Cert.Raw}, {Stage: identity.Prepared, CertDER: b.Cert.Raw},
		{Stage: identity.Retired, CertDER: newCA(t, td).Cert.Raw}, {Stage: "trusted", CertDER: newCA(t, td).Cert.Raw}}
	out, err := identity.BundlePEM(slots)
	if err != nil || !bytes.Equal(out, append(file(a.Cert), file(b.Cert)...)) {
		t.Fatalf("bundle %q, %v", out, err)
	}
	certs, err := identity.ParseBundle(out, td)
	if err != nil || len(certs) != 2 || !certs[0].Equal(a.Cert) {
		t.Fatal(certs, err)
	}
	key := pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: []byte("x")})
	for name, bad := range map[string][]byte{
		"empty":         nil,
		"text between":  append(append(file(a.Cert), "hello\n"...), file(b.Cert)...),
		"a private key": append(file(a.Cert), key...),
		"a leaf":        file(leaf(t, a, fleet.Node, "n1").Leaf),
		"other domain":  file(newCA(t, "evil.example").Cert),
		"broken":        file(a.Cert)[:100],
		"headers":       pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Headers: map[string]string{"a": "b"}, Bytes: a.Cert.Raw}),
		"too many":      bytes.Repeat(file(a.Cert), identity.MaxBundleCerts+1),
		"too large":     bytes.Repeat([]byte{'\n'}, identity.MaxBundle+1),
	} {
		if got, err := identity.ParseBundle(bad, td); fault.Of(err) != fault.Invalid || got != nil {
			t.Errorf("%s: %v, want invalid", name, err)
		}
	}
	if _, err := identity.Issuer(slots[1:]); fault.Of(err) != fault.NotFound {
		t.Errorf("no active slot: %v", err)
	}
}

func TestSerials(t *testing.T) {
	s := identity.Serials{Current: "1"}
	s, err := s.Renew("2")
	if err != nil || s != (identity.Serials{Current: "1", Next: "2"}) {
		t.Fatal(s, err)
	}
	for serial, want := range map[fleet.Serial]identity.Serials{"1": s, "2": {Current: "2"}} { // a lost reply locks nobody out
		if got, err := s.Admit(serial); err != nil || got != want {
			t.Errorf("Admit(%q) = %v, %v", serial, got, err)
		}
	}
	for name, tc := range map[string]struct {
		s      identity.Serials
		serial fleet.Serial
	}{
		"unknown":          {s, "3"},
		"replaced":         {identity.Serials{Current: "2"}, "1"},
		"empty":            {s, ""},
		"empty, no next":   {identity.Serials{Current: "1"}, ""},
		"banned":           {identity.Serials{}, "1"},
		"banned, empty":    {identity.Serials{}, ""},
		"banned with next": {identity.Serials{Next: "2"}, "2"},
	} {
		if got, err := tc.s.Admit(tc.serial); fault.Of(err) != fault.Denied || got != tc.s {
			t.Errorf("%s: %v %v", name, got, err)
		}
	}
	if _, err := (identity.Serials{}).Renew("2"); fault.Of(err) != fault.Denied {
		t.Errorf("a banned identity is renewed: %v", err)
	}
}

func FuzzParseCSR(f *testing.F) {
	f.Add(newCSR(f))
	f.Fuzz(func(t *testing.T, der []byte) {
		if csr, err := identity.ParseCSR(der); err == nil && csr.CheckSignature() != nil {
			t.Fatal("a request without its signature passes")
		}
	})
}

func FuzzParseBundle(f *testing.F) {
	ca := newCA(f, td)
	f.Add(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: ca.Cert.Raw}))
	f.Fuzz(func(t *testing.T, file []byte) {
		certs, err := identity.ParseBundle(file, td)
		if err == nil && len(certs) == 0 {
			t.Fatal("an empty bundle passes")
		}
		for _, c := range certs {
			if d, err := identity.TrustDomainOf(c); err != nil || d != td {
				t.Fatal(d, err)
			}
		}
	})
}

func FuzzOpenAuthority(f *testing.F) {
	ca := newCA(f, td)
	kek := bytes.Repeat([]byte{7}, 32)
	good, err := ca.SealKey(kek, rand.Reader)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Fuzz(func(t *testing.T, sealed []byte) {
		if _, err := identity.OpenAuthority(ca.Cert.Raw, sealed, kek); err == nil &&
			!bytes.Equal(bytes.TrimSpace(sealed), bytes.TrimSpace(good)) && !bytes.ContainsAny(sealed, "\r\n") {
			t.Fatalf("%q opens", sealed)
		}
	})
}

func named(t testing.TB, ids ...string) func(*x509.Certificate) {
	return func(c *x509.Certificate) { c.URIs = uris(t, ids...) }
}

func uris(t testing.TB, ss ...string) (out []*url.URL) {
	t.Helper()
	for _, s := range ss {
		u, err := url.Parse(s)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, u)
	}
	return out
}
