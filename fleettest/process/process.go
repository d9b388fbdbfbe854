// SPDX-License-Identifier: Apache-2.0

// Package process runs real programs for tests, as a service manager would: in a network namespace where one is named, with a
// log file, started again where they die by themselves.
package process

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Process is a program that is kept running. Its fields are set before the first Start; its methods may be called concurrently.
type Process struct {
	Name      string
	Namespace string // "" for that of the caller
	Log       string // what it writes is appended to this file
	Dir       string // in which it works; "" for that of the caller
	Argv      []string

	mu     sync.Mutex
	cmd    *exec.Cmd
	over   chan struct{} // closed when cmd has ended
	wanted bool          // it should run
	deaths []death
}

// death is an end that nobody asked for.
type death struct {
	at  time.Time
	how string
}

// Start runs it where it does not run.
func (p *Process) Start() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.wanted = true
	return p.launch()
}

// launch needs the lock.
func (p *Process) launch() error {
	if p.cmd != nil {
		return nil
	}
	log, err := os.OpenFile(p.Log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	c := exec.Command(p.Argv[0], p.Argv[1:]...)
	c.Stdout, c.Stderr, c.Dir = log, log, p.Dir
	c.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := Inside(p.Namespace, c.Start); err != nil {
		return err
	}
	over := make(chan struct{})
	p.cmd, p.over = c, over
	go p.wait(c, over)
	return nil
}

const againAfter = time.Second

func (p *Process) wait(c *exec.Cmd, over chan struct{}) {
	err := c.Wait()
	p.mu.Lock()
	if p.cmd == c {
		p.cmd = nil
	}
	died := p.wanted
	if died {
		p.deaths = append(p.deaths, death{time.Now(), fmt.Sprint(err)})
	}
	p.mu.Unlock()
	close(over)
	if !died {
		return
	}
	time.Sleep(againAfter)
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.wanted {
		if err := p.launch(); err != nil {
			p.deaths = append(p.deaths, death{time.Now(), "it can't be started again: " + err.Error()})
		}
	}
}

// Signal sends one where it runs.
func (p *Process) Signal(s syscall.Signal) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.cmd == nil {
		return nil
	}
	return p.cmd.Process.Signal(s)
}

// Leave lets it end by itself: it is not started again, and its end is no death.
func (p *Process) Leave() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.wanted = false
}

// Ended is closed when what runs now has ended; it is closed already where nothing runs.
func (p *Process) Ended() <-chan struct{} {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.cmd == nil {
		c := make(chan struct{})
		close(c)
		return c
	}
	return p.over
}

// End stops it with a signal and waits until it has ended. One that was paused is woken, where it is to end by itself.
// Where it has not ended in time it is killed, and that is an error.
func (p *Process) End(s syscall.Signal, wait time.Duration) error {
	p.mu.Lock()
	p.wanted = false
	c, over := p.cmd, p.over
	p.mu.Unlock()
	if c == nil {
		return nil
	}
	_ = c.Process.Signal(s)
	if s != syscall.SIGKILL {
		_ = c.Process.Signal(syscall.SIGCONT)
	}
	select {
	case <-over:
		return nil
	case <-time.After(wait):
	}
	_ = c.Process.Signal(syscall.SIGKILL)
	select {
	case <-over:
		return fmt.Errorf("%s did not end within %s of %s", p.Name, wait, s)
	case <-time.After(wait):
		return fmt.Errorf("%s does not even end when it is killed", p.Name)
	}
}

// Tail is the end of its log.
func (p *Process) Tail() string {
	f, err := os.Open(p.Log)
	if err != nil {
		return ""
	}
	defer f.Close()
	if st, err := f.Stat(); err == nil && st.Size() > 3000 {
		_, _ = f.Seek(-3000, io.SeekEnd)
	}
	b, _ := io.ReadAll(f)
	return string(b)
}

// Died tells of ends that nobody asked for and that allowed does not explain.
func (p *Process) Died(allowed func(time.Time) bool) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	var errs []error
	for _, d := range p.deaths {
		if !allowed(d.at) {
			errs = append(errs, fmt.Errorf("%s died by itself (%s)", p.Name, d.how))
		}
	}
	return errors.Join(errs...)
}

// Inside runs f on a thread of a namespace; the thread ends with it. Sockets and processes stay in the namespace that they were
// made in. With no name it runs f as it is.
func Inside(namespace string, f func() error) error {
	if namespace == "" {
		return f()
	}
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread is thrown away
		fd, err := unix.Open("/run/netns/"+namespace, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err == nil {
			err = unix.Setns(fd, unix.CLONE_NEWNET)
			_ = unix.Close(fd)
		}
		if err == nil {
			err = f()
		}
		done <- err
	}()
	return <-done
}

// Command runs a short command to its end, within a minute.
func Command(name string, args ...string) error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if out, err := exec.CommandContext(ctx, name, args...).CombinedOutput(); err != nil {
		return fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, out)
	}
	return nil
}

// Until looks again and again, five times a second.
func Until(ctx context.Context, limit time.Duration, what string, is func() bool) error {
	for end := time.Now().Add(limit); ; {
		if is() {
			return nil
		}
		if time.Now().After(end) {
			return fmt.Errorf("not so within %s: %s", limit, what)
		}
		if err := Pause(ctx, 200*time.Millisecond); err != nil {
			return err
		}
	}
}

// Pause waits, or until ctx ends.
func Pause(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-t.C:
		return nil
	}
}

// Free gives addresses of loopback that nobody listens at. Somebody may take one before it is used.
func Free(n int) ([]string, error) {
	var all []string
	for range n {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return nil, err
		}
		defer ln.Close()
		all = append(all, ln.Addr().String())
	}
	return all, nil
}
