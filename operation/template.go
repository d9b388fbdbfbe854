// SPDX-License-Identifier: Apache-2.0

// Package operation is the documents of consent: template, request, approval, standing approval, result, release.
// In-toto statements.
//
// # Promise
//
// What ran is what was asked for, what was asked for is what the customer approved, and what left is what the customer
// released: each statement carries the digest of the one before it, each is signed by the one party whose word it is,
// and all of it is checked offline: VerifyChain the documents, VerifyTemplate the command, VerifyOutput what was let out.
// A value that the vendor fills in stays inside one argument of one program: nothing here splits or expands it, it never
// begins an argument with "-", and a template that would paste it into the script of a shell is refused. What a program
// makes of its arguments is the program's affair: the person who approves sees each of them, and no invisible character.
//
// What is signed is a party's word: which of its keys signed, and how many had to, is for the caller of seal.Open to
// decide. Standing approval: not yet.
//
// # Wire format
//
// Each document but the template is an in-toto Statement v1 in a DSSE envelope (package seal) of type
// application/vnd.in-toto+json:
//
//	{"_type":"https://in-toto.io/Statement/v1",
//	 "subject":[{"name":"request","digest":{"sha256":"<64 hex digits>"}}],
//	 "predicateType":"https://demarc.dev/operation/approval/v1",
//	 "predicate":{...}}
//
// The subjects are what the statement is about, and are computed from the predicate: a statement whose subjects say
// something else is refused. A template is YAML, read strictly, and named by the digest of its canonical JSON, so
// that comments and spacing do not count.
package operation

import (
	"encoding/json"
	"fmt"
	"maps"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
)

// Limits of templates and values.
const (
	TemplateVersion = "demarc-template/1"
	MaxTemplate     = 64 << 10
	MaxValue        = 4096 // bytes of one value
	maxArgs         = 256
	maxArg          = 8 << 10
	maxArgv         = 64 << 10 // bytes of all arguments: with every byte escaped they still fit a sealed document
	maxVars         = 64
	maxPattern      = 512
	defaultValue    = 256
	maxTimeout      = 24 * time.Hour
	maxOutput       = 64 << 20
	maxWrites       = 64
)

// Kinds of template.
const (
	KindExec       = "exec"       // argv inside a service
	KindScript     = "script"     // argv in a sandbox
	KindKubernetes = "kubernetes" // a verb on objects
)

// Types of variable.
const (
	TypeString = "string"
	TypeInt    = "int"
	TypeBool   = "bool"
)

// Template is an operation that the vendor may ask for. ParseTemplate makes one.
type Template struct {
	Version string         `yaml:"version" json:"version"` // TemplateVersion
	Name    string         `yaml:"name" json:"name"`
	About   string         `yaml:"about" json:"about"` // what it does, for the person who approves
	Kind    string         `yaml:"kind" json:"kind"`
	Service string         `yaml:"service" json:"service,omitempty"` // of exec
	Tier    fleet.Phase    `yaml:"tier" json:"tier"`                 // operate.read, operate.write or operate.admin
	Run     []string       `yaml:"argv" json:"argv"`                 // ${name} stands for a variable; the program itself is literal
	Vars    map[string]Var `yaml:"vars" json:"vars,omitempty"`
	Effects Effects        `yaml:"effects" json:"effects"`
	Timeout string         `yaml:"timeout" json:"timeout"` // as in Go: 30s, 5m; at most 24h
	Output  int64          `yaml:"output" json:"output"`   // bytes of output that are kept, at most 64 MiB
}

// Var is a variable of a template. The pattern is RE2, anchored at both ends, and mandatory for a string.
type Var struct {
	Type     string `yaml:"type" json:"type"`
	Pattern  string `yaml:"pattern" json:"pattern,omitempty"`
	Max      int    `yaml:"max" json:"max,omitempty"` // bytes of a string, 256 where it is not given
	About    string `yaml:"about" json:"about,omitempty"`
	Optional bool   `yaml:"optional" json:"optional,omitempty"` // left out, it leaves out the arguments that name it
}

// Effects is what an operation may do beyond reading its own files. The sandbox enforces each that is not declared.
type Effects struct {
	Writes      []string `yaml:"writes" json:"writes,omitempty"` // absolute paths it may write below
	Network     bool     `yaml:"network" json:"network,omitempty"`
	Credentials bool     `yaml:"credentials" json:"credentials,omitempty"` // the service's environment and secrets
}

var (
	varName     = regexp.MustCompile(`^[a-z][a-z0-9_]{0,31}$`)
	placeholder = regexp.MustCompile(`\$\{([^}]*)\}`)
)

// Check tells whether the template is whole.
func (t Template) Check() error {
	const op = "operation.Template"
	bad := func(format string, args ...any) error {
		return fault.New(op, fault.Invalid, "template %q: %s", fault.Clip(t.Name), fmt.Sprintf(format, args...))
	}
	if t.Version != TemplateVersion {
		return bad("version %q: write version: %s", fault.Clip(t.Version), TemplateVersion)
	}
	if err := fleet.CheckName("template", t.Name); err != nil {
		return err
	}
	if t.About == "" || len(t.About) > 2048 || !legible(t.About) {
		return bad("about: say in 1 to 2048 bytes of plain text what it does, for the person who approves it")
	}
	switch t.Kind {
	case KindExec:
		if err := fleet.CheckName("service", t.Service); err != nil {
			return err
		}
	case KindScript, KindKubernetes:
		if t.Service != "" {
			return bad("service: belongs to kind exec only")
		}
	default:
		return bad("kind %q: use exec, script or kubernetes", fault.Clip(t.Kind))
	}
	if t.Tier != fleet.OperateRead && t.Tier != fleet.OperateWrite && t.Tier != fleet.OperateAdmin {
		return bad("tier %q: use operate.read, operate.write or operate.admin", fault.Clip(string(t.Tier)))
	}
	if d, err := time.ParseDuration(t.Timeout); err != nil || d <= 0 || d > maxTimeout {
		return bad("timeout %q: use more than 0s and at most 24h, for instance 30s", fault.Clip(t.Timeout))
	}
	if t.Output < 0 || t.Output > maxOutput {
		return bad("output %d: use 0 to %d bytes", t.Output, maxOutput)
	}
	if len(t.Effects.Writes) > maxWrites {
		return bad("effects.writes: at most %d", maxWrites)
	}
	for _, w := range t.Effects.Writes {
		if !path.IsAbs(w) || w == "/" || path.Clean(w) != w || len(w) > 512 || !legible(w) {
			return bad("effects.writes %q: use absolute paths below the root in their shortest form, without ..", fault.Clip(w))
		}
	}
	if t.Tier == fleet.OperateRead && len(t.Effects.Writes) > 0 {
		return bad("effects.writes: an operation of tier operate.read writes nothing")
	}
	return t.checkArgs(bad)
}

func (t Template) checkArgs(bad func(string, ...any) error) error {
	if len(t.Run) == 0 || len(t.Run) > maxArgs || t.Run[0] == "" {
		return bad("argv: give the program and its arguments, 1 to %d", maxArgs)
	}
	if len(t.Vars) > maxVars {
		return bad("vars: at most %d", maxVars)
	}
	used := map[string]bool{}
	for i, a := range t.Run {
		if len(a) > maxArg || !legible(a) {
			return bad("argv %d: at most %d bytes of plain text, no invisible characters", i, maxArg)
		}
		for _, m := range placeholder.FindAllStringSubmatch(a, -1) {
			if i == 0 {
				return bad("argv 0: the program is literal, no variable chooses it")
			}
			if _, ok := t.Vars[m[1]]; !ok {
				return bad("argv %d: ${%s} is not among vars", i, fault.Clip(m[1]))
			}
			used[m[1]] = true
		}
		if strings.Contains(placeholder.ReplaceAllString(a, ""), "${") {
			return bad("argv %d: ${ without its }", i)
		}
	}
	if err := t.checkOptions(bad); err != nil {
		return err
	}
	return t.checkVars(bad, used)
}

// checkOptions refuses templates whose arguments a value could turn into something else than an argument.
func (t Template) checkOptions(bad func(string, ...any) error) error {
	for i, a := range t.Run {
		literal, _, filled := strings.Cut(a, "${")
		if !filled {
			continue
		}
		if strings.Trim(literal, "-") == "" && literal != "" || strings.HasPrefix(literal, "--") && !strings.Contains(literal, "=") {
			return bad("argv %d: a value would choose the option: write its name out, as in --name=${value}", i)
		}
		before := t.Run[i-1] // argv 0 has no placeholder
		if i > 1 && strings.HasPrefix(before, "-") && before != "--" && !strings.ContainsAny(before, "=$") && t.optional(a) {
			return bad("argv %d: left out, it would leave %q before it alone: write --name=${value} as one argument", i, fault.Clip(before))
		}
	}
	if i := shellScript(t.Run); i >= 0 && strings.Contains(t.Run[i], "${") {
		return bad("argv %d: a shell would read the value as commands: hand it over as an argument, as in sh -c 'cat -- \"$1\"' sh ${value}", i)
	}
	return nil
}

func (t Template) optional(arg string) bool {
	for _, m := range placeholder.FindAllStringSubmatch(arg, -1) {
		if t.Vars[m[1]].Optional {
			return true
		}
	}
	return false
}

// shellScript finds the argument that a shell among argv would read as its script after -c, or gives -1. It guards
// against an honest mistake; a program that is no shell by name and acts like one is beyond it.
func shellScript(argv []string) int {
	shell, command := false, false
	for i := 0; i < len(argv); i++ {
		a := argv[i]
		switch option := len(a) > 1 && (a[0] == '-' || a[0] == '+'); {
		case !shell:
			shell = slices.Contains(shells(), path.Base(a))
		case option && !strings.HasPrefix(a, "--"):
			command = command || a[0] == '-' && strings.Contains(a, "c")
			if strings.HasSuffix(a, "o") { // takes the next argument, the name of a setting
				i++
			}
		case option:
		case command:
			return i
		}
	}
	return -1
}

func shells() []string {
	return []string{"sh", "ash", "bash", "csh", "dash", "fish", "ksh", "mksh", "rbash", "tcsh", "zsh"}
}

func (t Template) checkVars(bad func(string, ...any) error, used map[string]bool) error {
	for _, name := range slices.Sorted(maps.Keys(t.Vars)) {
		v := t.Vars[name]
		switch {
		case !varName.MatchString(name):
			return bad("vars %q: use lower-case letters, digits and underscores", fault.Clip(name))
		case !used[name]:
			return bad("vars %s: is not used in argv", name)
		case v.Type != TypeString && v.Type != TypeInt && v.Type != TypeBool:
			return bad("vars %s: type %q: use string, int or bool", name, fault.Clip(v.Type))
		case v.Type == TypeString && v.Pattern == "":
			return bad("vars %s: a string needs a pattern, for instance ^[a-z0-9-]+$", name)
		case len(v.About) > maxReason || !legible(v.About) || !legible(v.Pattern):
			return bad("vars %s: about and pattern: at most %d bytes of plain text", name, maxReason)
		case v.Max < 0 || v.Max > MaxValue:
			return bad("vars %s: max %d: use 1 to %d", name, v.Max, MaxValue)
		}
		if v.Pattern != "" {
			re, err := compile(v.Pattern)
			if err != nil {
				return bad("vars %s: %s", name, fault.Text(err))
			}
			if v.Type == TypeString && unbounded(re) {
				return bad("vars %s: pattern %q takes anything, and so says nothing: name the characters that a value has, for instance ^[a-z0-9-]+$",
					name, fault.Clip(v.Pattern))
			}
		}
	}
	return nil
}

// compile makes a pattern that can match nothing but the whole value, whatever it contains.
func compile(p string) (*regexp.Regexp, error) {
	const op = "operation.Pattern"
	body, front := strings.CutPrefix(p, "^")
	body, back := strings.CutSuffix(body, "$")
	slashes := len(body) - len(strings.TrimRight(body, `\`))
	if !front || !back || slashes%2 == 1 || len(p) > maxPattern {
		return nil, fault.New(op, fault.Invalid, "pattern %q: begin with ^ and end with $, at most %d bytes", fault.Clip(p), maxPattern)
	}
	if _, err := regexp.Compile(p); err != nil {
		return nil, fault.Because(err, op, fault.Invalid, "pattern %q is not a regular expression of RE2", fault.Clip(p))
	}
	re, err := regexp.Compile(`\A(?:` + body + `)\z`)
	if err != nil {
		return nil, fault.Because(err, op, fault.Invalid, "pattern %q is not a regular expression between its anchors", fault.Clip(p))
	}
	return re, nil
}

// unbounded reports whether a pattern takes any text of some length, of any kind of character: then a person who approves it
// knows no more than without it.
func unbounded(re *regexp.Regexp) bool {
	for n := 1; n <= 64; n++ {
		if !slices.ContainsFunc([]string{";", " ", "'", "/", "\\", "$", "-", "=", "a", "Z", "7", "\u00e9", "\u6f22"}, func(c string) bool {
			return !re.MatchString(strings.Repeat(c, n))
		}) {
			return true
		}
	}
	return false
}

// Digest names the template by what it says, not by how its file is spaced.
func (t Template) Digest() fleet.Digest {
	b, err := json.Marshal(t)
	if err != nil { // strings, numbers and sorted maps always have a JSON form
		return ""
	}
	return fleet.DigestOf(b)
}

// Limit is the time that the operation may take.
func (t Template) Limit() time.Duration {
	d, err := time.ParseDuration(t.Timeout)
	if err != nil || d > maxTimeout {
		return 0
	}
	return d
}

// Argv fills in the values: each placeholder becomes text inside its own argument, and is never split or expanded.
// A value that begins with "-" is refused where it would begin an argument. An argument that names an optional
// variable without a value is left out.
func (t Template) Argv(vars map[string]string) ([]string, error) {
	const op = "operation.Argv"
	if err := t.Check(); err != nil {
		return nil, err
	}
	for _, name := range slices.Sorted(maps.Keys(vars)) {
		v, ok := t.Vars[name]
		if !ok {
			return nil, fault.New(op, fault.Invalid, "the template %q has no variable %q", t.Name, fault.Clip(name))
		}
		if err := v.accept(op, name, vars[name]); err != nil {
			return nil, err
		}
	}
	for _, name := range slices.Sorted(maps.Keys(t.Vars)) {
		if _, ok := vars[name]; !ok && !t.Vars[name].Optional {
			return nil, fault.New(op, fault.Invalid, "the variable %q has no value", name)
		}
	}
	argv, size := make([]string, 0, len(t.Run)), 0
	for i, a := range t.Run {
		left := false
		for _, m := range placeholder.FindAllStringSubmatch(a, -1) {
			if _, ok := vars[m[1]]; !ok {
				left = true
			}
		}
		if left {
			continue
		}
		arg := placeholder.ReplaceAllStringFunc(a, func(p string) string { return vars[p[2:len(p)-1]] })
		if strings.HasPrefix(a, "${") && strings.HasPrefix(arg, "-") {
			return nil, fault.New(op, fault.Invalid, "argument %d would begin with the value %q: a value can't be an option", i, fault.Clip(arg))
		}
		if size += len(arg); len(arg) > maxArg || size > maxArgv {
			return nil, fault.New(op, fault.Invalid, "argument %d: at most %d bytes, and %d with those before it", i, maxArg, maxArgv)
		}
		argv = append(argv, arg)
	}
	return argv, nil
}

func (v Var) accept(op, name, value string) error {
	limit := v.Max
	if limit == 0 {
		limit = defaultValue
	}
	if len(value) > limit {
		return fault.New(op, fault.Invalid, "the variable %q: at most %d bytes", name, limit)
	}
	if !legible(value) {
		return fault.New(op, fault.Invalid, "the value of the variable %q %s", name, notLegible)
	}
	switch v.Type {
	case TypeInt:
		if n, err := strconv.ParseInt(value, 10, 64); err != nil || strconv.FormatInt(n, 10) != value {
			return fault.New(op, fault.Invalid, "the variable %q: %q is not a whole number", name, fault.Clip(value))
		}
	case TypeBool:
		if value != "true" && value != "false" {
			return fault.New(op, fault.Invalid, "the variable %q: %q is neither true nor false", name, fault.Clip(value))
		}
	}
	if v.Pattern == "" {
		return nil
	}
	re, err := compile(v.Pattern)
	if err != nil {
		return err
	}
	if !re.MatchString(value) {
		return fault.New(op, fault.Invalid, "the variable %q: %q does not match %s", name, fault.Clip(value), v.Pattern)
	}
	return nil
}
