// SPDX-License-Identifier: Apache-2.0

// Package credentials stores the appliance's certificate with its key, the vendor's CA certificates as the vendor signed them, and the
// key that signs the appliance's log. What was altered on disk is reported and not used.
package credentials

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"sync"
	"time"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/identity"
	"github.com/demarc-dev/demarc/smallfile"
)

// Store is the appliance's own certificate and the vendor's CAs. It is an [identity.Source].
type Store struct {
	path   string
	domain string

	clock func() time.Time // of this host

	mu         sync.Mutex
	file       stored
	leaf       *tls.Certificate
	roots      *x509.CertPool
	signed     uint64         // number of the bundle whose signature is on disk; 0: none
	offset     time.Duration  // from the host's clock to the vendor's, if they differ by much; never stored on disk
	lastOffset *time.Duration // last measured clock offset; nil if never measured
}

// stored is the credentials file.
type stored struct {
	Version     string   `json:"version"`
	Key         []byte   `json:"key"`         // PKCS #8
	Certificate []byte   `json:"certificate"` // DER
	Bundle      [][]byte `json:"bundle"`      // DER

	Number  uint64       `json:"number,omitempty"`  // of the bundle; it never decreases
	Issuer  fleet.Digest `json:"issuer,omitempty"`  // the active CA of the bundle, if known
	Pending []byte       `json:"pending,omitempty"` // PKCS #8: the key of a certificate request without a response yet
}

const fileVersion = "demarc-wallet/1"

// Open reads the credentials. Before the first enrolment there are none, and the CAs are those of the customer's file. pinned is the key
// of the vendor's log, PEM, nil before it is known. damage is the parts on disk that are not used; see load.
func Open(path, domain string, first []*x509.Certificate, pinned []byte, clock func() time.Time) (w *Store, damage []error,
	err error) {
	w = &Store{path: path, domain: domain, clock: clock}
	damage, err = w.load(first, pinned)
	return w, damage, err
}

// certificate returns the certificate with its key, nil if there is none.
func (h stored) certificate() (*tls.Certificate, error) {
	const op = "appliance.wallet"
	if len(h.Certificate) == 0 {
		return nil, nil
	}
	key, err := x509.ParsePKCS8PrivateKey(h.Key)
	if err != nil {
		return nil, fault.At(op, fault.Invalid, err)
	}
	leaf, err := x509.ParseCertificate(h.Certificate)
	if err != nil {
		return nil, fault.At(op, fault.Invalid, err)
	}
	signer, ok := key.(crypto.Signer)
	if pub, same := leaf.PublicKey.(interface{ Equal(crypto.PublicKey) bool }); !ok || !same || !pub.Equal(signer.Public()) {
		return nil, fault.New(op, fault.Invalid, "the certificate is not of the key that asked for it")
	}
	return &tls.Certificate{Certificate: [][]byte{h.Certificate}, PrivateKey: key, Leaf: leaf}, nil
}

// use takes over what is stored. Without CAs no peer is trusted. The caller holds mu, or is the only one with the store.
func (w *Store) use(h stored) error {
	own, err := h.certificate()
	if err != nil {
		return err
	}
	var cas []*x509.Certificate
	if len(h.Bundle) > 0 {
		if cas, err = identity.ParseDER(h.Bundle, w.domain); err != nil {
			return fault.At("appliance.wallet", "", err)
		}
	}
	w.file, w.leaf, w.roots = h, own, identity.Pool(cas)
	return nil
}

// store writes changed credentials to disk, then uses them: a crash in between finds what was stored.
func (w *Store) store(change func(h *stored)) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	h := w.file
	change(&h)
	probe := &Store{domain: w.domain}
	if err := probe.use(h); err != nil {
		return err
	}
	if err := writeJSON(w.path, h); err != nil {
		return err
	}
	return w.use(h)
}

// PendingKey returns the key for a certificate request. It is on disk before the request is sent, so that the key of an issued
// certificate is never lost.
func (w *Store) PendingKey() (crypto.Signer, []byte, error) {
	const op = "appliance.wallet"
	w.mu.Lock()
	der := w.file.Pending
	w.mu.Unlock()
	if len(der) == 0 {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			return nil, nil, fault.At(op, fault.Internal, err)
		}
		if der, err = x509.MarshalPKCS8PrivateKey(key); err != nil {
			return nil, nil, fault.At(op, fault.Internal, err)
		}
		if err := w.store(func(h *stored) { h.Pending = der }); err != nil {
			return nil, nil, err
		}
	}
	key, err := x509.ParsePKCS8PrivateKey(der)
	if err != nil {
		return nil, nil, fault.At(op, fault.Invalid, err)
	}
	signer, ok := key.(crypto.Signer)
	if !ok {
		return nil, nil, fault.New(op, fault.Invalid, "the pending key does not sign")
	}
	request, err := identity.NewCSR(signer, rand.Reader)
	return signer, request, err
}

// StoreCertificate writes a new certificate to disk, then uses it. The previous one stays until then. A bundle comes with it only at the
// first enrolment, when there is no key to verify a signed one; nil leaves the stored CAs as they are.
func (w *Store) StoreCertificate(key crypto.Signer, certificate []byte, bundle [][]byte, number uint64) error {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return fault.At("appliance.wallet", fault.Internal, err)
	}
	return w.store(func(h *stored) {
		h.Version, h.Key, h.Certificate, h.Pending = fileVersion, der, certificate, nil
		if len(bundle) > 0 && number >= h.Number {
			h.Bundle, h.Number, h.Issuer = bundle, number, ""
		}
		if h.Issuer == "" {
			h.Issuer = issuerOf(certificate, h.Bundle) // the active one: it has just issued
		}
	})
}

// Trust stores the CAs of a verified bundle, and the bundle as received. It reports whether they changed.
func (w *Store) Trust(b identity.SignedBundle, sealed []byte) (bool, error) {
	if b.Number < w.BundleNumber() {
		return false, nil
	}
	if err := w.storeSigned(b, sealed); err != nil { // first: after a crash in between, the newer one is there with its signature
		return false, err
	}
	if b.Number == w.BundleNumber() && w.issuer() == b.Issuer {
		return false, nil
	}
	return true, w.store(func(h *stored) { h.Bundle, h.Number, h.Issuer = b.CAs, b.Number, b.Issuer })
}

// BundleNumber is the number of the stored bundle.
func (w *Store) BundleNumber() uint64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.file.Number
}

func (w *Store) issuer() fleet.Digest {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.file.Issuer
}

// Tainted reports whether the certificate was issued by a CA that is no longer active.
func (w *Store) Tainted() bool {
	w.mu.Lock()
	h := w.file
	w.mu.Unlock()
	return len(h.Certificate) > 0 && h.Issuer != "" && issuerOf(h.Certificate, h.Bundle) != h.Issuer
}

// issuerOf returns which of the CAs signed the certificate, "" for none of them.
func issuerOf(certificate []byte, cas [][]byte) fleet.Digest {
	leaf, err := x509.ParseCertificate(certificate)
	if err != nil {
		return ""
	}
	for _, der := range cas {
		if ca, err := x509.ParseCertificate(der); err == nil && leaf.CheckSignatureFrom(ca) == nil {
			return fleet.DigestOf(der)
		}
	}
	return ""
}

// Now is the clock of handshakes and renewals: the host's, corrected by the vendor's if they differ by much.
func (w *Store) Now() time.Time {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.clock().Add(w.offset)
}

// ClockTolerance is how far the host's clock may be off before it is corrected, for certificates only.
const ClockTolerance = 5 * time.Minute

// SetTime takes the time of the authenticated vendor. It returns the offset in use now, and whether it changed.
func (w *Store) SetTime(at time.Time) (time.Duration, bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	off := at.Sub(w.clock())
	apart := off
	w.lastOffset = &apart
	if off.Abs() <= ClockTolerance {
		off = 0
	}
	news := (off-w.offset).Abs() > ClockTolerance || (off == 0) != (w.offset == 0)
	if news {
		w.offset = off
	}
	return w.offset, news
}

// ClockOffset is the last measured offset from the host's clock to the vendor's; nil if never measured.
func (w *Store) ClockOffset() *time.Duration {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.lastOffset
}

// Leaf implements [identity.Source].
func (w *Store) Leaf() (*tls.Certificate, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.leaf, nil
}

// Serial is the serial of the certificate, "" if there is none.
func (w *Store) Serial() string {
	if leaf, _ := w.Leaf(); leaf != nil { // Leaf has no error here
		return string(identity.SerialOf(leaf.Leaf))
	}
	return ""
}

// Roots implements [identity.Source].
func (w *Store) Roots() *x509.CertPool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.roots
}

// Anonymous is the store without its certificate: the client of an enrolment has none.
type Anonymous struct{ *Store }

// Leaf implements [identity.Source].
func (Anonymous) Leaf() (*tls.Certificate, error) { return nil, nil }

// Valid reports whether there is a certificate that has not expired.
func (w *Store) Valid() bool {
	leaf, _ := w.Leaf()
	return leaf != nil && w.Now().Before(leaf.Leaf.NotAfter)
}

// writeFile replaces a file atomically, readable by its owner only; once it returns, a crash does not bring the old one back.
func writeFile(path string, b []byte) error {
	return fault.At("appliance.writeFile", fault.Unavailable, smallfile.Replace(path, b))
}

func writeJSON(path string, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return fault.At("appliance.writeJSON", fault.Internal, err)
	}
	return writeFile(path, b)
}
