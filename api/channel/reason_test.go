// SPDX-License-Identifier: Apache-2.0

package channel_test

import (
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"

	boundaryv1 "github.com/demarc-dev/demarc/api/boundary/v1"
	"github.com/demarc-dev/demarc/api/channel"
	"github.com/demarc-dev/demarc/fleet"
)

// TestReasonsAreAClosedSet (FAULTS.md I7): the kinds of the schema and those of both programs are the same, each comes through as it
// is, and whatever else is put into a reason does not.
func TestReasonsAreAClosedSet(t *testing.T) {
	if have, want := len(boundaryv1.ReasonKind_name), len(fleet.ReasonKinds())+1; have != want {
		t.Errorf("the schema has %d kinds, want %d", have, want)
	}
	for _, k := range fleet.ReasonKinds() {
		for _, runs := range []fleet.Runs{"", fleet.RunsPrevious, fleet.RunsNothing, fleet.RunsUnknown} {
			r := fleet.Reason{Kind: k, Service: "web", Secret: "db-password", Number: 3, Runs: runs}
			if got := channel.ReasonFromWire(channel.ReasonToWire(r)); got != r {
				t.Errorf("%+v came through as %+v", r, got)
			}
			if s := r.Sentence(); s == "" || strings.Contains(s, "%") {
				t.Errorf("%s: %q", k, s)
			}
		}
	}
	const canary = "CANARY/etc/x"
	out := channel.ReasonToWire(fleet.Reason{Kind: canary, Service: canary, Secret: canary, Runs: canary})
	if b, err := proto.Marshal(out); err != nil || strings.Contains(string(b), "CANARY") ||
		out.GetKind() != boundaryv1.ReasonKind_REASON_KIND_OTHER {
		t.Errorf("%v: %q", err, b)
	}
	in := channel.ReasonFromWire(&boundaryv1.Reason{Kind: 9999, Service: canary, Secret: strings.Repeat("x", 1<<20), Runs: 77})
	if in != (fleet.Reason{Kind: fleet.OtherReason}) {
		t.Errorf("the vendor takes %+v", in)
	}
	if channel.ReasonToWire(fleet.Reason{}) != nil || channel.ReasonFromWire(nil) != (fleet.Reason{}) ||
		channel.ReasonFromWire(&boundaryv1.Reason{Service: "web"}) != (fleet.Reason{}) {
		t.Error("no reason is something")
	}
}
