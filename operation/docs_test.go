// SPDX-License-Identifier: Apache-2.0

package operation_test

import (
	"os"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/demarc-dev/demarc/operation"
)

// FAULTS.md G2: docs/templates.md has every key of a template, in its place, and none that there is not; its example is one, and
// shows each.
func TestThePageHasEveryKey(t *testing.T) {
	b, err := os.ReadFile("../docs/templates.md")
	if err != nil {
		t.Fatal(err)
	}
	text := string(b)
	section := func(heading string) string {
		_, rest, ok := strings.Cut(text, "\n## "+heading+"\n")
		if !ok {
			t.Fatalf("docs/templates.md has no section %q", heading)
		}
		rest, _, _ = strings.Cut(rest, "\n## ")
		return rest
	}
	_, example, _ := strings.Cut(text, "```yaml\n")
	example, _, _ = strings.Cut(example, "```\n")
	row := regexp.MustCompile("(?m)^\\| `([a-z_]+)` \\|")
	for heading, v := range map[string]any{"Keys of a template": operation.Template{}, "Keys of a variable": operation.Var{},
		"Keys of `effects`": operation.Effects{}} {
		var want, got []string
		for f := range reflect.TypeOf(v).Fields() {
			key, _, _ := strings.Cut(f.Tag.Get("yaml"), ",")
			want = append(want, key)
			if !regexp.MustCompile(`(?m)(^|[{ ])` + key + `:`).MatchString(example) {
				t.Errorf("the example shows no %s", key)
			}
		}
		for _, m := range row.FindAllStringSubmatch(section(heading), -1) {
			got = append(got, m[1])
		}
		slices.Sort(got)
		slices.Sort(want)
		if !slices.Equal(got, want) {
			t.Errorf("docs/templates.md, %s:\nhas  %q\nwant %q", heading, got, want)
		}
	}
	tpl, err := operation.ParseTemplate([]byte(example))
	if err != nil {
		t.Fatal(err)
	}
	argv, err := tpl.Argv(map[string]string{"section": "summary"})
	if err != nil || !slices.Equal(argv, []string{"bin/store", "state", "--section", "summary"}) {
		t.Errorf("the example gives %q, %v: the page shows another command", argv, err)
	}
	for _, s := range operation.States() {
		if !strings.Contains(section("What the customer sees, and decides"), "`"+string(s)+"`") {
			t.Errorf("the page does not name the state %s", s)
		}
	}
	// What the page says of patterns and shells.
	for what, change := range map[string][2]string{
		"a pattern that takes anything": {`"^(summary|notes)$"`, `"^.*$"`},
		"a variable as the program":     {"[bin/store,", `["${section}",`},
		"a value that names an option":  {`"${section}"`, `"--${section}"`},
		"a script":                      {`[bin/store, state, --section, "${section}"`, `[sh, -c, "cat ${section}"`},
		"writes with operate.read":      {"writes: []", "writes: [/var/lib/store]"},
		"another version":               {"demarc-template/1", "demarc-template/2"},
	} {
		spoiled := strings.Replace(example, change[0], change[1], 1)
		if spoiled == example {
			t.Fatalf("%s: the example has no %q", what, change[0])
		}
		if _, err := operation.ParseTemplate([]byte(spoiled)); err == nil {
			t.Errorf("%s is taken, and the page says that it is refused", what)
		}
	}
}
