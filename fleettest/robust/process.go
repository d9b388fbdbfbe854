// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"sync"
	"syscall"
	"time"
)

// process is a demarcd in a namespace. It is started again where it dies by itself, as a service manager would.
type process struct {
	name, ns, log string
	dir           string // in which it works
	argv          []string

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

// start runs it where it does not run.
func (p *process) start() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.wanted = true
	return p.launch()
}

// launch needs the lock.
func (p *process) launch() error {
	if p.cmd != nil {
		return nil
	}
	log, err := os.OpenFile(p.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	c := exec.Command(p.argv[0], p.argv[1:]...)
	c.Stdout, c.Stderr, c.Dir = log, log, p.dir
	c.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := inside(p.ns, c.Start); err != nil {
		return err
	}
	over := make(chan struct{})
	p.cmd, p.over = c, over
	go p.wait(c, over)
	return nil
}

const againAfter = time.Second

func (p *process) wait(c *exec.Cmd, over chan struct{}) {
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

// signal sends one where it runs.
func (p *process) signal(s syscall.Signal) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.cmd == nil {
		return nil
	}
	return p.cmd.Process.Signal(s)
}

// end stops it with a signal and waits until it has ended. One that was paused is woken, where it is to end by itself.
func (p *process) end(s syscall.Signal, wait time.Duration) error {
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
		return fmt.Errorf("%s did not end within %s of %s", p.name, wait, s)
	case <-time.After(wait):
		return fmt.Errorf("%s does not even end when it is killed", p.name)
	}
}

// tail is the end of its log.
func (p *process) tail() string {
	f, err := os.Open(p.log)
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

// died tells of ends that nobody asked for and that allowed does not explain.
func (p *process) died(allowed func(time.Time) bool) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	var errs []error
	for _, d := range p.deaths {
		if !allowed(d.at) {
			errs = append(errs, fmt.Errorf("%s died by itself (%s)", p.name, d.how))
		}
	}
	return errors.Join(errs...)
}
