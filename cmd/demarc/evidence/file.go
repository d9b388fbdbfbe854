// SPDX-License-Identifier: Apache-2.0

// Package evidence is what both sides do with signed evidence: an export is saved as a file, and an operation's documents are verified
// before
// its output is opened.
package evidence

import (
	"bytes"
	"crypto/ed25519"
	"encoding/base64"
	"io"

	"connectrpc.com/connect"

	"github.com/demarc-dev/demarc/audit"
	"github.com/demarc-dev/demarc/client"
	"github.com/demarc-dev/demarc/cmd/demarc/cli"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/seal"
)

// Receive writes a stream of evidence to w, and calls alive whenever the stream moves.
func Receive[M any, P interface {
	*M
	GetData() []byte
}](s *connect.ServerStreamForClient[M], w io.Writer, alive func()) error {
	defer s.Close()
	for total := 0; s.Receive(); {
		alive()
		b := P(s.Msg()).GetData()
		if total += len(b); total > audit.MaxBundle {
			return fault.New("demarc.export", fault.Invalid, "the evidence has more than %d bytes", audit.MaxBundle)
		}
		if _, err := w.Write(b); err != nil {
			return fault.At("demarc.export", fault.Unavailable, err)
		}
	}
	if err := s.Err(); err != nil {
		return client.Fault(err)
	}
	return nil
}

// Save writes evidence to a new file, whole or not at all. What fetch has written counts from its last restart on.
func Save(a *cli.App, file string, fetch func(restart func() io.Writer) error) error {
	if file == "" {
		return cli.Usage("name the file with --out FILE")
	}
	if err := cli.Absent(file); err != nil {
		return err
	}
	var b bytes.Buffer
	if err := fetch(func() io.Writer { b.Reset(); return &b }); err != nil {
		return err
	}
	bundle, err := audit.ParseBundle(b.Bytes())
	if err != nil {
		return err
	}
	if err := cli.Create(file, b.Bytes(), 0o600); err != nil {
		return err
	}
	keys, err := Claims(bundle)
	if err != nil {
		return err
	}
	return a.Say(map[string]any{"file": file, "bytes": b.Len(), "keys": keys},
		"%d bytes of evidence are in %s; check it with: demarc verify %s --pin ORIGIN=FILE", b.Len(), file, file)
}

// Claim is the key that the maker of a bundle says a log is signed with. It proves nothing.
type Claim struct {
	Origin string `json:"origin"`
	KeyID  string `json:"key_id"`
	PEM    string `json:"pem"`
}

// Claims reads the keys that a bundle names. They are Ed25519, as those of all logs.
func Claims(b audit.Bundle) ([]Claim, error) {
	const op = "demarc.claims"
	out := []Claim{}
	for _, l := range b.Logs {
		if l.Key == "" {
			continue
		}
		raw, err := base64.StdEncoding.Strict().DecodeString(l.Key)
		if err != nil {
			return nil, fault.Because(err, op, fault.Invalid, "log %q: its key is not base64", l.Origin)
		}
		k, err := seal.KeyOf(ed25519.PublicKey(raw))
		if err != nil {
			return nil, err
		}
		out = append(out, Claim{Origin: l.Origin, KeyID: string(k.ID), PEM: string(k.PEM())})
	}
	return out, nil
}
