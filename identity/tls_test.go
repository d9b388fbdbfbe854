// SPDX-License-Identifier: Apache-2.0

package identity_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/identity"
	"github.com/demarc-dev/demarc/identity/identitytest"
)

// host is a CA that this process's host trusts, as hosts trust public CAs. No door may.
var host *identity.Authority

func TestMain(m *testing.M) {
	dir, err := os.MkdirTemp("", "identity")
	if err == nil {
		host, err = identity.NewCA(td, now, rand.Reader, identity.DefaultCALife)
	}
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, "ca.pem"), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: host.Cert.Raw}), 0o600)
	}
	if err == nil {
		err = errors.Join(os.Setenv("SSL_CERT_FILE", filepath.Join(dir, "ca.pem")), os.Setenv("SSL_CERT_DIR", dir))
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	goleak.VerifyTestMain(m, goleak.Cleanup(func(code int) {
		os.RemoveAll(dir)
		os.Exit(code)
	}))
}

// TestHostRootsCountForNothing: a Source without roots trusts nobody, not whomever the host trusts.
func TestHostRootsCountForNothing(t *testing.T) {
	n, a := leaf(t, host, fleet.Node, "n1"), leaf(t, host, fleet.Appliance, "eu-1")
	if _, err := n.Leaf.Verify(x509.VerifyOptions{CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}); err != nil {
		t.Skip("the host's roots can't be set on this system:", err)
	}
	pool := identity.Pool([]*x509.Certificate{host.Cert})
	for name, tc := range map[string]struct {
		server, client *x509.CertPool
		ok             bool
	}{"both given": {pool, pool, true}, "none at the server": {nil, pool, false}, "none at the client": {pool, nil, false}} {
		client := identity.Client(source{a, tc.client, now}, identity.WantNode(td))
		_, serr, cerr := shake(t, identity.Server(source{n, tc.server, now}, all, true), client)
		if (serr == nil && cerr == nil) != tc.ok {
			t.Errorf("%s: %v, %v", name, serr, cerr)
		}
	}
}

const (
	td    = "acme.example"
	proto = "demarc-test/1"
)

var now = time.Date(2026, 11, 24, 12, 0, 0, 0, time.UTC)

type source struct {
	leaf  *tls.Certificate
	roots *x509.CertPool
	at    time.Time
}

func (s source) Leaf() (*tls.Certificate, error) { return s.leaf, nil }
func (s source) Roots() *x509.CertPool           { return s.roots }
func (s source) Now() time.Time                  { return s.at }

func newCA(t testing.TB, domain string) *identity.Authority {
	t.Helper()
	ca, err := identity.NewCA(domain, now, rand.Reader, identity.DefaultCALife)
	if err != nil {
		t.Fatal(err)
	}
	return ca
}

func leaf(t testing.TB, ca *identity.Authority, r fleet.Role, name string) *tls.Certificate {
	t.Helper()
	d, err := identity.TrustDomainOf(ca.Cert)
	if err != nil {
		t.Fatal(err)
	}
	c, err := identitytest.Leaf(ca, fleet.PrincipalOf(d, r, name), now, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// forge signs what Issue never would.
func forge(t testing.TB, parent *x509.Certificate, signer any, change func(*x509.Certificate)) *tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{
		SerialNumber: big.NewInt(77), Subject: pkix.Name{CommonName: "forged"},
		NotBefore: now.Add(-time.Hour), NotAfter: now.Add(time.Hour), BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
		URIs: uris(t, "spiffe://"+td+"/node/n1"),
	}
	change(c)
	if parent == nil {
		parent, signer = c, key
	}
	der, err := x509.CreateCertificate(rand.Reader, c, parent, key.Public(), signer)
	if err != nil {
		t.Fatal(err)
	}
	got, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: got}
}

// shake does a whole handshake over loopback TCP, one byte each way included: in TLS 1.3 a client learns only then
// that it was refused.
func shake(t testing.TB, server, client *tls.Config) (onServer tls.ConnectionState, serverErr, clientErr error) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	done := make(chan struct{})
	go func() {
		defer close(done)
		raw, err := l.Accept()
		if err != nil {
			serverErr = err
			return
		}
		c := tls.Server(raw, server)
		defer c.Close()
		if serverErr = c.Handshake(); serverErr == nil {
			onServer = c.ConnectionState()
			_, serverErr = c.Write([]byte("x"))
		}
	}()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	raw, err := (&net.Dialer{}).DialContext(ctx, "tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	c := tls.Client(raw, client)
	if clientErr = c.HandshakeContext(ctx); clientErr == nil {
		_, clientErr = io.ReadFull(c, make([]byte, 1))
	}
	c.Close()
	<-done
	return onServer, serverErr, clientErr
}

func all(fleet.Principal, fleet.Serial) error { return nil }

func TestHandshake(t *testing.T) {
	ca := newCA(t, td)
	pool := identity.Pool([]*x509.Certificate{ca.Cert})
	mine := leaf(t, ca, fleet.Appliance, "eu-1")
	var who fleet.Principal
	var serial fleet.Serial
	server := identity.Server(source{leaf(t, ca, fleet.Node, "n1"), pool, now}, func(p fleet.Principal, s fleet.Serial) error {
		who, serial = p, s
		return nil
	}, true, proto)
	client := identity.Client(source{mine, pool, now}, identity.WantNode(td, "n1"), proto)
	client.ServerName = "a-route-that-proves-nothing.invalid"
	state, serr, cerr := shake(t, server, client)
	if serr != nil || cerr != nil {
		t.Fatal(serr, cerr)
	}
	if who != fleet.PrincipalOf(td, fleet.Appliance, "eu-1") || serial != identity.SerialOf(mine.Leaf) || serial == "" {
		t.Errorf("admit saw %q %q", who, serial)
	}
	if p, s, err := identity.PrincipalOf(&state); err != nil || p != who || s != serial {
		t.Errorf("PrincipalOf = %q %q %v", p, s, err)
	}
	begun := state
	begun.HandshakeComplete = false
	if p, _, err := identity.PrincipalOf(&begun); p != "" || fault.Of(err) != fault.Denied {
		t.Errorf("before the handshake is over the peer is %q, %v", p, err)
	}
	client.ClientSessionCache = tls.NewLRUClientSessionCache(8)
	for range 2 {
		if state, serr, cerr := shake(t, server, client); serr != nil || cerr != nil || state.DidResume {
			t.Errorf("resumed %t, %v, %v: each connection proves itself", state.DidResume, serr, cerr)
		}
	}
	if state.Version != tls.VersionTLS13 || state.CurveID != tls.X25519MLKEM768 || state.NegotiatedProtocol != proto {
		t.Errorf("version %x, curve %s, protocol %q", state.Version, state.CurveID, state.NegotiatedProtocol)
	}
}

// TestServerRefuses lets each caller that lies knock at a real door.
func TestServerRefuses(t *testing.T) {
	ca, foreign := newCA(t, td), newCA(t, "evil.example")
	pool := identity.Pool([]*x509.Certificate{ca.Cert, foreign.Cert}) // even where both are trusted
	n1 := leaf(t, ca, fleet.Node, "n1")
	operator := leaf(t, ca, fleet.Operator, "ann")
	sign := func(change func(*x509.Certificate)) *tls.Certificate { return forge(t, ca.Cert, ca.Key, change) }
	// An appliance that would be a CA: its key signs a leaf for another name.
	appliance := leaf(t, ca, fleet.Appliance, "eu-1")
	below := forge(t, appliance.Leaf, appliance.PrivateKey, func(*x509.Certificate) {})
	below.Certificate = append(below.Certificate, appliance.Certificate[0])
	// A forged leaf of nobody, with true certificates of the CA beside it (the class of GHSA-mrpr-756c-xm47).
	self := forge(t, nil, nil, func(*x509.Certificate) {})
	self.Certificate = append(self.Certificate, operator.Certificate[0], ca.Cert.Raw)
	// A CA that the CA signed, and a leaf of it.
	second := sign(func(c *x509.Certificate) {
		c.IsCA, c.KeyUsage, c.ExtKeyUsage, c.URIs = true, x509.KeyUsageCertSign, nil, uris(t, "spiffe://"+td)
	})
	grandchild := forge(t, second.Leaf, second.PrivateKey, func(*x509.Certificate) {})
	grandchild.Certificate = append(grandchild.Certificate, second.Certificate[0])
	// The true leaf of another, without its key.
	stolen := &tls.Certificate{Certificate: operator.Certificate, PrivateKey: self.PrivateKey}
	unbound := forge(t, nil, nil, func(c *x509.Certificate) {
		c.IsCA, c.KeyUsage, c.ExtKeyUsage, c.URIs = true, x509.KeyUsageCertSign, nil, uris(t, "spiffe://evil.example")
	})
	pool.AddCert(unbound.Leaf) // a CA without name constraints
	for name, tc := range map[string]struct {
		cert *tls.Certificate
		want string
	}{
		"no certificate":          {nil, "didn't provide a certificate"},
		"leaf versus chain":       {self, "unknown authority"},
		"an appliance as CA":      {below, "parent certificate cannot sign"},
		"a CA below the CA":       {grandchild, "too many intermediates"},
		"stolen certificate":      {stolen, "invalid signature"},
		"two SPIFFE IDs":          {sign(named(t, "spiffe://"+td+"/node/n1", "spiffe://"+td+"/operator/ann")), "carries 2 URI names"},
		"the same ID twice":       {sign(named(t, "spiffe://"+td+"/node/n1", "spiffe://"+td+"/node/n1")), "carries 2 URI names"},
		"no SPIFFE ID":            {sign(func(c *x509.Certificate) { c.URIs = nil }), "carries 0 URI names"},
		"a web address":           {sign(named(t, "https://"+td+"/node/n1")), "not a SPIFFE ID"},
		"an unknown role":         {sign(named(t, "spiffe://"+td+"/root/n1")), "spiffe://<trust domain>/"},
		"too deep a path":         {sign(named(t, "spiffe://"+td+"/node/n1/x")), "spiffe://<trust domain>/"},
		"an encoded path":         {sign(named(t, "spiffe://"+td+"/node%2Fn1")), "not a SPIFFE ID"},
		"a trust domain's own ID": {sign(named(t, "spiffe://"+td)), "spiffe://<trust domain>/"},
		"foreign, constrained":    {forge(t, foreign.Cert, foreign.Key, func(*x509.Certificate) {}), "not permitted"},
		"foreign, unconstrained":  {forge(t, unbound.Leaf, unbound.PrivateKey, func(*x509.Certificate) {}), `CA is that of "evil.example"`},
		"the CA itself":           {&tls.Certificate{Certificate: [][]byte{ca.Cert.Raw}, PrivateKey: ca.Key}, "its own issuer"},
		"for servers only": {sign(func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} }),
			"incompatible key usage"},
		"for no use":    {sign(func(c *x509.Certificate) { c.ExtKeyUsage = nil }), "not for clients"},
		"for any use":   {sign(func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageAny} }), "not for clients"},
		"a second CA":   {sign(func(c *x509.Certificate) { c.IsCA = true }), ""},
		"expired":       {sign(func(c *x509.Certificate) { c.NotBefore, c.NotAfter = now.Add(-2*time.Hour), now.Add(-time.Minute) }), "expired"},
		"not yet valid": {sign(func(c *x509.Certificate) { c.NotBefore = now.Add(time.Minute) }), "not yet valid"},
	} {
		t.Run(name, func(t *testing.T) {
			for _, need := range []bool{true, false} {
				if tc.cert == nil && !need {
					continue
				}
				server := identity.Server(source{n1, pool, now}, all, need, proto)
				client := identity.Client(source{tc.cert, pool, now}, identity.WantNode(td), proto)
				if tc.cert != nil { // crypto/tls would hold back a leaf that the server's CA list does not fit
					client.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return tc.cert, nil }
				}
				_, serr, cerr := shake(t, server, client)
				if serr == nil || cerr == nil || !strings.Contains(serr.Error(), tc.want) {
					t.Errorf("needClient %v: server says %v, client %v; want %q", need, serr, cerr, tc.want)
				}
			}
		})
	}
}

func TestServerDoors(t *testing.T) {
	ca := newCA(t, td)
	pool := identity.Pool([]*x509.Certificate{ca.Cert})
	node := source{leaf(t, ca, fleet.Node, "n1"), pool, now}
	me := source{leaf(t, ca, fleet.Operator, "ann"), pool, now}
	client := func(s source, protos ...string) *tls.Config {
		return identity.Client(s, identity.WantNode(td), protos...)
	}
	banned := fault.New("test", fault.Denied, "banned")

	t.Run("stranger where strangers may knock", func(t *testing.T) {
		state, serr, cerr := shake(t, identity.Server(node, nil, false, proto), client(source{nil, pool, now}, proto))
		if serr != nil || cerr != nil {
			t.Fatal(serr, cerr)
		}
		if who, _, err := identity.PrincipalOf(&state); who != "" || fault.Of(err) != fault.Denied {
			t.Errorf("a stranger is %q, %v", who, err)
		}
	})
	for name, tc := range map[string]struct {
		server, client *tls.Config
		want           string
	}{
		"banned": {identity.Server(node, func(fleet.Principal, fleet.Serial) error { return banned }, true, proto), client(me, proto),
			"banned"},
		"nil admit":  {identity.Server(node, nil, true, proto), client(me, proto), "admits nobody"},
		"no ALPN":    {identity.Server(node, all, true, proto), client(me), "none of the protocols"},
		"other ALPN": {identity.Server(node, all, true, proto), client(me, "h2"), "unsupported application protocols"},
		"no leaf":    {identity.Server(source{nil, pool, now}, all, true, proto), client(me, proto), "no certificate yet"},
		"nil roots":  {identity.Server(source{node.leaf, nil, now}, all, true, proto), client(me, proto), "unknown authority"},
		"TLS 1.2": {identity.Server(node, all, true, proto), func() *tls.Config {
			c := client(me, proto)
			c.MinVersion, c.MaxVersion = tls.VersionTLS12, tls.VersionTLS12
			return c
		}(), "unsupported versions"},
		"lost config": {func() *tls.Config { c := identity.Server(node, all, true, proto); c.GetConfigForClient = nil; return c }(),
			client(me, proto), "unknown authority"},
	} {
		t.Run(name, func(t *testing.T) {
			_, serr, cerr := shake(t, tc.server, tc.client)
			if serr == nil || cerr == nil || !strings.Contains(serr.Error(), tc.want) {
				t.Errorf("server says %v, client %v; want %q", serr, cerr, tc.want)
			}
		})
	}
}

// TestClientRefuses lets each answerer that lies answer a real call.
func TestClientRefuses(t *testing.T) {
	ca, foreign := newCA(t, td), newCA(t, "evil.example")
	pool := identity.Pool([]*x509.Certificate{ca.Cert})
	proxy := forge(t, nil, nil, func(c *x509.Certificate) {
		c.Subject, c.URIs, c.DNSNames = pkix.Name{Organization: []string{"Corp Inspection"}}, nil, []string{"cp.acme.example"}
	})
	sign := func(change func(*x509.Certificate)) *tls.Certificate { return forge(t, ca.Cert, ca.Key, change) }
	for name, tc := range map[string]struct {
		cert *tls.Certificate
		kind fault.Kind
		want string
	}{
		"an inspecting proxy":      {proxy, fault.Denied, "Corp Inspection"},
		"another control plane":    {leaf(t, foreign, fleet.Node, "n1"), fault.Denied, "not your vendor"},
		"an appliance":             {leaf(t, ca, fleet.Appliance, "eu-1"), fault.Denied, "incompatible key usage"},
		"an appliance, server too": {sign(named(t, "spiffe://"+td+"/appliance/n1")), fault.Denied, "a node of trust domain"},
		"another node":             {leaf(t, ca, fleet.Node, "n2"), fault.Denied, "a node of trust domain"},
		"two SPIFFE IDs":           {sign(named(t, "spiffe://"+td+"/node/n1", "spiffe://"+td+"/node/n2")), fault.Denied, "carries 2 URI names"},
		"only a DNS name": {sign(func(c *x509.Certificate) { c.URIs, c.DNSNames = nil, []string{"cp.acme.example"} }), fault.Denied,
			"carries 0 URI names"},
		"any use": {sign(func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageAny} }), fault.Denied,
			"not for servers"},
		"expired": {sign(func(c *x509.Certificate) { c.NotAfter = now.Add(-time.Second) }), fault.Expired,
			"compare the clocks"},
		"the CA":                    {&tls.Certificate{Certificate: [][]byte{ca.Cert.Raw}, PrivateKey: ca.Key}, fault.Denied, "its own issuer"},
		"a true one, for the proof": {leaf(t, ca, fleet.Node, "n1"), "", ""},
	} {
		t.Run(name, func(t *testing.T) {
			server := identity.Server(source{tc.cert, pool, now}, nil, false, proto)
			client := identity.Client(source{nil, pool, now}, identity.WantNode(td, "n1"), proto)
			client.ServerName = "cp.acme.example"
			_, _, err := shake(t, server, client)
			if fault.Of(err) != tc.kind || (err != nil && !strings.Contains(err.Error(), tc.want)) {
				t.Errorf("client says %v, want %q %q", err, tc.kind, tc.want)
			}
			if name == "an inspecting proxy" {
				var ua x509.UnknownAuthorityError
				if !errors.As(err, &ua) || ua.Cert.Issuer.Organization[0] != "Corp Inspection" {
					t.Errorf("the cause does not hold the issuer: %v", err)
				}
			}
		})
	}
	t.Run("nil want", func(t *testing.T) {
		server := identity.Server(source{leaf(t, ca, fleet.Node, "n1"), pool, now}, nil, false)
		if _, _, err := shake(t, server, identity.Client(source{nil, pool, now}, nil)); fault.Of(err) != fault.Denied {
			t.Errorf("a client that wants nobody got %v", err)
		}
	})
}

// TestClockTenHoursOff: a certificate issued now passes on hosts whose clock is ten hours slow or fast.
func TestClockTenHoursOff(t *testing.T) {
	ca := newCA(t, td)
	pool := identity.Pool([]*x509.Certificate{ca.Cert})
	n, err := identitytest.Leaf(ca, fleet.PrincipalOf(td, fleet.Node, "n1"), now, identity.DefaultLeafLife)
	if err != nil {
		t.Fatal(err)
	}
	for off, ok := range map[time.Duration]bool{-10 * time.Hour: true, 10 * time.Hour: true, -13 * time.Hour: false,
		31 * 24 * time.Hour: false} {
		_, _, err := shake(t, identity.Server(source{n, pool, now}, nil, false),
			identity.Client(source{nil, pool, now.Add(off)}, identity.WantNode(td)))
		if (err == nil) != ok || (err != nil && fault.Of(err) != fault.Expired) {
			t.Errorf("clock off by %s: %v", off, err)
		}
	}
}

// rotating is a Source over slots.
type rotating struct {
	source
	slots *[]identity.Slot
}

func (r rotating) Roots() *x509.CertPool {
	p, err := identity.Bundle(*r.slots)
	if err != nil {
		return nil
	}
	return p
}

// TestRotationHasNoGap walks two CAs through their stages; the configs are made once, as a daemon makes them.
func TestRotationHasNoGap(t *testing.T) {
	a, b := newCA(t, td), newCA(t, td)
	var slots []identity.Slot
	step := func(next []identity.Slot, err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		slots = next
	}
	idA, idB := fleet.DigestOf(a.Cert.Raw), fleet.DigestOf(b.Cert.Raw)
	step(identity.Prepare(nil, a.Cert.Raw, []byte("a")))
	step(identity.Activate(slots, idA))
	node, app := leaf(t, a, fleet.Node, "n1"), leaf(t, a, fleet.Appliance, "eu-1")
	ns, as := &tls.Certificate{}, &tls.Certificate{}
	*ns, *as = *node, *app
	server := identity.Server(rotating{source{ns, nil, now}, &slots}, all, true)
	client := identity.Client(rotating{source{as, nil, now}, &slots}, identity.WantNode(td))
	call := func(when string, want bool) {
		t.Helper()
		if _, serr, cerr := shake(t, server, client); (serr == nil && cerr == nil) != want {
			t.Fatalf("%s: %v, %v", when, serr, cerr)
		}
	}
	call("before", true)
	step(identity.Prepare(slots, b.Cert.Raw, []byte("b")))
	call("prepared", true)
	step(identity.Activate(slots, idB))
	call("both leaves old", true)
	if s, err := identity.Issuer(slots); err != nil || s.ID() != idB || slots[0].Stage != identity.Tainted {
		t.Fatalf("issuer %v %v, first slot %s", s.ID(), err, slots[0].Stage)
	}
	*ns = *leaf(t, b, fleet.Node, "n1")
	call("new server, old client", true)
	*as = *leaf(t, b, fleet.Appliance, "eu-1")
	call("both new", true)
	step(identity.Retire(slots, idA))
	call("retired", true)
	*as = *app
	call("a leaf of the retired CA", false)
	if slots[0].SealedKey != nil {
		t.Error("a retired slot keeps its key")
	}
	for name, err := range map[string]error{
		"retire the active":    second(identity.Retire(slots, idB)),
		"activate the retired": second(identity.Activate(slots, idA)),
		"prepare it again":     second(identity.Prepare(slots, a.Cert.Raw, nil)),
		"another domain":       second(identity.Prepare(slots, newCA(t, "evil.example").Cert.Raw, nil)),
	} {
		if fault.Of(err) != fault.Conflict {
			t.Errorf("%s: %v, want a conflict", name, err)
		}
	}
	if fault.Of(second(identity.Activate(slots, "sha256:00"))) != fault.NotFound ||
		fault.Of(second(identity.Prepare(slots, node.Certificate[0], nil))) != fault.Denied {
		t.Error("an unknown slot or a leaf as CA is accepted")
	}
}

func second[T any](_ T, err error) error { return err }
