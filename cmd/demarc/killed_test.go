// SPDX-License-Identifier: Apache-2.0

package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"math/big"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// TestARenewalThatIsKilled: whenever a renewal is killed while it puts the certificate and its key in their places, the operator goes on with
// one of the two pairs (FAULTS.md I1, G5).
func TestARenewalThatIsKilled(t *testing.T) {
	pair := func(serial int64) (cert, key []byte) {
		k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		c := &x509.Certificate{SerialNumber: big.NewInt(serial), NotAfter: time.Now().Add(time.Hour)}
		der, err := x509.CreateCertificate(rand.Reader, c, c, k.Public(), k)
		if err != nil {
			t.Fatal(err)
		}
		p8, err := x509.MarshalPKCS8PrivateKey(k)
		if err != nil {
			t.Fatal(err)
		}
		return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: p8})
	}
	oldCert, oldKey := pair(1)
	newCert, newKey := pair(2)
	for name, c := range map[string]struct {
		files map[string][]byte
		want  int64
	}{
		"before":                         {map[string][]byte{"c": oldCert, "k": oldKey}, 1},
		"one is written":                 {map[string][]byte{"c": oldCert, "k": oldKey, "k.new": newKey}, 1},
		"half of one is written":         {map[string][]byte{"c": oldCert, "k": oldKey, "k.new": newKey[:40]}, 1},
		"both are written":               {map[string][]byte{"c": oldCert, "k": oldKey, "k.new": newKey, "c.new": newCert}, 1},
		"the key is in its place":        {map[string][]byte{"c": oldCert, "k": newKey, "c.new": newCert}, 2},
		"the certificate is":             {map[string][]byte{"c": newCert, "k": oldKey, "k.new": newKey}, 2},
		"after":                          {map[string][]byte{"c": newCert, "k": newKey}, 2},
		"neither matches, what waits is": {map[string][]byte{"c": oldCert, "k": newKey[:40], "c.new": newCert, "k.new": newKey}, 2},
		"nothing matches":                {map[string][]byte{"c": oldCert, "k": newKey, "c.new": oldCert}, 0},
	} {
		dir := t.TempDir()
		for f, b := range c.files {
			if err := os.WriteFile(filepath.Join(dir, f), b, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		cert, key := filepath.Join(dir, "c"), filepath.Join(dir, "k")
		got, err := loadPair(cert, key)
		if c.want == 0 {
			if err == nil {
				t.Errorf("%s: a pair that does not match is taken", name)
			}
			continue
		}
		if err != nil || got.Leaf.SerialNumber.Int64() != c.want {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if again, err := tls.LoadX509KeyPair(cert, key); err != nil || again.Leaf.SerialNumber.Int64() != c.want {
			t.Errorf("%s: afterwards: %v", name, err)
		}
	}
}
