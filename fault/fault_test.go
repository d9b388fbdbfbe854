// SPDX-License-Identifier: Apache-2.0

package fault_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/demarc-dev/demarc/fault"
)

func TestKindSurvivesWrapping(t *testing.T) {
	base := fault.New("grant.Decide", fault.Denied, "no grant for %q", "deploy")
	for name, tc := range map[string]struct {
		err  error
		kind fault.Kind
		text string
	}{
		"nil":     {nil, "", ""},
		"plain":   {errors.New("x"), fault.Internal, "an internal error; the log of the server has its cause"},
		"kind":    {fault.Expired, fault.Expired, "the call failed: expired"},
		"new":     {base, fault.Denied, `no grant for "deploy"`},
		"kept":    {fault.At("daemon.Serve", "", base), fault.Denied, `no grant for "deploy"`},
		"changed": {fault.At("daemon.Serve", fault.Unavailable, base), fault.Unavailable, `no grant for "deploy"`},
		"fmt":     {fmt.Errorf("more: %w", base), fault.Denied, `no grant for "deploy"`},
		"cause hidden": {fault.Because(errors.New("/secret/path"), "seal.Open", fault.Invalid, "bad signature"), fault.Invalid,
			"bad signature"},
		"cause unspoken": {fault.At("seal.Open", fault.Invalid, errors.New("/secret/path")), fault.Invalid, "the call failed: invalid"},
		"deadline":       {context.DeadlineExceeded, fault.Unavailable, "the call failed: unavailable"},
	} {
		t.Run(name, func(t *testing.T) {
			if got := fault.Of(tc.err); got != tc.kind {
				t.Errorf("Of = %q, want %q", got, tc.kind)
			}
			if got := fault.Text(tc.err); got != tc.text {
				t.Errorf("Text = %q, want %q", got, tc.text)
			}
			if fe := (*fault.Error)(nil); errors.As(tc.err, &fe) && !errors.Is(tc.err, tc.kind) {
				t.Errorf("errors.Is(%v, %q) = false", tc.err, tc.kind)
			}
		})
	}
}

func TestKindsAreClosed(t *testing.T) {
	for _, k := range fault.Kinds() {
		if !k.Known() {
			t.Errorf("%q is listed and not known", k)
		}
	}
	if fault.Kind("oops").Known() {
		t.Error("a made-up kind is known")
	}
}

// TestClip: FAULTS.md C8. A text is cut between letters, whatever its bytes are.
func TestClip(t *testing.T) {
	long := strings.Repeat("x", 63)
	for _, c := range []struct{ in, want string }{
		{"", ""}, {"abc", "abc"}, {long + "y", long + "y"}, {long + "yz", long + "y..."},
		{long + "\u00e9", long + "..."}, {long[:62] + "\u00e9", long[:62] + "\u00e9"}, {long[:61] + "\U0001F600", long[:61] + "..."},
		{"\xff", "\uFFFD"}, {long + "\xff\xff", long + "..."}, {long[:61] + "\xff", long[:61] + "\uFFFD"},
		{strings.Repeat("\x80", 1<<20), "\uFFFD"},
	} {
		if got := fault.Clip(c.in); got != c.want {
			t.Errorf("Clip(%.80q) = %q, want %q", c.in, got, c.want)
		}
	}
	for n := range 70 {
		s := fault.ClipTo("a\u00e9\u4e16\U0001F600\xff"+strings.Repeat("\U0001F600", 40), n)
		if !utf8.ValidString(s) || len(s) > n+len("...") {
			t.Errorf("ClipTo(%d) = %q", n, s)
		}
	}
	if got := fault.Text(fault.New("op", fault.Denied, "%s", "a\xffb")); !utf8.ValidString(got) {
		t.Errorf("Text = %q", got)
	}
}
