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
	"math"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/demarc-dev/demarc/audit"
	"github.com/demarc-dev/demarc/daemon/appliance"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/seal"
)

type verifyDoc struct {
	OK      bool        `json:"ok"`
	Bundles []bundleDoc `json:"bundles"` // the files, and where there are several "all together"
}

type bundleDoc struct {
	File       string         `json:"file"`
	OK         bool           `json:"ok"`
	Breach     string         `json:"breach,omitempty"`
	Reason     string         `json:"reason,omitempty"`
	Logs       []logDoc       `json:"logs,omitempty"`
	Unpaired   []headDoc      `json:"unpaired,omitempty"`  // heads that the other side kept, whose log is not in the file
	Unchecked  int            `json:"unchecked,omitempty"` // heads of logs without a pinned key
	Missing    []string       `json:"missing,omitempty"`   // pinned logs that are not in the file
	Documents  int            `json:"documents"`
	Operations []operationDoc `json:"operations,omitempty"`
}

// operationDoc is one operation whose documents make a chain.
type operationDoc struct {
	ID      string `json:"id,omitempty"`
	Log     string `json:"log"`
	State   string `json:"state"`
	Refused string `json:"refused,omitempty"` // why the appliance had to refuse the request
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
	LagSeconds  int64  `json:"lag_seconds"`         // of what no witness saw, from its first entry to its last
	Worthless   int    `json:"worthless,omitempty"` // cosignatures that are none, passed over
	Why         string `json:"why,omitempty"`       // the first of them

	Restarts []restartDoc `json:"restarts,omitempty"`
}

// restartDoc says that the log of a control plane was set back.
type restartDoc struct {
	Of    string `json:"of"`
	Kept  int64  `json:"kept"` // entries
	Lost  int64  `json:"lost"` // entries after those that a witness saw, at least
	Epoch uint64 `json:"epoch"`
	Cause string `json:"cause"`
	At    string `json:"at"`
}

// verifyFlags are the keys that an auditor brings along, each with whose it is.
type verifyFlags struct {
	pins, witnesses, operators, customers []string
	need                                  bool
	lag                                   time.Duration
}

func (a *app) verify() *cobra.Command {
	var v verifyFlags
	c := &cobra.Command{
		Use:   "verify BUNDLE ... --pin ORIGIN=FILE ...",
		Short: "Check exported evidence offline, with nothing but pinned keys",
		Long: `Checks that each log in an evidence file is whole and as it was signed, that it never had another history, and that
what the other side kept of it fits. Checks that the documents in the file are exactly those that the logs name, and
that those of each operation make a chain: asked by an operator of the vendor, approved and released by the customer,
its result signed by the appliance, whose key is that of its log. All trust comes from the keys that you bring along;
get them from each side in person, once. Without keys of operators or of the customer those count that the log itself
has on record: the word of the log's owner. Several files are checked one by one, and then against each other.

Exit code 0: all is as signed. 2: a key is missing, or the command line is wrong. 3: it is not as signed, and the reason is
printed. "demarc verify keys BUNDLE" prints which keys a file claims, to compare with what you were given.`,
		Example: `  demarc verify customer.json --pin acme.example/appliance/eu-1=customer-log.pem \
    --witness acme.example/control-plane=vendor-log.pem --witness-lag 1m \
    --operator-key ann.pub --customer-key acme.example/appliance/eu-1=globex.key.pub`,
		RunE: func(c *cobra.Command, files []string) error {
			if c.Flags().Changed("witness-lag") && v.lag <= 0 {
				return usage("--witness-lag %s: give a time above zero, for instance 1m", v.lag)
			}
			if len(files) == 0 || len(v.pins) == 0 {
				return usage("name the file of a bundle, and the keys that you trust with --pin ORIGIN=FILE (see demarc verify --help)")
			}
			p, err := v.parse()
			if err != nil {
				return err
			}
			return a.verifyFiles(files, p)
		},
	}
	f := c.Flags()
	f.StringArrayVar(&v.pins, "pin", nil, "ORIGIN=FILE: public key (PEM) of a log; repeat for each log")
	f.StringArrayVar(&v.witnesses, "witness", nil, "NAME=FILE: public key of who countersigns; the logs that are pinned are witnesses of each other too")
	f.StringArrayVar(&v.operators, "operator-key", nil, "FILE: public key of an operator of the vendor, who asks for operations")
	f.StringArrayVar(&v.customers, "customer-key", nil, "ORIGIN=FILE: public key of the customer whose appliance has this log, who approves and releases")
	f.BoolVar(&v.need, "need-witness", false, "refuse a log that no witness countersigned")
	f.DurationVar(&v.lag, "witness-lag", 0, "refuse a log of which no witness saw what is older than this, by the log's newest entry")
	c.AddCommand(a.verifyKeys())
	return c
}

// trusted are the keys of a command line by what they are trusted for. No key counts for two parties.
type trusted struct {
	audit.Pins
	operators []seal.Key
	customers map[string][]seal.Key // by the origin of the appliance's log
}

func (v verifyFlags) parse() (trusted, error) {
	p := trusted{Pins: audit.Pins{Logs: map[string]crypto.PublicKey{}, Witnesses: map[string]crypto.PublicKey{}, NeedWitness: v.need, WitnessLag: v.lag},
		customers: map[string][]seal.Key{}}
	for _, flag := range []struct {
		name string
		list []string
		take func(name string, k seal.Key) error
	}{
		{"pin", v.pins, func(name string, k seal.Key) error {
			if _, twice := p.Logs[name]; twice {
				return usage("--pin %s is given twice", name)
			}
			p.Logs[name], p.Witnesses[name] = k.Public, k.Public
			return nil
		}},
		{"witness", v.witnesses, func(name string, k seal.Key) error { p.Witnesses[name] = k.Public; return nil }},
		{"customer-key", v.customers, func(name string, k seal.Key) error { p.customers[name] = append(p.customers[name], k); return nil }},
	} {
		for _, s := range flag.list {
			name, file, ok := strings.Cut(s, "=")
			if !ok || name == "" || file == "" {
				return p, usage("--%s %s: write ORIGIN=FILE", flag.name, s)
			}
			k, err := publicKey(file)
			if err != nil {
				return p, err
			}
			if err := flag.take(name, k); err != nil {
				return p, err
			}
		}
	}
	for name := range p.customers {
		if _, ok := p.Logs[name]; !ok {
			return p, usage("--customer-key %s=FILE: no log of this name is pinned: add --pin %s=FILE", name, name)
		}
	}
	for _, file := range v.operators {
		k, err := publicKey(file)
		if err != nil {
			return p, err
		}
		p.operators = append(p.operators, k)
	}
	return p, nil
}

// unpinned lists the logs in a file whose keys are missing on the command line.
func (p trusted) unpinned(b audit.Bundle) []string {
	var out []string
	for _, l := range b.Logs {
		if _, ok := p.Logs[l.Origin]; !ok {
			out = append(out, "--pin "+fault.Clip(l.Origin)+"=FILE")
		}
	}
	return out
}

// check verifies one bundle whole: its logs, then its documents with what the logs say of them.
func (p trusted) check(file []byte) (audit.Report, []appliance.Verified, error) {
	r, err := audit.Verify(file, p.Pins)
	if err != nil {
		return r, nil, err
	}
	b, err := audit.ParseBundle(file)
	if err != nil {
		return r, nil, err
	}
	var cases []appliance.Case
	for _, l := range b.Logs {
		var log audit.Log
		for _, e := range l.Entries {
			log = log.AppendLeaf([]byte(e))
		}
		record, err := appliance.ReadRecord(log)
		if err != nil {
			return r, nil, err
		}
		own, err := seal.KeyOf(p.Logs[l.Origin])
		if err != nil {
			return r, nil, err
		}
		cases = append(cases, appliance.Case{Origin: l.Origin, Record: record,
			Trust: appliance.Trust{Operators: p.operators, Customers: p.customers[l.Origin], Appliance: []seal.Key{own}}})
	}
	chains, err := appliance.VerifyDocuments(cases, b.Documents)
	return r, chains, err
}

// verifyFiles checks each file by itself, then all against each other, and prints what came out, well or not.
func (a *app) verifyFiles(files []string, p trusted) error {
	doc := verifyDoc{OK: true}
	var first error
	var all audit.Bundle
	for _, file := range files {
		b, err := readBounded(file, audit.MaxBundle)
		if err != nil {
			return err
		}
		one, err := audit.ParseBundle(b)
		if missing := p.unpinned(one); err == nil && len(missing) > 0 {
			return usage("%s holds logs whose keys are missing: get them from their owners, and add %s", file, strings.Join(missing, " "))
		}
		r, chains, err := p.check(b)
		doc.Bundles = append(doc.Bundles, describe(file, len(one.Documents), r, chains, err))
		if err != nil {
			first = errors.Join(first, err)
			continue
		}
		all = merge(all, one)
	}
	if len(files) > 1 && first == nil {
		enc, err := all.Encode()
		if err != nil {
			return err
		}
		r, chains, err := p.check(enc)
		doc.Bundles = append(doc.Bundles, describe("all together", len(all.Documents), r, chains, err))
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
	held := map[string]bool{} // two exports of one log hold the same documents
	for _, d := range all.Documents {
		held[d] = true
	}
	all.Documents = slices.Clone(all.Documents)
	for _, d := range one.Documents {
		if !held[d] {
			all.Documents = append(all.Documents, d)
		}
	}
	return all
}

func describe(file string, documents int, r audit.Report, chains []appliance.Verified, err error) bundleDoc {
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
		o := logDoc{headDoc: head(l.Head), Checkpoints: l.Checkpoints, Witnessed: l.Witnessed, WitnessedAt: spell(l.WitnessedAt), First: spell(l.First), Last: spell(l.Last),
			LagSeconds: int64(math.Ceil(l.Lag.Seconds())), Worthless: len(l.Worthless)}
		if len(l.Worthless) > 0 {
			o.Why = l.Worthless[0]
		}
		for _, x := range l.Restarts {
			o.Restarts = append(o.Restarts, restartDoc{x.Of, x.Kept, x.Lost, x.Number, x.Cause, spell(x.At)})
		}
		d.Logs = append(d.Logs, o)
	}
	for _, h := range r.Unpaired {
		d.Unpaired = append(d.Unpaired, head(h))
	}
	d.Unchecked, d.Missing, d.Documents = r.Unchecked, r.Missing, documents
	for _, c := range chains {
		d.Operations = append(d.Operations, operationDoc{ID: c.ID, Log: c.Origin, State: string(c.State), Refused: c.Refused})
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
			for _, x := range l.Restarts {
				fmt.Fprintf(w, "  \tHISTORY RESTARTED (%s, epoch %d): %s kept %d entries, %d after them were countersigned and are lost\tat %s\n", x.Cause, x.Epoch, x.Of, x.Kept, x.Lost, orDash(x.At))
			}
			if l.WitnessedAt == "" {
				fmt.Fprintf(w, "  \tno pinned witness countersigned it\t\n")
			} else {
				fmt.Fprintf(w, "  \t%d of them countersigned\tby %s\n", l.Witnessed, l.WitnessedAt)
			}
			if left := l.Size - l.Witnessed; left > 0 && l.WitnessedAt != "" {
				fmt.Fprintf(w, "  \tthe last %d, of %d s, were seen by no witness\t\n", left, l.LagSeconds)
			}
			if l.Worthless > 0 {
				fmt.Fprintf(w, "  \tFINDING: %d cosignatures are none and were passed over: %s\t\n", l.Worthless, l.Why)
			}
		}
		if n := len(b.Unpaired); n > 0 {
			fmt.Fprintf(w, "  %d heads of logs that are not in the file: signed, not compared\n", n)
		}
		if b.Unchecked > 0 {
			fmt.Fprintf(w, "  %d heads of logs whose key is not pinned: not checked\n", b.Unchecked)
		}
		for _, origin := range b.Missing {
			fmt.Fprintf(w, "  the log %s, which is pinned, is not in it\n", origin)
		}
		if b.Documents > 0 {
			fmt.Fprintf(w, "  %d documents, all that the logs name, each signed by the party whose word it is\n", b.Documents)
		}
		for _, o := range b.Operations {
			if o.Refused != "" {
				fmt.Fprintf(w, "  FINDING: a request came to nothing, and could not: %s\n", o.Refused)
				continue
			}
			fmt.Fprintf(w, "  operation %s: %s\n", o.ID, o.State)
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
