// SPDX-License-Identifier: Apache-2.0

package vendor

import (
	"strings"
	"testing"

	controlv1 "github.com/demarc-dev/demarc/api/control/v1"
)

// TestTheVendorsLineSaysWhy (FAULTS.md G3, I7): the vendor's line is made of kind, names and number alone.
func TestTheVendorsLineSaysWhy(t *testing.T) {
	for _, x := range []struct {
		r    *controlv1.Reason
		want string
	}{
		{nil, ""},
		{&controlv1.Reason{Kind: "secret_missing", Secret: "store-token", Number: 3}, "secret store-token (and 2 more) is missing"},
		{&controlv1.Reason{Kind: "exited", Service: "web", Number: 3, Runs: "previous"},
			"service web ended with exit status 3; the last release that was healthy runs on"},
		{&controlv1.Reason{Kind: "signalled", Service: "web", Number: 9, Runs: "nothing"}, "service web was ended by signal 9; nothing runs"},
		{&controlv1.Reason{Kind: "health_fails", Service: "web", Number: 503}, "the health check of service web fails: the answer is 503"},
		{&controlv1.Reason{Kind: "of_a_later_build"}, "a reason that this build does not know"},
	} {
		if got := sentenceOf(x.r); !strings.Contains(got, x.want) || x.want == "" && got != "" {
			t.Errorf("%v: %q, want %q", x.r, got, x.want)
		}
	}
	a := &controlv1.Appliance{Why: &controlv1.Reason{Kind: "not_granted"},
		Offer: &controlv1.OfferWaits{Release: "sha256:0123456789abcdef", Why: &controlv1.Reason{Kind: "not_approved"}}}
	if got := attention(a); !strings.Contains(got, "grants do not allow it") ||
		!strings.Contains(got, "release 0123456789ab waits: the customer has not approved it yet") {
		t.Errorf("%q", got)
	}
}
