// SPDX-License-Identifier: Apache-2.0

package daemon_test

import (
	"bytes"
	"context"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/demarc-dev/demarc/daemon"
	"github.com/demarc-dev/demarc/fault"
)

func TestSocket(t *testing.T) {
	path := filepath.Join(t.TempDir(), "run", "x.sock")
	ln, err := daemon.Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	if fi, err := os.Stat(path); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("mode = %v (%v), want 0600", fi.Mode(), err)
	}
	if _, err := daemon.Listen(path); fault.Of(err) != fault.Conflict {
		t.Errorf("a socket in use: %v, want conflict", err)
	}
	if err := ln.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(path); !os.IsNotExist(err) {
		t.Errorf("the socket is still there after Close: %v", err)
	}
	// One that a killed process left behind.
	stale, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	stale.(*net.UnixListener).SetUnlinkOnClose(false)
	stale.Close()
	ln, err = daemon.Listen(path)
	if err != nil {
		t.Fatalf("a stale socket: %v", err)
	}
	ln.Close()
	if err := os.WriteFile(path, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := daemon.Listen(path); fault.Of(err) != fault.Conflict {
		t.Errorf("a file in the way: %v, want conflict", err)
	}
}

// FAULTS.md J3: the socket's file was removed, by a cleaner of old files, and the customer could not revoke until a restart.
func TestASocketThatIsRemovedComesBack(t *testing.T) {
	path := filepath.Join(t.TempDir(), "run", "x.sock")
	s, err := daemon.Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	held := make(chan struct{})
	h := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/slow" {
			_ = http.NewResponseController(w).Flush()
			<-held
		}
		_, _ = io.WriteString(w, "ok")
	})
	var said lines
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		log := slog.New(slog.NewTextHandler(&said, nil))
		done <- daemon.Run(ctx, log, s.HTTP("socket", h, log))
	}()
	tr := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", path)
	}, DisableKeepAlives: true}
	client := &http.Client{Transport: tr}
	ask := func() bool {
		res, err := client.Get("http://socket/")
		if err != nil {
			return false
		}
		defer res.Body.Close()
		b, _ := io.ReadAll(res.Body)
		return string(b) == "ok"
	}
	back := func(what string) {
		t.Helper()
		for !ask() {
			if t.Context().Err() != nil {
				t.Fatalf("%s: it does not come back", what)
			}
			time.Sleep(10 * time.Millisecond) // between two looks
		}
		if fi, err := os.Lstat(path); err != nil || fi.Mode().Perm() != 0o600 {
			t.Fatalf("%s: mode %v, %v", what, fi.Mode(), err)
		}
	}
	back("at first")
	slow, err := client.Get("http://socket/slow")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	back("the file is removed")
	if err := os.RemoveAll(filepath.Dir(path)); err != nil {
		t.Fatal(err)
	}
	back("the folder is removed")
	// Somebody else's file in its place is left alone, and told of once.
	theirs := filepath.Join(t.TempDir(), "theirs")
	if err := os.WriteFile(theirs, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(theirs, path); err != nil {
		t.Fatal(err)
	}
	for !bytes.Contains(said.bytes(), []byte("is not a socket")) {
		time.Sleep(10 * time.Millisecond)
	}
	if b, _ := os.ReadFile(path); string(b) != "precious" {
		t.Fatal("a file of somebody else's was replaced")
	}
	_ = os.Remove(path)
	back("the file of somebody else's is away")
	close(held) // a call that came over the first socket ends as it would have
	if b, err := io.ReadAll(slow.Body); err != nil || string(b) != "ok" {
		t.Fatalf("a call under way: %q, %v", b, err)
	}
	slow.Body.Close()
	cancel()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(path); !os.IsNotExist(err) {
		t.Fatalf("the socket is still there after the end: %v", err)
	}
}

// lines is a writer that may be read meanwhile.
type lines struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lines) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(b)
}

func (l *lines) bytes() []byte {
	l.mu.Lock()
	defer l.mu.Unlock()
	return bytes.Clone(l.b.Bytes())
}
