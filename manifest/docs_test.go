// SPDX-License-Identifier: Apache-2.0

package manifest

import (
	"fmt"
	"os"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

// page is docs/releases.md.
func page(t *testing.T) string {
	t.Helper()
	b, err := os.ReadFile("../docs/releases.md")
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// section is what stands below a heading.
func section(t *testing.T, text, heading string) string {
	t.Helper()
	_, rest, ok := strings.Cut(text, "\n## "+heading+"\n")
	if !ok {
		t.Fatalf("docs/releases.md has no section %q", heading)
	}
	rest, _, _ = strings.Cut(rest, "\n## ")
	return rest
}

var quoted = regexp.MustCompile("`([^`]+)`")

// rows are the keys in the first column of the tables of a section.
func rows(text string) (keys []string) {
	for line := range strings.Lines(text) {
		if first, _, ok := strings.Cut(strings.TrimPrefix(line, "|"), "|"); ok && strings.HasPrefix(line, "| `") {
			for _, m := range quoted.FindAllStringSubmatch(first, -1) {
				keys = append(keys, m[1])
			}
		}
	}
	slices.Sort(keys)
	return keys
}

// tags are the keys that a struct is read with.
func tags(v any, tag string) (keys []string) {
	for f := range reflect.TypeOf(v).Fields() {
		key, _, _ := strings.Cut(f.Tag.Get(tag), ",")
		keys = append(keys, key)
	}
	slices.Sort(keys)
	return keys
}

// FAULTS.md G2: docs/releases.md has every key that this package reads, in its place, and none that it does not.
func TestThePageHasEveryKey(t *testing.T) {
	text := page(t)
	for heading, keys := range map[string][]string{
		"Keys of the file":                topKeys,
		"Keys of a secret in `secrets`":   externalKeys,
		"Keys of `x-demarc`":              topXKeys,
		"Keys of a port":                  portKeys,
		"Keys of a secret in `x-demarc`":  secretKeys,
		"Keys of a service":               serviceKeys,
		"Keys of `depends_on`":            dependKeys,
		"Keys of `x-demarc` of a service": serviceXKeys,
		"Keys of `health`":                healthKeys,
		"The signed document":             tags(Release{}, "json"),
		"What is refused, and what to write instead": func() (keys []string) {
			for k := range why {
				keys = append(keys, k)
			}
			return keys
		}(),
	} {
		keys = slices.Sorted(slices.Values(keys))
		if got := rows(section(t, text, heading)); !slices.Equal(got, keys) {
			t.Errorf("docs/releases.md, %s:\nhas  %q\nwant %q", heading, got, keys)
		}
	}
	// What is let in is what is read.
	for what, row := range map[string]struct {
		v    any
		keys []string
	}{"x-demarc": {xTop{}, topXKeys}, "a port": {xPort{}, portKeys}, "a secret": {xSecret{}, secretKeys},
		"x-demarc of a service": {xService{}, serviceXKeys}, "health": {xHealth{}, healthKeys}} {
		if got, want := tags(row.v, "yaml"), slices.Sorted(slices.Values(row.keys)); !slices.Equal(got, want) {
			t.Errorf("%s: the keys %q are read, and %q are let in", what, got, want)
		}
	}
}

// The example is one, and the limits and defaults are those of the code.
func TestThePageIsTrue(t *testing.T) {
	text := page(t)
	_, example, _ := strings.Cut(text, "```yaml\n")
	example, _, _ = strings.Cut(example, "```\n")
	s, err := ParseCompose([]byte(example))
	if err != nil {
		t.Fatal(err)
	}
	for _, heading := range []string{"Keys of `x-demarc`", "Keys of a port", "Keys of a secret in `x-demarc`",
		"Keys of `x-demarc` of a service", "Keys of `health`"} {
		for _, key := range rows(section(t, text, heading)) {
			if !regexp.MustCompile(`[\s{]` + key + `:`).MatchString(example) {
				t.Errorf("the example shows no %s of %s", key, heading)
			}
		}
	}
	web := s.plan[1]
	if s.plan[0].Name != "store" || web.Health.IntervalMS != time.Second.Milliseconds() {
		t.Errorf("the example says something else than it shows: %+v", s.plan)
	}
	h := s.plan[0].Health // it leaves out what has a default
	for key, want := range map[string]string{"timeout": fmt.Sprintf("default `%ds`", h.TimeoutMS/1000),
		"start": fmt.Sprintf("default `%ds`", h.StartMS/1000), "retries": fmt.Sprintf("default %d", h.Retries)} {
		if !regexp.MustCompile("(?m)^\\| `" + key + "` .*" + want + " \\|$").MatchString(text) {
			t.Errorf("%s: the page does not say %s", key, want)
		}
	}
	limits := section(t, text, "Limits of a release")
	for _, want := range []string{
		fmt.Sprintf("| the Compose file | %d KiB |", MaxCompose>>10), fmt.Sprintf("| services | %d |", maxServices),
		fmt.Sprintf("| ports; secrets; arguments of a command | %d each |", maxNames),
		fmt.Sprintf("| an argument, or the value of a variable | %d KiB |", maxText>>10),
		fmt.Sprintf("| operation templates | %d, of %d KiB each |", maxTemplates, maxTemplate>>10),
	} {
		if !strings.Contains(limits, want) {
			t.Errorf("the page does not say %q", want)
		}
	}
}
