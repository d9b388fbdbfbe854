// SPDX-License-Identifier: Apache-2.0

package seal

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"io"
	"strings"

	"filippo.io/age"
	"filippo.io/age/armor"
	"golang.org/x/crypto/ssh"

	"github.com/demarc-dev/demarc/fault"
)

// Work factors of scrypt, as powers of two. WorkFactor takes about a second; a reader spends at most four times that,
// whatever the file asks for.
const (
	WorkFactor    = 18
	maxWorkFactor = 20
	maxKeyFile    = 16 << 10
)

// EncryptKey writes a private key as a file: PKCS #8, encrypted with a passphrase (age, scrypt), in ASCII armor.
func EncryptKey(s crypto.Signer, passphrase []byte) ([]byte, error) {
	return EncryptKeyAt(s, passphrase, WorkFactor)
}

// EncryptKeyAt is EncryptKey with a chosen work factor, 2 to the power of logN. Less than WorkFactor is for tests.
func EncryptKeyAt(s crypto.Signer, passphrase []byte, logN int) ([]byte, error) {
	const op = "seal.EncryptKey"
	if logN < 1 || logN > maxWorkFactor {
		return nil, fault.New(op, fault.Invalid, "work factor %d: use 1 to %d", logN, maxWorkFactor)
	}
	if len(passphrase) == 0 {
		return nil, fault.New(op, fault.Invalid, "the passphrase is empty")
	}
	if s == nil {
		return nil, fault.New(op, fault.Invalid, "a private key is missing")
	}
	if _, err := KeyOf(s.Public()); err != nil {
		return nil, err
	}
	der, err := x509.MarshalPKCS8PrivateKey(s)
	if err != nil {
		return nil, fault.Because(err, op, fault.Invalid, "the private half is not at hand: a key in a device can't be written to a file")
	}
	r, err := age.NewScryptRecipient(string(passphrase))
	if err != nil {
		return nil, fault.At(op, fault.Invalid, err)
	}
	r.SetWorkFactor(logN)
	var out bytes.Buffer
	a := armor.NewWriter(&out)
	w, err := age.Encrypt(a, r)
	if err == nil {
		_, err = w.Write(der)
	}
	if err == nil {
		err = errors.Join(w.Close(), a.Close())
	}
	if err != nil {
		return nil, fault.At(op, fault.Internal, err)
	}
	return out.Bytes(), nil
}

// DecryptKey reads a file that EncryptKey wrote. A wrong passphrase is fault.Denied.
func DecryptKey(file, passphrase []byte) (crypto.Signer, error) {
	const op = "seal.DecryptKey"
	if len(file) > maxKeyFile {
		return nil, fault.New(op, fault.Invalid, "the key file has %d bytes, at most %d are allowed", len(file), maxKeyFile)
	}
	if LooksReadable(file) {
		return nil, fault.New(op, fault.Invalid, "the key file is not encrypted: make it anew with a passphrase")
	}
	if len(passphrase) == 0 {
		return nil, fault.New(op, fault.Denied, "the passphrase is empty")
	}
	id, err := age.NewScryptIdentity(string(passphrase))
	if err != nil {
		return nil, fault.At(op, fault.Denied, err)
	}
	id.SetMaxWorkFactor(maxWorkFactor)
	r, err := age.Decrypt(armor.NewReader(bytes.NewReader(file)), id)
	if err != nil {
		var none *age.NoIdentityMatchError
		if errors.As(err, &none) {
			return nil, fault.Because(err, op, fault.Denied, "the passphrase does not open this key")
		}
		return nil, fault.Because(err, op, fault.Invalid, "not a key file that a passphrase opens")
	}
	der, err := io.ReadAll(io.LimitReader(r, maxKeyFile))
	if err != nil {
		return nil, fault.Because(err, op, fault.Invalid, "the key file is damaged")
	}
	key, err := x509.ParsePKCS8PrivateKey(der)
	if err != nil {
		return nil, fault.Because(err, op, fault.Invalid, "the key file holds no private key")
	}
	var s crypto.Signer
	switch k := key.(type) {
	case ed25519.PrivateKey:
		s = k
	case *ecdsa.PrivateKey:
		s = k
	default:
		return nil, fault.New(op, fault.Invalid, "the key file holds a key of type %T: use Ed25519, or ECDSA on P-256", key)
	}
	if _, err := KeyOf(s.Public()); err != nil {
		return nil, err
	}
	return s, nil
}

// LooksReadable reports whether file holds a private key that whoever reads the file can use: PEM (PKCS #8, EC, RSA,
// OpenSSH) without a passphrase, bare DER, or a JSON Web Key with its private part. In doubt it says yes.
func LooksReadable(file []byte) bool {
	if _, err := x509.ParsePKCS8PrivateKey(file); err == nil {
		return true
	}
	if _, err := x509.ParseECPrivateKey(file); err == nil {
		return true
	}
	var jwk struct {
		Kty string          `json:"kty"`
		D   json.RawMessage `json:"d"`
	}
	if json.Unmarshal(file, &jwk) == nil && jwk.Kty != "" && len(jwk.D) > 0 {
		return true
	}
	marks := strings.Count(string(file), "PRIVATE KEY-----")
	locked := 0
	for rest := file; ; {
		var b *pem.Block
		if b, rest = pem.Decode(rest); b == nil {
			break
		}
		if strings.HasSuffix(b.Type, "PRIVATE KEY") && lockedPEM(b) {
			locked++
		}
	}
	return marks > 2*locked // each block has a first and a last line
}

func lockedPEM(b *pem.Block) bool {
	switch {
	case b.Type == "ENCRYPTED PRIVATE KEY", strings.Contains(b.Headers["Proc-Type"], "ENCRYPTED"):
		return true
	case b.Type == "OPENSSH PRIVATE KEY":
		_, err := ssh.ParseRawPrivateKey(pem.EncodeToMemory(b))
		var locked *ssh.PassphraseMissingError
		return errors.As(err, &locked)
	}
	return false
}
