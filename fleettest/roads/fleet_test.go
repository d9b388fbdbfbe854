// SPDX-License-Identifier: Apache-2.0

package roads_test

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/demarc-dev/demarc/identity/identitytest"
)

var bin string // of demarc and demarcd

func TestMain(m *testing.M) {
	if len(os.Args) > 2 {
		var err error
		switch os.Args[1] {
		case "road":
			err = runRoad(os.Args[2:])
		case "token":
			err = askToken(os.Args[2], os.Args[3])
		default:
			os.Exit(tests(m))
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(tests(m))
}

func tests(m *testing.M) int {
	if !asked() || missing() != "" {
		return m.Run() // which says why it skips, or fails
	}
	var err error
	if bin, err = os.MkdirTemp("", "demarc-roads-"); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(bin)
	build := exec.Command("go", "build", "-tags=ts_omit_peerapiserver", "-o", bin, "./cmd/demarc", "./cmd/demarcd")
	build.Dir = filepath.Join("..", "..")
	if out, err := build.CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "%v\n%s", err, out)
		return 1
	}
	return m.Run()
}

// missing says what is not here to run with.
func missing() string {
	if os.Geteuid() != 0 {
		return "root"
	}
	for _, tool := range []string{"ip", "iptables"} {
		if _, err := exec.LookPath(tool); err != nil {
			return tool
		}
	}
	return ""
}

var fleets atomic.Int32

// fleet is one control plane and one appliance, each in a namespace.
type fleet struct {
	t        *testing.T
	dir      string
	cp, ap   string // namespaces
	road     *helper
	resolver *helper
}

// asked tells whether these tests are to run; where they are, a missing tool is a failure.
func asked() bool { return os.Getenv("DEMARC_NETNS") != "" }

func need(t *testing.T) {
	t.Helper()
	if !asked() {
		t.Skip("these tests make network namespaces: `make test-roads` runs them, as root")
	}
	if what := missing(); what != "" {
		t.Fatalf("%s is missing: these tests make network namespaces", what)
	}
}

func newFleet(t *testing.T) *fleet {
	n := fleets.Add(1)
	f := &fleet{t: t, dir: t.TempDir(), cp: fmt.Sprintf("dmr%d-%dc", os.Getpid(), n), ap: fmt.Sprintf("dmr%d-%da", os.Getpid(), n)}
	f.namespaces(n)
	f.run("", filepath.Join(bin, "demarc"), "control-plane", "init", "--dir", f.path("acme"), "--trust-domain", "acme.example", "--operator", "ann", "--node", "cp-1=127.0.0.1:7444,10.81.2.1:7443")
	f.daemon(f.cp, "cp-1", f.path("acme", "cp-1", "node.yaml"))
	f.wait("the control plane leads", 60*time.Second, func() bool {
		out, err := f.demarc("status", "--timeout", "5s", "-o", "json")
		return err == nil && strings.Contains(out, `"leader": "cp-1"`)
	})
	f.road = f.help(f.cp, "proxy", "10.81.1.1:3128")
	f.resolver = f.help(f.ap, "dns", "127.0.0.1:53", "10.81.1.1")
	f.enrol()
	return f
}

// namespaces makes two hosts with two cables between them, and no other way out of either.
func (f *fleet) namespaces(n int32) {
	for _, ns := range []string{f.cp, f.ap} {
		f.run("", "ip", "netns", "add", ns)
		f.t.Cleanup(func() { _ = exec.Command("ip", "netns", "del", ns).Run() })
		f.run(ns, "ip", "link", "set", "lo", "up")
	}
	for i := range 2 {
		a, b := fmt.Sprintf("r%dx%dc", n, i+1), fmt.Sprintf("r%dx%da", n, i+1)
		f.run("", "ip", "link", "add", a, "netns", f.cp, "type", "veth", "peer", "name", b, "netns", f.ap)
		for j, end := range []struct{ ns, dev string }{{f.cp, a}, {f.ap, b}} {
			f.run(end.ns, "ip", "link", "set", end.dev, "name", fmt.Sprintf("road%d", i+1))
			f.run(end.ns, "ip", "addr", "add", fmt.Sprintf("10.81.%d.%d/24", i+1, j+1), "dev", fmt.Sprintf("road%d", i+1))
			f.run(end.ns, "ip", "link", "set", fmt.Sprintf("road%d", i+1), "up")
		}
	}
	etc := filepath.Join("/etc/netns", f.ap) // what `ip netns exec` lays over /etc
	f.must(os.MkdirAll(etc, 0o755))
	f.t.Cleanup(func() { _ = os.RemoveAll(etc); _ = os.Remove("/etc/netns") })
	f.must(os.WriteFile(filepath.Join(etc, "resolv.conf"), []byte("nameserver 127.0.0.1\noptions timeout:1 attempts:2\n"), 0o644))
}

// enrol registers the appliance, starts it and waits until it is online over the first road.
func (f *fleet) enrol() {
	issuer, err := identitytest.NewIssuer("https://cluster.globex.example")
	f.must(err)
	ln, err := net.Listen("unix", f.path("platform.sock"))
	f.must(err)
	f.t.Cleanup(func() { _ = ln.Close() })
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			audience, _ := bufio.NewReader(c).ReadString('\n')
			if token, err := issuer.Token("demarc", "appliance", strings.TrimSpace(audience), time.Now()); err == nil {
				_, _ = io.WriteString(c, token)
			}
			_ = c.Close()
		}
	}()
	expect, err := json.Marshal(issuer.Expect("demarc", "appliance"))
	f.must(err)
	f.write(string(expect), "eu-1.json")
	f.ok("customer", "add", "globex")
	f.ok("appliance", "add", "eu-1", "--customer", "globex", "--expect", f.path("eu-1.json"))
	self, err := os.Executable()
	f.must(err)
	f.must(os.MkdirAll(f.path("customer", "secrets"), 0o700))
	f.write(proxyUser, "customer", "proxy.auth")
	f.write(fmt.Sprintf(`version: demarc/1
role: appliance
name: eu-1
customer: globex
trust_domain: acme.example
dir: data
socket: a.sock
control_plane:
  addresses: ["10.81.2.1:7443"]
  bundle_file: ../acme/bundle.pem
  release_keys: [../acme/operator/signing.pub]
transports:
  - {kind: https, proxy: {url: "http://%s:3128", auth_file: proxy.auth}}
  - {kind: privatelink, addresses: ["10.81.2.1:7443"]}
proof: {kind: kubernetes, token_command: [%q, token, %q]}
runtime: {kind: process}
secrets: {kind: files, dir: secrets}
`, strings.TrimSuffix(proxyName, "."), self, f.path("platform.sock")), "customer", "appliance.yaml")
	f.daemon(f.ap, "appliance", f.path("customer", "appliance.yaml"))
	f.await("https", 60*time.Second)
}

func (f *fleet) path(parts ...string) string {
	return filepath.Join(append([]string{f.dir}, parts...)...)
}

func (f *fleet) must(err error) {
	f.t.Helper()
	if err != nil {
		f.t.Fatal(err)
	}
}

func (f *fleet) write(text string, parts ...string) {
	f.t.Helper()
	f.must(os.WriteFile(f.path(parts...), []byte(text), 0o600))
}

func in(ns string, args ...string) *exec.Cmd {
	if ns != "" {
		args = append([]string{"ip", "netns", "exec", ns}, args...)
	}
	return exec.Command(args[0], args[1:]...)
}

func (f *fleet) run(ns string, args ...string) {
	f.t.Helper()
	if out, err := in(ns, args...).CombinedOutput(); err != nil {
		f.t.Fatalf("%s: %v\n%s", strings.Join(args, " "), err, out)
	}
}

// demarc types a command of the vendor's operator.
func (f *fleet) demarc(args ...string) (string, error) {
	return f.typed(f.cp, args...)
}

func (f *fleet) typed(ns string, args ...string) (string, error) {
	cmd := in(ns, append([]string{filepath.Join(bin, "demarc")}, args...)...)
	cmd.Env = append(os.Environ(), "DEMARC_CONTEXT="+f.path("acme", "operator", "operator.yaml"), "DEMARC_SOCKET="+f.path("customer", "a.sock"))
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		return out.String(), fmt.Errorf("demarc %s: %w: %s", args[0], err, errs.String())
	}
	return out.String(), nil
}

func (f *fleet) ok(args ...string) {
	f.t.Helper()
	_, err := f.demarc(args...)
	f.must(err)
}

// route is where the vendor sees the appliance; "" while it does not.
func (f *fleet) route() string {
	var a struct {
		Online bool   `json:"online"`
		Route  string `json:"route"`
	}
	out, err := f.demarc("appliance", "show", "eu-1", "-o", "json", "--timeout", "5s")
	if err != nil || json.Unmarshal([]byte(out), &a) != nil || !a.Online {
		return ""
	}
	return a.Route
}

func (f *fleet) await(route string, limit time.Duration) time.Duration {
	f.t.Helper()
	return f.wait("the appliance is on "+route, limit, func() bool { return f.route() == route })
}

// wait looks again and again until it is so, and says how long that took.
func (f *fleet) wait(what string, limit time.Duration, so func() bool) time.Duration {
	f.t.Helper()
	began := time.Now()
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for !so() {
		if time.Since(began) > limit {
			f.t.Fatalf("not so after %s: %s\n%s", limit, what, f.logs())
		}
		<-tick.C
	}
	return time.Since(began)
}

func (f *fleet) log(name string) string {
	b, err := os.ReadFile(f.path(name + ".log"))
	f.must(err)
	return string(b)
}

func (f *fleet) logs() string {
	tail := func(s string) string { return s[max(0, len(s)-6000):] }
	return "appliance:\n" + tail(f.log("appliance")) + "\ncp-1:\n" + tail(f.log("cp-1"))
}

// daemon starts demarcd and ends it with the test.
func (f *fleet) daemon(ns, name, file string) {
	f.t.Helper()
	log, err := os.Create(f.path(name + ".log"))
	f.must(err)
	cmd := in(ns, filepath.Join(bin, "demarcd"), "run", "-c", file)
	cmd.Stdout, cmd.Stderr = log, log
	f.must(cmd.Start())
	_ = log.Close()
	f.t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGKILL)
		_ = cmd.Wait()
	})
	if name != "appliance" {
		f.write("", "appliance.log")
	}
}

// helper is a road process and its ear.
type helper struct {
	f   *fleet
	in  io.WriteCloser
	out *bufio.Scanner
}

func (f *fleet) help(ns string, args ...string) *helper {
	f.t.Helper()
	self, err := os.Executable()
	f.must(err)
	cmd := in(ns, append([]string{self, "road"}, args...)...)
	cmd.Stderr = os.Stderr
	h := &helper{f: f}
	h.in, err = cmd.StdinPipe()
	f.must(err)
	out, err := cmd.StdoutPipe()
	f.must(err)
	h.out = bufio.NewScanner(out)
	f.must(cmd.Start())
	f.t.Cleanup(func() { _ = h.in.Close(); _ = cmd.Process.Kill(); _ = cmd.Wait() })
	h.heard()
	return h
}

func (h *helper) set(mode string) {
	h.f.t.Helper()
	_, err := io.WriteString(h.in, mode+"\n")
	h.f.must(err)
	h.heard()
}

func (h *helper) heard() {
	h.f.t.Helper()
	if !h.out.Scan() || h.out.Text() != "ok" {
		h.f.t.Fatal("the road does not obey")
	}
}
