// SPDX-License-Identifier: Apache-2.0

package management_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"net"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/demarc-dev/demarc/api"
	managementv1 "github.com/demarc-dev/demarc/api/management/v1"
	"github.com/demarc-dev/demarc/api/management/v1/managementv1connect"
	"github.com/demarc-dev/demarc/daemon/management"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/identity"
)

// The closed message: a field that is added must be added here, by somebody who has thought about promise 2.
func TestNothingElseFitsInTheReport(t *testing.T) {
	want := []string{"build string", "node string", "health string", "nodes_voting uint32", "nodes_reachable uint32",
		"appliances_registered uint32", "appliances_enrolled uint32", "appliances_online uint32", "appliances_banned uint32"}
	var got []string
	fields := (&managementv1.ReportRequest{}).ProtoReflect().Descriptor().Fields()
	for i := range fields.Len() {
		f := fields.Get(i)
		kind := f.Kind().String()
		if f.IsList() || f.Kind() == protoreflect.BytesKind {
			kind = "open-ended " + kind
		}
		got = append(got, string(f.Name())+" "+kind)
	}
	if !slices.Equal(got, want) {
		t.Errorf("fields = %q, want %q", got, want)
	}
}

func authority(t *testing.T, td string) *identity.Authority {
	t.Helper()
	ca, err := identity.NewCA(td, time.Now(), rand.Reader, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	return ca
}

func leaf(t *testing.T, ca *identity.Authority, who fleet.Principal) *tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := identity.NewCSR(key, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	csr, err := identity.ParseCSR(der)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := ca.Issue(csr, who, time.Now(), time.Hour, identity.IssueOptions{Rand: rand.Reader})
	if err != nil {
		t.Fatal(err)
	}
	return &tls.Certificate{Certificate: [][]byte{cert.Raw}, PrivateKey: key, Leaf: cert}
}

func TestWhoMayReport(t *testing.T) {
	acme, other, mp := authority(t, "acme.example"), authority(t, "other.example"), authority(t, "platform.example")
	s, err := management.New([]management.Peer{{Name: "acme", TrustDomain: "acme.example", Roots: []*x509.Certificate{acme.Cert}},
		{Name: "other", TrustDomain: "other.example", Roots: []*x509.Certificate{other.Cert}}}, time.Now)
	if err != nil {
		t.Fatal(err)
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	door := identity.Fixed(leaf(t, mp, "spiffe://platform.example/node/m1"), s.Roots())
	srv := &http.Server{Handler: s.Handler(), TLSConfig: identity.Server(door, s.Admit, true, "h2")}
	done := make(chan struct{})
	go func() { defer close(done); _ = srv.ServeTLS(ln, "", "") }()
	t.Cleanup(func() { srv.Close(); <-done })

	call := func(t *testing.T, cert *tls.Certificate, m *managementv1.ReportRequest) error {
		t.Helper()
		src := identity.Fixed(cert, identity.Pool([]*x509.Certificate{mp.Cert}))
		tr := &http.Transport{TLSClientConfig: identity.Client(src, identity.WantNode("platform.example"), "h2"), ForceAttemptHTTP2: true}
		defer tr.CloseIdleConnections()
		_, err := managementv1connect.NewManagementClient(&http.Client{Transport: tr}, "https://"+ln.Addr().String()).Report(context.Background(), connect.NewRequest(m))
		return api.FromWire("test", err)
	}
	ok := func() *managementv1.ReportRequest {
		return &managementv1.ReportRequest{Build: "v1", Node: "n1", Health: "ok", NodesVoting: 3}
	}
	smuggle := ok()
	smuggle.ProtoReflect().SetUnknown(protowire.AppendString(protowire.AppendTag(nil, 99, protowire.BytesType), "customer data"))
	long := ok()
	long.Build = strings.Repeat("x", 65)
	huge := ok()
	huge.Build = strings.Repeat("x", 1<<20)
	for name, tc := range map[string]struct {
		cert *tls.Certificate
		m    *managementv1.ReportRequest
		want fault.Kind // "" for success; "*" for any failure of the handshake
	}{
		"a node":                          {leaf(t, acme, "spiffe://acme.example/node/n1"), ok(), ""},
		"an operator":                     {leaf(t, acme, "spiffe://acme.example/operator/ann"), ok(), "*"},
		"an appliance":                    {leaf(t, acme, "spiffe://acme.example/appliance/eu-1"), ok(), "*"},
		"a stranger's authority":          {leaf(t, authority(t, "acme.example"), "spiffe://acme.example/node/n1"), ok(), "*"},
		"an unnamed trust domain":         {leaf(t, mp, "spiffe://platform.example/node/m1"), ok(), "*"},
		"a field that is not in schema":   {leaf(t, acme, "spiffe://acme.example/node/n1"), smuggle, fault.Invalid},
		"a word too long":                 {leaf(t, acme, "spiffe://acme.example/node/n1"), long, fault.Invalid},
		"a message too long":              {leaf(t, acme, "spiffe://acme.example/node/n1"), huge, fault.Busy},
		"a health that is not a health":   {leaf(t, acme, "spiffe://acme.example/node/n1"), &managementv1.ReportRequest{Health: "fine"}, fault.Invalid},
		"a node of another control plane": {leaf(t, other, "spiffe://other.example/node/n1"), ok(), ""},
	} {
		t.Run(name, func(t *testing.T) {
			err := call(t, tc.cert, tc.m)
			if tc.want == "*" && err != nil {
				return
			}
			if got := fault.Of(err); got != tc.want {
				t.Errorf("Report = %v (%q), want %q", err, got, tc.want)
			}
		})
	}
	res, err := s.List(context.Background(), nil)
	if err != nil {
		t.Fatal(err)
	}
	if len(res.Msg.GetControlPlanes()) != 2 || res.Msg.GetControlPlanes()[0].GetLast().GetNodesVoting() != 3 {
		t.Errorf("List = %v", res.Msg)
	}
}
