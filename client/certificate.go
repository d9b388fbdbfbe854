// SPDX-License-Identifier: Apache-2.0

package client

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	controlv1 "github.com/demarc-dev/demarc/api/control/v1"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/identity"
)

// NewKey draws a key for a certificate, and the request to be signed by a CA.
func NewKey() (key crypto.Signer, csr []byte, err error) {
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, fault.At("client.NewKey", fault.Internal, err)
	}
	csr, err = identity.NewCSR(k, rand.Reader)
	return k, csr, err
}

// ParseIssued reads a certificate that was issued for a key.
func ParseIssued(der []byte, key crypto.Signer) (*x509.Certificate, error) {
	const op = "client.ParseIssued"
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fault.Because(err, op, fault.Invalid, "the control plane answered with no certificate")
	}
	if pub, ok := leaf.PublicKey.(*ecdsa.PublicKey); !ok || !pub.Equal(key.Public()) {
		return nil, fault.New(op, fault.Invalid, "the certificate is not of the key that asked for it")
	}
	return leaf, nil
}

// KeyPEM encodes a private key.
func KeyPEM(k crypto.Signer) ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		return nil, fault.At("client.KeyPEM", fault.Internal, err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), nil
}

// CertificatesPEM encodes certificates.
func CertificatesPEM(ders ...[]byte) []byte {
	var out []byte
	for _, der := range ders {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})...)
	}
	return out
}

// Renew replaces the operator's certificate and key on disk, and returns until when the new one is valid. The old one is valid until the
// new one is used for the first time.
func (c *Client) Renew(ctx context.Context) (time.Time, error) {
	key, csr, err := NewKey()
	if err != nil {
		return time.Time{}, err
	}
	m, err := Call(ctx, c, Node.RenewOperator, &controlv1.RenewOperatorRequest{Csr: csr})
	if err != nil {
		return time.Time{}, err
	}
	leaf, err := ParseIssued(m.GetCertificate(), key)
	if err != nil {
		return time.Time{}, err
	}
	keyPEM, err := KeyPEM(key)
	if err != nil {
		return time.Time{}, err
	}
	return leaf.NotAfter, ReplaceFiles(map[string][]byte{c.Key: keyPEM, c.Certificate: CertificatesPEM(leaf.Raw)})
}

// LoadPair reads a certificate and its key. If they do not match, a renewal was killed while [ReplaceFiles] put them in their places: what
// lies beside them completes the pair, and is put there now.
func LoadPair(cert, key string) (tls.Certificate, error) {
	const tries, between = 10, 20 * time.Millisecond // a renewal beside this process is between two renames for less than that
	cert, key = filepath.Clean(cert), filepath.Clean(key)
	leaf, err := tls.LoadX509KeyPair(cert, key)
	for try := 0; err != nil && try < tries; try++ {
		<-time.After(between)
		leaf, err = tls.LoadX509KeyPair(cert, key)
	}
	if err == nil {
		return leaf, nil
	}
	for _, p := range [][2]string{{cert + ".new", key}, {cert, key + ".new"}, {cert + ".new", key + ".new"}} {
		leaf, none := tls.LoadX509KeyPair(p[0], p[1])
		if none != nil {
			continue
		}
		for i, to := range []string{cert, key} {
			if p[i] == to {
				continue
			}
			err := os.Rename(p[i], to)
			if err != nil && !errors.Is(err, fs.ErrNotExist) { // not there: a renewal beside this process did it
				return leaf, fault.Because(err, "client.LoadPair", fault.Unavailable,
					"a renewal was cut short, and %s can't be put in the place of %s", p[i], to)
			}
		}
		return leaf, nil
	}
	return leaf, err
}

// ReplaceFiles writes files beside the old ones, readable by their owner only, and puts them in their places when all are there. If that is
// cut short, those with .new at the end belong together.
func ReplaceFiles(files map[string][]byte) error {
	const op = "client.ReplaceFiles"
	for path, b := range files {
		f, err := os.OpenFile(filepath.Clean(path)+".new", os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
		if err != nil {
			return fault.Because(err, op, fault.Unavailable, "%s.new can't be written", path)
		}
		_, err = f.Write(b)
		if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
			_ = os.Remove(f.Name())
			return fault.Because(err, op, fault.Unavailable, "%s.new can't be written: %s", path, fault.Disk(err))
		}
	}
	for path := range files {
		err := os.Rename(filepath.Clean(path)+".new", filepath.Clean(path))
		if err != nil && !errors.Is(err, fs.ErrNotExist) { // not there: see LoadPair
			return fault.Because(err, op, fault.Unavailable, "%s can't be replaced", path)
		}
	}
	return nil
}
