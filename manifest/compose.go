// SPDX-License-Identifier: Apache-2.0

package manifest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/compose-spec/compose-go/v2/loader"
	"github.com/compose-spec/compose-go/v2/types"
	"go.yaml.in/yaml/v3"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
)

// Spec is what a Compose file says. [Compile] makes a plan of it and the artifacts.
type Spec struct {
	App, Version string
	Services     []SpecService // by name
	Operations   []string      // template files, relative to the Compose file

	plan    []Service // in start order, without artifacts
	ports   []Port
	secrets []Secret
}

// SpecService is a service, the folder of its artifact, relative to the Compose file, and the programs that must be in it.
type SpecService struct {
	Name, ArtifactDir string
	Programs          []string // relative to the folder: of the command, and of the health check where it is one
}

// What of Compose has a meaning here. Everything else is refused with its line.
var (
	topKeys     = []string{"name", "version", "services", "secrets", "x-demarc"}
	serviceKeys = []string{"command", "environment", "secrets", "depends_on", "mem_limit", "cpus", "pids_limit", "x-demarc"}
	why         = map[string]string{
		"build": "a release carries artifacts by digest", "volumes": "the process runtime mounts nothing",
		"ports":      "ports for end users stand in x-demarc",
		"privileged": "nothing runs with more than it needs", "cap_add": "nothing runs with more than it needs",
		"devices":      "nothing runs with more than it needs",
		"network_mode": "services are wired by x-demarc", "networks": "services are wired by x-demarc",
		"env_file": "a file of the machine has no say",
		"extends":  "the file must be whole", "include": "the file must be whole", "healthcheck": "write health in x-demarc of the service",
		"entrypoint": "write the whole command", "restart": "every service is kept running", "configs": "put the file into the artifact",
		"image":  "a release carries artifacts by digest: name the folder in x-demarc as artifact",
		"labels": "nothing reads them here: remove them",
	}
	topXKeys     = []string{"app", "version", "ports", "secrets", "operations"}
	serviceXKeys = []string{"artifact", "listen", "wire", "health"}
	healthKeys   = []string{"http", "port", "exec", "interval", "timeout", "start", "retries"}
	portKeys     = []string{"service", "port", "protocol", "widest"}
	secretKeys   = []string{"required", "hint"}
	dependKeys   = []string{"condition"}
	externalKeys = []string{"external"}
	versionForm  = regexp.MustCompile(`^[0-9A-Za-z][0-9A-Za-z.+_-]{0,63}$`)
	templateFile = regexp.MustCompile(`^([a-z0-9-]+/){0,4}[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\.yaml$`)
	artifactPath = regexp.MustCompile(`^[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+){0,8}$`)
)

type xTop struct {
	App        string             `yaml:"app"`
	Version    string             `yaml:"version"`
	Ports      map[string]xPort   `yaml:"ports"`
	Secrets    map[string]xSecret `yaml:"secrets"`
	Operations []string           `yaml:"operations"`
}

type xPort struct {
	Service  string         `yaml:"service"`
	Port     int            `yaml:"port"`
	Protocol string         `yaml:"protocol"`
	Widest   fleet.Exposure `yaml:"widest"`
}

type xSecret struct {
	Required bool   `yaml:"required"`
	Hint     string `yaml:"hint"`
}

type xService struct {
	Artifact string            `yaml:"artifact"`
	Listen   map[string]int    `yaml:"listen"`
	Wire     map[string]string `yaml:"wire"`
	Health   *xHealth          `yaml:"health"`
}

type xHealth struct {
	HTTP     string   `yaml:"http"`
	Port     int      `yaml:"port"`
	Exec     []string `yaml:"exec"`
	Interval string   `yaml:"interval"`
	Timeout  string   `yaml:"timeout"`
	Start    string   `yaml:"start"`
	Retries  int      `yaml:"retries"`
}

// ParseCompose reads a Compose file with x-demarc. It reads no other file and no environment. An error names the line.
func ParseCompose(file []byte) (Spec, error) {
	const op = "manifest.ParseCompose"
	if len(file) > MaxCompose {
		return Spec{}, fault.New(op, fault.Invalid, "the file has %d bytes, the limit is %d", len(file), MaxCompose)
	}
	root, err := document(file)
	if err != nil {
		return Spec{}, fault.At(op, fault.Invalid, err)
	}
	top, services, err := extensions(root)
	if err != nil {
		return Spec{}, fault.At(op, fault.Invalid, err)
	}
	envs, err := shapes(root, top.App)
	if err != nil {
		return Spec{}, lined(root, err)
	}
	project, err := load(root, top.App)
	if err != nil {
		return Spec{}, loaderError(root, err)
	}
	for name, env := range envs { // as it is written: compose-go spells numbers anew
		sv := project.Services[name]
		sv.Environment = env
		project.Services[name] = sv
	}
	s := Spec{App: top.App, Version: top.Version, Operations: slices.Clone(top.Operations)}
	if err := s.fill(project, top, services); err != nil {
		return Spec{}, lined(root, err)
	}
	return s, nil
}

// load lets compose-go read what has a meaning in Compose, with nothing of this machine, and no environment: see [environment].
func load(root *yaml.Node, name string) (*types.Project, error) {
	bare := *root
	if at := keyAt(root, "services"); at >= 0 {
		bare.Content = slices.Clone(root.Content)
		services := *root.Content[at+1]
		services.Content = slices.Clone(services.Content)
		for i := 1; i < len(services.Content); i += 2 {
			sv := *services.Content[i]
			if e := keyAt(&sv, "environment"); e >= 0 {
				sv.Content = slices.Delete(slices.Clone(sv.Content), e, e+2)
			}
			services.Content[i] = &sv
		}
		bare.Content[at+1] = &services
	}
	file, err := yaml.Marshal(&bare)
	if err != nil {
		return nil, err
	}
	return loader.LoadWithContext(context.Background(), types.ConfigDetails{WorkingDir: "/", Environment: types.Mapping{},
		ConfigFiles: []types.ConfigFile{{Filename: "compose.yaml", Content: file}}}, func(o *loader.Options) {
		o.SetProjectName(name, true)
		o.SkipInclude, o.SkipExtends, o.SkipResolveEnvironment, o.SkipResolveLabels = true, true, true, true
		o.SkipConsistencyCheck = true // of images, which the process runtime has none of; what matters is checked in the plan
	})
}

// document reads one YAML document without anchors and variables.
func document(file []byte) (*yaml.Node, error) {
	dec := yaml.NewDecoder(bytes.NewReader(file))
	var doc, second yaml.Node
	if err := dec.Decode(&doc); err != nil {
		return nil, fault.Because(err, "manifest.yaml", fault.Invalid, "not YAML: %.200s", strings.TrimPrefix(err.Error(), "yaml: "))
	}
	if err := dec.Decode(&second); !errors.Is(err, io.EOF) {
		return nil, fault.New("manifest.yaml", fault.Invalid, "a second document, or bytes after the first")
	}
	if len(doc.Content) != 1 || doc.Content[0].Kind != yaml.MappingNode {
		return nil, fault.New("manifest.yaml", fault.Invalid, "line 1: the file must be a mapping")
	}
	return doc.Content[0], walk(doc.Content[0], 0, false)
}

// decimal is how a number is written that all readers of YAML read alike: 010 is eight for some, and 0x1F or 1_000 text.
var decimal = regexp.MustCompile(`^-?(0|[1-9][0-9]*)(\.[0-9]+)?$`)

// walk refuses what has more than one reading. In an environment a value is its own text, however it is spelled.
func walk(n *yaml.Node, depth int, env bool) error {
	bad := func(format string, args ...any) error {
		return fault.New("manifest.yaml", fault.Invalid, "line %d: %s", n.Line, fmt.Sprintf(format, args...))
	}
	switch {
	case depth > 32:
		return bad("nested more than 32 deep")
	case n.Kind == yaml.AliasNode || n.Anchor != "":
		return bad("anchors and aliases are not taken: write it out")
	case strings.HasPrefix(n.Tag, "!") && !strings.HasPrefix(n.Tag, "!!"):
		return bad("the tag %.32s is not taken", n.Tag)
	case n.Kind == yaml.ScalarNode && !env && (n.Tag == "!!int" || n.Tag == "!!float") && !decimal.MatchString(n.Value):
		return bad("the number %.32s can be read in more than one way: write it in decimal, or quote it", n.Value)
	case n.Kind == yaml.ScalarNode && n.Tag == "!!timestamp" && !env:
		return bad("the date %.32s: quote it", n.Value)
	case n.Kind == yaml.ScalarNode && strings.Contains(strings.ReplaceAll(n.Value, "$$", ""), "$"):
		return bad("a variable: nothing is taken from the environment ($$ is a dollar sign)")
	}
	seen := map[string]bool{}
	for i, c := range n.Content {
		if n.Kind == yaml.MappingNode && i%2 == 0 {
			if seen[c.Value] || c.Value == "<<" {
				return fault.New("manifest.yaml", fault.Invalid, "line %d: the key %.64q is there twice, or merges", c.Line, c.Value)
			}
			seen[c.Value] = true
		}
		in := env || n.Kind == yaml.MappingNode && i%2 == 1 && n.Content[i-1].Value == "environment"
		if err := walk(c, depth+1, in); err != nil {
			return err
		}
	}
	return nil
}

// only refuses keys that are not on a list.
func only(n *yaml.Node, what string, keys []string) error {
	if n.Kind != yaml.MappingNode {
		return fault.New("manifest.keys", fault.Invalid, "line %d: %s must be a mapping", n.Line, what)
	}
	for i := 0; i < len(n.Content); i += 2 {
		k := n.Content[i]
		if !slices.Contains(keys, k.Value) {
			reason := why[k.Value]
			if reason == "" {
				reason = "known are " + strings.Join(keys, ", ")
			}
			return fault.New("manifest.keys", fault.Invalid, "line %d: %s: %.64q is not taken: %s", k.Line, what, k.Value, reason)
		}
	}
	return nil
}

func child(n *yaml.Node, key string) *yaml.Node {
	if i := keyAt(n, key); i >= 0 {
		return n.Content[i+1]
	}
	return nil
}

// keyAt returns the index of a key of a mapping, -1 if it has none.
func keyAt(n *yaml.Node, key string) int {
	for i := 0; n.Kind == yaml.MappingNode && i+1 < len(n.Content); i += 2 {
		if n.Content[i].Value == key {
			return i
		}
	}
	return -1
}

// each visits the entries of a mapping that may be missing.
func each(n *yaml.Node, what string, visit func(name string, n *yaml.Node) error) error {
	if n == nil {
		return nil
	}
	if n.Kind != yaml.MappingNode {
		return fault.New("manifest.keys", fault.Invalid, "line %d: %s must be a mapping", n.Line, what)
	}
	for i := 0; i+1 < len(n.Content); i += 2 {
		if err := visit(n.Content[i].Value, n.Content[i+1]); err != nil {
			return err
		}
	}
	return nil
}

// extensions reads x-demarc strictly, and refuses the keys of Compose that have no meaning here.
func extensions(root *yaml.Node) (xTop, map[string]xService, error) {
	const op = "manifest.extensions"
	var top xTop
	services := map[string]xService{}
	if err := only(root, "the file", topKeys); err != nil {
		return top, nil, err
	}
	x := child(root, "x-demarc")
	if x == nil {
		return top, nil, fault.New(op, fault.Invalid, "line 1: x-demarc is missing: it names the app, its version, ports and secrets")
	}
	if err := only(x, "x-demarc", topXKeys); err != nil {
		return top, nil, err
	}
	for key, keys := range map[string][]string{"ports": portKeys, "secrets": secretKeys} {
		if err := each(child(x, key), key, func(name string, n *yaml.Node) error { return only(n, key+" "+name, keys) }); err != nil {
			return top, nil, err
		}
	}
	if err := decode(x, "x-demarc", &top); err != nil {
		return top, nil, err
	}
	if err := each(child(x, "ports"),
		"ports", func(name string, n *yaml.Node) error { return whole("port "+name, child(n, "port")) }); err != nil {
		return top, nil, err
	}
	err := each(child(root, "services"), "services", func(name string, n *yaml.Node) error {
		what := "service " + name
		if err := only(n, what, serviceKeys); err != nil {
			return err
		}
		x := child(n, "x-demarc")
		if x == nil {
			return fault.New(op, fault.Invalid, "line %d: service %q has no x-demarc with its artifact", n.Line, name)
		}
		if err := only(x, what+" x-demarc", serviceXKeys); err != nil {
			return err
		}
		if h := child(x, "health"); h != nil {
			if err := only(h, what+" health", healthKeys); err != nil {
				return err
			}
		}
		var s xService
		if err := decode(x, what+" x-demarc", &s); err != nil {
			return err
		}
		services[name] = s
		numbers := []*yaml.Node{}
		if l := child(x, "listen"); l != nil {
			for i := 1; i < len(l.Content); i += 2 {
				numbers = append(numbers, l.Content[i])
			}
		}
		if h := child(x, "health"); h != nil {
			numbers = append(numbers, child(h, "port"), child(h, "retries"))
		}
		return whole(what, numbers...)
	})
	return top, services, err
}

// fill turns what was read into the parts of a plan.
func (s *Spec) fill(project *types.Project, top xTop, services map[string]xService) error {
	const op = "manifest.ParseCompose"
	if err := fleet.CheckName("app", s.App); err != nil {
		return below(err, "x-demarc", "app")
	}
	if !versionForm.MatchString(s.Version) || !strings.ContainsAny(s.Version, "0123456789") {
		return below(fault.New(op, fault.Invalid, "x-demarc version %.64q: use letters, digits and .+_-, with a digit: a release is one "+
			"version for ever, and not the latest",
			s.Version), "x-demarc", "version")
	}
	names := map[string]bool{}
	for _, f := range s.Operations {
		if !templateFile.MatchString(f) || names[TemplateName(f)] || len(names) >= maxTemplates {
			return below(
				fault.New(op, fault.Invalid, "operations: %.64q must be a relative path to a .yaml file, each name once, at most %d", f, maxTemplates),
				"x-demarc", "operations", f)
		}
		names[TemplateName(f)] = true
	}
	if len(top.Secrets) > maxNames || len(top.Ports) > maxNames {
		return below(fault.New(op, fault.Invalid, "at most %d secrets and %d ports", maxNames, maxNames), "x-demarc")
	}
	for _, name := range slices.Sorted(maps.Keys(top.Secrets)) {
		x := top.Secrets[name]
		if len(x.Hint) > 512 || !project.Secrets[name].External {
			return below(
				fault.New(op, fault.Invalid, "secret %.64q: its hint has at most 512 bytes, and in Compose's secrets it is external: true", name),
				"x-demarc", "secrets", name)
		}
		s.secrets = append(s.secrets, Secret{Name: name, Store: name, Required: x.Required, Hint: x.Hint})
	}
	for _, name := range slices.Sorted(maps.Keys(project.Secrets)) {
		if _, ok := top.Secrets[name]; !ok {
			return below(fault.New(op, fault.Invalid, "secret %.64q is not in x-demarc: say there whether it is required", name), "secrets", name)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(top.Ports)) {
		x := top.Ports[name]
		s.ports = append(s.ports, Port{name, x.Service, x.Port, x.Protocol, x.Widest})
	}
	byName := map[string]Service{}
	for _, name := range slices.Sorted(maps.Keys(services)) {
		x := services[name]
		if !artifactPath.MatchString(x.Artifact) || !localPath(x.Artifact) {
			return below(fault.New(op, fault.Invalid, "service %.64q: artifact %.64q must be a folder beside the file", name, x.Artifact),
				"services", name, "x-demarc", "artifact")
		}
		sv, err := service(project.Services[name], x)
		if err != nil {
			return below(err, "services", name)
		}
		s.Services = append(s.Services, SpecService{name, x.Artifact, sv.Programs()})
		byName[name] = sv
	}
	var err error
	if s.plan, err = order(byName); err != nil {
		return err
	}
	// The plan's own check knows all the rest; the artifacts are not here yet.
	whole := Plan{Version: PlanVersion, App: s.App, AppVersion: s.Version, Runtime: fleet.RuntimeProcess, Services: slices.Clone(s.plan),
		Ports: s.ports, Secrets: s.secrets}
	for i := range whole.Services {
		whole.Services[i].Artifact = fleet.DigestOf(nil)
	}
	return whole.Check()
}

// service makes a service of what Compose and x-demarc say.
func service(c types.ServiceConfig, x xService) (Service, error) {
	bad := func(at []string, format string, args ...any) (Service, error) {
		return Service{}, below(fault.New("manifest.service", fault.Invalid, "service %.64q: %s", c.Name, fmt.Sprintf(format, args...)), at...)
	}
	at := func(path ...string) []string { return path }
	s := Service{Name: c.Name, Argv: c.Command, Limits: Limits{int64(c.MemLimit), float64(c.CPUS), c.PidsLimit}}
	for _, name := range slices.Sorted(maps.Keys(c.Environment)) {
		v := c.Environment[name]
		if v == nil {
			return bad(at("environment", name), "variable %.64q has no value: nothing is taken from the environment", name)
		}
		s.Env = append(s.Env, Env{Name: name, Value: *v})
	}
	for _, use := range c.Secrets {
		if use.UID != "" || use.GID != "" || use.Mode != nil {
			return bad(at("secrets", use.Source), "secret %.64q: uid, gid and mode are the customer's", use.Source)
		}
		target := use.Target
		if !envName.MatchString(target) {
			return bad(at("secrets", use.Source), "secret %.64q: target %.64q must be the variable that holds the path of its file, for instance "+
				"TOKEN_FILE", use.Source, target)
		}
		s.Env = append(s.Env, Env{Name: target, Secret: use.Source})
	}
	for _, name := range slices.Sorted(maps.Keys(x.Wire)) {
		if !wireForm.MatchString(x.Wire[name]) {
			return bad(at("x-demarc", "wire", name), "wire %.64q: write service:port", name)
		}
		s.Env = append(s.Env, Env{Name: name, Wire: x.Wire[name]})
	}
	slices.SortFunc(s.Env, func(a, b Env) int { return strings.Compare(a.Name, b.Name) })
	for _, name := range slices.Sorted(maps.Keys(x.Listen)) {
		s.Listen = append(s.Listen, Listen{name, x.Listen[name]})
	}
	for _, name := range slices.Sorted(maps.Keys(c.DependsOn)) {
		if cond := c.DependsOn[name].Condition; cond != types.ServiceConditionStarted && cond != types.ServiceConditionHealthy {
			return bad(at("depends_on", name), "depends_on %.64q: the condition %.64q is not taken", name, cond)
		}
		s.DependsOn = append(s.DependsOn, name)
	}
	if h := x.Health; h != nil {
		out := &Health{HTTP: h.HTTP, Port: h.Port, Exec: h.Exec, Retries: h.Retries}
		if out.Retries == 0 {
			out.Retries = 3
		}
		for _, t := range []struct {
			text     string
			standard time.Duration
			to       *int64
		}{{h.Interval, time.Second, &out.IntervalMS}, {h.Timeout, 2 * time.Second, &out.TimeoutMS}, {h.Start, 30 * time.Second, &out.StartMS}} {
			ms, ok := duration(t.text, t.standard)
			if !ok {
				return bad(at("x-demarc", "health"), "health: %.32q is not a time between 100ms and 1h", t.text)
			}
			*t.to = ms
		}
		s.Health = out
	}
	return s, nil
}

// order sorts services so that each starts after those that it depends on, and else by name.
func order(services map[string]Service) ([]Service, error) {
	const op = "manifest.order"
	out := make([]Service, 0, len(services))
	done := map[string]bool{}
	for len(out) < len(services) {
		before := len(out)
		for _, name := range slices.Sorted(maps.Keys(services)) {
			s := services[name]
			if done[name] || slices.ContainsFunc(s.DependsOn, func(d string) bool { return !done[d] }) {
				continue
			}
			out, done[name] = append(out, s), true
		}
		if len(out) == before {
			var rest []string
			for _, name := range slices.Sorted(maps.Keys(services)) {
				if !done[name] {
					rest = append(rest, name)
				}
			}
			return nil,
				below(fault.New(op, fault.Invalid, "the services %s wait for each other, or for one that is not there", strings.Join(rest, ", ")),
					"services", rest[0], "depends_on")
		}
	}
	return out, nil
}
