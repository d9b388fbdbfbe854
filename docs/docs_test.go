// SPDX-License-Identifier: Apache-2.0

// Package docs_test compares the documents with the code that they speak of.
package docs_test

import (
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

var cited = regexp.MustCompile("`([a-z][a-z0-9/]*)\\.((?:Test|Fuzz|Benchmark)[A-Za-z0-9_]*)`")

// tests gives the names of the tests of a room.
func tests(t *testing.T, room string) map[string]bool {
	t.Helper()
	files, err := filepath.Glob(filepath.Join("..", filepath.FromSlash(room), "*_test.go"))
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]bool{}
	for _, name := range files {
		f, err := parser.ParseFile(token.NewFileSet(), name, nil, parser.SkipObjectResolution)
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range f.Decls {
			if fn, ok := d.(*ast.FuncDecl); ok && fn.Recv == nil {
				out[fn.Name.Name] = true
			}
		}
	}
	return out
}

// missing gives the tests that a text names and the code does not have.
func missing(t *testing.T, text string) (out []string, found int) {
	t.Helper()
	rooms := map[string]map[string]bool{}
	for _, m := range cited.FindAllStringSubmatch(text, -1) {
		room, name := m[1], m[2]
		if rooms[room] == nil {
			rooms[room] = tests(t, room)
		}
		if rooms[room][name] {
			found++
			continue
		}
		out = append(out, room+"."+name)
	}
	return out, found
}

// TestCitedTestsExist: a promise must not lean on a test that was renamed or taken away.
func TestCitedTestsExist(t *testing.T) {
	files, err := filepath.Glob("*.md")
	if err != nil {
		t.Fatal(err)
	}
	more, err := filepath.Glob("adr/*.md")
	if err != nil {
		t.Fatal(err)
	}
	var all int
	for _, name := range append(files, more...) {
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		out, found := missing(t, string(b))
		all += found
		for _, m := range out {
			t.Errorf("%s names the test %s, which does not exist", name, m)
		}
	}
	if all < 30 {
		t.Errorf("found %d tests in the documents: the test no longer reads them", all)
	}
}

func TestAMissingTestIsSeen(t *testing.T) {
	out, found := missing(t, "`seal.TestRefused`, `seal.TestGone`, `nowhere.FuzzIt`, `daemon/management.TestWhoMayReport`, `room.TestName` and seal.TestBare")
	if got := strings.Join(out, " "); found != 2 || got != "seal.TestGone nowhere.FuzzIt room.TestName" {
		t.Errorf("found %d, missing %q", found, got)
	}
}

// TestPromisesAreWhole: eight rows, each of which says what is not yet proven.
func TestPromisesAreWhole(t *testing.T) {
	b, err := os.ReadFile("promises.md")
	if err != nil {
		t.Fatal(err)
	}
	var rows int
	for line := range strings.Lines(string(b)) {
		cells := strings.Split(strings.TrimSpace(line), "|")
		if len(cells) < 2 || !regexp.MustCompile(`^ [1-8] $`).MatchString(cells[1]) {
			continue
		}
		rows++
		if len(cells) != 7 {
			t.Errorf("row %d has %d cells, want 5", rows, len(cells)-2)
		}
		for i, c := range cells[1 : len(cells)-1] {
			if strings.TrimSpace(c) == "" {
				t.Errorf("row %d: cell %d is empty: write - or what is missing", rows, i+1)
			}
		}
	}
	if rows != 8 {
		t.Errorf("promises.md has %d promises, want 8", rows)
	}
}
