// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"
	"go.uber.org/goleak"

	"github.com/demarc-dev/demarc/api"
	controlv1 "github.com/demarc-dev/demarc/api/control/v1"
	"github.com/demarc-dev/demarc/api/control/v1/controlv1connect"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/identity"
	"github.com/demarc-dev/demarc/identity/identitytest"
)

const trustDomain = "acme.example"

type house struct {
	t  *testing.T
	ca *identity.Authority
}

func newHouse(t *testing.T, td string) house {
	t.Helper()
	before := goleak.IgnoreCurrent()
	t.Cleanup(func() { goleak.VerifyNone(t, before) })
	ca, err := identity.NewCA(td, time.Now(), rand.Reader, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	return house{t, ca}
}

func (v house) source(td string, r fleet.Role, name string, ttl time.Duration) identity.Source {
	v.t.Helper()
	leaf, err := identitytest.Leaf(v.ca, fleet.PrincipalOf(td, r, name), time.Now(), ttl)
	if err != nil {
		v.t.Fatal(err)
	}
	return identity.Fixed(leaf, identity.Pool([]*x509.Certificate{v.ca.Cert}))
}

// fake is one node. It answers with the next of its faults, and well once there are none.
type fake struct {
	controlv1connect.UnimplementedControlHandler
	mu     sync.Mutex
	faults []error
	ids    []string
	got    map[string][]byte
	cut    bool // the next export breaks off in its middle
}

func (f *fake) RegisterCustomer(_ context.Context, r *connect.Request[controlv1.RegisterCustomerRequest]) (*connect.Response[controlv1.RegisterCustomerResponse], error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.ids = append(f.ids, r.Msg.GetRequestId())
	if len(f.faults) > 0 {
		err := f.faults[0]
		f.faults = f.faults[1:]
		return nil, err
	}
	return connect.NewResponse(&controlv1.RegisterCustomerResponse{}), nil
}

func (f *fake) UploadArtifact(_ context.Context, s *connect.ClientStream[controlv1.UploadArtifactRequest]) (*connect.Response[controlv1.UploadArtifactResponse], error) {
	var d string
	var b []byte
	for s.Receive() {
		if d == "" {
			d = s.Msg().GetDigest()
		}
		b = append(b, s.Msg().GetData()...)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.got == nil {
		f.got = map[string][]byte{}
	}
	f.got[d] = b
	return connect.NewResponse(&controlv1.UploadArtifactResponse{Size: int64(len(b))}), s.Err()
}

func (f *fake) ExportEvidence(_ context.Context, _ *connect.Request[controlv1.ExportEvidenceRequest], s *connect.ServerStream[controlv1.ExportEvidenceResponse]) error {
	for _, part := range []string{"one ", "two"} {
		if err := s.Send(&controlv1.ExportEvidenceResponse{Data: []byte(part)}); err != nil {
			return err
		}
		f.mu.Lock()
		cut := f.cut
		f.cut = false
		f.mu.Unlock()
		if cut {
			return fault.New("test", fault.Unavailable, "stopping")
		}
	}
	return nil
}

func (v house) serve(f *fake, src identity.Source) string {
	mux := http.NewServeMux()
	mux.Handle(controlv1connect.NewControlHandler(f, connect.WithInterceptors(api.Guard(nil))))
	h := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		who, serial, err := identity.PrincipalOf(r.TLS)
		if err != nil {
			http.Error(w, "who", http.StatusForbidden)
			return
		}
		mux.ServeHTTP(w, r.WithContext(api.With(r.Context(), api.Who{Class: api.ClassOf(who), Principal: who, Serial: serial, Rank: fleet.Admin})))
	})
	s := httptest.NewUnstartedServer(h)
	s.TLS = identity.Server(src, func(fleet.Principal, fleet.Serial) error { return nil }, true, "h2")
	s.EnableHTTP2 = true
	s.Config.ErrorLog = log.New(io.Discard, "", 0)
	s.StartTLS()
	v.t.Cleanup(s.Close)
	return s.Listener.Addr().String()
}

func (v house) client(timeout time.Duration, src identity.Source, nodes ...string) *vendor {
	v.t.Helper()
	c := newVendor(operator{TrustDomain: trustDomain, Nodes: nodes}, src, timeout)
	c.try = timeout / 2
	v.t.Cleanup(c.close)
	return c
}

func register(c *vendor, id string) error {
	_, err := ask(context.Background(), c, func(ctx context.Context, rpc controlv1connect.ControlClient) (*controlv1.RegisterCustomerResponse, error) {
		return wire(rpc.RegisterCustomer(ctx, connect.NewRequest(&controlv1.RegisterCustomerRequest{RequestId: id})))
	})
	return err
}

// nobody is an address where nothing listens.
func nobody(t *testing.T) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	return ln.Addr().String()
}

func TestAskFindsANodeThatAnswers(t *testing.T) {
	v := newHouse(t, trustDomain)
	busy := func(k fault.Kind) error { return fault.New("x", k, "not now") }
	for name, faults := range map[string][]error{
		"well": nil, "no leader": {busy(fault.NotLeader)}, "unsure": {busy(fault.Unsure), busy(fault.Unavailable)},
		"busy": {busy(fault.Busy), busy(fault.Busy), busy(fault.Busy)},
	} {
		t.Run(name, func(t *testing.T) {
			f := &fake{faults: slices.Clone(faults)}
			addr := v.serve(f, v.source(trustDomain, fleet.Node, "cp-1", time.Hour))
			c := v.client(20*time.Second, v.source(trustDomain, fleet.Operator, "ann", time.Hour), nobody(t), addr)
			if err := register(c, "r-1"); err != nil {
				t.Fatal(err)
			}
			if len(f.ids) != len(faults)+1 || slices.ContainsFunc(f.ids, func(id string) bool { return id != "r-1" }) {
				t.Errorf("request ids %q, want r-1 %d times", f.ids, len(faults)+1)
			}
		})
	}
}

func TestAskTellsARefusalAtOnce(t *testing.T) {
	v := newHouse(t, trustDomain)
	for _, k := range []fault.Kind{fault.Denied, fault.Invalid, fault.NotFound, fault.Conflict, fault.Expired} {
		f := &fake{faults: []error{fault.New("x", k, "the sentence of the node")}}
		addr := v.serve(f, v.source(trustDomain, fleet.Node, "cp-1", time.Hour))
		c := v.client(20*time.Second, v.source(trustDomain, fleet.Operator, "ann", time.Hour), addr, addr)
		if err := register(c, "r-1"); fault.Of(err) != k || fault.Text(err) != "the sentence of the node" || len(f.ids) != 1 {
			t.Errorf("%s: %v after %d calls", k, err, len(f.ids))
		}
	}
}

func TestAskPassesByAnImpostor(t *testing.T) {
	v, other := newHouse(t, trustDomain), newHouse(t, trustDomain)
	bad, good := &fake{}, &fake{}
	impostor := other.serve(bad, other.source(trustDomain, fleet.Node, "cp-1", time.Hour))
	operator := v.source(trustDomain, fleet.Operator, "ann", time.Hour)
	if err := register(v.client(20*time.Second, operator, impostor, v.serve(good, v.source(trustDomain, fleet.Node, "cp-2", time.Hour))), "r"); err != nil {
		t.Error(err)
	}
	err := register(v.client(20*time.Second, operator, impostor), "r")
	if !errors.Is(err, fault.Denied) || !strings.Contains(fault.Text(err), "not your vendor") {
		t.Errorf("an impostor alone: %v, want denied", err)
	}
	if len(bad.ids) > 0 || len(good.ids) != 1 {
		t.Errorf("the impostor was told %d requests, the node %d", len(bad.ids), len(good.ids))
	}
}

func TestAskTellsThatTheCertificateIsRefused(t *testing.T) {
	v, other := newHouse(t, trustDomain), newHouse(t, trustDomain)
	f := &fake{}
	addr := v.serve(f, v.source(trustDomain, fleet.Node, "cp-1", time.Hour))
	stranger, err := other.source(trustDomain, fleet.Operator, "ann", time.Hour).Leaf()
	if err != nil {
		t.Fatal(err)
	}
	src := identity.Fixed(stranger, identity.Pool([]*x509.Certificate{v.ca.Cert}))
	err = register(v.client(20*time.Second, src, addr), "r")
	if !errors.Is(err, fault.Denied) || !strings.Contains(fault.Text(err), "certificate") {
		t.Errorf("%v, want denied with a word about the certificate", err)
	}
}

// A refusal by the only node that lives is told, and not that the others are dead; and long before the time is over.
func TestADeadNodeHidesNoRefusal(t *testing.T) {
	v, other := newHouse(t, trustDomain), newHouse(t, trustDomain)
	addr := v.serve(&fake{}, v.source(trustDomain, fleet.Node, "cp-1", time.Hour))
	stranger, err := other.source(trustDomain, fleet.Operator, "ann", time.Hour).Leaf()
	if err != nil {
		t.Fatal(err)
	}
	src := identity.Fixed(stranger, identity.Pool([]*x509.Certificate{v.ca.Cert}))
	for _, nodes := range [][]string{{addr, nobody(t)}, {nobody(t), addr, nobody(t)}} {
		began := time.Now()
		err := register(v.client(10*time.Minute, src, nodes...), "r")
		if !errors.Is(err, fault.Denied) || !strings.Contains(fault.Text(err), "certificate") || time.Since(began) > 5*time.Minute {
			t.Errorf("after %s: %v, want denied with a word about the certificate", time.Since(began), err)
		}
	}
}

func TestAskGivesUp(t *testing.T) {
	v := newHouse(t, trustDomain)
	operator := v.source(trustDomain, fleet.Operator, "ann", time.Hour)
	err := register(v.client(600*time.Millisecond, operator, nobody(t), nobody(t)), "r")
	if !errors.Is(err, fault.Unavailable) || !strings.Contains(fault.Text(err), "no node of the control plane did it") {
		t.Errorf("nobody there: %v", err)
	}
	f := &fake{faults: slices.Repeat([]error{fault.New("x", fault.Unsure, "leadership was lost")}, 1000)}
	addr := v.serve(f, v.source(trustDomain, fleet.Node, "cp-1", time.Hour))
	err = register(v.client(600*time.Millisecond, operator, addr, nobody(t)), "r")
	if !errors.Is(err, fault.Unsure) || !strings.Contains(fault.Text(err), "may have happened") {
		t.Errorf("unsure to the end: %v", err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	_, err = ask(ctx, v.client(time.Minute, operator, nobody(t)), func(ctx context.Context, _ controlv1connect.ControlClient) (int, error) {
		return 0, fault.At("x", "", ctx.Err())
	})
	if !errors.Is(err, fault.Unavailable) || fault.Text(err) != "interrupted" {
		t.Errorf("interrupted: %v", err)
	}
}

func TestAskLeavesANodeThatHangs(t *testing.T) {
	v := newHouse(t, trustDomain)
	ln, err := net.Listen("tcp", "127.0.0.1:0") // takes the connection, and says nothing
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	f := &fake{}
	c := v.client(20*time.Second, v.source(trustDomain, fleet.Operator, "ann", time.Hour), ln.Addr().String(), v.serve(f, v.source(trustDomain, fleet.Node, "cp-1", time.Hour)))
	c.try = 300 * time.Millisecond
	for range 2 {
		if err := register(c, "r"); err != nil {
			t.Fatal(err)
		}
	}
	if c.at != 1 {
		t.Errorf("the node that hangs is asked first again")
	}
}

func TestUploadFindsANode(t *testing.T) {
	v := newHouse(t, trustDomain)
	body := bytes.Repeat([]byte("0123456789abcdef"), 100_000) // some chunks, and a rest
	d := fleet.DigestOf(body)
	file := filepath.Join(t.TempDir(), "artifact")
	if err := os.WriteFile(file, body, 0o600); err != nil {
		t.Fatal(err)
	}
	f := &fake{}
	c := v.client(20*time.Second, v.source(trustDomain, fleet.Operator, "ann", time.Hour), nobody(t), v.serve(f, v.source(trustDomain, fleet.Node, "cp-1", time.Hour)))
	var told bytes.Buffer
	a := &app{errs: &told}
	if err := a.upload(context.Background(), c, "store", file, d); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(f.got[string(d)], body) {
		t.Errorf("the node got %d bytes, want %d", len(f.got[string(d)]), len(body))
	}
	if !strings.Contains(told.String(), "store: 1600000 bytes") {
		t.Errorf("told %q", told.String())
	}
	err := a.upload(context.Background(), v.client(20*time.Second, v.source(trustDomain, fleet.Operator, "ann", time.Hour), nobody(t)), "store", file, d)
	if !errors.Is(err, fault.Unavailable) {
		t.Errorf("nobody there: %v", err)
	}
}

func TestBulkEndsWhatDoesNotMove(t *testing.T) {
	v := newHouse(t, trustDomain)
	c := v.client(400*time.Millisecond, v.source(trustDomain, fleet.Operator, "ann", time.Hour), nobody(t))
	tries := 0
	err := c.bulk(context.Background(), func(ctx context.Context, _ controlv1connect.ControlClient, _ func()) error {
		tries++
		<-ctx.Done()
		return ctx.Err()
	})
	if !errors.Is(err, fault.Unavailable) || !strings.Contains(fault.Text(err), "nothing moved") || tries != 3 {
		t.Errorf("%v after %d tries", err, tries)
	}
}

func TestExportBeginsAgain(t *testing.T) {
	v := newHouse(t, trustDomain)
	addr := v.serve(&fake{cut: true}, v.source(trustDomain, fleet.Node, "cp-1", time.Hour))
	c := v.client(20*time.Second, v.source(trustDomain, fleet.Operator, "ann", time.Hour), addr)
	var out bytes.Buffer
	times := 0
	err := c.bulk(context.Background(), func(ctx context.Context, rpc controlv1connect.ControlClient, alive func()) error {
		times++
		out.Reset()
		s, err := rpc.ExportEvidence(ctx, connect.NewRequest(&controlv1.ExportEvidenceRequest{}))
		if err != nil {
			return explain(err)
		}
		return receive(s, &out, alive)
	})
	if err != nil || out.String() != "one two" || times != 2 {
		t.Errorf("exported %q in %d tries: %v", out.String(), times, err)
	}
}
