// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/pem"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/demarc-dev/demarc/client"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/identity"
	"github.com/demarc-dev/demarc/seal"
)

// joins has ann invite an operator, who accepts, and returns the operator's file.
func (e *domain) joins(name, role string) string {
	e.t.Helper()
	invitation, file := filepath.Join(e.dir, name+".invitation"), filepath.Join(e.dir, name+".yaml")
	e.as(e.ann(), 0, "operator", "invite", name, "--role", role, "--out", invitation)
	e.types("", 0, "operator", "accept", invitation, "--out", file)
	return file
}

func (e *domain) ann() string { return filepath.Join(e.dir, "operator", "operator.yaml") }

// cas counts the CAs of a bundle file.
func (e *domain) cas(name string) int {
	e.t.Helper()
	return bytes.Count(e.read(name), []byte("BEGIN CERTIFICATE"))
}

func has(t *testing.T, out string, want ...string) {
	t.Helper()
	for _, w := range want {
		if !strings.Contains(out, w) {
			t.Fatalf("%q is not in\n%s", w, out)
		}
	}
}

// TestNoOperatorIsLockedOut (FAULTS.md I1): the runbook of the CA as operators type it. Who does not hold the new CA is named before it
// issues; a command that meets a CA which it does not know fetches the signed bundle and continues; one that hears of a newer bundle stores
// it and says so.
func TestNoOperatorIsLockedOut(t *testing.T) {
	e := newDomain(t)
	ann := e.ann()
	ben, cat := e.joins("ben", "viewer"), e.joins("cat", "viewer")
	e.as(ben, 0, "status")
	e.as(ann, 0, "ca", "prepare") // stores the bundle that it announced
	if n := e.cas("bundle.pem"); n != 2 {
		t.Fatalf("ann holds %d CAs after she prepared one", n)
	}
	out := e.as(ann, 0, "ca", "status")
	has(t, out, "missing", "operator ben", "operator cat", "have them run any command, for instance demarc status")
	if strings.Contains(out, "operator ann") {
		t.Fatalf("ann is missing:\n%s", out)
	}
	has(t, e.as(ann, 1, "ca", "activate", "prepared"), "2 do not hold CA", "operator ben, operator cat", "for instance demarc status")
	if e.cas("ben.bundle.pem") != 1 {
		t.Fatal("ben holds the CA before he called")
	}
	e.as(ben, 0, "status")
	if e.cas("ben.bundle.pem") != 2 {
		t.Fatal("ben's command did not store the bundle")
	}
	out = e.as(ann, 1, "ca", "activate", "prepared")
	has(t, out, "1 do not hold CA", "operator cat")
	if strings.Contains(out, "ben") {
		t.Fatalf("ben is missing after he called:\n%s", out)
	}
	has(t, e.as(ann, 1, "ca", "activate", "prepared", "--without", "dan"), `no operator "dan"`)
	has(t, e.as(ann, 0, "ca", "activate", "prepared", "--without", "cat"), "issues now")

	e.as(cat, 0, "status") // it knew nothing of the CA that the node shows
	if e.cas("cat.bundle.pem") != 2 {
		t.Fatal("cat's command did not store the bundle")
	}
	has(t, e.as(ann, 1, "ca", "retire", "tainted"), "your own certificate", "demarc operator renew")
	for _, file := range []string{ann, ben, cat} {
		e.as(file, 0, "operator", "renew")
	}
	has(t, e.as(ann, 1, "ca", "retire", "tainted"), "operator ben, operator cat") // who did not use the new certificate may not have it
	e.as(ben, 0, "status")
	e.as(cat, 0, "status")
	has(t, e.as(ann, 0, "ca", "retire", "tainted"), "trusted by nobody")
	for name, file := range map[string]string{"bundle.pem": ann, "ben.bundle.pem": ben, "cat.bundle.pem": cat} {
		e.as(file, 0, "status")
		if n := e.cas(name); n != 1 {
			t.Errorf("%s holds %d CAs after the old one was retired", name, n)
		}
		e.as(file, 0, "status")
	}
	if out := e.as(ann, 0, "ca", "status"); strings.Contains(out, "missing") {
		t.Errorf("somebody is missing:\n%s", out)
	}
}

// TestABundleIsBelievedForItsSignature: what a command asks for over a connection that proves nothing is worth what the pinned key says.
func TestABundleIsBelievedForItsSignature(t *testing.T) {
	e := newDomain(t)
	ben := e.joins("ben", "viewer")
	before, key := e.read("ben.bundle.pem"), e.read("ben.log.pub")
	e.as(e.ann(), 0, "ca", "prepare")
	e.as(e.ann(), 0, "ca", "activate", "prepared", "--without", "ben")
	pub, _, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	other, err := seal.KeyOf(pub)
	if err != nil {
		t.Fatal(err)
	}
	put := func(b []byte) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(e.dir, "ben.log.pub"), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	put(other.PEM())
	has(t, e.as(ben, 3, "status", "--timeout", "5s"), "not the control plane of the invitation, or of the log key that is pinned here")
	put([]byte("nonsense"))
	has(t, e.as(ben, 1, "status", "--timeout", "5s"), "log_key")
	if err := os.Remove(filepath.Join(e.dir, "ben.log.pub")); err != nil {
		t.Fatal(err)
	}
	has(t, e.as(ben, 3, "status", "--timeout", "5s"), "not your vendor") // nothing is pinned: nothing is believed
	if !bytes.Equal(before, e.read("ben.bundle.pem")) {
		t.Fatal("the bundle was replaced by one that nobody vouched for")
	}
	put(key)
	e.as(ben, 0, "status")

	// A node's word that there is a newer bundle has none stored that is older than the one held.
	sealed := e.read("ben.bundle.signed")
	pinned, err := seal.ParseKey(key)
	if err != nil {
		t.Fatal(err)
	}
	held, err := identity.OpenKeptBundle(sealed, pinned, trustDomain)
	if err != nil {
		t.Fatal(err)
	}
	o, err := client.ReadOperator(ben)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := client.FetchBundle(t.Context(), trustDomain, o.Nodes[0], pinned, held.Number+1); fault.Of(err) != fault.Denied ||
		!strings.Contains(fault.Text(err), "an old one is not taken back") {
		t.Errorf("an older bundle: %v", err)
	}
}

// TestTheLogKeyIsKept: an operator's file without it gets it from a node that was recognised, once.
func TestTheLogKeyIsKept(t *testing.T) {
	e := newDomain(t)
	ben := e.joins("ben", "viewer")
	file := bytes.Replace(e.read("ben.yaml"), []byte("log_key: ben.log.pub\n"), nil, 1)
	if err := os.WriteFile(ben, file, 0o600); err != nil {
		t.Fatal(err)
	}
	want := e.read("ben.log.pub")
	e.as(ben, 0, "status")
	if got := e.read("log.pub"); !bytes.Equal(got, want) {
		t.Fatal("the key that was stored is not the log's")
	}
	e.as(e.ann(), 0, "ca", "prepare")
	e.as(e.ann(), 0, "ca", "activate", "prepared", "--without", "ben")
	e.as(ben, 0, "status")
}

// TestABundleIsReplacedAsAWhole: files that a crash left, or another command at the same time, cost another question at most.
func TestABundleIsReplacedAsAWhole(t *testing.T) {
	e := newDomain(t)
	ben := e.joins("ben", "viewer")
	e.as(e.ann(), 0, "ca", "prepare")
	old := e.read("ben.bundle.pem")
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			var out bytes.Buffer
			if got := run(t.Context(), []string{"status", "--context", ben}, strings.NewReader(""), &out, &out); got != 0 {
				t.Errorf("exit %d: %s", got, &out)
			}
		})
	}
	wg.Wait()
	if e.cas("ben.bundle.pem") != 2 {
		t.Fatal("the bundle is not whole")
	}
	e.as(e.ann(), 0, "ca", "activate", "prepared")
	// the one file is of before, or the other is damaged
	for name, b := range map[string][]byte{"ben.bundle.pem": old, "ben.bundle.signed": []byte("cut sho")} {
		if err := os.WriteFile(filepath.Join(e.dir, name), b, 0o600); err != nil {
			t.Fatal(err)
		}
		e.as(ben, 0, "status")
		if block, _ := pem.Decode(e.read("ben.bundle.pem")); block == nil || e.cas("ben.bundle.pem") != 2 {
			t.Fatalf("after %s: %d CAs", name, e.cas("ben.bundle.pem"))
		}
	}
}
