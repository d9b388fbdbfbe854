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

	"github.com/demarc-dev/demarc/fleet"
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
	out, found := missing(t, "`seal.TestRefused`, `seal.TestGone`, `nowhere.FuzzIt`, `daemon/management.TestWhoMayReport`, `room.TestName` "+
		"and seal.TestBare")
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

var guarded = regexp.MustCompile("`([a-z][a-z0-9/]*/[a-z0-9_]+\\.go):([A-Za-z]+)`")

// declared gives the names that a file declares at its top: functions, methods without their type, types, constants and variables.
func declared(t *testing.T, file string) map[string]bool {
	t.Helper()
	f, err := parser.ParseFile(token.NewFileSet(), filepath.Join("..", filepath.FromSlash(file)), nil, parser.SkipObjectResolution)
	if err != nil {
		t.Error(err)
		return nil
	}
	out := map[string]bool{}
	for _, d := range f.Decls {
		switch d := d.(type) {
		case *ast.FuncDecl:
			out[d.Name.Name] = true
		case *ast.GenDecl:
			for _, s := range d.Specs {
				switch s := s.(type) {
				case *ast.TypeSpec:
					out[s.Name.Name] = true
				case *ast.ValueSpec:
					for _, n := range s.Names {
						out[n.Name] = true
					}
				}
			}
		}
	}
	return out
}

// TestAttacksHaveGuards: each row of the table of attacks names a guard that is in the code, a test, and what is seen without the guard.
// That the tests exist, TestCitedTestsExist sees.
func TestAttacksHaveGuards(t *testing.T) {
	b, err := os.ReadFile("attacks.md")
	if err != nil {
		t.Fatal(err)
	}
	files := map[string]map[string]bool{}
	rows := 0
	for line := range strings.Lines(string(b)) {
		cells := strings.Split(strings.TrimSpace(line), "|")
		if len(cells) < 3 || strings.HasPrefix(cells[1], "-") || strings.Contains(line, "| Guard |") {
			continue
		}
		rows++
		what := strings.TrimSpace(cells[1])
		if len(cells) != 6 {
			t.Errorf("%s: %d cells, want 4", what, len(cells)-2)
			continue
		}
		guards := guarded.FindAllStringSubmatch(cells[2], -1)
		if len(guards) == 0 && !strings.Contains(cells[2], "crypto/tls") || !cited.MatchString(cells[3]) || strings.TrimSpace(cells[4]) == "" {
			t.Errorf("%s: a guard, a test and what is seen without the guard are needed", what)
		}
		for _, g := range guards {
			if files[g[1]] == nil {
				files[g[1]] = declared(t, g[1])
			}
			if !files[g[1]][g[2]] {
				t.Errorf("%s: %s has no %s", what, g[1], g[2])
			}
		}
	}
	if rows < 60 {
		t.Errorf("found %d rows: the test no longer reads them", rows)
	}
}

// TestEachReasonIsWrittenDown (FAULTS.md I7): what can cross as a reason is a list that a customer can read.
func TestEachReasonIsWrittenDown(t *testing.T) {
	b, err := os.ReadFile("status.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, k := range fleet.ReasonKinds() {
		if !strings.Contains(string(b), "\n| `"+string(k)+"` | ") {
			t.Errorf("status.md has no line for %s", k)
		}
	}
}
