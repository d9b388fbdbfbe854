// SPDX-License-Identifier: Apache-2.0

package workload

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
)

// Limits of one Exec.
type Limits struct {
	Timeout     time.Duration
	Output      int64 // bytes of both streams together
	Network     bool
	Credentials bool     // the paths of the service's secrets
	Writes      []string // declared, and not enforced by this build
}

// ExecResult is how a program ended.
type ExecResult struct {
	Exit             int
	Signal           string
	Stdout, Stderr   []byte
	Truncated        bool
	Started, Ended   time.Time
	TimedOut, Killed bool
}

// Exec runs a program of a service's artifact to its end. When ctx ends, its whole group is killed at once. That a program
// ends with a code that is not 0 is a result, not an error.
func (p *Process) Exec(ctx context.Context, service string, argv []string, l Limits) (ExecResult, error) {
	const op = "workload.Exec"
	var res ExecResult
	if len(argv) == 0 || !filepath.IsLocal(filepath.FromSlash(argv[0])) || l.Timeout <= 0 || l.Output < 0 {
		return res, fault.New(op, fault.Invalid, "a program inside the artifact, a time and a size of output are needed")
	}
	p.mu.Lock()
	u := p.unit(service)
	closed := p.closed
	if !closed && u != nil {
		p.wg.Add(1)
	}
	p.mu.Unlock()
	if closed || u == nil {
		return res, fault.New(op, fault.NotFound, "no service %.64q runs here", service)
	}
	defer p.wg.Done()
	if err := ctx.Err(); err != nil {
		return res, fault.Because(err, op, fault.Denied, "it was called off before it began")
	}
	run, cancel := context.WithTimeout(ctx, l.Timeout)
	defer cancel()
	cmd := exec.Command(filepath.Join(u.dir, filepath.FromSlash(argv[0])), argv[1:]...)
	cmd.Dir, cmd.Env, cmd.WaitDelay = u.dir, u.envBare, 500*time.Millisecond
	if l.Credentials {
		cmd.Env = u.env
	}
	budget := &capped{left: l.Output}
	out, errs := &stream{c: budget}, &stream{c: budget}
	cmd.Stdout, cmd.Stderr = out, errs
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	if !l.Network {
		isolate(cmd.SysProcAttr)
	}
	res.Started = p.cfg.Now()
	if err := p.start(cmd); err != nil {
		stays := u.because(fleet.NotStarted, 0)
		if !l.Network && (errors.Is(err, syscall.EPERM) || errors.Is(err, syscall.EINVAL) || errors.Is(err, syscall.ENOSPC)) {
			return res, stays.With(fault.Because(err, op, fault.Unavailable,
				"this host does not allow a program without network: declare the effect network, or allow user namespaces"))
		}
		return res, stays.With(fault.Because(err, op, fault.Unavailable, "the program can't be started: %s", clip(errors.Unwrap(err))))
	}
	exited := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		select {
		case <-run.Done():
		case <-p.base.Done():
		case <-exited:
			return
		}
		_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
	})
	err := cmd.Wait()
	close(exited)
	_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) // what it left behind
	wg.Wait()
	res.Ended = p.cfg.Now()
	res.Stdout, res.Stderr, res.Truncated = out.bytes(), errs.bytes(), budget.cut()
	res.TimedOut = errors.Is(run.Err(), context.DeadlineExceeded) && ctx.Err() == nil
	res.Killed = ctx.Err() != nil || p.base.Err() != nil
	if st, ok := cmd.ProcessState.Sys().(syscall.WaitStatus); ok && st.Signaled() {
		res.Signal = st.Signal().String()
	}
	res.Exit = cmd.ProcessState.ExitCode()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) && !errors.Is(err, exec.ErrWaitDelay) {
		return res, fault.At(op, fault.Internal, err)
	}
	return res, nil
}

// isolate gives the program a network with nothing in it.
func isolate(a *syscall.SysProcAttr) {
	a.Cloneflags = syscall.CLONE_NEWNET
	if os.Geteuid() != 0 {
		a.Cloneflags |= syscall.CLONE_NEWUSER
		a.UidMappings = []syscall.SysProcIDMap{{ContainerID: os.Getuid(), HostID: os.Getuid(), Size: 1}}
		a.GidMappings = []syscall.SysProcIDMap{{ContainerID: os.Getgid(), HostID: os.Getgid(), Size: 1}}
	}
}

// capped is the room that two streams share.
type capped struct {
	mu   sync.Mutex
	left int64
	over bool
}

func (c *capped) cut() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.over
}

// stream keeps what there is room for; the program may go on writing.
type stream struct {
	c *capped
	b []byte
}

// Write implements io.Writer.
func (s *stream) Write(b []byte) (int, error) {
	s.c.mu.Lock()
	defer s.c.mu.Unlock()
	n := min(int64(len(b)), s.c.left)
	s.b = append(s.b, b[:n]...)
	s.c.left -= n
	if n < int64(len(b)) {
		s.c.over = true
	}
	return len(b), nil
}

func (s *stream) bytes() []byte {
	s.c.mu.Lock()
	defer s.c.mu.Unlock()
	return s.b
}
