// SPDX-License-Identifier: Apache-2.0

// Package manifest is what the vendor wrote (Compose + x-demarc) and the customer chose, compiled to exactly what will
// run. Pure.
//
// # Promise
//
// What a plan does not say does not run, and what the vendor wrote is in the plan or refused with its line: nothing is
// left out in silence. The same release and the same choices give the same plan, byte for byte, so that its digest is
// what a customer approves. Neither the environment nor any file of the machine has a say.
//
// # The file
//
// A Compose file of at most 256 KiB, without anchors, variables, includes or extends. At its top
//
//	x-demarc:
//	  app: notes
//	  version: 1.0.0
//	  ports:                          # for end users; the customer's posture decides whether a door opens
//	    web: {service: web, port: 8080, protocol: http, widest: public}
//	  secrets:                        # a name here is external in Compose's secrets
//	    store-token: {required: true, hint: the token that web and store share}
//	  operations: [operations/state.yaml]
//
// and in a service
//
//	x-demarc:
//	  artifact: store                 # a folder beside the file; its bytes are in the release by digest
//	  listen: {STORE_LISTEN: 9000}    # this variable says where to listen, host:port, for what others call port 9000
//	  wire: {STORE_ADDR: "store:9000"} # this variable says where that is, host:port
//	  health: {http: /healthz, port: 9000, interval: 1s, timeout: 2s, start: 30s, retries: 3}
//
// A secret's target in Compose is the variable that holds the path of its file; its value is never in a plan.
package manifest

import (
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
)

// Limits.
const (
	MaxCompose   = 256 << 10
	maxServices  = 64
	maxNames     = 256 // of anything else
	maxText      = 8 << 10
	maxTemplates = 64
	maxTemplate  = 64 << 10
)

// Release is what a vendor publishes and signs.
type Release struct {
	App       string                  `json:"app"`
	Version   string                  `json:"version"`
	Compose   string                  `json:"compose"`             // the file, as it was written
	Artifacts map[string]fleet.Digest `json:"artifacts"`           // of each service
	Templates map[string]string       `json:"templates,omitempty"` // of operations: name and YAML
}

// PayloadType names the document.
func (Release) PayloadType() string { return "application/vnd.demarc.release+json;v=1" }

// Check tells the first thing that is wrong with the release by itself: the file must be one, and the release must hold
// what the file names and nothing else.
func (r Release) Check() error {
	_, err := r.spec()
	return err
}

func (r Release) spec() (Spec, error) {
	const op = "manifest.Release"
	s, err := ParseCompose([]byte(r.Compose))
	if err != nil {
		return s, err
	}
	if s.App != r.App || s.Version != r.Version {
		return s, fault.New(op, fault.Invalid, "the release is called %.64s %.64s, and its file says %s %s", r.App, r.Version, s.App, s.Version)
	}
	want := map[string]bool{}
	for _, sv := range s.Services {
		want[sv.Name] = true
		d, ok := r.Artifacts[sv.Name]
		if !ok {
			return s, fault.New(op, fault.Invalid, "service %q has no artifact in the release", sv.Name)
		}
		if err := d.Check(); err != nil {
			return s, fault.Because(err, op, fault.Invalid, "the artifact of service %q: %s", sv.Name, fault.Text(err))
		}
	}
	for _, name := range slices.Sorted(maps.Keys(r.Artifacts)) {
		if !want[name] {
			return s, fault.New(op, fault.Invalid, "the release has an artifact of %.64q, and its file has no such service", name)
		}
	}
	wanted := map[string]bool{}
	for _, file := range s.Operations {
		name := TemplateName(file)
		wanted[name] = true
		if text, ok := r.Templates[name]; !ok || text == "" || len(text) > maxTemplate {
			return s, fault.New(op, fault.Invalid, "the release has no template %q, or one of more than %d bytes", name, maxTemplate)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(r.Templates)) {
		if !wanted[name] {
			return s, fault.New(op, fault.Invalid, "the release has a template %.64q that its file does not name", name)
		}
	}
	return s, nil
}

// TemplateName is the name of the operation whose template stands in a file: operations/state.yaml is state.
func TemplateName(file string) string {
	return strings.TrimSuffix(file[strings.LastIndex(file, "/")+1:], ".yaml")
}

// Choices is what the customer decides about how a release runs.
type Choices struct {
	Runtime string            // fleet.RuntimeProcess
	Secrets map[string]string // name in the manifest -> name in the customer's store; absent: the same
}

// Compile makes the plan of exactly what will run.
func Compile(r Release, c Choices) (Plan, error) {
	const op = "manifest.Compile"
	s, err := r.spec()
	if err != nil {
		return Plan{}, fault.At(op, "", err)
	}
	if c.Runtime != fleet.RuntimeProcess {
		return Plan{}, fault.New(op, fault.Invalid, "the runtime %.32q is not one that this build compiles for: use %s", c.Runtime,
			fleet.RuntimeProcess)
	}
	p := Plan{Version: PlanVersion, App: s.App, AppVersion: s.Version, Runtime: c.Runtime, Services: s.plan, Ports: s.ports,
		Secrets: slices.Clone(s.secrets)}
	for i := range p.Services {
		p.Services[i].Artifact = r.Artifacts[p.Services[i].Name]
	}
	for i, x := range p.Secrets {
		if to, ok := c.Secrets[x.Name]; ok {
			if err := fleet.CheckName("secret", to); err != nil {
				return Plan{}, err
			}
			p.Secrets[i].Store = to
		}
	}
	for _, file := range s.Operations {
		name := TemplateName(file)
		p.Operations = append(p.Operations, Operation{name, fleet.DigestOf([]byte(r.Templates[name]))})
	}
	slices.SortFunc(p.Operations, func(a, b Operation) int { return strings.Compare(a.Name, b.Name) })
	if err := p.Check(); err != nil {
		return Plan{}, fault.At(op, fault.Internal, err)
	}
	return p, nil
}

func duration(text string, standard time.Duration) (int64, bool) {
	if text == "" {
		return standard.Milliseconds(), true
	}
	d, err := time.ParseDuration(text)
	return d.Milliseconds(), err == nil && d >= 100*time.Millisecond && d <= time.Hour
}
