// SPDX-License-Identifier: Apache-2.0

package runbooks

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/demarc-dev/demarc/configs"
	"github.com/demarc-dev/demarc/manifest"
)

const quickstart = "../../docs/quickstart.md"

// quickWords is what the quick start may say to the test, in shell.
var quickWords = map[string]string{
	"healthy": `demarc appliance show laptop | grep -Eq '^deployment +1.0.0 deployed'
demarc appliance show laptop | grep -Eq '^platform +dev$'
demarc local status | grep -Eq '^service +hello +healthy true'`,
	"reached": `test "$(curl -fsS http://127.0.0.1:18080/)" = "hello from 127.0.0.1:18080"`,
	"stopped": `if curl -fs http://127.0.0.1:18080/; then echo "the application is up"; exit 1; fi`,
}

// shown is what the page says that a block prints: the indented lines below it, by the line of the block.
func shown(t *testing.T, file string) map[int][]string {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	out := map[int][]string{}
	last, in := 0, false
	for i, line := range strings.Split(string(b), "\n") {
		switch {
		case line == "```sh":
			last, in = i+2, true
		case line == "```":
			in = false
		case !in && strings.HasPrefix(line, "    "):
			out[last] = append(out[last], line)
		}
	}
	return out
}

// squeeze makes each run of blanks one.
func squeeze(s string) string { return strings.Join(strings.Fields(s), " ") }

// cleanClone copies what a clone of this tree would hold, with what is not committed yet.
func cleanClone(t *testing.T) string {
	t.Helper()
	to := filepath.Join(t.TempDir(), "clone")
	list := exec.Command("git", "ls-files", "-co", "--exclude-standard", "-z")
	list.Dir = "../.."
	files, err := list.Output()
	if err != nil {
		t.Fatal(err)
	}
	for f := range strings.SplitSeq(strings.TrimRight(string(files), "\x00"), "\x00") {
		b, err := os.ReadFile(filepath.Join("../..", f))
		if os.IsNotExist(err) {
			continue // deleted, and not committed yet
		}
		if err != nil {
			t.Fatal(err)
		}
		fi, err := os.Stat(filepath.Join("../..", f))
		if err != nil {
			t.Fatal(err)
		}
		if err := os.MkdirAll(filepath.Join(to, filepath.Dir(f)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(to, f), b, fi.Mode()); err != nil {
			t.Fatal(err)
		}
	}
	return to
}

// laptopEnv is the environment of somebody who has just cloned the tree: another home, and none of our variables.
func laptopEnv(t *testing.T, home string) []string {
	t.Helper()
	env := []string{"HOME=" + home}
	for _, e := range os.Environ() {
		if !strings.HasPrefix(e, "HOME=") && !strings.HasPrefix(e, "DEMARC_") {
			env = append(env, e)
		}
	}
	for _, name := range []string{"GOPATH", "GOCACHE", "GOMODCACHE"} { // they follow from HOME
		v, err := exec.Command("go", "env", name).Output()
		if err != nil {
			t.Fatal(err)
		}
		env = append(env, name+"="+strings.TrimSpace(string(v)))
	}
	return env
}

// FAULTS.md G2: the quick start takes an application of one's own to a healthy deploy, word for word: one shell runs every block, as a
// person would paste them, in a clean clone. A command that fails ends it; what a block is said to print, it prints.
func TestQuickstartWordForWord(t *testing.T) {
	if os.Getenv("DEMARC_RUNBOOKS") == "" {
		t.Skip("builds and runs real processes: make test-runbooks")
	}
	for _, port := range []string{"17443", "17444", "17480", "18080"} {
		l, err := net.Listen("tcp", "127.0.0.1:"+port)
		if err != nil {
			t.Fatalf("the quick start needs the port %s of loopback: %v", port, err)
		}
		_ = l.Close()
	}
	home, err := os.MkdirTemp("", "dmquick") // short: there are Unix sockets in it
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(home) })
	var script strings.Builder
	for _, s := range steps(t, quickstart) {
		fmt.Fprintf(&script, "echo '== %d'\n%s%s\n", s.line, s.shell, quickWords[s.do])
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	sh := exec.CommandContext(ctx, "sh", "-eu", "-c", script.String())
	sh.Dir, sh.Env = cleanClone(t), laptopEnv(t, home)
	sh.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	var out bytes.Buffer
	sh.Stdout, sh.Stderr = &out, &out
	sh.Cancel = func() error { return syscall.Kill(-sh.Process.Pid, syscall.SIGTERM) }
	sh.WaitDelay = 20 * time.Second
	began := time.Now()
	err = sh.Run()
	t.Logf("%s\n%s", time.Since(began).Round(time.Second), out.String())
	if err != nil {
		_ = syscall.Kill(-sh.Process.Pid, syscall.SIGTERM) // the daemons, which then end their services
		for _, log := range []string{"cp-1.log", "laptop.log"} {
			b, _ := os.ReadFile(filepath.Join(home, "demarc-quickstart", log))
			t.Logf("%s:\n%s", log, b[max(0, len(b)-3000):])
		}
		t.Fatalf("%v after %s", err, lastStep(out.String()))
	}
	printed := map[string]string{}
	for part := range strings.SplitSeq("\n"+out.String(), "\n== ") {
		line, text, _ := strings.Cut(part, "\n")
		printed[line] = text
	}
	for line, want := range shown(t, quickstart) {
		for _, w := range want {
			w, _, cut := strings.Cut(squeeze(w), "...")
			found := false
			for got := range strings.SplitSeq(printed[fmt.Sprint(line)], "\n") {
				found = found || squeeze(got) == w || cut && strings.HasPrefix(squeeze(got), strings.TrimSpace(w))
			}
			if !found {
				t.Errorf("the block at line %d is said to print %q, and printed:\n%s", line, w, printed[fmt.Sprint(line)])
			}
		}
	}
	install := exec.Command("make", "install", "PREFIX="+filepath.Join(home, "local"))
	install.Dir, install.Env = sh.Dir, sh.Env
	if out, err := install.CombinedOutput(); err != nil {
		t.Errorf("make install: %v\n%s", err, out)
	}
	for _, program := range []string{"demarc", "demarcd"} {
		if out, err := exec.Command(filepath.Join(home, "local", "bin", program), "--version").CombinedOutput(); err != nil {
			t.Errorf("what make install put there: %v\n%s", err, out)
		}
	}
	left, err := filepath.Glob("/proc/[0-9]*/exe")
	if err != nil || len(left) == 0 {
		t.Fatal("no process can be seen here: ", err)
	}
	for _, exe := range left {
		if to, err := os.Readlink(exe); err == nil && (strings.HasPrefix(to, home) || strings.HasPrefix(to, sh.Dir)) {
			t.Errorf("after the end %s runs: %s", exe, to)
		}
	}
	if _, err := os.Stat(filepath.Join(home, "demarc-quickstart")); !os.IsNotExist(err) {
		t.Errorf("the folder is still there: %v", err)
	}
}

func lastStep(out string) string {
	i := strings.LastIndex("\n"+out, "\n== ")
	if i < 0 {
		return "nothing"
	}
	line, _, _ := strings.Cut(out[i+3:], "\n")
	return "the block at line " + line
}

// heredoc is the file that a block writes with cat, to the end word EOF.
func heredoc(t *testing.T, name string) []byte {
	t.Helper()
	for _, s := range steps(t, quickstart) {
		_, rest, ok := strings.Cut(s.shell, "cat >"+name+" <<")
		if !ok {
			continue
		}
		_, rest, _ = strings.Cut(rest, "\n")
		text, _, _ := strings.Cut(rest, "\nEOF\n")
		return []byte(text + "\n")
	}
	t.Fatalf("no block writes %s", name)
	return nil
}

// A quick start whose files this build does not take is found without running anything.
func TestQuickstartIsUnderstood(t *testing.T) {
	for _, s := range steps(t, quickstart) {
		if s.do != "" && quickWords[s.do] == "" {
			t.Errorf("%s:%d: %q", quickstart, s.line, s.do)
		}
	}
	spec, err := manifest.ParseCompose(heredoc(t, "app/compose.yaml"))
	if err != nil || spec.App != "hello" {
		t.Errorf("its Compose file: %v", err)
	}
	file := bytes.ReplaceAll(heredoc(t, "globex/appliance.yaml"), []byte("$PWD"), []byte("/home/me"))
	if _, err := configs.Parse("appliance.yaml", file, nil); err != nil {
		t.Errorf("its appliance's file: %v", err)
	}
}
