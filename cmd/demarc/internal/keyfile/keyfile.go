// SPDX-License-Identifier: Apache-2.0

// Package keyfile is the files of a person's keys: made, read, and what follows from them.
//
// The promise: a private key is written once, with mode 0600, and never over another file. The key that output is
// encrypted to follows from the signing key, so that one file and one passphrase is all that a customer must keep.
//
//	KEY            the private key, encrypted with a passphrase (package seal), mode 0600
//	KEY.pub        PEM, "PUBLIC KEY"
//	KEY.recipient  age recipient (age1...) for the output of operations
//
// The age identity is HKDF-SHA256(Ed25519 seed, no salt, "demarc-output-key/1"), 32 bytes, as an X25519 key of age.
package keyfile

import (
	"bytes"
	"crypto"
	"crypto/ed25519"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"

	"filippo.io/age"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/seal"
)

const (
	outputInfo = "demarc-output-key/1"
	maxFile    = 64 << 10
)

// OutputIdentity derives the key that opens the output of operations from a signing key. Only an Ed25519 key has one.
func OutputIdentity(s crypto.Signer) (*age.X25519Identity, error) {
	const op = "keyfile.OutputIdentity"
	k, ok := s.(ed25519.PrivateKey)
	if !ok || len(k) != ed25519.PrivateKeySize {
		return nil, fault.New(op, fault.Invalid, "a key of type %T has no output key: only Ed25519 keys do", s)
	}
	secret, err := hkdf.Key(sha256.New, k.Seed(), nil, outputInfo, 32)
	if err != nil {
		return nil, fault.At(op, fault.Internal, err)
	}
	id, err := age.ParseX25519Identity(strings.ToUpper(bech32("age-secret-key-", secret)))
	if err != nil {
		return nil, fault.At(op, fault.Internal, err)
	}
	return id, nil
}

// Created is what Create made.
type Created struct {
	Key       seal.Key
	Recipient string
	Files     []string // private, public, recipient
}

// Create makes a signing key and writes its three files. None of them may be there already.
func Create(path string, passphrase []byte) (Created, error) {
	const op = "keyfile.Create"
	if len(passphrase) == 0 {
		return Created{}, fault.New(op, fault.Invalid, "an empty passphrase protects nothing: choose another")
	}
	pub, priv, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return Created{}, fault.At(op, fault.Internal, err)
	}
	key, err := seal.KeyOf(pub)
	if err != nil {
		return Created{}, err
	}
	id, err := OutputIdentity(priv)
	if err != nil {
		return Created{}, err
	}
	file, err := seal.EncryptKey(priv, passphrase)
	if err != nil {
		return Created{}, err
	}
	out := Created{Key: key, Recipient: id.Recipient().String(), Files: []string{path, path + ".pub", path + ".recipient"}}
	for _, f := range out.Files {
		if _, err := os.Lstat(f); err == nil {
			return Created{}, fault.New(op, fault.Conflict, "%s is there already, and a key is never overwritten: choose another name", f)
		}
	}
	for i, b := range [][]byte{file, key.PEM(), []byte(out.Recipient + "\n")} {
		mode := os.FileMode(0o644)
		if i == 0 {
			mode = 0o600
		}
		if err := WriteNew(out.Files[i], b, mode); err != nil {
			return Created{}, err
		}
	}
	return out, nil
}

// WriteNew writes a file that must not be there yet, whole or not at all.
func WriteNew(path string, b []byte, mode os.FileMode) error {
	const op = "keyfile.WriteNew"
	f, err := os.CreateTemp(filepath.Dir(path), ".new-*") // mode 0600
	if err != nil {
		return fault.Because(err, op, fault.Unavailable, "can't write in the folder %s", filepath.Dir(path))
	}
	defer os.Remove(f.Name())
	_, err = f.Write(b)
	if err = errors.Join(err, f.Chmod(mode), f.Sync(), f.Close()); err != nil {
		return fault.Because(err, op, fault.Unavailable, "can't write %s", path)
	}
	if err := os.Link(f.Name(), path); errors.Is(err, os.ErrExist) { // a link never replaces
		return fault.New(op, fault.Conflict, "%s is there already and is not overwritten: choose another name", path)
	} else if err != nil {
		return fault.Because(err, op, fault.Unavailable, "can't write %s", path)
	}
	return nil
}

// Read reads a small file, at most 64 KiB.
func Read(path string) ([]byte, error) { return ReadMax(path, maxFile) }

// ReadMax reads a file of at most so many bytes.
func ReadMax(path string, most int64) ([]byte, error) {
	const op = "keyfile.Read"
	f, err := os.Open(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil, fault.New(op, fault.NotFound, "there is no file %s", path)
	}
	if err != nil {
		return nil, fault.Because(err, op, fault.Unavailable, "can't read %s", path)
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, most+1))
	if err != nil {
		return nil, fault.Because(err, op, fault.Unavailable, "can't read %s", path)
	}
	if int64(len(b)) > most {
		return nil, fault.New(op, fault.Invalid, "%s has more than %d bytes", path, most)
	}
	return b, nil
}

// Encrypted reports whether a private key file needs a passphrase.
func Encrypted(file []byte) bool {
	block, _ := pem.Decode(file)
	return block == nil || block.Type != "PRIVATE KEY"
}

// ParseSigner reads a private key: one that seal.EncryptKey wrote, or PEM (PKCS #8) in the clear, as operators have.
// passphrase is asked for only where it is needed.
func ParseSigner(file []byte, passphrase func() ([]byte, error)) (crypto.Signer, error) {
	const op = "keyfile.ParseSigner"
	if Encrypted(file) {
		p, err := passphrase()
		if err != nil {
			return nil, err
		}
		return seal.DecryptKey(file, p)
	}
	block, rest := pem.Decode(file)
	if len(bytes.TrimSpace(rest)) != 0 {
		return nil, fault.New(op, fault.Invalid, "more than one key is in the file")
	}
	k, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, fault.Because(err, op, fault.Invalid, "the PEM block holds no private key (PKCS #8)")
	}
	s, ok := k.(crypto.Signer)
	if !ok {
		return nil, fault.New(op, fault.Invalid, "a key of type %T does not sign", k)
	}
	if _, err := seal.KeyOf(s.Public()); err != nil {
		return nil, err
	}
	return s, nil
}

// PEM writes a private key in the clear, PKCS #8.
func PEM(s crypto.Signer) ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(s)
	if err != nil {
		return nil, fault.At("keyfile.PEM", fault.Internal, err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), nil
}
