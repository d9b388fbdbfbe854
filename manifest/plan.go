// SPDX-License-Identifier: Apache-2.0

package manifest

import (
	"bytes"
	"encoding/json"
	"fmt"
	"regexp"
	"slices"
	"strings"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/seal"
)

// PlanVersion begins every plan.
const PlanVersion = "demarc-plan/1"

// MaxPlan bounds a plan in bytes.
const MaxPlan = 1 << 20

// Plan is exactly what will run. It holds no value of a secret, and no address: those are the machine's.
type Plan struct {
	Version    string      `json:"version"`
	App        string      `json:"app"`
	AppVersion string      `json:"app_version"`
	Runtime    string      `json:"runtime"`
	Services   []Service   `json:"services"` // in the order in which they start
	Ports      []Port      `json:"ports,omitempty"`
	Secrets    []Secret    `json:"secrets,omitempty"`
	Operations []Operation `json:"operations,omitempty"`
}

// Service is one supervised process.
type Service struct {
	Name      string       `json:"name"`
	Artifact  fleet.Digest `json:"artifact"`
	Argv      []string     `json:"argv"` // the program is a path inside the artifact
	Env       []Env        `json:"env,omitempty"`
	Listen    []Listen     `json:"listen,omitempty"`
	Health    *Health      `json:"health,omitempty"`
	DependsOn []string     `json:"depends_on,omitempty"`
	Limits    Limits       `json:"limits,omitzero"`
}

// Env is one variable. At most one of Value, Secret and Wire is set; none is the empty value.
type Env struct {
	Name   string `json:"name"`
	Value  string `json:"value,omitempty"`
	Secret string `json:"secret,omitempty"` // name of a secret of the plan: the variable holds the path of its file
	Wire   string `json:"wire,omitempty"`   // service:port: the variable holds the host:port where that listens
}

// Listen is a listener of a service: the variable holds the host:port to listen on, Port is what others call it.
type Listen struct {
	Env  string `json:"env"`
	Port int    `json:"port"`
}

// Health is how one finds out whether a service is well: an HTTP path that answers 2xx, a port that accepts, or a program
// of the artifact that ends with 0. Times are in milliseconds.
type Health struct {
	HTTP       string   `json:"http,omitempty"`
	Port       int      `json:"port,omitempty"`
	Exec       []string `json:"exec,omitempty"`
	IntervalMS int64    `json:"interval_ms"`
	TimeoutMS  int64    `json:"timeout_ms"`
	StartMS    int64    `json:"start_ms"` // within which it must become well
	Retries    int      `json:"retries"`  // failures in a row that make it unwell
}

// Limits are those of a service; zero is none.
type Limits struct {
	MemoryBytes int64   `json:"memory_bytes,omitempty"`
	CPUs        float64 `json:"cpus,omitempty"`
	PIDs        int64   `json:"pids,omitempty"`
}

// Port is one that end users may reach, where the customer's posture opens it.
type Port struct {
	Name     string         `json:"name"`
	Service  string         `json:"service"`
	Port     int            `json:"port"`
	Protocol string         `json:"protocol"` // http or tcp
	Widest   fleet.Exposure `json:"widest"`
}

// Secret is one that the application needs. Store is its name at the customer.
type Secret struct {
	Name     string `json:"name"`
	Store    string `json:"store"`
	Required bool   `json:"required,omitempty"`
	Hint     string `json:"hint,omitempty"`
}

// Operation is a template that comes with the release.
type Operation struct {
	Name   string       `json:"name"`
	Digest fleet.Digest `json:"digest"` // of its YAML
}

// JSON spells the plan in its one form.
func (p Plan) JSON() []byte {
	b, err := json.Marshal(p)
	if err != nil { // strings and numbers; a limit that is not a number is refused before
		return nil
	}
	return b
}

// Digest names the plan by its bytes.
func (p Plan) Digest() fleet.Digest { return fleet.DigestOf(p.JSON()) }

// ParsePlan reads a plan in its one form.
func ParsePlan(b []byte) (Plan, error) {
	const op = "manifest.ParsePlan"
	var p Plan
	if len(b) > MaxPlan {
		return p, fault.New(op, fault.Invalid, "the plan has %d bytes, the limit is %d", len(b), MaxPlan)
	}
	if err := seal.StrictJSON(b, &p); err != nil {
		return p, fault.At(op, fault.Invalid, err)
	}
	if !bytes.Equal(p.JSON(), b) {
		return p, fault.New(op, fault.Invalid, "the plan is not spelled in its one form")
	}
	return p, p.Check()
}

var (
	envName  = regexp.MustCompile(`^[A-Z_][A-Z0-9_]{0,63}$`)
	wireForm = regexp.MustCompile(`^([a-z0-9-]{1,63}):([0-9]{1,5})$`)
)

// reserved variables change what a program loads before its first line, or are those that demarcd sets itself: a plan can't set them.
func reserved(env string) bool {
	return strings.HasPrefix(env, "LD_") || strings.HasPrefix(env, "DEMARC_") || env == "PATH" || env == "HOME"
}

// Check tells the first thing that is wrong with the plan by itself.
func (p Plan) Check() error {
	const op = "manifest.Plan"
	bad := func(format string, args ...any) error { return fault.New(op, fault.Invalid, format, args...) }
	if p.Version != PlanVersion {
		return bad("version %.32q: this build reads %s", p.Version, PlanVersion)
	}
	if len(p.Services) == 0 || len(p.Services) > maxServices || len(p.Ports) > maxNames || len(p.Secrets) > maxNames ||
		len(p.Operations) > maxTemplates {
		return bad("a plan has 1 to %d services and at most %d ports, %d secrets, %d operations", maxServices, maxNames, maxNames, maxTemplates)
	}
	secrets := map[string]bool{}
	for _, s := range p.Secrets {
		if err := fleet.CheckName("secret", s.Store); err != nil {
			return below(err, "x-demarc", "secrets", s.Name)
		}
		if err := fleet.CheckName("secret", s.Name); err != nil || secrets[s.Name] {
			return below(bad("secret %.64q: not a name, or there twice", s.Name), "x-demarc", "secrets", s.Name)
		}
		secrets[s.Name] = true
	}
	ports := map[string]bool{} // service:port
	started := map[string]bool{}
	for _, s := range p.Services {
		for _, l := range s.Listen {
			ports[fmt.Sprintf("%s:%d", s.Name, l.Port)] = true
		}
	}
	for _, s := range p.Services {
		if err := s.check(secrets, ports, started); err != nil {
			return below(err, "services", s.Name)
		}
		started[s.Name] = true
	}
	seen := map[string]bool{}
	for _, x := range p.Ports {
		if err := fleet.CheckName("port", x.Name); err != nil || seen[x.Name] {
			return below(bad("port %.64q: not a name, or there twice", x.Name), "x-demarc", "ports", x.Name)
		}
		seen[x.Name] = true
		if !ports[fmt.Sprintf("%s:%d", x.Service, x.Port)] {
			return below(bad("port %q: service %.64q does not listen on %d", x.Name, x.Service, x.Port), "x-demarc", "ports", x.Name, "port")
		}
		if x.Protocol != "http" && x.Protocol != "tcp" {
			return below(bad("port %q: protocol %.32q: use http or tcp", x.Name, x.Protocol), "x-demarc", "ports", x.Name, "protocol")
		}
		if err := x.Widest.Check(); err != nil {
			return below(err, "x-demarc", "ports", x.Name, "widest")
		}
	}
	for _, o := range p.Operations {
		if err := fleet.CheckName("operation", o.Name); err != nil {
			return err
		}
		if err := o.Digest.Check(); err != nil {
			return err
		}
	}
	return nil
}

// Programs lists what of the artifact is executed, by the path inside of it.
func (s Service) Programs() []string {
	var out []string
	if len(s.Argv) > 0 {
		out = append(out, s.Argv[0])
	}
	if s.Health != nil && len(s.Health.Exec) > 0 {
		out = append(out, s.Health.Exec[0])
	}
	return out
}

func (s Service) check(secrets, ports, started map[string]bool) error {
	bad := func(at, format string, args ...any) error {
		return below(fault.New("manifest.Plan", fault.Invalid, "service %.64q: %s", s.Name, fmt.Sprintf(format, args...)), strings.Fields(at)...)
	}
	if err := fleet.CheckName("service", s.Name); err != nil || started[s.Name] {
		return bad("", "not a name, or there twice")
	}
	if err := s.Artifact.Check(); err != nil {
		return bad("x-demarc artifact", "artifact: %s", fault.Text(err))
	}
	if len(s.Argv) == 0 || len(s.Argv) > maxNames || !localPath(s.Argv[0]) {
		return bad("command", "command: give a program inside the artifact, by a relative path without .., and at most %d arguments", maxNames)
	}
	for _, a := range s.Argv {
		if len(a) > maxText || strings.ContainsRune(a, 0) {
			return bad("command", "command: an argument has at most %d bytes and no NUL", maxText)
		}
	}
	envs := map[string]bool{}
	claim := func(at, name string) error {
		if !envName.MatchString(name) || reserved(name) || envs[name] {
			return bad(at+" "+name, "variable %.64q: use A-Z, 0-9 and _, none of PATH, HOME, LD_* and DEMARC_*, and each once", name)
		}
		envs[name] = true
		return nil
	}
	for _, e := range s.Env {
		at := "environment"
		switch {
		case e.Wire != "":
			at = "x-demarc wire"
		case e.Secret != "":
			at = "secrets"
		}
		if err := claim(at, e.Name); err != nil {
			return err
		}
		if len(e.Value) > maxText || strings.ContainsRune(e.Value, 0) {
			return bad(at+" "+e.Name, "variable %s: at most %d bytes and no NUL", e.Name, maxText)
		}
		set := 0
		for _, v := range []string{e.Value, e.Secret, e.Wire} {
			if v != "" {
				set++
			}
		}
		if set > 1 || (e.Secret != "" && !secrets[e.Secret]) || (e.Wire != "" && !ports[e.Wire]) {
			return bad(at+" "+e.Name, "variable %s: names a secret or a listener that the plan does not have", e.Name)
		}
	}
	for _, l := range s.Listen {
		if err := claim("x-demarc listen", l.Env); err != nil {
			return err
		}
		if l.Port < 1 || l.Port > 65535 {
			return bad("x-demarc listen "+l.Env, "listen %s: port %d is not one", l.Env, l.Port)
		}
	}
	for _, d := range s.DependsOn {
		if !started[d] {
			return bad("depends_on "+d, "depends on %.64q, which does not start before it", d)
		}
	}
	if s.Limits.MemoryBytes < 0 || s.Limits.PIDs < 0 || !(s.Limits.CPUs >= 0 && s.Limits.CPUs <= 4096) {
		at := "pids_limit"
		if s.Limits.MemoryBytes < 0 {
			at = "mem_limit"
		} else if s.Limits.PIDs >= 0 {
			at = "cpus"
		}
		return bad(at, "limits: can't be negative")
	}
	return s.Health.check(s, ports, func(format string, args ...any) error { return bad("x-demarc health", format, args...) })
}

func (h *Health) check(s Service, ports map[string]bool, bad func(string, ...any) error) error {
	if h == nil {
		return nil
	}
	if len(h.Exec) > 0 {
		if h.HTTP != "" || h.Port != 0 || !localPath(h.Exec[0]) || len(h.Exec) > maxNames {
			return bad("health: exec names a program inside the artifact, and stands alone")
		}
	} else if !ports[fmt.Sprintf("%s:%d", s.Name, h.Port)] {
		return bad("health: the service does not listen on port %d", h.Port)
	}
	if h.HTTP != "" && (!strings.HasPrefix(h.HTTP, "/") || len(h.HTTP) > 1024 || strings.ContainsAny(h.HTTP, " \r\n")) {
		return bad("health: http is a path that begins with /")
	}
	if h.IntervalMS < 100 || h.TimeoutMS < 100 || h.StartMS < 100 || h.Retries < 1 || h.Retries > 100 {
		return bad("health: times are 100 ms or more, retries 1 to 100")
	}
	return nil
}

// localPath tells whether a path stays inside the artifact.
func localPath(p string) bool {
	if p == "" || len(p) > 1024 || strings.HasPrefix(p, "/") || strings.ContainsAny(p, "\\\x00") {
		return false
	}
	return !slices.Contains(strings.Split(p, "/"), "..")
}

// Diff says in lines what changes from one plan to the next: + is new, - goes, ~ changes. The old one may be the zero plan.
func Diff(from, to Plan) []string {
	var out []string
	if from.AppVersion != to.AppVersion {
		out = append(out, change("version", from.AppVersion, to.AppVersion))
	}
	type part struct{ kind, name, text string }
	list := func(p Plan) []part {
		var parts []part
		for _, s := range p.Services {
			name := s.Name
			parts = append(parts, part{"service " + name + " artifact", "", s.Artifact.Short()},
				part{"service " + name + " command", "", fmt.Sprintf("%q", s.Argv)})
			for _, e := range s.Env {
				text := fmt.Sprintf("%q", e.Value)
				if e.Secret != "" {
					text = "path of secret " + e.Secret
				} else if e.Wire != "" {
					text = "address of " + e.Wire
				}
				parts = append(parts, part{"service " + name + " variable", e.Name, text})
			}
			for _, l := range s.Listen {
				parts = append(parts, part{"service " + name + " listener", l.Env, fmt.Sprint(l.Port)})
			}
			if s.Health != nil {
				h, _ := json.Marshal(s.Health)
				parts = append(parts, part{"service " + name + " health", "", string(h)})
			}
			if len(s.DependsOn) > 0 {
				parts = append(parts, part{"service " + name + " depends on", "", strings.Join(s.DependsOn, ", ")})
			}
			if s.Limits != (Limits{}) {
				l, _ := json.Marshal(s.Limits)
				parts = append(parts, part{"service " + name + " limits", "", string(l)})
			}
		}
		for _, x := range p.Ports {
			parts = append(parts, part{"port", x.Name, fmt.Sprintf("%s to %s:%d, %s at the widest", x.Protocol, x.Service, x.Port, x.Widest)})
		}
		for _, x := range p.Secrets {
			text := "optional"
			if x.Required {
				text = "required"
			}
			parts = append(parts, part{"secret", x.Name, text + ", in the store as " + x.Store + ", " + x.Hint})
		}
		for _, x := range p.Operations {
			parts = append(parts, part{"operation", x.Name, x.Digest.Short()})
		}
		return parts
	}
	old, next := list(from), list(to)
	find := func(in []part, p part) (string, bool) {
		for _, q := range in {
			if q.kind == p.kind && q.name == p.name {
				return q.text, true
			}
		}
		return "", false
	}
	for _, p := range next {
		label := strings.TrimSpace(p.kind + " " + p.name)
		if had, ok := find(old, p); !ok {
			out = append(out, "+ "+label+": "+p.text)
		} else if had != p.text {
			out = append(out, change(label, had, p.text))
		}
	}
	for _, p := range old {
		if _, ok := find(next, p); !ok {
			out = append(out, "- "+strings.TrimSpace(p.kind+" "+p.name)+": "+p.text)
		}
	}
	return out
}

func change(label, from, to string) string {
	if from == "" {
		return "+ " + label + ": " + to
	}
	return "~ " + label + ": " + from + " -> " + to
}
