// SPDX-License-Identifier: Apache-2.0

// Command vuln runs govulncheck over this module with a database that is pinned as a Go module, and reaches nothing else.
//
// What is called and known to be vulnerable must be in the table of a page, and what is in the table must still be found:
//
//	vuln PAGE
//
// A row of the table begins with `| GO-YEAR-NUMBER |`.
package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"
)

func main() {
	if len(os.Args) != 2 {
		fail(errors.New("usage: vuln PAGE, in the module's folder"))
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
	fmt.Fprintln(os.Stderr, "vuln:", err)
	os.Exit(2)
}

func run(page string) (bad bool, err error) {
	text, err := os.ReadFile(page)
	if err != nil {
		return false, err
	}
	source, version, err := module()
	if err != nil {
		return false, err
	}
	dir, err := os.MkdirTemp("", "vuln-")
	if err != nil {
		return false, err
	}
	defer os.RemoveAll(dir)
	day := version
	if p := strings.Split(version, "-"); len(p) == 3 {
		if at, err := time.Parse("20060102150405", p[1]); err == nil {
			day = at.Format(time.DateOnly)
		}
	}
	n, err := layout(dir, filepath.Join(source, "data", "osv"))
	if err != nil {
		return false, err
	}
	self, err := os.Executable()
	if err != nil {
		return false, err
	}
	cmd := exec.Command(filepath.Join(filepath.Dir(self), "govulncheck"), "-db", "file://"+dir, "-format", "json", "./...")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return false, fmt.Errorf("govulncheck: %w\n%s", err, stderr.Bytes())
	}
	found, err := called(bytes.NewReader(out))
	if err != nil {
		return false, err
	}
	lines := compare(found, listed(string(text)), page)
	for _, line := range lines {
		fmt.Println(line)
	}
	fmt.Printf("%d reports of %s; %d are of what is called\n", n, day, len(found))
	return len(lines) > 0, nil
}

// module downloads the database by its version and checksum, or takes it from the module cache.
func module() (dir, version string, err error) {
	cmd := exec.Command("go", "mod", "download", "-C", "tools/vulndb", "-json", "golang.org/x/vulndb")
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		return "", "", fmt.Errorf("go mod download: %w\n%s", err, out)
	}
	var m struct{ Dir, Version string }
	err = json.Unmarshal(out, &m)
	return m.Dir, m.Version, err
}

// layout makes in dir what govulncheck reads, of the reports in osv, and returns how many there are.
func layout(dir, osv string) (int, error) {
	type vuln struct {
		ID       string   `json:"id"`
		Modified string   `json:"modified"`
		Aliases  []string `json:"aliases,omitempty"`
	}
	type of struct {
		Path  string `json:"path"`
		Vulns []vuln `json:"vulns"`
	}
	files, err := filepath.Glob(filepath.Join(osv, "*.json"))
	if err != nil {
		return 0, err
	}
	if len(files) < 1000 {
		return 0, fmt.Errorf("%s has %d reports: is this the database?", osv, len(files))
	}
	var vulns []vuln
	modules := map[string]*of{}
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			return 0, err
		}
		var report struct {
			vuln
			Withdrawn string
			Affected  []struct {
				Package struct{ Name string }
			}
		}
		if err := json.Unmarshal(b, &report); err != nil {
			return 0, fmt.Errorf("%s: %w", f, err)
		}
		if report.Withdrawn != "" {
			continue
		}
		vulns = append(vulns, report.vuln)
		for _, a := range report.Affected {
			m := modules[a.Package.Name]
			if m == nil {
				m = &of{Path: a.Package.Name}
				modules[a.Package.Name] = m
			}
			// No "fixed" here: govulncheck reads the report, and its ranges of versions.
			if v := (vuln{ID: report.ID, Modified: report.Modified}); !slices.ContainsFunc(m.Vulns, func(o vuln) bool { return o.ID == v.ID }) {
				m.Vulns = append(m.Vulns, v)
			}
		}
	}
	var list []*of
	for _, path := range slices.Sorted(maps.Keys(modules)) {
		list = append(list, modules[path])
	}
	if err := os.Mkdir(filepath.Join(dir, "index"), 0o755); err != nil {
		return 0, err
	}
	for name, v := range map[string]any{
		"db": map[string]string{"modified": "0001-01-01T00:00:00Z"}, "modules": list, "vulns": vulns,
	} {
		b, err := json.Marshal(v)
		if err != nil {
			return 0, err
		}
		if err := os.WriteFile(filepath.Join(dir, "index", name+".json"), b, 0o644); err != nil {
			return 0, err
		}
	}
	return len(vulns), os.Symlink(osv, filepath.Join(dir, "ID"))
}

// finding is a vulnerable function that is called, and where it is mended.
type finding struct{ function, fixed string }

// called reads the messages of govulncheck and returns one finding for each report whose functions are called.
func called(messages io.Reader) (map[string]finding, error) {
	found := map[string]finding{}
	for d := json.NewDecoder(messages); ; {
		var m struct {
			Finding *struct {
				OSV          string `json:"osv"`
				FixedVersion string `json:"fixed_version"`
				Trace        []struct{ Module, Version, Package, Receiver, Function string }
			}
		}
		if err := d.Decode(&m); errors.Is(err, io.EOF) {
			return found, nil
		} else if err != nil {
			return nil, fmt.Errorf("govulncheck's messages: %w", err)
		}
		if f := m.Finding; f != nil && len(f.Trace) > 0 && f.Trace[0].Function != "" {
			at := f.Trace[0]
			name := at.Package + "." + strings.TrimPrefix(at.Receiver+"."+at.Function, ".")
			if old, ok := found[f.OSV]; !ok || name < old.function {
				found[f.OSV] = finding{name + " of " + at.Module + " " + at.Version, f.FixedVersion}
			}
		}
	}
}

var rowOf = regexp.MustCompile(`(?m)^\| *(GO-\d{4}-\d+) *\|`)

func listed(page string) []string {
	var ids []string
	for _, m := range rowOf.FindAllStringSubmatch(page, -1) {
		ids = append(ids, m[1])
	}
	return ids
}

// compare returns one line for each report that is found and not listed, or listed and not found.
func compare(found map[string]finding, ids []string, page string) []string {
	var out []string
	for _, id := range slices.Sorted(maps.Keys(found)) {
		if f := found[id]; !slices.Contains(ids, id) {
			out = append(out, fmt.Sprintf("%s: %s is called, fixed in %q: update it, or give it a row in %s", id, f.function, f.fixed, page))
		}
	}
	for _, id := range ids {
		if _, ok := found[id]; !ok {
			out = append(out, fmt.Sprintf("%s: it is in %s and no longer found: delete its row", id, page))
		}
	}
	return out
}
