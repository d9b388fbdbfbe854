// SPDX-License-Identifier: Apache-2.0

package identity_test

import (
	"bytes"
	"crypto/rand"
	"testing"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/identity"
)

func TestSealedSecret(t *testing.T) {
	kek, other, secret := bytes.Repeat([]byte{1}, 32), bytes.Repeat([]byte{2}, 32), []byte("a secret of the vendor")
	sealed, err := identity.SealSecret("log-key", secret, kek, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := identity.OpenSecret("log-key", sealed, kek); err != nil || !bytes.Equal(got, secret) {
		t.Fatalf("%q, %v", got, err)
	}
	altered := bytes.Clone(sealed)
	altered[len(altered)-8] ^= 1
	for name, tc := range map[string]struct {
		name   string
		sealed []byte
		kek    []byte
		want   fault.Kind
	}{
		"another key":  {"log-key", sealed, other, fault.Denied},
		"another name": {"nonce-key", sealed, kek, fault.Denied},
		"altered":      {"log-key", altered, kek, ""},
		"cut":          {"log-key", sealed[:len(sealed)-9], kek, ""},
		"empty":        {"log-key", nil, kek, fault.Invalid},
		"no key":       {"log-key", sealed, nil, fault.Invalid},
	} {
		_, err := identity.OpenSecret(tc.name, tc.sealed, tc.kek)
		if err == nil || tc.want != "" && fault.Of(err) != tc.want {
			t.Errorf("%s: %v, want %s", name, err, tc.want)
		}
	}
	if _, err := identity.SealSecret("x", make([]byte, identity.MaxSecret+1), kek, rand.Reader); fault.Of(err) != fault.Invalid {
		t.Error(err)
	}
	one, err := identity.KEKID(kek)
	if err != nil {
		t.Fatal(err)
	}
	two, err := identity.KEKID(other)
	if err != nil || one == two || len(one) != 16 {
		t.Fatalf("%q and %q, %v", one, two, err)
	}
	if _, err := identity.KEKID(kek[1:]); fault.Of(err) != fault.Invalid {
		t.Error(err)
	}
}
