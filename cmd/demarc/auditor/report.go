// SPDX-License-Identifier: Apache-2.0

package auditor

import (
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math"
	"time"

	"github.com/demarc-dev/demarc/audit"
	"github.com/demarc-dev/demarc/cmd/demarc/cli"
	"github.com/demarc-dev/demarc/daemon/appliance/book"
	"github.com/demarc-dev/demarc/fault"
)

type verifyDoc struct {
	OK      bool        `json:"ok"`
	Bundles []bundleDoc `json:"bundles"` // the files, and if there are several "all together"
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

// describe makes the document of one bundle, of which err is what is wrong.
func describe(file string, documents int, r audit.Report, chains []book.Verified, err error) bundleDoc {
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
		o := logDoc{headDoc: headOf(l.Head), Checkpoints: l.Checkpoints, Witnessed: l.Witnessed, WitnessedAt: timeOf(l.WitnessedAt),
			First: timeOf(l.First), Last: timeOf(l.Last),
			LagSeconds: int64(math.Ceil(l.Lag.Seconds())), Worthless: len(l.Worthless)}
		if len(l.Worthless) > 0 {
			o.Why = l.Worthless[0]
		}
		for _, x := range l.Restarts {
			o.Restarts = append(o.Restarts, restartDoc{x.Of, x.Kept, x.Lost, x.Number, x.Cause, timeOf(x.At)})
		}
		d.Logs = append(d.Logs, o)
	}
	for _, h := range r.Unpaired {
		d.Unpaired = append(d.Unpaired, headOf(h))
	}
	d.Unchecked, d.Missing, d.Documents = r.Unchecked, r.Missing, documents
	for _, c := range chains {
		d.Operations = append(d.Operations, operationDoc{ID: c.ID, Log: c.Origin, State: string(c.State), Refused: c.Refused})
	}
	return d
}

func headOf(h audit.Head) headDoc {
	return headDoc{Origin: h.Origin, Size: h.Size, Root: hex.EncodeToString(h.Root[:])}
}

func timeOf(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return t.UTC().Format(time.RFC3339)
}

// printReport prints what came out for each bundle.
func printReport(w io.Writer, doc verifyDoc) {
	for _, b := range doc.Bundles {
		if !b.OK {
			fmt.Fprintf(w, "%s: REFUSED (%s): %s\n", b.File, cli.OrDash(b.Breach), b.Reason)
			continue
		}
		fmt.Fprintf(w, "%s: as it was signed\n", b.File)
		for _, l := range b.Logs {
			fmt.Fprintf(w, "  %s\t%d entries\t%s to %s\n", l.Origin, l.Size, cli.OrDash(l.First), cli.OrDash(l.Last))
			for _, x := range l.Restarts {
				fmt.Fprintf(w, "  \tHISTORY RESTARTED (%s, epoch %d): %s kept %d entries, %d after them were countersigned and are lost\tat %s\n",
					x.Cause, x.Epoch, x.Of, x.Kept, x.Lost, cli.OrDash(x.At))
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
