// SPDX-License-Identifier: Apache-2.0

package platform

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/identity"
	"github.com/demarc-dev/demarc/identity/identitytest"
)

// TestAddressesThatAreDialled: which addresses a name may resolve to, for whom. Where a row says no, nothing is sent there.
func TestAddressesThatAreDialled(t *testing.T) {
	for addr, want := range map[string][3]bool{ // listed issuers; AWS and Google; issuers whose host is listed as private
		"8.8.8.8":                {true, true, true},
		"2606:4700::1111":        {true, true, true},
		"10.0.0.1":               {false, true, true},
		"172.16.5.5":             {false, true, true},
		"192.168.1.1":            {false, true, true},
		"fd12:3456::1":           {false, true, true},
		"127.0.0.1":              {false, false, true},
		"127.8.8.8":              {false, false, true},
		"::1":                    {false, false, true},
		"::ffff:127.0.0.1":       {false, false, true},
		"::ffff:10.0.0.1":        {false, true, true},
		"100.64.0.1":             {false, true, true}, // carrier-grade NAT, and tailnets
		"192.0.2.1":              {false, true, true},
		"198.18.0.1":             {false, true, true},
		"240.0.0.1":              {false, true, true},
		"64:ff9b::7f00:1":        {false, true, true}, // they hold an address of IPv4
		"2002:7f00:1::1":         {false, true, true},
		"2001::1":                {false, true, true},
		"169.254.169.254":        {}, // metadata services
		"::ffff:169.254.169.254": {},
		"fd00:ec2::254":          {},
		"::ffff:168.63.129.16":   {},
		"::ffff:100.64.0.1":      {false, true, true},
		"fd20:ce::254":           {},
		"168.63.129.16":          {},
		"100.100.100.200":        {},
		"169.254.170.2":          {},
		"fe80::1":                {},
		"fe80::1%eth0":           {},
		"0.0.0.0":                {},
		"::":                     {},
		"224.0.0.1":              {},
		"ff02::1":                {},
	} {
		for i, may := range []func(netip.Addr) bool{publicOnly, privateToo, loopbackToo} {
			var no *refusedAddr
			err := dialer(may).Control("tcp", netip.AddrPortFrom(netip.MustParseAddr(addr), 443).String(), nil)
			if got := !errors.As(err, &no); got != want[i] {
				t.Errorf("%s, %d: dialled %t, want %t", addr, i, got, want[i])
			}
		}
	}
}

// TestPrivateHostIsTheIssuersOwn: what lets an issuer have a private address names that issuer's host.
func TestPrivateHostIsTheIssuersOwn(t *testing.T) {
	for _, host := range []string{"other.example", "x.example:8443", "X.example"} {
		if _, err := New(Options{Issuers: []Issuer{{URL: "https://x.example:8443/id", PrivateHost: host}}}); fault.Of(err) != fault.Invalid {
			t.Errorf("%q: %v, want invalid", host, err)
		}
	}
	if _, err := New(Options{Issuers: []Issuer{{URL: "https://x.example:8443/id", PrivateHost: "x.example"}}}); err != nil {
		t.Error(err)
	}
}

// TestStrangersHaveNobodyAskedOften: whatever keys tokens name, and whatever fails, an issuer is asked once in 30 s, by one at a time.
func TestStrangersHaveNobodyAskedOften(t *testing.T) {
	i, err := identitytest.NewIssuer("https://x.example")
	if err != nil {
		t.Fatal(err)
	}
	keys, err := identity.ParseKeys(i.JWKS())
	if err != nil {
		t.Fatal(err)
	}
	var asked, under, most atomic.Int64
	var fails error
	clock := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	ring := &keyring{now: func() time.Time { return clock }, fetch: func(context.Context) (identity.Keys, error) {
		asked.Add(1)
		most.Store(max(most.Load(), under.Add(1)))
		runtime.Gosched() // others may come in between
		under.Add(-1)
		return keys, fails
	}}
	get := func(kid string, want bool) {
		t.Helper()
		if _, err := ring.get(t.Context(), kid); (err == nil) != want {
			t.Errorf("%s: %v", kid, err)
		}
	}
	flood := func(want int64, why string, usable bool) {
		t.Helper()
		before := asked.Load()
		var wg sync.WaitGroup
		for range 200 {
			wg.Go(func() { get("unknown", usable) })
		}
		wg.Wait()
		if n := asked.Load() - before; n != want {
			t.Errorf("%s: asked %d times, want %d", why, n, want)
		}
	}
	flood(1, "the first", true)
	for range 100 {
		get(identitytest.RSA, true)
	}
	flood(0, "at once", true)
	clock = clock.Add(askAgain - time.Millisecond)
	flood(0, "hardly 30 s later", true)
	clock = clock.Add(time.Millisecond)
	flood(1, "30 s later", true)
	fails = fault.New("test", fault.Unavailable, "away")
	clock = clock.Add(askAgain)
	flood(1, "while asking fails", true)
	flood(0, "right after it failed", true)
	clock = clock.Add(fresh)
	get(identitytest.RSA, true) // keys that are no longer fresh serve while asking fails
	clock = clock.Add(stale)
	flood(1, "when the keys are a day old", false)
	flood(0, "and again", false)
	if n := most.Load(); n != 1 {
		t.Errorf("%d asked at once", n)
	}
}

// TestASlowPlatformHoldsNobody: a platform that begins an answer and never ends it, or takes a connection and says nothing, is left
// within its bound. Both clocks are fake.
func TestASlowPlatformHoldsNobody(t *testing.T) {
	for name, head := range map[string]string{
		"says nothing":        "",
		"never ends":          "HTTP/1.1 200 OK\r\nContent-Type: text/xml\r\nContent-Length: 1000\r\n\r\n<",
		"never ends its head": "HTTP/1.1 200 OK\r\nX-A: ",
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
				if err != nil {
					t.Fatal(err)
				}
				c := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
					DNSNames: []string{"sts.eu-central-1.amazonaws.com", "www.googleapis.com"}}
				der, err := x509.CreateCertificate(rand.Reader, c, c, &key.PublicKey, key)
				if err != nil {
					t.Fatal(err)
				}
				leaf, err := x509.ParseCertificate(der)
				if err != nil {
					t.Fatal(err)
				}
				roots := x509.NewCertPool()
				roots.AddCert(leaf)
				var wg sync.WaitGroup
				defer wg.Wait()
				v, err := New(Options{Now: time.Now, Roots: roots, Dial: func(context.Context, string, string) (net.Conn, error) {
					mine, theirs := net.Pipe()
					wg.Go(func() { // the platform
						if head != "" {
							s := tls.Server(theirs, &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}})
							_, _ = s.Read(make([]byte, 4096))
							_, _ = io.WriteString(s, head)
						}
						_, _ = io.Copy(io.Discard, theirs)
					})
					return mine, nil
				}})
				if err != nil {
					t.Fatal(err)
				}
				e := identity.Expect{Kind: identity.KindAWS, Account: "123456789012", RoleARN: "arn:aws:iam::123456789012:role/appliance"}
				began := time.Now()
				_, err = v.ask(t.Context(), e, identity.STSRequest{Host: "sts.eu-central-1.amazonaws.com", Region: "eu-central-1", Body: "x"})
				if took := time.Since(began); fault.Of(err) != fault.Unavailable || took > askTimeout {
					t.Errorf("STS: %v after %s", err, took)
				}
				began = time.Now()
				_, err = v.google.get(t.Context(), "kid")
				if took := time.Since(began); fault.Of(err) != fault.Unavailable || took > askTimeout {
					t.Errorf("keys: %v after %s", err, took)
				}
			})
		})
	}
}

// TestWhoIsDialledAtPrivateAddresses: which of the rules holds for whom. Each is refused before a packet is sent.
func TestWhoIsDialledAtPrivateAddresses(t *testing.T) {
	for _, i := range []Issuer{{URL: "https://10.0.0.1"}, {URL: "https://[fd12:3456::1]:6443"}, {URL: "https://100.64.0.1"}, {URL: "https://127.0.0.1:1"}, {URL: "https://169.254.169.254", PrivateHost: "169.254.169.254"}} {
		v, err := New(Options{Now: time.Now, Issuers: []Issuer{i}})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := v.issuers[i.URL].get(t.Context(), "kid"); fault.Of(err) != fault.Denied {
			t.Errorf("the issuer %s: %v, want denied", i.URL, err)
		}
	}
	v, err := New(Options{Now: time.Now, GoogleKeys: "https://127.0.0.1:1/certs"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := v.google.get(t.Context(), "kid"); fault.Of(err) != fault.Denied {
		t.Errorf("Google's keys on loopback: %v, want denied", err)
	}
}

// TestAnEndlessAnswerIsCut: of an answer that does not end little is read.
func TestAnEndlessAnswerIsCut(t *testing.T) {
	var sent atomic.Int64
	srv := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		for b := make([]byte, 64<<10); r.Context().Err() == nil; {
			n, err := w.Write(b)
			if sent.Add(int64(n)); err != nil {
				return
			}
		}
	}))
	defer srv.Close()
	c := client(func(ctx context.Context, network, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, network, srv.Listener.Addr().String())
	}, nil)
	c.Transport.(*http.Transport).TLSClientConfig = srv.Client().Transport.(*http.Transport).TLSClientConfig
	v := &Verifier{sts: c}
	e := identity.Expect{Kind: identity.KindAWS, Account: "123456789012", RoleARN: "arn:aws:iam::123456789012:role/appliance"}
	if _, err := v.ask(t.Context(), e, identity.STSRequest{Host: "example.com", Body: "x"}); fault.Of(err) != fault.Unavailable {
		t.Errorf("STS: %v", err)
	}
	if _, err := get(t.Context(), c, "https://example.com/keys"); fault.Of(err) != fault.Unavailable {
		t.Errorf("keys: %v", err)
	}
	if n := sent.Load(); n == 0 || n > 32<<20 { // what the kernel takes is more than what is read
		t.Errorf("%d bytes were taken", n)
	}
}
