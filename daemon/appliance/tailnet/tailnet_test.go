// SPDX-License-Identifier: Apache-2.0

package tailnet

import (
	"context"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/mesh"
	"github.com/demarc-dev/demarc/mesh/meshtest"
)

// TestTailnetRoute: no dial waits longer than its own context while the coordinator is silent, and none holds up another; the
// route comes up by itself once the tailnet lets it in; and a key that expires is replaced from the file.
func TestTailnetRoute(t *testing.T) {
	tn, err := meshtest.Start("key-for-tests")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = tn.Close() }()
	silent, err := net.Listen("tcp4", "127.0.0.1:0") // accepts, and says nothing
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = silent.Close() }()
	path := filepath.Join(t.TempDir(), "key")
	put := func(s string) {
		if err := os.WriteFile(path, []byte(s), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	put(tn.AuthKey)
	files := mesh.CredentialFiles{AuthKey: path}

	away := NewTransport(mesh.TailnetConfig{ControlURL: "http://" + silent.Addr().String(), Credentials: files.Read, Hostname: "a",
		Dir: t.TempDir()})
	ends := make(chan error, 4)
	from := time.Now()
	for range cap(ends) {
		go func() {
			ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
			defer cancel()
			_, err := away.Dial(ctx, "")
			ends <- err
		}()
	}
	for range cap(ends) {
		if err := <-ends; fault.Of(err) != fault.Unavailable || !strings.Contains(err.Error(), "not joined yet") {
			t.Errorf("Dial with a silent coordinator = %v", err)
		}
	}
	if took := time.Since(from); took > 5*time.Second {
		t.Errorf("four dials of half a second took %s", took)
	}
	away.Close()
	if _, err := away.Dial(t.Context(), ""); fault.Of(err) != fault.Unavailable {
		t.Errorf("Dial after close = %v", err)
	}

	vendor, err := mesh.Join(t.Context(), mesh.TailnetConfig{ControlURL: tn.URL, Credentials: files.Read, Hostname: "cp", Dir: t.TempDir(),
		Doors: true})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = vendor.Close() }()
	l, err := vendor.Listen(t.Context(), ":7443")
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			_ = c.Close()
		}
	}()
	to := net.JoinHostPort(vendor.Addrs()[0].String(), "7443")
	r := NewTransport(mesh.TailnetConfig{ControlURL: tn.URL, Credentials: files.Read, Hostname: "a", Dir: t.TempDir(),
		Addresses: []string{to}, Wait: 30 * time.Second})
	defer r.Close()
	put("spent")
	if _, err := r.Dial(t.Context(), ""); fault.Of(err) != fault.Denied {
		t.Fatalf("Dial with a spent key = %v, want denied", err)
	}
	put(tn.AuthKey) // nobody restarts anything
	c, err := r.Dial(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	_ = c.Close()
	old := r.node
	tn.ExpireAll(true)
	select {
	case <-old.Gone():
	case <-time.After(30 * time.Second):
		t.Fatal("the end of the key was not noticed")
	}
	tn.ExpireAll(false)
	n, err := r.Up(t.Context())
	if err != nil || n == old {
		t.Fatalf("after the key expired: %p, before %p, %v", n, old, err)
	}
}
