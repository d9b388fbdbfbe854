// SPDX-License-Identifier: Apache-2.0

package operation_test

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/operation"
)

// What a file of YAML may not do, each refused with a sentence that leads to the place.
func TestTemplateFiles(t *testing.T) {
	swap := func(old, new string) string {
		s := strings.Replace(good, old, new, 1)
		if s == good {
			t.Fatalf("%q is not in the template", old)
		}
		return s
	}
	bomb := "version: demarc-template/1\nname: &a [x, x, x, x, x, x, x, x]\n"
	for c := 'b'; c < 'k'; c++ {
		bomb += fmt.Sprintf("v%c: &%c [%s*%c]\n", c, c, strings.Repeat(fmt.Sprintf("*%c, ", c-1), 8), c-1)
	}
	for name, c := range map[string]struct{ file, want string }{
		"empty":                 {"", "is empty"},
		"only a comment":        {"# nothing\n", "is empty"},
		"unknown key":           {swap("kind: exec", "kind: exec\ncolour: red"), "line 5: field colour is not a key of a template"},
		"unknown key of a var":  {swap("optional: true", "optional: true, colour: red"), "line 10: field colour"},
		"double key":            {swap("kind: exec", "kind: exec\nkind: exec"), "line 5: mapping key"},
		"double variable":       {swap("  limit:", "  section: {type: int}\n  limit:"), "line 10: mapping key"},
		"alias bomb":            {bomb, "line 2: anchors and aliases"},
		"alias":                 {swap("timeout: 10s", "timeout: &x 10s") + "x: *x\n", "anchors and aliases"},
		"merge key":             {swap("timeout: 10s", "<<: {timeout: 10s}"), "line 12: merge keys"},
		"binary":                {swap("about: shows the state of the store", "about: !!binary aGVsbG8="), "line 3: tags"},
		"tag":                   {swap("name: state", "name: !env state"), "line 2: tags"},
		"null argument":         {swap("bin/store, state,", "bin/store, ~,"), "line 7: a value is missing"},
		"key without value":     {swap("service: store", "service:"), "line 5: a value is missing"},
		"octal":                 {swap("65536", "010"), "line 13: 010: write a whole number"},
		"hexadecimal":           {swap("65536", "0xff"), "line 13: 0xff: write a whole number"},
		"fraction":              {swap("65536", "65536.9"), "line 13: 65536.9: write a whole number"},
		"negative":              {swap("65536", "-1"), "write a whole number"},
		"more than 64 MiB":      {swap("65536", "67108865"), "output 67108865"},
		"deep":                  {swap("bin/store, state,", strings.Repeat("[", 40)+strings.Repeat("]", 40)+","), "nested too deep"},
		"very deep":             {strings.Repeat("[", 20000), "not YAML"},
		"a list":                {"[1, 2]", "cannot unmarshal"},
		"a word":                {"hello", "cannot unmarshal"},
		"another shape":         {swap("{network: true}", "[network]"), "cannot unmarshal !!seq into Effects"},
		"second document":       {good + "---\na: b\n", "one YAML document"},
		"broken after":          {good + "---\n{", "one YAML document"},
		"UTF-16":                {"\xff\xfev\x00:\x00", "not UTF-8"},
		"escape sequence":       {swap("about: shows the state of the store", `about: "harmless \e[2J"`), "about: say"},
		"turned text":           {swap("about: shows the state of the store", `about: "\u202Eharmless"`), "about: say"},
		"invisible argument":    {swap("bin/store, state,", `bin/store, "sta\u200Bte",`), "no invisible characters"},
		"NUL argument":          {swap("bin/store, state,", `bin/store, "sta\0te",`), "no invisible characters"},
		"nested placeholder":    {swap("${section}", "${sec${tion}}"), "is not among vars"},
		"empty placeholder":     {swap("${section}", "${}"), "is not among vars"},
		"open placeholder":      {swap("${section}", "${section} ${"), "without its }"},
		"option by value":       {swap("--limit=${limit}", "--${limit}"), "a value would choose the option"},
		"short option by value": {swap("--limit=${limit}", "-${limit}"), "a value would choose the option"},
		"end of option's name":  {swap("--limit=${limit}", "--lim${limit}"), "a value would choose the option"},
		"option left alone":     {swap(`"--limit=${limit}"`, `--limit, "${limit}"`), "left out, it would leave \"--limit\""},
		"shell script":          {swap("[bin/store, state,", "[/bin/sh, -c, \"ls ${section}\","), "argv 2: a shell would read"},
		"shell script later": {swap("[bin/store, state,", "[env, A=b, bash, -eu, -o, pipefail, -xc, \"ls ${section}\","),
			"argv 7: a shell would read"},
		"shell script after --": {swap("[bin/store, state,", "[sh, -c, --, \"ls ${section}\","), "argv 3: a shell would read"},
		"writes beside":         {swap("operate.read", "operate.write"), ""},
		"writes upwards": {strings.Replace(swap("operate.read", "operate.write"), "{network: true}", "{writes: [/data/../etc]}", 1),
			"effects.writes"},
		"writes everywhere": {strings.Replace(swap("operate.read", "operate.write"), "{network: true}", "{writes: [//]}", 1), "effects.writes"},
		"writes relative":   {strings.Replace(swap("operate.read", "operate.write"), "{network: true}", "{writes: [data]}", 1), "effects.writes"},
	} {
		_, err := operation.ParseTemplate([]byte(c.file))
		switch {
		case c.want == "" && err != nil:
			t.Errorf("%s: %v", name, err)
		case c.want != "" && (!errors.Is(err, fault.Invalid) || !strings.Contains(fault.Text(err), c.want)):
			t.Errorf("%s: %v, want %q", name, err, c.want)
		case err != nil && strings.Contains(fault.Text(err), "operation."):
			t.Errorf("%s: the sentence names a type of the program: %s", name, fault.Text(err))
		}
	}
}

// A shell may be given values, as its arguments.
func TestShellGetsValuesAsArguments(t *testing.T) {
	text := strings.Replace(good, "[bin/store, state, --section,", `[sh, -c, "cat -- \"$1\"", sh,`, 1)
	tpl, err := operation.ParseTemplate([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	got, err := tpl.Argv(map[string]string{"section": "notes"})
	if want := []string{"sh", "-c", `cat -- "$1"`, "sh", "notes"}; err != nil || !slices.Equal(got, want) {
		t.Fatalf("%q, %v", got, err)
	}
}

// A pattern is about the whole value, however it is written.
func TestPatterns(t *testing.T) {
	for _, c := range []struct {
		pattern    string
		yes, no    []string
		isRejected bool
	}{
		{pattern: `^a|b$`, yes: []string{"a", "b"}, no: []string{"ax", "xb", "ab"}},
		{pattern: `^(?m)^a$$`, yes: []string{"a"}, no: []string{"a\nb", "b\na"}},
		{pattern: `^(?m:^a$)$`, yes: []string{"a"}, no: []string{"a\nb", "a\n"}},
		{pattern: `^[a-z]+$`, yes: []string{"abc"}, no: []string{"", "abc\n", "\nabc", "a\nb", "ab c"}},
		{pattern: `^[^;]*$`, yes: []string{"a\nb", ""}, no: []string{"a;b", "a\x1b[2J", "a\u202eb", "a\x00", "\xff", "a\rb"}},
		{pattern: `^[^;\n]*$`, yes: []string{"$(reboot)", "`x`", "a b", "${limit}"}, no: []string{"a\nb", "\xff\xfe"}},
		{pattern: `^.*$`, isRejected: true}, // FAULTS.md A17: what takes anything is no pattern
		{pattern: `^.+$`, isRejected: true},
		{pattern: `^(?s).*$`, isRejected: true},
		{pattern: `^(?s:.{0,40})$`, isRejected: true},
		{pattern: `^.{8}$`, isRejected: true},
		{pattern: `^[\s\S]*$`, isRejected: true},
		{pattern: `^[^\n]+$`, isRejected: true},
		{pattern: `^(?:[a-z]+|.*)$`, isRejected: true},
		{pattern: `^\PN*\pN*\PN*$`, isRejected: true},
		{pattern: `^[^x]*$`, isRejected: true},
		{pattern: `^[ -~]{1,64}$`, yes: []string{"a b", "x;y"}, no: []string{"\u00e9"}},
		{pattern: `^a$)|(?:b$`, isRejected: true},
		{pattern: `^\Qa$`, isRejected: true},
		{pattern: `^a\$`, isRejected: true},
		{pattern: `a`, isRejected: true},
		{pattern: `\Aa\z`, isRejected: true},
		{pattern: `^(?:(?:a{1000}){1000}){1000}$`, isRejected: true},
		{pattern: `^` + strings.Repeat("a?", 300) + `$`, isRejected: true},
		{pattern: `^(?=a)$`, isRejected: true},
	} {
		tpl := operation.Template{Version: operation.TemplateVersion, Name: "p", About: "x", Kind: operation.KindScript, Tier: "operate.read",
			Run: []string{"x", "--v=${v}"}, Vars: map[string]operation.Var{"v": {Type: operation.TypeString, Pattern: c.pattern}}, Timeout: "1s"}
		if err := tpl.Check(); (err != nil) != c.isRejected {
			t.Errorf("%s: %v", c.pattern, err)
		}
		for _, v := range c.yes {
			if got, err := tpl.Argv(map[string]string{"v": v}); err != nil || got[1] != "--v="+v {
				t.Errorf("%s: %q: %q, %v", c.pattern, v, got, err)
			}
		}
		for _, v := range c.no {
			if got, err := tpl.Argv(map[string]string{"v": v}); !errors.Is(err, fault.Invalid) {
				t.Errorf("%s: %q was taken: %q", c.pattern, v, got)
			}
		}
	}
}

// Two values that stand together can't begin an option together either.
func TestNoOptionOutOfTwoValues(t *testing.T) {
	tpl := operation.Template{Version: operation.TemplateVersion, Name: "p", About: "x", Kind: operation.KindScript, Tier: "operate.read",
		Timeout: "1s",
		Run:     []string{"x", "${a}${b}", "-n${b}"}, Vars: map[string]operation.Var{"a": {Type: operation.TypeString, Pattern: "^[^é]*$"},
			"b": {Type: operation.TypeString, Pattern: "^[^é]*$"}}}
	for _, v := range []map[string]string{{"a": "", "b": "-x"}, {"a": "-", "b": "x"}, {"a": "--", "b": ""}} {
		if got, err := tpl.Argv(v); err == nil {
			t.Errorf("%q: %q", v, got)
		}
	}
	if got, err := tpl.Argv(map[string]string{"a": "x", "b": "-1"}); err != nil || got[1] != "x-1" || got[2] != "-n-1" {
		t.Errorf("%q, %v", got, err)
	}
}

func TestArgvIsBounded(t *testing.T) {
	tpl := operation.Template{Version: operation.TemplateVersion, Name: "p", About: "x", Kind: operation.KindScript, Tier: "operate.read",
		Timeout: "1s",
		Run:     []string{"x"}, Vars: map[string]operation.Var{"v": {Type: operation.TypeString, Pattern: "^<*$", Max: operation.MaxValue}}}
	fill := func(n int) error {
		tpl.Run = append([]string{"x"}, slices.Repeat([]string{"${v}"}, n)...)
		argv, err := tpl.Argv(map[string]string{"v": strings.Repeat("<", operation.MaxValue)})
		if err != nil {
			return err
		}
		// The longest command there is, in its longest spelling, fits the documents that carry it.
		req := sealed(t, request(), operator)
		a := approval(req)
		a.Argv = argv
		app := sealed(t, a, customer)
		r := result(req, app)
		r.Argv = argv
		_, err = operation.VerifyChain(req, app, sealed(t, r, box), nil, keys(t))
		return err
	}
	if err := fill(15); err != nil {
		t.Errorf("60 KiB: %v", err)
	}
	if err := fill(16); !errors.Is(err, fault.Invalid) {
		t.Errorf("64 KiB and one byte: %v", err)
	}
}

// Whatever the values are: the program stays, no argument is added, none turns into an option, and a value stays within
// the arguments that name it.
func TestArgvHolds(t *testing.T) {
	tpl := operation.Template{Version: operation.TemplateVersion, Name: "p", About: "x", Kind: operation.KindScript, Tier: "operate.read",
		Timeout: "1s",
		Run:     []string{"tool", "literal", "${a}", "--b=${b}", "${a}:${b}"}, Vars: map[string]operation.Var{
			"a": {Type: operation.TypeString, Pattern: `^[^é]*$`}, "b": {Type: operation.TypeString, Pattern: `^[^é]*$`, Optional: true}}}
	if err := tpl.Check(); err != nil {
		t.Fatal(err)
	}
	value := rapid.OneOf(rapid.String(),
		rapid.SampledFrom([]string{"", "-", "--b=x", "${a}", "${b}", "$", "a b", "a\nb", "'; rm -rf /", "\x00"}))
	took := 0
	rapid.Check(t, func(t *rapid.T) {
		vars := map[string]string{"a": value.Draw(t, "a")}
		with := rapid.Bool().Draw(t, "with b")
		if with {
			vars["b"] = value.Draw(t, "b")
		}
		argv, err := tpl.Argv(vars)
		if err != nil {
			return
		}
		took++
		want := []string{"tool", "literal", vars["a"]}
		if with {
			want = append(want, "--b="+vars["b"], vars["a"]+":"+vars["b"])
		}
		if !slices.Equal(argv, want) || strings.HasPrefix(argv[2], "-") {
			t.Fatalf("%q, want %q", argv, want)
		}
	})
	if took == 0 {
		t.Fatal("no value was ever taken: the test shows nothing")
	}
}

// What a template says is in its digest: no field can be changed without it.
func TestDigestCoversTheTemplate(t *testing.T) {
	tpl, err := operation.ParseTemplate([]byte(good))
	if err != nil {
		t.Fatal(err)
	}
	seen := map[string]bool{string(tpl.Digest()): true}
	for _, c := range [][2]string{
		{"name: state", "name: stats"}, {"about: shows", "about: Shows"}, {"service: store", "service: web"}, {"operate.read", "operate.admin"},
		{"bin/store, state,", "bin/store, stats,"}, {"summary|notes", "summary|note"}, {"type: int", "type: bool"}, {", optional: true", ""},
		{"network: true", "network: false"}, {"network: true", "credentials: true"}, {"10s", "11s"}, {"65536", "65537"},
		{"optional: true", "optional: true, max: 5"}, {"optional: true", "optional: true, about: how many"},
	} {
		other, err := operation.ParseTemplate([]byte(strings.Replace(good, c[0], c[1], 1)))
		if err != nil {
			t.Errorf("%v: %v", c, err)
			continue
		}
		if d := string(other.Digest()); seen[d] {
			t.Errorf("%v: the digest is not another one", c)
		} else {
			seen[d] = true
		}
	}
}

func TestTemplateLimits(t *testing.T) {
	whole := func() operation.Template {
		return operation.Template{Version: operation.TemplateVersion, Name: "p", About: "x", Kind: operation.KindScript, Tier: "operate.write",
			Timeout: "1s",
			Run:     []string{"x", "${v}"}, Vars: map[string]operation.Var{"v": {Type: operation.TypeInt}}}
	}
	if err := whole().Check(); err != nil {
		t.Fatal(err)
	}
	one := func(v operation.Var) func(*operation.Template) {
		return func(x *operation.Template) { x.Vars = map[string]operation.Var{"v": v} }
	}
	for name, c := range map[string]struct {
		f    func(*operation.Template)
		want string
	}{
		"no argv":        {func(x *operation.Template) { x.Run = nil }, "argv: give"},
		"empty program":  {func(x *operation.Template) { x.Run = []string{"", "${v}"} }, "argv: give"},
		"many arguments": {func(x *operation.Template) { x.Run = append(x.Run, make([]string, 256)...) }, "argv: give"},
		"long argument":  {func(x *operation.Template) { x.Run = append(x.Run, strings.Repeat("x", 8<<10+1)) }, "argv 2: at most"},
		"many variables": {func(x *operation.Template) {
			for n := range 65 {
				name := fmt.Sprintf("v%d", n)
				x.Vars[name], x.Run = operation.Var{Type: operation.TypeInt}, append(x.Run, "${"+name+"}")
			}
		}, "vars: at most 64"},
		"variable's name": {func(x *operation.Template) {
			x.Run, x.Vars = []string{"x", "${V}"}, map[string]operation.Var{"V": {Type: operation.TypeInt}}
		}, `vars "V": use lower-case`},
		"variable's type":  {one(operation.Var{Type: "float"}), "use string, int or bool"},
		"variable's about": {one(operation.Var{Type: operation.TypeInt, About: "\x1b"}), "about and pattern"},
		"pattern hides":    {one(operation.Var{Type: operation.TypeString, Pattern: "^\u202ea$"}), "about and pattern"},
		"negative max":     {one(operation.Var{Type: operation.TypeInt, Max: -1}), "max -1"},
		"large max":        {one(operation.Var{Type: operation.TypeInt, Max: operation.MaxValue + 1}), "max 4097"},
		"many writes": {func(x *operation.Template) { x.Effects.Writes = slices.Repeat([]string{"/data"}, 65) },
			"effects.writes: at most 64"},
		"long about":      {func(x *operation.Template) { x.About = strings.Repeat("x", 2049) }, "about: say"},
		"negative output": {func(x *operation.Template) { x.Output = -1 }, "output -1"},
		"kind":            {func(x *operation.Template) { x.Kind = "shell" }, `kind "shell"`},
	} {
		tpl := whole()
		c.f(&tpl)
		if err := tpl.Check(); !errors.Is(err, fault.Invalid) || !strings.Contains(fault.Text(err), c.want) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
		if argv, err := tpl.Argv(map[string]string{"v": "1"}); err == nil {
			t.Errorf("%s: a command was made of it: %q", name, argv)
		}
	}
	padded := good + "#" + strings.Repeat("x", operation.MaxTemplate-len(good)-1)
	if _, err := operation.ParseTemplate([]byte(padded)); err != nil {
		t.Errorf("64 KiB: %v", err)
	}
	if _, err := operation.ParseTemplate([]byte(padded + "x")); !errors.Is(err, fault.Invalid) {
		t.Errorf("64 KiB and one byte: %v", err)
	}
}

func TestTypesOfValues(t *testing.T) {
	for _, c := range []struct {
		v       operation.Var
		yes, no []string
	}{
		{operation.Var{Type: operation.TypeBool}, []string{"true", "false"}, []string{"", "True", "1", "yes", "true "}},
		{operation.Var{Type: operation.TypeInt}, []string{"0", "-1", "9223372036854775807"},
			[]string{"", "00", "-0", "1e3", "0x1", "1.0", " 1", "9223372036854775808", "１"}},
		{operation.Var{Type: operation.TypeInt, Pattern: "^[1-9]$"}, []string{"1"}, []string{"0", "10"}},
		{operation.Var{Type: operation.TypeString, Pattern: "^a*$"}, []string{"", strings.Repeat("a", 256)}, []string{strings.Repeat("a", 257)}},
		{operation.Var{Type: operation.TypeString, Pattern: "^a*$", Max: 2}, []string{"aa"}, []string{"aaa"}},
	} {
		tpl := operation.Template{Version: operation.TemplateVersion, Name: "p", About: "x", Kind: operation.KindScript, Tier: "operate.read",
			Timeout: "1s",
			Run:     []string{"x", "--v=${v}"}, Vars: map[string]operation.Var{"v": c.v}}
		for _, v := range c.yes {
			if _, err := tpl.Argv(map[string]string{"v": v}); err != nil {
				t.Errorf("%+v: %.20q: %v", c.v, v, err)
			}
		}
		for _, v := range c.no {
			if _, err := tpl.Argv(map[string]string{"v": v}); !errors.Is(err, fault.Invalid) {
				t.Errorf("%+v: %.20q: %v", c.v, v, err)
			}
		}
	}
}
