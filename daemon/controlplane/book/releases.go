// SPDX-License-Identifier: Apache-2.0

package book

import (
	"slices"
)

// numberSet is a set of numbers of releases, as first and last of each run of them, in order. Releases are mostly offered to all, so
// that there is one run. It is replaced whole, never edited in place.
type numberSet [][2]uint64

// with returns the set with n in it.
func (s numberSet) with(n uint64) numberSet {
	if s.Has(n) {
		return s
	}
	out := append(slices.Clone(s), [2]uint64{n, n})
	slices.SortFunc(out, func(a, b [2]uint64) int {
		if a[0] < b[0] {
			return -1
		}
		return 1
	})
	joined := out[:1]
	for _, next := range out[1:] {
		if last := &joined[len(joined)-1]; last[1]+1 == next[0] {
			last[1] = next[1]
			continue
		}
		joined = append(joined, next)
	}
	return joined
}

// Has reports whether n is in the set.
func (s numberSet) Has(n uint64) bool {
	return slices.ContainsFunc(s, func(r [2]uint64) bool { return r[0] <= n && n <= r[1] })
}
