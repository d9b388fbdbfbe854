// SPDX-License-Identifier: Apache-2.0

package controlplane

import (
	"crypto/rand"
	"encoding/json"
	"log/slog"
	"testing"
	"time"

	"github.com/demarc-dev/demarc/daemon/controlplane/book"
	"github.com/demarc-dev/demarc/daemon/controlplane/evidence"
	"github.com/demarc-dev/demarc/identity"
)

// TestAWordAboutABundleIsTakenLater: a node that is behind keeps what an appliance said that it holds, and puts it on
// record once its own book has that bundle. The appliance does not say it twice on one channel.
func TestAWordAboutABundleIsTakenLater(t *testing.T) {
	o := &alone{book: book.NewBook()}
	s, err := NewServer(Options{Name: "cp-1", Book: o.book, Consensus: o, KEK: make([]byte, 32), Now: time.Now, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	ca := func() *identity.Authority {
		t.Helper()
		ca, err := identity.NewCA(innerDomain, time.Now(), rand.Reader, identity.DefaultCALife)
		if err != nil {
			t.Fatal(err)
		}
		return ca
	}
	tell(t, s, book.Genesis{TrustDomain: innerDomain, Slots: []identity.Slot{{Stage: identity.Active, CertDER: ca().Cert.Raw, SealedKey: []byte("k")}}})
	tell(t, s, book.RegisterCustomer{Name: "globex"})
	tell(t, s, book.RegisterAppliance{Name: "eu-1", Customer: "globex", Expect: []byte(`{}`)})
	tell(t, s, book.Enrol{Name: "eu-1", Nonce: "n", NonceTill: time.Now().Add(time.Hour), Serial: "s1", Till: time.Now().Add(time.Hour), LogKey: []byte("k")})
	l := &live{s: s, name: "eu-1", serial: "s1", by: "test"}
	l.busy.Store(running) // nobody writes on it
	s.channels.open["eu-1"] = l
	tell(t, s, book.Edge{Name: "eu-1", Serial: "s1", Online: true, Node: "cp-1"})
	if err := s.holds(t.Context(), l, 2); err != nil {
		t.Fatal(err)
	}
	held := func() uint64 { a, _ := s.replica.View().Appliance("eu-1"); return a.Bundle }
	if held() != 0 {
		t.Fatal("a bundle that the book does not know is on record")
	}
	done := make(chan struct{})
	go func() { defer close(done); _ = s.Follow(t.Context(), func() {}) }()
	tell(t, s, book.PrepareCA{Cert: ca().Cert.Raw, SealedKey: []byte("k")})
	for end := time.Now().Add(30 * time.Second); held() != 2; {
		changed := s.replica.Changed()
		if held() == 2 {
			break
		}
		select {
		case <-changed:
		case <-time.After(time.Until(end)):
			t.Fatalf("the book says that it holds %d, want 2", held())
		}
	}
}

// TestRenewalsAreNoNews: certificates that are renewed leave a log at rest, else a large fleet would never be quiet.
func TestRenewalsAreNoNews(t *testing.T) {
	s, _ := begun(t)
	slot := s.replica.View().Slots[0].ID()
	var n evidence.Growth
	n.Read(s.replica.Log())
	upto := n.Upto
	tell(t, s, book.Renew{Name: "eu-1", Using: "s1", Serial: "s2", Till: time.Now().Add(time.Hour)})
	tell(t, s, book.RenewBy{Renew: book.Renew{Name: "eu-1", Using: "s1", Serial: "s3", Till: time.Now().Add(time.Hour)}, Issuer: slot})
	tell(t, s, book.NodeBundle{Name: "cp-1", Number: 1})
	if n.Read(s.replica.Log()); n.Upto != upto || n.Seen != s.replica.Log().Size() {
		t.Errorf("news up to %d, want %d, of %d", n.Upto, upto, n.Seen)
	}
	tell(t, s, book.Ban{Name: "eu-1", Reason: "lost"})
	if n.Read(s.replica.Log()); n.Upto != s.replica.Log().Size() {
		t.Error("a ban is no news")
	}
	var e struct {
		Kind string `json:"kind"`
	}
	if err := json.Unmarshal(s.replica.Log().Entry(n.Upto-1), &e); err != nil || e.Kind != (book.Ban{}).Kind() {
		t.Errorf("%v, %q", err, e.Kind)
	}
}
