// SPDX-License-Identifier: Apache-2.0

package controlplane_test

import (
	"encoding/json"
	"strings"
	"testing"

	boundaryv1 "github.com/demarc-dev/demarc/api/boundary/v1"
	"github.com/demarc-dev/demarc/daemon/controlplane"
	"github.com/demarc-dev/demarc/fleet"
)

// TestAReasonIsClippedToItsWords (FAULTS.md I7): whatever an appliance sends as a reason, the vendor's book gets a kind of the closed
// set and names that can be those of a manifest; a new kind, of a newer appliance, holds up none of its reports.
func TestAReasonIsClippedToItsWords(t *testing.T) {
	const path = "/srv/kanarie"
	odd := &boundaryv1.Reason{Kind: 4711, Service: path, Secret: strings.Repeat("kanarie", 1<<16), Runs: 99}
	for name, r := range map[string]*boundaryv1.Report{
		"deploy":    {Body: &boundaryv1.Report_Deploy{Deploy: &boundaryv1.DeployReport{Reason: odd}}},
		"operation": {Body: &boundaryv1.Report_Operation{Operation: &boundaryv1.OperationReport{Reason: odd}}},
		"status": {Body: &boundaryv1.Report_Status{Status: &boundaryv1.StatusReport{Services: []*boundaryv1.ServiceHealth{{Name: "web", Reason: odd}},
			Offer: &boundaryv1.OfferWaits{Release: "sha256:x", Reason: odd}}}},
	} {
		c, err := controlplane.ReportOf("eu-1", r)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		b, err := json.Marshal(c)
		if err != nil || strings.Contains(string(b), "kanarie") || !strings.Contains(string(b), `"kind":"other"`) {
			t.Errorf("%s: %v: %.300s", name, err, b)
		}
	}
	good := &boundaryv1.Reason{Kind: boundaryv1.ReasonKind_REASON_KIND_EXITED, Service: "web", Number: 3, Runs: boundaryv1.Runs_RUNS_PREVIOUS}
	c, err := controlplane.ReportOf("eu-1", &boundaryv1.Report{Body: &boundaryv1.Report_Deploy{Deploy: &boundaryv1.DeployReport{Reason: good}}})
	if want := (fleet.Reason{Kind: fleet.Exited, Service: "web", Number: 3, Runs: fleet.RunsPrevious}); err != nil || c.Deploy.Why != want {
		t.Errorf("%+v, %v", c.Deploy, err)
	}
}
