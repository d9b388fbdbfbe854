// SPDX-License-Identifier: Apache-2.0

package appliance

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"io"
	"log/slog"
	"math"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"testing"
	"time"

	"connectrpc.com/connect"

	boundaryv1 "github.com/demarc-dev/demarc/api/boundary/v1"
	"github.com/demarc-dev/demarc/api/boundary/v1/boundaryv1connect"
	"github.com/demarc-dev/demarc/configs"
	"github.com/demarc-dev/demarc/daemon/appliance/book"
	"github.com/demarc-dev/demarc/daemon/appliance/credentials"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/identity"
	"github.com/demarc-dev/demarc/ledger"
	"github.com/demarc-dev/demarc/seal"
)

// thief has the key of a CA that the appliance still trusts, and answers in the place of a node. Of the vendor's log it
// has what is public.
type thief struct {
	boundaryv1connect.UnimplementedBootstrapHandler
	boundaryv1connect.UnimplementedBoundaryHandler
	ca     *identity.Authority
	bundle [][]byte
	logKey []byte
}

func (e *thief) Challenge(context.Context,
	*connect.Request[boundaryv1.ChallengeRequest]) (*connect.Response[boundaryv1.ChallengeResponse], error) {
	return connect.NewResponse(&boundaryv1.ChallengeResponse{Nonce: "n", TrustDomain: vendorDomain, ServerTimeUnix: time.Now().Unix()}), nil
}

func (e *thief) leaf(der []byte) ([]byte, error) {
	csr, err := identity.ParseCSR(der)
	if err != nil {
		return nil, err
	}
	leaf, err := e.ca.Issue(csr, fleet.PrincipalOf(vendorDomain, fleet.Appliance, "eu-1"), time.Now(), time.Hour,
		identity.IssueOptions{Rand: rand.Reader})
	if err != nil {
		return nil, err
	}
	return leaf.Raw, nil
}

func (e *thief) Enrol(_ context.Context, r *connect.Request[boundaryv1.EnrolRequest]) (*connect.Response[boundaryv1.EnrolResponse], error) {
	leaf, err := e.leaf(r.Msg.GetCsr())
	return connect.NewResponse(&boundaryv1.EnrolResponse{Certificate: leaf, Bundle: e.bundle, BundleNumber: math.MaxUint64,
		LogKey: e.logKey}), err
}

func (e *thief) Renew(_ context.Context, r *connect.Request[boundaryv1.RenewRequest]) (*connect.Response[boundaryv1.RenewResponse], error) {
	leaf, err := e.leaf(r.Msg.GetCsr())
	return connect.NewResponse(&boundaryv1.RenewResponse{Certificate: leaf, Bundle: e.bundle, BundleNumber: math.MaxUint64}), err
}

// RoundTrip implements http.RoundTripper.
func (e *thief) RoundTrip(r *http.Request) (*http.Response, error) {
	mux := http.NewServeMux()
	mux.Handle(boundaryv1connect.NewBootstrapHandler(e))
	mux.Handle(boundaryv1connect.NewBoundaryHandler(e))
	w := httptest.NewRecorder()
	mux.ServeHTTP(w, r)
	return w.Result(), nil
}

type straight struct{ book *ledger.Book[book.State] }

func (o straight) Propose(_ context.Context, data []byte) ([]byte, error) {
	return o.book.Apply(1, data)
}

// Once the key of the vendor's log is pinned, CAs count with its signature only: an answer to enrol or renew brings none,
// so that one stolen CA can't take an appliance away for good.
func TestOnlySignedCAsAfterTheFirst(t *testing.T) {
	ok := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	newCA := func() *identity.Authority {
		ca, err := identity.NewCA(vendorDomain, time.Now(), rand.Reader, time.Hour)
		ok(err)
		return ca
	}
	public := func() (ed25519.PrivateKey, []byte) {
		_, key, err := ed25519.GenerateKey(rand.Reader)
		ok(err)
		k, err := seal.KeyOf(key.Public())
		ok(err)
		return key, k.PEM()
	}
	first, evil := newCA(), newCA()
	own, _ := public()
	_, vendor := public()
	_, other := public()
	w, _, err := credentials.Open(filepath.Join(t.TempDir(), "wallet.json"), vendorDomain, []*x509.Certificate{first.Cert}, nil, time.Now)
	ok(err)
	a := &Appliance{cfg: &configs.Appliance{Name: "eu-1", TrustDomain: vendorDomain}, creds: w, book: newStore(t), signer: own,
		log:  slog.New(slog.DiscardHandler),
		opts: Options{Proof: func(context.Context, string) (string, error) { return "token", nil }}}
	e := &thief{ca: first, bundle: [][]byte{evil.Cert.Raw}, logKey: vendor}
	l := &link{cc: io.NopCloser(nil), http: &http.Client{Transport: e}}

	_, err = ledger.Submit(t.Context(), straight{a.book.Book()}, ledger.Meta{At: time.Now(), By: fleet.Local, Request: "r"},
		book.MeetVendor{LogKey: vendor})
	ok(err)
	for what, ask := range map[string]func() error{
		"enrol": func() error { _, err := a.enrol(t.Context(), l); return err },
		"renew": func() error { return a.renew(t.Context(), l) },
	} {
		before := w.Serial()
		ok(ask())
		if w.Serial() == before {
			t.Errorf("%s: no certificate was taken", what)
		}
		if !w.Roots().Equal(identity.Pool([]*x509.Certificate{first.Cert})) || w.BundleNumber() != 0 {
			t.Fatalf("%s: CAs were taken that the key of the vendor's log has not signed, as number %d", what, w.BundleNumber())
		}
	}
	before := w.Serial()
	e.logKey = other
	if _, err := a.enrol(t.Context(), l); !errors.Is(err, fault.Denied) {
		t.Errorf("another log key: %v, want denied", err)
	}
	if w.Serial() != before {
		t.Error("a certificate was taken from one whose log key is another")
	}
}
