// SPDX-License-Identifier: Apache-2.0

// Command channels measures what idle channels cost a control-plane node, and how fast they come back after it was
// killed. The node is a real demarcd with a real Raft log; the appliances are light clients in this process that speak
// the channel's protocol with certificates that they enrolled for. The peer is a bare Go server of HTTP/2 with the same
// mutual TLS and one open stream a client. All traffic is on loopback.
package main

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"flag"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

const domain = "bench.example"

func main() {
	n := flag.Int("n", 10000, "channels")
	bin := flag.String("bin", "bin", "folder of demarc and demarcd")
	idle := flag.Duration("idle", time.Minute, "how long the channels are left alone")
	settle := flag.Duration("settle", 10*time.Minute, "how long the node may take to come to rest")
	peer := flag.String("peer", "", "be the peer's server, with the folder of the trust domain")
	addr := flag.String("addr", "", "where the peer listens")
	flag.Parse()
	var err error
	if *peer != "" {
		err = servePeer(*peer, *addr)
	} else {
		err = run(*n, *bin, *idle, *settle)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "channels:", err)
		os.Exit(1)
	}
}

func run(n int, bin string, idle, settle time.Duration) error {
	dir, err := os.MkdirTemp("", "bench-channels-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	acme := filepath.Join(dir, "vendor")
	raft, api, metrics := free(), free(), free()
	if out, err := exec.Command(filepath.Join(bin, "demarc"), "control-plane", "init", "--dir", acme, "--trust-domain", domain,
		"--operator", "ann", "--node", "cp-1="+raft+","+api+","+metrics).CombinedOutput(); err != nil {
		return fmt.Errorf("init: %w: %s", err, out)
	}
	start := func() (*exec.Cmd, error) {
		return startProc(filepath.Join(bin, "demarcd"), "run", "-c", filepath.Join(acme, "cp-1", "node.yaml"), "--log-level", "error")
	}
	node, err := start()
	if err != nil {
		return err
	}
	defer func() { kill(node) }()
	if err := answers(api); err != nil {
		return err
	}
	fixture, err := openFixture(acme, api)
	if err != nil {
		return err
	}
	begun := time.Now()
	empty := time.Now()
	var rss0 float64
	for rss0 == 0 || time.Since(empty) < 3*time.Second {
		rss0 = rss(node.Process.Pid)
	}
	leaves, err := fixture.enrolAll(n)
	if err != nil {
		return err
	}
	took := time.Since(begun)
	fmt.Printf("%d appliances registered and enrolled in %.1f s\n", n, took.Seconds())
	base, err := quietCPU(node.Process.Pid, metrics, idle, settle)
	if err != nil {
		return err
	}
	fmt.Printf("idle with the same book and no channel: %.2f CPU seconds in %s\n", base, idle)

	crowd := newCrowd(api, fixture.roots, leaves)
	up, err := crowd.up(0, settle)
	if err != nil {
		return err
	}
	fmt.Printf("%d channels up in %.1f s\n", n, up.Seconds())
	used, err := quietCPU(node.Process.Pid, metrics, idle, settle)
	if err != nil {
		return err
	}
	ours := (rss(node.Process.Pid) - rss0) / float64(n)
	routines := metric(metrics, "go_goroutines")
	fmt.Printf("node: %.1f KiB a channel (%.1f MiB empty, %.1f MiB full), %.2f goroutines a channel, %.2f CPU seconds in %s idle\n",
		ours, rss0/1024, rss(node.Process.Pid)/1024, routines/float64(n), used, idle)

	kill(node)
	gen := crowd.lose()
	if node, err = start(); err != nil {
		return err
	}
	back, err := crowd.up(gen, settle)
	if err != nil {
		return err
	}
	fmt.Printf("after kill -9 and a restart: all %d back in %.1f s, the slowest handshake and welcome took %.2f s\n", n, back.Seconds(), crowd.slowest().Seconds())
	crowd.histogram()
	crowd.stop()
	kill(node)

	theirs, err := measurePeer(acme, fixture.roots, leaves, idle/2)
	if err != nil {
		return err
	}
	fmt.Printf("peer: %.1f KiB a channel\n", theirs)
	result("memory per channel", ours, theirs, theirs/ours, "KiB")
	fmt.Printf("RESULT {\"bench\":\"channels\",\"case\":\"all %d back after kill -9\",\"ours\":%.2f,\"peer\":null,\"ratio\":null,\"unit\":\"s\"}\n", n, back.Seconds())
	fmt.Printf("RESULT {\"bench\":\"channels\",\"case\":\"CPU of the node, %d idle channels\",\"ours\":%.4f,\"without_channels\":%.4f,\"difference\":%.4f,\"unit\":\"CPU s/s\",\"over_s\":%.0f}\n",
		n, used/idle.Seconds(), base/idle.Seconds(), (used-base)/idle.Seconds(), idle.Seconds())
	return nil
}

// quietCPU waits until the node's log has not grown for a while, and gives what the node computes in idle after that, in
// seconds: countersignatures of what was enrolled, and what the enrolment left behind, are not idleness.
func quietCPU(pid int, metrics string, idle, limit time.Duration) (float64, error) {
	const still = 25 * time.Second // two rounds of witnessing
	until := time.Now().Add(limit)
	for size, since := -1.0, time.Now(); time.Since(since) < still; time.Sleep(time.Second) {
		if now := metric(metrics, "demarc_audit_entries"); now != size {
			size, since = now, time.Now()
		}
		if time.Now().After(until) {
			return 0, fmt.Errorf("the log of the node still grows after %s", limit)
		}
	}
	before := cpu(pid)
	time.Sleep(idle)
	return cpu(pid) - before, nil
}

func result(name string, ours, peer, ratio float64, unit string) {
	fmt.Printf("RESULT {\"bench\":\"channels\",\"case\":%q,\"ours\":%.2f,\"peer\":%.2f,\"ratio\":%.2f,\"unit\":%q}\n", name, ours, peer, ratio, unit)
}

func startProc(name string, args ...string) (*exec.Cmd, error) {
	c := exec.Command(name, args...)
	c.Stderr = os.Stderr
	c.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	return c, c.Start()
}

func kill(c *exec.Cmd) {
	_ = c.Process.Kill()
	_ = c.Wait()
}

func free() string {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return ""
	}
	defer ln.Close()
	return ln.Addr().String()
}

// answers waits until a TLS server answers: a bound socket alone may be one whose node still reads its book.
func answers(addr string) error {
	for limit := time.Now().Add(time.Minute); time.Now().Before(limit); time.Sleep(50 * time.Millisecond) {
		d := &net.Dialer{Timeout: 5 * time.Second}
		c, err := tls.DialWithDialer(d, "tcp", addr, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}}) // it is only asked whether it is there
		if err == nil {
			return c.Close()
		}
	}
	return fmt.Errorf("nothing answers at %s", addr)
}

// rss is the resident memory of a process, in KiB.
func rss(pid int) float64 {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	for l := range strings.Lines(string(b)) {
		if rest, ok := strings.CutPrefix(l, "VmRSS:"); ok {
			v, _ := strconv.ParseFloat(strings.Fields(rest)[0], 64)
			return v
		}
	}
	return 0
}

// cpu is the time that a process has computed, in seconds.
func cpu(pid int) float64 {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	_, rest, _ := strings.Cut(string(b), ") ")
	f := strings.Fields(rest)
	if len(f) < 13 {
		return 0
	}
	user, _ := strconv.ParseFloat(f[11], 64)
	system, _ := strconv.ParseFloat(f[12], 64)
	return (user + system) / 100 // USER_HZ
}

func readJSON(path string, v any) error {
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	return json.Unmarshal(b, v)
}

func readPool(path string) (*x509.CertPool, error) {
	b, err := os.ReadFile(path)
	pool := x509.NewCertPool()
	if err != nil || !pool.AppendCertsFromPEM(b) {
		return nil, fmt.Errorf("no certificate in %s: %w", path, err)
	}
	return pool, nil
}
