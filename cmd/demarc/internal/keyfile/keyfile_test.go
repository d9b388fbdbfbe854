// SPDX-License-Identifier: Apache-2.0

package keyfile_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"

	"filippo.io/age"

	"github.com/demarc-dev/demarc/cmd/demarc/internal/keyfile"
	"github.com/demarc-dev/demarc/fault"
)

func seeded(b byte) ed25519.PrivateKey {
	return ed25519.NewKeyFromSeed(bytes.Repeat([]byte{b}, ed25519.SeedSize))
}

// The derivation is a format: a customer opens tomorrow what was encrypted today.
func TestOutputIdentityIsStable(t *testing.T) {
	id, err := keyfile.OutputIdentity(seeded(7))
	if err != nil {
		t.Fatal(err)
	}
	const want = "age1r2ksre42fa00gw6yp28rknxrhjqd5cdcr76pea5skt4pghv929aq68c4dd"
	if got := id.Recipient().String(); got != want {
		t.Errorf("recipient = %s, want %s", got, want)
	}
	var box bytes.Buffer
	w, err := age.Encrypt(&box, id.Recipient())
	if err != nil {
		t.Fatal(err)
	}
	_, _ = io.WriteString(w, "state: well\n")
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	again, err := keyfile.OutputIdentity(seeded(7))
	if err != nil {
		t.Fatal(err)
	}
	r, err := age.Decrypt(bytes.NewReader(box.Bytes()), again)
	if err != nil {
		t.Fatal(err)
	}
	if got, _ := io.ReadAll(r); string(got) != "state: well\n" {
		t.Errorf("opened %q", got)
	}
	other, err := keyfile.OutputIdentity(seeded(8))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := age.Decrypt(bytes.NewReader(box.Bytes()), other); err == nil {
		t.Error("another key opened it")
	}
}

func TestOutputIdentityRefusesOtherKeys(t *testing.T) {
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := keyfile.OutputIdentity(k); !errors.Is(err, fault.Invalid) {
		t.Errorf("OutputIdentity(ECDSA) = %v, want invalid", err)
	}
}

func TestParseSigner(t *testing.T) {
	never := func() ([]byte, error) { t.Error("a key in the clear needs no passphrase"); return nil, nil }
	clear, err := keyfile.PEM(seeded(1))
	if err != nil {
		t.Fatal(err)
	}
	s, err := keyfile.ParseSigner(clear, never)
	if err != nil || !s.Public().(ed25519.PublicKey).Equal(seeded(1).Public()) {
		t.Errorf("ParseSigner(PEM) = %v, %v", s, err)
	}
	for name, file := range map[string][]byte{"two": append(bytes.Clone(clear), clear...), "broken": bytes.Replace(clear, []byte("M"), []byte("A"), 2)} {
		if _, err := keyfile.ParseSigner(file, never); !errors.Is(err, fault.Invalid) {
			t.Errorf("%s: %v, want invalid", name, err)
		}
	}
	for name, file := range map[string][]byte{"empty": nil, "text": []byte("hello")} {
		if _, err := keyfile.ParseSigner(file, func() ([]byte, error) { return []byte("x"), nil }); err == nil {
			t.Errorf("%s: read as a key", name)
		}
	}
}

func TestWriteNewNeverReplaces(t *testing.T) {
	path := filepath.Join(t.TempDir(), "f")
	if err := keyfile.WriteNew(path, []byte("first"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := keyfile.WriteNew(path, []byte("second"), 0o600); !errors.Is(err, fault.Conflict) {
		t.Errorf("second write = %v, want conflict", err)
	}
	if b, _ := os.ReadFile(path); string(b) != "first" {
		t.Errorf("the file holds %q", b)
	}
	fi, err := os.Stat(path)
	if err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", fi.Mode(), err)
	}
	if left, _ := filepath.Glob(filepath.Join(filepath.Dir(path), ".new-*")); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}
