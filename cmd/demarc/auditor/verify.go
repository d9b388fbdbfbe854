// SPDX-License-Identifier: Apache-2.0

// Package auditor is the commands of an auditor, who works offline, with exported evidence and pinned keys.
package auditor

import (
	"crypto"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/demarc-dev/demarc/audit"
	"github.com/demarc-dev/demarc/cmd/demarc/cli"
	"github.com/demarc-dev/demarc/cmd/demarc/evidence"
	"github.com/demarc-dev/demarc/daemon/appliance/book"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/seal"
)

// verifyFlags are the keys that an auditor brings along, each with whose it is.
type verifyFlags struct {
	pins, witnesses, operators, customers []string
	need                                  bool
	lag                                   time.Duration
}

// VerifyCommand is demarc verify.
func VerifyCommand(a *cli.App) *cobra.Command {
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
				return cli.Usage("--witness-lag %s: give a time above zero, for instance 1m", v.lag)
			}
			if len(files) == 0 || len(v.pins) == 0 {
				return cli.Usage("name the file of a bundle, and the keys that you trust with --pin ORIGIN=FILE (see demarc verify --help)")
			}
			p, err := v.parse()
			if err != nil {
				return err
			}
			return verifyFiles(a, files, p)
		},
	}
	f := c.Flags()
	f.StringArrayVar(&v.pins, "pin", nil, "ORIGIN=FILE: public key (PEM) of a log; repeat for each log")
	f.StringArrayVar(&v.witnesses, "witness", nil,
		"NAME=FILE: public key of a witness; the logs that are pinned are witnesses of each other too")
	f.StringArrayVar(&v.operators, "operator-key", nil, "FILE: public key of an operator of the vendor, who asks for operations")
	f.StringArrayVar(&v.customers, "customer-key", nil,
		"ORIGIN=FILE: public key of the customer whose appliance has this log, who approves and releases")
	f.BoolVar(&v.need, "need-witness", false, "refuse a log that no witness countersigned")
	f.DurationVar(&v.lag, "witness-lag", 0, "refuse a log of which no witness saw what is older than this, by the log's newest entry")
	c.AddCommand(keysCommand(a))
	return c
}

// trusted are the keys of a command line by what they are trusted for. No key counts for two parties.
type trusted struct {
	audit.Pins
	operators []seal.Key
	customers map[string][]seal.Key // by the origin of the appliance's log
}

func (v verifyFlags) parse() (trusted, error) {
	p := trusted{Pins: audit.Pins{Logs: map[string]crypto.PublicKey{}, Witnesses: map[string]crypto.PublicKey{}, NeedWitness: v.need,
		WitnessLag: v.lag},
		customers: map[string][]seal.Key{}}
	for _, flag := range []struct {
		name string
		list []string
		take func(name string, k seal.Key) error
	}{
		{"pin", v.pins, func(name string, k seal.Key) error {
			if _, twice := p.Logs[name]; twice {
				return cli.Usage("--pin %s is given twice", name)
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
				return p, cli.Usage("--%s %s: write ORIGIN=FILE", flag.name, s)
			}
			k, err := cli.ReadKey(file)
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
			return p, cli.Usage("--customer-key %s=FILE: no log of this name is pinned: add --pin %s=FILE", name, name)
		}
	}
	for _, file := range v.operators {
		k, err := cli.ReadKey(file)
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
func (p trusted) check(file []byte) (audit.Report, []book.Verified, error) {
	r, err := audit.Verify(file, p.Pins)
	if err != nil {
		return r, nil, err
	}
	b, err := audit.ParseBundle(file)
	if err != nil {
		return r, nil, err
	}
	var cases []book.Case
	for _, l := range b.Logs {
		var log audit.Log
		for _, e := range l.Entries {
			log = log.AppendLeaf([]byte(e))
		}
		record, err := book.ReadRecord(log)
		if err != nil {
			return r, nil, err
		}
		own, err := seal.KeyOf(p.Logs[l.Origin])
		if err != nil {
			return r, nil, err
		}
		cases = append(cases, book.Case{Origin: l.Origin, Record: record,
			Trust: book.Trust{Operators: p.operators, Customers: p.customers[l.Origin], Appliance: []seal.Key{own}}})
	}
	chains, err := book.VerifyDocuments(cases, b.Documents)
	return r, chains, err
}

// verifyFiles checks each file by itself, then all against each other, and prints what came out, well or not.
func verifyFiles(a *cli.App, files []string, p trusted) error {
	doc := verifyDoc{OK: true}
	var first error
	var all audit.Bundle
	for _, file := range files {
		b, err := cli.ReadFile(file, audit.MaxBundle)
		if err != nil {
			return err
		}
		one, err := audit.ParseBundle(b)
		if missing := p.unpinned(one); err == nil && len(missing) > 0 {
			return cli.Usage("%s holds logs whose keys are missing: get them from their owners, and add %s", file, strings.Join(missing, " "))
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
	if err := a.Emit(doc, func(w io.Writer) { printReport(w, doc) }); err != nil || first == nil {
		return err
	}
	var b audit.Breach
	if !errors.As(first, &b) && fault.Of(first) != fault.Denied { // a file that is no evidence at all is refused too
		first = fault.Because(first, "demarc.verify", fault.Denied, "%s", fault.Text(first))
	}
	return errors.Join(first, cli.ErrPrinted)
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

func keysCommand(a *cli.App) *cobra.Command {
	return &cobra.Command{
		Use:   "keys BUNDLE",
		Short: "Print which keys the logs of a file claim to be signed with; they prove nothing",
		Long: `Prints the public key that the maker of the file says is that of each log. Whoever forges a file can forge this too:
compare the key with what the other side gave you, in person, before you pin it.`,
		Example: "  demarc verify keys evidence.json",
		Args:    cli.Exactly(1, "the file of a bundle"),
		RunE: func(_ *cobra.Command, args []string) error {
			b, err := cli.ReadFile(args[0], audit.MaxBundle)
			if err != nil {
				return err
			}
			bundle, err := audit.ParseBundle(b)
			if err != nil {
				return err
			}
			claims, err := evidence.Claims(bundle)
			if err != nil {
				return err
			}
			return a.Emit(struct {
				Keys []evidence.Claim `json:"keys"`
			}{claims}, func(w io.Writer) {
				for _, c := range claims {
					fmt.Fprintf(w, "# %s claims %s\n%s", c.Origin, c.KeyID, c.PEM)
				}
			})
		},
	}
}
