// SPDX-License-Identifier: Apache-2.0

package client

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

// drawPair draws a key and a certificate of its own with this serial number, both PEM.
func drawPair(t *testing.T, serial int64) (cert, key []byte) {
	t.Helper()
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

// TestARenewalThatIsKilled: whenever a renewal is killed while it puts the certificate and its key in their places, the operator has one of
// the two pairs (FAULTS.md I1, G5).
func TestARenewalThatIsKilled(t *testing.T) {
	oldCert, oldKey := drawPair(t, 1)
	newCert, newKey := drawPair(t, 2)
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
		got, err := LoadPair(cert, key)
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

// TestARenewalBesideACommand: a command that reads the pair while a renewal replaces it gets one of the two, and the renewal comes to its
// end.
func TestARenewalBesideACommand(t *testing.T) {
	dir := t.TempDir()
	cert, key := filepath.Join(dir, "c"), filepath.Join(dir, "k")
	var files []map[string][]byte
	for i := range int64(2) {
		c, k := drawPair(t, i+1)
		files = append(files, map[string][]byte{cert: c, key: k})
	}
	if err := ReplaceFiles(files[0]); err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() {
		for i := range 200 {
			if err := ReplaceFiles(files[i%2]); err != nil {
				done <- err
				return
			}
		}
		done <- nil
	}()
	for {
		select {
		case err := <-done:
			if err != nil {
				t.Errorf("the renewal: %v", err)
			}
			if _, err := tls.LoadX509KeyPair(cert, key); err != nil {
				t.Errorf("afterwards: %v", err)
			}
			return
		default:
			if _, err := LoadPair(cert, key); err != nil {
				t.Fatalf("the command: %v", err)
			}
		}
	}
}
