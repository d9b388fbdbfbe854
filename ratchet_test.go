// SPDX-License-Identifier: Apache-2.0

package demarc_test

import (
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// A ratchet is a table of what is over a limit today. Each line has what is counted, how many there are at most, and
// the reason. A number may only shrink: more than the table allows fails. A number that is larger than what is there
// is a note in the log, and fails where DEMARC_RATCHET=tight is set. DEMARC_RATCHET=lower writes today's lower numbers
// into the table, and drops the lines of what is gone.
type ratchet struct {
	path string
	rows []row
}

type row struct {
	key    string // one or more words, with one blank between
	most   int
	reason string
}

// readRatchet reads `key... number reason...` lines; # starts a comment.
func readRatchet(path string, keyWords int) (ratchet, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return ratchet{}, err
	}
	r := ratchet{path: path}
	seen := map[string]bool{}
	for i, line := range strings.Split(string(b), "\n") {
		f := strings.Fields(line)
		if len(f) == 0 || strings.HasPrefix(f[0], "#") {
			continue
		}
		if len(f) <= keyWords {
			return r, fmt.Errorf("%s:%d: want %d words, a number and a reason", path, i+1, keyWords)
		}
		n, err := strconv.Atoi(f[keyWords])
		if err != nil || n < 1 {
			return r, fmt.Errorf("%s:%d: %q is not a number from 1", path, i+1, f[keyWords])
		}
		key := strings.Join(f[:keyWords], " ")
		if seen[key] {
			return r, fmt.Errorf("%s:%d: %q stands here twice", path, i+1, key)
		}
		seen[key] = true
		r.rows = append(r.rows, row{key, n, strings.Join(f[keyWords+1:], " ")})
	}
	return r, nil
}

func (r ratchet) most(key string) int {
	for _, x := range r.rows {
		if x.key == key {
			return x.most
		}
	}
	return 0
}

// loose returns one line for each row that allows more than there is.
func (r ratchet) loose(found map[string]int) []string {
	var out []string
	for _, x := range r.rows {
		switch n := found[x.key]; {
		case n == 0:
			out = append(out, fmt.Sprintf("%s: %q: there is none any more: delete its line", r.path, x.key))
		case n < x.most:
			out = append(out, fmt.Sprintf("%s: %q: lower %d to %d", r.path, x.key, x.most, n))
		}
	}
	return out
}

// lower rewrites the table with the lower numbers of found.
func (r ratchet) lower(found map[string]int, keyWords int) error {
	b, err := os.ReadFile(r.path)
	if err != nil {
		return err
	}
	lines := slices.DeleteFunc(strings.SplitAfter(string(b), "\n"), func(line string) bool {
		f := strings.Fields(line)
		return len(f) > keyWords && f[0] != "#" && found[strings.Join(f[:keyWords], " ")] == 0
	})
	for i, line := range lines {
		f := strings.Fields(line)
		if len(f) <= keyWords || f[0] == "#" {
			continue
		}
		key := strings.Join(f[:keyWords], " ")
		if n := found[key]; n < r.most(key) {
			lines[i] = strings.TrimRight(fmt.Sprintf("%s %d %s", key, n, strings.Join(f[keyWords+1:], " ")), " ") + "\n"
		}
	}
	return os.WriteFile(r.path, []byte(strings.Join(lines, "")), 0o644)
}

// finish reports what the table allows too much of.
func (r ratchet) finish(t *testing.T, found map[string]int, keyWords int) {
	t.Helper()
	switch os.Getenv("DEMARC_RATCHET") {
	case "lower":
		if err := r.lower(found, keyWords); err != nil {
			t.Fatal(err)
		}
	case "tight":
		for _, line := range r.loose(found) {
			t.Error(line)
		}
	default:
		for _, line := range r.loose(found) {
			t.Log(line)
		}
	}
}

func TestRatchetSeesWhatIsLoose(t *testing.T) {
	path := t.TempDir() + "/table"
	const table = "# words\na.T methods 30 why\nb.T methods 28\nc.T methods 26 gone\n"
	if err := os.WriteFile(path, []byte(table), 0o600); err != nil {
		t.Fatal(err)
	}
	r, err := readRatchet(path, 2)
	if err != nil {
		t.Fatal(err)
	}
	found := map[string]int{"a.T methods": 27, "b.T methods": 28}
	got := strings.Join(r.loose(found), "\n")
	for _, want := range []string{`"a.T methods": lower 30 to 27`, `"c.T methods": there is none any more`} {
		if !strings.Contains(got, want) {
			t.Errorf("loose = %q, want %q in it", got, want)
		}
	}
	if strings.Contains(got, "b.T") {
		t.Errorf("loose = %q, want nothing of b.T", got)
	}
	if err := r.lower(found, 2); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if got, want := string(b), "# words\na.T methods 27 why\nb.T methods 28\n"; got != want {
		t.Errorf("the table is %q, want %q", got, want)
	}
	if err := os.WriteFile(path, []byte("a.T methods\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := readRatchet(path, 2); err == nil {
		t.Error("a line without a number was taken")
	}
}
