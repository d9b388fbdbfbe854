// SPDX-License-Identifier: Apache-2.0

// Package workload makes what runs equal to the plan: process, Docker Engine, Kubernetes. This build has the process
// runtime; a plan for another is refused.
//
// # Promise
//
// What runs is the plan, or the last plan that was well, or nothing; which of them, Status says. No shell is involved.
// A service that did not change is not touched by a new plan. Nothing that was started outlives this process by more
// than its next start: the kernel kills each service with it, and Open finds what is left of an earlier run by a mark
// in its environment, so that no foreign process is ever killed.
//
// # What a service gets
//
// Its folder is the unpacked artifact. Its environment is PATH, HOME (a folder of its own that stays across
// releases), the mark DEMARC_RUN, and what the plan says; a variable with a secret holds the path of a file, and is
// absent where an optional secret is. Listeners get loopback addresses, which they keep. Services run as the user of this
// process. Limits of a plan are not enforced by this build; where a plan has some, the Reason of the service says so.
//
// # What Exec holds
//
// A time, a size of output, and an end: the whole process group is killed. Without Network the program gets a network with
// nothing in it, by a namespace of its own; where the host does not allow that, Exec refuses to run. Without Credentials
// it is not told where secrets are. Its file system is that of the appliance's user: Writes is not enforced by this build.
package workload

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/manifest"
	"github.com/demarc-dev/demarc/workload/artifact"
)

// Config is what a Process needs. Dir, Artifacts and Secrets must be given.
type Config struct {
	Dir       string // its own; one process at a time
	Artifacts *artifact.Store
	Secrets   Secrets
	Logger    *slog.Logger
	Now       func() time.Time
	Stop      time.Duration // from SIGTERM to SIGKILL; 10 s
}

// Status is what runs.
type Status struct {
	Plan     fleet.Digest // the last that was well; "" before
	Services []ServiceStatus
}

// ServiceStatus is one service. PID is 0 while it does not run.
type ServiceStatus struct {
	Name     string
	Healthy  bool
	Restarts int
	PID      int
	Since    time.Time // of its being healthy, or not
	Reason   string    // why it is not healthy, or what does not hold of its limits; it may name paths
	Why      fleet.Reason
}

// Process is the process runtime. Its methods may be called concurrently.
type Process struct {
	cfg   Config
	disk  *disk
	base  context.Context // ends with Close
	spawn chan func()     // runs on a thread that stays: the kernel's death signal is tied to the thread that forked
	end   context.CancelFunc
	wg    sync.WaitGroup
	turn  chan struct{} // held by Apply and Close

	mu      sync.Mutex // guards what follows
	closed  bool
	plan    fleet.Digest
	units   []*unit // in the order in which they started
	changed chan struct{}
}

// Open takes the folder, which must not be in use, and ends what an earlier process left running. Nothing is started
// before Apply.
func Open(cfg Config) (*Process, error) {
	const op = "workload.Open"
	if cfg.Dir == "" || cfg.Artifacts == nil || cfg.Secrets == nil {
		return nil, fault.New(op, fault.Invalid, "a folder, a store of artifacts and one of secrets are needed")
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Stop <= 0 {
		cfg.Stop = 10 * time.Second
	}
	dir, err := filepath.Abs(cfg.Dir)
	if err != nil {
		return nil, fault.At(op, fault.Invalid, err)
	}
	for _, d := range []string{dir, filepath.Join(dir, "app"), filepath.Join(dir, "home"), filepath.Join(dir, "log")} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			return nil, fault.Because(err, op, fault.Unavailable, "the folder of the runtime can't be made")
		}
	}
	if cfg.Dir, err = filepath.EvalSymlinks(dir); err != nil {
		return nil, fault.At(op, fault.Unavailable, err)
	}
	d, err := openDisk(cfg.Dir)
	if err != nil {
		return nil, fault.At(op, "", err)
	}
	killed, err := endOrphans(d.rec)
	if err != nil {
		return nil, errors.Join(fault.At(op, "", err), d.close())
	}
	if err := d.mark(); err != nil { // the mark of before is as good: what bore it was ended just now
		cfg.Logger.Error("the runtime can't write its state: what runs goes on, and nothing new can be deployed", "err", err)
	}
	if killed > 0 {
		cfg.Logger.Warn("ended processes of an earlier run", "count", killed)
	}
	clearScratch(cfg.Dir)
	p := &Process{cfg: cfg, disk: d, turn: make(chan struct{}, 1), changed: make(chan struct{})}
	p.base, p.end = context.WithCancel(context.Background())
	p.spawn = make(chan func())
	p.wg.Go(p.spawner)
	return p, nil
}

func clearScratch(dir string) {
	half, _ := filepath.Glob(filepath.Join(dir, "app", ".unpack-*"))
	for _, o := range half {
		_ = os.RemoveAll(o)
	}
}

// Missing lists the required secrets of a plan that are not present.
func (p *Process) Missing(plan manifest.Plan) ([]manifest.Secret, error) {
	var out []manifest.Secret
	for _, s := range plan.Secrets {
		if !s.Required {
			continue
		}
		there, err := p.cfg.Secrets.Present(s.Store)
		if err != nil {
			return nil, fault.At("workload.Missing", "", err)
		}
		if !there {
			out = append(out, s)
		}
	}
	return out, nil
}

// Status tells what runs now.
func (p *Process) Status() Status {
	p.mu.Lock()
	defer p.mu.Unlock()
	s := Status{Plan: p.plan}
	for _, u := range p.units {
		s.Services = append(s.Services, u.status)
		if last := &s.Services[len(s.Services)-1]; u.log.failing() {
			last.Reason = strings.TrimPrefix(last.Reason+"; its log can't be written", "; ")
			if last.Healthy {
				last.Why = u.because(fleet.LogNotWritten, 0)
			}
		}
	}
	return s
}

// Changed gives a channel that is closed when the Status changes next. Take it before the Status.
func (p *Process) Changed() <-chan struct{} {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.changed
}

// touch tells of a change of the Status; p.mu is held.
func (p *Process) touch() {
	close(p.changed)
	p.changed = make(chan struct{})
}

// Addr gives the loopback address of a listener of the services that run.
func (p *Process) Addr(service string, port int) (string, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	u := p.unit(service)
	if u == nil {
		return "", false
	}
	addr, ok := u.listen[port]
	return addr, ok
}

// unit finds a service; p.mu is held.
func (p *Process) unit(name string) *unit {
	for _, u := range p.units {
		if u.def.Name == name {
			return u
		}
	}
	return nil
}

// take waits for the turn to change what runs.
func (p *Process) take(ctx context.Context) error {
	select {
	case p.turn <- struct{}{}:
		return nil
	case <-ctx.Done():
		return fault.At("workload.take", fault.Unavailable, ctx.Err())
	case <-p.base.Done():
		return fault.New("workload.take", fault.Unavailable, "the runtime is closed")
	}
}

func (p *Process) leave() { <-p.turn }

// Close ends an Apply and each Exec, and stops all services in reverse order. When ctx ends, they are killed.
func (p *Process) Close(ctx context.Context) error {
	p.mu.Lock()
	if p.closed {
		p.mu.Unlock()
		return nil
	}
	p.closed = true
	p.mu.Unlock()
	p.end()
	p.turn <- struct{}{} // an Apply gives it back soon, for base has ended; nobody gets it after
	p.mu.Lock()
	units := p.units
	p.units = nil
	p.touch()
	p.mu.Unlock()
	for i := len(units) - 1; i >= 0; i-- {
		units[i].stop(ctx)
	}
	close(p.spawn)
	p.wg.Wait()
	return fault.At("workload.Close", "", p.disk.close())
}
