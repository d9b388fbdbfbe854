// SPDX-License-Identifier: Apache-2.0

package main

import (
	"strings"
	"testing"
)

func TestJudge(t *testing.T) {
	at := func(rule, file string, n int) (out []finding) {
		for i := range n {
			out = append(out, finding{rule, file, file + ":" + string(rune('1'+i)), "is bad"})
		}
		return out
	}
	for name, tc := range map[string]struct {
		found []finding
		bad   bool
		want  string
	}{
		"a room without a row":             {at("U1000", "seal/a.go", 1), true, "seal/a.go:1: is bad (U1000)\n"},
		"another rule":                     {at("SA1", "raft/a.go", 1), true, "raft/a.go:1: is bad (SA1)\n"},
		"a folder with the same beginning": {at("U1000", "rafts/a.go", 1), true, "rafts/a.go:1: is bad"},
		"as many":                          {at("U1000", "raft/x/a.go", 2), false, ""},
		"fewer":                            {at("U1000", "raft/x/a.go", 1), false, "raft U1000: lower 2 to 1\n"},
		"none":                             {nil, false, "raft U1000: there is none any more: delete the row\n"},
		"more":                             {at("U1000", "raft/x/a.go", 3), true, "raft U1000: 3, and the table allows 2\n"},
		"the longest path":                 {append(at("U1000", "raft/wal/a.go", 1), at("U1000", "raft/a.go", 2)...), false, ""},
		"one more on that path":            {at("U1000", "raft/wal/a.go", 2), true, "raft/wal U1000: 2, and the table allows 1\n"},
	} {
		t.Run(name, func(t *testing.T) {
			var out strings.Builder
			bad := judge(&out, []row{{path: "raft", rule: "U1000", most: 2}, {path: "raft/wal", rule: "U1000", most: 1}}, tc.found)
			if bad != tc.bad || !strings.Contains(out.String(), tc.want) || tc.want == "" && strings.Contains(out.String(), "raft U1000") {
				t.Errorf("judge = %v, %q, want %v, %q", bad, out.String(), tc.bad, tc.want)
			}
		})
	}
}
