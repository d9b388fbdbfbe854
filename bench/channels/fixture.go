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
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/time/rate"

	boundaryv1 "github.com/demarc-dev/demarc/api/boundary/v1"
	"github.com/demarc-dev/demarc/api/boundary/v1/boundaryv1connect"
	controlv1 "github.com/demarc-dev/demarc/api/control/v1"
	"github.com/demarc-dev/demarc/api/control/v1/controlv1connect"
	"github.com/demarc-dev/demarc/identity"
	"github.com/demarc-dev/demarc/identity/identitytest"
	"github.com/demarc-dev/demarc/seal"
)

// Strangers may call a node 200 times a second, and 20 times from one address: more than that would be refused, and asked again
// in the same second.
const (
	strangers = 16  // addresses of loopback from which the appliances enrol
	callsEach = 12  // a second, from one
	callsAll  = 180 // from all of them
)

// bootstrap is the bootstrap service as one address calls it.
type bootstrap struct {
	boundaryv1connect.BootstrapClient
	calls *rate.Limiter
}

// fixture registers and enrols appliances over the real API.
type fixture struct {
	roots   *x509.CertPool
	control controlv1connect.ControlClient
	boot    []bootstrap
	calls   *rate.Limiter // of all strangers
	issuer  *identitytest.Issuer
	expect  []byte
	logKey  []byte
}

func openFixture(dir, addr string) (*fixture, error) {
	f := &fixture{calls: rate.NewLimiter(callsAll, 1)}
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
		return &http.Client{Transport: &http.Transport{DialContext: d.DialContext, ForceAttemptHTTP2: true,
			TLSClientConfig: identity.Client(identity.Fixed(leaf, f.roots), identity.WantNode(domain), "h2")}}
	}
	f.control = controlv1connect.NewControlClient(call(&ann, nil), "https://"+addr)
	for i := range byte(strangers) { // each network has a budget of its own
		c := boundaryv1connect.NewBootstrapClient(call(nil, net.IPv4(127, 0, 1, 1+i)), "https://"+addr)
		f.boot = append(f.boot, bootstrap{c, rate.NewLimiter(callsEach, 1)})
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
	_, err = f.control.RegisterCustomer(context.Background(),
		connect.NewRequest(&controlv1.RegisterCustomerRequest{RequestId: "customer", Name: "globex"}))
	return f, err
}

func (f *fixture) enrolAll(n int) ([]*tls.Certificate, error) {
	ctx, cancel := context.WithCancelCause(context.Background())
	defer cancel(nil)
	out := make([]*tls.Certificate, n)
	var wg sync.WaitGroup
	slots := make(chan struct{}, 64)
	for i := range n {
		slots <- struct{}{}
		wg.Go(func() {
			defer func() { <-slots }()
			var err error
			if out[i], err = f.enrol(ctx, fmt.Sprintf("a-%05d", i), f.boot[i%len(f.boot)]); err != nil {
				cancel(err) // the first is enough
			}
		})
	}
	wg.Wait()
	return out, context.Cause(ctx)
}

func (f *fixture) enrol(ctx context.Context, name string, boot bootstrap) (*tls.Certificate, error) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	_, err := f.control.RegisterAppliance(ctx,
		connect.NewRequest(&controlv1.RegisterApplianceRequest{RequestId: name, Name: name, Customer: "globex", Expect: f.expect}))
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
	der, err := f.once(ctx, boot, name, csr)
	if err != nil {
		return nil, err
	}
	parsed, err := x509.ParseCertificate(der)
	return &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: parsed}, err
}

// turn waits until a stranger may call.
func (f *fixture) turn(ctx context.Context, boot bootstrap) error {
	if err := boot.calls.Wait(ctx); err != nil {
		return err
	}
	return f.calls.Wait(ctx)
}

func (f *fixture) once(ctx context.Context, boot bootstrap, name string, csr []byte) ([]byte, error) {
	if err := f.turn(ctx, boot); err != nil {
		return nil, err
	}
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
	if err := f.turn(ctx, boot); err != nil {
		return nil, err
	}
	res, err := boot.Enrol(ctx,
		connect.NewRequest(&boundaryv1.EnrolRequest{Appliance: name, Nonce: ch.Msg.GetNonce(), Csr: csr, Token: token, LogKey: f.logKey}))
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
		return fmt.Errorf("%s holds %d appliances, and memory a channel is counted over all of them: use -n %d or another -dir", path,
			len(in.Leaves), len(in.Leaves))
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
