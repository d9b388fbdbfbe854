// SPDX-License-Identifier: Apache-2.0

package workload_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/manifest"
	"github.com/demarc-dev/demarc/workload"
	"github.com/demarc-dev/demarc/workload/artifact"
)

// The test binary is the application too: its first argument says what to be.
func TestMain(m *testing.M) {
	if len(os.Args) > 2 && os.Args[1] == "child" {
		os.Exit(child(os.Args[2], os.Args[3:]))
	}
	goleak.VerifyTestMain(m)
}

func child(what string, args []string) int {
	switch what {
	case "serve": // answers with its environment variable, its argument and its token
		token, _ := os.ReadFile(os.Getenv("TOKEN_FILE"))
		h := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path == "/die" {
				os.Exit(7)
			}
			fmt.Fprintf(w, "%s|%s|%s|%s|%d", os.Getenv("WORD"), strings.Join(args, ","), token, os.Getenv("PEER"), os.Getpid())
		})
		fmt.Fprintln(os.Stderr, http.ListenAndServe(os.Getenv("LISTEN"), h))
	case "crash":
		return 3
	case "deaf": // never healthy, and does not mind SIGTERM
		select {}
	case "print":
		fmt.Print(strings.Repeat("x", 100))
		fmt.Fprint(os.Stderr, strings.Repeat("y", 100))
		return 5
	case "sleep": // with a grandchild in the same group
		cmd := exec.Command(os.Args[0], "child", "deaf")
		if cmd.Start() == nil {
			fmt.Println(cmd.Process.Pid)
		}
		time.Sleep(time.Hour)
	case "net":
		_, err := http.Get("http://" + args[0])
		fmt.Print(err)
	case "env":
		fmt.Print(strings.Join(os.Environ(), "\n"))
	case "args":
		fmt.Printf("%q", args)
		return 0
	case "answer": // the same answer to all but one path, which is well
		code, _ := strconv.Atoi(args[0])
		h := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path == "/well" {
				return
			}
			w.Header().Set("Location", "/well")
			w.WriteHeader(code)
		})
		fmt.Fprintln(os.Stderr, http.ListenAndServe(os.Getenv("LISTEN"), h))
	case "host":
		return host(args[0], args[1], fleet.Digest(args[2]), args[3])
	}
	return 1
}

type world struct {
	t       *testing.T
	dir     string
	secrets string
	store   *artifact.Store
	app     fleet.Digest
	p       *workload.Process
}

func newWorld(t *testing.T) *world {
	t.Helper()
	w := &world{t: t, dir: t.TempDir(), secrets: t.TempDir()}
	var err error
	if w.store, err = artifact.Open(filepath.Join(w.dir, "store")); err != nil {
		t.Fatal(err)
	}
	folder := t.TempDir()
	exe, err := os.ReadFile(os.Args[0])
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.WriteFile(filepath.Join(folder, "app"), exe, 0o700),
		os.WriteFile(filepath.Join(folder, "text"), []byte("no program"), 0o600)); err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	if w.app, err = artifact.Pack(folder, &b); err != nil {
		t.Fatal(err)
	}
	if _, err := w.store.Put(t.Context(), w.app, &b); err != nil {
		t.Fatal(err)
	}
	w.open()
	t.Cleanup(w.close)
	return w
}

func (w *world) open() {
	w.t.Helper()
	var err error
	if w.p, err = workload.Open(workload.Config{Dir: filepath.Join(w.dir, "run"), Artifacts: w.store, Secrets: workload.NewFiles(w.secrets),
		Stop: 300 * time.Millisecond}); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) close() {
	if err := w.p.Close(context.Background()); err != nil {
		w.t.Error(err)
	}
}

// plan is one service that serves, and another that knows where it is.
func (w *world) plan(word string) manifest.Plan {
	health := &manifest.Health{HTTP: "/", Port: 80, IntervalMS: 100, TimeoutMS: 1000, StartMS: 20_000, Retries: 2}
	return manifest.Plan{Version: manifest.PlanVersion, App: "app", AppVersion: word, Runtime: fleet.RuntimeProcess,
		Secrets: []manifest.Secret{{Name: "token", Store: "token", Required: true}},
		Services: []manifest.Service{
			{Name: "back", Artifact: w.app, Argv: []string{"app", "child", "serve", "a b", "$(c)"},
				Listen: []manifest.Listen{{Env: "LISTEN", Port: 80}}, Health: health,
				Env: []manifest.Env{{Name: "TOKEN_FILE", Secret: "token"}, {Name: "WORD", Value: "same"}}},
			{Name: "front", Artifact: w.app, Argv: []string{"app", "child", "serve"}, Listen: []manifest.Listen{{Env: "LISTEN", Port: 80}},
				Health: health, DependsOn: []string{"back"},
				Env: []manifest.Env{{Name: "PEER", Wire: "back:80"}, {Name: "WORD", Value: word}}},
		}}
}

func (w *world) secret() {
	w.t.Helper()
	if err := workload.CreateFile(w.secrets, "token", []byte("s3cret")); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) ask(service, path string) string {
	w.t.Helper()
	addr, ok := w.p.Addr(service, 80)
	if !ok {
		w.t.Fatalf("%s has no address", service)
	}
	res, err := (&http.Client{Transport: &http.Transport{DisableKeepAlives: true}}).Get("http://" + addr + path)
	if err != nil {
		return err.Error()
	}
	defer res.Body.Close()
	b, _ := io.ReadAll(res.Body)
	return string(b)
}

func (w *world) wait(what string, is func() bool) {
	w.t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !is(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			w.t.Fatalf("it does not come to be: %s; %+v", what, w.p.Status())
		}
	}
}

func gone(pid int) bool { return errors.Is(syscall.Kill(pid, 0), syscall.ESRCH) }

func TestAPlanComesUpWired(t *testing.T) {
	w := newWorld(t)
	missing, err := w.p.Missing(w.plan("one"))
	if err != nil || len(missing) != 1 || missing[0].Name != "token" {
		t.Fatal(missing, err)
	}
	w.secret()
	if missing, _ := w.p.Missing(w.plan("one")); len(missing) != 0 {
		t.Fatal(missing)
	}
	if err := w.p.Apply(t.Context(), w.plan("one")); err != nil {
		t.Fatal(err)
	}
	back, _ := w.p.Addr("back", 80)
	if got := w.ask("back", "/"); !strings.HasPrefix(got, "same|a b,$(c)|s3cret||") {
		t.Errorf("back says %q", got)
	}
	if got := w.ask("front", "/"); !strings.HasPrefix(got, "one|||"+back+"|") {
		t.Errorf("front says %q", got)
	}
	before := w.p.Status()
	if err := w.p.Apply(t.Context(), w.plan("two")); err != nil {
		t.Fatal(err)
	}
	after := w.p.Status()
	if before.Services[0].PID != after.Services[0].PID || before.Services[1].PID == after.Services[1].PID {
		t.Errorf("the service that did not change was touched, or the other was not: %+v, %+v", before.Services, after.Services)
	}
	if now, _ := w.p.Addr("back", 80); now != back || after.Plan != w.plan("two").Digest() {
		t.Errorf("the address moved from %s to %s", back, now)
	}
}

func TestAServiceThatEndsIsStartedAgain(t *testing.T) {
	w := newWorld(t)
	w.secret()
	if err := w.p.Apply(t.Context(), w.plan("one")); err != nil {
		t.Fatal(err)
	}
	pid := w.p.Status().Services[0].PID
	w.ask("back", "/die")
	w.wait("back runs again", func() bool {
		s := w.p.Status().Services[0]
		return s.Restarts == 1 && s.Healthy && s.PID != pid
	})
}

func TestAFailedPlanGoesBack(t *testing.T) {
	w := newWorld(t)
	w.secret()
	for _, how := range []string{"crash", "deaf"} {
		bad := w.plan("bad")
		bad.Services[1].Argv = []string{"app", "child", how}
		bad.Services[1].Health = &manifest.Health{HTTP: "/", Port: 80, IntervalMS: 100, TimeoutMS: 100, StartMS: 1000, Retries: 1}
		err := w.p.Apply(t.Context(), bad)
		if err == nil || !strings.Contains(fault.Text(err), "front") || !strings.Contains(fault.Text(err), "nothing runs") ||
			len(w.p.Status().Services) != 0 {
			t.Fatalf("%s, with nothing before: %v, %+v", how, err, w.p.Status())
		}
	}
	if err := w.p.Apply(t.Context(), w.plan("one")); err != nil {
		t.Fatal(err)
	}
	bad := w.plan("bad")
	bad.Services[1].Argv = []string{"app", "child", "crash"}
	bad.Services[1].Health.StartMS = 1000
	err := w.p.Apply(t.Context(), bad)
	if err == nil || !strings.Contains(fault.Text(err), "version one, the last that was well, runs on") {
		t.Fatal(err)
	}
	if got := w.ask("front", "/"); !strings.HasPrefix(got, "one|") || w.p.Status().Plan != w.plan("one").Digest() {
		t.Fatalf("front says %q", got)
	}
	ctx, cancel := context.WithCancel(t.Context())
	deaf := w.plan("deaf")
	deaf.Services[1].Argv = []string{"app", "child", "deaf"}
	time.AfterFunc(200*time.Millisecond, cancel)
	if err := w.p.Apply(ctx, deaf); err == nil || !strings.HasPrefix(w.ask("front", "/"), "one|") {
		t.Fatalf("called off: %v", err)
	}
	other := w.plan("x")
	other.Runtime = "docker"
	if err := w.p.Apply(t.Context(), other); !errors.Is(err, fault.Invalid) {
		t.Fatal(err)
	}
}

func TestExec(t *testing.T) {
	w := newWorld(t)
	w.secret()
	if err := w.p.Apply(t.Context(), w.plan("one")); err != nil {
		t.Fatal(err)
	}
	limits := workload.Limits{Timeout: 10 * time.Second, Output: 150, Network: true}
	res, err := w.p.Exec(t.Context(), "back", []string{"app", "child", "print"}, limits)
	if err != nil || res.Exit != 5 || len(res.Stdout)+len(res.Stderr) != 150 || !res.Truncated || res.TimedOut || res.Killed {
		t.Fatalf("%+v, %v", res, err)
	}
	limits.Output = 1 << 20
	for _, credentials := range []bool{true, false} {
		limits.Credentials = credentials
		res, err = w.p.Exec(t.Context(), "back", []string{"app", "child", "env"}, limits)
		if err != nil || strings.Contains(string(res.Stdout), "TOKEN_FILE=") != credentials ||
			!strings.Contains(string(res.Stdout), "LISTEN=127.0.0.1:") {
			t.Fatalf("credentials %v: %s, %v", credentials, res.Stdout, err)
		}
	}
	addr, _ := w.p.Addr("back", 80)
	limits.Network = false
	res, err = w.p.Exec(t.Context(), "back", []string{"app", "child", "net", addr}, limits)
	if !isolates() {
		if !errors.Is(err, fault.Unavailable) || len(res.Stdout) != 0 {
			t.Fatalf("this host allows no program without network, and it ran: %q, %v", res.Stdout, err)
		}
	} else if err != nil || string(res.Stdout) == "<nil>" {
		t.Fatalf("a program without network reached %s: %q, %v", addr, res.Stdout, err)
	}
	limits.Network = true
	for name, bad := range map[string][]string{"outside": {"../app"}, "absolute": {"/bin/sh"}, "nothing": {}} {
		if _, err := w.p.Exec(t.Context(), "back", bad, limits); !errors.Is(err, fault.Invalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	// MUTANTS.md: exec.go:61: each argument arrives as it was approved.
	res, err = w.p.Exec(t.Context(), "back", []string{"app", "child", "args", "a b", "", "$(c)", " d\t\n", "*"}, limits)
	if err != nil || string(res.Stdout) != `["a b" "" "$(c)" " d\t\n" "*"]` {
		t.Errorf("the program is given %s, %v", res.Stdout, err)
	}
	if _, err := w.p.Exec(t.Context(), "nobody", []string{"app"}, limits); !errors.Is(err, fault.NotFound) {
		t.Error(err)
	}
}

// isolates reports whether this host lets this process start a program with a network of its own.
func isolates() bool {
	cmd := exec.Command(os.Args[0], "child", "args")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
	if os.Geteuid() != 0 {
		cmd.SysProcAttr.Cloneflags |= syscall.CLONE_NEWUSER
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{ContainerID: os.Getuid(), HostID: os.Getuid(), Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{ContainerID: os.Getgid(), HostID: os.Getgid(), Size: 1}}
	}
	return cmd.Run() == nil
}

// A program that is called off, or takes too long, is gone when Exec returns, and so is what it started.
func TestExecKillsTheWholeGroup(t *testing.T) {
	w := newWorld(t)
	w.secret()
	if err := w.p.Apply(t.Context(), w.plan("one")); err != nil {
		t.Fatal(err)
	}
	for _, how := range []string{"time", "cancel"} {
		for patience := 500 * time.Millisecond; ; patience *= 2 { // until the grandchild has had the time to start
			ctx, cancel := context.WithCancel(t.Context())
			limits := workload.Limits{Timeout: 10 * time.Minute, Output: 100, Network: true}
			if how == "time" {
				limits.Timeout = patience
			} else {
				time.AfterFunc(patience, cancel)
			}
			began := time.Now()
			res, err := w.p.Exec(ctx, "back", []string{"app", "child", "sleep"}, limits)
			cancel()
			if how == "cancel" && errors.Is(err, fault.Denied) && patience < 2*time.Minute {
				continue // called off before it began
			}
			if err != nil || res.TimedOut != (how == "time") || res.Killed != (how == "cancel") || res.Signal == "" {
				t.Fatalf("%s: %+v, %v", how, res, err)
			}
			if took := time.Since(began); took > patience+2*time.Minute {
				t.Fatalf("%s: it took %s", how, took)
			}
			var pid int
			if _, err := fmt.Sscan(string(res.Stdout), &pid); err == nil {
				w.wait("the grandchild is gone", func() bool { return gone(pid) || zombie(pid) })
				break
			}
			if patience > 2*time.Minute {
				t.Fatalf("%s: the grandchild did not start within %s: %+v", how, patience, res)
			}
		}
	}
}

func zombie(pid int) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	return err != nil || strings.Contains(string(b), ") Z ")
}

func TestCloseLeavesNothing(t *testing.T) {
	w := newWorld(t)
	w.secret()
	if err := w.p.Apply(t.Context(), w.plan("one")); err != nil {
		t.Fatal(err)
	}
	pids := []int{w.p.Status().Services[0].PID, w.p.Status().Services[1].PID}
	if _, err := workload.Open(workload.Config{Dir: filepath.Join(w.dir, "run"), Artifacts: w.store,
		Secrets: workload.NewFiles(w.secrets)}); !errors.Is(err, fault.Conflict) {
		t.Fatal("two runtimes in one folder:", err)
	}
	w.close()
	for _, pid := range pids {
		if !gone(pid) {
			t.Errorf("process %d lives", pid)
		}
	}
	if err := w.p.Apply(t.Context(), w.plan("one")); err == nil {
		t.Error("a closed runtime starts something")
	}
	w.open()
	if err := w.p.Apply(t.Context(), w.plan("one")); err != nil {
		t.Fatal(err)
	}
}

func TestSecretsAreLookedAtFromOutside(t *testing.T) {
	dir := t.TempDir()
	f := workload.NewFiles(dir)
	if there, err := f.Present("token"); there || err != nil {
		t.Fatal(there, err)
	}
	if err := workload.CreateFile(dir, "token", []byte("x")); err != nil {
		t.Fatal(err)
	}
	if there, err := f.Present("token"); !there || err != nil {
		t.Fatal(there, err)
	}
	// MUTANTS.md: secret.go:49: what is there and is no secret.
	for name, make := range map[string]func(path string) error{
		"empty":  func(path string) error { return os.WriteFile(path, nil, 0o600) },
		"folder": func(path string) error { return os.Mkdir(path, 0o700) },
		"link":   func(path string) error { return os.Symlink(f.Path("token"), path) },
	} {
		if err := make(filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
		if there, err := f.Present(name); there || err != nil {
			t.Errorf("%s: present %v, %v", name, there, err)
		}
	}
	if info, err := os.Stat(f.Path("token")); err != nil || info.Mode().Perm() != 0o600 {
		t.Fatal(info.Mode(), err)
	}
	for _, name := range []string{"../token", "", "a/b", "Token"} {
		if there, err := f.Present(name); there || err == nil {
			t.Errorf("%q: %v, %v", name, there, err)
		}
		if workload.CreateFile(dir, name, []byte("x")) == nil {
			t.Errorf("%q was created", name)
		}
	}
}

// FAULTS.md D4: a command that is not in its artifact, or may not be executed, took the version down that ran.
func TestAPlanWithoutItsProgramReplacesNothing(t *testing.T) {
	w := newWorld(t)
	w.secret()
	if err := w.p.Apply(t.Context(), w.plan("one")); err != nil {
		t.Fatal(err)
	}
	before := w.p.Status()
	for what, edit := range map[string]func(*manifest.Service){
		"no such program": func(s *manifest.Service) { s.Argv = []string{"gone"} },
		"a folder":        func(s *manifest.Service) { s.Argv = []string{"."} },
		"no health check": func(s *manifest.Service) {
			s.Health = &manifest.Health{Exec: []string{"gone"}, IntervalMS: 100, TimeoutMS: 1000, StartMS: 1000, Retries: 1}
		},
		"a file that is no program": func(s *manifest.Service) { s.Argv = []string{"text"} },
	} {
		next := w.plan("two")
		edit(&next.Services[1])
		if err := w.p.Apply(t.Context(), next); !errors.Is(err, fault.Invalid) || !strings.Contains(fault.Text(err), "service front") {
			t.Errorf("%s: %v", what, err)
		}
		after := w.p.Status()
		if after.Services[0].PID != before.Services[0].PID || after.Services[1].PID != before.Services[1].PID || after.Plan != before.Plan {
			t.Errorf("%s: %+v was replaced by %+v", what, before, after)
		}
	}
}

// FAULTS.md B9: a service whose log can't be opened was not started.
func TestALogThatCanNotBeWrittenStopsNoService(t *testing.T) {
	w := newWorld(t)
	w.secret()
	logs := filepath.Join(w.dir, "run", "log")
	for _, name := range []string{"back.log", "front.log"} { // a folder in its place: what root meets in the place of a full disk
		if err := os.Mkdir(filepath.Join(logs, name), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.p.Apply(t.Context(), w.plan("one")); err != nil {
		t.Fatal(err)
	}
	for _, s := range w.p.Status().Services {
		if !s.Healthy || s.Reason != "its log can't be written" {
			t.Errorf("%+v", s)
		}
	}
}
