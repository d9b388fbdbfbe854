// SPDX-License-Identifier: Apache-2.0

package fleet

import (
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"github.com/demarc-dev/demarc/fault"
)

// Reason says why something at the customer's is as it is, as far as the vendor may know it: a kind of a closed set, names that the
// vendor's own manifest has, and a number. There is no field for a text: each side makes its own sentence. Reasons are compared with ==.
type Reason struct {
	Kind    ReasonKind `json:"kind"`
	Service string     `json:"service,omitempty"` // as the manifest names it
	Secret  string     `json:"secret,omitempty"`  // likewise: the first of those that it is about
	Number  int32      `json:"number,omitempty"`  // what it is, the kind says
	Runs    Runs       `json:"runs,omitempty"`    // of a deploy that failed: what runs now
}

// ReasonKind is the kind of a [Reason]. Its spelling is on disk, and that of ReasonKind in boundary.proto: never edited, never reused.
type ReasonKind string

// Runs is what runs after a deploy failed.
type Runs string

// The closed set of what runs.
const (
	RunsPrevious Runs = "previous" // the last release that was healthy
	RunsNothing  Runs = "nothing"  // there was none before
	RunsUnknown  Runs = "unknown"  // going back failed too
)

// The closed set of kinds.
const (
	// Of a release, and of its services.
	SecretMissing    ReasonKind = "secret_missing"      // Secret names the first, Number is how many
	SecretUnknown    ReasonKind = "secret_unknown"      // the store does not say whether it exists
	ArtifactMissing  ReasonKind = "artifact_missing"    // it is not here yet
	ArtifactDamaged  ReasonKind = "artifact_damaged"    // it has another digest, or can't be unpacked
	ProgramMissing   ReasonKind = "program_missing"     // the artifact has no such program, or it may not be executed
	NotStarted       ReasonKind = "not_started"         // the host refuses to execute its program
	Starting         ReasonKind = "starting"            //
	Exited           ReasonKind = "exited"              // Number is its exit status
	Signalled        ReasonKind = "signalled"           // it was ended by a signal: Number
	HealthFails      ReasonKind = "health_fails"        // Number is the status code of an HTTP check, 0 where there was no answer
	NotHealthyInTime ReasonKind = "not_healthy_in_time" // Number is the seconds that it had
	Unhealthy        ReasonKind = "unhealthy"           //
	NoPortFree       ReasonKind = "no_port_free"        // on loopback
	LogNotWritten    ReasonKind = "log_not_written"     // it runs
	LimitsIgnored    ReasonKind = "limits_ignored"      // it runs, and its limits are not enforced
	NotApproved      ReasonKind = "not_approved"        // the customer has not approved the release
	NotGranted       ReasonKind = "not_granted"         // no grant allows it now
	ApprovalEnded    ReasonKind = "approval_ended"      // before it began
	ConsentEnded     ReasonKind = "consent_ended"       // while it was under way
	PlanChanged      ReasonKind = "plan_changed"        // the release compiles to another plan than the one that was approved

	// Of an operation.
	AskerUnknown        ReasonKind = "asker_unknown"         // the request is not signed by an operator whom the customer names
	RequestEnded        ReasonKind = "request_ended"         // its time ran out
	WrongTime           ReasonKind = "wrong_time"            // a document is dated ahead of the clock, or ends too far ahead
	OtherRelease        ReasonKind = "other_release"         // the release that it is for does not run
	TemplateUnknown     ReasonKind = "template_unknown"      // the release has no such template, or another text of it
	TooManyOpen         ReasonKind = "too_many_open"         // operations wait, or outputs, or reports
	NotAnswered         ReasonKind = "not_answered"          // the customer did not answer in time
	Rejected            ReasonKind = "rejected"              // by the customer; what they typed is in the approval
	Withheld            ReasonKind = "withheld"              // by the customer; what they typed is in the release
	CancelledByCustomer ReasonKind = "cancelled_by_customer" //
	CancelledByVendor   ReasonKind = "cancelled_by_vendor"   //
	ConsentRevoked      ReasonKind = "consent_revoked"       //
	TimedOut            ReasonKind = "timed_out"             // it was killed
	WasKilled           ReasonKind = "killed"                //
	Restarted           ReasonKind = "restarted"             // the appliance was started anew while it ran
	OutputNotKept       ReasonKind = "output_not_kept"       // it could not be encrypted to the customer

	// Of anything.
	DiskFull    ReasonKind = "disk_full"
	DiskFails   ReasonKind = "disk_fails"
	IsInvalid   ReasonKind = "invalid"
	IsDenied    ReasonKind = "denied"
	IsNotFound  ReasonKind = "not_found"
	IsConflict  ReasonKind = "conflict"
	IsExpired   ReasonKind = "expired"
	IsBusy      ReasonKind = "busy"
	IsUnsure    ReasonKind = "unsure"
	IsDown      ReasonKind = "unavailable"
	IsInternal  ReasonKind = "internal"
	OtherReason ReasonKind = "other"
)

// says is what the vendor is told of each kind. %s is what it is about, %d the number.
var says = []struct {
	kind ReasonKind
	text string
}{
	{SecretMissing, "%s is missing at the customer's: demarc local status, there, shows the command that creates it"},
	{SecretUnknown, "the customer's store of secrets does not say whether %s exists"},
	{ArtifactMissing, "an artifact of the release is not at the customer's yet"},
	{ArtifactDamaged, "an artifact of the release is not what its digest says, or can't be unpacked"},
	{ProgramMissing, "%s: its artifact has no such program, or one that may not be executed"},
	{NotStarted, "%s: the customer's host refuses to execute its program"},
	{Starting, "%s is starting"},
	{Exited, "%s ended with exit status %d"},
	{Signalled, "%s was ended by signal %d"},
	{HealthFails, "the health check of %s fails"},
	{NotHealthyInTime, "%s was not healthy within %d s"},
	{Unhealthy, "%s is not healthy"},
	{NoPortFree, "no loopback port is free on the customer's host"},
	{LogNotWritten, "%s runs, and its log can't be written"},
	{LimitsIgnored, "%s runs, and its limits are not enforced by the appliance's build"},
	{NotApproved, "the customer has not approved it yet"},
	{NotGranted, "the customer's grants do not allow it now"},
	{ApprovalEnded, "the customer's approval ended before it began"},
	{ConsentEnded, "the customer's consent ended while it was under way"},
	{PlanChanged, "the release compiles to another plan than the one that was approved: the customer must review it again"},
	{AskerUnknown, "the request is not signed by an operator whom the customer's file names"},
	{RequestEnded, "the time of the request ran out"},
	{WrongTime, "a document is dated ahead of the appliance's clock, or ends later than anything may: look at the clocks of both sides"},
	{OtherRelease, "the release that the request names does not run there"},
	{TemplateUnknown, "the release that runs there has no such template, or another text of it"},
	{TooManyOpen, "too much waits for the customer already: ask again when some of it is over"},
	{NotAnswered, "the customer did not answer in time"},
	{Rejected, "the customer rejected it"},
	{Withheld, "the customer withheld the output"},
	{CancelledByCustomer, "the customer cancelled it"},
	{CancelledByVendor, "the vendor cancelled it"},
	{ConsentRevoked, "the customer revoked the consent"},
	{TimedOut, "its time was up: it was killed"},
	{WasKilled, "it was killed"},
	{Restarted, "the appliance was started anew while it ran"},
	{OutputNotKept, "its output could not be encrypted to the customer"},
	{DiskFull, "a disk at the customer's is full"},
	{DiskFails, "a disk at the customer's does not take it"},
	{IsInvalid, "it is not as it must be: the customer's log says what"},
	{IsDenied, "it is refused at the customer's: the customer's log says why"},
	{IsNotFound, "something that it needs is not there: the customer's log says what"},
	{IsConflict, "it does not fit what the appliance has: the customer's log says why"},
	{IsExpired, "its time is over"},
	{IsBusy, "the appliance has too much to do: it is tried again"},
	{IsUnsure, "whether it happened is not known"},
	{IsDown, "something that it needs does not answer at the customer's: it is tried again"},
	{IsInternal, "a defect of the appliance: the customer's log has the cause"},
	{OtherReason, "for a reason that this build does not know: the customer's log says which"},
}

// ReasonKinds lists the closed set.
func ReasonKinds() []ReasonKind {
	var out []ReasonKind
	for _, s := range says {
		out = append(out, s.kind)
	}
	return out
}

// Known reports whether k is in the closed set.
func (k ReasonKind) Known() bool { return slices.Contains(ReasonKinds(), k) }

var spelling = regexp.MustCompile(`^[a-z_]{1,40}$`)

// Check refuses what is not spelled as a kind. One that this build does not know passes: a document may be older or newer than it.
func (k ReasonKind) Check() error {
	if k == "" || spelling.MatchString(string(k)) {
		return nil
	}
	return fault.New("fleet.ReasonKind", fault.Invalid, "%q is not the kind of a reason", fault.Clip(string(k)))
}

// Clipped returns the reason with nothing but words of the closed sets and names that can be those of a manifest.
func (r Reason) Clipped() Reason {
	if r.Kind == "" {
		return Reason{}
	}
	if !r.Kind.Known() {
		r.Kind = OtherReason
	}
	if !name.MatchString(r.Service) {
		r.Service = ""
	}
	if !name.MatchString(r.Secret) {
		r.Secret = ""
	}
	if !slices.Contains([]Runs{RunsPrevious, RunsNothing, RunsUnknown}, r.Runs) {
		r.Runs = ""
	}
	return r
}

// Sentence is what the vendor is told, "" for none. It is made of the reason alone.
func (r Reason) Sentence() string {
	r = r.Clipped()
	if r.Kind == "" {
		return ""
	}
	text := says[slices.Index(ReasonKinds(), r.Kind)].text
	text = strings.ReplaceAll(text, "%s", r.about())
	text = strings.ReplaceAll(text, "%d", strconv.Itoa(int(r.Number)))
	if r.Kind == HealthFails && r.Number > 0 {
		text += fmt.Sprintf(": the answer is %d", r.Number)
	}
	switch r.Runs {
	case RunsPrevious:
		text += "; the last release that was healthy runs on"
	case RunsNothing:
		text += "; nothing runs, for there was no release before"
	case RunsUnknown:
		text += "; and going back to the last release that was healthy failed too"
	}
	return text
}

// about names what the reason is about.
func (r Reason) about() string {
	switch {
	case r.Kind == SecretMissing && r.Secret != "" && r.Number > 1:
		return fmt.Sprintf("secret %s (and %d more)", r.Secret, r.Number-1)
	case r.Secret != "":
		return "secret " + r.Secret
	case r.Kind == SecretMissing || r.Kind == SecretUnknown:
		return "a secret"
	case r.Service != "":
		return "service " + r.Service
	}
	return "a service"
}

// reasoned is an error with a reason.
type reasoned struct {
	reason Reason
	error
}

// Unwrap gives the error.
func (e reasoned) Unwrap() error { return e.error }

// With gives err a reason, which stands before those of its causes; nil for nil.
func (r Reason) With(err error) error {
	if err == nil {
		return nil
	}
	return reasoned{r, err}
}

// ReasonOf is the reason of an error: the outermost that was given, else what the error itself says of the disk, else its kind.
func ReasonOf(err error) Reason {
	var e reasoned
	switch {
	case err == nil:
		return Reason{}
	case errors.As(err, &e):
		return e.reason
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		return Reason{Kind: DiskFull}
	case errors.Is(err, syscall.EROFS), errors.Is(err, syscall.EIO), errors.Is(err, syscall.EFBIG):
		return Reason{Kind: DiskFails}
	}
	return Reason{Kind: ReasonKind(fault.Of(err))}.Clipped()
}
