// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"time"

	"connectrpc.com/connect"

	boundaryv1 "github.com/demarc-dev/demarc/api/boundary/v1"
	"github.com/demarc-dev/demarc/api/boundary/v1/boundaryv1connect"
	controlv1 "github.com/demarc-dev/demarc/api/control/v1"
	"github.com/demarc-dev/demarc/api/control/v1/controlv1connect"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/identity"
	"github.com/demarc-dev/demarc/identity/identitytest"
	"github.com/demarc-dev/demarc/seal"
)

// strangers is from how many addresses of loopback the appliances enrol.
const strangers = 16

// fixture registers and enrols appliances over the real API.
type fixture struct {
	roots   *x509.CertPool
	control controlv1connect.ControlClient
	boot    []boundaryv1connect.BootstrapClient
	issuer  *identitytest.Issuer
	expect  []byte
	logKey  []byte
}

func openFixture(dir, addr string) (*fixture, error) {
	f := &fixture{}
	var err error
	if f.roots, err = readPool(filepath.Join(dir, "bundle.pem")); err != nil {
		return nil, err
	}
	ann, err := tls.LoadX509KeyPair(filepath.Join(dir, "operator", "cert.pem"), filepath.Join(dir, "operator", "cert.key"))
	if err != nil {
		return nil, err
	}
	call := func(leaf *tls.Certificate, from net.IP) *http.Client {
		d := &net.Dialer{LocalAddr: &net.TCPAddr{IP: from}}
		return &http.Client{Transport: &http.Transport{DialContext: d.DialContext, ForceAttemptHTTP2: true, TLSClientConfig: identity.Client(identity.Fixed(leaf, f.roots), identity.WantNode(domain), "h2")}}
	}
	f.control = controlv1connect.NewControlClient(call(&ann, nil), "https://"+addr)
	for i := range byte(strangers) { // each network has a budget of its own
		f.boot = append(f.boot, boundaryv1connect.NewBootstrapClient(call(nil, net.IPv4(127, 0, 1, 1+i)), "https://"+addr))
	}
	if f.issuer, err = identitytest.NewIssuer("https://issuer.bench.example"); err != nil {
		return nil, err
	}
	if f.expect, err = json.Marshal(f.issuer.Expect("demarc", "appliance")); err != nil {
		return nil, err
	}
	pub, _, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return nil, err
	}
	k, err := seal.KeyOf(pub)
	if err != nil {
		return nil, err
	}
	f.logKey = k.PEM()
	_, err = f.control.RegisterCustomer(context.Background(), connect.NewRequest(&controlv1.RegisterCustomerRequest{RequestId: "customer", Name: "globex"}))
	return f, err
}

func (f *fixture) enrolAll(n int) ([]*tls.Certificate, error) {
	out := make([]*tls.Certificate, n)
	errs := make([]error, n)
	var wg sync.WaitGroup
	slots := make(chan struct{}, 64)
	for i := range n {
		slots <- struct{}{}
		wg.Go(func() {
			defer func() { <-slots }()
			out[i], errs[i] = f.enrol(fmt.Sprintf("a-%05d", i), f.boot[i%len(f.boot)])
		})
	}
	wg.Wait()
	return out, errors.Join(errs...)
}

func (f *fixture) enrol(name string, boot boundaryv1connect.BootstrapClient) (*tls.Certificate, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	_, err := f.control.RegisterAppliance(ctx, connect.NewRequest(&controlv1.RegisterApplianceRequest{RequestId: name, Name: name, Customer: "globex", Expect: f.expect}))
	if err != nil {
		return nil, err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	csr, err := identity.NewCSR(key, rand.Reader)
	if err != nil {
		return nil, err
	}
	for {
		der, err := f.once(ctx, boot, name, csr)
		if err == nil {
			leaf, err := x509.ParseCertificate(der)
			return &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}, err
		}
		if connect.CodeOf(err) != connect.CodeResourceExhausted { // the budget of strangers: it is asked again
			return nil, err
		}
		select {
		case <-ctx.Done():
			return nil, fault.At("bench.enrol", fault.Unavailable, err)
		case <-time.After(200 * time.Millisecond):
		}
	}
}

func (f *fixture) once(ctx context.Context, boot boundaryv1connect.BootstrapClient, name string, csr []byte) ([]byte, error) {
	ch, err := boot.Challenge(ctx, connect.NewRequest(&boundaryv1.ChallengeRequest{}))
	if err != nil {
		return nil, err
	}
	audience, err := identity.Audience(domain, ch.Msg.GetNonce(), csr)
	if err != nil {
		return nil, err
	}
	token, err := f.issuer.Token("demarc", "appliance", audience, time.Now())
	if err != nil {
		return nil, err
	}
	res, err := boot.Enrol(ctx, connect.NewRequest(&boundaryv1.EnrolRequest{Appliance: name, Nonce: ch.Msg.GetNonce(), Csr: csr, Token: token, LogKey: f.logKey}))
	if err != nil {
		return nil, err
	}
	return res.Msg.GetCertificate(), nil
}

// enrolled is what a run leaves for later ones.
type enrolled struct {
	At     place   `json:"at"`
	Empty  float64 `json:"empty_kib"`
	Leaves []leaf  `json:"leaves"`
}

type leaf struct {
	Certificate []byte `json:"certificate"` // DER
	Key         []byte `json:"key"`         // PKCS #8
}

func (b *bench) save(path string) error {
	out := enrolled{At: b.at, Empty: b.empty}
	for _, l := range b.leaves {
		key, err := x509.MarshalPKCS8PrivateKey(l.PrivateKey)
		if err != nil {
			return err
		}
		out.Leaves = append(out.Leaves, leaf{l.Certificate[0], key})
	}
	raw, err := json.Marshal(out)
	if err != nil {
		return err
	}
	return os.WriteFile(path, raw, 0o600)
}

func (b *bench) load(path string, n int) (err error) {
	raw, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	var in enrolled
	if err := json.Unmarshal(raw, &in); err != nil {
		return err
	}
	if len(in.Leaves) != n {
		return fmt.Errorf("%s holds %d appliances, and memory a channel is counted over all of them: use -n %d or another -dir", path, len(in.Leaves), len(in.Leaves))
	}
	b.at, b.empty = in.At, in.Empty
	if b.roots, err = readPool(filepath.Join(b.vendor, "bundle.pem")); err != nil {
		return err
	}
	for _, l := range in.Leaves {
		key, err := x509.ParsePKCS8PrivateKey(l.Key)
		if err != nil {
			return err
		}
		cert, err := x509.ParseCertificate(l.Certificate)
		if err != nil {
			return err
		}
		b.leaves = append(b.leaves, &tls.Certificate{Certificate: [][]byte{l.Certificate}, PrivateKey: key, Leaf: cert})
	}
	return nil
}

func readPool(path string) (*x509.CertPool, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(b) {
		return nil, fmt.Errorf("no certificate in %s", path)
	}
	return pool, nil
}
