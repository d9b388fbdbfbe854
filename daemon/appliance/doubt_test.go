// SPDX-License-Identifier: Apache-2.0

package appliance

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/x509"
	"io"
	"log/slog"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/net/http2"

	boundaryv1 "github.com/demarc-dev/demarc/api/boundary/v1"
	"github.com/demarc-dev/demarc/api/boundary/v1/boundaryv1connect"
	"github.com/demarc-dev/demarc/configs"
	"github.com/demarc-dev/demarc/daemon/appliance/book"
	"github.com/demarc-dev/demarc/daemon/appliance/credentials"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/identity"
)

// nonces answers what an appliance asks before it asks for something.
type nonces struct {
	boundaryv1connect.UnimplementedBootstrapHandler
}

func (nonces) Challenge(context.Context, *connect.Request[boundaryv1.ChallengeRequest]) (*connect.Response[boundaryv1.ChallengeResponse],
	error) {
	return connect.NewResponse(&boundaryv1.ChallengeResponse{Nonce: "nonce", TrustDomain: vendorDomain,
		ServerTimeUnix: time.Now().Unix()}), nil
}

// TestACallInDoubtIsToldAsThat: the vendor's program hangs with the whole question in hand, or the wire takes nothing, or the
// question changes nothing. An enrolment, a renewal or keys that may have been taken are unsure, all else is unavailable.
func TestACallInDoubtIsToldAsThat(t *testing.T) {
	calls := map[string]func(context.Context, *Appliance, *link) error{
		"Enrol":    func(ctx context.Context, a *Appliance, l *link) error { _, err := a.enrol(ctx, l); return err },
		"Renew":    func(ctx context.Context, a *Appliance, l *link) error { return a.renew(ctx, l) },
		"RollKeys": func(ctx context.Context, a *Appliance, l *link) error { _, err := a.tellKeys(ctx, l, nil); return err },
	}
	for _, c := range []struct {
		call, hangs string // in which procedure the vendor hangs; "wire": it reads nothing of any
		want        fault.Kind
	}{
		{"Enrol", "Enrol", fault.Unsure}, {"Enrol", "Challenge", fault.Unavailable}, {"Enrol", "wire", fault.Unavailable},
		{"Renew", "Renew", fault.Unsure}, {"Renew", "wire", fault.Unavailable},
		{"RollKeys", "RollKeys", fault.Unsure}, {"RollKeys", "Challenge", fault.Unavailable}, {"RollKeys", "wire", fault.Unavailable},
	} {
		t.Run(c.call+" hangs in "+c.hangs, func(t *testing.T) {
			a := asker(t)
			here, there := net.Pipe()
			ctx := deadline{t.Context(), make(chan struct{})}
			go hanging(there, c.hangs, sync.OnceFunc(func() { close(ctx.passed) }))
			l, err := speakHTTP2("https", here, "test")
			if err != nil {
				t.Fatal(err)
			}
			if err := calls[c.call](ctx, a, l); fault.Of(err) != c.want {
				t.Errorf("%v, which is %s, want %s", err, fault.Of(err), c.want)
			}
			_, _ = there.Close(), here.Close()
			_ = l.cc.Close()
		})
	}
}

// deadline is a context whose deadline passes when it is told to.
type deadline struct {
	context.Context
	passed chan struct{}
}

func (d deadline) Done() <-chan struct{} { return d.passed }

func (d deadline) Err() error {
	select {
	case <-d.passed:
		return context.DeadlineExceeded
	default:
		return nil
	}
}

// newStore is a book that holds nothing.
func newStore(t *testing.T) *book.Store {
	t.Helper()
	s, err := book.Open(filepath.Join(t.TempDir(), "book"), book.Config{Appliance: "eu-1", Customer: "globex"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s
}

// asker is an appliance that has what it needs to ask for a certificate.
func asker(t *testing.T) *Appliance {
	t.Helper()
	ca, err := identity.NewCA(vendorDomain, time.Now(), rand.Reader, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	a := &Appliance{cfg: &configs.Appliance{Name: "eu-1", TrustDomain: vendorDomain}, book: newStore(t), log: slog.New(slog.DiscardHandler),
		now: time.Now}
	token := func(context.Context, string) (string, error) { return "token", nil }
	a.opts.Proof = token
	a.opts.Keys = func(context.Context) ([]byte, func(context.Context, string) (string, error), error) {
		return []byte(`{"keys":[]}`), token, nil
	}
	if _, a.signer, err = ed25519.GenerateKey(rand.Reader); err != nil {
		t.Fatal(err)
	}
	if a.creds, _, err = credentials.Open(filepath.Join(t.TempDir(), "wallet.json"), vendorDomain, []*x509.Certificate{ca.Cert}, nil,
		time.Now); err != nil {
		t.Fatal(err)
	}
	return a
}

// hanging is a vendor whose program hangs in a procedure, with all of the question read, or in the first byte of any.
func hanging(c net.Conn, in string, hangs func()) {
	if in == "wire" {
		_, _ = c.Read(make([]byte, 4<<10)) // what a client of HTTP/2 says first
		_, _ = c.Read(make([]byte, 1))
		hangs()
		return
	}
	mux := http.NewServeMux()
	mux.Handle(boundaryv1connect.NewBootstrapHandler(nonces{}))
	(&http2.Server{}).ServeConn(c, &http2.ServeConnOpts{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !strings.HasSuffix(r.URL.Path, "/"+in) {
			mux.ServeHTTP(w, r)
			return
		}
		_, _ = io.Copy(io.Discard, r.Body)
		hangs()
		<-r.Context().Done()
	})})
}

const vendorDomain = "acme.example"
