// SPDX-License-Identifier: Apache-2.0

package main

import (
	"strings"

	controlv1 "github.com/demarc-dev/demarc/api/control/v1"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/operation"
	"github.com/demarc-dev/demarc/seal"
)

// sentenceOf is the vendor's own sentence for a reason that an appliance reported, "" for none.
func sentenceOf(r *controlv1.Reason) string {
	return fleet.Reason{Kind: fleet.ReasonKind(r.GetKind()), Service: r.GetService(), Secret: r.GetSecret(), Number: r.GetNumber(), Runs: fleet.Runs(r.GetRuns())}.Sentence()
}

// became says why an operation is as it is, with what the customer typed for the vendor. Nobody has verified the documents here:
// demarc operation output does.
func became(o *controlv1.Operation) string {
	said := sentenceOf(o.GetWhy())
	typed := ""
	switch o.GetState() {
	case string(operation.Rejected):
		if a, err := seal.Peek[operation.Approval](statement(o.GetStatements(), operation.TypeApproval)); err == nil {
			typed = a.Reason
		}
	case string(operation.Released), string(operation.Withheld):
		if r, err := seal.Peek[operation.Release](statement(o.GetStatements(), operation.TypeRelease)); err == nil {
			typed = r.Reason
		}
	}
	switch {
	case typed == "":
		return said
	case said == "":
		return typed
	}
	return said + ": " + typed
}

// standing says, on one line of a list, what is to be looked at.
func standing(x *controlv1.Appliance) string {
	var all []string
	if s := sentenceOf(x.GetWhy()); s != "" {
		all = append(all, s)
	}
	if o := x.GetOffer(); o != nil {
		all = append(all, "release "+fleet.Digest(o.GetRelease()).Short()+" waits: "+sentenceOf(o.GetWhy()))
	}
	return strings.Join(all, "; ")
}
