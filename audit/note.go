// SPDX-License-Identifier: Apache-2.0

package audit

import (
	"bytes"
	"crypto"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"golang.org/x/mod/sumdb/note"

	"github.com/demarc-dev/demarc/fault"
)

const (
	maxCheckpoint  = 64 << 10
	maxOrigin      = 255
	algEd25519     = 1 // of C2SP signed-note
	algCosignature = 4 // of C2SP tlog-cosignature
)

// Head is what a checkpoint says: which log, how many entries, which root.
type Head struct {
	Origin string
	Size   int64
	Root   [32]byte
}

// Head is the head of the log under the name origin.
func (l Log) Head(origin string) Head { return Head{Origin: origin, Size: l.Size(), Root: l.Root()} }

func (h Head) text() string {
	return h.Origin + "\n" + strconv.FormatInt(h.Size, 10) + "\n" + base64.StdEncoding.EncodeToString(h.Root[:]) + "\n"
}

func checkName(op, name string) error {
	bad := func(r rune) bool { return unicode.IsSpace(r) || unicode.IsControl(r) || r == '+' }
	if name == "" || len(name) > maxOrigin || !utf8.ValidString(name) || strings.ContainsFunc(name, bad) {
		return fault.New(op, fault.Invalid, "the name %q of a log or witness: use 1 to %d bytes without space or plus, for instance "+
			"acme.example/appliance/eu-1", fault.Clip(name), maxOrigin)
	}
	return nil
}

// parseHead reads the three lines, strictly: no extension lines, no leading zeros.
func parseHead(op, text string) (Head, error) {
	lines := strings.Split(text, "\n")
	if len(lines) != 4 || lines[3] != "" {
		return Head{}, fault.New(op, fault.Invalid, "a checkpoint has three lines: origin, size, root")
	}
	h := Head{Origin: lines[0]}
	if err := checkName(op, h.Origin); err != nil {
		return Head{}, err
	}
	n, err := strconv.ParseInt(lines[1], 10, 64)
	if err != nil || n < 0 || strconv.FormatInt(n, 10) != lines[1] {
		return Head{}, fault.New(op, fault.Invalid, "the size %q of a checkpoint is not a number", fault.Clip(lines[1]))
	}
	h.Size = n
	root, err := base64.StdEncoding.Strict().DecodeString(lines[2])
	if err != nil || len(root) != len(h.Root) || base64.StdEncoding.EncodeToString(root) != lines[2] {
		return Head{}, fault.New(op, fault.Invalid, "the root of a checkpoint is not the base64 of 32 bytes")
	}
	copy(h.Root[:], root)
	return h, nil
}

// Checkpoint signs the head of a log. By convention the signer's name is the origin.
func Checkpoint(origin string, size int64, root [32]byte, signer note.Signer) ([]byte, error) {
	const op = "audit.Checkpoint"
	if err := checkName(op, origin); err != nil {
		return nil, err
	}
	if size < 0 {
		return nil, fault.New(op, fault.Invalid, "a log can't have %d entries", size)
	}
	b, err := note.Sign(&note.Note{Text: Head{origin, size, root}.text()}, signer)
	if err != nil {
		return nil, fault.Because(err, op, fault.Unavailable, "the key did not sign the checkpoint")
	}
	return b, nil
}

// OpenCheckpoint reads a checkpoint that each of the verifiers signed. No signature of one is fault.Denied.
// Lines of signers that are not asked about are passed over.
func OpenCheckpoint(b []byte, verifiers ...note.Verifier) (Head, error) {
	const op = "audit.OpenCheckpoint"
	n, err := openNote(op, b, verifiers...)
	if err != nil {
		return Head{}, err
	}
	return parseHead(op, n.Text)
}

func openNote(op string, b []byte, verifiers ...note.Verifier) (*note.Note, error) {
	if len(b) > maxCheckpoint {
		return nil, fault.New(op, fault.Invalid, "the checkpoint has %d bytes, at most %d are allowed", len(b), maxCheckpoint)
	}
	if len(verifiers) == 0 {
		return nil, fault.New(op, fault.Denied, "no key is pinned for this checkpoint")
	}
	n, err := note.Open(b, note.VerifierList(verifiers...))
	var unsigned *note.UnverifiedNoteError
	var wrong *note.InvalidSignatureError
	switch {
	case errors.As(err, &unsigned):
		return nil, fault.Because(Unsigned, op, fault.Denied, "the checkpoint is not signed by %s", names(verifiers))
	case errors.As(err, &wrong):
		return nil, fault.Because(Unsigned, op, fault.Denied, "the signature of %q on the checkpoint is wrong", fault.Clip(wrong.Name))
	case err != nil:
		return nil, fault.Because(err, op, fault.Invalid, "not a checkpoint: a signed note is expected")
	}
	for _, v := range verifiers {
		if signature(n, v) == nil {
			return nil, fault.Because(Unsigned, op, fault.Denied, "the checkpoint is not signed by %q", fault.Clip(v.Name()))
		}
	}
	return n, nil
}

func names(vs []note.Verifier) string {
	var out []string
	for _, v := range vs {
		out = append(out, strconv.Quote(fault.Clip(v.Name())))
	}
	return strings.Join(out, " and ")
}

// signature gives the raw, verified signature of v, without its key hash; nil where there is none.
func signature(n *note.Note, v note.Verifier) []byte {
	for _, s := range n.Sigs {
		if s.Name == v.Name() && s.Hash == v.KeyHash() {
			if raw, err := base64.StdEncoding.DecodeString(s.Base64); err == nil && len(raw) > 4 {
				return raw[4:]
			}
		}
	}
	return nil
}

// Cosign adds the witness's line to a checkpoint: "I saw this head at this time, and it continues all that I saw
// before". The caller must have opened the checkpoint with the log's key, and checked with Grown that it continues
// the last one that this witness signed.
func Cosign(checkpoint []byte, witness string, s crypto.Signer, now time.Time) ([]byte, error) {
	const op = "audit.Cosign"
	if err := checkName(op, witness); err != nil {
		return nil, err
	}
	pub, err := edPublic(op, s)
	if err != nil {
		return nil, err
	}
	if len(checkpoint) > maxCheckpoint {
		return nil, fault.New(op, fault.Invalid, "the checkpoint has %d bytes, at most %d are allowed", len(checkpoint), maxCheckpoint)
	}
	text, _, ok := bytes.Cut(checkpoint, []byte("\n\n"))
	if !ok || !bytes.HasSuffix(checkpoint, []byte("\n")) {
		return nil, fault.New(op, fault.Invalid, "not a checkpoint: a signed note is expected")
	}
	body := string(text) + "\n"
	if _, err := parseHead(op, body); err != nil {
		return nil, err
	}
	at := now.Unix()
	if at < 0 {
		return nil, fault.New(op, fault.Invalid, "the time of a cosignature is before 1970")
	}
	sig, err := s.Sign(nil, cosigned(body, uint64(at)), crypto.Hash(0))
	if err != nil {
		return nil, fault.Because(err, op, fault.Unavailable, "the key did not sign the checkpoint")
	}
	raw := binary.BigEndian.AppendUint32(nil, keyHash(witness, algCosignature, pub))
	raw = binary.BigEndian.AppendUint64(raw, uint64(at))
	raw = append(raw, sig...)
	out := append(bytes.Clone(checkpoint), fmt.Sprintf("— %s %s\n", witness, base64.StdEncoding.EncodeToString(raw))...)
	v, err := CosignVerifier(witness, pub)
	if err != nil {
		return nil, err
	}
	if _, err := OpenCheckpoint(out, v); err != nil {
		return nil, fault.Because(err, op, fault.Internal, "the key made a cosignature that does not verify")
	}
	return out, nil
}

// OpenCosigned reads a checkpoint that the log and the witness signed, and the time that the witness gave.
func OpenCosigned(b []byte, log, witness note.Verifier) (Head, time.Time, error) {
	const op = "audit.OpenCosigned"
	n, err := openNote(op, b, log, witness)
	if err != nil {
		return Head{}, time.Time{}, err
	}
	h, err := parseHead(op, n.Text)
	if err != nil {
		return Head{}, time.Time{}, err
	}
	sig := signature(n, witness)
	if len(sig) != 8+ed25519.SignatureSize {
		return Head{}, time.Time{}, fault.New(op, fault.Invalid, "the line of %q is not a cosignature/v1", fault.Clip(witness.Name()))
	}
	return h, time.Unix(int64(binary.BigEndian.Uint64(sig)), 0).UTC(), nil
}

func cosigned(body string, at uint64) []byte {
	return []byte("cosignature/v1\ntime " + strconv.FormatUint(at, 10) + "\n" + body)
}

func keyHash(name string, alg byte, pub ed25519.PublicKey) uint32 {
	h := sha256.New()
	h.Write([]byte(name + "\n"))
	h.Write([]byte{alg})
	h.Write(pub)
	return binary.BigEndian.Uint32(h.Sum(nil))
}

func edPublic(op string, s crypto.Signer) (ed25519.PublicKey, error) {
	if s == nil {
		return nil, fault.New(op, fault.Invalid, "a signing key is missing")
	}
	return edKey(op, s.Public())
}

func edKey(op string, pub crypto.PublicKey) (ed25519.PublicKey, error) {
	k, ok := pub.(ed25519.PublicKey)
	if !ok || len(k) != ed25519.PublicKeySize {
		return nil, fault.New(op, fault.Invalid, "checkpoints are signed with Ed25519, not with a key of type %T", pub)
	}
	return k, nil
}

type noteKey struct {
	name   string
	hash   uint32
	verify func(msg, sig []byte) bool
	sign   func(msg []byte) ([]byte, error)
}

func (k noteKey) Name() string                    { return k.name }
func (k noteKey) KeyHash() uint32                 { return k.hash }
func (k noteKey) Verify(msg, sig []byte) bool     { return k.verify(msg, sig) }
func (k noteKey) Sign(msg []byte) ([]byte, error) { return k.sign(msg) }

// NoteSigner signs the checkpoints of the log called name with an Ed25519 key.
func NoteSigner(name string, s crypto.Signer) (note.Signer, error) {
	const op = "audit.NoteSigner"
	if err := checkName(op, name); err != nil {
		return nil, err
	}
	pub, err := edPublic(op, s)
	if err != nil {
		return nil, err
	}
	return noteKey{name: name, hash: keyHash(name, algEd25519, pub), sign: func(msg []byte) ([]byte, error) {
		return s.Sign(nil, msg, crypto.Hash(0))
	}}, nil
}

// NoteVerifier checks what NoteSigner signed.
func NoteVerifier(name string, pub crypto.PublicKey) (note.Verifier, error) {
	const op = "audit.NoteVerifier"
	if err := checkName(op, name); err != nil {
		return nil, err
	}
	k, err := edKey(op, pub)
	if err != nil {
		return nil, err
	}
	return noteKey{name: name, hash: keyHash(name, algEd25519, k), verify: func(msg, sig []byte) bool {
		return ed25519.Verify(k, msg, sig)
	}}, nil
}

// CosignVerifier checks what Cosign signed.
func CosignVerifier(witness string, pub crypto.PublicKey) (note.Verifier, error) {
	const op = "audit.CosignVerifier"
	if err := checkName(op, witness); err != nil {
		return nil, err
	}
	k, err := edKey(op, pub)
	if err != nil {
		return nil, err
	}
	return noteKey{name: witness, hash: keyHash(witness, algCosignature, k), verify: func(msg, sig []byte) bool {
		if len(sig) != 8+ed25519.SignatureSize {
			return false
		}
		return ed25519.Verify(k, cosigned(string(msg), binary.BigEndian.Uint64(sig)), sig[8:])
	}}, nil
}
