// SPDX-License-Identifier: Apache-2.0

// Command raft measures committed changes a second through the API of a control plane of three nodes, against etcd of
// three members, in turns on the same machine. A change is an operator's call over Connect and mutual TLS that returns
// when a majority has it on disk and its audit record is made: BanAppliance with a body of 256 bytes. The peer puts 256
// bytes with etcd's own client. Each client has a connection of its own; both sides work on 1,000 names. All traffic is
// on loopback.
package main

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

const domain = "bench.example"

type options struct {
	bin, etcd, dir string
	seconds, turns int
	clients        []int
	spread         bool
}

func main() {
	var o options
	flag.StringVar(&o.bin, "bin", "bin", "folder of demarc and demarcd")
	flag.StringVar(&o.etcd, "etcd", "", "folder of etcd and etcd-load, see etcd/build.sh; empty: no peer")
	flag.StringVar(&o.dir, "dir", "", "where the data go; empty: a temporary folder")
	flag.IntVar(&o.seconds, "seconds", 5, "of a turn")
	flag.IntVar(&o.turns, "turns", 3, "of each side and number of clients")
	flag.BoolVar(&o.spread, "spread", false, "clients use all three nodes in turn; otherwise the one that leads")
	list := flag.String("clients", "1,16,64,256", "numbers of clients")
	as := flag.String("load", "", "be the clients: the addresses of nodes")
	turn := flag.String("turn", "", "name of the turn, for -load")
	flag.Parse()
	var err error
	for s := range strings.SplitSeq(*list, ",") {
		n, e := strconv.Atoi(s)
		if e != nil || n < 1 {
			err = fmt.Errorf("-clients %q", *list)
		}
		o.clients = append(o.clients, n)
	}
	switch {
	case err != nil:
	case *as != "":
		var m measured
		if m, err = load(o.dir, strings.Split(*as, ","), o.clients[0], o.seconds, *turn); err == nil {
			err = json.NewEncoder(os.Stdout).Encode(m)
		}
	default:
		err = run(o)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "raft:", err)
		os.Exit(1)
	}
}

func run(o options) error {
	dir, err := os.MkdirTemp(o.dir, "bench-raft-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	ours, err := startOurs(o.bin, filepath.Join(dir, "vendor"))
	defer ours.stop()
	if err != nil {
		return err
	}
	var theirs *peer
	if o.etcd != "" {
		if err := os.Mkdir(filepath.Join(dir, "etcd"), 0o700); err != nil {
			return err
		}
		if theirs, err = startEtcd(o.etcd, filepath.Join(dir, "etcd")); theirs != nil {
			defer theirs.stop()
		}
		if err != nil {
			return err
		}
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	for _, c := range o.clients {
		var a, b []measured
		for t := range o.turns {
			target, err := ours.targets(o.spread)
			if err != nil {
				return err
			}
			used := cpu(ours.procs)
			m, err := turn(self, "-load", target, "-dir", ours.dir, "-clients", strconv.Itoa(c), "-seconds", strconv.Itoa(o.seconds), "-turn",
				fmt.Sprintf("%d-%d", c, t))
			if err != nil {
				return err
			}
			m.cpu = cpu(ours.procs) - used
			a = append(a, m)
			fmt.Printf("demarc c=%d turn %d: %.0f changes/s, p50 %.2f ms, p99 %.2f ms\n", c, t+1, m.Changes/m.Seconds, m.P50*1e3, m.P99*1e3)
			if theirs == nil {
				continue
			}
			target = strings.Join(theirs.clients, ",")
			if !o.spread {
				if target, err = theirs.leader(filepath.Join(dir, "etcd")); err != nil {
					return err
				}
			}
			used = cpu(theirs.procs)
			if m, err = turn(filepath.Join(o.etcd, "etcd-load"), "-endpoints", target, "-certs", filepath.Join(dir, "etcd"), "-clients",
				strconv.Itoa(c), "-seconds", strconv.Itoa(o.seconds)); err != nil {
				return err
			}
			m.cpu = cpu(theirs.procs) - used
			b = append(b, m)
			fmt.Printf("etcd   c=%d turn %d: %.0f changes/s, p50 %.2f ms, p99 %.2f ms\n", c, t+1, m.Changes/m.Seconds, m.P50*1e3, m.P99*1e3)
		}
		report(c, a, b)
	}
	return nil
}

func turn(name string, args ...string) (m measured, err error) {
	c := exec.Command(name, args...)
	c.Stderr = os.Stderr
	c.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	out, err := c.Output()
	if err != nil {
		return m, fmt.Errorf("%s: %w", filepath.Base(name), err)
	}
	return m, json.Unmarshal(out, &m)
}

// report prints medians over the turns. A ratio above 1 is ours ahead.
func report(c int, ours, peer []measured) {
	rate := func(m measured) float64 { return m.Changes / m.Seconds }
	p99 := func(m measured) float64 { return m.P99 * 1e3 }
	work := func(m measured) float64 { return m.cpu / m.Changes * 1e6 }
	a, a99, work1 := median(ours, rate), median(ours, p99), median(ours, work)
	if len(peer) == 0 {
		fmt.Printf("RESULT {\"bench\":\"raft\",\"case\":\"c=%d throughput\",\"ours\":%.0f,\"peer\":null,\"ratio\":null,\"unit\":\"changes/s\"}\n",
			c, a)
		fmt.Printf("RESULT {\"bench\":\"raft\",\"case\":\"c=%d p99\",\"ours\":%.2f,\"peer\":null,\"ratio\":null,\"unit\":\"ms\"}\n", c, a99)
		fmt.Printf("RESULT {\"bench\":\"raft\",\"case\":\"c=%d processor time of the "+
			"three\",\"ours\":%.0f,\"peer\":null,\"ratio\":null,\"unit\":\"us a change\"}\n", c, work1)
		return
	}
	b, b99 := median(peer, rate), median(peer, p99)
	fmt.Printf("RESULT {\"bench\":\"raft\",\"case\":\"c=%d throughput\",\"ours\":%.0f,\"peer\":%.0f,\"ratio\":%.2f,\"unit\":\"changes/s\"}\n",
		c, a, b, a/b)
	fmt.Printf("RESULT {\"bench\":\"raft\",\"case\":\"c=%d p99\",\"ours\":%.2f,\"peer\":%.2f,\"ratio\":%.2f,\"unit\":\"ms\"}\n", c, a99, b99,
		b99/a99)
	work2 := median(peer, work)
	fmt.Printf("RESULT {\"bench\":\"raft\",\"case\":\"c=%d processor time of the "+
		"three\",\"ours\":%.0f,\"peer\":%.0f,\"ratio\":%.2f,\"unit\":\"us a change\"}\n", c, work1, work2, work2/work1)
}

// cpu is the time that processes have computed, in seconds.
func cpu(procs []*exec.Cmd) (sum float64) {
	for _, p := range procs {
		b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p.Process.Pid))
		_, rest, _ := strings.Cut(string(b), ") ")
		f := strings.Fields(rest)
		if len(f) < 13 {
			continue
		}
		user, _ := strconv.ParseFloat(f[11], 64)
		system, _ := strconv.ParseFloat(f[12], 64)
		sum += (user + system) / 100 // USER_HZ
	}
	return sum
}

func median(list []measured, of func(measured) float64) float64 {
	var v []float64
	for _, m := range list {
		v = append(v, of(m))
	}
	slices.Sort(v)
	if n := len(v); n%2 == 0 {
		return (v[n/2-1] + v[n/2]) / 2
	}
	return v[len(v)/2]
}

// cluster is a control plane of three processes.
type cluster struct {
	dir     string
	apis    []string
	metrics []string
	procs   []*exec.Cmd
}

func startOurs(bin, dir string) (*cluster, error) {
	c := &cluster{dir: dir}
	args := []string{"control-plane", "init", "--dir", dir, "--trust-domain", domain, "--operator", "ann"}
	for i := range 3 {
		c.apis, c.metrics = append(c.apis, free()), append(c.metrics, free())
		args = append(args, "--node", fmt.Sprintf("cp-%d=%s,%s,%s", i+1, free(), c.apis[i], c.metrics[i]))
	}
	if out, err := exec.Command(filepath.Join(bin, "demarc"), args...).CombinedOutput(); err != nil {
		return c, fmt.Errorf("init: %w: %s", err, out)
	}
	for i := range 3 {
		p, err := startProc(filepath.Join(bin, "demarcd"), "run", "-c", filepath.Join(dir, fmt.Sprintf("cp-%d", i+1), "node.yaml"), "--log-level",
			"error")
		if err != nil {
			return c, err
		}
		c.procs = append(c.procs, p)
	}
	for _, a := range c.apis {
		if err := answers(a); err != nil {
			return c, err
		}
	}
	return c, register(dir, c.apis[0])
}

func (c *cluster) stop() {
	for _, p := range c.procs {
		kill(p)
	}
}

func (c *cluster) targets(spread bool) (string, error) {
	if spread {
		return strings.Join(c.apis, ","), nil
	}
	for limit := time.Now().Add(30 * time.Second); time.Now().Before(limit); time.Sleep(100 * time.Millisecond) {
		for i, m := range c.metrics {
			if gauge("http://"+m+"/metrics", nil, "demarc_raft_leader") == 1 {
				return c.apis[i], nil
			}
		}
	}
	return "", fmt.Errorf("no node leads")
}

// gauge reads one figure without labels from a page of metrics, -1 where it is not there.
func gauge(url string, conf *tls.Config, name string) float64 {
	t := &http.Transport{TLSClientConfig: conf, DisableKeepAlives: true}
	res, err := (&http.Client{Transport: t, Timeout: 5 * time.Second}).Get(url)
	if err != nil {
		return -1
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		return -1
	}
	for l := range strings.Lines(string(b)) {
		if rest, ok := strings.CutPrefix(l, name+" "); ok {
			v, err := strconv.ParseFloat(strings.TrimSpace(rest), 64)
			if err != nil {
				return -1
			}
			return v
		}
	}
	return -1
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

// answers waits until a TLS server answers.
func answers(addr string) error {
	for limit := time.Now().Add(time.Minute); time.Now().Before(limit); time.Sleep(50 * time.Millisecond) {
		d := &net.Dialer{Timeout: 5 * time.Second}
		// it is only asked whether it is there
		c, err := tls.DialWithDialer(d, "tcp", addr, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}})
		if err == nil {
			return c.Close()
		}
	}
	return fmt.Errorf("nothing answers at %s", addr)
}

func readPool(path string) (*x509.CertPool, error) {
	b, err := os.ReadFile(path)
	pool := x509.NewCertPool()
	if err != nil || !pool.AppendCertsFromPEM(b) {
		return nil, fmt.Errorf("no certificate in %s: %w", path, err)
	}
	return pool, nil
}
