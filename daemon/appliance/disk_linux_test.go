// SPDX-License-Identifier: Apache-2.0

package appliance_test

import (
	"bytes"
	"context"
	"crypto/rand"
	encpem "encoding/pem"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect"

	localv1 "github.com/demarc-dev/demarc/api/local/v1"
	"github.com/demarc-dev/demarc/api/local/v1/localv1connect"
	"github.com/demarc-dev/demarc/configs"
	"github.com/demarc-dev/demarc/daemon"
	"github.com/demarc-dev/demarc/daemon/appliance"
	"github.com/demarc-dev/demarc/daemon/appliance/book"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/grant"
	"github.com/demarc-dev/demarc/identity"
	"github.com/demarc-dev/demarc/ledger"
	"github.com/demarc-dev/demarc/manifest"
	"github.com/demarc-dev/demarc/workload/artifact"
)

// small is an appliance whose folder lies on a small file system of its own. Version 1.0.0 is deployed in its book.
type small struct {
	t     *testing.T
	cfg   *configs.Appliance
	local localv1connect.LocalClient
	log   *lines

	mu   sync.Mutex
	stop context.CancelFunc
	done chan error
}

func newSmall(t *testing.T) *small {
	t.Helper()
	if os.Getenv("DEMARC_DISK") == "" {
		t.Skip("needs root, and mounts small file systems: make test-disk")
	}
	disk := t.TempDir()
	if err := syscall.Mount("tmpfs", disk, "tmpfs", 0, "size=16m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(disk, syscall.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	beside := t.TempDir()
	file := func(name string, b []byte) string {
		p := filepath.Join(beside, name)
		if err := os.WriteFile(p, b, 0o600); err != nil {
			t.Fatal(err)
		}
		return p
	}
	keys := file("vendor.pub", pem(t, vendor))
	s := &small{t: t, log: &lines{}, cfg: &configs.Appliance{Name: "eu-1", Customer: "globex", TrustDomain: "acme.example",
		Dir:    filepath.Join(disk, "state"),
		Socket: filepath.Join(disk, "state", "appliance.sock"),
		ControlPlane: configs.Vendor{Addresses: []string{"127.0.0.1:1"}, BundleFile: file("bundle.pem", bundle(t)),
			ReleaseKeys: []string{keys}, Operators: []configs.Operator{{Name: "ann", Keys: []string{file("ann.pub", pem(t, ann))}}}},
		Transports: []configs.Transport{{Name: "https", Kind: configs.HTTPS}},
		Runtime:    configs.Runtime{Kind: configs.RuntimeProcess}, Secrets: configs.Secrets{Kind: configs.SecretsFiles, Dir: beside},
		Ingress: configs.Ingress{Host: "127.0.0.1"}}}
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", s.cfg.Socket)
	}
	s.local = localv1connect.NewLocalClient(&http.Client{Transport: &http.Transport{DialContext: dial, DisableKeepAlives: true}},
		"http://local")
	s.history()
	t.Cleanup(s.end)
	return s
}

func bundle(t *testing.T) []byte {
	t.Helper()
	ca, err := identity.NewCA("acme.example", time.Now(), rand.Reader, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	return encpem.EncodeToMemory(&encpem.Block{Type: "CERTIFICATE", Bytes: ca.Cert.Raw})
}

// history writes the book of an appliance on which a program runs for ever.
func (s *small) history() {
	t := s.t
	t.Helper()
	if err := os.MkdirAll(s.cfg.Dir, 0o700); err != nil {
		t.Fatal(err)
	}
	program := t.TempDir()
	if err := os.WriteFile(filepath.Join(program, "run"), []byte("#!/bin/sh\nexec sleep 3600\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	var packed bytes.Buffer
	digest, err := artifact.Pack(program, &packed)
	if err != nil {
		t.Fatal(err)
	}
	store, err := artifact.Open(filepath.Join(s.cfg.Dir, "artifacts"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := store.Put(t.Context(), digest, &packed); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(filepath.Join(s.cfg.Dir, "book"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	o := newBookOn(t, func(b *ledger.Book[book.State]) ledger.Proposer {
		local, _, err := ledger.OpenLocal(f, b)
		if err != nil {
			t.Fatal(err)
		}
		return local
	})
	rel := manifest.Release{App: "sleeper", Version: "1.0.0", Artifacts: map[string]fleet.Digest{"app": digest},
		Compose: "x-demarc: {app: sleeper, version: 1.0.0}\nservices:\n  app:\n    command: [run]\n    x-demarc: {artifact: app}\n"}
	must(t, o, book.Pin{Public: pem(t, customer)})
	if why := take(t, o, book.Take{Release: sealed(t, rel, vendor)}); why != "" {
		t.Fatal(why)
	}
	must(t, o, consent(t, granted(fleet.Install, 0), customer))
	must(t, o, consent(t, granted(fleet.Deploy, 0), customer))
	id := must(t, o, consent(t, o.approval(t, ""), customer)).ID
	must(t, o, book.BeginDeploy{Approval: id})
	must(t, o, book.EndDeploy{Approval: id, State: fleet.StateDeployed})
}

// begin starts the program.
func (s *small) begin() {
	t := s.t
	t.Helper()
	log := slog.New(slog.NewTextHandler(s.log, nil))
	ctx, cancel := context.WithCancel(context.Background())
	parts, err := appliance.Parts(ctx, s.cfg, "test", log)
	if err != nil {
		t.Fatalf("it does not start: %v", err)
	}
	done := make(chan error, 1)
	go func() { done <- daemon.Run(ctx, log, parts...) }()
	s.stop, s.done = cancel, done
}

func (s *small) end() {
	if s.stop == nil {
		return
	}
	s.stop()
	if err := <-s.done; err != nil {
		s.t.Errorf("it ended with %v", err)
	}
	s.stop = nil
}

func (s *small) until(what string, is func(*localv1.StatusResponse) bool) *localv1.StatusResponse {
	s.t.Helper()
	limit := time.After(time.Minute)
	for {
		m, err := s.local.Status(s.t.Context(), connect.NewRequest(&localv1.StatusRequest{}))
		if err == nil && is(m.Msg) {
			return m.Msg
		}
		select {
		case err := <-s.done:
			s.t.Fatalf("%s: it ended with %v\n%s", what, err, s.log.text())
		case <-limit:
			s.t.Fatalf("it does not come to be: %s: %v, %v\n%s", what, m, err, s.log.text())
		case <-time.After(20 * time.Millisecond): // between two looks
		}
	}
}

func runs(m *localv1.StatusResponse) bool {
	return len(m.GetServices()) == 1 && m.GetServices()[0].GetHealthy() && m.GetServices()[0].GetPid() != 0
}

func (s *small) ballast() string { return filepath.Join(filepath.Dir(s.cfg.Dir), "ballast") }

func (s *small) fill() {
	s.t.Helper()
	f, err := os.OpenFile(s.ballast(), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		s.t.Fatal(err)
	}
	defer f.Close()
	for b := make([]byte, 4096); err == nil; {
		_, err = f.Write(b)
	}
	if !errors.Is(err, syscall.ENOSPC) {
		s.t.Fatal(err)
	}
}

func (s *small) space() {
	s.t.Helper()
	if err := os.Remove(s.ballast()); err != nil {
		s.t.Fatal(err)
	}
}

func (s *small) revoke() error {
	c := consent(s.t, grant.Revoke{Appliance: "eu-1", Phase: fleet.Deploy, At: time.Now(), Nonce: nonce()}, customer)
	_, err := s.local.Submit(s.t.Context(), connect.NewRequest(&localv1.SubmitRequest{Document: c.Document}))
	return err
}

// FAULTS.md J1: after one failed write the book took nothing until the process was started again, and the log filled.
func TestAFullDiskIsOverWhenThereIsSpace(t *testing.T) {
	s := newSmall(t)
	s.begin()
	pid := s.until("the application runs", runs).GetServices()[0].GetPid()
	for round := range 3 {
		s.fill()
		for i := range 5 {
			err := s.revoke()
			if err == nil {
				continue // there was room in the last block
			}
			if connect.CodeOf(err) != connect.CodeUnavailable || !strings.Contains(err.Error(), "the disk is full") {
				t.Fatalf("round %d, %d: the customer is told %v", round, i, err)
			}
		}
		full := s.until("status says why", func(m *localv1.StatusResponse) bool {
			return strings.Contains(m.GetBookFailed(),
				"the disk is full")
		})
		if !runs(full) || full.GetServices()[0].GetPid() != pid {
			t.Fatalf("the application did not go on: %v", full)
		}
		s.space()
		s.until("it is over by itself", func(m *localv1.StatusResponse) bool { return m.GetBookFailed() == "" })
		if err := s.revoke(); err != nil {
			t.Fatal(err)
		}
	}
	if n := strings.Count(s.log.text(), "level=ERROR"); n > 6 {
		t.Fatalf("%d lines of errors in three rounds:\n%s", n, s.log.text())
	}
}

// FAULTS.md J2: demarcd panicked when it was started on a full disk, and its unit's watchdog made an outage of that.
func TestItStartsOnAFullDisk(t *testing.T) {
	s := newSmall(t)
	s.begin()
	s.until("the application runs", runs)
	s.fill()
	for s.revoke() == nil { // until the last block of the book is used up
	}
	s.end()
	// The customer takes an operator's key out of the file at this moment: what the disk can't take yet must hold all the same.
	s.cfg.ControlPlane.Operators = nil
	s.begin()
	s.until("the application runs, and status says why the book does not", func(m *localv1.StatusResponse) bool {
		return runs(m) && strings.Contains(m.GetBookFailed(), "the disk is full")
	})
	if err := s.revoke(); connect.CodeOf(err) != connect.CodeUnavailable || !strings.Contains(err.Error(), "the disk is full") {
		t.Fatalf("the customer is told %v", err)
	}
	s.space()
	before := s.until("it is over by itself", func(m *localv1.StatusResponse) bool { return m.GetBookFailed() == "" })
	if err := s.revoke(); err != nil {
		t.Fatal(err)
	}
	log, err := s.local.ListLog(t.Context(), connect.NewRequest(&localv1.ListLogRequest{From: before.GetAuditSize() - 1, Limit: 10}))
	if err != nil || !bytes.Contains(bytes.Join(log.Msg.GetEntries(), nil), []byte((book.SetSite{}).Kind())) {
		t.Fatalf("the file's keys are not on record before what came after: %v, %q", err, log.Msg.GetEntries())
	}
	if strings.Contains(s.log.text(), "panic") {
		t.Fatal(s.log.text())
	}
}

// lines is a log that is read meanwhile.
type lines struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lines) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(b)
}

func (l *lines) text() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}
