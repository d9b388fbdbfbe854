// SPDX-License-Identifier: Apache-2.0

package customer

import (
	"bytes"
	"strings"
	"testing"

	localv1 "github.com/demarc-dev/demarc/api/local/v1"
)

// TestStatusSaysHowTheClockCompares says by how much the host's clock is off, and what to do if that is too much.
func TestStatusSaysHowTheClockCompares(t *testing.T) {
	at := func(ms int64) *localv1.Clock { return &localv1.Clock{VendorAheadMs: ms, TrustedMs: 300_000} }
	for want, c := range map[string]*localv1.Clock{
		"not compared": nil,
		"agrees":       at(1500),
		"1m0s behind the vendor's: within bounds":              at(60_000),
		"1m0s ahead of the vendor's: within":                   at(-60_000),
		"10h0m0s ahead of the vendor's: set this host's clock": at(-36_000_000),
		"10h0m0s behind the vendor's: set this host's clock":   at(36_000_000),
	} {
		if got := clockSentence(c); !strings.Contains(got, want) {
			t.Errorf("%v: %q, want %q", c, got, want)
		}
	}
}

// TestTheStatusSaysWhatHelps (FAULTS.md G3, I7): the customer's page has the command that helps.
func TestTheStatusSaysWhatHelps(t *testing.T) {
	var b bytes.Buffer
	printWaiting(&b, &localv1.StatusResponse{Waits: &localv1.Waiting{Version: "1.1.0", Why: "it is offered", Do: "demarc review --release x"},
		Endings: []*localv1.Ending{{What: "grant of deploy", AtUnix: 1, Do: "demarc grant deploy"}}})
	for _, want := range []string{"WAITS", "1.1.0", "demarc review --release x", "grant of deploy", "1970-01-01T00:00:01Z",
		"demarc grant deploy"} {
		if !strings.Contains(b.String(), want) {
			t.Errorf("%q does not say %q", b.String(), want)
		}
	}
}
