// SPDX-License-Identifier: Apache-2.0

package identity_test

import (
	"bytes"
	"crypto/ed25519"
	"crypto/rand"
	"errors"
	"testing"
	"time"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/identity"
	"github.com/demarc-dev/demarc/seal"
)

func TestSignedBundle(t *testing.T) {
	now := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	ca, err := identity.NewCA("acme.example", now, rand.Reader, time.Hour)
	must(err)
	slots, err := identity.Prepare(nil, ca.Cert.Raw, []byte("k"))
	must(err)
	slots, err = identity.Activate(slots, slots[0].ID())
	must(err)
	pub, key, err := ed25519.GenerateKey(rand.Reader)
	must(err)
	otherPub, _, err := ed25519.GenerateKey(rand.Reader)
	must(err)
	pinned, err := seal.KeyOf(pub)
	must(err)
	other, err := seal.KeyOf(otherPub)
	must(err)
	nonce := bytes.Repeat([]byte{7}, identity.MinBundleNonce)
	sealed, err := identity.SealBundle("acme.example", 5, slots, now, nonce, key)
	must(err)
	b, err := identity.OpenBundle(sealed, pinned, "acme.example", nonce, 5)
	must(err)
	if b.Number != 5 || !b.At.Equal(now) || b.Issuer != slots[0].ID() || len(b.CAs) != 1 {
		t.Errorf("%+v", b)
	}
	for name, tc := range map[string]struct {
		key    seal.Key
		domain string
		nonce  []byte
		held   uint64
	}{
		"another key":    {other, "acme.example", nonce, 0},
		"another domain": {pinned, "evil.example", nonce, 0},
		"another nonce":  {pinned, "acme.example", bytes.Repeat([]byte{8}, 16), 0},
		"no nonce asked": {pinned, "acme.example", nil, 0},
		"an older one":   {pinned, "acme.example", nonce, 6},
	} {
		if _, err := identity.OpenBundle(sealed, tc.key, tc.domain, tc.nonce, tc.held); !errors.Is(err, fault.Denied) {
			t.Errorf("%s: %v, want denied", name, err)
		}
	}
	for _, n := range []int{0, 15, 33} {
		if err := identity.CheckBundleNonce(make([]byte, n)); !errors.Is(err, fault.Invalid) {
			t.Errorf("a nonce of %d bytes: %v, want invalid", n, err)
		}
	}
}
