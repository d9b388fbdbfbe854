// SPDX-License-Identifier: Apache-2.0

package identity_test

import (
	"bytes"
	"crypto/ed25519"
	"strings"
	"testing"
	"time"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/identity"
	"github.com/demarc-dev/demarc/seal"
)

func invitation(t testing.TB) identity.Invitation {
	t.Helper()
	k, err := seal.KeyOf(ed25519.NewKeyFromSeed(make([]byte, 32)).Public())
	if err != nil {
		t.Fatal(err)
	}
	return identity.Invitation{TrustDomain: "acme.example", Name: "ben", Role: fleet.Viewer,
		Nodes:  []string{"cp-1.acme.example:7443", "10.0.0.2:7443"},
		LogKey: string(k.PEM()), Secret: bytes.Repeat([]byte{9}, identity.InviteSecret), Until: time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)}
}

func TestInvitation(t *testing.T) {
	i := invitation(t)
	line, err := i.Encode()
	if err != nil {
		t.Fatal(err)
	}
	if strings.ContainsAny(line, " \n") {
		t.Fatalf("%q is not one line", line)
	}
	got, err := identity.ParseInvitation([]byte("  " + line[:70] + "\r\n" + line[70:] + "\n")) // as a mail program breaks it
	if err != nil || got.Name != i.Name || !got.Until.Equal(i.Until) || !bytes.Equal(got.Secret, i.Secret) {
		t.Fatalf("%+v, %v", got, err)
	}
	for name, bad := range map[string]string{"empty": "", "cut": line[:len(line)-9], "no intro": line[5:], "padded": line + "=",
		"altered": strings.Replace(line, "a", "b", 40),
		"long":    line + strings.Repeat("A", identity.MaxInvitation)} {
		if _, err := identity.ParseInvitation([]byte(bad)); fault.Of(err) != fault.Invalid {
			t.Errorf("%s: %v, want %s", name, err, fault.Invalid)
		}
	}
	for name, change := range map[string]func(*identity.Invitation){
		"domain": func(i *identity.Invitation) { i.TrustDomain = "ACME" }, "name": func(i *identity.Invitation) { i.Name = "../ben" },
		"role":     func(i *identity.Invitation) { i.Role = "root" },
		"no nodes": func(i *identity.Invitation) { i.Nodes = nil }, "a node": func(i *identity.Invitation) { i.Nodes = []string{"cp-1"} },
		"key":    func(i *identity.Invitation) { i.LogKey = "x" },
		"secret": func(i *identity.Invitation) { i.Secret = i.Secret[1:] }, "until": func(i *identity.Invitation) { i.Until = time.Time{} }} {
		i := invitation(t)
		change(&i)
		if _, err := i.Encode(); fault.Of(err) != fault.Invalid {
			t.Errorf("%s: %v, want %s", name, err, fault.Invalid)
		}
	}
}

// TestInviteProof: the proof is of one trust domain, one name and one key.
func TestInviteProof(t *testing.T) {
	key, err := identity.InviteKey(bytes.Repeat([]byte{9}, identity.InviteSecret))
	if err != nil {
		t.Fatal(err)
	}
	pub := key.Public().(ed25519.PublicKey)
	proof := identity.SignInvite(key, "acme.example", "ben", []byte("csr"))
	if err := identity.CheckInvite(pub, "acme.example", "ben", []byte("csr"), proof); err != nil {
		t.Fatal(err)
	}
	other, err := identity.InviteKey(bytes.Repeat([]byte{8}, identity.InviteSecret))
	if err != nil {
		t.Fatal(err)
	}
	for name, err := range map[string]error{
		"domain": identity.CheckInvite(pub, "acme.examplf", "ben", []byte("csr"), proof),
		"name":   identity.CheckInvite(pub, "acme.example", "bem", []byte("csr"), proof),
		"moved":  identity.CheckInvite(pub, "acme.exampleb", "en", []byte("csr"), proof),
		"key":    identity.CheckInvite(pub, "acme.example", "ben", []byte("cst"), proof),
		"secret": identity.CheckInvite(other.Public().(ed25519.PublicKey), "acme.example", "ben", []byte("csr"), proof),
	} {
		if fault.Of(err) != fault.Denied {
			t.Errorf("another %s: %v, want %s", name, err, fault.Denied)
		}
	}
	if _, err := identity.InviteKey([]byte("short")); fault.Of(err) != fault.Invalid {
		t.Error(err)
	}
}

func FuzzParseInvitation(f *testing.F) {
	line, err := invitation(f).Encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add([]byte(line))
	f.Add([]byte("demarc-invitation-1.e30"))
	f.Fuzz(func(t *testing.T, b []byte) {
		i, err := identity.ParseInvitation(b)
		if err != nil {
			return
		}
		again, err := i.Encode()
		if err != nil {
			t.Fatalf("what was read is not whole: %v", err)
		}
		if back, err := identity.ParseInvitation([]byte(again)); err != nil || back.Name != i.Name || !bytes.Equal(back.Secret, i.Secret) {
			t.Fatalf("%+v, %v", back, err)
		}
	})
}
