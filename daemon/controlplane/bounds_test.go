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
	"github.com/demarc-dev/demarc/daemon/controlplane/admission"
	"github.com/demarc-dev/demarc/daemon/controlplane/book"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/identity"
	"github.com/demarc-dev/demarc/identity/identitytest"
)

// atDoor runs a door in fake time, and gives what brings it connections, and what a caller with a certificate of eu-1 needs.
func atDoor(t *testing.T, s *Server) (door *admission.Listener, in *pipes, caller *tls.Config) {
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
	in = newPipes()
	door = s.Listener("door", in, identity.Server(identity.Fixed(leaf(fleet.Node, "cp-1"), roots), s.Admit, false, admission.Protocols()...), slog.New(slog.DiscardHandler))
	return door, in, identity.Client(identity.Fixed(member, roots), identity.WantNode(innerDomain), channel.Proto)
}

// opened runs a door until the test ends.
func opened(t *testing.T, d *admission.Listener) {
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
		"nothing": {func(_ *testing.T, raw net.Conn, _ *tls.Config) io.Reader { return raw }, admission.HandshakeWait},
		"half a hello of TLS": {func(t *testing.T, raw net.Conn, _ *tls.Config) io.Reader {
			if _, err := raw.Write([]byte{22, 3, 1, 2, 0, 1}); err != nil {
				t.Error(err)
			}
			return raw
		}, admission.HandshakeWait},
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
