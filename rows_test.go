// SPDX-License-Identifier: Apache-2.0

package demarc_test

import (
	"fmt"
	"go/parser"
	"go/token"
	"maps"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// rows are the floors inside a folder: a room of the folder imports of it only rooms on lower rows, tests included.
// A room is a folder inside it with all that is below, and "" is the package of the folder itself.
// A folder inside one that is listed may be listed too: both orders hold.
var rows = map[string]map[string]int{
	"cmd": {"demarc": 0, "demarcd": 0},
	"cmd/demarc": {
		"cli":      0,                // what all groups of commands share
		"evidence": 1, "operator": 1, // used by the groups above
		"auditor": 2, "cluster": 2, "customer": 2, "setup": 2, "vendor": 2,
		"": 3, // puts the groups together
	},
	"raft": {
		"clock": 0, "forward": 0, "wal": 0,
		"store": 1, "transport": 1,
		"": 2, // runs hashicorp/raft on them
	},
	"daemon/controlplane": {
		"limit": 0, "book": 0, "login": 0, "platform": 0,
		"admission": 1,
		"refusal":   1,
		"authority": 2,
		"evidence":  3,
		"":          9, // one node: puts the rooms together
	},
	"daemon/appliance": {
		"book": 0, "credentials": 0, "platform": 0, "tailnet": 0,
		"": 9,
	},
}

// climbs returns one line for each import that goes sideways or up inside a folder of rows, and for each room that is on no row.
func climbs(files []source, rows map[string]map[string]int) ([]string, error) {
	var out []string
	fset := token.NewFileSet()
	for _, f := range files {
		var src any
		if f.text != "" {
			src = f.text
		}
		file, err := parser.ParseFile(fset, f.path, src, parser.ImportsOnly)
		if err != nil {
			return nil, err
		}
		dir := filepath.ToSlash(filepath.Dir(f.path))
		for _, folder := range slices.Sorted(maps.Keys(rows)) {
			room, in := roomOf(dir, folder)
			if !in {
				continue
			}
			row, known := rows[folder][room]
			if !known {
				out = append(out, fmt.Sprintf("%s: room %q is on no row of %s: add it to rows in rows_test.go", f.path, room, folder))
				continue
			}
			for _, im := range file.Imports {
				path, _ := strconv.Unquote(im.Path.Value)
				below, ours := strings.CutPrefix(path, module+"/")
				if !ours {
					continue
				}
				to, in := roomOf(below, folder)
				if !in || to == room {
					continue
				}
				if toRow, known := rows[folder][to]; known && toRow >= row { // an unknown one is told with its own files
					out = append(out, fmt.Sprintf("%s: %s: %s (row %d) imports %s (row %d): a room imports only from rows below its own",
						fset.Position(im.Pos()), folder, called(room), row, called(to), toRow))
				}
			}
		}
	}
	return out, nil
}

// roomOf returns the room of a folder that a package is in.
func roomOf(pkg, folder string) (string, bool) {
	rest, in := strings.CutPrefix(pkg+"/", folder+"/")
	room, _, _ := strings.Cut(rest, "/")
	return room, in
}

func called(room string) string {
	if room == "" {
		return "the folder's own package"
	}
	return room
}

func TestRows(t *testing.T) {
	files := goFiles(t)
	out, err := climbs(files, rows)
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range out {
		t.Error(line)
	}
	for folder, of := range rows {
		there := map[string]bool{}
		for _, f := range files {
			if room, in := roomOf(filepath.ToSlash(filepath.Dir(f.path)), folder); in {
				there[room] = true
			}
		}
		for room := range of {
			if !there[room] {
				t.Errorf("rows names %s of %s, and there is no such room", called(room), folder)
			}
		}
	}
}

// TestRowsSeeABreach breaks the rule in each folder that has rows, and in one made up for the purpose.
func TestRowsSeeABreach(t *testing.T) {
	breach := func(path, imports string, rows map[string]map[string]int) string {
		t.Helper()
		out, err := climbs([]source{{path, fmt.Sprintf("package p\n\nimport _ %q\n", module+"/"+imports)}}, rows)
		if err != nil {
			t.Fatal(err)
		}
		return strings.Join(out, "\n")
	}
	house := map[string]map[string]int{"h": {"cellar": 0, "kitchen": 1, "hall": 1, "": 2}, "h/kitchen": {"oven": 0, "": 1}}
	for name, tc := range map[string]struct{ path, imports, want string }{
		"up":         {"h/cellar/bad.go", "h/kitchen", "h: cellar (row 0) imports kitchen (row 1)"},
		"up, deeper": {"h/cellar/x/bad.go", "h/kitchen/oven", "h: cellar (row 0) imports kitchen (row 1)"},
		"sideways":   {"h/hall/bad.go", "h/kitchen", "h: hall (row 1) imports kitchen (row 1)"},
		"the root":   {"h/hall/bad.go", "h", "h: hall (row 1) imports the folder's own package (row 2)"},
		"a test":     {"h/hall/bad_test.go", "h", "h: hall (row 1) imports the folder's own package (row 2)"},
		"no row":     {"h/attic/bad.go", "fault", `room "attic" is on no row of h`},
		"inner folder": {"h/kitchen/oven/bad.go", "h/kitchen",
			"h/kitchen: oven (row 0) imports the folder's own package (row 1)"},
		"down":           {"h/hall/good.go", "h/cellar", ""},
		"the root, down": {"h/good.go", "h/hall", ""},
		"itself":         {"h/kitchen/x_test.go", "h/kitchen", ""},
		"elsewhere":      {"h/cellar/good.go", "hall/kitchen", ""},
		"from elsewhere": {"i/good.go", "h/kitchen", ""},
	} {
		if got := breach(tc.path, tc.imports, house); (got == "") != (tc.want == "") || !strings.Contains(got, tc.want) {
			t.Errorf("%s: climbs = %q, want %q", name, got, tc.want)
		}
	}
	for folder, of := range rows {
		for a, low := range of {
			for b, high := range of {
				got := breach(filepath.Join(folder, a, "bad.go"), strings.TrimSuffix(folder+"/"+b, "/"), map[string]map[string]int{folder: of})
				if want := a != b && high >= low; want != (got != "") {
					t.Errorf("%s: %s imports %s: climbs = %q", folder, called(a), called(b), got)
				}
			}
		}
	}
}
