// SPDX-License-Identifier: Apache-2.0

package identity

import (
	"crypto/hmac"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/binary"
	"io"
	"net/url"
	"strings"
	"time"

	"github.com/demarc-dev/demarc/fault"
)

// NonceLife is how long a nonce may be used. That it is used once is the ledger's to record, until it expires.
const NonceLife = 5 * time.Minute

const (
	nonceIntro = "n1."
	nonceBody  = 8 + 16
	nonceLen   = nonceBody + sha256.Size
)

// NewNonce draws a nonce that every holder of the key (32 bytes or more) can check without having stored it.
func NewNonce(key []byte, now time.Time, rand io.Reader) (string, error) {
	const op = "identity.NewNonce"
	if len(key) < 32 {
		return "", fault.New(op, fault.Internal, "the key for nonces has %d bytes: 32 are needed", len(key))
	}
	b := make([]byte, nonceBody, nonceLen)
	binary.BigEndian.PutUint64(b, uint64(now.Add(NonceLife).Unix()))
	if _, err := io.ReadFull(rand, b[8:]); err != nil {
		return "", fault.At(op, fault.Internal, err)
	}
	return nonceIntro + base64.RawURLEncoding.EncodeToString(append(b, nonceMAC(key, b)...)), nil
}

// CheckNonce tells whether a nonce was drawn with the key and may still be used, and until when it must be
// remembered as used. A nonce has one spelling only: the caller records it as it is spelled.
func CheckNonce(key []byte, nonce string, now time.Time) (expires time.Time, err error) {
	const op = "identity.CheckNonce"
	if len(key) < 32 {
		return time.Time{}, fault.New(op, fault.Internal, "the key for nonces has %d bytes: 32 are needed", len(key))
	}
	s, ok := strings.CutPrefix(nonce, nonceIntro)
	if !ok || len(s) != base64.RawURLEncoding.EncodedLen(nonceLen) {
		return time.Time{}, fault.New(op, fault.Invalid, "this is no nonce: ask for one first")
	}
	b, err := base64.RawURLEncoding.Strict().DecodeString(s)
	// The decoder skips line ends: the length of both forms leaves no room for one, so a nonce has one spelling.
	if err != nil || len(b) != nonceLen {
		return time.Time{}, fault.New(op, fault.Invalid, "this is no nonce: ask for one first")
	}
	if !hmac.Equal(b[nonceBody:], nonceMAC(key, b[:nonceBody])) {
		return time.Time{}, fault.New(op, fault.Denied, "the nonce was not drawn here: ask this control plane for one")
	}
	expires = time.Unix(int64(binary.BigEndian.Uint64(b)), 0).UTC()
	if !now.Before(expires) {
		return time.Time{}, fault.New(op, fault.Expired, "the nonce ran out at %s, and it is %s: ask for another", stamp(expires), stamp(now))
	}
	return expires, nil
}

func nonceMAC(key, b []byte) []byte {
	m := hmac.New(sha256.New, key)
	m.Write([]byte("demarc-enrol-nonce/1\n"))
	m.Write(b)
	return m.Sum(nil)
}

// Audience is what a platform's token must be made out to, so that it proves this key for this nonce of this trust
// domain and is worth nothing anywhere else.
func Audience(trustDomain, nonce string, csrDER []byte) (string, error) {
	const op = "identity.Audience"
	if err := CheckTrustDomain(trustDomain); err != nil {
		return "", err
	}
	if nonce == "" {
		return "", fault.New(op, fault.Invalid, "there is no nonce: ask for one first")
	}
	csr, err := ParseCSR(csrDER)
	if err != nil {
		return "", err
	}
	spki, err := x509.MarshalPKIXPublicKey(csr.PublicKey)
	if err != nil {
		return "", fault.At(op, fault.Invalid, err)
	}
	sum := sha256.Sum256(spki)
	return "demarc://" + trustDomain + "/enrol?nonce=" + url.QueryEscape(nonce) + "&key=" + base64.RawURLEncoding.EncodeToString(sum[:]), nil
}
