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

// read takes a statement of one kind apart, and refuses one whose bytes are not those that its predicate gives: other
// subjects, another spelling of a field, a time that is not in UTC. P is the document D without methods.
func read[P any, D json.Marshaler](b []byte, kind string, doc func(P) D) (D, error) {
	const op = "operation.read"
	var none D
	s, err := outer(b)
	if err != nil {
		return none, err
	}
	if s.PredicateType != kind {
		return none, fault.New(op, fault.Invalid, "the document is a %q, and a %q is wanted", fault.Clip(s.PredicateType), kind)
	}
	var plain P
	if err := seal.StrictJSON(s.Predicate, &plain); err != nil {
		return none, fault.At(op, fault.Invalid, err)
	}
	d := doc(plain)
	want, err := d.MarshalJSON()
	if err != nil {
		return none, fault.At(op, fault.Invalid, err)
	}
	var got, again bytes.Buffer
	if json.Compact(&got, b) != nil || json.Compact(&again, want) != nil || !bytes.Equal(got.Bytes(), again.Bytes()) {
		return none, fault.New(op, fault.Invalid, "the statement's subjects, or its spelling, are not those of its predicate")
	}
	return d, nil
}

// outer reads what is around a predicate.
func outer(b []byte) (statement, error) {
	var s statement
	if err := seal.StrictJSON(b, &s); err != nil {
		return s, fault.At("operation.read", fault.Invalid, err)
	}
	if s.Type != statementType {
		return s, fault.New("operation.read", fault.Invalid, "the document is not an in-toto statement of version 1")
	}
	return s, nil
}

// kindOf reads nothing but the type of a statement and keeps its bytes.
type kindOf struct {
	raw  []byte
	kind string
}

func (kindOf) PayloadType() string { return payloadType }

func (k kindOf) MarshalJSON() ([]byte, error) { return k.raw, nil }

func (k *kindOf) UnmarshalJSON(b []byte) error {
	s, err := outer(b)
	if err != nil {
		return err
	}
	k.raw, k.kind = bytes.Clone(b), s.PredicateType
	return nil
}

// Kind tells the predicate type of a sealed statement, UNVERIFIED: it chooses what to open it as, and nothing else.
// It is one of the types of this package; any other is fault.Invalid.
func Kind(sealed []byte) (string, error) {
	const op = "operation.Kind"
	k, err := seal.Peek[kindOf](sealed)
	if err != nil {
		return "", fault.At(op, "", err)
	}
	switch k.kind {
	case TypeRequest, TypeApproval, TypeResult, TypeRelease, TypeCancel, TypePlanApproval:
		return k.kind, nil
	}
	return "", fault.New(op, fault.Invalid, "a statement of type %q is not known here: it may be from a newer version", fault.Clip(k.kind))
}
