// SPDX-License-Identifier: Apache-2.0

// Package clienttest is a control plane of fakes for tests of what calls one.
package clienttest

import (
	"context"
	"crypto/rand"
	"crypto/x509"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/demarc-dev/demarc/api"
	controlv1 "github.com/demarc-dev/demarc/api/control/v1"
	"github.com/demarc-dev/demarc/api/control/v1/controlv1connect"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/identity"
	"github.com/demarc-dev/demarc/identity/identitytest"
)

// TrustDomain is that of the tests.
const TrustDomain = "acme.example"

// Vendor is a trust domain with its CA.
type Vendor struct {
	t  *testing.T
	ca *identity.Authority
}

// NewVendor makes a trust domain.
func NewVendor(t *testing.T) Vendor {
	t.Helper()
	ca, err := identity.NewCA(TrustDomain, time.Now(), rand.Reader, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	return Vendor{t, ca}
}

// Source makes a certificate that lives for an hour, beside the CA.
func (v Vendor) Source(r fleet.Role, name string) identity.Source {
	v.t.Helper()
	leaf, err := identitytest.Leaf(v.ca, fleet.PrincipalOf(TrustDomain, r, name), time.Now(), time.Hour)
	if err != nil {
		v.t.Fatal(err)
	}
	return identity.Fixed(leaf, identity.Pool([]*x509.Certificate{v.ca.Cert}))
}

// Recognising returns a source with the certificate of one and the CA of this vendor.
func (v Vendor) Recognising(own identity.Source) identity.Source {
	v.t.Helper()
	leaf, err := own.Leaf()
	if err != nil {
		v.t.Fatal(err)
	}
	return identity.Fixed(leaf, identity.Pool([]*x509.Certificate{v.ca.Cert}))
}

// Node is one node. It answers with the next of its faults, and well once there are none.
type Node struct {
	controlv1connect.UnimplementedControlHandler
	mu     sync.Mutex
	faults []error
	ids    []string
	got    map[string][]byte
	cut    bool
}

// NewNode makes a node that answers registrations with these faults first.
func NewNode(faults ...error) *Node {
	return &Node{faults: slices.Clone(faults), got: map[string][]byte{}}
}

// Cut makes the node break the next export off in its middle.
func (n *Node) Cut() *Node { n.cut = true; return n }

// Registered returns the ids of the registrations that came.
func (n *Node) Registered() []string {
	n.mu.Lock()
	defer n.mu.Unlock()
	return slices.Clone(n.ids)
}

// Artifact returns what was uploaded under a digest.
func (n *Node) Artifact(digest string) []byte {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.got[digest]
}

// RegisterCustomer implements [controlv1connect.ControlHandler].
func (n *Node) RegisterCustomer(_ context.Context,
	r *connect.Request[controlv1.RegisterCustomerRequest]) (*connect.Response[controlv1.RegisterCustomerResponse], error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.ids = append(n.ids, r.Msg.GetRequestId())
	if len(n.faults) > 0 {
		err := n.faults[0]
		n.faults = n.faults[1:]
		return nil, err
	}
	return connect.NewResponse(&controlv1.RegisterCustomerResponse{}), nil
}

// UploadArtifact implements [controlv1connect.ControlHandler].
func (n *Node) UploadArtifact(_ context.Context,
	s *connect.ClientStream[controlv1.UploadArtifactRequest]) (*connect.Response[controlv1.UploadArtifactResponse], error) {
	var d string
	var b []byte
	for s.Receive() {
		if d == "" {
			d = s.Msg().GetDigest()
		}
		b = append(b, s.Msg().GetData()...)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.got[d] = b
	return connect.NewResponse(&controlv1.UploadArtifactResponse{Size: int64(len(b))}), s.Err()
}

// ExportEvidence implements [controlv1connect.ControlHandler].
func (n *Node) ExportEvidence(_ context.Context,
	_ *connect.Request[controlv1.ExportEvidenceRequest], s *connect.ServerStream[controlv1.ExportEvidenceResponse]) error {
	for _, part := range []string{"one ", "two"} {
		if err := s.Send(&controlv1.ExportEvidenceResponse{Data: []byte(part)}); err != nil {
			return err
		}
		n.mu.Lock()
		cut := n.cut
		n.cut = false
		n.mu.Unlock()
		if cut {
			return fault.New("test", fault.Unavailable, "stopping")
		}
	}
	return nil
}

// Serve has a node listen with the certificate of a source, and returns its address.
func (v Vendor) Serve(n *Node, src identity.Source) string {
	mux := http.NewServeMux()
	mux.Handle(controlv1connect.NewControlHandler(n, connect.WithInterceptors(api.Guard(nil))))
	h := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		principal, serial, err := identity.PrincipalOf(r.TLS)
		if err != nil {
			http.Error(w, "no certificate", http.StatusForbidden)
			return
		}
		caller := api.Who{Class: api.ClassOf(principal), Principal: principal, Serial: serial, Rank: fleet.Admin}
		mux.ServeHTTP(w, r.WithContext(api.With(r.Context(), caller)))
	})
	s := httptest.NewUnstartedServer(h)
	s.TLS = identity.Server(src, func(fleet.Principal, fleet.Serial) error { return nil }, true, "h2")
	s.EnableHTTP2 = true
	s.Config.ErrorLog = log.New(io.Discard, "", 0)
	s.StartTLS()
	v.t.Cleanup(s.Close)
	return s.Listener.Addr().String()
}

// Nobody is an address on which nothing listens.
func Nobody(t *testing.T) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	return ln.Addr().String()
}
