// SPDX-License-Identifier: Apache-2.0

package workload

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/manifest"
)

// unit is one supervised service.
type unit struct {
	p       *Process
	def     manifest.Service
	key     string // all that makes a restart necessary
	env     []string
	envBare []string // without credentials
	dir     string
	note    string
	listen  map[int]string // constant
	status  ServiceStatus  // guarded by p.mu
	log     *serviceLog    // of the run under way; guarded by p.mu

	once  sync.Once
	halt  chan struct{} // closed to stop
	ended chan struct{} // closed when nothing of it runs
	kill  context.Context
}

// Restarts wait between these, doubling, with jitter.
const (
	firstBackoff = 200 * time.Millisecond
	lastBackoff  = 30 * time.Second
	calm         = time.Minute // of running makes the next restart quick again
)

// again is before why a service ended, while it is starting anew.
const again = "is starting again; before that, "

// spawner starts processes from one thread that never ends before this process: the kernel sends the death signal when
// the thread that forked ends.
func (p *Process) spawner() {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	for f := range p.spawn {
		f()
	}
}

// start starts a command on the spawner's thread.
func (p *Process) start(cmd *exec.Cmd) error {
	done := make(chan error, 1)
	p.spawn <- func() { done <- cmd.Start() }
	return <-done
}

func (u *unit) set(f func(*ServiceStatus)) {
	u.p.mu.Lock()
	defer u.p.mu.Unlock()
	was := u.status
	f(&u.status)
	if u.status.Healthy {
		u.status.Why = fleet.Reason{}
		if u.status.Reason == "" && u.note != "" {
			u.status.Reason, u.status.Why = u.note, u.because(fleet.LimitsIgnored, 0)
		}
	}
	if was != u.status {
		if was.Healthy != u.status.Healthy {
			u.status.Since = u.p.cfg.Now()
		}
		u.p.touch()
	}
}

// supervise runs the service until it is stopped, again and again.
func (u *unit) supervise() {
	defer close(u.ended)
	backoff := firstBackoff
	for {
		began := time.Now()
		why, kind := u.once1()
		select {
		case <-u.halt:
			return
		default:
		}
		if time.Since(began) > calm {
			backoff = firstBackoff
		}
		u.set(func(s *ServiceStatus) {
			s.Healthy, s.PID, s.Reason, s.Why = false, 0, why, kind
			s.Restarts++
		})
		u.p.cfg.Logger.Warn("a service ended", "service", u.def.Name, "why", why, "again_in", backoff)
		select {
		case <-u.halt:
			return
		case <-time.After(backoff/2 + rand.N(backoff)):
		}
		backoff = min(2*backoff, lastBackoff)
	}
}

// because is a reason that is about this service.
func (u *unit) because(k fleet.ReasonKind, number int) fleet.Reason {
	return fleet.Reason{Kind: k, Service: u.def.Name, Number: int32(number)}
}

// once1 runs the service one time and says why it ended.
func (u *unit) once1() (string, fleet.Reason) {
	log := &serviceLog{path: filepath.Join(u.p.cfg.Dir, "log", u.def.Name+".log")}
	if err := log.open(); err != nil {
		u.p.cfg.Logger.Warn("the log of a service can't be written: it runs without", "service", u.def.Name, "err", err)
	}
	defer log.close()
	u.p.mu.Lock()
	u.log = log
	u.p.mu.Unlock()
	cmd := exec.Command(filepath.Join(u.dir, filepath.FromSlash(u.def.Argv[0])), u.def.Argv[1:]...)
	cmd.Dir, cmd.Env, cmd.Stdout, cmd.Stderr, cmd.WaitDelay = u.dir, u.env, log, log, time.Second
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	err := u.p.start(cmd)
	if err != nil {
		return "it can't be started: " + clip(errors.Unwrap(err)), u.because(fleet.NotStarted, 0)
	}
	u.set(func(s *ServiceStatus) {
		s.PID = cmd.Process.Pid
		if s.Restarts == 0 {
			s.Reason, s.Why = "is starting", u.because(fleet.Starting, 0)
		} else { // how it ended last is what a person looks for
			s.Reason = again + s.Reason
		}
	})
	watch, stop := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	exited := make(chan struct{})
	wg.Go(func() { u.watch(watch) })
	wg.Go(func() {
		select {
		case <-u.halt:
			u.end(cmd.Process.Pid, exited)
		case <-exited:
		}
	})
	err = cmd.Wait()
	close(exited)
	_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) // what is left of its group
	stop()
	wg.Wait()
	if st, ok := cmd.ProcessState.Sys().(syscall.WaitStatus); ok && st.Signaled() {
		return "it ended: " + clip(err), u.because(fleet.Signalled, int(st.Signal()))
	}
	kind := u.because(fleet.Exited, cmd.ProcessState.ExitCode())
	if err == nil {
		return "it ended by itself", kind
	}
	return "it ended: " + clip(err), kind
}

func clip(err error) string {
	if err == nil {
		return "unknown"
	}
	return fault.ClipTo(err.Error(), 200)
}

// end asks the group to stop, and kills it where it does not.
func (u *unit) end(pid int, exited chan struct{}) {
	_ = syscall.Kill(-pid, syscall.SIGTERM)
	t := time.NewTimer(u.p.cfg.Stop)
	defer t.Stop()
	select {
	case <-exited:
	case <-t.C:
		_ = syscall.Kill(-pid, syscall.SIGKILL)
	case <-u.kill.Done():
		_ = syscall.Kill(-pid, syscall.SIGKILL)
	}
}

// stop ends the service; when ctx ends first, it is killed.
func (u *unit) stop(ctx context.Context) {
	u.once.Do(func() {
		u.kill = ctx
		close(u.halt)
	})
	<-u.ended
}

// well waits until the service is healthy, for as long as it may take to start.
func (u *unit) well(ctx context.Context) error {
	const op = "workload.well"
	limit := 30 * time.Second
	if u.def.Health != nil {
		limit = time.Duration(u.def.Health.StartMS) * time.Millisecond
	}
	t := time.NewTimer(limit)
	defer t.Stop()
	for {
		changed := u.p.Changed()
		u.p.mu.Lock()
		s := u.status
		u.p.mu.Unlock()
		if s.Healthy {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return fault.Because(ctx.Err(), op, fault.Unavailable, "the deploy was called off while service %s was starting", u.def.Name)
		case <-t.C:
			why := s.Why
			if why.Kind == "" || why.Kind == fleet.Starting {
				why = u.because(fleet.NotHealthyInTime, int(limit.Seconds()))
			}
			return why.With(fault.New(op, fault.Unavailable, "service %s was not healthy within %s: %s", u.def.Name, limit, s.Reason))
		}
	}
}

// watch looks at the health of a running service.
func (u *unit) watch(ctx context.Context) {
	h := u.def.Health
	if h == nil {
		u.set(func(s *ServiceStatus) { s.Healthy, s.Reason = true, "" })
		return
	}
	tick := time.NewTicker(time.Duration(h.IntervalMS) * time.Millisecond)
	defer tick.Stop()
	for failures := 0; ; {
		probe, cancel := context.WithTimeout(ctx, time.Duration(h.TimeoutMS)*time.Millisecond)
		status, err := u.probe(probe)
		cancel()
		if ctx.Err() != nil {
			return
		}
		if err == nil {
			failures = 0
			u.set(func(s *ServiceStatus) { s.Healthy, s.Reason = true, "" })
		} else if failures++; failures >= h.Retries {
			u.set(func(s *ServiceStatus) {
				s.Healthy, s.Reason, s.Why = false, "its health check fails: "+fault.Text(err), u.because(fleet.HealthFails, status)
			})
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// probe looks once. status is that of an HTTP answer, 0 for none.
func (u *unit) probe(ctx context.Context) (status int, err error) {
	const op = "workload.probe"
	h := u.def.Health
	switch {
	case len(h.Exec) > 0:
		cmd := exec.CommandContext(ctx, filepath.Join(u.dir, filepath.FromSlash(h.Exec[0])), h.Exec[1:]...)
		cmd.Dir, cmd.Env, cmd.WaitDelay = u.dir, u.env, time.Second
		if err := cmd.Run(); err != nil {
			return 0, fault.Because(err, op, fault.Unavailable, "the program says no")
		}
		return 0, nil
	case h.HTTP != "":
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+u.listen[h.Port]+h.HTTP, nil)
		if err != nil {
			return 0, fault.At(op, fault.Internal, err)
		}
		c := &http.Client{Transport: &http.Transport{DisableKeepAlives: true},
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
		res, err := c.Do(req)
		if err != nil {
			return 0, fault.Because(err, op, fault.Unavailable, "no answer")
		}
		res.Body.Close()
		if res.StatusCode < 200 || res.StatusCode > 299 {
			return res.StatusCode, fault.New(op, fault.Unavailable, "the answer is %d", res.StatusCode)
		}
		return 0, nil
	}
	c, err := new(net.Dialer).DialContext(ctx, "tcp", u.listen[h.Port])
	if err != nil {
		return 0, fault.Because(err, op, fault.Unavailable, "the port takes no connection")
	}
	return 0, c.Close()
}

// maxLog is the size at which a service's log is moved aside, in bytes; one older file is kept.
const maxLog = 4 << 20

// serviceLog is what a service wrote, bounded. It is written while its file can be had, and stops no service otherwise.
type serviceLog struct {
	path string

	mu     sync.Mutex // guards what follows
	f      *os.File   // nil while it can't be opened
	n      int64
	closed bool
}

// open opens the file, if it is not open.
func (l *serviceLog) open() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.reopen(os.O_APPEND)
}

// reopen is open with l.mu held.
func (l *serviceLog) reopen(how int) error {
	if l.f != nil || l.closed {
		return nil
	}
	f, err := os.OpenFile(l.path, os.O_CREATE|os.O_WRONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK|how, 0o600)
	if err != nil {
		return err
	}
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = fault.New("workload.log", fault.Invalid, "%s is no file", filepath.Base(l.path))
	}
	if err != nil {
		return errors.Join(err, f.Close())
	}
	l.f, l.n = f, info.Size()
	return nil
}

// Write implements io.Writer. It never fails: what can't be kept is thrown away.
func (l *serviceLog) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	_ = l.reopen(os.O_APPEND)
	if l.f != nil && l.n+int64(len(b)) > maxLog {
		_ = l.f.Close()
		l.f = nil
		how := os.O_APPEND
		if os.Rename(l.path, l.path+".old") != nil { // better an empty log than one without bound
			how = os.O_TRUNC
		}
		_ = l.reopen(how)
	}
	if l.f != nil {
		n, _ := l.f.Write(b)
		l.n += int64(n)
	}
	return len(b), nil
}

// failing reports whether what the service writes now is thrown away.
func (l *serviceLog) failing() bool {
	if l == nil {
		return false
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.f == nil && !l.closed
}

func (l *serviceLog) close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.closed = true
	if l.f != nil {
		l.f.Close()
		l.f = nil
	}
}

// endOrphans kills what an earlier run left, found by its mark, and says how many there were.
func endOrphans(r record) (int, error) {
	if r.Mark == "" {
		return 0, nil
	}
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return 0, fault.Because(err, "workload.orphans", fault.Unavailable, "the processes of this machine can't be listed")
	}
	n := 0
	for _, e := range entries {
		var pid int
		if _, err := fmt.Sscanf(e.Name(), "%d", &pid); err != nil || pid == os.Getpid() {
			continue
		}
		env, err := os.ReadFile(filepath.Join("/proc", e.Name(), "environ"))
		if err != nil {
			continue // not ours, or gone
		}
		for v := range strings.SplitSeq(string(env), "\x00") {
			if v == "DEMARC_RUN="+r.Mark && syscall.Kill(pid, syscall.SIGKILL) == nil {
				n++
			}
		}
	}
	return n, nil
}

func lockFile(f *os.File) error { return syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB) }
