// SPDX-License-Identifier: Apache-2.0

// Package audit is a Merkle log in the public formats (C2SP tlog-tiles, checkpoints as signed notes, cosignatures),
// proofs, verification.
//
// # Promise
//
// History cannot be rewritten or shortened without a trace that anybody can find offline. Whoever holds a checkpoint
// of a log can be shown that any later state of the log still contains all of it; whoever holds two states that are
// not one history holds a proof of the fork, signed by the log's own key. Verify finds edits, omissions and forks in
// a bundle with nothing but pinned public keys.
//
// What it can't find: an entry that was never written, and a tail that no checkpoint and no witness ever covered.
//
// # Formats
//
// A leaf is the compact JSON of one entry, "v" first, times in UTC:
//
//	{"v":"demarc-entry/1","at":"2026-01-02T03:04:05Z","by":"...","request":"...","kind":"grant.add/1",
//	 "body_digest":"sha256:...","body":{...},"fault":"denied","detail":"..."}
//
// on one line, empty fields left out. The tree is RFC 6962's: leaf hash SHA-256(0x00 || leaf), node hash
// SHA-256(0x01 || left || right). A checkpoint is a signed note (C2SP tlog-checkpoint), three lines and signatures:
//
//	acme.example/appliance/eu-1
//	42
//	<base64 of the root hash>
//
//	— acme.example/appliance/eu-1 <base64 of key hash and Ed25519 signature>
//
// A witness adds a line of C2SP cosignature/v1: an Ed25519 signature over "cosignature/v1\ntime <seconds>\n" and the
// three lines, preceded by the time as eight bytes. An evidence bundle is described at Bundle.
package audit

import (
	"bytes"
	"encoding/json"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/seal"
)

const (
	entryVersion = "demarc-entry/1"
	// MaxLeaf is the most bytes that a leaf may have when it is read.
	MaxLeaf = 4 << 20
)

// Entry is what the log keeps of one change. Where the change is private, Body is empty and BodyDigest names it.
type Entry struct {
	At         time.Time
	By         fleet.Principal
	Request    fleet.RequestID
	Kind       string // of the change, with its version
	BodyDigest fleet.Digest
	Body       json.RawMessage
	Fault      fault.Kind // "" where the change was made
	Detail     string     // one sentence for any reader
}

// wire is the one spelling of an entry.
type wire struct {
	V          string          `json:"v"`
	At         string          `json:"at"`
	By         fleet.Principal `json:"by,omitempty"`
	Request    fleet.RequestID `json:"request,omitempty"`
	Kind       string          `json:"kind"`
	BodyDigest fleet.Digest    `json:"body_digest,omitempty"`
	Body       json.RawMessage `json:"body,omitempty"`
	Fault      fault.Kind      `json:"fault,omitempty"`
	Detail     string          `json:"detail,omitempty"`
}

// Leaf is the canonical encoding of the entry, the bytes that are hashed. Where there is a Body, it is written compact
// and BodyDigest is computed from those bytes, whatever the field says. A Body that is not JSON is left out, with the
// digest of its bytes in its place, and text that is not UTF-8 is replaced: an entry is never lost for a bad body.
func (e Entry) Leaf() []byte {
	w := wire{V: entryVersion, At: e.At.UTC().Format(time.RFC3339Nano), By: text(e.By), Request: text(e.Request), Kind: text(e.Kind),
		BodyDigest: text(e.BodyDigest), Fault: text(e.Fault), Detail: text(e.Detail)}
	if len(e.Body) > 0 {
		if body, err := seal.JSON(e.Body); err == nil && utf8.Valid(body) {
			w.Body, w.BodyDigest = body, fleet.DigestOf(body)
		} else {
			w.BodyDigest = fleet.DigestOf(e.Body)
		}
	}
	b, err := seal.JSON(w)
	if err != nil { // strings and valid JSON always have a JSON form
		return nil
	}
	return b
}

// ParseEntry reads a leaf strictly: Leaf of what it returns gives b again.
func ParseEntry(b []byte) (Entry, error) {
	const op = "audit.ParseEntry"
	if len(b) > MaxLeaf {
		return Entry{}, fault.New(op, fault.Invalid, "the entry has %d bytes, at most %d are allowed", len(b), MaxLeaf)
	}
	var w wire
	if err := seal.StrictJSON(b, &w); err != nil {
		return Entry{}, fault.Because(err, op, fault.Invalid, "not an entry: %s", fault.Text(err))
	}
	if w.V != entryVersion {
		return Entry{}, fault.New(op, fault.Invalid, "the entry is of version %q, this build reads %q", fault.Clip(w.V), entryVersion)
	}
	at, err := time.Parse(time.RFC3339Nano, w.At)
	if err != nil {
		return Entry{}, fault.Because(err, op, fault.Invalid, "the entry's time %q is not of the form 2006-01-02T15:04:05Z", fault.Clip(w.At))
	}
	if w.Kind == "" {
		return Entry{}, fault.New(op, fault.Invalid, "the entry names no kind of change")
	}
	if w.Fault != "" && !w.Fault.Known() {
		return Entry{}, fault.New(op, fault.Invalid, "the entry's fault %q is not a kind of fault", fault.Clip(string(w.Fault)))
	}
	if w.BodyDigest != "" {
		if err := w.BodyDigest.Check(); err != nil {
			return Entry{}, fault.At(op, fault.Invalid, err)
		}
	}
	e := Entry{At: at.UTC(), By: w.By, Request: w.Request, Kind: w.Kind, BodyDigest: w.BodyDigest, Body: w.Body, Fault: w.Fault,
		Detail: w.Detail}
	if !bytes.Equal(e.Leaf(), b) {
		return Entry{}, fault.New(op, fault.Invalid, "the entry is not in its canonical encoding, or its body does not match its digest")
	}
	return e, nil
}

// text replaces what is not UTF-8: encoding/json would spell it in a way that does not round-trip.
func text[S ~string](s S) S { return S(strings.ToValidUTF8(string(s), "\uFFFD")) }
