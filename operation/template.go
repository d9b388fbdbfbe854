// SPDX-License-Identifier: Apache-2.0

// Package operation is the documents of consent: template, request, approval, standing approval, result, release.
// In-toto statements.
//
// # Promise
//
// What ran is what was asked for, what was asked for is what the customer approved, and what left is what the customer
// released: each statement carries the digest of the one before it, each is signed by the one party whose word it is,
// and VerifyChain checks all of it offline. A value that the vendor fills in is one argument of one program: there is
// no shell, no word splitting and no option that a value could turn into.
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
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"

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
	maxVars         = 64
	maxPattern      = 512
	defaultValue    = 256
	maxTimeout      = 24 * time.Hour
	maxOutput       = 64 << 20
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

// ParseTemplate reads one YAML document. Unknown and repeated keys are refused with their line.
func ParseTemplate(file []byte) (Template, error) {
	const op = "operation.ParseTemplate"
	if len(file) > MaxTemplate {
		return Template{}, fault.New(op, fault.Invalid, "the template has %d bytes, at most %d are allowed", len(file), MaxTemplate)
	}
	if err := plainYAML(op, file); err != nil {
		return Template{}, err
	}
	var t Template
	d := yaml.NewDecoder(bytes.NewReader(file))
	d.KnownFields(true)
	if err := d.Decode(&t); err != nil {
		return Template{}, fault.Because(err, op, fault.Invalid, "not a template: %s", clipText(strings.TrimPrefix(err.Error(), "yaml: ")))
	}
	if err := t.Check(); err != nil {
		return Template{}, err
	}
	return t, nil
}

// plainYAML refuses a second document and aliases: what one sees is what there is.
func plainYAML(op string, file []byte) error {
	d := yaml.NewDecoder(bytes.NewReader(file))
	var n yaml.Node
	if err := d.Decode(&n); err != nil {
		if errors.Is(err, io.EOF) {
			return fault.New(op, fault.Invalid, "the template is empty")
		}
		return fault.Because(err, op, fault.Invalid, "not YAML: %s", clipText(strings.TrimPrefix(err.Error(), "yaml: ")))
	}
	if err := d.Decode(new(yaml.Node)); !errors.Is(err, io.EOF) {
		return fault.New(op, fault.Invalid, "the template must be one YAML document")
	}
	var walk func(*yaml.Node) error
	walk = func(n *yaml.Node) error {
		if n.Kind == yaml.AliasNode || n.Anchor != "" {
			return fault.New(op, fault.Invalid, "line %d: anchors and aliases are not allowed in a template", n.Line)
		}
		for _, c := range n.Content {
			if err := walk(c); err != nil {
				return err
			}
		}
		return nil
	}
	return walk(&n)
}

// Check tells whether the template is whole.
func (t Template) Check() error {
	const op = "operation.Template"
	bad := func(format string, args ...any) error {
		return fault.New(op, fault.Invalid, "template %q: %s", clip(t.Name), fmt.Sprintf(format, args...))
	}
	if t.Version != TemplateVersion {
		return bad("version %q: write version: %s", clip(t.Version), TemplateVersion)
	}
	if err := fleet.CheckName("template", t.Name); err != nil {
		return err
	}
	if t.About == "" || len(t.About) > 2048 {
		return bad("about: say in 1 to 2048 bytes what it does, for the person who approves it")
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
		return bad("kind %q: use exec, script or kubernetes", clip(t.Kind))
	}
	if t.Tier != fleet.OperateRead && t.Tier != fleet.OperateWrite && t.Tier != fleet.OperateAdmin {
		return bad("tier %q: use operate.read, operate.write or operate.admin", clip(string(t.Tier)))
	}
	if d, err := time.ParseDuration(t.Timeout); err != nil || d <= 0 || d > maxTimeout {
		return bad("timeout %q: use more than 0s and at most 24h, for instance 30s", clip(t.Timeout))
	}
	if t.Output < 0 || t.Output > maxOutput {
		return bad("output %d: use 0 to %d bytes", t.Output, maxOutput)
	}
	for _, w := range t.Effects.Writes {
		if !strings.HasPrefix(w, "/") || w == "/" || strings.Contains(w+"/", "/../") || len(w) > 512 || strings.ContainsRune(w, 0) {
			return bad("effects.writes %q: use absolute paths below the root, without ..", clip(w))
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
		if len(a) > maxArg || strings.ContainsRune(a, 0) {
			return bad("argv %d: at most %d bytes and no NUL", i, maxArg)
		}
		for _, m := range placeholder.FindAllStringSubmatch(a, -1) {
			if i == 0 {
				return bad("argv 0: the program is literal, no variable chooses it")
			}
			if _, ok := t.Vars[m[1]]; !ok {
				return bad("argv %d: ${%s} is not among vars", i, clip(m[1]))
			}
			used[m[1]] = true
		}
		if strings.Contains(placeholder.ReplaceAllString(a, ""), "${") {
			return bad("argv %d: ${ without its }", i)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(t.Vars)) {
		v := t.Vars[name]
		switch {
		case !varName.MatchString(name):
			return bad("vars %q: use lower-case letters, digits and underscores", clip(name))
		case !used[name]:
			return bad("vars %s: is not used in argv", name)
		case v.Type != TypeString && v.Type != TypeInt && v.Type != TypeBool:
			return bad("vars %s: type %q: use string, int or bool", name, clip(v.Type))
		case v.Type == TypeString && v.Pattern == "":
			return bad("vars %s: a string needs a pattern, for instance ^[a-z0-9-]+$", name)
		case v.Max < 0 || v.Max > MaxValue:
			return bad("vars %s: max %d: use 1 to %d", name, v.Max, MaxValue)
		}
		if v.Pattern != "" {
			if _, err := compile(v.Pattern); err != nil {
				return bad("vars %s: %s", name, fault.Text(err))
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
		return nil, fault.New(op, fault.Invalid, "pattern %q: begin with ^ and end with $, at most %d bytes", clip(p), maxPattern)
	}
	if _, err := regexp.Compile(p); err != nil {
		return nil, fault.Because(err, op, fault.Invalid, "pattern %q is not a regular expression of RE2", clip(p))
	}
	re, err := regexp.Compile(`\A(?:` + body + `)\z`)
	if err != nil {
		return nil, fault.Because(err, op, fault.Invalid, "pattern %q is not a regular expression between its anchors", clip(p))
	}
	return re, nil
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
			return nil, fault.New(op, fault.Invalid, "the template %q has no variable %q", t.Name, clip(name))
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
	argv := make([]string, 0, len(t.Run))
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
			return nil, fault.New(op, fault.Invalid, "argument %d would begin with the value %q: a value can't be an option", i, clip(arg))
		}
		if len(arg) > maxArg {
			return nil, fault.New(op, fault.Invalid, "argument %d has %d bytes, at most %d are allowed", i, len(arg), maxArg)
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
	if len(value) > limit || strings.ContainsRune(value, 0) {
		return fault.New(op, fault.Invalid, "the variable %q: at most %d bytes and no NUL", name, limit)
	}
	switch v.Type {
	case TypeInt:
		if n, err := strconv.ParseInt(value, 10, 64); err != nil || strconv.FormatInt(n, 10) != value {
			return fault.New(op, fault.Invalid, "the variable %q: %q is not a whole number", name, clip(value))
		}
	case TypeBool:
		if value != "true" && value != "false" {
			return fault.New(op, fault.Invalid, "the variable %q: %q is neither true nor false", name, clip(value))
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
		return fault.New(op, fault.Invalid, "the variable %q: %q does not match %s", name, clip(value), v.Pattern)
	}
	return nil
}

func clip(s string) string {
	if len(s) > 64 {
		return s[:64] + "..."
	}
	return s
}

func clipText(s string) string {
	if len(s) > 200 {
		return s[:200] + "..."
	}
	return s
}
