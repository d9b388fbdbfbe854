// SPDX-License-Identifier: Apache-2.0

package credentials

import (
	"bytes"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"fmt"
	"math/big"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/identity"
	"github.com/demarc-dev/demarc/seal"
)

// shelf is the disk of an appliance that enrolled and holds a signed bundle, and what an enemy would like to be on it.
type shelf struct {
	dir               string
	ours, evil, other *identity.Authority // evil is of the same trust domain, other of another
	key, thief        ed25519.PrivateKey  // of the vendor's log, and of somebody else
	pinned            []byte
}

func newShelf(t testing.TB) *shelf {
	t.Helper()
	s := &shelf{dir: t.TempDir(), ours: fixedCA(t, testDomain, 3), evil: fixedCA(t, testDomain, 4), other: fixedCA(t, "other.example", 5),
		key: ed25519.NewKeyFromSeed(bytes.Repeat([]byte{1}, 32)), thief: ed25519.NewKeyFromSeed(bytes.Repeat([]byte{2}, 32))}
	k, err := seal.KeyOf(s.key.Public())
	if err != nil {
		t.Fatal(err)
	}
	s.pinned = k.PEM()
	w, _ := s.open(t, nil)
	key, request, err := w.PendingKey()
	if err != nil {
		t.Fatal(err)
	}
	csr, err := identity.ParseCSR(request)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := s.ours.Issue(csr, fleet.PrincipalOf(testDomain, fleet.Appliance, "eu-1"), time.Now(), time.Hour,
		identity.IssueOptions{Rand: rand.Reader})
	if err != nil {
		t.Fatal(err)
	}
	if err := w.StoreCertificate(key, leaf.Raw, [][]byte{s.ours.Cert.Raw}, 7); err != nil {
		t.Fatal(err)
	}
	sealed := s.sealed(t, testDomain, 7, s.ours, s.key)
	b, err := identity.OpenKeptBundle(sealed, k, testDomain)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Trust(b, sealed); err != nil {
		t.Fatal(err)
	}
	return s
}

// fixedCA is the same CA each time: what the fuzzer draws, its workers try, and they are processes of their own.
func fixedCA(t testing.TB, domain string, seed byte) *identity.Authority {
	t.Helper()
	key := ed25519.NewKeyFromSeed(bytes.Repeat([]byte{seed}, 32))
	c := &x509.Certificate{SerialNumber: big.NewInt(int64(seed)), Subject: pkix.Name{CommonName: fmt.Sprint("CA ", seed)},
		NotBefore: time.Unix(0, 0), NotAfter: time.Unix(1<<32, 0),
		URIs: []*url.URL{{Scheme: "spiffe", Host: domain}}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	der, err := x509.CreateCertificate(nil, c, c, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	if c, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	return &identity.Authority{Cert: c, Key: key}
}

func (s *shelf) sealed(t testing.TB, domain string, number uint64, ca *identity.Authority, key ed25519.PrivateKey) []byte {
	t.Helper()
	b, err := seal.Seal(identity.SignedBundle{TrustDomain: domain, Number: number, CAs: [][]byte{ca.Cert.Raw},
		Issuer: fleet.DigestOf(ca.Cert.Raw), At: time.Now().UTC()}, key)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func (s *shelf) open(t testing.TB, pinned []byte) (*Store, []error) {
	t.Helper()
	w, damage, err := Open(filepath.Join(s.dir, "wallet.json"), testDomain, []*x509.Certificate{s.ours.Cert}, pinned, time.Now)
	if err != nil {
		t.Fatal(err)
	}
	return w, damage
}

func (s *shelf) file(t testing.TB, name string, change func([]byte) []byte) {
	t.Helper()
	p := filepath.Join(s.dir, name)
	b, err := os.ReadFile(p)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(p, change(b), 0o600); err != nil {
		t.Fatal(err)
	}
}

func trusts(w *Store, ca *identity.Authority) bool {
	_, err := ca.Cert.Verify(x509.VerifyOptions{Roots: w.Roots(), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}})
	return err == nil
}

// TestKeptCAsAreVerified alters what an appliance keeps in each way, and starts it. What is not what the vendor signed is
// named and trusted by nobody, and the number that is held then lets the newest bundle in.
func TestKeptCAsAreVerified(t *testing.T) {
	put := func(b []byte) func([]byte) []byte { return func([]byte) []byte { return b } }
	wallet := func(change func(h *stored)) func(t *testing.T, s *shelf) {
		return func(t *testing.T, s *shelf) {
			s.file(t, "wallet.json", func(b []byte) []byte {
				var h stored
				if err := json.Unmarshal(b, &h); err != nil {
					t.Fatal(err)
				}
				change(&h)
				out, err := json.Marshal(h)
				if err != nil {
					t.Fatal(err)
				}
				return out
			})
		}
	}
	signed := func(change func(t *testing.T, s *shelf, b []byte) []byte) func(t *testing.T, s *shelf) {
		return func(t *testing.T, s *shelf) {
			s.file(t, signedName, func(b []byte) []byte { return change(t, s, b) })
		}
	}
	for name, c := range map[string]struct {
		change func(t *testing.T, s *shelf)
		named  string // in what is told; "": nothing is wrong
		ours   bool   // our CA is trusted still
		leaf   bool   // and the certificate is used
	}{
		"nothing":           {func(*testing.T, *shelf) {}, "", true, true},
		"signed: one byte":  {signed(func(_ *testing.T, _ *shelf, b []byte) []byte { b[len(b)/2] ^= 1; return b }), signedName, false, true},
		"signed: truncated": {signed(func(_ *testing.T, _ *shelf, b []byte) []byte { return b[:len(b)-3] }), signedName, false, true},
		"signed: empty":     {signed(func(_ *testing.T, _ *shelf, b []byte) []byte { return nil }), signedName, false, true},
		"signed: oversized": {signed(func(_ *testing.T, _ *shelf, b []byte) []byte {
			return append(b, bytes.Repeat([]byte{' '}, 4*identity.MaxBundle)...)
		}), "more than", false, true},
		"signed: of another domain": {signed(func(t *testing.T, s *shelf,
			_ []byte) []byte {
			return s.sealed(t, "other.example", 9, s.other, s.key)
		}), "other.example", false, true},
		"signed: CAs of another domain": {signed(func(t *testing.T, s *shelf,
			_ []byte) []byte {
			return s.sealed(t, testDomain, 9, s.other, s.key)
		}), "other.example", false, true},
		"signed: by a thief": {signed(func(t *testing.T, s *shelf,
			_ []byte) []byte {
			return s.sealed(t, testDomain, 9, s.evil, s.thief)
		}), signedName, false, true},
		"signed: newer than the wallet, after a crash": {signed(func(t *testing.T, s *shelf,
			_ []byte) []byte {
			return s.sealed(t, testDomain, 8, s.ours, s.key)
		}), "", true, true},
		"wallet: another CA":                      {wallet(func(h *stored) { h.Bundle = [][]byte{nil} }), "", true, true},
		"wallet: a number that no bundle reaches": {wallet(func(h *stored) { h.Number = 1 << 62 }), "", true, true},
		"wallet: its certificate":                 {wallet(func(h *stored) { h.Certificate[40] ^= 1 }), "wallet.json", true, false},
		"wallet: its key":                         {wallet(func(h *stored) { h.Key = h.Key[:20] }), "wallet.json", true, false},
		"wallet: truncated": {func(t *testing.T,
			s *shelf) {
			s.file(t, "wallet.json", func(b []byte) []byte { return b[:len(b)/2] })
		}, "wallet.json", true, false},
		"wallet: oversized": {func(t *testing.T,
			s *shelf) {
			s.file(t, "wallet.json", put(bytes.Repeat([]byte{' '}, maxFile+1)))
		}, "wallet.json", true, false},
		"wallet: of another build": {wallet(func(h *stored) { h.Version = "demarc-wallet/9" }), "wallet.json", true, false},
		"both": {func(t *testing.T, s *shelf) {
			s.file(t, "wallet.json", put([]byte("x")))
			s.file(t, signedName, put([]byte("x")))
		}, signedName, false, false},
	} {
		t.Run(name, func(t *testing.T) {
			s := newShelf(t)
			c.change(t, s)
			if name == "wallet: another CA" {
				wallet(func(h *stored) { h.Bundle = [][]byte{s.evil.Cert.Raw} })(t, s)
			}
			w, damage := s.open(t, s.pinned)
			var told strings.Builder
			for _, err := range damage {
				told.WriteString(err.Error() + "\n")
			}
			if (c.named == "") != (len(damage) == 0) || !strings.Contains(told.String(), c.named) {
				t.Errorf("told %q, want %q named", told.String(), c.named)
			}
			if trusts(w, s.evil) || trusts(w, s.ours) != c.ours {
				t.Errorf("the enemy's CA is trusted: %v; ours: %v, want %v", trusts(w, s.evil), trusts(w, s.ours), c.ours)
			}
			if leaf, _ := w.Leaf(); (leaf != nil) != c.leaf {
				t.Errorf("there is a certificate: %v, want %v", leaf != nil, c.leaf)
			}
			if n := w.BundleNumber(); n > 8 {
				t.Errorf("number %d is held: the vendor's next bundle would be refused", n)
			}
			// What the vendor signs next is taken, and stands after the next start.
			pinned, err := seal.ParseKey(s.pinned)
			if err != nil {
				t.Fatal(err)
			}
			next := s.sealed(t, testDomain, 10, s.ours, s.key)
			b, err := identity.OpenBundle(next, pinned, testDomain, nil, w.BundleNumber())
			if err != nil {
				t.Fatal(err)
			}
			if news, err := w.Trust(b, next); err != nil || !news {
				t.Fatalf("the newest bundle: news %v, %v", news, err)
			}
			if w, damage = s.open(t, s.pinned); len(damage) > 0 || !trusts(w, s.ours) || trusts(w, s.evil) || w.BundleNumber() != 10 && c.leaf {
				t.Errorf("after the next start: number %d, damage %v", w.BundleNumber(), damage)
			}
		})
	}
}

// FuzzKeptCAs: whatever is on the disk, the appliance starts, and trusts nobody but whom the vendor signed or the customer wrote down.
func FuzzKeptCAs(f *testing.F) {
	s := newShelf(f)
	read := func(name string) []byte {
		b, err := os.ReadFile(filepath.Join(s.dir, name))
		if err != nil {
			f.Fatal(err)
		}
		return b
	}
	signed, kept := read(signedName), read("wallet.json")
	var h stored
	if err := json.Unmarshal(kept, &h); err != nil {
		f.Fatal(err)
	}
	h.Bundle, h.Number, h.Issuer = [][]byte{s.evil.Cert.Raw, s.ours.Cert.Raw}, 1<<62, fleet.DigestOf(s.evil.Cert.Raw)
	planted, err := json.Marshal(h)
	if err != nil {
		f.Fatal(err)
	}
	h.Number = 7 // that of what the vendor signed
	same, err := json.Marshal(h)
	if err != nil {
		f.Fatal(err)
	}
	h.Certificate = nil
	fresh, err := json.Marshal(h)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(signed, kept)
	f.Add(signed, planted)
	f.Add(signed, same)
	f.Add(signed, fresh)
	f.Add(signed[:len(signed)/2], kept)
	f.Add([]byte(nil), kept[:len(kept)/2])
	f.Add(s.sealed(f, testDomain, 9, s.evil, s.thief), planted)
	f.Add(s.sealed(f, "other.example", 9, s.evil, s.key), planted)
	f.Fuzz(func(t *testing.T, signed, kept []byte) {
		for name, b := range map[string][]byte{signedName: signed, "wallet.json": kept} {
			if err := os.WriteFile(filepath.Join(s.dir, name), b, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		w, damage := s.open(t, s.pinned)
		if trusts(w, s.evil) || trusts(w, s.other) {
			t.Fatal("an enemy's CA is trusted")
		}
		if w.BundleNumber() > 7 {
			t.Fatalf("number %d is held, and 7 is the newest that was signed", w.BundleNumber())
		}
		if len(damage) == 0 && !trusts(w, s.ours) {
			t.Fatal("nothing is told, and our CA is not trusted")
		}
		if w, again := s.open(t, s.pinned); len(again) > len(damage) || trusts(w, s.evil) || trusts(w, s.other) {
			t.Fatalf("the next start tells %v after %v", again, damage)
		}
	})
}

const testDomain = "acme.example"
