// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/demarc-dev/demarc/audit"
	"github.com/demarc-dev/demarc/fault"
)

// print writes the answer: the document with --output json, else what text writes, in columns where it uses tabs.
func (a *app) print(doc any, text func(w io.Writer)) error {
	if a.format == "json" {
		return a.json(a.out, doc)
	}
	w := tabwriter.NewWriter(a.out, 0, 8, 2, ' ', 0)
	text(w)
	return written(w.Flush())
}

func (a *app) json(w io.Writer, doc any) error {
	e := json.NewEncoder(w)
	e.SetEscapeHTML(false)
	e.SetIndent("", "  ")
	return written(e.Encode(doc))
}

func written(err error) error {
	if err != nil {
		return fault.Because(err, "cli.print", fault.Unavailable, "the answer could not be written")
	}
	return nil
}

// note tells how things go on, on standard error.
func (a *app) note(format string, args ...any) { fmt.Fprintf(a.err, format+"\n", args...) }

type errorDoc struct {
	Error struct {
		Kind   string `json:"kind"`
		Text   string `json:"text"`
		Breach string `json:"breach,omitempty"`
	} `json:"error"`
}

// complain prints an error where people look for one.
func (a *app) complain(err error) {
	var doc errorDoc
	doc.Error.Kind, doc.Error.Text = kindOf(err), sentence(err)
	var b audit.Breach
	if errors.As(err, &b) {
		doc.Error.Breach = string(b)
	}
	if a.format == "json" {
		_ = a.json(a.err, doc)
		return
	}
	a.note("demarc: %s", doc.Error.Text)
}

func kindOf(err error) string {
	var u usageError
	if errors.As(err, &u) {
		return "usage"
	}
	return string(fault.Of(err))
}

// sentence is what a person reads: the sentence of the fault, and the cause where that comes from this machine.
func sentence(err error) string {
	var u usageError
	if errors.As(err, &u) {
		return u.text
	}
	var f *fault.Error
	if !errors.As(err, &f) { // of cobra: a wrong command line is the only one it has
		return err.Error()
	}
	text := fault.Text(err)
	root := err
	for next := root; next != nil; next = errors.Unwrap(next) {
		root = next
	}
	switch root.(type) {
	case *fault.Error, fault.Kind, audit.Breach:
		return text
	}
	if cause := root.Error(); !strings.Contains(text, cause) {
		return text + " (" + cause + ")"
	}
	return text
}

// stamp spells a time for people, "-" for none.
func stamp(unix int64) string {
	if unix == 0 {
		return "-"
	}
	return time.Unix(unix, 0).UTC().Format(time.RFC3339)
}

// orDash stands in for what is not there.
func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

func yesNo(b bool, yes, no string) string {
	if b {
		return yes
	}
	return no
}
