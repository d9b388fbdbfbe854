// SPDX-License-Identifier: Apache-2.0

package demarc_test

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"
)

// The limits. What is over them today is in testdata/shape.txt.
const (
	mostMethods = 25   // of a type
	mostFields  = 15   // of a struct; an embedded one counts as one
	mostLines   = 3500 // of a room, without tests and generated code
	mostColumns = 140  // of a line, in runes, tests included; a tab is one
)

// measure is one number about the source, and its limit.
type measure struct {
	key   string // "ROOM.Type methods", "ROOM.Type fields", "ROOM lines" or "AREA columns" (lines that are too long)
	n     int
	limit int
	at    string // where to look
}

// shape counts methods, fields, lines and long lines.
func shape(files []source) ([]measure, error) {
	type named struct {
		methods map[string]bool
		fields  int
		at      string
	}
	types, lines, long, longAt := map[string]*named{}, map[string]int{}, map[string]int{}, map[string]string{}
	get := func(room, name string) *named {
		key := room + "." + name
		if types[key] == nil {
			types[key] = &named{methods: map[string]bool{}, at: room}
		}
		return types[key]
	}
	fset := token.NewFileSet()
	for _, f := range files {
		text := f.text
		if text == "" {
			b, err := os.ReadFile(f.path)
			if err != nil {
				return nil, err
			}
			text = string(b)
		}
		if generated(f.path) {
			continue
		}
		room := path.Dir(filepath.ToSlash(f.path))
		for i, line := range strings.Split(text, "\n") {
			if utf8.RuneCountInString(line) > mostColumns {
				long[area(f.path)]++
				longAt[area(f.path)] = fmt.Sprintf("%s:%d", f.path, i+1)
			}
		}
		if strings.HasSuffix(f.path, "_test.go") {
			continue
		}
		lines[room] += strings.Count(text, "\n")
		file, err := parser.ParseFile(fset, f.path, text, parser.SkipObjectResolution)
		if err != nil {
			return nil, err
		}
		for _, d := range file.Decls {
			switch d := d.(type) {
			case *ast.FuncDecl:
				if d.Recv != nil {
					get(room, receiver(d.Recv.List[0].Type)).methods[d.Name.Name] = true
				}
			case *ast.GenDecl:
				for _, s := range d.Specs {
					s, ok := s.(*ast.TypeSpec)
					if !ok {
						continue
					}
					x := get(room, s.Name.Name)
					x.at = fset.Position(s.Pos()).String()
					switch u := s.Type.(type) {
					case *ast.StructType:
						for _, field := range u.Fields.List {
							x.fields += max(1, len(field.Names))
						}
					case *ast.InterfaceType:
						for _, m := range u.Methods.List {
							for _, name := range m.Names {
								x.methods[name.Name] = true
							}
						}
					}
				}
			}
		}
	}
	var out []measure
	for _, key := range slices.Sorted(maps.Keys(types)) {
		x := types[key]
		if !free(key) {
			out = append(out, measure{key + " methods", len(x.methods), mostMethods, x.at}, measure{key + " fields", x.fields, mostFields, x.at})
		}
	}
	for _, room := range slices.Sorted(maps.Keys(lines)) {
		out = append(out, measure{room + " lines", lines[room], mostLines, room})
	}
	for _, a := range slices.Sorted(maps.Keys(long)) {
		out = append(out, measure{a + " columns", long[a], 0, longAt[a]})
	}
	return out, nil
}

// area is the folder that long lines and words are counted by: a top folder, or a role below daemon or cmd.
func area(file string) string {
	parts := strings.Split(filepath.ToSlash(file), "/")
	switch {
	case len(parts) == 1:
		return "."
	case (parts[0] == "daemon" || parts[0] == "cmd") && len(parts) > 2:
		return parts[0] + "/" + parts[1]
	}
	return parts[0]
}

func generated(path string) bool {
	return strings.HasSuffix(path, ".pb.go") || strings.HasSuffix(path, ".connect.go")
}

// free reports whether a type may be as large as it is: configuration, and the state of a book.
func free(key string) bool {
	room, name, _ := strings.Cut(key, ".")
	return strings.HasSuffix(name, "Config") || strings.HasSuffix(name, "Options") || name == "State" && strings.HasPrefix(room, "daemon/")
}

func receiver(x ast.Expr) string {
	switch x := x.(type) {
	case *ast.StarExpr:
		return receiver(x.X)
	case *ast.IndexExpr:
		return receiver(x.X)
	case *ast.IndexListExpr:
		return receiver(x.X)
	case *ast.Ident:
		return x.Name
	}
	return "?"
}

// over returns a line for each measure that is over its limit, and over what the table allows, and all that are over the limit.
func (r ratchet) over(all []measure) ([]string, map[string]int) {
	var out []string
	found := map[string]int{}
	for _, m := range all {
		if m.n <= m.limit {
			continue
		}
		found[m.key] = m.n
		if most := r.most(m.key); m.n > max(most, m.limit) {
			out = append(out, fmt.Sprintf("%s: %q is %d, and %d is the most (the limit is %d, exceptions are in %s)",
				m.at, m.key, m.n, max(most, m.limit), m.limit, r.path))
		}
	}
	return out, found
}

func TestShape(t *testing.T) {
	r, err := readRatchet("testdata/shape.txt", 2)
	if err != nil {
		t.Fatal(err)
	}
	all, err := shape(goFiles(t))
	if err != nil {
		t.Fatal(err)
	}
	bad, found := r.over(all)
	for _, line := range bad {
		t.Error(line)
	}
	r.finish(t, found, 2)
}

// TestShapeSeesABreach keeps the test above honest.
func TestShapeSeesABreach(t *testing.T) {
	methods := func(n int) string {
		var b strings.Builder
		for i := range n {
			fmt.Fprintf(&b, "func (t *T) M%d() {}\n", i)
		}
		return b.String()
	}
	fields := func(name string, n int) string {
		var b strings.Builder
		for i := range n {
			fmt.Fprintf(&b, "\tf%d int\n", i)
		}
		return fmt.Sprintf("type %s struct {\n%s}\n", name, b.String())
	}
	const head = "package p\n\n"
	generic := strings.ReplaceAll(methods(26), "*T", "*T[K]")
	others := strings.ReplaceAll(methods(5), "M", "N")
	signatures := strings.NewReplacer("func (t *T) ", "", " {}", "").Replace(methods(26))
	blank := func(n int) string { return head + strings.Repeat("\n", n) }
	for name, tc := range map[string]struct {
		files []source
		want  string
	}{
		"as many methods":  {[]source{{"x/a.go", head + "type T int\n" + methods(25)}}, ""},
		"methods":          {[]source{{"x/a.go", head + "type T int\n" + methods(26)}}, `x/a.go:3:6: "x.T methods" is 26, and 25 is the most`},
		"methods, generic": {[]source{{"x/a.go", head + "type T[K any] struct{}\n" + generic}}, `"x.T methods" is 26`},
		"methods, two files": {[]source{{"x/a.go", head + "type T int\n" + methods(20)}, {"x/b.go", head + "func (T) A() {}\n" + others}},
			`"x.T methods" is 26`},
		"one for each system": {[]source{{"x/a.go", head + "type T int\n" + methods(20)}, {"x/a_linux.go", head + methods(20)}},
			""},
		"methods, allowed":   {[]source{{"y/a.go", head + "type T int\n" + methods(30)}}, ""},
		"methods, too many":  {[]source{{"y/a.go", head + "type T int\n" + methods(31)}}, `"y.T methods" is 31, and 30 is the most`},
		"methods of a test":  {[]source{{"x/a_test.go", head + "type T int\n" + methods(26)}}, ""},
		"interface":          {[]source{{"x/a.go", head + "type I interface {\n" + signatures + "}\n"}}, `"x.I methods" is 26`},
		"as many fields":     {[]source{{"x/a.go", head + fields("T", 15)}}, ""},
		"fields":             {[]source{{"x/a.go", head + fields("T", 16)}}, `"x.T fields" is 16, and 15 is the most`},
		"fields, one line":   {[]source{{"x/a.go", head + strings.Replace(fields("T", 14), "f0 int", "f0, g, h int", 1)}}, `"x.T fields" is 16`},
		"embedded":           {[]source{{"x/a.go", head + strings.Replace(fields("T", 16), "f0 int", "sync.Mutex", 1)}}, `"x.T fields" is 16`},
		"options":            {[]source{{"x/a.go", head + fields("DialOptions", 16)}}, ""},
		"configuration":      {[]source{{"x/a.go", head + fields("Config", 16)}}, ""},
		"state of a book":    {[]source{{"daemon/x/a.go", head + fields("State", 16)}}, ""},
		"state of an engine": {[]source{{"mesh/a.go", head + fields("State", 16)}}, `"mesh.State fields" is 16`},
		"generated":          {[]source{{"x/a.pb.go", head + fields("T", 16)}}, ""},
		"a room":             {[]source{{"x/a.go", blank(3498)}}, ""},
		"a large room": {[]source{{"x/a.go", blank(3400)}, {"x/b.go", blank(97)}},
			`x: "x lines" is 3501, and 3500 is the most`},
		"tests of a room": {[]source{{"x/a_test.go", blank(4000)}}, ""},
		"a line":          {[]source{{"x/a.go", head + "//" + strings.Repeat("é", 138)}}, ""},
		"a long line": {[]source{{"x/a_test.go", head + "//" + strings.Repeat("é", 139)}},
			`x/a_test.go:3: "x columns" is 1, and 0 is the most`},
	} {
		t.Run(name, func(t *testing.T) {
			all, err := shape(tc.files)
			if err != nil {
				t.Fatal(err)
			}
			out, _ := ratchet{rows: []row{{"y.T methods", 30, ""}}}.over(all)
			got := strings.Join(out, "\n")
			if (tc.want == "" && got != "") || !strings.Contains(got, tc.want) || len(out) > 1 {
				t.Errorf("over = %q, want %q", got, tc.want)
			}
		})
	}
}
