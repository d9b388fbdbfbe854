// SPDX-License-Identifier: Apache-2.0

package appliance

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"

	"connectrpc.com/connect"

	"github.com/demarc-dev/demarc/api"
	boundaryv1 "github.com/demarc-dev/demarc/api/boundary/v1"
	"github.com/demarc-dev/demarc/api/boundary/v1/boundaryv1connect"
	"github.com/demarc-dev/demarc/daemon/appliance/platform"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/identity"
	"github.com/demarc-dev/demarc/seal"
)

// wallet is the appliance's own certificate and the vendor's CAs. It is an [identity.Source].
type wallet struct {
	path   string
	domain string

	mu    sync.Mutex
	held  held
	leaf  *tls.Certificate
	roots *x509.CertPool
}

// held is the wallet on disk.
type held struct {
	Version     string   `json:"version"`
	Key         []byte   `json:"key"`         // PKCS #8
	Certificate []byte   `json:"certificate"` // DER
	Bundle      [][]byte `json:"bundle"`      // DER
}

const walletVersion = "demarc-wallet/1"

// openWallet reads the wallet. Before the first enrolment there is none, and the CAs are those of the customer's file.
func openWallet(path, domain string, first []*x509.Certificate) (*wallet, error) {
	const op = "appliance.wallet"
	w := &wallet{path: path, domain: domain, roots: identity.Pool(first)}
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return w, nil
	}
	if err != nil {
		return nil, fault.Because(err, op, fault.Unavailable, "the appliance's certificate can't be read: %s", path)
	}
	var h held
	if err := seal.StrictJSON(b, &h); err != nil || h.Version != walletVersion {
		return nil, fault.Because(err, op, fault.Invalid, "%s is damaged: remove it, and the appliance enrols again", path)
	}
	return w, w.use(h)
}

// use takes over what was held. The lock is not taken: nobody else knows the wallet yet, or the caller has it.
func (w *wallet) use(h held) error {
	const op = "appliance.wallet"
	key, err := x509.ParsePKCS8PrivateKey(h.Key)
	if err != nil {
		return fault.At(op, fault.Invalid, err)
	}
	leaf, err := x509.ParseCertificate(h.Certificate)
	if err != nil {
		return fault.At(op, fault.Invalid, err)
	}
	var text []byte
	for _, der := range h.Bundle {
		text = append(text, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})...)
	}
	cas, err := identity.ParseBundle(text, w.domain)
	if err != nil {
		return fault.At(op, "", err)
	}
	w.held, w.leaf, w.roots = h, &tls.Certificate{Certificate: [][]byte{h.Certificate}, PrivateKey: key, Leaf: leaf}, identity.Pool(cas)
	return nil
}

// keep puts a new certificate on disk, then uses it.
func (w *wallet) keep(key crypto.Signer, certificate []byte, bundle [][]byte) error {
	const op = "appliance.wallet"
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return fault.At(op, fault.Internal, err)
	}
	h := held{walletVersion, der, certificate, bundle}
	w.mu.Lock()
	defer w.mu.Unlock()
	probe := &wallet{domain: w.domain}
	if err := probe.use(h); err != nil {
		return err
	}
	if err := writeJSON(w.path, h); err != nil {
		return err
	}
	return w.use(h)
}

// Leaf implements [identity.Source].
func (w *wallet) Leaf() (*tls.Certificate, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.leaf, nil
}

// Roots implements [identity.Source].
func (w *wallet) Roots() *x509.CertPool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.roots
}

// stranger is the wallet without its certificate: to enrol, nothing is shown.
type stranger struct{ *wallet }

// Leaf implements [identity.Source].
func (stranger) Leaf() (*tls.Certificate, error) { return nil, nil }

// good tells whether there is a certificate that has not run out.
func (w *wallet) good(now time.Time) bool {
	leaf, _ := w.Leaf()
	return leaf != nil && now.Before(leaf.Leaf.NotAfter)
}

// csr draws a key and asks for a certificate of it.
func csr() (crypto.Signer, []byte, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, fault.At("appliance.csr", fault.Internal, err)
	}
	der, err := identity.NewCSR(key, rand.Reader)
	return key, der, err
}

// enrol proves the platform identity and keeps the certificate that it is given. It gives the key of the vendor's log.
func (a *Appliance) enrol(ctx context.Context, c *link) ([]byte, error) {
	const op = "appliance.enrol"
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	client := boundaryv1connect.NewBootstrapClient(c.http, base, connect.WithReadMaxBytes(256<<10))
	ch, err := client.Challenge(ctx, connect.NewRequest(&boundaryv1.ChallengeRequest{}))
	if err != nil {
		return nil, api.FromWire(op, err)
	}
	if td := ch.Msg.GetTrustDomain(); td != a.cfg.TrustDomain {
		return nil, fault.New(op, fault.Denied, "the control plane is of the trust domain %.64q, the customer's file says %q", td, a.cfg.TrustDomain)
	}
	key, request, err := csr()
	if err != nil {
		return nil, err
	}
	audience, err := identity.Audience(a.cfg.TrustDomain, ch.Msg.GetNonce(), request)
	if err != nil {
		return nil, err
	}
	proof, err := platform.Prove(ctx, a.cfg.Proof, audience, time.Unix(ch.Msg.GetServerTimeUnix(), 0))
	if err != nil {
		return nil, err
	}
	own, err := seal.KeyOf(a.signer.Public())
	if err != nil {
		return nil, err
	}
	res, err := client.Enrol(ctx, connect.NewRequest(&boundaryv1.EnrolRequest{Appliance: a.cfg.Name, Nonce: ch.Msg.GetNonce(), Csr: request, Token: proof.Token, Aws: awsToWire(proof.AWS), LogKey: own.PEM()}))
	if err != nil {
		return nil, api.FromWire(op, err)
	}
	if err := a.wallet.keep(key, res.Msg.GetCertificate(), res.Msg.GetBundle()); err != nil {
		return nil, err
	}
	return res.Msg.GetLogKey(), nil
}

// openSigner reads or draws the key that signs this appliance's log and results.
func openSigner(path string) (ed25519.PrivateKey, error) {
	const op = "appliance.signer"
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		_, key, err := ed25519.GenerateKey(rand.Reader)
		if err != nil {
			return nil, fault.At(op, fault.Internal, err)
		}
		der, err := x509.MarshalPKCS8PrivateKey(key)
		if err != nil {
			return nil, fault.At(op, fault.Internal, err)
		}
		pub, err := seal.KeyOf(key.Public())
		if err != nil {
			return nil, err
		}
		if err := writeFile(filepath.Join(filepath.Dir(path), "log.pub"), pub.PEM()); err != nil { // auditors pin it
			return nil, err
		}
		return key, writeFile(path, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}))
	}
	if err != nil {
		return nil, fault.Because(err, op, fault.Unavailable, "the appliance's signing key can't be read: %s", path)
	}
	block, _ := pem.Decode(b)
	if block == nil {
		return nil, fault.New(op, fault.Invalid, "%s holds no key", path)
	}
	key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, fault.At(op, fault.Invalid, err)
	}
	ed, ok := key.(ed25519.PrivateKey)
	if !ok {
		return nil, fault.New(op, fault.Invalid, "%s holds a key that is not Ed25519", path)
	}
	return ed, nil
}

// writeFile replaces a file at once, readable by its owner only.
func writeFile(path string, b []byte) error {
	const op = "appliance.writeFile"
	f, err := os.CreateTemp(filepath.Dir(path), ".new-")
	if err != nil {
		return fault.At(op, fault.Unavailable, err)
	}
	defer os.Remove(f.Name())
	_, err = f.Write(b)
	if err = errors.Join(err, f.Sync(), f.Close()); err == nil {
		err = os.Rename(f.Name(), path)
	}
	return fault.At(op, fault.Unavailable, err)
}
