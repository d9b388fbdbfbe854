// SPDX-License-Identifier: Apache-2.0

package workload

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/manifest"
	"github.com/demarc-dev/demarc/workload/artifact"
)

// Apply makes what runs equal to the plan, and returns when every service is well. Where that fails, it goes back to the
// last plan that was well, and the error says which of them runs now.
func (p *Process) Apply(ctx context.Context, plan manifest.Plan) error {
	const op = "workload.Apply"
	if plan.Runtime != fleet.RuntimeProcess {
		return fault.New(op, fault.Invalid, "this build has no runtime %.32q", plan.Runtime)
	}
	if err := plan.Check(); err != nil {
		return fault.At(op, "", err)
	}
	if err := p.take(ctx); err != nil {
		return err
	}
	defer p.leave()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(p.base, cancel)()
	err := p.reach(ctx, plan)
	if err == nil {
		if raw := plan.JSON(); !bytes.Equal(p.disk.get().Good, raw) {
			if err := p.disk.change(func(r *record) { r.Good = raw }); err != nil {
				return fault.At(op, "", err)
			}
		}
		p.mu.Lock()
		p.plan = plan.Digest()
		p.touch()
		p.mu.Unlock()
		return nil
	}
	if p.base.Err() != nil {
		return fault.At(op, "", err)
	}
	return p.goBack(plan, err)
}

// goBack returns to the last plan that was well.
func (p *Process) goBack(from manifest.Plan, why error) error {
	const op = "workload.Apply"
	told := fleet.ReasonOf(why)
	var good manifest.Plan
	if raw := p.disk.get().Good; raw != nil && json.Unmarshal(raw, &good) == nil && good.Digest() != from.Digest() {
		ctx, cancel := context.WithTimeout(p.base, 2*time.Minute)
		defer cancel()
		if err := p.reach(ctx, good); err == nil {
			told.Runs = fleet.RunsPrevious
			return told.With(
				fault.Because(why, op, fault.Of(why), "%s; version %s, the last that was well, runs on", fault.Text(why), good.AppVersion))
		}
		told.Runs = fleet.RunsUnknown
		return told.With(fault.Because(why, op, fault.Of(why), "%s; and going back to version %s failed too", fault.Text(why), good.AppVersion))
	}
	p.mu.Lock()
	units := p.units
	p.units = nil
	p.touch()
	p.mu.Unlock()
	for i := len(units) - 1; i >= 0; i-- {
		units[i].stop(context.Background())
	}
	told.Runs = fleet.RunsNothing
	return told.With(fault.Because(why, op, fault.Of(why), "%s; nothing runs, for there was no version before", fault.Text(why)))
}

// reach does the work of Apply in one direction.
func (p *Process) reach(ctx context.Context, plan manifest.Plan) error {
	if p.disk.get().Mark == "" { // of a first start on a full disk: without it, nobody would find what is left of this run
		if err := p.disk.mark(); err != nil {
			return err
		}
	}
	for _, s := range plan.Services {
		if err := p.cfg.Artifacts.Unpack(s.Artifact, p.folder(s)); err != nil {
			if k := fault.Of(err); k == fault.Invalid || k == fault.Internal {
				return fleet.Reason{Kind: fleet.ArtifactDamaged, Service: s.Name}.With(err)
			}
			return err
		}
		for _, program := range s.Programs() { // before anything is replaced
			if err := artifact.CheckProgram(p.folder(s), program); err != nil {
				return fleet.Reason{Kind: fleet.ProgramMissing,
					Service: s.Name}.With(fault.Because(err, "workload.Apply", fault.Invalid, "service %s: %s", s.Name, fault.Text(err)))
			}
		}
	}
	p.mu.Lock()
	held := map[string]string{}
	for _, u := range p.units {
		for port, addr := range u.listen {
			held[listener(u.def.Name, port)] = addr
		}
	}
	p.mu.Unlock()
	addrs, err := p.address(plan, held)
	if err != nil {
		return err
	}
	var next []*unit
	for _, s := range plan.Services {
		u, err := p.place(ctx, plan, s, addrs)
		if err != nil {
			return err
		}
		next = append(next, u)
	}
	p.mu.Lock()
	var gone []*unit
	for _, u := range p.units {
		if !contains(next, u) {
			gone = append(gone, u)
		}
	}
	p.units = next
	p.touch()
	p.mu.Unlock()
	for i := len(gone) - 1; i >= 0; i-- {
		gone[i].stop(ctx)
	}
	return nil
}

func contains(list []*unit, u *unit) bool {
	for _, x := range list {
		if x == u {
			return true
		}
	}
	return false
}

// place keeps a service that did not change, and else stops the old one, starts the new one and waits until it is well.
func (p *Process) place(ctx context.Context, plan manifest.Plan, s manifest.Service, addrs map[string]string) (*unit, error) {
	env, err := p.environment(plan, s, addrs, true)
	if err != nil {
		return nil, err
	}
	key, err := json.Marshal(map[string]any{"service": s, "env": env})
	if err != nil {
		return nil, fault.At("workload.place", fault.Internal, err)
	}
	p.mu.Lock()
	old := p.unit(s.Name)
	p.mu.Unlock()
	if old != nil && old.key == string(key) {
		return old, old.well(ctx)
	}
	if old != nil {
		old.stop(ctx)
	}
	u := &unit{p: p, def: s, key: string(key), env: env, dir: p.folder(s), listen: map[int]string{}, halt: make(chan struct{}),
		ended:  make(chan struct{}),
		status: ServiceStatus{Name: s.Name, Since: p.cfg.Now(), Reason: "is starting", Why: fleet.Reason{Kind: fleet.Starting, Service: s.Name}}}
	if s.Limits != (manifest.Limits{}) {
		u.note = "its limits are not enforced by this build"
		p.cfg.Logger.Warn("limits are not enforced", "service", s.Name)
	}
	if u.envBare, err = p.environment(plan, s, addrs, false); err != nil {
		return nil, err
	}
	for _, l := range s.Listen {
		u.listen[l.Port] = addrs[listener(s.Name, l.Port)]
	}
	p.mu.Lock()
	replaced := false
	for i, x := range p.units {
		if x == old && old != nil {
			p.units[i], replaced = u, true
		}
	}
	if !replaced {
		p.units = append(p.units, u)
	}
	p.touch()
	p.mu.Unlock()
	p.wg.Go(u.supervise)
	return u, u.well(ctx)
}

func (p *Process) folder(s manifest.Service) string {
	return filepath.Join(p.cfg.Dir, "app", strings.TrimPrefix(string(s.Artifact), "sha256:"))
}

// environment is all that a service is told. Values of secrets are not in it: only the paths of their files.
func (p *Process) environment(plan manifest.Plan, s manifest.Service, addrs map[string]string, credentials bool) ([]string, error) {
	const op = "workload.environment"
	home := filepath.Join(p.cfg.Dir, "home", s.Name)
	if err := os.MkdirAll(home, 0o700); err != nil {
		return nil, fault.At(op, fault.Unavailable, err)
	}
	env := []string{}
	stores := map[string]string{}
	for _, x := range plan.Secrets {
		stores[x.Name] = x.Store
	}
	for _, e := range s.Env {
		switch {
		case e.Wire != "":
			env = append(env, e.Name+"="+addrs[e.Wire])
		case e.Secret != "":
			if !credentials {
				continue
			}
			there, err := p.cfg.Secrets.Present(stores[e.Secret])
			if err != nil {
				return nil, fault.At(op, "", err)
			}
			if there {
				env = append(env, e.Name+"="+p.cfg.Secrets.Path(stores[e.Secret]))
			}
		default:
			env = append(env, e.Name+"="+e.Value)
		}
	}
	for _, l := range s.Listen {
		env = append(env, fmt.Sprintf("%s=%s", l.Env, addrs[listener(s.Name, l.Port)]))
	}
	// Last, since the last one of a name counts: the mark is that by which what is left over is found.
	return append(env, "PATH=/usr/local/bin:/usr/bin:/bin", "HOME="+home, "DEMARC_RUN="+p.disk.get().Mark), nil
}
