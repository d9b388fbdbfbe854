// SPDX-License-Identifier: Apache-2.0

// Package seal signs documents and opens signed ones: DSSE envelopes, payload bytes verified before parsed.
//
// # Promise
//
// What Open returns was signed, byte for byte, by each key that it returns with it, and each of those keys is one
// that the caller trusts and a different one. No byte of a payload is parsed before a signature over it was checked.
// A document has one encoding: an envelope or a payload that is spelled in another way is refused, so that two
// parties that hold the same document hold the same bytes.
//
// # Wire format
//
// A sealed document is a DSSE envelope (https://github.com/secure-systems-lab/dsse), as compact JSON, with standard
// padded base64, in this order of fields:
//
//	{"payloadType":"application/vnd.demarc.grant+json;v=1","payload":"<base64>","signatures":[{"keyid":"SHA256:...","sig":"<base64>"}]}
//
// The payload is the compact JSON of one Go struct (fields in order of declaration, maps sorted). What is signed is
// the pre-authentication encoding of type and payload, "DSSEv1 <len> <type> <len> <payload>". Keys are Ed25519, or
// ECDSA on P-256 with SHA-256 and an ASN.1 signature. The keyid is a hint that a reader may use to find the key; it
// proves nothing.
//
// # What must not be done
//
// Digest names the bytes of an envelope. Anybody can add a signature that nobody trusts, or turn an ECDSA signature
// into its twin, and so make another envelope around the same document: uses and replays are counted by Identity (or
// by a nonce inside the document), never by Digest.
package seal

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"reflect"

	"github.com/secure-systems-lab/go-securesystemslib/dsse"

	"github.com/demarc-dev/demarc/fault"
)

// Limits on what is made and on what is read.
const (
	MaxSealed  = 1 << 20 // bytes of an envelope
	MaxSigners = 32      // signatures in an envelope
	maxType    = 255     // bytes of a payload type
)

// Body is a document that can be sealed: a struct, not a pointer. PayloadType must not depend on the value:
// it is asked of the zero value too. It carries the version, for instance "application/vnd.demarc.grant+json;v=1".
type Body interface{ PayloadType() string }

// Seal encodes v and signs it with each of by. The keys must be distinct. What Seal returns, Open accepts:
// a document that would not survive the way back is refused here.
func Seal[T Body](v T, by ...crypto.Signer) ([]byte, error) {
	const op = "seal.Seal"
	if err := notPointer[T](op); err != nil {
		return nil, err
	}
	if len(by) == 0 || len(by) > MaxSigners {
		return nil, fault.New(op, fault.Invalid, "a document is sealed with 1 to %d keys, not %d", MaxSigners, len(by))
	}
	payload, err := json.Marshal(v)
	if err != nil {
		return nil, fault.Because(err, op, fault.Invalid, "the document has no JSON form")
	}
	if _, err := parse[T](op, payload); err != nil {
		return nil, err
	}
	signers := make([]dsse.Signer, 0, len(by))
	trusted := make([]Key, 0, len(by))
	for _, s := range by {
		if s == nil {
			return nil, fault.New(op, fault.Invalid, "a signing key is missing")
		}
		k, err := KeyOf(s.Public())
		if err != nil {
			return nil, err
		}
		signers, trusted = append(signers, signer{k, s}), append(trusted, k)
	}
	es, err := dsse.NewEnvelopeSigner(signers...)
	if err != nil {
		return nil, fault.At(op, fault.Internal, err)
	}
	env, err := es.SignPayload(context.Background(), v.PayloadType(), payload)
	if err != nil {
		return nil, fault.Because(err, op, fault.Unavailable, "the key did not sign")
	}
	sealed, err := json.Marshal(env)
	if err != nil {
		return nil, fault.At(op, fault.Internal, err)
	}
	if len(sealed) > MaxSealed {
		return nil, fault.New(op, fault.Invalid, "the sealed document has %d bytes, at most %d are allowed", len(sealed), MaxSealed)
	}
	if _, keys, err := Open[T](sealed, trusted); err != nil {
		return nil, fault.Because(err, op, fault.Internal, "a key made a signature that does not verify")
	} else if len(keys) != len(by) {
		return nil, fault.New(op, fault.Invalid, "the same key was given twice: %d signatures by %d keys", len(by), len(keys))
	}
	return sealed, nil
}

// Open verifies sealed, then parses it. It returns the document and the distinct trusted keys that signed it, in the
// order of trusted; whether they are enough is the caller's rule. No trusted signer is fault.Denied, a malformed
// envelope or document is fault.Invalid.
func Open[T Body](sealed []byte, trusted []Key) (T, []Key, error) {
	const op = "seal.Open"
	var none T
	if err := notPointer[T](op); err != nil {
		return none, nil, err
	}
	env, payload, err := unwrap(op, sealed)
	if err != nil {
		return none, nil, err
	}
	if want := none.PayloadType(); env.PayloadType != want {
		return none, nil, fault.New(op, fault.Invalid, "the document is of type %q where %q is expected", fault.Clip(env.PayloadType), want)
	}
	by, err := check(op, env, trusted)
	if err != nil {
		return none, nil, err
	}
	v, err := parse[T](op, payload)
	if err != nil {
		return none, nil, err
	}
	return v, by, nil
}

// Verify checks the signatures of a document of any type and says what its type is and which trusted keys signed it.
// It does not parse the document.
func Verify(sealed []byte, trusted []Key) (payloadType string, by []Key, err error) {
	const op = "seal.Verify"
	env, _, err := unwrap(op, sealed)
	if err != nil {
		return "", nil, err
	}
	if by, err = check(op, env, trusted); err != nil {
		return "", nil, err
	}
	return env.PayloadType, by, nil
}

// Peek parses sealed WITHOUT checking any signature. It is for showing a document to a person, never for acting on it.
func Peek[T Body](sealed []byte) (T, error) {
	const op = "seal.Peek"
	var none T
	if err := notPointer[T](op); err != nil {
		return none, err
	}
	env, payload, err := unwrap(op, sealed)
	if err != nil {
		return none, err
	}
	if want := none.PayloadType(); env.PayloadType != want {
		return none, fault.New(op, fault.Invalid, "the document is of type %q where %q is expected", fault.Clip(env.PayloadType), want)
	}
	return parse[T](op, payload)
}

// TypeOf returns the payload type that sealed claims, WITHOUT checking any signature: it chooses what to open it as.
func TypeOf(sealed []byte) (string, error) {
	env, _, err := unwrap("seal.TypeOf", sealed)
	if err != nil {
		return "", err
	}
	return env.PayloadType, nil
}

// Identity names the signed document inside an envelope: the digest of its type and payload, whoever signed it.
// It stays the same however the signatures are added to, taken away or rewritten: uses are counted by it.
// It is spelled sha256:<64 hex digits>. It checks no signature.
func Identity(sealed []byte) (string, error) {
	env, payload, err := unwrap("seal.Identity", sealed)
	if err != nil {
		return "", err
	}
	h := sha256.Sum256(dsse.PAE(env.PayloadType, payload))
	return "sha256:" + hex.EncodeToString(h[:]), nil
}

// unwrap reads the envelope, strictly, and decodes the payload without looking inside.
func unwrap(op string, sealed []byte) (*dsse.Envelope, []byte, error) {
	if len(sealed) > MaxSealed {
		return nil, nil, fault.New(op, fault.Invalid, "the sealed document has %d bytes, at most %d are allowed", len(sealed), MaxSealed)
	}
	var env dsse.Envelope
	if err := StrictJSON(sealed, &env); err != nil {
		return nil, nil, fault.Because(err, op, fault.Invalid, "not a sealed document: %s", fault.Text(err))
	}
	if n := len(env.Signatures); n == 0 || n > MaxSigners {
		return nil, nil, fault.New(op, fault.Invalid, "the envelope carries %d signatures, 1 to %d are allowed", n, MaxSigners)
	}
	if n := len(env.PayloadType); n == 0 || n > maxType {
		return nil, nil, fault.New(op, fault.Invalid, "the envelope's payload type has %d bytes, 1 to %d are allowed", n, maxType)
	}
	payload, ok := decode64(env.Payload)
	if !ok {
		return nil, nil, fault.New(op, fault.Invalid, "the envelope's payload is not standard base64")
	}
	for i, s := range env.Signatures {
		if _, ok := decode64(s.Sig); !ok || s.Sig == "" {
			return nil, nil, fault.New(op, fault.Invalid, "signature %d of the envelope is not standard base64", i)
		}
	}
	if again, err := json.Marshal(env); err != nil || !bytes.Equal(again, sealed) {
		return nil, nil, fault.New(op, fault.Invalid, "the envelope is not in its canonical encoding: use the file as it was sealed")
	}
	return &env, payload, nil
}

// decode64 refuses each spelling but one.
func decode64(s string) ([]byte, bool) {
	b, err := base64.StdEncoding.Strict().DecodeString(s)
	return b, err == nil && base64.StdEncoding.EncodeToString(b) == s
}

// check gives the distinct trusted keys that signed env, at least one.
func check(op string, env *dsse.Envelope, trusted []Key) ([]Key, error) {
	byID := make(map[KeyID]Key, len(trusted))
	verifiers := make([]dsse.Verifier, 0, len(trusted))
	for _, k := range trusted {
		// The ID is computed again: a key that was put together by hand can't pose as two.
		own, err := KeyOf(k.Public)
		if err != nil {
			return nil, err
		}
		if _, seen := byID[own.ID]; seen {
			continue
		}
		byID[own.ID] = own
		verifiers = append(verifiers, verifier{own})
	}
	if len(verifiers) == 0 {
		return nil, fault.New(op, fault.Denied, "no key is trusted for this document: pin the signer's key first")
	}
	ev, err := dsse.NewEnvelopeVerifier(verifiers...)
	if err != nil {
		return nil, fault.At(op, fault.Internal, err)
	}
	accepted, err := ev.Verify(context.Background(), env)
	if err != nil {
		return nil, fault.Because(err, op, fault.Denied, "the document is not signed by any of the %d trusted keys", len(verifiers))
	}
	signed := make(map[KeyID]bool, len(accepted))
	for _, a := range accepted {
		signed[KeyID(a.KeyID)] = true
	}
	var by []Key
	for _, v := range verifiers {
		if k := v.(verifier).Key; signed[k.ID] {
			by = append(by, k)
		}
	}
	if len(by) == 0 {
		return nil, fault.New(op, fault.Denied, "the document is not signed by any of the %d trusted keys", len(verifiers))
	}
	return by, nil
}

// parse reads the payload strictly and refuses each encoding but the canonical one.
func parse[T Body](op string, payload []byte) (T, error) {
	var v, none T
	if err := StrictJSON(payload, &v); err != nil {
		return none, fault.Because(err, op, fault.Invalid, "the document of type %q is malformed: %s", none.PayloadType(), fault.Text(err))
	}
	if again, err := json.Marshal(v); err != nil || !bytes.Equal(again, payload) {
		return none, fault.New(op, fault.Invalid, "the document of type %q is not in its canonical encoding", none.PayloadType())
	}
	return v, nil
}

func notPointer[T Body](op string) error {
	if k := reflect.TypeFor[T]().Kind(); k == reflect.Pointer || k == reflect.Interface {
		return fault.New(op, fault.Internal, "a sealed document is a struct, %s is not", reflect.TypeFor[T]())
	}
	return nil
}

// signer adapts a crypto.Signer to DSSE.
type signer struct {
	key Key
	s   crypto.Signer
}

func (s signer) KeyID() (string, error) { return string(s.key.ID), nil }

func (s signer) Sign(_ context.Context, data []byte) ([]byte, error) {
	// A software key needs no randomness: Ed25519 has none, and ECDSA without a source is RFC 6979.
	// A key in a device is handed the system's source, as its interface asks for.
	var source io.Reader
	switch s.s.(type) {
	case ed25519.PrivateKey, *ed25519.PrivateKey, *ecdsa.PrivateKey:
	default:
		source = rand.Reader
	}
	if _, ok := s.key.Public.(ed25519.PublicKey); ok {
		return s.s.Sign(source, data, crypto.Hash(0))
	}
	h := sha256.Sum256(data)
	return s.s.Sign(source, h[:], crypto.SHA256)
}

// verifier adapts a Key to DSSE.
type verifier struct{ Key }

var errSignature = errors.New("the signature does not match")

func (v verifier) KeyID() (string, error)   { return string(v.ID), nil }
func (v verifier) Public() crypto.PublicKey { return v.Key.Public }

func (v verifier) Verify(_ context.Context, data, sig []byte) error {
	switch pub := v.Key.Public.(type) {
	case ed25519.PublicKey:
		if ed25519.Verify(pub, data, sig) {
			return nil
		}
	case *ecdsa.PublicKey:
		if h := sha256.Sum256(data); ecdsa.VerifyASN1(pub, h[:], sig) {
			return nil
		}
	}
	return errSignature
}
