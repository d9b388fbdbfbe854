// SPDX-License-Identifier: Apache-2.0

package management_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
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
	"github.com/demarc-dev/demarc/seal"
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

// unbound is a CA that speaks for a trust domain and is held to none by its certificate.
func unbound(t *testing.T, td string) *identity.Authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: td}, NotBefore: time.Now().Add(-time.Hour),
		NotAfter: time.Now().Add(time.Hour), URIs: []*url.URL{{Scheme: "spiffe", Host: td}},
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	der, err := x509.CreateCertificate(rand.Reader, c, c, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &identity.Authority{Cert: cert, Key: key}
}

// leaf issues for any trust domain, as a CA may that nothing holds back.
func leaf(t *testing.T, ca *identity.Authority, who fleet.Principal) *tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	id, err := url.Parse(string(who))
	if err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{SerialNumber: big.NewInt(time.Now().UnixNano()), NotBefore: time.Now().Add(-time.Hour),
		NotAfter: time.Now().Add(time.Hour), URIs: []*url.URL{id},
		BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth}}
	der, err := x509.CreateCertificate(rand.Reader, c, ca.Cert, key.Public(), ca.Key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: cert}
}

// vendor is a control plane's log key.
type vendor struct {
	t   *testing.T
	td  string
	key ed25519.PrivateKey
}

func newVendor(t *testing.T, td string) vendor {
	t.Helper()
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return vendor{t, td, key}
}

func (v vendor) peer(name string) management.Peer {
	v.t.Helper()
	k, err := seal.KeyOf(v.key.Public())
	if err != nil {
		v.t.Fatal(err)
	}
	return management.Peer{Name: name, TrustDomain: v.td, LogKey: k}
}

// signs makes a bundle of CAs.
func (v vendor) signs(number uint64, cas ...*identity.Authority) []byte {
	v.t.Helper()
	var slots []identity.Slot
	for _, ca := range cas {
		slots = append(slots, identity.Slot{Stage: identity.Tainted, CertDER: ca.Cert.Raw})
	}
	b, err := identity.SealBundle(v.td, number, slots, time.Now(), nil, v.key)
	if err != nil {
		v.t.Fatal(err)
	}
	return b
}

// plane is a management plane on loopback.
type plane struct {
	t    *testing.T
	s    *management.Server
	own  *identity.Authority
	addr string
}

func newPlane(t *testing.T, dir string, peers ...management.Peer) *plane {
	t.Helper()
	s, err := management.New(management.Options{Peers: peers, Dir: dir, Now: time.Now, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	p := &plane{t: t, s: s, own: authority(t, "platform.example")}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p.addr = ln.Addr().String()
	in, conf := s.Listen(ln, leaf(t, p.own, "spiffe://platform.example/node/m1"))
	srv := &http.Server{Handler: s.Handler(), TLSConfig: conf, ErrorLog: slog.NewLogLogger(slog.DiscardHandler, slog.LevelDebug)}
	done := make(chan struct{})
	go func() { defer close(done); _ = srv.ServeTLS(in, "", "") }()
	t.Cleanup(func() { srv.Close(); <-done })
	return p
}

// client shows a certificate, or none.
func (p *plane) client(cert *tls.Certificate) managementv1connect.ManagementClient {
	conf := identity.Client(identity.Fixed(nil, identity.Pool([]*x509.Certificate{p.own.Cert})), identity.WantNode("platform.example"), "h2")
	if cert != nil { // crypto/tls would hold back one that the list of CAs does not fit
		conf.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return cert, nil }
	}
	tr := &http.Transport{TLSClientConfig: conf, ForceAttemptHTTP2: true}
	p.t.Cleanup(tr.CloseIdleConnections)
	return managementv1connect.NewManagementClient(&http.Client{Transport: tr}, "https://"+p.addr)
}

func (p *plane) report(cert *tls.Certificate, m *managementv1.ReportRequest) error {
	_, err := p.client(cert).Report(p.t.Context(), connect.NewRequest(m))
	return api.FromWire("test", err)
}

func (p *plane) bundle(sealed []byte) (uint64, error) {
	res, err := p.client(nil).Bundle(p.t.Context(), connect.NewRequest(&managementv1.BundleRequest{Sealed: sealed}))
	if err != nil {
		return 0, api.FromWire("test", err)
	}
	return res.Msg.GetNumber(), nil
}

func well() *managementv1.ReportRequest {
	return &managementv1.ReportRequest{Build: "v1", Node: "n1", Health: "ok", NodesVoting: 3}
}

// knocks reads what the door says after a handshake: in TLS 1.3 a client learns only then that it was refused.
func (p *plane) knocks(cert *tls.Certificate) error {
	p.t.Helper()
	conf := identity.Client(identity.Fixed(nil, identity.Pool([]*x509.Certificate{p.own.Cert})), identity.WantNode("platform.example"), "h2")
	conf.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return cert, nil }
	c, err := (&tls.Dialer{Config: conf}).DialContext(p.t.Context(), "tcp", p.addr)
	if err != nil {
		p.t.Fatal(err)
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		p.t.Fatal(err)
	}
	_, err = c.Read(make([]byte, 1))
	return err
}

// TestWhoMayReport: nodes of the control planes that the file names, in a message that is closed. Each that is refused is refused by its
// own layer: in the handshake, by the rule of [management.Server.Admit], and by the table.
func TestWhoMayReport(t *testing.T) {
	acme, other := newVendor(t, "acme.example"), newVendor(t, "other.example")
	acmeCA, otherCA, evilCA := authority(t, "acme.example"), authority(t, "other.example"), unbound(t, "other.example")
	p := newPlane(t, t.TempDir(), acme.peer("acme"), other.peer("other"))
	for _, b := range [][]byte{acme.signs(1, acmeCA), other.signs(1, otherCA, evilCA)} {
		if _, err := p.bundle(b); err != nil {
			t.Fatal(err)
		}
	}
	for name, cert := range map[string]*tls.Certificate{
		"a node":                          leaf(t, acmeCA, "spiffe://acme.example/node/n1"),
		"a node of another control plane": leaf(t, evilCA, "spiffe://other.example/node/n1"),
	} {
		if err := p.report(cert, well()); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	for name, tc := range map[string]struct {
		who  fleet.Principal
		by   *identity.Authority
		want string // of Admit; "" where it has nothing against the name
	}{
		"an operator":                             {"spiffe://acme.example/operator/ann", acmeCA, "not a node of a control plane"},
		"an appliance":                            {"spiffe://acme.example/appliance/eu-1", acmeCA, "not a node of a control plane"},
		"an unnamed trust domain":                 {"spiffe://platform.example/node/m1", p.own, "not a node of a control plane"},
		"a stranger's authority":                  {"spiffe://acme.example/node/n1", authority(t, "acme.example"), ""},
		"a node that the other vendor's CA signs": {"spiffe://acme.example/node/n1", evilCA, ""},
	} {
		t.Run(name, func(t *testing.T) {
			cert := leaf(t, tc.by, tc.who)
			if err := p.knocks(cert); err == nil || !strings.Contains(err.Error(), "remote error: tls") {
				t.Errorf("met with %v, want the door shut in the handshake", err)
			}
			err := p.s.Admit(tc.who, identity.SerialOf(cert.Leaf))
			if tc.want == "" && err != nil || tc.want != "" && (fault.Of(err) != fault.Denied || !strings.Contains(fault.Text(err), tc.want)) {
				t.Errorf("Admit = %v, want %q", err, tc.want)
			}
		})
	}
	for class, may := range map[api.Caller]bool{api.Node: true, api.Operator: false, api.Appliance: false, api.Stranger: false,
		api.Owner: false} {
		if got := api.May(api.Who{Class: class, Rank: fleet.Admin}, managementv1connect.ManagementReportProcedure); got != may {
			t.Errorf("the table lets a caller of the class %s report: %v", class, got)
		}
	}
	if err := api.FromWire("test", func() error { return p.report(nil, well()) }()); fault.Of(err) != fault.Denied {
		t.Errorf("a caller without a certificate reports: %v", err)
	}

	node := leaf(t, acmeCA, "spiffe://acme.example/node/n1")
	smuggle := well()
	smuggle.ProtoReflect().SetUnknown(protowire.AppendString(protowire.AppendTag(nil, 99, protowire.BytesType), "customer data"))
	long, large, huge, odd := well(), well(), well(), well()
	long.Build, large.Build, huge.Build, odd.Health = strings.Repeat("x", 65), strings.Repeat("x", 8<<10), strings.Repeat("x", 1<<20), "fine"
	for name, tc := range map[string]struct {
		m    *managementv1.ReportRequest
		want fault.Kind
	}{
		"a field that is not in schema": {smuggle, fault.Invalid},
		"a word too long":               {long, fault.Invalid},
		"a message too long":            {large, fault.Invalid},
		"a message much too long":       {huge, fault.Busy},
		"a health that is not a health": {odd, fault.Invalid},
	} {
		if err := p.report(node, tc.m); fault.Of(err) != tc.want {
			t.Errorf("%s: %v, want %q", name, err, tc.want)
		}
	}
	res, err := p.s.List(context.Background(), nil)
	if err != nil {
		t.Fatal(err)
	}
	if all := res.Msg.GetControlPlanes(); len(all) != 2 || all[0].GetLast().GetNodesVoting() != 3 || all[0].GetBundle() != 1 {
		t.Errorf("List = %v", res.Msg)
	}
}

// TestAnotherCAIsTakenFromTheLogKey (FAULTS.md I9): a change of CA at a control plane needs nobody here and no restart. Connections that
// showed a CA which is not trusted any more end at once (I2), and after a restart it is not trusted again.
func TestAnotherCAIsTakenFromTheLogKey(t *testing.T) {
	acme, dir := newVendor(t, "acme.example"), t.TempDir()
	one, two := authority(t, "acme.example"), authority(t, "acme.example")
	old, next := leaf(t, one, "spiffe://acme.example/node/n1"), leaf(t, two, "spiffe://acme.example/node/n1")
	p := newPlane(t, dir, acme.peer("acme"))
	if err := p.report(old, well()); err == nil {
		t.Fatal("a node is recognised by no CA at all")
	}
	takes := func(p *plane, want uint64, sealed []byte) {
		t.Helper()
		if got, err := p.bundle(sealed); err != nil || got != want {
			t.Fatalf("bundle %d is held: %v, want %d", got, err, want)
		}
	}
	reports := func(p *plane, cert *tls.Certificate, want bool) {
		t.Helper()
		if err := p.report(cert, well()); (err == nil) != want {
			t.Fatalf("report: %v, want it taken: %v", err, want)
		}
	}
	takes(p, 1, acme.signs(1, one))
	reports(p, old, true)
	reports(p, next, false)
	held := p.client(old) // a connection that stays
	report := func() error {
		_, err := held.Report(t.Context(), connect.NewRequest(well()))
		return err
	}
	if err := report(); err != nil {
		t.Fatal(err)
	}
	takes(p, 2, acme.signs(2, one, two))
	reports(p, old, true)
	reports(p, next, true)
	// who answers is not the question here
	conn, err := tls.Dial("tcp", p.addr,
		&tls.Config{Certificates: []tls.Certificate{*old}, NextProtos: []string{"h2"}, InsecureSkipVerify: true})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := conn.Read(make([]byte, 1)); err != nil { // of the server's settings: the certificate was taken
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() { defer close(ended); _, _ = io.Copy(io.Discard, conn) }()
	takes(p, 3, acme.signs(3, two))
	select {
	case <-ended:
	case <-time.After(20 * time.Second):
		t.Error("a connection of a CA that is not trusted any more is still open")
	}
	if err := report(); err == nil {
		t.Error("a node reports with a certificate of a CA that is not trusted any more")
	}
	reports(p, next, true)

	forged := newVendor(t, "acme.example")
	elsewhere := vendor{t, "other.example", acme.key}
	for name, tc := range map[string]struct {
		sealed []byte
		want   fault.Kind
	}{
		"an older one":            {acme.signs(2, one, two), fault.Conflict},
		"another key":             {forged.signs(9, one), fault.Denied},
		"another trust domain":    {elsewhere.signs(9, authority(t, "other.example")), fault.Denied},
		"CAs of another domain":   {acme.signs(9, authority(t, "other.example")), fault.Denied},
		"nothing":                 {nil, fault.Denied},
		"what is larger than all": {bytes.Repeat([]byte("x"), 1<<20), fault.Busy},
	} {
		if _, err := p.bundle(tc.sealed); fault.Of(err) != tc.want {
			t.Errorf("%s: %v, want %s", name, err, tc.want)
		}
	}
	reports(p, old, false)
	reports(p, next, true)

	again := newPlane(t, dir, acme.peer("acme"))
	reports(again, next, true)
	reports(again, old, false)
	if _, err := again.bundle(acme.signs(2, one, two)); fault.Of(err) != fault.Conflict {
		t.Errorf("an older one after a restart: %v", err)
	}
	if err := os.WriteFile(filepath.Join(dir, "acme.bundle.signed"), forged.signs(9, one), 0o600); err != nil {
		t.Fatal(err)
	}
	damaged := newPlane(t, dir, acme.peer("acme"))
	reports(damaged, old, false)
	reports(damaged, next, false)
	takes(damaged, 3, acme.signs(3, two))
	reports(damaged, next, true)
}
