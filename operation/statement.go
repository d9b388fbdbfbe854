// SPDX-License-Identifier: Apache-2.0

package operation

import (
	"bytes"
	"encoding/json"
	"strings"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/seal"
)

// Predicate types of the documents of this package.
const (
	TypeRequest      = "https://demarc.dev/operation/request/v1"
	TypeApproval     = "https://demarc.dev/operation/approval/v1"
	TypeResult       = "https://demarc.dev/operation/result/v1"
	TypeRelease      = "https://demarc.dev/operation/release/v1"
	TypeCancel       = "https://demarc.dev/operation/cancel/v1"
	TypePlanApproval = "https://demarc.dev/operation/plan-approval/v1"
)

const (
	payloadType   = "application/vnd.in-toto+json"
	statementType = "https://in-toto.io/Statement/v1"
)

// statement is an in-toto Statement v1 (https://github.com/in-toto/attestation/blob/main/spec/v1/statement.md).
type statement struct {
	Type          string          `json:"_type"`
	Subject       []subject       `json:"subject"`
	PredicateType string          `json:"predicateType"`
	Predicate     json.RawMessage `json:"predicate"`
}

type subject struct {
	Name   string `json:"name"`
	Digest struct {
		SHA256 string `json:"sha256"`
	} `json:"digest"`
}

// about makes a subject; a digest that is not there makes none.
func about(name string, d fleet.Digest) []subject {
	if d == "" {
		return nil
	}
	s := subject{Name: name}
	s.Digest.SHA256 = strings.TrimPrefix(string(d), "sha256:")
	return []subject{s}
}

func join(s ...[]subject) []subject {
	var out []subject
	for _, one := range s {
		out = append(out, one...)
	}
	return out
}

// write spells a statement. plain is the predicate without methods.
func write(kind string, subjects []subject, plain any) ([]byte, error) {
	b, err := json.Marshal(plain)
	if err != nil {
		return nil, fault.At("operation.write", fault.Internal, err)
	}
	return json.Marshal(statement{statementType, subjects, kind, b})
}

// read takes a statement of one kind into plain. Its subjects are compared by whoever calls: seal refuses a payload that
// is not spelled as write spells it, and write computes the subjects.
func read(b []byte, kind string, plain any) error {
	const op = "operation.read"
	var s statement
	if err := seal.StrictJSON(b, &s); err != nil {
		return fault.At(op, fault.Invalid, err)
	}
	switch {
	case s.Type != statementType:
		return fault.New(op, fault.Invalid, "the document is not an in-toto statement of version 1")
	case s.PredicateType != kind:
		return fault.New(op, fault.Invalid, "the document is a %q, and a %q is wanted", clip(s.PredicateType), kind)
	}
	if err := seal.StrictJSON(s.Predicate, plain); err != nil {
		return fault.At(op, fault.Invalid, err)
	}
	return nil
}

// same refuses a statement whose bytes are not those that its predicate gives.
func same(got []byte, again func() ([]byte, error)) error {
	want, err := again()
	if err != nil {
		return err
	}
	var a, b bytes.Buffer
	if json.Compact(&a, got) != nil || json.Compact(&b, want) != nil || !bytes.Equal(a.Bytes(), b.Bytes()) {
		return fault.New("operation.read", fault.Invalid, "the statement's subjects, or its spelling, are not those of its predicate")
	}
	return nil
}

// kindOf reads nothing but the type of a statement and keeps its bytes.
type kindOf struct {
	raw  []byte
	kind string
}

func (kindOf) PayloadType() string { return payloadType }

func (k kindOf) MarshalJSON() ([]byte, error) { return k.raw, nil }

func (k *kindOf) UnmarshalJSON(b []byte) error {
	var s statement
	if err := seal.StrictJSON(b, &s); err != nil {
		return err
	}
	k.raw, k.kind = bytes.Clone(b), s.PredicateType
	return nil
}

// Kind tells the predicate type of a sealed statement, UNVERIFIED: it chooses what to open it as, and nothing else.
func Kind(sealed []byte) (string, error) {
	k, err := seal.Peek[kindOf](sealed)
	if err != nil {
		return "", fault.At("operation.Kind", "", err)
	}
	return k.kind, nil
}
