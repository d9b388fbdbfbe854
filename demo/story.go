// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/demarc-dev/demarc/identity/identitytest"
	"github.com/demarc-dev/demarc/mesh"
	"github.com/demarc-dev/demarc/mesh/meshtest"
)

// story is the state of the demo.
type story struct {
	ctx              context.Context
	dir, bin, sample string
	began            time.Time
	err              error
	step             int
	procs            map[string]*proc
	cleaners         []func() error

	issuer   *identitytest.Issuer
	tailnet  *meshtest.Tailnet
	nodes    []nodeAddr
	webAddr  string
	metrics  map[string]string // role -> address
	managed  string            // socket of the management plane
	socket   string            // of the appliance
	operator string            // operator's file
	endUser  *mesh.Node
	tokens   tokenLog
	known    map[string]bool // operations that the story knows
	env      string          // the file with the environment of the printed commands
	printed  []printed
}

type nodeAddr struct{ name, raft, api, metrics string }

// proc is a process of the demo.
type proc struct {
	cmd  *exec.Cmd
	done chan struct{}
	log  string
}

// fail ends the story.
func (s *story) fail(format string, args ...any) {
	s.err = fmt.Errorf("step %d: %s", s.step, fmt.Sprintf(format, args...))
	panic(errStop)
}

func (s *story) must(err error, what string) {
	if err != nil {
		s.fail("%s: %v", what, err)
	}
}

// title begins a step.
func (s *story) title(n int, text string) {
	s.step = n
	fmt.Printf("\n== %d. %s\n", n, text)
}

func (s *story) note(format string, args ...any) { fmt.Printf("   -- "+format+"\n", args...) }

func (s *story) path(parts ...string) string {
	return filepath.Join(append([]string{s.dir}, parts...)...)
}

// printed is a command that the story showed, and its exit code.
type printed struct {
	line string
	code int
}

// result is what a command did.
type result struct {
	out, errs string
	code      int
}

// demarc prints a command and runs it exactly as it is printed, prints its output below it, and gives the result.
func (s *story) demarc(args ...string) result {
	line := s.line(args...)
	fmt.Println(line)
	r := s.paste(line)
	s.printed = append(s.printed, printed{line, r.code})
	for _, text := range []string{r.out, r.errs} {
		for line := range strings.Lines(text) {
			fmt.Print("  " + strings.ReplaceAll(line, s.dir, "$D"))
		}
	}
	return r
}

// quiet is demarc without the show: for looking again and again.
func (s *story) quiet(args ...string) result {
	cmd := exec.CommandContext(s.ctx, filepath.Join(s.bin, "demarc"), args...)
	cmd.Env = append(os.Environ(), "DEMARC_CONTEXT="+s.operator, "DEMARC_SOCKET="+s.socket, "DEMARC_KEY="+s.path("customer", "globex.key"),
		"DEMARC_PASSPHRASE_FILE="+s.path("customer", "passphrase"))
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		s.fail("demarc %s: %v", args[0], err)
	}
	return result{out.String(), errs.String(), cmd.ProcessState.ExitCode()}
}

// ok is demarc that must succeed.
func (s *story) ok(args ...string) string {
	r := s.demarc(args...)
	if r.code != 0 {
		s.fail("demarc %s: exit code %d", strings.Join(args, " "), r.code)
	}
	return r.out
}

// refused is demarc that must fail with this code and sentence.
func (s *story) refused(code int, sentence string, args ...string) {
	r := s.demarc(args...)
	if r.code != code || !strings.Contains(r.errs+r.out, sentence) {
		s.fail("demarc %s: exit code %d, want %d and a sentence with %q", strings.Join(args, " "), r.code, code, sentence)
	}
}

// ask reads the JSON of a command.
func (s *story) ask(v any, args ...string) bool {
	r := s.quiet(append(args, "--output", "json")...)
	if r.code != 0 {
		return false
	}
	s.must(json.Unmarshal([]byte(r.out), v), "the JSON of demarc "+args[0])
	return true
}

// wait looks again and again until something is so.
func (s *story) wait(what string, limit time.Duration, is func() bool) time.Duration {
	began := time.Now()
	for !is() {
		if time.Since(began) > limit {
			s.fail("waited %s, and it is still not so: %s", limit, what)
		}
		select {
		case <-s.ctx.Done():
			s.fail("interrupted")
		case <-time.After(50 * time.Millisecond):
		}
	}
	return time.Since(began)
}

// start runs a daemon; its log goes to a file of its own.
func (s *story) start(name string, args ...string) {
	log := s.path("logs", name+".log")
	s.must(os.MkdirAll(filepath.Dir(log), 0o700), "logs")
	f, err := os.OpenFile(log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	s.must(err, "logs")
	defer f.Close()
	cmd := exec.Command(filepath.Join(s.bin, "demarcd"), args...)
	cmd.Stdout, cmd.Stderr = f, f
	cmd.Env = append(os.Environ(), "TS_NO_LOGS_NO_SUPPORT=true", "TS_DISABLE_PORTMAPPER=true")
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	s.must(cmd.Start(), "start "+name)
	p := &proc{cmd: cmd, done: make(chan struct{}), log: log}
	go func() {
		_ = cmd.Wait()
		close(p.done)
	}()
	s.procs[name] = p
}

// alive fails the story where a daemon has died.
func (s *story) alive(name string) {
	select {
	case <-s.procs[name].done:
		b, _ := os.ReadFile(s.procs[name].log)
		s.fail("%s has died:\n%s", name, tail(b))
	default:
	}
}

func tail(b []byte) []byte { return b[max(0, len(b)-3000):] }

// stop ends a daemon: with SIGKILL at once, or as an operator would.
func (s *story) stop(name string, sig syscall.Signal) {
	p := s.procs[name]
	if p == nil {
		return
	}
	_ = syscall.Kill(-p.cmd.Process.Pid, sig)
	select {
	case <-p.done:
	case <-time.After(20 * time.Second):
		_ = syscall.Kill(-p.cmd.Process.Pid, syscall.SIGKILL)
		<-p.done
	}
	delete(s.procs, name)
}

// clean ends every process and says what was left.
func (s *story) clean() error {
	var left error
	if s.endUser != nil {
		left = errors.Join(left, s.endUser.Close())
	}
	var wg sync.WaitGroup
	var mu sync.Mutex
	for name := range s.procs {
		wg.Go(func() {
			p := s.procs[name]
			_ = syscall.Kill(-p.cmd.Process.Pid, syscall.SIGTERM)
			select {
			case <-p.done:
			case <-time.After(20 * time.Second):
				_ = syscall.Kill(-p.cmd.Process.Pid, syscall.SIGKILL)
				<-p.done
				mu.Lock()
				defer mu.Unlock()
				left = errors.Join(left, fmt.Errorf("%s did not stop by itself", name))
			}
		})
	}
	wg.Wait()
	for i := len(s.cleaners) - 1; i >= 0; i-- {
		left = errors.Join(left, s.cleaners[i]())
	}
	return left
}

// free finds a port on loopback.
func (s *story) free() string {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	s.must(err, "a free port")
	defer l.Close()
	return l.Addr().String()
}

// write makes a file of the demo.
func (s *story) write(text string, parts ...string) string {
	p := s.path(parts...)
	s.must(os.MkdirAll(filepath.Dir(p), 0o700), "folder")
	s.must(os.WriteFile(p, []byte(text), 0o600), "file")
	return p
}

func (s *story) read(file string) []byte {
	b, err := os.ReadFile(file)
	s.must(err, "read "+file)
	return b
}

// get asks by HTTP.
func (s *story) get(client *http.Client, url string) (int, string, error) {
	ctx, cancel := context.WithTimeout(s.ctx, 5*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	s.must(err, url)
	res, err := client.Do(req)
	if err != nil {
		return 0, "", err
	}
	defer res.Body.Close()
	b, err := io.ReadAll(io.LimitReader(res.Body, 1<<20))
	return res.StatusCode, string(b), err
}

// tokenLog is the demo's platform: what the kubelet is in a cluster.
type tokenLog struct {
	mu    sync.Mutex
	count int
}

// platform answers on a Unix socket with tokens of the issuer, for the appliance's identity.
func (s *story) platform(path string) {
	l, err := net.Listen("unix", path)
	s.must(err, "platform")
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		t, err := s.issuer.Token("demarc", "appliance", r.URL.Query().Get("audience"), time.Now())
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		s.tokens.mu.Lock()
		s.tokens.count++
		s.tokens.mu.Unlock()
		_, _ = io.WriteString(w, t)
	}), ReadHeaderTimeout: 5 * time.Second}
	go func() { _ = srv.Serve(l) }()
	s.cleaners = append(s.cleaners, srv.Close)
}

// printToken is the appliance's token command.
func printToken(socket, audience string) error {
	c := &http.Client{Timeout: 10 * time.Second,
		Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", socket)
		}}}
	req, err := http.NewRequest(http.MethodGet, "http://platform/token", nil)
	if err != nil {
		return err
	}
	q := req.URL.Query()
	q.Set("audience", audience)
	req.URL.RawQuery = q.Encode()
	res, err := c.Do(req)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		return fmt.Errorf("the platform answers %s", res.Status)
	}
	_, err = io.Copy(os.Stdout, io.LimitReader(res.Body, 64<<10))
	return err
}
