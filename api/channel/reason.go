// SPDX-License-Identifier: Apache-2.0

package channel

import (
	"strings"

	boundaryv1 "github.com/demarc-dev/demarc/api/boundary/v1"
	"github.com/demarc-dev/demarc/fleet"
)

const (
	kindPrefix = "REASON_KIND_"
	runsPrefix = "RUNS_"
)

// ReasonToWire returns the message of a reason, nil for none. A kind that the schema does not have is OTHER, and what can't be a name
// of a manifest is left out: nothing else than those leaves by a reason.
func ReasonToWire(r fleet.Reason) *boundaryv1.Reason {
	if r = r.Clipped(); r.Kind == "" {
		return nil
	}
	kind, ok := boundaryv1.ReasonKind_value[kindPrefix+strings.ToUpper(string(r.Kind))]
	if !ok {
		kind = int32(boundaryv1.ReasonKind_REASON_KIND_OTHER)
	}
	return &boundaryv1.Reason{Kind: boundaryv1.ReasonKind(kind), Service: r.Service, Secret: r.Secret, Number: r.Number,
		Runs: boundaryv1.Runs(boundaryv1.Runs_value[runsPrefix+strings.ToUpper(string(r.Runs))])}
}

// ReasonFromWire returns what a message says, as far as this build knows its words: what another party sent is clipped to them.
func ReasonFromWire(w *boundaryv1.Reason) fleet.Reason {
	if w == nil || w.GetKind() == boundaryv1.ReasonKind_REASON_KIND_UNSPECIFIED {
		return fleet.Reason{}
	}
	r := fleet.Reason{Kind: fleet.OtherReason, Service: w.GetService(), Secret: w.GetSecret(), Number: w.GetNumber()}
	if name, ok := boundaryv1.ReasonKind_name[int32(w.GetKind())]; ok {
		r.Kind = fleet.ReasonKind(strings.ToLower(strings.TrimPrefix(name, kindPrefix)))
	}
	if name, ok := boundaryv1.Runs_name[int32(w.GetRuns())]; ok {
		r.Runs = fleet.Runs(strings.ToLower(strings.TrimPrefix(name, runsPrefix)))
	}
	return r.Clipped()
}
