// SPDX-License-Identifier: Apache-2.0

package fleettest_test

import (
	"bytes"
	"os"
	"testing"
	"time"

	"github.com/demarc-dev/demarc/fleettest"
)

// TestDamagedDiskComesBack: what an appliance keeps of its certificate and of the vendor's CAs is damaged while it is down, and
// the CA was changed meanwhile. It comes back by itself, by the key that it pinned, as who it was.
func TestDamagedDiskComesBack(t *testing.T) {
	for name, files := range map[string][]string{"the signed CAs": {"bundle.signed"}, "the wallet": {"wallet.json"},
		"both": {"bundle.signed", "wallet.json"}} {
		for how, damage := range map[string]func([]byte) []byte{
			"truncated": func(b []byte) []byte { return b[:len(b)/2] },
			"altered":   func(b []byte) []byte { b[len(b)/2] ^= 1; return b },
			"oversized": func(b []byte) []byte { return append(b, bytes.Repeat([]byte{' '}, 1<<20)...) },
		} {
			t.Run(name+" "+how, func(t *testing.T) {
				bubble(t, func(t *testing.T, f *fleettest.Fleet) {
					a := f.AddAppliance("eu-1")
					a.Start()
					a.WaitUp(time.Minute)
					f.Wait("the signed bundle is on disk", time.Minute, func() bool { _, err := os.Stat(a.File("bundle.signed")); return err == nil })
					before := f.Of("eu-1")
					a.Stop()
					f.Wait("it left", time.Minute, func() bool { return !f.Of("eu-1").Online })
					old, id := f.IssuerCA(), f.PrepareCA()
					f.Wait("the new CA is active", 10*time.Minute, func() bool { return f.ActivateCA(id) == nil })
					if err := f.RetireCA(old, true); err != nil {
						t.Fatal(err)
					}
					for _, file := range files {
						b, err := os.ReadFile(a.File(file))
						if err != nil {
							t.Fatal(err)
						}
						if err := os.WriteFile(a.File(file), damage(b), 0o600); err != nil {
							t.Fatal(err)
						}
					}
					a.Start()
					a.WaitUp(2 * time.Minute)
					if at := f.Of("eu-1"); !bytes.Equal(at.LogKey, before.LogKey) || !at.Since.Equal(before.Since) || string(at.CurrentIssuer) != id {
						t.Errorf("it came back as another: %+v", at)
					}
				})
			})
		}
	}
}
