// SPDX-License-Identifier: Apache-2.0

package demarc_test

import (
	"fmt"
	"go/ast"
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
	"fault": 0, "smallfile": 0,
	"fleet": 1, "seal": 1, "configs": 1,
	"identity": 2, "grant": 2, "manifest": 2, "operation": 2, "audit": 2,
	"ledger": 3, "api": 3,
	"mesh": 4, "client": 4, "raft": 4, "ingress": 4, "workload": 4, "telemetry": 4, "console": 4,
	"daemon": 5,
	"cmd":    6,
	"bench":  beside, "demo": beside, "fleettest": beside, "docs": beside, "deploy": beside,
	"tools": beside, // a module of its own
}

const beside = 9

// owners names the one room that may import an outside world, and why.
var owners = []struct{ prefix, room, why string }{
	{"tailscale.com", "mesh", "one room per outside world: the tailnet belongs to mesh"},
	{"github.com/hashicorp/raft", "raft", "one room per outside world: hashicorp/raft belongs to raft"},
	{"github.com/moby/", "workload", "one room per outside world: container clients belong to workload"},
	{"k8s.io/", "workload", "one room per outside world: Kubernetes clients belong to workload"},
}

// quiet lists what floors 0 to 3 must not import. Clock, environment and goroutines are looked for in the code, by use.
var quiet = map[string]string{
	"log": "floors 0 to 3 have no logger", "log/slog": "floors 0 to 3 have no logger",
	"math/rand": "floors 0 to 3 have no randomness", "math/rand/v2": "floors 0 to 3 have no randomness",
}

const (
	noClock  = "floors 0 to 3 have no clock: take the time as an argument"
	noEnv    = "floors 0 to 3 have no environment: take the value as an argument"
	noThread = "floors 0 to 3 have no goroutine: let the caller start it"
)

// uses lists what floors 0 to 3 must not use of packages that they may import, whether it is called or handed on.
var uses = map[string]map[string]string{
	"time": {
		"Now": noClock, "Since": noClock, "Until": noClock, "Sleep": noClock, "After": noClock, "Tick": noClock,
		"NewTimer": noClock, "NewTicker": noClock, "AfterFunc": noThread,
	},
	"context": {
		"WithTimeout": noClock, "WithTimeoutCause": noClock, "WithDeadline": noClock, "WithDeadlineCause": noClock,
		"AfterFunc": noThread,
	},
	"os": {"Getenv": noEnv, "LookupEnv": noEnv, "Environ": noEnv, "ExpandEnv": noEnv, "Setenv": noEnv, "Unsetenv": noEnv,
		"Clearenv": noEnv},
	"syscall": {"Getenv": noEnv, "Environ": noEnv, "Setenv": noEnv, "Unsetenv": noEnv, "Clearenv": noEnv},
}

// readsEnv is the one room of floors 0 to 3 that may read the environment: what the operator sets there goes before
// the file, through viper, and the room tells which of the two a value came from.
const readsEnv = "configs"

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
		room := strings.SplitN(filepath.ToSlash(f.path), "/", 2)[0]
		floor, known := floors[room]
		test := strings.HasSuffix(f.path, "_test.go")
		still := known && floor <= 3 && !test
		mode := parser.ImportsOnly
		if still {
			mode = parser.SkipObjectResolution
		}
		file, err := parser.ParseFile(fset, f.path, src, mode)
		if err != nil {
			return nil, err
		}
		if still {
			out = append(out, moves(fset, room, file)...)
		}
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
			if why, bad := quiet[path]; bad && still {
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
				out = append(out,
					fmt.Sprintf("%s: %s (floor %d) imports %s (floor %d): a room imports only from floors below its own", at, room, floor, to, toFloor))
			}
		}
	}
	return out, nil
}

// moves gives a line for each reading of the clock or the environment, and each start of a goroutine. It goes by names:
// a goroutine that a library starts, and a name of a package that a variable hides, are beyond it.
func moves(fset *token.FileSet, room string, file *ast.File) []string {
	var out []string
	say := func(at token.Pos, what, why string) {
		out = append(out, fmt.Sprintf("%s: %s %s: %s", fset.Position(at), room, what, why))
	}
	named := map[string]string{} // the name of a package in this file, and its path
	for _, im := range file.Imports {
		path, _ := strconv.Unquote(im.Path.Value)
		switch {
		case uses[path] == nil:
		case im.Name == nil:
			named[path] = path
		case im.Name.Name == ".":
			say(im.Pos(), "imports "+path+" without its name", "its uses can't be seen then")
		default:
			named[im.Name.Name] = path
		}
	}
	ast.Inspect(file, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.GoStmt:
			say(n.Pos(), "starts a goroutine", noThread)
		case *ast.CallExpr: // sync.WaitGroup, errgroup.Group and their like
			if sel, ok := n.Fun.(*ast.SelectorExpr); ok && sel.Sel.Name == "Go" {
				say(sel.Sel.Pos(), "starts a goroutine with Go", noThread)
			}
		case *ast.SelectorExpr:
			pkg, ok := n.X.(*ast.Ident)
			if !ok {
				break
			}
			path := named[pkg.Name]
			if why := uses[path][n.Sel.Name]; why != "" && (why != noEnv || room != readsEnv) {
				say(n.Pos(), "uses "+path+"."+n.Sel.Name, why)
			}
		}
		return true
	})
	return out
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

// TestFloorsSeeAMove is the same for what is looked for in the code.
func TestFloorsSeeAMove(t *testing.T) {
	const head = "package p\n\nimport (\n\t\"context\"\n\t\"os\"\n\t\"sync\"\n\t\"syscall\"\n\t\"time\"\n)\n\n"
	for name, tc := range map[string]struct{ path, text, want string }{
		"clock": {"fault/bad.go", head + "func f() { _ = time.Now() }",
			"fault/bad.go:11:16: fault uses time.Now: floors 0 to 3 have no clock"},
		"since":           {"audit/bad.go", head + "func f(t time.Time) bool { return time.Since(t) > 0 }", "audit uses time.Since"},
		"clock handed on": {"grant/bad.go", head + "var now = time.Now", "grant uses time.Now"},
		"timer":           {"api/bad.go", head + "func f() { <-time.After(1) }", "api uses time.After"},
		"deadline": {"ledger/bad.go", head + "func f(c context.Context) { context.WithTimeout(c, 1) }",
			"ledger uses context.WithTimeout"},
		"another name": {"seal/bad.go", "package p\n\nimport clock \"time\"\n\nvar _ = clock.Now()", "seal uses time.Now"},
		"no name":      {"seal/bad.go", "package p\n\nimport . \"time\"\n\nvar _ = Now()", "seal imports time without its name"},
		"environment": {"identity/bad.go", head + "var x = os.Getenv(\"X\")",
			"identity uses os.Getenv: floors 0 to 3 have no environment"},
		"environment, lower":  {"fleet/bad.go", head + "var x, _ = syscall.Getenv(\"X\")", "fleet uses syscall.Getenv"},
		"goroutine":           {"ledger/bad.go", head + "func f() { go f() }", "ledger starts a goroutine: floors 0 to 3 have no goroutine"},
		"goroutine in a room": {"api/x/v1/bad.go", head + "func f() { func() { go func() {}() }() }", "api starts a goroutine"},
		"goroutine of a group": {"audit/bad.go", head + "func f(w *sync.WaitGroup) { w.Go(func() {}) }",
			"audit starts a goroutine with Go"},
		"goroutine of a timer":   {"audit/bad.go", head + "var _ = time.AfterFunc", "audit uses time.AfterFunc"},
		"clock of configs":       {"configs/bad.go", head + "var x = time.Now()", "configs uses time.Now"},
		"goroutine of configs":   {"configs/bad.go", head + "func f() { go f() }", "configs starts a goroutine"},
		"environment of configs": {"configs/good.go", head + "var x = os.Getenv(\"X\")", ""},
		"in a test":              {"ledger/good_test.go", head + "func f() { go f(); _, _ = time.Now(), os.Getenv(\"X\") }", ""},
		"in an engine":           {"mesh/good.go", head + "func f() { go f(); _, _ = time.Now(), os.Getenv(\"X\") }", ""},
		"pure": {"ledger/good.go", head + "// time.Now() in words\nfunc f(now time.Time, b struct{ Now func() }) { _ = now.Add(time.Second); " +
			"b.Now(); _ = \"time.Now()\"; _ = os.ErrNotExist }",
			""},
	} {
		t.Run(name, func(t *testing.T) {
			out, err := breaches([]source{{tc.path, tc.text}})
			if err != nil {
				t.Fatal(err)
			}
			got := strings.Join(out, "\n")
			if (tc.want == "" && got != "") || !strings.Contains(got, tc.want) {
				t.Errorf("breaches = %q, want %q", got, tc.want)
			}
			if tc.want != "" && len(out) != 1 {
				t.Errorf("one breach is told %d times: %q", len(out), got)
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
