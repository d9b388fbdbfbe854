// SPDX-License-Identifier: Apache-2.0

package runbooks

import (
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// words is what a page may say to the test.
var words = []string{"", "members", "lose", "customers", "through", "appliance", "forget", "sealed", "wipe", "stolen", "gone",
	"again", "operators", "appliances", "renews", "renewed", "missing", "unused", "probes", "works", "refused", "managed", "thief", "holds",
	"power", "online", "back", "echoes", "since", "lost", "redo", "as", "wake"}

// A runbook that changed in a way that the test does not understand is found without running anything.
func TestRunbooksAreUnderstood(t *testing.T) {
	for _, name := range runbooks {
		for _, s := range steps(t, filepath.Join("..", "..", "docs", name)) {
			verb, _, _ := strings.Cut(s.do, " ")
			if !slices.Contains(words, verb) {
				t.Errorf("%s:%d: %q", name, s.line, s.do)
			}
			for line := range strings.Lines(s.shell) {
				if first := strings.Fields(line); len(first) > 0 &&
					!slices.Contains([]string{"export", "demarc", "systemctl", "printf", "rm"}, first[0]) {
					t.Errorf("%s:%d: %q is typed by nobody", name, s.line, line)
				}
			}
		}
	}
}
