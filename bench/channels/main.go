// SPDX-License-Identifier: Apache-2.0

// Command channels measures what idle channels cost a control-plane node, and how fast they come back after it was
// killed. The node is a real demarcd with a real Raft log; the appliances are light clients in this process that speak
// the channel's protocol with certificates that they enrolled for, and that dial with the switch of a real appliance. The
// peer is a bare Go server of HTTP/2 with the same mutual TLS and one open stream a client, with the same clients around
// it. All traffic is on loopback.
package main

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"flag"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"
)

const domain = "bench.example"

type options struct {
	n            int
	bin, dir     string
	idle, settle time.Duration
	windows      int
	only         string
}

func main() {
	var o options
	flag.IntVar(&o.n, "n", 10000, "channels")
	flag.StringVar(&o.bin, "bin", "bin", "folder of demarc and demarcd")
	flag.StringVar(&o.dir, "dir", "", "where the node lives: what an earlier run enrolled there is taken over; empty: a temporary folder")
	flag.DurationVar(&o.idle, "idle", time.Minute, "a window in which the processes are left alone")
	flag.IntVar(&o.windows, "windows", 4, "windows with channels, and as many without")
	flag.DurationVar(&o.settle, "settle", 10*time.Minute, "how long the node may take to come to rest")
	flag.StringVar(&o.only, "only", "", "ours: no peer; return: no windows and no peer")
	peer := flag.String("peer", "", "be the peer's server, with the folder of the trust domain")
	addr := flag.String("addr", "", "where the peer listens")
	flag.Parse()
	var err error
	switch {
	case *peer != "":
		err = servePeer(*peer, *addr)
	case o.n < 1 || o.windows < 1 || o.idle <= 0:
		err = errors.New("-n, -windows and -idle are more than nothing")
	default:
		err = run(o)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "channels:", err)
		os.Exit(1)
	}
}

func run(o options) error {
	if o.dir == "" {
		dir, err := os.MkdirTemp("", "bench-channels-")
		if err != nil {
			return err
		}
		defer os.RemoveAll(dir)
		o.dir = dir
	}
	b, err := prepare(o)
	if b != nil {
		defer func() { kill(b.node) }()
	}
	if err != nil {
		return err
	}
	ours, err := b.measure(o, b.node, b.at.API, speakChannel(b.roots), b.start)
	if err != nil {
		return err
	}
	kill(b.node)
	var theirs *measured
	if o.only == "" {
		if theirs, err = b.measurePeer(o); err != nil {
			return err
		}
	}
	report(o, ours, theirs)
	return nil
}

// bench is a node whose appliances have enrolled.
type bench struct {
	vendor string // folder of the trust domain
	at     place
	node   *exec.Cmd
	start  func() (*exec.Cmd, error)
	roots  *x509.CertPool
	leaves []*tls.Certificate
	empty  float64 // resident memory of the node before the first appliance, KiB
}

// place is where a node listens.
type place struct{ Raft, API, Metrics string }

// prepare starts a node and enrols, or takes over what an earlier run enrolled.
func prepare(o options) (*bench, error) {
	b := &bench{vendor: filepath.Join(o.dir, "vendor")}
	b.start = func() (*exec.Cmd, error) {
		node, err := startProc(filepath.Join(o.bin, "demarcd"), "run", "-c", filepath.Join(b.vendor, "cp-1", "node.yaml"), "--log-level", "error")
		b.node = node
		return node, err
	}
	kept := filepath.Join(o.dir, "enrolled.json")
	if _, err := os.Stat(kept); err == nil {
		if err := b.load(kept, o.n); err != nil {
			return nil, err
		}
		if _, err := b.start(); err != nil {
			return b, err
		}
		return b, answers(b.at.API)
	}
	b.at = place{free(), free(), free()}
	if out, err := exec.Command(filepath.Join(o.bin, "demarc"), "control-plane", "init", "--dir", b.vendor, "--trust-domain", domain,
		"--operator", "ann", "--node", "cp-1="+b.at.Raft+","+b.at.API+","+b.at.Metrics).CombinedOutput(); err != nil {
		return nil, fmt.Errorf("init: %w: %s", err, out)
	}
	if _, err := b.start(); err != nil {
		return b, err
	}
	if err := answers(b.at.API); err != nil {
		return b, err
	}
	fixture, err := openFixture(b.vendor, b.at.API)
	if err != nil {
		return b, err
	}
	time.Sleep(3 * time.Second) // what a start leaves behind
	if b.empty, err = rss(b.node.Process.Pid); err != nil {
		return b, err
	}
	begun := time.Now()
	b.roots = fixture.roots
	if b.leaves, err = fixture.enrolAll(o.n); err != nil {
		return b, err
	}
	fmt.Printf("%d appliances registered and enrolled in %.1f s\n", o.n, time.Since(begun).Seconds())
	return b, b.save(kept)
}

// measured is what one server showed.
type measured struct {
	memory        float64 // KiB a connection
	routines      float64 // goroutines a connection; 0 where it was not asked
	without, with rest
	start         time.Duration // until it answered again after the kill
	back          comeback
	spent         float64 // processor time of the server from its start until all were back, s
}

// measure leaves a server alone without connections and with them, and kills it. The server keeps what it is given no
// longer: start starts the next one.
func (b *bench) measure(o options, srv *exec.Cmd, addr string, speak speak, start func() (*exec.Cmd, error)) (*measured, error) {
	var m measured
	ours := srv == b.node
	quiet := func() (rest, error) {
		if o.only == "return" {
			return nil, nil
		}
		if ours {
			if err := calm(b.at.Metrics, o.settle); err != nil {
				return nil, err
			}
		}
		return leave(srv.Process.Pid, o.windows, o.idle)
	}
	before := b.empty
	var err error
	if !ours {
		if before, err = rss(srv.Process.Pid); err != nil {
			return nil, err
		}
	}
	if m.without, err = quiet(); err != nil {
		return nil, err
	}
	crowd, err := newCrowd(addr, b.leaves, speak)
	if err != nil {
		return nil, err
	}
	defer crowd.stop()
	if err := crowd.up(o.settle); err != nil {
		return nil, err
	}
	fmt.Printf("%d connections up in %.1f s\n", o.n, crowd.since().Seconds())
	if m.with, err = quiet(); err != nil {
		return nil, err
	}
	full, err := rss(srv.Process.Pid)
	if err != nil {
		return nil, err
	}
	m.memory = (full - before) / float64(o.n)
	fmt.Printf("resident: %.1f MiB before, %.1f MiB with %d connections\n", before/1024, full/1024, o.n)
	if ours {
		routines, err := metric(b.at.Metrics, "go_goroutines")
		if err != nil {
			return nil, err
		}
		m.routines = routines / float64(o.n)
	}

	crowd.lose()
	kill(srv)
	if srv, err = start(); err != nil {
		return nil, err
	}
	if err := answers(addr); err != nil {
		return nil, err
	}
	m.start = crowd.since()
	if err := crowd.up(o.settle); err != nil {
		return nil, err
	}
	now, err := spent(srv.Process.Pid)
	if err != nil {
		return nil, err
	}
	m.spent, m.back = now.cpu, crowd.comeback()
	m.back.print()
	fmt.Printf("sessions and dials that failed meanwhile: %s\n", crowd.reasons())
	return &m, nil
}

// report prints what was measured. A ratio above 1 is ours ahead.
func report(o options, ours, theirs *measured) {
	beside := func(f func(*measured) float64) (peer, ratio string) {
		if theirs == nil || f(theirs) == 0 {
			return "null", "null"
		}
		return fmt.Sprintf("%.4g", f(theirs)), fmt.Sprintf("%.2f", f(theirs)/f(ours))
	}
	result := func(what, unit string, f func(*measured) float64) {
		peer, ratio := beside(f)
		fmt.Printf("RESULT {\"bench\":\"channels\",\"case\":%q,\"n\":%d,\"ours\":%.4g,\"peer\":%s,\"ratio\":%s,\"unit\":%q}\n", what, o.n,
			f(ours), peer, ratio, unit)
	}
	result("all back after kill -9", "s", func(m *measured) float64 { return m.back.last().Seconds() })
	result("half of them back", "s", func(m *measured) float64 { return m.back.came[len(m.back.came)/2].Seconds() })
	result("slowest from dial to welcome", "s", func(m *measured) float64 { return m.back.slowest.Seconds() })
	result("most dials of one", "", func(m *measured) float64 { return float64(m.back.tries) })
	result("the server answers after its kill", "s", func(m *measured) float64 { return m.start.Seconds() })
	result("processor time of the server until all were back", "s", func(m *measured) float64 { return m.spent })
	if o.only == "return" {
		return
	}
	result("memory a connection", "KiB", func(m *measured) float64 { return m.memory })
	fmt.Printf("goroutines a connection: %.2f\n", ours.routines)
	for _, m := range []*measured{ours, theirs} {
		if m == nil {
			continue
		}
		who := "demarc"
		if m == theirs {
			who = "peer"
		}
		without, with := m.without.of(cpuOf), m.with.of(cpuOf)
		more, noise := median(with)-median(without), spread(without)
		fmt.Printf("RESULT {\"bench\":\"channels\",\"case\":\"idle, "+
			"%s\",\"n\":%d,\"with\":%.6f,\"without\":%.6f,"+
			"\"difference\":%.6f,\"spread_without\":%.6f,\"measurable\":%t,"+
			"\"wakes_with\":%.1f,\"wakes_without\":%.1f,\"windows\":%d,\"window_s\":%.0f,\"unit\":\"CPU s/s\"}\n",
			who, o.n, median(with), median(without), more, noise, more > noise, median(m.with.of(wakesOf)), median(m.without.of(wakesOf)), o.windows,
			o.idle.Seconds())
	}
}

func startProc(name string, args ...string) (*exec.Cmd, error) {
	c := exec.Command(name, args...)
	c.Stderr = os.Stderr
	c.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	return c, c.Start()
}

func kill(c *exec.Cmd) {
	if c != nil && c.Process != nil && c.ProcessState == nil {
		_ = c.Process.Kill() // it may have ended
		_ = c.Wait()         // "signal: killed"
	}
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
		// it is only asked whether it is there
		c, err := tls.DialWithDialer(d, "tcp", addr, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}})
		if err == nil {
			return c.Close()
		}
	}
	return fmt.Errorf("nothing answers at %s", addr)
}
