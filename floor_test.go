// SPDX-License-Identifier: Apache-2.0

package demarc_test

import (
	"fmt"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

const module = "github.com/demarc-dev/demarc"

// floors is the house of DESIGN.md: a room imports only from floors below its own.
// Rooms at beside stand outside the house: they may import any floor, and no floor may import them.
var floors = map[string]int{
	"fault": 0,
	"fleet": 1, "seal": 1, "configs": 1,
	"identity": 2, "grant": 2, "manifest": 2, "operation": 2, "audit": 2,
	"ledger": 3, "api": 3,
	"mesh": 4, "raft": 4, "ingress": 4, "workload": 4, "telemetry": 4, "console": 4,
	"daemon": 5,
	"cmd":    6,
	"bench":  beside, "demo": beside, "fleettest": beside, "docs": beside, "deploy": beside,
}

const beside = 9

// owners names the one room that may import an outside world, and why.
var owners = []struct{ prefix, room, why string }{
	{"tailscale.com", "mesh", "one room per outside world: the tailnet belongs to mesh"},
	{"github.com/hashicorp/raft", "raft", "one room per outside world: hashicorp/raft belongs to raft"},
	{"github.com/moby/", "workload", "one room per outside world: container clients belong to workload"},
	{"k8s.io/", "workload", "one room per outside world: Kubernetes clients belong to workload"},
}

// quiet lists what floors 0 to 3 must not import: no clock is checked by call, the rest by package.
var quiet = map[string]string{
	"log": "floors 0 to 3 have no logger", "log/slog": "floors 0 to 3 have no logger",
	"math/rand": "floors 0 to 3 have no randomness", "math/rand/v2": "floors 0 to 3 have no randomness",
}

type source struct{ path, text string } // text is "" for a file on disk

// breaches checks the imports of files against the floors and gives one line a breach.
func breaches(files []source) ([]string, error) {
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
		room := strings.SplitN(filepath.ToSlash(f.path), "/", 2)[0]
		floor, known := floors[room]
		test := strings.HasSuffix(f.path, "_test.go")
		for _, im := range file.Imports {
			path, _ := strconv.Unquote(im.Path.Value)
			at := fset.Position(im.Pos()).String()
			if !known {
				out = append(out, fmt.Sprintf("%s: room %q is on no floor: add it to floors in floor_test.go", at, room))
				break
			}
			for _, o := range owners {
				if strings.HasPrefix(path, o.prefix) && room != o.room && floor != beside {
					out = append(out, fmt.Sprintf("%s: %s imports %s: %s", at, room, path, o.why))
				}
			}
			if why, bad := quiet[path]; bad && floor <= 3 && !test {
				out = append(out, fmt.Sprintf("%s: %s imports %s: %s", at, room, path, why))
			}
			below, ours := strings.CutPrefix(path, module+"/")
			if !ours {
				continue
			}
			to := strings.SplitN(below, "/", 2)[0]
			switch toFloor := floors[to]; {
			case to == room || floor == beside:
			case toFloor == beside && test: // a room's tests may use the fleet
			case toFloor >= floor:
				out = append(out, fmt.Sprintf("%s: %s (floor %d) imports %s (floor %d): a room imports only from floors below its own", at, room, floor, to, toFloor))
			}
		}
	}
	return out, nil
}

func goFiles(t *testing.T) []source {
	t.Helper()
	var files []source
	err := filepath.WalkDir(".", func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && p != "." && (strings.HasPrefix(d.Name(), ".") || d.Name() == "testdata" || d.Name() == "bin") {
			return fs.SkipDir
		}
		if strings.HasSuffix(p, ".go") && strings.Contains(p, "/") {
			files = append(files, source{path: p})
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return files
}

func TestFloors(t *testing.T) {
	files := goFiles(t)
	if len(files) == 0 {
		t.Fatal("found no Go files: the test looks at the wrong folder")
	}
	out, err := breaches(files)
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range out {
		t.Error(line)
	}
}

// TestFloorsSeeABreach keeps the test above honest.
func TestFloorsSeeABreach(t *testing.T) {
	for name, tc := range map[string]struct{ path, imports, want string }{
		"up":        {"fleet/bad.go", module + "/identity", "fleet (floor 1) imports identity (floor 2)"},
		"sideways":  {"raft/bad.go", module + "/mesh", "raft (floor 4) imports mesh (floor 4)"},
		"beside":    {"daemon/x/bad.go", module + "/fleettest", "daemon (floor 5) imports fleettest (floor 9)"},
		"tailnet":   {"ingress/bad.go", "tailscale.com/tsnet", "belongs to mesh"},
		"raft":      {"daemon/bad.go", "github.com/hashicorp/raft", "belongs to raft"},
		"logger":    {"grant/bad.go", "log/slog", "have no logger"},
		"no floor":  {"util/bad.go", "fmt", "is on no floor"},
		"down":      {"identity/good.go", module + "/fleet", ""},
		"own house": {"daemon/x/good.go", module + "/daemon", ""},
	} {
		t.Run(name, func(t *testing.T) {
			out, err := breaches([]source{{tc.path, fmt.Sprintf("package p\n\nimport _ %q\n", tc.imports)}})
			if err != nil {
				t.Fatal(err)
			}
			got := strings.Join(out, "\n")
			if (tc.want == "" && got != "") || !strings.Contains(got, tc.want) {
				t.Errorf("breaches = %q, want %q", got, tc.want)
			}
		})
	}
}

// TestFilesStaySmall holds the house rule of 500 lines a file; generated code is not ours to split.
func TestFilesStaySmall(t *testing.T) {
	for _, f := range goFiles(t) {
		if strings.HasSuffix(f.path, ".pb.go") || strings.HasSuffix(f.path, ".connect.go") {
			continue
		}
		b, err := os.ReadFile(f.path)
		if err != nil {
			t.Fatal(err)
		}
		if n := strings.Count(string(b), "\n"); n > 500 {
			t.Errorf("%s has %d lines: split it at a noun, the limit is 500", f.path, n)
		}
		if !strings.HasPrefix(string(b), "// SPDX-License-Identifier: Apache-2.0\n") {
			t.Errorf("%s: line 1 must be the licence", f.path)
		}
	}
}
