// SPDX-License-Identifier: Apache-2.0

package controlplane

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/tls"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/demarc-dev/demarc/configs"
	"github.com/demarc-dev/demarc/daemon/controlplane/admission"
	"github.com/demarc-dev/demarc/daemon/controlplane/book"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/identity"
	"github.com/demarc-dev/demarc/identity/identitytest"
	"github.com/demarc-dev/demarc/ledger"
	"github.com/demarc-dev/demarc/mesh"
	"github.com/demarc-dev/demarc/mesh/meshtest"
)

// nobody orders nothing.
type nobody struct{}

func (nobody) Propose(context.Context, []byte) ([]byte, error) { return nil, admission.ErrStops }
func (nobody) Read(context.Context) error                      { return admission.ErrStops }
func (nobody) Leader() string                                  { return "" }

// spoken keeps what was logged.
type spoken struct {
	mu  sync.Mutex
	all strings.Builder
}

func (s *spoken) Write(b []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.all.Write(b)
}

func (s *spoken) count(words string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return strings.Count(s.all.String(), words)
}

// await waits until words were said so many times.
func (s *spoken) await(t *testing.T, words string, times int) {
	t.Helper()
	for end := time.Now().Add(time.Minute); s.count(words) < times; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("a minute later %q was said %d times, want %d", words, s.count(words), times)
		}
	}
}

// TestTailnetDoorComesBack: the door on the tailnet opens once the credentials' file holds what lets the node in, shuts when the
// node's key expires, opens again when the tailnet takes the node back, and ends with its context, also in the middle of a join.
func TestTailnetDoorComesBack(t *testing.T) {
	tn, err := meshtest.Start("key-for-tests")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = tn.Close() }()
	dir := t.TempDir()
	file := filepath.Join(dir, "key")
	put := func(s string) {
		if err := os.WriteFile(file, []byte(s), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	put("spent")
	now := time.Now()
	ca, err := identity.NewCA("acme.example", now, rand.Reader, identity.DefaultCALife)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := identitytest.Leaf(ca, fleet.PrincipalOf("acme.example", fleet.Node, "cp-1"), now, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	said := new(spoken)
	log := slog.New(slog.NewTextHandler(said, nil))
	s, err := NewServer(Options{Name: "cp-1", Book: book.NewBook(), Consensus: nobody{}, KEK: make([]byte, 32), LeafLife: time.Hour, Now: time.Now, Log: log})
	if err != nil {
		t.Fatal(err)
	}
	n := &node{log: log, server: s, cfg: &configs.Control{Tailnet: &configs.Tailnet{ControlURL: tn.URL, AuthKeyFile: file, Hostname: "cp-1", Dir: filepath.Join(dir, "node")}}}
	conf := &tls.Config{MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{*leaf}, NextProtos: admission.Protocols()}
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	ended := make(chan error, 1)
	ready := make(chan struct{})
	go func() { ended <- n.tailnetDoor(ctx, func() { close(ready) }, "7443", conf) }()
	<-ready // its trouble is not the node's

	peer, err := mesh.Join(t.Context(), mesh.TailnetConfig{ControlURL: tn.URL, Credentials: func() (mesh.Credentials, error) { return mesh.Credentials{AuthKey: tn.AuthKey}, nil },
		Hostname: "a", Dir: filepath.Join(dir, "peer"), Addresses: []string{"cp-1:7443"}, Wait: 2 * time.Second})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = peer.Close() }()
	shakes := func(bound time.Duration) (err error) {
		ctx, cancel := context.WithTimeout(t.Context(), bound)
		defer cancel()
		for ctx.Err() == nil {
			var c net.Conn
			if c, err = peer.Dial(ctx, ""); err == nil {
				one, end := context.WithTimeout(ctx, 3*time.Second)
				err = tls.Client(c, &tls.Config{InsecureSkipVerify: true, NextProtos: admission.Protocols()}).HandshakeContext(one) // who answers is not the question here
				end()
				_ = c.Close()
				if err == nil {
					return nil
				}
			}
		}
		return err
	}
	if shakes(3*time.Second) == nil {
		t.Fatal("the door is open with a spent key")
	}
	put(tn.AuthKey)
	if err := shakes(time.Minute); err != nil {
		t.Fatalf("the door is not open a minute after the key was replaced: %v", err)
	}
	shut := said.count("is shut")
	tn.ExpireAll(true)
	said.await(t, "is shut", shut+1)
	tn.ExpireAll(false)
	said.await(t, "is open", 2)
	silent, err := net.Listen("tcp4", "127.0.0.1:0") // accepts, and says nothing
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = silent.Close() }()
	stuck := &node{log: log, server: s, cfg: &configs.Control{Tailnet: &configs.Tailnet{ControlURL: "http://" + silent.Addr().String(), AuthKeyFile: file, Hostname: "cp-2", Dir: filepath.Join(dir, "stuck")}}}
	other := make(chan error, 1)
	go func() { other <- stuck.tailnetDoor(ctx, func() {}, "7443", conf) }()
	c, err := silent.Accept() // the join is under way
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	stop()
	for _, e := range []chan error{ended, other} {
		select {
		case err := <-e:
			if err != nil {
				t.Errorf("the door ended with %v", err)
			}
		case <-time.After(20 * time.Second):
			t.Error("the door did not end within 20 s")
		}
	}
}

// TestTailnetCredentialOfTheBook: a node whose file names a secret joins with what the book holds at that moment, and says where it
// holds none.
func TestTailnetCredentialOfTheBook(t *testing.T) {
	kek := bytes.Repeat([]byte{7}, 32)
	stored := book.NewBook()
	o := direct{stored: stored}
	s, err := NewServer(Options{Name: "cp-1", Book: stored, Consensus: &o, KEK: kek, LeafLife: time.Hour, Now: time.Now, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	n := &node{server: s, cfg: &configs.Control{TailnetSecret: "tailnet-oauth", Tailnet: &configs.Tailnet{}}}
	read := n.credentials(func() (mesh.Credentials, error) { t.Fatal("a file was read"); return mesh.Credentials{}, nil })
	if _, err := read(); fault.Of(err) != fault.NotFound {
		t.Fatalf("before it was put: %v", err)
	}
	id := s.authority.KEKNames()[0]
	submitted := func(c ledger.Change[book.State, book.Nothing]) {
		t.Helper()
		if _, err := ledger.Submit(t.Context(), &o, ledger.Meta{At: time.Now(), By: "test", Request: book.DrawRequestID()}, c); err != nil {
			t.Fatal(err)
		}
	}
	submitted(book.Genesis{TrustDomain: "acme.example", Slots: []identity.Slot{{Stage: identity.Active, CertDER: []byte("c"), SealedKey: []byte("k")}}})
	submitted(book.KeepSecrets{KEK: id, Secrets: []book.Secret{{Name: book.SecretLogKey, Sealed: []byte("l")}}})
	for value, want := range map[string]mesh.Credentials{"tskey-client-x\n": {ClientSecret: "tskey-client-x"}, "tskey-auth-y": {AuthKey: "tskey-auth-y"}} {
		sealed, err := identity.SealSecret("tailnet-oauth", []byte(value), kek, rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		submitted(book.PutSecret{KEK: id, Name: "tailnet-oauth", Sealed: sealed})
		if got, err := read(); err != nil || got != want {
			t.Fatalf("%+v, %v", got, err)
		}
	}
}

// direct is an order of one.
type direct struct {
	nobody
	stored *ledger.Book[book.State]
	n      uint64
}

func (d *direct) Propose(_ context.Context, data []byte) ([]byte, error) {
	d.n++
	return d.stored.Apply(d.n, data)
}
