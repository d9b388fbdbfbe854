// SPDX-License-Identifier: Apache-2.0

// Command lint runs the linters over this module, less the exceptions of a table that may only shrink.
//
// errorlint, sloglint and forbidigo are in this program, which go vet runs for each package; staticcheck and misspell are
// the programs beside it. A row of the table is `FOLDER-or-FILE RULE NUMBER REASON`: at most so many findings of the rule
// there. A finding counts for the longest path that fits. If there are more, they are printed, and lint fails. A row that
// could be lower, or could go, is printed.
package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/tools/go/analysis/unitchecker"
)

type finding struct{ rule, file, at, message string }

func main() {
	for _, arg := range os.Args[1:] {
		if strings.HasPrefix(arg, "-V") || arg == "-flags" || strings.HasSuffix(arg, ".cfg") { // go vet asks
			as, err := analyzers()
			if err != nil {
				fail(err)
			}
			unitchecker.Main(as...)
		}
	}
	if len(os.Args) != 2 {
		fail(errors.New("usage: lint TABLE, in the module's folder"))
	}
	bad, err := run(os.Args[1])
	if err != nil {
		fail(err)
	}
	if bad {
		os.Exit(1)
	}
}

func fail(err error) {
	fmt.Fprintln(os.Stderr, "lint:", err)
	os.Exit(2)
}

func run(table string) (bad bool, err error) {
	rows, err := read(table)
	if err != nil {
		return false, err
	}
	self, err := os.Executable()
	if err != nil {
		return false, err
	}
	beside := func(name string) string { return filepath.Join(filepath.Dir(self), name) }
	var all []finding
	for _, part := range []func() ([]finding, error){
		func() ([]finding, error) { return vet(self) },
		func() ([]finding, error) { return staticcheck(beside("staticcheck")) },
		func() ([]finding, error) { return misspell(beside("misspell")) },
	} {
		found, err := part()
		if err != nil {
			return false, err
		}
		all = append(all, found...)
	}
	return judge(os.Stdout, rows, all), nil
}

// vet runs the analyzers of this program. go vet -json succeeds where there are findings.
func vet(self string) ([]finding, error) {
	out, err := output(exec.Command("go", "vet", "-vettool="+self, "-json", "./..."), 0)
	if err != nil {
		return nil, err
	}
	var found []finding
	for d := json.NewDecoder(bytes.NewReader(out)); ; {
		var packages map[string]map[string]json.RawMessage
		if err := d.Decode(&packages); err != nil {
			if d.InputOffset() >= int64(len(bytes.TrimRight(out, "\n"))) {
				return found, nil
			}
			return nil, fmt.Errorf("go vet -json: %w", err)
		}
		for _, rules := range packages {
			for rule, raw := range rules {
				var list []struct{ Posn, Message string }
				if err := json.Unmarshal(raw, &list); err != nil {
					return nil, fmt.Errorf("%s did not run: %s", rule, raw)
				}
				for _, x := range list {
					file, _, _ := strings.Cut(x.Posn, ":")
					found = add(found, finding{rule, local(file), x.Posn, x.Message})
				}
			}
		}
	}
}

func staticcheck(program string) ([]finding, error) {
	out, err := output(exec.Command(program, "-f", "json", "./..."), 1)
	if err != nil {
		return nil, err
	}
	var found []finding
	for line := range bytes.Lines(out) {
		var x struct {
			Code, Message string
			Location      struct {
				File string
				Line int
			}
		}
		if err := json.Unmarshal(line, &x); err != nil {
			return nil, fmt.Errorf("staticcheck: %w: %s", err, line)
		}
		file := local(x.Location.File)
		found = add(found, finding{x.Code, file, fmt.Sprintf("%s:%d", file, x.Location.Line), x.Message})
	}
	return found, nil
}

func misspell(program string) ([]finding, error) {
	list, err := output(exec.Command("git", "ls-files", "*.go", "*.md", "*.proto", "*.yaml", "*.sh", "Makefile"), 0)
	if err != nil {
		return nil, err
	}
	const format = "{{ .Filename }}:{{ .Line }}\t{{ .Original }} is a misspelling of {{ .Corrected }}"
	out, err := output(exec.Command(program, append([]string{"-f", format}, strings.Fields(string(list))...)...), 0)
	if err != nil {
		return nil, err
	}
	var found []finding
	for line := range strings.Lines(string(out)) {
		at, message, _ := strings.Cut(strings.TrimSpace(line), "\t")
		file, _, _ := strings.Cut(at, ":")
		found = add(found, finding{"misspell", local(file), at, message})
	}
	return found, nil
}

// output runs a program; ok is an exit code that means findings.
func output(cmd *exec.Cmd, ok int) ([]byte, error) {
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) && exit.ExitCode() == ok {
		err = nil
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w\n%s", filepath.Base(cmd.Path), err, stderr.Bytes())
	}
	return out, nil
}

// local is the file's path from here: go vet prints full ones.
func local(file string) string {
	if dir, err := os.Getwd(); err == nil && filepath.IsAbs(file) {
		if rel, err := filepath.Rel(dir, file); err == nil {
			file = rel
		}
	}
	return filepath.ToSlash(file)
}

// add takes a finding once (a package and its test variant both have it), and where the rule holds.
func add(found []finding, f finding) []finding {
	f.at = strings.TrimPrefix(f.at, "./")
	if i := strings.Index(f.at, f.file); i > 0 {
		f.at = f.at[i:]
	}
	if f.rule == "forbidigo" {
		if f.rule = "time.Sleep"; strings.Contains(f.message, "context.") {
			f.rule = "context.Background"
		}
	}
	if slices.Contains(found, f) || !holds(f.rule, f.file) {
		return found
	}
	return append(found, f)
}

// holds reports whether a rule is for this file.
func holds(rule, file string) bool {
	test := strings.HasSuffix(file, "_test.go")
	switch rule {
	case "time.Sleep": // in a bubble time is not real
		b, err := os.ReadFile(file)
		return err != nil || !bytes.Contains(b, []byte(`"testing/synctest"`))
	case "context.Background":
		room, _, _ := strings.Cut(file, "/")
		return !test && slices.Contains([]string{"daemon", "mesh", "raft", "ingress", "workload", "telemetry"}, room)
	case "sloglint":
		return !test
	}
	return !strings.HasSuffix(file, ".pb.go") && !strings.HasSuffix(file, ".connect.go")
}

type row struct {
	path, rule string
	most, n    int
}

func read(table string) ([]row, error) {
	b, err := os.ReadFile(table)
	if err != nil {
		return nil, err
	}
	var rows []row
	for i, line := range strings.Split(string(b), "\n") {
		f := strings.Fields(line)
		if len(f) == 0 || f[0][0] == '#' {
			continue
		}
		if len(f) < 4 {
			return nil, fmt.Errorf("%s:%d: want a path, a rule, a number and a reason", table, i+1)
		}
		n, err := strconv.Atoi(f[2])
		if err != nil || n < 1 {
			return nil, fmt.Errorf("%s:%d: %q is not a number from 1", table, i+1, f[2])
		}
		rows = append(rows, row{path: f[0], rule: f[1], most: n})
	}
	return rows, nil
}

// judge prints what no row allows, and reports whether there is any.
func judge(out io.Writer, rows []row, all []finding) (bad bool) {
	of := map[int][]finding{}
	for _, f := range all {
		best := -1
		for i, r := range rows {
			fits := r.rule == f.rule && (f.file == r.path || strings.HasPrefix(f.file, r.path+"/"))
			if fits && (best < 0 || len(r.path) > len(rows[best].path)) {
				best = i
			}
		}
		of[best] = append(of[best], f)
	}
	for i := -1; i < len(rows); i++ {
		list := of[i]
		slices.SortFunc(list, func(a, b finding) int { return strings.Compare(a.at, b.at) })
		switch {
		case i < 0 || len(list) > rows[i].most:
			for _, f := range list {
				fmt.Fprintf(out, "%s: %s (%s)\n", f.at, f.message, f.rule)
				bad = true
			}
			if i >= 0 {
				fmt.Fprintf(out, "%s %s: %d, and the table allows %d\n", rows[i].path, rows[i].rule, len(list), rows[i].most)
			}
		case len(list) == 0:
			fmt.Fprintf(out, "%s %s: there is none any more: delete the row\n", rows[i].path, rows[i].rule)
		case len(list) < rows[i].most:
			fmt.Fprintf(out, "%s %s: lower %d to %d\n", rows[i].path, rows[i].rule, rows[i].most, len(list))
		}
	}
	return bad
}
