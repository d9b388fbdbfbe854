// SPDX-License-Identifier: Apache-2.0

package operation

import (
	"maps"
	"slices"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"filippo.io/age"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
)

// Decisions of the customer.
const (
	DecisionApprove  = "approve"
	DecisionReject   = "reject"
	DecisionRelease  = "release"
	DecisionWithhold = "withhold"
)

// Request asks for an operation. An operator of the vendor signs it.
type Request struct {
	ID             string            `json:"id"` // chosen by the operator, unique at the appliance
	Appliance      fleet.ApplianceID `json:"appliance"`
	Operator       fleet.Principal   `json:"operator"`
	Template       string            `json:"template"`
	TemplateDigest fleet.Digest      `json:"template_digest"`
	Release        fleet.Digest      `json:"release"` // that carries the template
	Vars           map[string]string `json:"vars,omitempty"`
	Reason         string            `json:"reason"`    // for the person who approves
	Recipient      string            `json:"recipient"` // age: whom a released output is encrypted to
	At             time.Time         `json:"at"`
	NotAfter       time.Time         `json:"not_after"`
	Nonce          string            `json:"nonce"`
}

// Approval says yes or no to one request. The customer signs it.
type Approval struct {
	ID        string            `json:"id"`
	Appliance fleet.ApplianceID `json:"appliance"`
	Request   fleet.Digest      `json:"request"`  // of the sealed request
	Decision  string            `json:"decision"` // approve or reject
	Argv      []string          `json:"argv,omitempty"`
	Reason    string            `json:"reason,omitempty"`
	At        time.Time         `json:"at"`
	NotAfter  time.Time         `json:"not_after,omitzero"` // within which it must begin; a rejection has no end
	Nonce     string            `json:"nonce"`
}

// Result says what ran and how it ended. The appliance signs it, and it crosses to the vendor at once: of the output it has
// nothing but commitments (see [Output]).
type Result struct {
	ID        string            `json:"id"`
	Appliance fleet.ApplianceID `json:"appliance"`
	Request   fleet.Digest      `json:"request"`
	Approval  fleet.Digest      `json:"approval"`
	Argv      []string          `json:"argv"`
	State     State             `json:"state"` // held, failed or cancelled
	Exit      int               `json:"exit"`
	Signal    string            `json:"signal,omitempty"`
	Stdout    fleet.Digest      `json:"stdout"`           // commitment
	Stderr    fleet.Digest      `json:"stderr"`           // commitment
	Reason    fleet.ReasonKind  `json:"reason,omitempty"` // why it failed or was cancelled: a word of a closed set, no text
	Started   time.Time         `json:"started"`
	Ended     time.Time         `json:"ended"`
}

// Release lets an output out, or keeps it in. The customer signs it.
type Release struct {
	ID        string            `json:"id"`
	Appliance fleet.ApplianceID `json:"appliance"`
	Result    fleet.Digest      `json:"result"`           // of the sealed result
	Decision  string            `json:"decision"`         // release or withhold
	Output    fleet.Digest      `json:"output,omitempty"` // of the output as it goes out, encrypted to the operator
	Reason    string            `json:"reason,omitempty"`
	At        time.Time         `json:"at"`
	Nonce     string            `json:"nonce"`
}

// Cancel calls an operation off. The customer signs it.
type Cancel struct {
	ID        string            `json:"id"`
	Appliance fleet.ApplianceID `json:"appliance"`
	Request   fleet.Digest      `json:"request"`
	Reason    string            `json:"reason,omitempty"`
	At        time.Time         `json:"at"`
	Nonce     string            `json:"nonce"`
}

// PlanApproval lets one compiled plan of one release be deployed. The customer signs it.
type PlanApproval struct {
	Appliance fleet.ApplianceID `json:"appliance"`
	Release   fleet.Digest      `json:"release"` // of the sealed release
	Plan      fleet.Digest      `json:"plan"`    // of the compiled plan
	Phases    []fleet.Phase     `json:"phases"`
	At        time.Time         `json:"at"`
	NotAfter  time.Time         `json:"not_after"`
	Nonce     string            `json:"nonce"`
}

// PayloadType names the format of the payload: in-toto.
func (Request) PayloadType() string { return payloadType }

// PayloadType names the format of the payload: in-toto.
func (Approval) PayloadType() string { return payloadType }

// PayloadType names the format of the payload: in-toto.
func (Result) PayloadType() string { return payloadType }

// PayloadType names the format of the payload: in-toto.
func (Release) PayloadType() string { return payloadType }

// PayloadType names the format of the payload: in-toto.
func (Cancel) PayloadType() string { return payloadType }

// PayloadType names the format of the payload: in-toto.
func (PlanApproval) PayloadType() string { return payloadType }

// The predicates without methods.
type (
	plainRequest      Request
	plainApproval     Approval
	plainResult       Result
	plainRelease      Release
	plainCancel       Cancel
	plainPlanApproval PlanApproval
)

// MarshalJSON writes the in-toto statement. Times are spelled in UTC, in each document.
func (r Request) MarshalJSON() ([]byte, error) {
	r.At, r.NotAfter = r.At.UTC(), r.NotAfter.UTC()
	return write(TypeRequest, join(about("template", r.TemplateDigest), about("release", r.Release)), plainRequest(r))
}

// UnmarshalJSON reads the in-toto statement.
func (r *Request) UnmarshalJSON(b []byte) error {
	d, err := read(b, TypeRequest, func(p plainRequest) Request { return Request(p) })
	if err == nil {
		*r = d
	}
	return err
}

// MarshalJSON writes the in-toto statement.
func (a Approval) MarshalJSON() ([]byte, error) {
	a.At, a.NotAfter = a.At.UTC(), a.NotAfter.UTC()
	return write(TypeApproval, about("request", a.Request), plainApproval(a))
}

// UnmarshalJSON reads the in-toto statement.
func (a *Approval) UnmarshalJSON(b []byte) error {
	d, err := read(b, TypeApproval, func(p plainApproval) Approval { return Approval(p) })
	if err == nil {
		*a = d
	}
	return err
}

// MarshalJSON writes the in-toto statement.
func (r Result) MarshalJSON() ([]byte, error) {
	r.Started, r.Ended = r.Started.UTC(), r.Ended.UTC()
	return write(TypeResult, join(about("approval", r.Approval), about("stdout", r.Stdout), about("stderr", r.Stderr)), plainResult(r))
}

// UnmarshalJSON reads the in-toto statement.
func (r *Result) UnmarshalJSON(b []byte) error {
	d, err := read(b, TypeResult, func(p plainResult) Result { return Result(p) })
	if err == nil {
		*r = d
	}
	return err
}

// MarshalJSON writes the in-toto statement.
func (r Release) MarshalJSON() ([]byte, error) {
	r.At = r.At.UTC()
	return write(TypeRelease, join(about("result", r.Result), about("output", r.Output)), plainRelease(r))
}

// UnmarshalJSON reads the in-toto statement.
func (r *Release) UnmarshalJSON(b []byte) error {
	d, err := read(b, TypeRelease, func(p plainRelease) Release { return Release(p) })
	if err == nil {
		*r = d
	}
	return err
}

// MarshalJSON writes the in-toto statement.
func (c Cancel) MarshalJSON() ([]byte, error) {
	c.At = c.At.UTC()
	return write(TypeCancel, about("request", c.Request), plainCancel(c))
}

// UnmarshalJSON reads the in-toto statement.
func (c *Cancel) UnmarshalJSON(b []byte) error {
	d, err := read(b, TypeCancel, func(p plainCancel) Cancel { return Cancel(p) })
	if err == nil {
		*c = d
	}
	return err
}

// MarshalJSON writes the in-toto statement.
func (p PlanApproval) MarshalJSON() ([]byte, error) {
	p.At, p.NotAfter = p.At.UTC(), p.NotAfter.UTC()
	return write(TypePlanApproval, join(about("plan", p.Plan), about("release", p.Release)), plainPlanApproval(p))
}

// UnmarshalJSON reads the in-toto statement.
func (p *PlanApproval) UnmarshalJSON(b []byte) error {
	d, err := read(b, TypePlanApproval, func(p plainPlanApproval) PlanApproval { return PlanApproval(p) })
	if err == nil {
		*p = d
	}
	return err
}

// Limits of the documents.
const (
	maxReason = 1 << 10
	maxNonce  = 64
	minNonce  = 16
	maxSignal = 32
)

// check collects the first thing that is wrong with a document.
type check struct {
	doc string
	err error
}

func (c *check) that(ok bool, format string, args ...any) {
	if c.err == nil && !ok {
		c.err = fault.New("operation."+c.doc, fault.Invalid, format, args...)
	}
}

func (c *check) name(field, s string) {
	if c.err == nil {
		c.err = fleet.CheckName(field, s)
	}
}

func (c *check) digest(field string, d fleet.Digest) {
	if err := d.Check(); c.err == nil && err != nil {
		c.err = fault.Because(err, "operation."+c.doc, fault.Invalid, "%s: %s", field, fault.Text(err))
	}
}

func (c *check) nonce(s string) {
	ok := len(s) >= minNonce && len(s) <= maxNonce && strings.IndexFunc(s, func(r rune) bool {
		return !(r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || r == '-' || r == '_')
	}) < 0
	c.that(ok, "nonce: draw %d to %d characters of A-Z a-z 0-9 - _", minNonce, maxNonce)
}

func (c *check) reason(s string) {
	c.that(len(s) <= maxReason, "reason: at most %d bytes", maxReason)
	c.that(legible(s), "reason: %s", notLegible)
}

func (c *check) window(at, notAfter time.Time) {
	c.that(!at.IsZero() && notAfter.After(at), "not_after: must be later than at")
	c.that(notAfter.Sub(at) <= fleet.MaxConsent, "not_after: at most %d days after at", fleet.MaxConsent/(24*time.Hour))
}

// InForce reports why what lets somebody act until notAfter lets nobody act at now, nil if it does: it is over
// ([fault.Expired]), or it ends later than anything may, by the clock of the one who asks ([fault.Invalid]).
func InForce(what string, notAfter, now time.Time) error {
	const op = "operation.InForce"
	switch {
	case !now.Before(notAfter):
		return fault.New(op, fault.Expired, "the %s was good until %s", what, notAfter.UTC().Format(time.RFC3339))
	case notAfter.After(now.Add(fleet.MaxConsent + fleet.MaxSkew)):
		return fault.New(op, fault.Invalid, "the %s ends at %s, more than %d days from now: sign one that ends sooner", what,
			notAfter.UTC().Format(time.RFC3339), fleet.MaxConsent/(24*time.Hour))
	}
	return nil
}

// Dated reports whether a document is dated further ahead of now than clocks differ ([fault.Invalid]).
func Dated(what string, at, now time.Time) error {
	if !at.After(now.Add(fleet.MaxSkew)) {
		return nil
	}
	return fault.New("operation.Dated", fault.Invalid, "the %s is dated %s, and it is %s here: set the clock of the one who signed it, or "+
		"of this host, and sign it anew",
		what, at.UTC().Format(time.RFC3339), now.UTC().Format(time.RFC3339))
}

func (c *check) argv(argv []string) {
	size := 0
	for i, a := range argv {
		size += len(a)
		c.that(len(a) <= maxArg, "argv %d: at most %d bytes", i, maxArg)
		c.that(legible(a), "argv %d: %s", i, notLegible)
	}
	c.that(len(argv) <= maxArgs && size <= maxArgv, "argv: at most %d arguments and %d bytes", maxArgs, maxArgv)
}

const notLegible = "must be UTF-8 without control characters and invisible ones: a person reads it before it runs"

// legible reports whether a person sees s as it is: no escape sequence that redraws a terminal, no mark that turns the
// direction of the text, no letter that shows nothing, no space that is not the plain one, nothing that JSON could not carry.
// Line breaks and tabs are seen for what they are.
func legible(s string) bool {
	return utf8.ValidString(s) && strings.IndexFunc(s, func(r rune) bool { return r != '\n' && r != '\t' && !visible(r) }) < 0
}

// visible reports whether r leaves a mark of its own. What Unicode lets a program ignore (fillers, variation selectors, joiners,
// tags) is printable to [unicode.IsPrint], and so is the empty cell of Braille.
func visible(r rune) bool {
	return unicode.IsPrint(r) && r != '\u2800' &&
		!unicode.In(r, unicode.Other_Default_Ignorable_Code_Point, unicode.Variation_Selector, ignorable)
}

// ignorable is the rest of Default_Ignorable_Code_Point that is printable: the vowel signs that Khmer inherited, and the
// separators of Mongolian.
var ignorable = &unicode.RangeTable{R16: []unicode.Range16{{Lo: 0x17b4, Hi: 0x17b5, Stride: 1}, {Lo: 0x180b, Hi: 0x180f, Stride: 1}}}

// Check tells the first thing that is wrong with the request by itself.
func (r Request) Check() error {
	c := check{doc: "Request"}
	c.name("operation", r.ID)
	c.name("appliance", string(r.Appliance))
	c.name("template", r.Template)
	_, role, _, ok := r.Operator.Split()
	c.that(ok && role == fleet.Operator, "operator: %q is not the name of an operator", fault.Clip(string(r.Operator)))
	c.digest("template_digest", r.TemplateDigest)
	c.digest("release", r.Release)
	c.that(len(r.Vars) <= maxVars, "vars: at most %d", maxVars)
	for _, k := range slices.Sorted(maps.Keys(r.Vars)) {
		c.that(varName.MatchString(k), "vars %q: not the name of a variable", fault.Clip(k))
		c.that(len(r.Vars[k]) <= MaxValue, "vars %s: a value has at most %d bytes", k, MaxValue)
		c.that(legible(r.Vars[k]), "vars %s: %s", k, notLegible)
	}
	c.reason(r.Reason)
	_, err := age.ParseX25519Recipient(r.Recipient)
	c.that(err == nil && len(r.Recipient) <= 128, "recipient: give the operator's age recipient, age1... of 62 characters")
	c.window(r.At, r.NotAfter)
	c.nonce(r.Nonce)
	return c.err
}

// Check tells the first thing that is wrong with the approval by itself.
func (a Approval) Check() error {
	c := check{doc: "Approval"}
	c.name("operation", a.ID)
	c.name("appliance", string(a.Appliance))
	c.digest("request", a.Request)
	c.that(a.Decision == DecisionApprove || a.Decision == DecisionReject, "decision: %q is neither approve nor reject", fault.Clip(a.Decision))
	c.that(a.Decision == DecisionReject || len(a.Argv) > 0, "argv: an approval names the command that it is for")
	c.argv(a.Argv)
	c.reason(a.Reason)
	if a.Decision == DecisionReject { // what narrows has no end, and is not refused for one
		c.that(!a.At.IsZero(), "at: is missing")
	} else {
		c.window(a.At, a.NotAfter)
	}
	c.nonce(a.Nonce)
	return c.err
}

// Check tells the first thing that is wrong with the result by itself.
func (r Result) Check() error {
	c := check{doc: "Result"}
	c.name("operation", r.ID)
	c.name("appliance", string(r.Appliance))
	c.digest("request", r.Request)
	c.digest("approval", r.Approval)
	c.digest("stdout", r.Stdout)
	c.digest("stderr", r.Stderr)
	c.that(len(r.Argv) > 0, "argv: a result names the command that it is of")
	c.argv(r.Argv)
	c.that(slices.Contains([]State{Held, Failed, Cancelled}, r.State), "state: a result is held, failed or cancelled, not %q",
		fault.Clip(string(r.State)))
	c.that(len(r.Signal) <= maxSignal && legible(r.Signal), "signal: its name in at most %d bytes", maxSignal)
	c.that(r.Reason.Check() == nil, "reason: a word of boundary.proto")
	c.that(!r.Started.IsZero() && !r.Ended.Before(r.Started), "ended: must not be before started")
	return c.err
}

// Check tells the first thing that is wrong with the release by itself.
func (r Release) Check() error {
	c := check{doc: "Release"}
	c.name("operation", r.ID)
	c.name("appliance", string(r.Appliance))
	c.digest("result", r.Result)
	switch r.Decision {
	case DecisionRelease:
		c.digest("output", r.Output)
	case DecisionWithhold:
		c.that(r.Output == "", "output: nothing goes out where the decision is withhold")
	default:
		c.that(false, "decision: %q is neither release nor withhold", fault.Clip(r.Decision))
	}
	c.reason(r.Reason)
	c.that(!r.At.IsZero(), "at: is missing")
	c.nonce(r.Nonce)
	return c.err
}

// Check tells the first thing that is wrong with the cancellation by itself.
func (x Cancel) Check() error {
	c := check{doc: "Cancel"}
	c.name("operation", x.ID)
	c.name("appliance", string(x.Appliance))
	c.digest("request", x.Request)
	c.reason(x.Reason)
	c.that(!x.At.IsZero(), "at: is missing")
	c.nonce(x.Nonce)
	return c.err
}

// Check tells the first thing that is wrong with the approval by itself.
func (p PlanApproval) Check() error {
	c := check{doc: "PlanApproval"}
	c.name("appliance", string(p.Appliance))
	c.digest("release", p.Release)
	c.digest("plan", p.Plan)
	c.that(len(p.Phases) > 0 && len(p.Phases) <= len(fleet.Phases()), "phases: name the phases that it needs")
	for i, f := range p.Phases {
		c.that(!slices.Contains(p.Phases[:i], f), "phases: %q is named twice", fault.Clip(string(f)))
		c.that(f == fleet.Install || f == fleet.Deploy, "phases: a plan needs install and deploy only, not %q", fault.Clip(string(f)))
	}
	c.window(p.At, p.NotAfter)
	c.nonce(p.Nonce)
	return c.err
}
