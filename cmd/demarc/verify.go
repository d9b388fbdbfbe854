// SPDX-License-Identifier: Apache-2.0

package main

import (
	"crypto"
	"crypto/ed25519"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/demarc-dev/demarc/audit"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/seal"
)

type verifyDoc struct {
	OK      bool        `json:"ok"`
	Bundles []bundleDoc `json:"bundles"` // the files, and where there are several "all together"
}

type bundleDoc struct {
	File     string        `json:"file"`
	OK       bool          `json:"ok"`
	Breach   string        `json:"breach,omitempty"`
	Reason   string        `json:"reason,omitempty"`
	Logs     []logDoc      `json:"logs,omitempty"`
	Unpaired []headDoc     `json:"unpaired,omitempty"` // heads that the other side kept, whose log is not in the file
	Signed   []documentDoc `json:"documents,omitempty"`
}

type headDoc struct {
	Origin string `json:"origin"`
	Size   int64  `json:"size"`
	Root   string `json:"root"`
}

type logDoc struct {
	headDoc
	Checkpoints int    `json:"checkpoints"`
	Witnessed   int64  `json:"witnessed"`
	WitnessedAt string `json:"witnessed_at,omitempty"`
	First       string `json:"first,omitempty"`
	Last        string `json:"last,omitempty"`
}

type documentDoc struct {
	Digest string   `json:"digest"`
	Type   string   `json:"type"`
	By     []string `json:"by"`
}

func (a *app) verify() *cobra.Command {
	var pins, witnesses, signers []string
	var need bool
	c := &cobra.Command{
		Use:   "verify BUNDLE ... --pin ORIGIN=FILE ...",
		Short: "Check exported evidence offline, with nothing but pinned keys",
		Long: `Checks that each log in an evidence file is whole and as it was signed, that it never had another history, and that
what the other side kept of it fits. All trust comes from the keys that you bring along; get them from each side in
person, once. Several files are checked one by one, and then against each other.

Exit code 0: all is as signed. 3: it is not, and the reason is printed.
"demarc verify keys BUNDLE" prints which keys a file claims, to compare with what you were given.`,
		Example: `  demarc verify evidence.json --pin acme.example/control-plane=vendor-log.pem \
    --witness acme.example/appliance/eu-1=customer-log.pem`,
		RunE: func(_ *cobra.Command, files []string) error {
			if len(files) == 0 || len(pins) == 0 {
				return usage("name the file of a bundle, and the keys that you trust with --pin ORIGIN=FILE (see demarc verify --help)")
			}
			p, err := parsePins(pins, witnesses, signers)
			if err != nil {
				return err
			}
			p.NeedWitness = need
			return a.verifyFiles(files, p)
		},
	}
	f := c.Flags()
	f.StringArrayVar(&pins, "pin", nil, "ORIGIN=FILE: public key (PEM) of a log; repeat for each log")
	f.StringArrayVar(&witnesses, "witness", nil, "NAME=FILE: public key of who countersigns; the logs that are pinned are witnesses too")
	f.StringArrayVar(&signers, "signer", nil, "FILE: public key of who may have signed documents in the file")
	f.BoolVar(&need, "need-witness", false, "refuse a log that no witness countersigned")
	c.AddCommand(a.verifyKeys())
	return c
}

func parsePins(pins, witnesses, signers []string) (audit.Pins, error) {
	p := audit.Pins{Logs: map[string]crypto.PublicKey{}, Witnesses: map[string]crypto.PublicKey{}}
	for flag, list := range map[string][]string{"pin": pins, "witness": witnesses} {
		for _, s := range list {
			name, file, ok := strings.Cut(s, "=")
			if !ok || name == "" || file == "" {
				return p, usage("--%s %s: write ORIGIN=FILE", flag, s)
			}
			k, err := publicKey(file)
			if err != nil {
				return p, err
			}
			if flag == "pin" {
				if _, twice := p.Logs[name]; twice {
					return p, usage("--pin %s is given twice", name)
				}
				p.Logs[name] = k.Public
			}
			if _, given := p.Witnesses[name]; !given || flag == "witness" {
				p.Witnesses[name] = k.Public
			}
		}
	}
	for _, file := range signers {
		k, err := publicKey(file)
		if err != nil {
			return p, err
		}
		p.Documents = append(p.Documents, k)
	}
	return p, nil
}

// verifyFiles checks each file by itself, then all against each other, and prints what came out, well or not.
func (a *app) verifyFiles(files []string, p audit.Pins) error {
	doc := verifyDoc{OK: true}
	var first error
	var all audit.Bundle
	for _, file := range files {
		b, err := readBounded(file, audit.MaxBundle)
		if err != nil {
			return err
		}
		r, err := audit.Verify(b, p)
		doc.Bundles = append(doc.Bundles, describe(file, r, err))
		if err != nil {
			first = errors.Join(first, err)
			continue
		}
		one, err := audit.ParseBundle(b)
		if err != nil {
			return err
		}
		all = merge(all, one)
	}
	if len(files) > 1 && first == nil {
		enc, err := all.Encode()
		if err != nil {
			return err
		}
		r, err := audit.Verify(enc, p)
		doc.Bundles = append(doc.Bundles, describe("all together", r, err))
		first = err
	}
	doc.OK = first == nil
	if err := a.emit(doc, func(w io.Writer) { writeVerified(w, doc) }); err != nil || first == nil {
		return err
	}
	var b audit.Breach
	if !errors.As(first, &b) && fault.Of(first) != fault.Denied { // a file that is no evidence at all is refused too
		first = fault.Because(first, "demarc.verify", fault.Denied, "%s", fault.Text(first))
	}
	return errors.Join(first, errTold)
}

// merge puts the evidence of both sides into one bundle, so that what one kept of the other is compared with it.
// Of a log that both files hold, the longer is compared with the heads of the shorter.
func merge(all, one audit.Bundle) audit.Bundle {
	all.Version = audit.BundleVersion
	for _, l := range one.Logs {
		i := slices.IndexFunc(all.Logs, func(o audit.LogEvidence) bool { return o.Origin == l.Origin })
		if i < 0 {
			all.Logs = append(all.Logs, l)
			continue
		}
		if len(l.Entries) > len(all.Logs[i].Entries) {
			all.Logs[i], l = l, all.Logs[i]
		}
		all.Logs[i].Checkpoints = slices.Concat(all.Logs[i].Checkpoints, l.Checkpoints)
		all.Logs[i].Cosignatures = slices.Concat(all.Logs[i].Cosignatures, l.Cosignatures)
	}
	all.Witnessed = slices.Concat([]string{}, all.Witnessed, one.Witnessed)
	all.Documents = slices.Concat([]string{}, all.Documents, one.Documents)
	return all
}

func describe(file string, r audit.Report, err error) bundleDoc {
	d := bundleDoc{File: file, OK: err == nil}
	if err != nil {
		var b audit.Breach
		if errors.As(err, &b) {
			d.Breach = string(b)
		}
		d.Reason = fault.Text(err)
		return d
	}
	for _, l := range r.Logs {
		o := logDoc{headDoc: head(l.Head), Checkpoints: l.Checkpoints, Witnessed: l.Witnessed, WitnessedAt: spell(l.WitnessedAt), First: spell(l.First), Last: spell(l.Last)}
		d.Logs = append(d.Logs, o)
	}
	for _, h := range r.Unpaired {
		d.Unpaired = append(d.Unpaired, head(h))
	}
	for _, s := range r.Documents {
		o := documentDoc{Digest: string(s.Digest), Type: s.Type}
		for _, k := range s.By {
			o.By = append(o.By, string(k))
		}
		d.Signed = append(d.Signed, o)
	}
	return d
}

func head(h audit.Head) headDoc {
	return headDoc{Origin: h.Origin, Size: h.Size, Root: hex.EncodeToString(h.Root[:])}
}

func spell(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return t.UTC().Format(time.RFC3339)
}

func writeVerified(w io.Writer, doc verifyDoc) {
	for _, b := range doc.Bundles {
		if !b.OK {
			fmt.Fprintf(w, "%s: REFUSED (%s): %s\n", b.File, orDash(b.Breach), b.Reason)
			continue
		}
		fmt.Fprintf(w, "%s: as it was signed\n", b.File)
		for _, l := range b.Logs {
			fmt.Fprintf(w, "  %s\t%d entries\t%s to %s\n", l.Origin, l.Size, orDash(l.First), orDash(l.Last))
			if l.WitnessedAt == "" {
				fmt.Fprintf(w, "  \tno pinned witness countersigned it\t\n")
			} else {
				fmt.Fprintf(w, "  \t%d of them countersigned\tby %s\n", l.Witnessed, l.WitnessedAt)
			}
		}
		if n := len(b.Unpaired); n > 0 {
			fmt.Fprintf(w, "  %d heads of logs that are not in the file: signed, not compared\n", n)
		}
		if n := len(b.Signed); n > 0 {
			fmt.Fprintf(w, "  %d documents, each signed by a given key\n", n)
		}
	}
}

type claimDoc struct {
	Origin string `json:"origin"`
	KeyID  string `json:"key_id"`
	PEM    string `json:"pem"`
}

func (a *app) verifyKeys() *cobra.Command {
	return &cobra.Command{
		Use:   "keys BUNDLE",
		Short: "Print which keys the logs of a file claim to be signed with; they prove nothing",
		Long: `Prints the public key that the maker of the file says is that of each log. Whoever forges a file can forge this too:
compare the key with what the other side gave you, in person, before you pin it.`,
		Example: "  demarc verify keys evidence.json",
		Args:    exactly(1, "the file of a bundle"),
		RunE: func(_ *cobra.Command, args []string) error {
			b, err := readBounded(args[0], audit.MaxBundle)
			if err != nil {
				return err
			}
			bundle, err := audit.ParseBundle(b)
			if err != nil {
				return err
			}
			claims, err := claimed(bundle)
			if err != nil {
				return err
			}
			return a.emit(struct {
				Keys []claimDoc `json:"keys"`
			}{claims}, func(w io.Writer) {
				for _, c := range claims {
					fmt.Fprintf(w, "# %s claims %s\n%s", c.Origin, c.KeyID, c.PEM)
				}
			})
		},
	}
}

// claimed reads the keys that a bundle names. They are Ed25519, as those of all logs.
func claimed(b audit.Bundle) ([]claimDoc, error) {
	const op = "demarc.claimed"
	out := []claimDoc{}
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
		out = append(out, claimDoc{Origin: l.Origin, KeyID: string(k.ID), PEM: string(k.PEM())})
	}
	return out, nil
}
