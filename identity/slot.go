// SPDX-License-Identifier: Apache-2.0

package identity

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/ecdsa"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"io"
	"slices"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
)

// Stage is where a CA stands in its life. Spelled in the ledger: never edited, never reused.
type Stage string

// The closed set of stages.
const (
	Prepared Stage = "prepared" // announced and trusted, issues nothing yet
	Active   Stage = "active"   // issues; one at a time
	Tainted  Stage = "tainted"  // still trusted, issues nothing; what it issued is renewed now
	Retired  Stage = "retired"  // trusted by nobody; a compromised CA goes here at once
)

// Slot is one CA of the vendor's, as the ledger holds it. The key is sealed: the book never has it in the clear.
type Slot struct {
	Stage     Stage  `json:"stage"`
	CertDER   []byte `json:"cert"`
	SealedKey []byte `json:"sealed_key"`
	Since     uint64 `json:"since,omitempty"` // number of the first bundle that held it

	// Who asked for it, and with which request; empty where an older build recorded neither.
	By      fleet.Principal `json:"by,omitempty"`
	Request fleet.RequestID `json:"request,omitempty"`
}

// ID is the digest of the CA's certificate: it names the slot.
func (s Slot) ID() fleet.Digest { return fleet.DigestOf(s.CertDER) }

// Prepare adds a CA that is trusted and issues nothing yet. It may be made active once each peer holds the bundle.
func Prepare(slots []Slot, certDER, sealedKey []byte) ([]Slot, error) {
	const op = "identity.Prepare"
	cert, err := x509.ParseCertificate(certDER)
	if err != nil {
		return nil, fault.Because(err, op, fault.Invalid, "the CA's certificate does not parse")
	}
	td, err := TrustDomainOf(cert)
	if err != nil {
		return nil, err
	}
	s := Slot{Stage: Prepared, CertDER: bytes.Clone(certDER), SealedKey: bytes.Clone(sealedKey)}
	for _, old := range slots {
		if old.ID() == s.ID() {
			return nil, fault.New(op, fault.Conflict, "CA %s is there already, in stage %s", s.ID().Short(), old.Stage)
		}
		c, err := x509.ParseCertificate(old.CertDER)
		if err != nil {
			return nil, fault.Because(err, op, fault.Internal, "the certificate of CA %s does not parse", old.ID().Short())
		}
		if other, err := TrustDomainOf(c); err != nil || other != td {
			return nil, fault.Because(err, op, fault.Conflict, "CA %s is not of trust domain %q: a book holds one domain", old.ID().Short(), td)
		}
	}
	return append(slices.Clone(slots), s), nil
}

// Activate makes a prepared CA the one that issues. The one that issued before becomes tainted: trusted still, so
// that nothing breaks while what it issued is renewed.
func Activate(slots []Slot, id fleet.Digest) ([]Slot, error) {
	const op = "identity.Activate"
	i, err := find(op, slots, id)
	if err != nil {
		return nil, err
	}
	if slots[i].Stage != Prepared {
		return nil, fault.New(op, fault.Conflict, "CA %s is %s: only a prepared CA becomes active", id.Short(), slots[i].Stage)
	}
	out := slices.Clone(slots)
	for j := range out {
		if out[j].Stage == Active {
			out[j].Stage = Tainted
		}
	}
	out[i].Stage = Active
	return out, nil
}

// Retire ends the trust in a CA and forgets its key. The active one cannot be retired while it is the only one
// that can issue: prepare and activate another before.
func Retire(slots []Slot, id fleet.Digest) ([]Slot, error) {
	const op = "identity.Retire"
	i, err := find(op, slots, id)
	if err != nil {
		return nil, err
	}
	if slots[i].Stage == Active {
		return nil, fault.New(op, fault.Conflict, "CA %s issues now: activate another CA first", id.Short())
	}
	out := slices.Clone(slots)
	out[i].Stage, out[i].SealedKey = Retired, nil
	return out, nil
}

func find(op string, slots []Slot, id fleet.Digest) (int, error) {
	i := slices.IndexFunc(slots, func(s Slot) bool { return s.ID() == id })
	if i < 0 {
		return 0, fault.New(op, fault.NotFound, "there is no CA %s", id.Short())
	}
	return i, nil
}

// Issuer gives the slot that issues.
func Issuer(slots []Slot) (Slot, error) {
	for _, s := range slots {
		if s.Stage == Active {
			return s, nil
		}
	}
	return Slot{}, fault.New("identity.Issuer", fault.NotFound, "no CA is active: prepare one and activate it")
}

// trusted holds the certificates of every CA that is not retired. A stage that is not known is not trusted.
func trusted(slots []Slot) ([]*x509.Certificate, error) {
	var out []*x509.Certificate
	for _, s := range slots {
		if s.Stage != Prepared && s.Stage != Active && s.Stage != Tainted {
			continue
		}
		c, err := x509.ParseCertificate(s.CertDER)
		if err != nil {
			return nil, fault.Because(err, "identity.Bundle", fault.Invalid, "the certificate of CA %s does not parse", s.ID().Short())
		}
		out = append(out, c)
	}
	return out, nil
}

// Bundle is the pool of the CAs that are trusted now.
func Bundle(slots []Slot) (*x509.CertPool, error) {
	certs, err := trusted(slots)
	if err != nil {
		return nil, err
	}
	return Pool(certs), nil
}

// BundlePEM is the same as a file, in the order of the slots.
func BundlePEM(slots []Slot) ([]byte, error) {
	certs, err := trusted(slots)
	if err != nil {
		return nil, err
	}
	var b bytes.Buffer
	for _, c := range certs {
		b.Write(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw}))
	}
	return b.Bytes(), nil
}

// Pool puts certificates into a pool.
func Pool(certs []*x509.Certificate) *x509.CertPool {
	p := x509.NewCertPool()
	for _, c := range certs {
		p.AddCert(c)
	}
	return p
}

// Bounds of a bundle file.
const (
	MaxBundle      = 64 << 10
	MaxBundleCerts = 16
)

// ParseBundle reads a bundle file: PEM, CA certificates of the one trust domain and nothing else.
func ParseBundle(file []byte, trustDomain string) ([]*x509.Certificate, error) {
	const op = "identity.ParseBundle"
	if len(file) > MaxBundle {
		return nil, fault.New(op, fault.Invalid, "the bundle has %d bytes, the limit is %d", len(file), MaxBundle)
	}
	var out []*x509.Certificate
	for rest := bytes.TrimSpace(file); len(rest) > 0; rest = bytes.TrimSpace(rest) {
		if !bytes.HasPrefix(rest, []byte("-----BEGIN CERTIFICATE-----")) {
			return nil, fault.New(op, fault.Invalid, "bundle, after certificate %d: only CERTIFICATE blocks in PEM belong here", len(out))
		}
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil || block.Type != "CERTIFICATE" || len(block.Headers) > 0 {
			return nil, fault.New(op, fault.Invalid, "bundle, certificate %d: broken PEM", len(out)+1)
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fault.Because(err, op, fault.Invalid, "bundle, certificate %d does not parse", len(out)+1)
		}
		td, err := TrustDomainOf(c)
		if err != nil {
			return nil, fault.At(op, fault.Invalid, err)
		}
		if td != trustDomain {
			return nil, fault.New(op, fault.Invalid, "bundle, certificate %d is of trust domain %q, not %q", len(out)+1, td, trustDomain)
		}
		if out = append(out, c); len(out) > MaxBundleCerts {
			return nil, fault.New(op, fault.Invalid, "the bundle holds more than %d certificates", MaxBundleCerts)
		}
	}
	if len(out) == 0 {
		return nil, fault.New(op, fault.Invalid, "the bundle is empty: it must hold the CA certificates of trust domain %q", trustDomain)
	}
	return out, nil
}

const keyIntro = "demarc-ca-key/1\n"

// SealKey encrypts the CA's key with a key of 32 bytes that the operator supplies, bound to the CA's certificate.
func (a *Authority) SealKey(kek []byte, rand io.Reader) ([]byte, error) {
	const op = "identity.SealKey"
	gcm, err := sealer(op, kek)
	if err != nil {
		return nil, err
	}
	der, err := x509.MarshalPKCS8PrivateKey(a.Key)
	if err != nil {
		return nil, fault.At(op, fault.Internal, err)
	}
	nonce := make([]byte, gcm.NonceSize())
	if _, err := io.ReadFull(rand, nonce); err != nil {
		return nil, fault.At(op, fault.Internal, err)
	}
	box := gcm.Seal(nonce, nonce, der, keyData(a.Cert))
	return []byte(keyIntro + base64.StdEncoding.EncodeToString(box) + "\n"), nil
}

// OpenAuthority opens the sealed key of a CA. A key that is not the certificate's is refused.
func OpenAuthority(certDER, sealed, kek []byte) (*Authority, error) {
	const op = "identity.OpenAuthority"
	cert, err := x509.ParseCertificate(certDER)
	if err != nil {
		return nil, fault.Because(err, op, fault.Invalid, "the CA's certificate does not parse")
	}
	if _, err := TrustDomainOf(cert); err != nil {
		return nil, err
	}
	gcm, err := sealer(op, kek)
	if err != nil {
		return nil, err
	}
	body, ok := bytes.CutPrefix(sealed, []byte(keyIntro))
	if !ok || len(sealed) > 4<<10 {
		return nil, fault.New(op, fault.Invalid, "this is no sealed CA key: its first line must be %q", keyIntro[:len(keyIntro)-1])
	}
	box, err := base64.StdEncoding.Strict().DecodeString(string(bytes.TrimSuffix(body, []byte("\n"))))
	if err != nil || len(box) < gcm.NonceSize() {
		return nil, fault.Because(err, op, fault.Invalid, "the second line of the sealed CA key is not base64 of a box")
	}
	der, err := gcm.Open(nil, box[:gcm.NonceSize()], box[gcm.NonceSize():], keyData(cert))
	if err != nil {
		return nil, fault.New(op, fault.Denied, "the sealed CA key does not open: another key file sealed it, it belongs to another CA, or it "+
			"was altered")
	}
	key, err := x509.ParsePKCS8PrivateKey(der)
	if err != nil {
		return nil, fault.Because(err, op, fault.Invalid, "the opened CA key does not parse")
	}
	ec, ok := key.(*ecdsa.PrivateKey)
	if !ok || !ec.PublicKey.Equal(cert.PublicKey) {
		return nil, fault.New(op, fault.Invalid, "the opened key is not that of the CA's certificate")
	}
	return &Authority{Cert: cert, Key: ec}, nil
}

func keyData(cert *x509.Certificate) []byte {
	return []byte(keyIntro + string(fleet.DigestOf(cert.Raw)))
}

func sealer(op string, kek []byte) (cipher.AEAD, error) {
	if len(kek) != 32 {
		return nil, fault.New(op, fault.Invalid, "the key that seals the CA has %d bytes: 32 random bytes are needed", len(kek))
	}
	block, err := aes.NewCipher(kek)
	if err != nil {
		return nil, fault.At(op, fault.Internal, err)
	}
	gcm, err := cipher.NewGCM(block)
	return gcm, fault.At(op, fault.Internal, err)
}
