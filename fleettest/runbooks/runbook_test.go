// SPDX-License-Identifier: Apache-2.0

package runbooks

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/demarc-dev/demarc/configs"
	"github.com/demarc-dev/demarc/identity/identitytest"
)

// step is a block of commands, or a word to the test.
type step struct {
	line  int
	shell string
	do    string // see words
}

// steps reads a runbook.
func steps(t *testing.T, file string) []step {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var out []step
	in := false
	for i, line := range strings.Split(string(b), "\n") {
		do, isWord := strings.CutPrefix(line, "<!-- test: ")
		switch {
		case line == "```sh":
			in = true
			out = append(out, step{line: i + 2})
		case line == "```":
			in = false
		case in:
			out[len(out)-1].shell += line + "\n"
		case isWord:
			out = append(out, step{line: i + 1, do: strings.TrimSuffix(do, " -->")})
		case strings.HasPrefix(line, "```"):
			t.Fatalf("%s:%d: a block that the test does not run", file, i+1)
		}
	}
	if len(out) < 3 {
		t.Fatalf("%s has %d blocks", file, len(out))
	}
	return out
}

// systemctl is what the blocks call in place of systemd: start, stop, disable and kill of demarcd@NAME. The exit code of one that ended is
// in NAME.code.
const systemctl = `#!/bin/sh
name=${2#demarcd@}
case $1 in
start)
	rm -f "$name.code"
	setsid sh -c 'demarcd run -c "acme/$1/node.yaml" & echo $! >"$1.pid"; code=0; wait $! || code=$?; echo $code >"$1.code"' \
		sh "$name" >>"$name.log" 2>&1 </dev/null &
	i=0
	while [ ! -s "$name.pid" ] || ! kill -0 "$(cat "$name.pid")" 2>/dev/null; do
		[ -s "$name.code" ] && break
		i=$((i+1)); [ $i -gt 300 ] && exit 1
		sleep 0.1
	done ;;
stop|kill)
	pid=$(cat "$name.pid") || exit 1
	if [ "$1" = kill ]; then kill -9 "$pid" 2>/dev/null; else kill "$pid" 2>/dev/null; fi
	i=0
	while kill -0 "$pid" 2>/dev/null; do
		i=$((i+1)); [ $i -gt 300 ] && exit 1
		sleep 0.1
	done ;;
disable) ;;
*) exit 2 ;;
esac
`

// world is a folder with a control plane in it.
type world struct {
	t   *testing.T
	dir string
	bin string
	env []string

	renewing map[string]*renewing // operators who renew all the time
	thief    *thief
	platform string // address of the management plane

	issuer *identitytest.Issuer // see tokens
	all    []string             // where every node serves
	sent   map[string]int       // probes, by appliance; see echoes
}

func programs(t *testing.T) string {
	t.Helper()
	bin := t.TempDir()
	if out, err := exec.Command("go", "build", "-o", bin+"/", "../../cmd/demarc", "../../cmd/demarcd").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if err := os.WriteFile(filepath.Join(bin, "systemctl"), []byte(systemctl), 0o755); err != nil {
		t.Fatal(err)
	}
	return bin
}

// free gives addresses that nobody listens at, as --node and --addr take them.
func free(t *testing.T, n int) []string {
	t.Helper()
	var all []string
	var open []net.Listener
	for range 3 * n {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		open = append(open, ln)
		all = append(all, ln.Addr().String())
	}
	for _, ln := range open {
		_ = ln.Close()
	}
	var out []string
	for i := range n {
		out = append(out, strings.Join(all[3*i:3*i+3], ","))
	}
	return out
}

// begin makes a world; with a management plane if it is managed.
func begin(t *testing.T, bin string, managed bool) *world {
	dir, err := os.MkdirTemp("", "dmrun") // short: there are Unix sockets in it
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	w := &world{t: t, dir: dir, bin: bin, renewing: map[string]*renewing{}, sent: map[string]int{}}
	at := free(t, 8)
	for _, a := range at[:7] {
		w.all = append(w.all, strings.Split(a, ",")[1])
	}
	w.env = append(os.Environ(), "PATH="+bin+":"+os.Getenv("PATH"), "DEMARC_CONTEXT=acme/operator/operator.yaml",
		"cp1="+at[0], "cp2="+at[1], "cp3="+at[2], "cp4="+at[3], "cp5="+at[4], "cp6="+at[5], "edge1="+at[6])
	t.Cleanup(w.end)
	flags := ""
	if managed {
		ports := strings.Split(at[7], ",")
		flags = w.management(ports[0], ports[2])
	}
	w.run(fmt.Sprintf("demarc control-plane init --dir acme --trust-domain acme.example --operator ann --node cp-1=%s --node cp-2=%s --node "+
		"cp-3=%s%s\n", at[0], at[1], at[2], flags))
	if managed {
		w.short()
		w.run("systemctl start demarcd@management\n")
	}
	// The operator's file names the nodes that will come, as the runbook says.
	file := filepath.Join(w.dir, "acme", "operator", "operator.yaml")
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var extra string
	for _, a := range at[3:7] {
		extra += "    - " + strings.Split(a, ",")[1] + "\n"
	}
	b = bytes.Replace(b, []byte("nodes:\n"), []byte("nodes:\n"+extra), 1)
	if err := os.WriteFile(file, b, 0o600); err != nil {
		t.Fatal(err)
	}
	w.run("for n in cp-1 cp-2 cp-3; do systemctl start demarcd@$n; done\ndemarc --timeout 60s customer add globex\n")
	return w
}

// end stops what the world's own units left, by the pids that they wrote.
func (w *world) end() {
	w.settled()
	pids, _ := filepath.Glob(filepath.Join(w.dir, "*.pid"))
	for _, p := range pids {
		name := strings.TrimSuffix(filepath.Base(p), ".pid")
		if out, err := w.shell("systemctl kill demarcd@" + name + "\n"); err != nil {
			w.t.Errorf("%s: %v %s", name, err, out)
		}
		_ = os.Remove(p) // the number may be another process's, when the end comes again
		if w.t.Failed() {
			b, _ := os.ReadFile(filepath.Join(w.dir, name+".log"))
			w.t.Logf("%s:\n%s", name, b[max(0, len(b)-3000):])
		}
	}
}

func (w *world) shell(text string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	defer cancel()
	c := exec.CommandContext(ctx, "sh", "-eu", "-c", text)
	c.Dir, c.Env = w.dir, w.env
	c.WaitDelay = 10 * time.Second
	c.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	out, err := c.CombinedOutput()
	return string(out), err
}

func (w *world) run(text string) {
	w.t.Helper()
	began := time.Now()
	out, err := w.shell(text)
	if err != nil {
		w.t.Fatalf("%v\n%s%s", err, text, out)
	}
	w.t.Logf("%s\n%s%s", time.Since(began).Round(time.Millisecond), text, out)
}

// members waits until the cluster is as it is told, and everybody is heard.
func (w *world) members(want string) {
	w.t.Helper()
	var got string
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); time.Sleep(200 * time.Millisecond) {
		out, err := w.shell("demarc control-plane members --output json 2>/dev/null\n")
		if err != nil {
			got = out
			continue
		}
		var doc struct {
			Members []struct {
				Name, Role string
				Heard      bool
			}
		}
		if err := json.Unmarshal([]byte(out), &doc); err != nil {
			w.t.Fatalf("%v: %s", err, out)
		}
		var all []string
		for _, m := range doc.Members {
			text := m.Name + " " + m.Role
			if !m.Heard {
				text += " silent"
			}
			if m.Role != "" {
				all = append(all, text)
			}
		}
		slices.Sort(all)
		if got = strings.Join(all, ", "); got == want {
			return
		}
	}
	w.t.Fatalf("the members are %q, want %q", got, want)
}

// api is where a node of the variables serves.
func (w *world) api(node string) string {
	w.t.Helper()
	for _, e := range w.env {
		if rest, ok := strings.CutPrefix(e, node+"="); ok {
			return strings.Split(rest, ",")[1]
		}
	}
	w.t.Fatalf("no node %q", node)
	return ""
}

// gone waits until a removed node has ended by itself, with the code after which its unit does not start it again. FAULTS.md J9.
func (w *world) gone(node string) {
	w.t.Helper()
	var code []byte
	for deadline := time.Now().Add(time.Minute); len(code) == 0; time.Sleep(100 * time.Millisecond) {
		if time.Now().After(deadline) {
			w.t.Fatalf("node %s runs on", node)
		}
		code, _ = os.ReadFile(filepath.Join(w.dir, node+".code"))
	}
	unit, err := os.ReadFile(filepath.Join("..", "..", "deploy", "systemd", "demarcd@.service"))
	if err != nil {
		w.t.Fatal(err)
	}
	if !strings.Contains(string(unit), "\nRestartPreventExitStatus="+string(code)) {
		w.t.Fatalf("node %s ended with the code %s, after which its unit starts it again", node, code)
	}
}

// through makes a change and reads it by one node alone, which forwards it to whoever leads.
func (w *world) through(what string) {
	w.t.Helper()
	node, customer, _ := strings.Cut(what, " ")
	dir := filepath.Join(w.dir, "acme", "operator")
	b, err := os.ReadFile(filepath.Join(dir, "operator.yaml"))
	if err != nil {
		w.t.Fatal(err)
	}
	head, rest, _ := strings.Cut(string(b), "nodes:\n")
	for strings.HasPrefix(rest, "    - ") {
		_, rest, _ = strings.Cut(rest, "\n")
	}
	if err := os.WriteFile(filepath.Join(dir, "one.yaml"), []byte(head+"nodes: [\""+w.api(node)+"\"]\n"+rest), 0o600); err != nil {
		w.t.Fatal(err)
	}
	w.run("demarc --context acme/operator/one.yaml customer add " + customer + "\ndemarc --context acme/operator/one.yaml status\n")
}

// forget takes the operator's files away, from a control plane that has run long enough for each node to have kept its keys.
func (w *world) forget(dir string) {
	w.t.Helper()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(100 * time.Millisecond) {
		kept, _ := filepath.Glob(filepath.Join(w.dir, "acme", "cp-*", "data", "credentials.json"))
		named := 0
		for _, path := range kept {
			if b, _ := os.ReadFile(path); bytes.Contains(b, []byte(`"kek":`)) {
				named++
			}
		}
		if named == 3 {
			break
		}
		if time.Now().After(deadline) {
			w.t.Fatalf("%d nodes have kept their keys", named)
		}
	}
	if err := os.RemoveAll(filepath.Join(w.dir, dir)); err != nil {
		w.t.Fatal(err)
	}
}

// wipe takes a node's whole folder away; a thief has a copy of its certificates.
func (w *world) wipe(node string) {
	w.t.Helper()
	if err := os.Rename(filepath.Join(w.dir, "acme", node), filepath.Join(w.dir, "stolen-"+node)); err != nil {
		w.t.Fatal(err)
	}
}

// stolen shows what the thief has of a node to another one, at the listener of the nodes and at the door. What the node has now is
// taken there.
func (w *world) stolen(node string) {
	w.t.Helper()
	cfg, err := configs.Load(filepath.Join(w.dir, "acme", "cp-1", "node.yaml"), nil)
	if err != nil {
		w.t.Fatal(err)
	}
	one := cfg.(*configs.Control)
	ask := func(dir, addr, proto string) (taken bool) {
		leaf, err := tls.LoadX509KeyPair(filepath.Join(w.dir, dir, "cert.pem"), filepath.Join(w.dir, dir, "cert.key"))
		if err != nil {
			w.t.Fatal(err)
		}
		// who answers is not the question here
		c, err := tls.Dial("tcp", addr, &tls.Config{Certificates: []tls.Certificate{leaf}, NextProtos: []string{proto}, InsecureSkipVerify: true})
		if err != nil {
			return false
		}
		defer c.Close()
		_ = c.SetReadDeadline(time.Now().Add(2 * time.Second))
		_, err = c.Read(make([]byte, 1))
		return err == nil || errors.Is(err, os.ErrDeadlineExceeded) // a refusal ends it
	}
	for proto, addr := range map[string]string{"demarc-raft/1": one.Self().Raft, "h2": one.Self().API} {
		if ask("stolen-"+node, addr, proto) {
			w.t.Errorf("the stolen certificate of %s is taken for %s", node, proto)
		}
		if !ask("acme/"+node, addr, proto) {
			w.t.Errorf("the new certificate of %s is not taken for %s: the test above shows nothing", node, proto)
		}
	}
}

// sealed looks for a value in all that the nodes wrote: it is nowhere in the clear.
func (w *world) sealed(value string) {
	w.t.Helper()
	forms := [][]byte{[]byte(value), []byte(hex.EncodeToString([]byte(value))),
		[]byte(base64.StdEncoding.EncodeToString([]byte(value))[:len(value)])}
	files := 0
	err := filepath.WalkDir(w.dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		b, err := os.ReadFile(path)
		files++
		for _, form := range forms {
			if bytes.Contains(b, form) {
				w.t.Errorf("%s has the value in the clear", path)
			}
		}
		return err
	})
	if err != nil || files == 0 {
		w.t.Fatalf("%d files: %v", files, err)
	}
}

// runbooks are those whose blocks are run.
var runbooks = []string{"runbook-ca.md", "runbook-members.md", "runbook-disaster.md", "runbook-admin.md", "runbook-secrets.md",
	"runbook-certify.md", "runbook-kek.md"}

// The runbooks are run word for word: each block ends without an error, and after it the cluster is as the runbook says.
func TestRunbooksWordForWord(t *testing.T) {
	if os.Getenv("DEMARC_RUNBOOKS") == "" {
		t.Skip("builds and runs real processes: make test-runbooks")
	}
	bin := programs(t)
	for _, name := range runbooks {
		t.Run(name, func(t *testing.T) {
			managed := name == "runbook-ca.md"
			w := begin(t, bin, managed)
			for _, s := range steps(t, filepath.Join("..", "..", "docs", name)) {
				t.Logf("%s:%d", name, s.line)
				verb, rest, _ := strings.Cut(s.do, " ")
				switch verb {
				case "":
					w.run(s.shell)
				case "members":
					w.members(rest)
				case "lose":
					for n := range strings.FieldsSeq(rest) {
						w.run("systemctl kill demarcd@" + n + "\n")
					}
				case "forget":
					w.forget(rest)
				case "holds":
					w.holds(rest)
				case "power":
					w.power(rest)
				case "wipe":
					w.wipe(rest)
				case "stolen":
					w.stolen(rest)
				case "sealed":
					w.sealed(rest)
				case "gone":
					w.gone(rest)
				case "through":
					w.through(rest)
				case "appliance":
					w.appliance(rest)
				case "again":
					w.end()
					w = begin(t, bin, managed)
				case "operators":
					w.operators(rest)
				case "appliances":
					w.appliances(strings.Fields(rest)...)
				case "renews":
					w.renews(rest)
				case "renewed":
					w.renewed(rest)
				case "missing":
					w.missing(rest)
				case "unused":
					w.unused(rest)
				case "probes":
					w.probes(strings.Fields(rest)...)
				case "works":
					w.works(strings.Fields(rest)...)
				case "refused":
					w.refused(rest)
				case "managed":
					w.managed()
				case "online":
					w.comes(rest)
				case "back": // the node that goes on
					w.online(rest, ", at node cp-2")
				case "echoes":
					w.echoes(rest)
				case "since":
					w.since(rest)
				case "lost":
					w.lost(rest)
				case "redo":
					w.redo(rest)
				case "thief":
					w.steals(rest)
				case "wake":
					w.wake(strings.Fields(rest)...)
				case "as": // the operator that asks from here on
					w.env = append(w.env, "DEMARC_CONTEXT="+rest)
				case "customers": // what was in the book is there: it can't be registered a second time
					if out, err := w.shell("demarc customer add " + rest + "\n"); err == nil || !strings.Contains(out, "registered already") {
						t.Fatalf("customer %s: %v %s", rest, err, out)
					}
				default:
					t.Fatalf("%s:%d: %q", name, s.line, s.do)
				}
			}
			w.settled()
		})
	}
}
