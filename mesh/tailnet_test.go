// SPDX-License-Identifier: Apache-2.0

package mesh_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/mesh"
	"github.com/demarc-dev/demarc/mesh/meshtest"
)

func tailnet(t *testing.T) *meshtest.Tailnet {
	t.Helper()
	tn, err := meshtest.Start("key-for-tests")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := tn.Close(); err != nil {
			t.Error(err)
		}
	})
	return tn
}

// key gives an auth key as credentials.
func key(k string) func() (mesh.Credentials, error) {
	return func() (mesh.Credentials, error) { return mesh.Credentials{AuthKey: k}, nil }
}

func join(t *testing.T, tn *meshtest.Tailnet, cfg mesh.TailnetConfig) *mesh.Node {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	cfg.ControlURL, cfg.Credentials, cfg.Dir, cfg.Ephemeral = tn.URL, key(tn.AuthKey), t.TempDir(), true
	n, err := mesh.Join(ctx, cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := n.Close(); err != nil {
			t.Error(err)
		}
	})
	return n
}

// greet serves one line to each caller: who it is, as the tailnet says.
func greet(t *testing.T, n *mesh.Node, l net.Listener) {
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			p, err := n.WhoIs(context.Background(), netip.MustParseAddrPort(c.RemoteAddr().String()))
			_, _ = fmt.Fprintf(c, "%s %v\n", p.Node, err)
			_ = c.Close()
		}
	}()
}

func TestTailnet(t *testing.T) {
	tn := tailnet(t)
	control := join(t, tn, mesh.TailnetConfig{Hostname: "control", Doors: true})
	l, err := control.Listen(t.Context(), ":8443")
	if err != nil {
		t.Fatal(err)
	}
	greet(t, control, l)
	to := net.JoinHostPort(control.Addrs()[0].String(), "8443")
	closed := net.JoinHostPort(control.Addrs()[0].String(), "8444")
	appliance := join(t, tn, mesh.TailnetConfig{Hostname: "appliance",
		Addresses: []string{to, net.JoinHostPort(control.Addrs()[0].String(), "9443"), "192.0.2.77:80"}, Wait: 30 * time.Second})

	c, err := appliance.Dial(t.Context(), to)
	if err != nil {
		t.Fatal(err)
	}
	line, err := io.ReadAll(c)
	_ = c.Close()
	if err != nil || !strings.Contains(string(line), "appliance") || !strings.Contains(string(line), "<nil>") {
		t.Errorf("WhoIs of the caller = %q, %v", line, err)
	}
	if _, err := appliance.Dial(t.Context(), closed); fault.Of(err) != fault.Denied {
		t.Errorf("Dial of what is not listed = %v, want denied", err)
	}
	if _, err := appliance.Listen(t.Context(), ":80"); fault.Of(err) != fault.Denied {
		t.Errorf("Listen of a node without doors = %v, want denied", err)
	}
	if _, err := control.WhoIs(t.Context(), netip.MustParseAddrPort("100.64.99.99:1")); fault.Of(err) != fault.NotFound {
		t.Errorf("WhoIs of nobody = %v, want not_found", err)
	}
	// A listed host that is no peer is not reached through the host's own network.
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if _, err := appliance.Dial(ctx, "192.0.2.77:80"); fault.Of(err) != fault.Unavailable || !strings.Contains(fmt.Sprint(err), "no peer") {
		t.Errorf("Dial of no peer = %v", err)
	}
	t.Run("live switch", func(t *testing.T) { liveSwitch(t, appliance, control) })
}

// liveSwitch moves one session https -> tailscale -> https and checks that at no moment none is up.
func liveSwitch(t *testing.T, appliance, control *mesh.Node) {
	host, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = host.Close() }()
	go echoAll(host)
	tail, err := control.Listen(t.Context(), ":9443")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = tail.Close() }()
	go echoAll(tail)
	https, err := mesh.NewHTTPS(mesh.HTTPS{Addresses: []string{host.Addr().String()}})
	if err != nil {
		t.Fatal(err)
	}
	over := pinned{Node: appliance, to: net.JoinHostPort(control.Addrs()[0].String(), "9443")}
	silence(t, over)
	s, err := mesh.NewSwitch(mesh.SwitchConfig{Routes: []mesh.Route{https, over}, Rand: func() float64 { return 0.5 }})
	if err != nil {
		t.Fatal(err)
	}
	moves := proveSwitch(t, s, roundTrip)
	for _, want := range []string{mesh.NameHTTPS, mesh.NameTailscale, mesh.NameHTTPS} {
		if err := s.Use(t.Context(), want); err != nil {
			t.Fatal(err)
		}
		if got := s.Current(); got != want {
			t.Fatalf("Current = %q, want %q", got, want)
		}
	}
	if low := moves.low.Load(); low < 1 {
		t.Errorf("at a moment of the switch %d sessions were up", low)
	}
}

// silence: a read that ends in silence says so. Its error is not that of package os.
func silence(t *testing.T, over mesh.Route) {
	c, err := over.Dial(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	if err := c.SetReadDeadline(time.Now().Add(-time.Second)); err != nil {
		t.Fatal(err)
	}
	_, err = c.Read(make([]byte, 1))
	var late net.Error
	if !errors.As(err, &late) || !late.Timeout() {
		t.Errorf("a read past its deadline gives %v, which is no timeout", err)
	}
}

// pinned dials one of a node's listed addresses.
type pinned struct {
	*mesh.Node
	to string
}

func (p pinned) Dial(ctx context.Context, _ string) (net.Conn, error) { return p.Node.Dial(ctx, p.to) }

func TestJoinRefused(t *testing.T) {
	tn := tailnet(t)
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
	defer cancel()
	n, err := mesh.Join(ctx,
		mesh.TailnetConfig{ControlURL: tn.URL, Credentials: key("wrong"), Hostname: "x", Dir: t.TempDir(), Ephemeral: true})
	if err == nil {
		_ = n.Close()
		t.Fatal("a wrong auth key joins")
	}
	if fault.Of(err) != fault.Denied || !strings.Contains(fault.Text(err), "auth key") {
		t.Errorf("Join = %v, want denied with a word on the auth key", err)
	}
	if _, err := mesh.Join(ctx, mesh.TailnetConfig{ControlURL: "http://127.0.0.1:1", Credentials: key("k"), Hostname: "x",
		Dir: t.TempDir()}); fault.Of(err) != fault.Unavailable {
		t.Errorf("Join without a coordinator = %v, want unavailable", err)
	}
	if _, err := mesh.Join(ctx, mesh.TailnetConfig{}); fault.Of(err) != fault.Invalid {
		t.Errorf("Join of nothing = %v, want invalid", err)
	}
}
