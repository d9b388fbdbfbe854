// SPDX-License-Identifier: Apache-2.0

// Package fault names the kinds of failure, the same in code, on the wire and in the audit log.
//
// A fault is a kind, the place that met it, one sentence that anyone may read, and a cause.
// The kind and the sentence survive the wire; the cause does not leave the process.
package fault

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"unicode/utf8"
)

// Kind is a kind of failure. Its spelling is part of the wire and disk formats: never edited, never reused.
// A Kind is itself an error, so that errors.Is(err, fault.NotFound) asks the question that callers have.
type Kind string

// The closed set of kinds.
const (
	Invalid     Kind = "invalid"     // the input is malformed; the same call will never succeed
	Denied      Kind = "denied"      // the caller may not do this
	NotFound    Kind = "not_found"   // no such thing
	Conflict    Kind = "conflict"    // it exists already, or the same request id came with another body
	Expired     Kind = "expired"     // it was valid once, and is no more (or not yet)
	NotLeader   Kind = "not_leader"  // another node must be asked
	Unsure      Kind = "unsure"      // it may have happened: retry with the same request id
	Busy        Kind = "busy"        // too much at once: retry later
	Unavailable Kind = "unavailable" // a part that is needed is down: retry later
	Internal    Kind = "internal"    // a defect
)

// Kinds lists every kind, in the order of their declaration.
func Kinds() []Kind {
	return []Kind{Invalid, Denied, NotFound, Conflict, Expired, NotLeader, Unsure, Busy, Unavailable, Internal}
}

// Error makes a Kind usable as the target of errors.Is.
func (k Kind) Error() string { return string(k) }

// Known reports whether k is in the closed set.
func (k Kind) Known() bool {
	for _, x := range Kinds() {
		if x == k {
			return true
		}
	}
	return false
}

// Error is a failure: a kind, a place (Op, for instance "raft.Propose"), a sentence for any reader, and a cause.
type Error struct {
	Op   string
	Kind Kind
	Text string // for any reader; carries no secret and no path of the host
	Err  error  // for the operator of this process only
}

// New returns a fault with a written sentence. The sentence is formatted like fmt.Sprintf and may cross the wire.
func New(op string, k Kind, format string, args ...any) error {
	return &Error{Op: op, Kind: k, Text: fmt.Sprintf(format, args...)}
}

// At wraps err with the place that met it. With k == "" the kind of err is kept. At(op, k, nil) is nil.
func At(op string, k Kind, err error) error {
	if err == nil {
		return nil
	}
	if k == "" {
		k = Of(err)
	}
	return &Error{Op: op, Kind: k, Err: err}
}

// Because is New with a cause that stays in the process.
func Because(err error, op string, k Kind, format string, args ...any) error {
	return &Error{Op: op, Kind: k, Text: fmt.Sprintf(format, args...), Err: err}
}

// Error renders the fault for the operator of this process.
func (e *Error) Error() string {
	s := e.Op + ": "
	switch {
	case e.Text != "" && e.Err != nil:
		return s + e.Text + ": " + e.Err.Error()
	case e.Text != "":
		return s + e.Text
	case e.Err != nil:
		return s + e.Err.Error()
	}
	return s + string(e.Kind)
}

// Unwrap gives the cause.
func (e *Error) Unwrap() error { return e.Err }

// Is matches a Kind: the outermost kind of a chain is the kind of the chain.
func (e *Error) Is(target error) bool {
	k, ok := target.(Kind)
	return ok && e.Kind == k
}

// Of gives the kind of err: the outermost that is written, Internal where there is none, "" for nil.
// An ended context counts as Unavailable: the work may be tried again.
func Of(err error) Kind {
	if err == nil {
		return ""
	}
	var e *Error
	if errors.As(err, &e) {
		return e.Kind
	}
	var k Kind
	if errors.As(err, &k) {
		return k
	}
	if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return Unavailable
	}
	return Internal
}

// Text gives the sentence that may be told to a remote caller: the first that is written in the chain,
// else a fixed one for the kind. It never contains a cause, and is always UTF-8.
func Text(err error) string {
	for e := err; e != nil; e = errors.Unwrap(e) {
		if f, ok := e.(*Error); ok && f.Text != "" {
			return strings.ToValidUTF8(f.Text, "\uFFFD")
		}
	}
	switch k := Of(err); k {
	case "":
		return ""
	case Internal:
		return "an internal error; the log of the server has its cause"
	default:
		return "the call failed: " + string(k)
	}
}

// maxQuote is how many bytes of a stranger's text a sentence quotes.
const maxQuote = 64

// Clip cuts a text for a sentence: see [ClipTo]. At most 64 bytes of it are quoted.
func Clip(s string) string { return ClipTo(s, maxQuote) }

// ClipTo returns s if it has at most n bytes, else its first letters of at most n bytes and "...". It never cuts inside a
// letter, and what is not UTF-8 is replaced, so that the result can be encoded wherever a text can.
func ClipTo(s string, n int) string {
	n = max(n, 0)
	if more := n + utf8.UTFMax; len(s) > more {
		s = s[:more]
	}
	s = strings.ToValidUTF8(s, "\uFFFD")
	if len(s) <= n {
		return s
	}
	for n > 0 && !utf8.RuneStart(s[n]) {
		n--
	}
	return s[:n] + "..."
}
