// SPDX-License-Identifier: Apache-2.0

package workload_test

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/manifest"
	"github.com/demarc-dev/demarc/workload"
	"github.com/demarc-dev/demarc/workload/artifact"
)

// TestOnlyAGoodAnswerIsWell (MUTANTS.md: unit.go:261): to the health check any answer of 2xx is well, and no other.
func TestOnlyAGoodAnswerIsWell(t *testing.T) {
	w := newWorld(t)
	for code, well := range map[int]bool{http.StatusNoContent: true, http.StatusFound: false, http.StatusNotFound: false,
		http.StatusTeapot:              false,
		http.StatusInternalServerError: false} {
		p := w.plan("one")
		p.Services, p.Secrets = p.Services[:1], nil
		s := &p.Services[0]
		s.Argv, s.Env = []string{"app", "child", "answer", strconv.Itoa(code)}, nil
		if !well {
			s.Health.StartMS = 2000
		}
		err := w.p.Apply(t.Context(), p)
		if (err == nil) != well {
			t.Errorf("%d: %v", code, err)
		}
		if text := fault.Text(err); !well && !strings.Contains(text, "was not healthy within") {
			t.Errorf("%d: %q", code, text)
		}
	}
}

// TestWhyAServiceIsNotWellTellsNoEnvironment (MUTANTS.md: unit.go:203): the vendor is told the reason.
func TestWhyAServiceIsNotWellTellsNoEnvironment(t *testing.T) {
	w := newWorld(t)
	w.secret()
	says := func(where, reason string) {
		t.Helper()
		for _, s := range []string{"sesame", "s3cret", "TOKEN_FILE", "WORD", w.secrets, w.dir} {
			if strings.Contains(reason, s) {
				t.Errorf("%s: %q is told: %s", where, s, reason)
			}
		}
	}
	for name, argv := range map[string][]string{"ends": {"crash"}, "is never well": {"deaf"}, "answers badly": {"answer", "500"}} {
		p := w.plan("bad")
		p.Services = p.Services[:1]
		s := &p.Services[0]
		s.Argv = append([]string{"app", "child"}, argv...)
		s.Env = []manifest.Env{{Name: "TOKEN_FILE", Secret: "token"}, {Name: "WORD", Value: "sesame"}}
		s.Health.StartMS, s.Health.Retries = 500, 1
		err := w.p.Apply(t.Context(), p)
		if err == nil || !strings.Contains(fault.Text(err), "was not healthy within") {
			t.Fatalf("one that %s: %v", name, err)
		}
		says("one that "+name, fault.Text(err))
	}
	p := w.plan("sesame")
	p.Services[0].Env[1].Value = "sesame"
	if err := w.p.Apply(t.Context(), p); err != nil {
		t.Fatal(err)
	}
	w.ask("back", "/die")
	w.wait("it is said why back ended", func() bool {
		s := w.p.Status().Services[0]
		says("one that died", s.Reason)
		return s.Restarts > 0
	})
}

// TestWhatAnEarlierRunLeftIsEnded (MUTANTS.md: unit.go:333): whatever bears its mark, and nothing else.
func TestWhatAnEarlierRunLeftIsEnded(t *testing.T) {
	w := newWorld(t)
	b, err := os.ReadFile(filepath.Join(w.dir, "run", "state.json"))
	if err != nil {
		t.Fatal(err)
	}
	var state struct {
		Mark string `json:"mark"`
	}
	if err := json.Unmarshal(b, &state); err != nil || state.Mark == "" {
		t.Fatalf("no mark in %s, %v", b, err)
	}
	w.close()
	start := func(mark string) (*exec.Cmd, chan error) {
		cmd := exec.Command(os.Args[0], "child", "deaf")
		cmd.Env = []string{"A=b", "DEMARC_RUN=" + mark, "Z="}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		ended := make(chan error, 1)
		go func() { ended <- cmd.Wait() }()
		t.Cleanup(func() { _ = cmd.Process.Kill() })
		return cmd, ended
	}
	_, ours := start(state.Mark)
	other, theirs := start(state.Mark + "2")
	w.open()
	select {
	case err := <-ours:
		var exit *exec.ExitError
		if !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
			t.Errorf("it ended otherwise: %v", err)
		}
	case <-time.After(time.Minute):
		t.Error("what an earlier run left lives on")
	}
	if err := other.Process.Signal(syscall.Signal(0)); err != nil {
		t.Errorf("a process of somebody else was ended: %v", err)
	}
	_ = other.Process.Kill()
	<-theirs
}

// host is an appliance's process that runs a service and an operation until it is killed. It says when both run.
func host(dir, secrets string, app fleet.Digest, word string) int {
	store, err := artifact.Open(filepath.Join(dir, "store"))
	if err != nil {
		fmt.Println(err)
		return 1
	}
	p, err := workload.Open(workload.Config{Dir: filepath.Join(dir, "run"), Artifacts: store, Secrets: workload.NewFiles(secrets)})
	if err != nil {
		fmt.Println(err)
		return 1
	}
	plan := manifest.Plan{Version: manifest.PlanVersion, App: "app", AppVersion: "one", Runtime: fleet.RuntimeProcess,
		Services: []manifest.Service{{Name: "back", Artifact: app, Argv: []string{"app", "child", "deaf"},
			Env: []manifest.Env{{Name: "WORD", Value: word}}}}}
	if err := p.Apply(context.Background(), plan); err != nil {
		fmt.Println(err)
		return 1
	}
	go func() {
		_, err := p.Exec(context.Background(), "back", []string{"app", "child", "deaf"}, workload.Limits{Timeout: time.Hour, Network: true})
		fmt.Println("the operation ended:", err)
	}()
	for len(living("WORD="+word)) < 2 {
		time.Sleep(5 * time.Millisecond)
	}
	fmt.Println("both run")
	select {}
}

// living lists the processes that have this in their environment.
func living(env string) (pids []int) {
	all, _ := filepath.Glob("/proc/[0-9]*/environ")
	for _, path := range all {
		b, _ := os.ReadFile(path) // empty if it has ended
		if strings.Contains("\x00"+string(b), "\x00"+env+"\x00") {
			pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(path)))
			pids = append(pids, pid)
		}
	}
	return pids
}

// TestNothingOutlivesTheAppliance (MUTANTS.md: unit.go:121): if its process is killed, so are the services and the operations that run.
func TestNothingOutlivesTheAppliance(t *testing.T) {
	w := newWorld(t)
	w.close()
	word := "of-" + strings.NewReplacer("/", "-").Replace(w.dir)
	cmd := exec.Command(os.Args[0], "child", "host", w.dir, w.secrets, string(w.app), word)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line, _ := bufio.NewReader(out).ReadString('\n')
	if n := len(living("WORD=" + word)); line != "both run\n" || n != 2 {
		t.Errorf("%q, and %d processes", line, n)
	}
	defer func() { // nor this test, if it fails
		for _, pid := range living("WORD=" + word) {
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
	}()
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
	w.wait("nothing of it runs", func() bool { return len(living("WORD="+word)) == 0 })
}
