// SPDX-License-Identifier: Apache-2.0

package client

import (
	"crypto/ed25519"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"filippo.io/age"
	"go.yaml.in/yaml/v3"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/smallfile"
)

// maxOperatorFile bounds the operator's file, and each key that it names, in bytes.
const maxOperatorFile = 64 << 10

// Operator is an operator's file: who the operator is, and where the control plane is. Paths in it are relative to the file.
type Operator struct {
	TrustDomain  string   `yaml:"trust_domain"`
	Name         string   `yaml:"name"`
	Nodes        []string `yaml:"nodes"` // host:port, tried in order
	Certificate  string   `yaml:"certificate"`
	Key          string   `yaml:"key"`
	Bundle       string   `yaml:"bundle"`            // the vendor's CAs; kept up to date by the client itself
	LogKey       string   `yaml:"log_key,omitempty"` // of the vendor's log, which signs the bundle; log.pub beside the file if absent
	SigningKey   string   `yaml:"signing_key"`       // signs releases
	RequestKey   string   `yaml:"request_key"`       // signs requests for operations
	RecipientKey string   `yaml:"recipient_key"`     // reads released output

	File string `yaml:"-"` // where it was read
}

// ReadOperator reads an operator's file, and makes its paths absolute or relative to the working directory.
// The fault is NotFound if the file can't be read, and Invalid if it is no operator's file.
func ReadOperator(path string) (Operator, error) {
	const op = "client.ReadOperator"
	o := Operator{File: path}
	f, err := os.Open(path)
	if err != nil {
		return o, fault.Because(err, op, fault.NotFound, "the operator's file can't be read: %s", path)
	}
	defer f.Close()
	dec := yaml.NewDecoder(io.LimitReader(f, maxOperatorFile))
	dec.KnownFields(true)
	if err := dec.Decode(&o); err != nil {
		return o, fault.Because(err, op, fault.Invalid, "%s: %v", path, err)
	}
	if o.LogKey == "" {
		o.LogKey = "log.pub"
	}
	for _, p := range []*string{&o.Certificate, &o.Key, &o.Bundle, &o.LogKey, &o.SigningKey, &o.RequestKey, &o.RecipientKey} {
		if *p != "" && !filepath.IsAbs(*p) {
			*p = filepath.Join(filepath.Dir(path), *p)
		}
	}
	if o.TrustDomain == "" || len(o.Nodes) == 0 {
		return o, fault.New(op, fault.Invalid, "%s names no trust_domain or no nodes", path)
	}
	return o, nil
}

// ReleaseSigner reads the key that signs releases.
func (o Operator) ReleaseSigner() (ed25519.PrivateKey, error) {
	return signer("signing_key", o.SigningKey)
}

// RequestSigner reads the key that signs requests for operations.
func (o Operator) RequestSigner() (ed25519.PrivateKey, error) {
	return signer("request_key", o.RequestKey)
}

// signer reads a private key in PEM; field is what the operator's file calls it.
func signer(field, path string) (ed25519.PrivateKey, error) {
	const op = "client.signer"
	if path == "" {
		return nil, fault.New(op, fault.Invalid, "the operator's file names no %s", field)
	}
	b, err := smallfile.Read(path, maxOperatorFile)
	if err != nil {
		return nil, fault.Because(err, op, fault.NotFound, "%s can't be read: %s", field, path)
	}
	block, _ := pem.Decode(b)
	if block == nil {
		return nil, fault.New(op, fault.Invalid, "%s is not a PEM file", path)
	}
	k, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, fault.Because(err, op, fault.Invalid, "%s holds no PKCS #8 key", path)
	}
	ed, ok := k.(ed25519.PrivateKey)
	if !ok {
		return nil, fault.New(op, fault.Invalid, "%s holds a key that is not Ed25519", path)
	}
	return ed, nil
}

// Recipient reads the key that opens released output.
func (o Operator) Recipient() (*age.X25519Identity, error) {
	const op = "client.Recipient"
	b, err := smallfile.Read(o.RecipientKey, maxOperatorFile)
	if err != nil {
		return nil, fault.Because(err, op, fault.NotFound, "recipient_key can't be read: %s", o.RecipientKey)
	}
	id, err := age.ParseX25519Identity(strings.TrimSpace(string(b)))
	if err != nil {
		return nil, fault.Because(err, op, fault.Invalid, "%s holds no age key", o.RecipientKey)
	}
	return id, nil
}

// read reads a file of at most so many bytes. The fault is NotFound if there is none.
func read(file string, most int64) ([]byte, error) {
	const op = "client.read"
	b, err := smallfile.Read(file, most)
	switch {
	case err == nil:
		return b, nil
	case errors.Is(err, fs.ErrNotExist):
		return nil, fault.New(op, fault.NotFound, "there is no file %s", file)
	case errors.Is(err, smallfile.ErrTooLarge):
		return nil, fault.New(op, fault.Invalid, "%s has more than %d bytes", file, most)
	}
	return nil, fault.Because(err, op, fault.Unavailable, "can't read %s", file)
}
