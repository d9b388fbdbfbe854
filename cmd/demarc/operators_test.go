// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/demarc-dev/demarc/daemon/controlplane"
	"github.com/demarc-dev/demarc/daemon/controlplane/admission"
	"github.com/demarc-dev/demarc/daemon/controlplane/book"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/identity"
	"github.com/demarc-dev/demarc/ledger"
)

// oneNode is the consensus of a cluster of one node.
type oneNode struct {
	mu   sync.Mutex
	n    uint64
	book *ledger.Book[book.State]
}

func (o *oneNode) Propose(_ context.Context, data []byte) ([]byte, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if err := o.book.DryRun(data); err != nil {
		return nil, err
	}
	o.n++
	return o.book.Apply(o.n, data)
}
func (*oneNode) Read(context.Context) error { return nil }
func (*oneNode) Leader() string             { return "cp-1" }

// domain is a trust domain as demarc control-plane init makes it, with its one node running in this process.
type domain struct {
	t   *testing.T
	dir string
	one *oneNode
}

func newDomain(t *testing.T) *domain {
	t.Helper()
	return newDomainWith(t, func(*controlplane.Options) {})
}

func newDomainWith(t *testing.T, set func(*controlplane.Options)) *domain {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	e := &domain{t: t, dir: filepath.Join(t.TempDir(), "acme"), one: &oneNode{book: book.NewBook()}}
	e.types("", 0, "control-plane", "init", "--dir", e.dir, "--trust-domain", trustDomain, "--operator", "ann", "--node",
		"cp-1=127.0.0.1:1,"+ln.Addr().String())
	var genesis book.GenesisWith
	if err := json.Unmarshal(e.read("genesis.json"), &genesis); err != nil {
		t.Fatal(err)
	}
	if _, err := ledger.Submit(t.Context(), e.one, ledger.Meta{At: time.Now(), By: "test", Request: "genesis"}, genesis); err != nil {
		t.Fatal(err)
	}
	log := slog.New(slog.DiscardHandler)
	o := controlplane.Options{Name: "cp-1", Book: e.one.book, Consensus: e.one, KEK: e.read("kek"), LeafLife: time.Hour, Now: time.Now,
		Log: log}
	set(&o)
	s, err := controlplane.NewServer(o)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := tls.X509KeyPair(e.read("cp-1/cert.pem"), e.read("cp-1/cert.key"))
	if err != nil {
		t.Fatal(err)
	}
	cas, err := identity.ParseBundle(e.read("bundle.pem"), trustDomain)
	if err != nil {
		t.Fatal(err)
	}
	source, err := s.Authority().NewSource(&leaf, identity.Pool(cas))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { _ = s.Follow(ctx, func() {}) })
	wg.Go(func() {
		_ = s.Listener("door", ln, identity.Server(source, s.Admit, false, admission.Protocols()...), log).Run(ctx, func() {})
	})
	t.Cleanup(func() { cancel(); wg.Wait() })
	return e
}

func (e *domain) read(name string) []byte {
	e.t.Helper()
	b, err := os.ReadFile(filepath.Join(e.dir, name))
	if err != nil {
		e.t.Fatal(err)
	}
	return b
}

// types runs a command line and returns both outputs.
func (e *domain) types(stdin string, exit int, args ...string) string {
	e.t.Helper()
	var out, errs bytes.Buffer
	if got := run(e.t.Context(), args, strings.NewReader(stdin), &out, io.MultiWriter(&errs, &out)); got != exit {
		e.t.Fatalf("demarc %s: exit %d, want %d\n%s%s", strings.Join(args, " "), got, exit, &out, &errs)
	}
	return out.String()
}

func (e *domain) as(file string, exit int, args ...string) string {
	e.t.Helper()
	return e.types("", exit, append(args, "--context", file)...)
}

// TestOperatorsByCommand is the whole life of an operator as people type it, against a real listener.
func TestOperatorsByCommand(t *testing.T) {
	e := newDomain(t)
	ann, ben := filepath.Join(e.dir, "operator", "operator.yaml"), filepath.Join(e.dir, "ben.yaml")
	invitation := filepath.Join(e.dir, "ben.invitation")
	has := func(out string, want ...string) {
		t.Helper()
		for _, w := range want {
			if !strings.Contains(out, w) {
				t.Fatalf("%q is not in\n%s", w, out)
			}
		}
	}
	has(e.as(ann, 2, "operator", "invite", "ben"), "viewer, deployer, operator or admin")
	has(e.as(ann, 2, "operator", "invite", "ben", "--role", "root"), "is no role")
	has(e.as(ann, 2, "operator", "invite", "ben", "--role", "viewer", "--valid", "1000h"), "--valid")
	has(e.as(ann, 0, "operator", "invite", "ben", "--role", "viewer", "--valid", "24h", "--out", invitation), "demarc operator accept")
	// and the one that is handed out stays good
	has(e.as(ann, 1, "operator", "invite", "ben", "--role", "viewer", "--out", invitation), "nothing is overwritten")
	if got, err := os.ReadFile(invitation); err != nil || !strings.Contains(e.as(ann, 0, "operator", "show", "ben"), "invited") ||
		len(got) == 0 {
		t.Fatalf("the invitation: %v", err)
	}
	again := e.as(ann, 0, "operator", "invite", "ben", "--role", "viewer")
	has(e.types("", 3, "operator", "accept", invitation, "--out", ben), "no such invitation")
	if left, _ := filepath.Glob(filepath.Join(e.dir, "ben.*")); !slices.Equal(left, []string{invitation}) {
		t.Fatalf("a refused acceptance left %q", left)
	}
	has(e.types("nonsense", 1, "operator", "accept", "-", "--out", ben), "this is no invitation")
	has(e.types(again[:60]+"\n", 1, "operator", "accept", "-", "--out", ben), "cut short")
	has(e.types(again, 2, "operator", "accept", "-"), "--out")
	has(e.types(again, 0, "operator", "accept", "-", "--out", ben), "you are operator ben with the role viewer")
	has(e.types(again, 1, "operator", "accept", "-", "--out", ben), "nothing is overwritten")
	for _, f := range []string{"ben.yaml", "ben.key", "ben.cert.pem", "ben.signing.key", "ben.request.key", "ben.recipient.key"} {
		if fi, err := os.Stat(filepath.Join(e.dir, f)); err != nil || fi.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v", f, fi.Mode(), err)
		}
	}
	has(e.as(ben, 0, "operator", "list"), "ann", "admin", "ben", "viewer", "active", "operator/ann")
	has(e.as(ben, 0, "operator", "show", "ben", "-o", "json"), `"role": "viewer"`, `"by": "spiffe://acme.example/operator/ann"`,
		`"via": "invitation"`)
	has(e.as(ben, 1, "operator", "show", "eve"), "there is no operator")
	has(e.as(ben, 3, "customer", "add", "globex"), "needs the role operator, and yours is viewer")
	has(e.as(ben, 3, "operator", "ban", "ann"), "needs the role admin")
	has(e.as(ann, 0, "operator", "role", "ben", "--role", "operator"), "operator ben is an operator now")
	has(e.as(ben, 0, "customer", "add", "globex"), "is registered")
	has(e.as(ben, 0, "operator", "renew"), "is valid until")
	has(e.as(ben, 0, "customer", "add", "initech"), "is registered")
	has(e.as(ann, 1, "operator", "remove", "ann"), "the last admin")
	has(e.types("", 0, "__complete", "operator", "ban", "--context", ann, ""), "ben\toperator, active")
	has(e.as(ann, 0, "operator", "ban", "ben", "--reason", "laptop stolen"), "is banned")
	has(e.as(ben, 3, "status", "--timeout", "5s"), "refused this operator's certificate")
	has(e.as(ann, 0, "operator", "show", "ben"), "banned", "laptop stolen")
	has(e.as(ann, 0, "operator", "remove", "ben"), "is removed")
	if o, err := e.one.book.View().Operator("ann"); err != nil || o.Via != book.ViaInit || o.Role != fleet.Admin {
		t.Fatalf("%+v, %v", o, err)
	}
}

// TestAcceptKnowsWhoAnswers: the secret's proof goes to nobody but the control plane that the invitation names.
func TestAcceptKnowsWhoAnswers(t *testing.T) {
	e, evil := newDomain(t), newDomain(t)
	ann, out := filepath.Join(e.dir, "operator", "operator.yaml"), filepath.Join(e.dir, "ben.yaml")
	i, err := identity.ParseInvitation([]byte(e.as(ann, 0, "operator", "invite", "ben", "--role", "admin")))
	if err != nil {
		t.Fatal(err)
	}
	other, err := identity.ParseInvitation([]byte(evil.as(filepath.Join(evil.dir, "operator", "operator.yaml"), 0, "operator", "invite",
		"ben", "--role", "admin")))
	if err != nil {
		t.Fatal(err)
	}
	good := i.Nodes
	i.Nodes = other.Nodes // of the same trust domain's name, with other keys
	line, err := i.Encode()
	if err != nil {
		t.Fatal(err)
	}
	size := evil.one.book.Log().Size()
	if got := e.types(line, 3, "operator", "accept", "-", "--out", out); !strings.Contains(got, "is not the control plane of the invitation") {
		t.Fatal(got)
	}
	if evil.one.book.Log().Size() != size {
		t.Fatal("another control plane was asked to take the invitation")
	}
	i.Nodes = append(other.Nodes, good...) // the right one comes second
	if line, err = i.Encode(); err != nil {
		t.Fatal(err)
	}
	e.types(line, 0, "operator", "accept", "-", "--out", out)
}

// TestNothingIsUploadedForNobody: a release for an appliance that is not registered is refused before its artifacts are uploaded.
func TestNothingIsUploadedForNobody(t *testing.T) {
	e := newDomain(t)
	app := filepath.Join(e.dir, "app")
	compose := "x-demarc: {app: notes, version: 1.0.0}\nservices:\n  web:\n    command: [web]\n    x-demarc: {artifact: web}\n"
	if err := os.MkdirAll(filepath.Join(app, "web"), 0o700); err != nil {
		t.Fatal(err)
	}
	for name, b := range map[string]string{"compose.yaml": compose, "web/web": "#!/bin/sh\n"} {
		if err := os.WriteFile(filepath.Join(app, name), []byte(b), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	out := e.as(e.ann(), 1, "release", "publish", "--compose", filepath.Join(app, "compose.yaml"), "--appliance", "nobody")
	has(t, out, `no appliance "nobody" is registered`)
	if strings.Contains(out, "web:") {
		t.Errorf("it was uploaded:\n%s", out)
	}
}

// TestAVariableIsSetOnce: of two values for one variable neither is taken in silence.
func TestAVariableIsSetOnce(t *testing.T) {
	e := newDomain(t)
	template := filepath.Join(e.dir, "state.yaml")
	const text = "version: demarc-template/1\nname: state\nabout: the state\nkind: exec\nservice: web\ntier: operate.read\n" +
		"argv: [web, state]\ntimeout: 5s\noutput: 1024\n"
	if err := os.WriteFile(template, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	has(t, e.as(e.ann(), 2, "operation", "request", "--appliance", "eu-1", "--template", template, "--var", "a=1", "--var", "a=2"),
		"--var a is set twice")
}
