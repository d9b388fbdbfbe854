// SPDX-License-Identifier: Apache-2.0

package audit

import (
	"crypto"
	"encoding/base64"
	"encoding/json"

	"golang.org/x/mod/sumdb/tlog"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/seal"
)

// Limits of a bundle.
const (
	BundleVersion = "demarc-evidence/1"
	MaxBundle     = 512 << 20
	maxLogs       = 64
	maxNotes      = 1 << 16
	maxDocuments  = 1 << 16
)

// Bundle is the evidence file, JSON, read strictly. Leaves, notes and documents are strings, so that their bytes
// survive whoever formats the file anew. Nothing in it is trusted: keys come from Pins.
type Bundle struct {
	Version   string        `json:"version"` // BundleVersion
	Logs      []LogEvidence `json:"logs"`
	Witnessed []string      `json:"witnessed"` // checkpoints of the OTHER side that this side saw and kept
	Documents []string      `json:"documents"` // sealed documents
}

// LogEvidence is one log, from its first entry to its newest checkpoint.
type LogEvidence struct {
	Origin string `json:"origin"`
	// base64 of the Ed25519 key that the bundle's maker says is the log's: compared, not trusted
	Key          string   `json:"key,omitempty"`
	Entries      []string `json:"entries"`          // leaves
	Hashes       []string `json:"hashes,omitempty"` // base64 leaf hashes: where they are genuine, they name the very entry that was changed
	Checkpoints  []string `json:"checkpoints"`      // signed by the log
	Cosignatures []string `json:"cosignatures"`     // checkpoints with the line of a witness added
}

// Collect gathers the evidence of one log.
func Collect(origin string, key crypto.PublicKey, l Log, checkpoints, cosigned [][]byte) (LogEvidence, error) {
	k, err := edKey("audit.Collect", key)
	if err != nil {
		return LogEvidence{}, err
	}
	e := LogEvidence{Origin: origin, Key: base64.StdEncoding.EncodeToString(k), Entries: []string{}, Checkpoints: texts(checkpoints),
		Cosignatures: texts(cosigned)}
	for i := range l.Size() {
		leaf := l.Entry(i)
		h := tlog.RecordHash(leaf)
		e.Entries = append(e.Entries, string(leaf))
		e.Hashes = append(e.Hashes, base64.StdEncoding.EncodeToString(h[:]))
	}
	return e, nil
}

func texts(bs [][]byte) []string {
	out := make([]string, len(bs))
	for i, b := range bs {
		out[i] = string(b)
	}
	return out
}

// Encode writes the bundle as a file.
func (b Bundle) Encode() ([]byte, error) {
	const op = "audit.Bundle"
	b.Version = BundleVersion
	out, err := json.MarshalIndent(b, "", " ")
	if err != nil {
		return nil, fault.At(op, fault.Internal, err)
	}
	if len(out) > MaxBundle {
		return nil, fault.New(op, fault.Invalid, "the bundle has %d bytes, at most %d are allowed: export a shorter history", len(out), MaxBundle)
	}
	return append(out, '\n'), nil
}

// ParseBundle reads the file strictly and checks nothing but its form. Verify is what an auditor calls.
func ParseBundle(file []byte) (Bundle, error) {
	const op = "audit.ParseBundle"
	if len(file) > MaxBundle {
		return Bundle{}, fault.New(op, fault.Invalid, "the bundle has %d bytes, at most %d are allowed", len(file), MaxBundle)
	}
	var b Bundle
	if err := seal.StrictJSON(file, &b); err != nil {
		return Bundle{}, fault.Because(err, op, fault.Invalid, "not an evidence bundle: %s", fault.Text(err))
	}
	if b.Version != BundleVersion {
		return Bundle{}, fault.New(op, fault.Invalid, "the bundle is of version %q, this build reads %q", fault.Clip(b.Version), BundleVersion)
	}
	if len(b.Logs) > maxLogs || len(b.Witnessed) > maxNotes || len(b.Documents) > maxDocuments {
		return Bundle{}, fault.New(op, fault.Invalid, "the bundle holds more than %d logs, %d witnessed checkpoints or %d documents", maxLogs,
			maxNotes, maxDocuments)
	}
	seen := map[string]bool{}
	for i, l := range b.Logs {
		if seen[l.Origin] {
			return Bundle{}, fault.New(op, fault.Invalid, "the log %q is in the bundle twice", fault.Clip(l.Origin))
		}
		seen[l.Origin] = true
		if len(l.Checkpoints) > maxNotes || len(l.Cosignatures) > maxNotes {
			return Bundle{}, fault.New(op, fault.Invalid, "log %d of the bundle holds more than %d checkpoints", i, maxNotes)
		}
	}
	return b, nil
}
