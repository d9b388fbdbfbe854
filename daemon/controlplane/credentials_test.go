// SPDX-License-Identifier: Apache-2.0

package controlplane_test

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	controlv1 "github.com/demarc-dev/demarc/api/control/v1"
	"github.com/demarc-dev/demarc/daemon/controlplane"
	"github.com/demarc-dev/demarc/daemon/controlplane/authority"
	"github.com/demarc-dev/demarc/daemon/controlplane/book"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/identity"
	"github.com/demarc-dev/demarc/identity/identitytest"
)

// keptNode is a node whose credentials are on disk: the first CA issues, another one is prepared.
func keptNode(t *testing.T) (n cnode, ca *identity.Authority, genesis book.Genesis, file, next string) {
	t.Helper()
	ca, genesis = firstCA(t)
	file = filepath.Join(t.TempDir(), authority.CredentialsFile)
	n = newNode(t, "cp-1", ca, nil)
	ok(t, n.source.SaveAt(file))
	must(t, &n.order, genesis)
	next = prepared(t, n)
	tends(t, n, func() bool { b, _ := os.ReadFile(file); return bytes.Contains(b, []byte(`"bundle"`)) })
	return n, ca, genesis, file, next
}

// tends has a node keep its credentials, until that is so.
func tends(t *testing.T, n cnode, holds func() bool) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- n.source.Tend(ctx) }()
	for end := time.Now().Add(time.Minute); !holds(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("the node keeps nothing")
		}
	}
	cancel()
	ok(t, <-done)
}

// issuedBy is the digest of the name of the CA that issued what a source shows.
func issuedBy(t *testing.T, source identity.Source) fleet.Digest {
	t.Helper()
	leaf, err := source.Leaf()
	ok(t, err)
	return fleet.DigestOf(leaf.Leaf.RawIssuer)
}

func nameOf(t *testing.T, n cnode, id string) fleet.Digest {
	t.Helper()
	for _, slot := range n.book.View().Slots {
		if string(slot.ID()) == id {
			cert, err := x509.ParseCertificate(slot.CertDER)
			ok(t, err)
			return fleet.DigestOf(cert.RawSubject)
		}
	}
	t.Fatalf("there is no CA %s", id)
	return ""
}

// A node starts with a book that is behind, from a snapshot in which all is sealed with a key-encryption key that is gone. It proves
// itself by what it kept: with a certificate of the CA that issues now, and trusts those that are trusted now (FAULTS.md I14).
func TestANodeProvesItselfWhileItsBookIsBehind(t *testing.T) {
	n, ca, genesis, file, next := keptNode(t)
	must(t, &n.order, book.NodeBundle{Name: "cp-1", Number: 2})
	_, err := n.Keys().ActivateAuthority(asOperator(t), connect.NewRequest(&controlv1.ActivateAuthorityRequest{Id: next}))
	ok(t, err)
	want := nameOf(t, n, next)
	snapshot, err := n.book.Snapshot() // the CA issues in it; its key is sealed with the old kek
	ok(t, err)
	var state bytes.Buffer
	_, err = snapshot.WriteTo(&state)
	ok(t, err)
	another := bytes.Repeat([]byte{9}, 32)
	kek := filepath.Join(t.TempDir(), "kek")
	ok(t, os.WriteFile(kek, make([]byte, 32), 0o600))
	ok(t, os.WriteFile(kek+".next", another, 0o600))
	ok(t, n.Authority().ReadKeys(authority.KEKFiles{Current: kek}))
	tends(t, n, func() bool {
		b, _ := os.ReadFile(file)
		return controlplane.OpenCredentials(b, domain, another) == nil && issuedBy(t, n.source) == want
	})
	shown, err := n.source.Leaf()
	ok(t, err)
	tends(t, n, func() bool { // and the certificate that it shows
		b, _ := os.ReadFile(file)
		return bytes.Contains(b, encoded(shown.Certificate[0]))
	})
	ok(t, os.WriteFile(kek, another, 0o600)) // the old one is destroyed
	ok(t, os.Remove(kek+".next"))

	for name, begin := range map[string]func(*testing.T, cnode){
		"no book":                     func(*testing.T, cnode) {},
		"a book of the first CA":      func(t *testing.T, n cnode) { must(t, &n.order, genesis) },
		"a snapshot of the old key's": func(t *testing.T, n cnode) { ok(t, n.book.Restore(bytes.NewReader(state.Bytes()))) },
	} {
		t.Run(name, func(t *testing.T) {
			again := nodeOf(t, "cp-1", ca, n.given, func(o *controlplane.Options) { o.KEK = another })
			ok(t, again.Authority().ReadKeys(authority.KEKFiles{Current: kek}))
			ok(t, again.source.SaveAt(file))
			begin(t, again)
			leaf, err := again.source.Leaf()
			ok(t, err)
			if !bytes.Equal(leaf.Certificate[0], shown.Certificate[0]) {
				t.Error("it shows another certificate than before")
			}
			if _, err := leaf.Leaf.Verify(x509.VerifyOptions{Roots: n.source.Roots(), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}); err != nil {
				t.Errorf("the others do not take it: %v", err)
			}
			if !again.source.Roots().Equal(n.source.Roots()) {
				t.Error("it trusts other CAs than before")
			}
			// Given a newer file, it has the CA that issues sign another certificate: with the key that it kept, for that of a book
			// with the same bundle does not open any more (MUTANTS.md: behind).
			given, err := identitytest.Leaf(ca, fleet.PrincipalOf(domain, fleet.Node, "cp-1"), time.Now().Add(time.Minute), time.Hour)
			ok(t, err)
			newer := nodeOf(t, "cp-1", ca, given, func(o *controlplane.Options) { o.KEK = another })
			ok(t, newer.Authority().ReadKeys(authority.KEKFiles{Current: kek}))
			ok(t, newer.source.SaveAt(copied(t, file)))
			begin(t, newer)
			leaf, err = newer.source.Leaf()
			if err != nil || bytes.Equal(leaf.Certificate[0], shown.Certificate[0]) || issuedBy(t, newer.source) != want {
				t.Errorf("a node that was given a newer file shows what it kept, or no certificate of the CA that issues: %v", err)
			}
		})
	}
}

// A node goes by what it kept while that is ahead of its book, or as far. A book that is newer counts at once, and one that has been found
// to be the newest counts in any case: it may have been set back, from a snapshot (MUTANTS.md: behind).
func TestANodeGoesByWhicheverIsNewer(t *testing.T) {
	n, ca, _, file, next := keptNode(t)
	page := func() []byte {
		snapshot, err := n.book.Snapshot()
		ok(t, err)
		var b bytes.Buffer
		_, err = snapshot.WriteTo(&b)
		ok(t, err)
		return b.Bytes()
	}
	older, first, before := page(), issuedBy(t, n.source), copied(t, file)
	must(t, &n.order, book.NodeBundle{Name: "cp-1", Number: 2})
	_, err := n.Keys().ActivateAuthority(asOperator(t), connect.NewRequest(&controlv1.ActivateAuthorityRequest{Id: next}))
	ok(t, err)
	second := nameOf(t, n, next)
	tends(t, n, func() bool {
		b, _ := os.ReadFile(file)
		shown, err := n.source.Leaf()
		return err == nil && issuedBy(t, n.source) == second && bytes.Contains(b, encoded(shown.Certificate[0]))
	})
	newer, after := page(), copied(t, file)
	for _, row := range []struct {
		name  string
		kept  string
		book  []byte
		found bool // to be the newest
		want  fleet.Digest
	}{
		{"what it kept is newer", after, older, false, second},
		{"the book is newer", before, newer, false, second},
		{"the book was set back, and is the newest that there is", after, older, true, first},
		{"the book is newer, and known to be", before, newer, true, second},
	} {
		again := nodeOf(t, "cp-1", ca, n.given, nil)
		ok(t, again.source.SaveAt(copied(t, row.kept)))
		ok(t, again.book.Restore(bytes.NewReader(row.book)))
		if row.found {
			tends(t, again, func() bool { return issuedBy(t, again.source) == row.want })
		}
		if got := issuedBy(t, again.source); got != row.want {
			t.Errorf("%s: it shows a certificate of CA %s, want %s", row.name, got.Short(), row.want.Short())
		}
	}
}

// copied is a copy of a file, for a node that writes to it.
func copied(t *testing.T, file string) string {
	t.Helper()
	b, err := os.ReadFile(file)
	ok(t, err)
	path := filepath.Join(t.TempDir(), filepath.Base(file))
	ok(t, os.WriteFile(path, b, 0o600))
	return path
}

// encoded is how bytes stand in the file.
func encoded(b []byte) []byte {
	out, _ := json.Marshal(b)
	return out
}

// A node that hears of no leader, and finds nobody who serves, shows its peers a certificate of each CA that it trusts, in turn; everybody
// else sees its own. It goes on while it hears of a leader that answers nothing. With a leader that answers it shows its own to all.
func TestANodeTriesEachOfItsCAs(t *testing.T) {
	n, _, _, _, next := keptNode(t)
	old, prepared := issuedBy(t, n.source), nameOf(t, n, next)
	shows := func(why string, wants ...fleet.Digest) {
		t.Helper()
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- n.source.CatchUp(ctx, 5*time.Millisecond) }()
		end := time.Now().Add(time.Minute)
		for _, want := range wants {
			for issuedBy(t, n.source.ToPeers()) != want {
				if time.Now().After(end) {
					t.Fatal(why)
				}
				if issuedBy(t, n.source) != old {
					t.Fatal("others than its peers see one of a CA that does not issue")
				}
				time.Sleep(time.Millisecond)
			}
		}
		cancel()
		ok(t, <-done)
	}
	n.lead = ""
	shows("it never shows a certificate of the prepared CA", prepared)
	n.lead, n.mute = "cp-1", true
	shows("it keeps to one certificate, though its leader does not answer", old, prepared, old, prepared)
	n.mute = false
	shows("it goes on showing another one, though its book is the newest", old)
}

// What a node kept is verified when it starts: by the vendor's log key, by the keys of the certificates, by the seal. What does not open
// with a key that the node holds is left alone.
func TestCredentialsAreVerified(t *testing.T) {
	_, ca, _, file, _ := keptNode(t)
	whole, err := os.ReadFile(file)
	ok(t, err)
	var doc map[string]json.RawMessage
	ok(t, json.Unmarshal(whole, &doc))
	with := func(name string, v any) []byte {
		other := map[string]json.RawMessage{}
		for k, raw := range doc {
			other[k] = raw
		}
		if v == nil {
			delete(other, name)
		} else {
			other[name], err = json.Marshal(v)
			ok(t, err)
		}
		b, err := json.Marshal(other)
		ok(t, err)
		return b
	}
	_, thief, err := ed25519.GenerateKey(rand.Reader)
	ok(t, err)
	forged, err := identity.SealCAs(domain, 9, [][]byte{ca.Cert.Raw}, fleet.DigestOf(ca.Cert.Raw), time.Now(), nil, thief)
	ok(t, err)
	begin := func(b []byte, kek []byte) error {
		ok(t, os.WriteFile(file, b, 0o600))
		return newNode(t, "cp-1", ca, func(o *controlplane.Options) { o.KEK = kek }).source.SaveAt(file)
	}
	ok(t, begin(whole, make([]byte, 32)))
	ok(t, begin(whole, bytes.Repeat([]byte{3}, 32)))
	for name, b := range map[string][]byte{
		"a bundle of another key": with("bundle", forged),
		"a certificate alone":     with("leaf", ca.Cert.Raw),
		"another version":         with("version", "demarc-node-credentials/9"),
		"an unknown field":        with("more", 1),
		"no bundle":               with("bundle", nil),
		"cut off":                 whole[:len(whole)/2],
		"empty":                   nil,
	} {
		if err := begin(b, make([]byte, 32)); err == nil || !strings.Contains(err.Error(), "remove it") {
			t.Errorf("%s: %v", name, err)
		}
	}
}
