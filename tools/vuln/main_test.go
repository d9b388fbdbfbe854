// SPDX-License-Identifier: Apache-2.0

package main

import (
	"strings"
	"testing"
)

func TestCompare(t *testing.T) {
	const messages = `{"config":{"protocol_version":"v1.0.0"}}
{"finding":{"osv":"GO-2026-0001","fixed_version":"v1.2.0","trace":[{"module":"m","version":"v1.1.0"}]}}
{"finding":{"osv":"GO-2026-0002","fixed_version":"v1.3.0","trace":[
	{"module":"m","version":"v1.1.0","package":"m/p","receiver":"*T","function":"Read"},{"module":"x","package":"x","function":"main"}]}}
`
	found, err := called(strings.NewReader(messages))
	if err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct{ page, want string }{
		"not listed": {"", `GO-2026-0002: m/p.*T.Read of m v1.1.0 is called, fixed in "v1.3.0": update it, or give it a row in PAGE`},
		"listed":     {"| Report | Of |\n|---|---|\n| GO-2026-0002 | m |\n", ""},
		"listed, not found": {"| GO-2026-0002 | m |\n| GO-2026-0003 | m |\n",
			"GO-2026-0003: it is in PAGE and no longer found: delete its row"},
		"not called": {"| GO-2026-0002 | m |\n| GO-2026-0001 | m |\n",
			"GO-2026-0001: it is in PAGE and no longer found: delete its row"},
		"no row, only a word": {"GO-2026-0002 is bad\n", "GO-2026-0002: m/p"},
	} {
		t.Run(name, func(t *testing.T) {
			out := compare(found, listed(tc.page), "PAGE")
			got := strings.Join(out, "\n")
			if (tc.want == "" && got != "") || !strings.Contains(got, tc.want) || len(out) > 1 {
				t.Errorf("compare = %q, want %q", got, tc.want)
			}
		})
	}
}
