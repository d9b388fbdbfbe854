// SPDX-License-Identifier: Apache-2.0

package grant

import (
	"regexp"
	"slices"
	"strings"

	cedar "github.com/cedar-policy/cedar-go"
	"github.com/cedar-policy/cedar-go/x/exp/ast"
	"github.com/cedar-policy/cedar-go/x/exp/schema"
	"github.com/cedar-policy/cedar-go/x/exp/schema/validate"

	"github.com/demarc-dev/demarc/fault"
)

// vocabulary is all that a policy can speak of, as a Cedar schema. Input.request spells an act in the same words.
const vocabulary = `
entity Vendor;
entity Appliance;
entity Service in [Appliance];
entity Operation in [Service, Appliance];
type Act = { now: Long, operation: String, service: String, effects: Set<String> };
action "operate";
action "install", "observe", "deploy" appliesTo {
	principal: Vendor, resource: [Appliance, Service, Operation], context: Act
};
action "operate.read", "operate.write", "operate.admin" in ["operate"] appliesTo {
	principal: Vendor, resource: [Appliance, Service, Operation], context: Act
};`

// Shape of a text that is read at all. A path a.b.c costs the square of its length, brackets cost stack.
const (
	maxDepth = 32
	maxPath  = 8
	maxSigns = 8 // of ! and - before one value
)

// checkCedar tells whether text is forbid policies in our vocabulary. The same text gives the same words, on every run:
// they become part of the book's answers.
func checkCedar(text string) error {
	const op = "grant.checkCedar"
	if len(text) > MaxCedar {
		return fault.New(op, fault.Invalid, "the policies have %d bytes, the limit is %d", len(text), MaxCedar)
	}
	if line, column, what := shape(text); what != "" {
		return fault.New(op, fault.Invalid, "line %d, column %d: %s", line, column, what)
	}
	list, err := cedar.NewPolicyListFromBytes("", []byte(text))
	if err != nil {
		return fault.Because(err, op, fault.Invalid, "the policies are not Cedar: %.300s", place(err.Error()))
	}
	if len(list) == 0 || len(list) > maxRules {
		return fault.New(op, fault.Invalid, "line 1, column 1: write 1 to %d policies", maxRules)
	}
	var s schema.Schema
	if err := s.UnmarshalCedar([]byte(vocabulary)); err != nil {
		return fault.At(op, fault.Internal, err)
	}
	words, err := s.Resolve()
	if err != nil {
		return fault.At(op, fault.Internal, err)
	}
	v := validate.New(words)
	for _, p := range list {
		at := p.Position()
		if p.Effect() != cedar.Forbid {
			return fault.New(op, fault.Invalid, "line %d, column %d: a deny holds forbid policies only; what is to be allowed is a grant", at.Line,
				at.Column)
		}
		if err := v.Policy("", (*ast.Policy)(p.AST())); err != nil {
			return fault.Because(err, op, fault.Invalid, "line %d, column %d: the policy would not do what it says: %.300s", at.Line, at.Column,
				first(err))
		}
	}
	return nil
}

// first gives one line of an error whose lines come in any order: the first in alphabetical order, and the one that
// only says what follows from the others where there is no other. What is said of each phase is said of the first.
func first(err error) string {
	lines := strings.Split(err.Error(), "\n")
	slices.Sort(lines)
	if i := slices.IndexFunc(lines, func(l string) bool { return !strings.HasPrefix(l, "unable to find an applicable action") }); i > 0 {
		return lines[i]
	}
	return lines[0]
}

// place turns the parser's "<input>:3:7" into words.
func place(text string) string {
	text = strings.TrimPrefix(text, "parser error: ")
	return regexp.MustCompile(`<input>:(\d+):(\d+)`).ReplaceAllString(text, "line $1, column $2")
}

// shape measures a text without parsing it, and says where it goes too deep or too far; what is "" where it is fine.
// It must not see a string or a comment where the parser sees none: block comments, which Cedar does not have but the
// parser takes, are refused.
func shape(text string) (line, column int, what string) {
	line = 1
	depth, path, signs := 0, 0, 0
	var in rune     // '"' inside a string, '/' inside a comment
	var before rune // the one before r
	for _, r := range text {
		column++
		if r == '\n' {
			line, column = line+1, 0
		}
		if in == 0 && (r == '!' || r == '-') {
			signs++
		} else if in == 0 && !strings.ContainsRune(" \t\r\n/", r) { // neither space nor a comment parts them
			signs = 0
		}
		switch {
		case in == '"' && before == '\\':
			before = 0 // the escape is over: of two backslashes the second escapes nothing
			continue
		case in == '"' && r == '"', in == '/' && r == '\n':
			in = 0
		case in != 0:
		case signs > maxSigns:
			return line, column, "too many signs before a value"
		case r == '"':
			in, path = r, 0
		case r == '/' && before == '/':
			in = r
		case r == '*' && before == '/':
			return line, column, "comments begin with //"
		case r == '(' || r == '[' || r == '{':
			path = 0
			if depth++; depth > maxDepth {
				return line, column, "brackets are nested too deep"
			}
		case r == ')' || r == ']' || r == '}':
			depth, path = depth-1, 0
		case r == '.':
			if path++; path > maxPath {
				return line, column, "the path has too many parts"
			}
		case strings.ContainsRune("=!<>&|+-*,;:@", r):
			path = 0
		}
		before = r
	}
	return 0, 0, ""
}
