// SPDX-License-Identifier: Apache-2.0

package controlplane

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http/httptest"
	"testing"
	"testing/synctest"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/time/rate"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/demarc-dev/demarc/api"
	boundaryv1 "github.com/demarc-dev/demarc/api/boundary/v1"
	"github.com/demarc-dev/demarc/api/channel"
	controlv1 "github.com/demarc-dev/demarc/api/control/v1"
	"github.com/demarc-dev/demarc/api/control/v1/controlv1connect"
	"github.com/demarc-dev/demarc/daemon"
	"github.com/demarc-dev/demarc/daemon/controlplane/book"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/identity"
	"github.com/demarc-dev/demarc/identity/identitytest"
)

// atDoor runs a door in fake time, and gives what brings it connections, and what a caller with a certificate of eu-1 needs.
func atDoor(t *testing.T, s *Server) (door *Listener, in *upgradeListener, caller *tls.Config) {
	t.Helper()
	ca, err := identity.NewCA(innerDomain, time.Now(), rand.Reader, identity.DefaultCALife)
	if err != nil {
		t.Fatal(err)
	}
	leaf := func(role fleet.Role, name string) *tls.Certificate {
		l, err := identitytest.Leaf(ca, fleet.PrincipalOf(innerDomain, role, name), time.Now(), time.Hour)
		if err != nil {
			t.Fatal(err)
		}
		return l
	}
	roots := identity.Pool([]*x509.Certificate{ca.Cert})
	member := leaf(fleet.Appliance, "eu-1")
	tell(t, s, book.Renew{Name: "eu-1", Using: "s1", Serial: identity.SerialOf(member.Leaf), Till: member.Leaf.NotAfter})
	in = newUpgradeListener(&net.TCPAddr{}, 1)
	door = s.Listener("door", in, identity.Server(identity.Fixed(leaf(fleet.Node, "cp-1"), roots), s.Admit, false, Protocols()...), slog.New(slog.DiscardHandler))
	return door, in, identity.Client(identity.Fixed(member, roots), identity.WantNode(innerDomain), channel.Proto)
}

// opened runs a door until the test ends.
func opened(t *testing.T, d *Listener) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- d.Run(ctx, func() {}) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// lasts reads until a connection ends, and tells how long that took.
func lasts(c io.Reader) time.Duration {
	began := time.Now()
	_, _ = io.Copy(io.Discard, c)
	return time.Since(began).Round(time.Millisecond)
}

// TestWhoSaysNothingGoes: where nobody else waits, too, a connection that stops before, in or after its handshake ends by itself.
func TestWhoSaysNothingGoes(t *testing.T) {
	for name, x := range map[string]struct {
		begin func(t *testing.T, raw net.Conn, conf *tls.Config) io.Reader
		want  time.Duration
	}{
		"nothing": {func(_ *testing.T, raw net.Conn, _ *tls.Config) io.Reader { return raw }, handshakeWait},
		"half a hello of TLS": {func(t *testing.T, raw net.Conn, _ *tls.Config) io.Reader {
			if _, err := raw.Write([]byte{22, 3, 1, 2, 0, 1}); err != nil {
				t.Error(err)
			}
			return raw
		}, handshakeWait},
		"no hello of the channel": {func(t *testing.T, raw net.Conn, conf *tls.Config) io.Reader {
			c := tls.Client(raw, conf)
			if err := c.Handshake(); err != nil {
				t.Error(err)
			}
			return c
		}, helloWait},
		"half a hello of the channel": {func(t *testing.T, raw net.Conn, conf *tls.Config) io.Reader {
			c := tls.Client(raw, conf)
			if _, err := c.Write([]byte{0, 0, 1, 0, 1}); err != nil {
				t.Error(err)
			}
			return c
		}, helloWait},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s, _ := begun(t)
				door, in, conf := atDoor(t, s)
				opened(t, door)
				mine, theirs := net.Pipe()
				in.conns <- theirs
				if took := lasts(x.begin(t, mine, conf)); took < x.want || took > x.want+2*linger {
					t.Errorf("it ended after %s, want %s", took, x.want)
				}
			})
		})
	}
}

// TestWhoWaitedTooLongIsNotServed: a connection whose turn comes after its peer has gone elsewhere takes no handshake.
func TestWhoWaitedTooLongIsNotServed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, _ := begun(t)
		door, _, _ := atDoor(t, s)
		late, theirs := net.Pipe()
		door.push(waiting{theirs, time.Now().Add(-queueWait - time.Second), "192.0.2.1"})
		opened(t, door)
		if took := lasts(late); took != 0 {
			t.Errorf("it was held for %s", took)
		}
	})
}

// TestEachProcedureOfStrangersIsBounded: whatever the table lets a stranger call, it asks whether strangers may be heard.
func TestEachProcedureOfStrangersIsBounded(t *testing.T) {
	s, _ := begun(t)
	srv := httptest.NewServer(s.Handler())
	defer srv.Close()
	call := func(procedure string) connect.Code {
		_, err := connect.NewClient[boundaryv1.ChallengeRequest, boundaryv1.ChallengeRequest](srv.Client(), srv.URL+procedure).
			CallUnary(t.Context(), connect.NewRequest(&boundaryv1.ChallengeRequest{}))
		if err == nil {
			return 0
		}
		return connect.CodeOf(err)
	}
	var theirs []string
	for _, f := range []protoreflect.FileDescriptor{boundaryv1.File_boundary_v1_boundary_proto, controlv1.File_control_v1_operators_proto, controlv1.File_control_v1_control_proto} {
		for i := range f.Services().Len() {
			for j := range f.Services().Get(i).Methods().Len() {
				m := f.Services().Get(i).Methods().Get(j)
				if p := fmt.Sprintf("/%s/%s", m.Parent().FullName(), m.Name()); api.May(api.Who{Class: api.Stranger}, p) {
					theirs = append(theirs, p)
				}
			}
		}
	}
	if len(theirs) < 7 {
		t.Fatalf("strangers may call %q: the test no longer finds them", theirs)
	}
	for _, p := range theirs {
		if got := call(p); got == connect.CodeResourceExhausted {
			t.Errorf("%s: busy, and nobody calls", p)
		}
	}
	s.logins = rate.NewLimiter(0, 0)
	if got := call(controlv1connect.OperatorBootstrapLoginProcedure); got != connect.CodeResourceExhausted {
		t.Errorf("a login beyond what is allowed a second: %v, want busy", got)
	}
	s.logins = rate.NewLimiter(rate.Inf, 0)
	s.refusals.Anonymous().SetLimit(0)
	s.refusals.Anonymous().SetBurst(0)
	for _, p := range theirs {
		if got := call(p); got != connect.CodeResourceExhausted {
			t.Errorf("%s: %v where no stranger may be heard, want busy", p, got)
		}
	}
}

// TestStrangersOfManyNetworksGiveWay: all their connections together have a bound, and the network that holds the most pays.
func TestStrangersOfManyNetworksGiveWay(t *testing.T) {
	g := newConnTable()
	enter := func(host string) (*callConn, error) {
		c, _ := net.Pipe()
		who := &callConn{owner: host, kind: anonymousQuota}
		out, err := g.enter(c, who, 0)
		g.serve(c, &daemon.Calls{})
		return out, err
	}
	for i := range anonymousQuota.all {
		host := fmt.Sprint("net-", i)
		if i < anonymousEach/2 {
			host = "most"
		}
		if out, err := enter(host); out != nil || err != nil {
			t.Fatalf("connection %d: %v, %v", i, out, err)
		}
	}
	for i := range 10 {
		out, err := enter(fmt.Sprint("late-", i))
		if err != nil || out == nil || out.owner != "most" {
			t.Fatalf("newcomer %d: %+v gives way, %v", i, out, err)
		}
	}
	if n := g.kinds[anonymousQuota]; n != anonymousQuota.all {
		t.Errorf("%d connections of strangers are open, want %d", n, anonymousQuota.all)
	}
}

// TestWhoLosesItsPlace: how long a peer may be silent in its handshake while all places are taken and others wait.
func TestWhoLosesItsPlace(t *testing.T) {
	for name, x := range map[string]struct {
		spoke bool
		many  int    // handshakes of its source
		waits string // where the one comes from that waits
		want  time.Duration
	}{
		"it never spoke":                      {false, 1, "other", silentWait},
		"it spoke":                            {true, 1, "other", peerWait},
		"one of many of its source":           {true, heavy + 1, "other", heavyWait},
		"one of as many as a source may have": {true, heavy, "other", peerWait},
		"one of many, and only its own wait":  {true, heavy + 1, "it", peerWait},
		"one of many that never spoke":        {false, heavy + 1, "it", silentWait},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s, _ := begun(t)
				door, _, _ := atDoor(t, s)
				mine, theirs := net.Pipe()
				defer mine.Close()
				for range x.many {
					one := &handshake{Conn: theirs, slots: s.desk.slots, accepted: time.Now(), network: "it"}
					one.spoke.Store(x.spoke)
					one.since.Store(1) // it waits for its peer's bytes
					door.setInFlight(one, true)
				}
				door.next = "/" + x.waits
				began := time.Now()
				for len(door.conns.inFlight) == x.many {
					time.Sleep(door.evictStalled())
				}
				if took := time.Since(began); took < x.want || took > x.want+2*stallCheck {
					t.Errorf("it lost its place after %s, want %s", took, x.want)
				}
			})
		})
	}
}
