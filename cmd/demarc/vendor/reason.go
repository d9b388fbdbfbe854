// SPDX-License-Identifier: Apache-2.0

package vendor

import (
	"strings"

	controlv1 "github.com/demarc-dev/demarc/api/control/v1"
	"github.com/demarc-dev/demarc/cmd/demarc/evidence"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/operation"
	"github.com/demarc-dev/demarc/seal"
)

// sentenceOf is the vendor's own sentence for a reason that an appliance reported, "" for none.
func sentenceOf(r *controlv1.Reason) string {
	reason := fleet.Reason{Kind: fleet.ReasonKind(r.GetKind()), Service: r.GetService(), Secret: r.GetSecret(), Number: r.GetNumber(),
		Runs: fleet.Runs(r.GetRuns())}
	return reason.Sentence()
}

// outcome says why an operation is in its state, with what the customer typed for the vendor. The documents are not verified here:
// demarc operation output verifies them.
func outcome(o *controlv1.Operation) string {
	reason := sentenceOf(o.GetWhy())
	typed := ""
	switch o.GetState() {
	case string(operation.Rejected):
		if a, err := seal.Peek[operation.Approval](evidence.Statement(o.GetStatements(), operation.TypeApproval)); err == nil {
			typed = a.Reason
		}
	case string(operation.Released), string(operation.Withheld):
		if r, err := seal.Peek[operation.Release](evidence.Statement(o.GetStatements(), operation.TypeRelease)); err == nil {
			typed = r.Reason
		}
	}
	switch {
	case typed == "":
		return reason
	case reason == "":
		return typed
	}
	return reason + ": " + typed
}

// attention says, on one line of a list, what needs attention.
func attention(x *controlv1.Appliance) string {
	var all []string
	if s := sentenceOf(x.GetWhy()); s != "" {
		all = append(all, s)
	}
	if o := x.GetOffer(); o != nil {
		all = append(all, "release "+fleet.Digest(o.GetRelease()).Short()+" waits: "+sentenceOf(o.GetWhy()))
	}
	return strings.Join(all, "; ")
}
