// SPDX-License-Identifier: Apache-2.0

package docs_test

import (
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// TestEveryMetricIsListed compares the names of metrics in the code with the table in metrics.md, both ways.
func TestEveryMetricIsListed(t *testing.T) {
	name := regexp.MustCompile(`"(demarc_[a-z_]+)"`)
	row := regexp.MustCompile("(?m)^\\| `(demarc_[a-z_]+)` \\|")
	var code, doc []string
	for _, room := range []string{"daemon", "raft", "telemetry", "mesh", "ingress", "workload"} {
		err := filepath.WalkDir(filepath.Join("..", room), func(path string, e fs.DirEntry, err error) error {
			if err != nil || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
				return err
			}
			b, err := os.ReadFile(path)
			for _, m := range name.FindAllSubmatch(b, -1) {
				code = append(code, string(m[1]))
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	b, err := os.ReadFile("metrics.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range row.FindAllSubmatch(b, -1) {
		doc = append(doc, string(m[1]))
	}
	slices.Sort(code)
	slices.Sort(doc)
	code = slices.Compact(code)
	if len(code) < 10 || !slices.Equal(code, doc) {
		t.Fatalf("in the code: %q\nin metrics.md: %q", code, doc)
	}
}
