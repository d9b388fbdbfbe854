// SPDX-License-Identifier: Apache-2.0

package upgrade

import (
	"fmt"
	"strings"
	"testing"

	"github.com/demarc-dev/demarc/audit"
)

// export is the vendor's log as one node gave it. The cluster goes on between two exports, so a later one may be longer.
type export struct {
	node   string
	leaves []string
}

// oneHistory compares the logs byte for byte as far as each two of them go, and says where they part. Those of one size have one
// root, which is computed from each of them anew.
func oneHistory(all []export) error {
	roots := map[int][32]byte{}
	for i, a := range all {
		if len(a.leaves) == 0 {
			return fmt.Errorf("the log of %s is empty", a.node)
		}
		for _, b := range all[:i] {
			for k := range min(len(a.leaves), len(b.leaves)) {
				if a.leaves[k] != b.leaves[k] {
					return fmt.Errorf("entry %d of %s is %.300q, and that of %s is %.300q", k, b.node, b.leaves[k], a.node, a.leaves[k])
				}
			}
		}
		var log audit.Log
		for _, l := range a.leaves {
			log = log.AppendLeaf([]byte(l))
		}
		root := [32]byte(log.Root())
		if was, ok := roots[len(a.leaves)]; ok && was != root {
			return fmt.Errorf("the log of %s has the root %x, and another one of %d entries has %x", a.node, root, len(a.leaves), was)
		}
		roots[len(a.leaves)] = root
	}
	return nil
}

// TestOneHistoryCanFail: what judge relies on tells histories apart, wherever they part.
func TestOneHistoryCanFail(t *testing.T) {
	of := func(nodes ...string) (all []export) { // a letter an entry
		for i, leaves := range nodes {
			all = append(all, export{fmt.Sprint("cp-", i+1), strings.Split(leaves, "")})
		}
		return all
	}
	for name, tc := range map[string]struct {
		all  []export
		want string // in the error; "": one history
	}{
		"all the same":                     {of("abcd", "abcd", "abcd"), ""},
		"each later one is longer":         {of("ab", "abc", "abcd"), ""},
		"each later one is shorter":        {of("abcd", "abc", "ab"), ""},
		"the last entry differs":           {of("abcd", "abcd", "abcx"), "entry 3 of cp-1"},
		"the first entry differs":          {of("abcd", "xbcd", "abcd"), "entry 0 of cp-1"},
		"two change places":                {of("abcd", "abcd", "acbd"), "entry 1"},
		"a longer one differs below":       {of("abcd", "abcd", "abxde"), "entry 2"},
		"a shorter one differs":            {of("abcd", "ax", "abcd"), "entry 1"},
		"two longer ones differ above it":  {of("ab", "abcd", "abxd"), "entry 2 of cp-2"},
		"one is missing in the middle":     {of("abcd", "abd", "abcd"), "entry 2"},
		"one came twice":                   {of("abcd", "abccd", "abcd"), "entry 3"},
		"one is empty":                     {[]export{{"cp-1", []string{"a"}}, {"cp-2", nil}}, "cp-2 is empty"},
		"the bytes differ, not the letter": {[]export{{"cp-1", []string{"a"}}, {"cp-2", []string{"a "}}}, "entry 0"},
	} {
		t.Run(name, func(t *testing.T) {
			err := oneHistory(tc.all)
			if (err == nil) != (tc.want == "") || err != nil && !strings.Contains(err.Error(), tc.want) {
				t.Errorf("want %q, got %v", tc.want, err)
			}
		})
	}
}
