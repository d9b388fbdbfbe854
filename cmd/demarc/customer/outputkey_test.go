// SPDX-License-Identifier: Apache-2.0

package customer

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"errors"
	"io"
	"testing"

	"filippo.io/age"

	"github.com/demarc-dev/demarc/fault"
)

// The derivation is a format: a customer opens tomorrow what was encrypted today.
func TestOutputKeyIsStable(t *testing.T) {
	id, err := OutputKey(ed25519.NewKeyFromSeed(bytes.Repeat([]byte{7}, ed25519.SeedSize)))
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
	again, err := OutputKey(ed25519.NewKeyFromSeed(bytes.Repeat([]byte{7}, ed25519.SeedSize)))
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
	other, err := OutputKey(ed25519.NewKeyFromSeed(bytes.Repeat([]byte{8}, ed25519.SeedSize)))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := age.Decrypt(bytes.NewReader(box.Bytes()), other); err == nil {
		t.Error("another key opened it")
	}
}

func TestOutputKeyRefusesOtherKeys(t *testing.T) {
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := OutputKey(k); !errors.Is(err, fault.Invalid) {
		t.Errorf("OutputKey(ECDSA) = %v, want invalid", err)
	}
}
