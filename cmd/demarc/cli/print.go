// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"reflect"
	"strings"
	"text/tabwriter"
	"time"
	"unicode"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/demarc-dev/demarc/audit"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
)

// Emit prints a document: as JSON, or as text writes it, with its tabs as columns.
func (a *App) Emit(v any, text func(w io.Writer)) error {
	if a.Output == "json" {
		return writeJSON(a.Out, v)
	}
	w := tabwriter.NewWriter(a.Out, 0, 4, 2, ' ', 0)
	text(safe{w})
	return fault.At("demarc.emit", fault.Unavailable, w.Flush())
}

// Say is [App.Emit] for one line without columns.
func (a *App) Say(v any, format string, args ...any) error {
	return a.Emit(v, func(w io.Writer) { fmt.Fprintf(w, format+"\n", args...) })
}

// Note prints a line about progress, on standard error.
func (a *App) Note(format string, args ...any) { fmt.Fprintf(safe{a.Errs}, format+"\n", args...) }

func writeJSON(w io.Writer, v any) error {
	e := json.NewEncoder(w)
	e.SetEscapeHTML(false)
	e.SetIndent("", "  ")
	return fault.At("demarc.emit", fault.Unavailable, e.Encode(document(v)))
}

// document makes every field of a message of the wire visible, as the schema spells it: what is false, empty or zero is
// there too, so that a script finds the same names always. Anything else stays as it is.
func document(v any) any {
	if m, ok := v.(proto.Message); ok {
		return message(m.ProtoReflect())
	}
	if l := reflect.ValueOf(v); l.Kind() == reflect.Slice && l.Type().Elem().Implements(reflect.TypeFor[proto.Message]()) {
		out := make([]any, l.Len())
		for i := range out {
			out[i] = document(l.Index(i).Interface())
		}
		return out
	}
	return v
}

func message(m protoreflect.Message) map[string]any {
	out := map[string]any{}
	fields := m.Descriptor().Fields()
	for i := range fields.Len() {
		f := fields.Get(i)
		if !f.IsList() {
			if v := m.Get(f); f.Message() == nil || v.Message().IsValid() {
				out[string(f.Name())] = value(f, v)
			} else {
				out[string(f.Name())] = nil
			}
			continue
		}
		list := m.Get(f).List()
		all := make([]any, list.Len())
		for j := range all {
			all[j] = value(f, list.Get(j))
		}
		out[string(f.Name())] = all
	}
	return out
}

func value(f protoreflect.FieldDescriptor, v protoreflect.Value) any {
	if f.Message() != nil {
		return message(v.Message())
	}
	if b, ok := v.Interface().([]byte); ok && b == nil {
		return []byte{}
	}
	return v.Interface()
}

// safe makes text fit for a terminal: nothing that the other party wrote moves the cursor or hides what is there.
type safe struct{ io.Writer }

// Write implements io.Writer.
func (s safe) Write(b []byte) (int, error) {
	if _, err := io.WriteString(s.Writer, clean(string(b))); err != nil {
		return 0, err
	}
	return len(b), nil
}

func clean(s string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsGraphic(r) || r == '\n' || r == '\t' {
			return r
		}
		return unicode.ReplacementChar
	}, s)
}

type errorDoc struct {
	Kind   string `json:"kind"` // usage, or that of a fault
	Text   string `json:"text"`
	Breach string `json:"breach,omitempty"` // of verify
}

// printError prints an error on standard error.
func (a *App) printError(err error) {
	doc := errorDoc{Kind: string(fault.Of(err)), Text: sentence(err)}
	if errors.Is(err, ErrUsage) {
		doc.Kind = ErrUsage.Error()
	}
	var breach audit.Breach
	if errors.As(err, &breach) {
		doc.Breach = string(breach)
	}
	if a.Output == "json" {
		_ = writeJSON(a.Errs, map[string]errorDoc{"error": doc})
		return
	}
	if doc.Kind == ErrUsage.Error() {
		a.Note("demarc: %s", doc.Text)
		return
	}
	a.Note("demarc: %s: %s", doc.Kind, doc.Text)
}

// sentence is what a person reads. A cause is shown too if there is one: it is of the person's own machine.
func sentence(err error) string {
	var f *fault.Error
	if errors.Is(err, ErrUsage) || !errors.As(err, &f) {
		return err.Error()
	}
	if fault.Of(err) == fault.Internal {
		return err.Error()
	}
	text := fault.Text(err)
	root := err
	for next := err; next != nil; next = errors.Unwrap(next) {
		root = next
	}
	if is[*fault.Error](root) || is[fault.Kind](root) || is[audit.Breach](root) { // their words are in the text
		return text
	}
	if cause := root.Error(); !strings.Contains(text, cause) {
		text += " (" + cause + ")"
	}
	return text
}

func is[E error](err error) bool {
	_, ok := errors.AsType[E](err)
	return ok
}

// OrDash returns s, or "-" if it is empty.
func OrDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

// ForDevelopment marks a trust domain that takes development identities.
func ForDevelopment(is bool) string {
	if is {
		return " (for development)"
	}
	return ""
}

// Minute spells a time in UTC, to the minute; "-" for none.
func Minute(unix int64) string {
	if unix == 0 {
		return "-"
	}
	return time.Unix(unix, 0).UTC().Format("2006-01-02 15:04")
}

// Principal is a principal without its trust domain.
func Principal(principal string) string {
	if _, role, name, ok := fleet.Principal(principal).Split(); ok {
		return string(role) + "/" + name
	}
	return OrDash(principal)
}
