// SPDX-License-Identifier: Apache-2.0

// Command logstores crashes three log stores at each step of the same schedules and alters their bytes: the one of package
// raft/wal, hashicorp/raft-wal v0.4.0, and one entry a key in bbolt, as this project had it before. See ADR 9.
//
// What each is crashed by: raft/wal in full. raft-wal in its segment files; its meta store is one that can't fail, which
// is kind to it. bbolt in the writes of its file, with a sync taken to lie before and after each write of a meta page, as
// its source has it.
package main

import (
	"flag"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/demarc-dev/demarc/raft/wal"
	"github.com/demarc-dev/demarc/raft/wal/waltest"
)

func main() {
	seeds := flag.Int("seeds", 4, "schedules")
	acts := flag.Int("acts", 36, "acts of a schedule")
	only := flag.String("only", "", "one store: raft/wal, bbolt, raft-wal")
	flag.Parse()
	for _, s := range []struct {
		name string
		open waltest.Open
	}{
		{"raft/wal", func(s *waltest.Script) (waltest.Store, error) {
			return wal.Open(s, wal.Options{SegmentBytes: 8 << 10})
		}},
		{"bbolt", openBolt},
		{"raft-wal", openRaftWAL},
	} {
		if *only != "" && *only != s.name {
			continue
		}
		states, wrong := waltest.Sweep(*seeds, *acts, 4, s.open)
		fmt.Printf("%s: %d crash states, %d wrong\n", s.name, states, len(wrong))
		kinds := map[string]int{}
		for _, err := range wrong {
			_, what, _ := strings.Cut(err.Error(), "): ")
			kinds[fmt.Sprintf("%.100s", what)]++
		}
		for _, what := range slices.Sorted(maps.Keys(kinds)) {
			fmt.Printf("  %d times: %s\n", kinds[what], what)
		}
		found, silent, harmless := alter(s.open)
		fmt.Printf(
			"%s: of %d alterations of one byte: %d refused or told, %d changed an entry or a vote and nobody noticed, %d changed nothing\n", s.name,
			found+silent+harmless, found, silent, harmless)
	}
}
