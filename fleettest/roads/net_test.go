// SPDX-License-Identifier: Apache-2.0

package roads

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/net/dns/dnsmessage"
	"golang.org/x/sys/unix"

	"github.com/demarc-dev/demarc/mesh/meshtest"
	"github.com/demarc-dev/demarc/mesh/roadtest"
)

// Addresses, the same in each topology: its namespaces see nobody else.
const (
	roadToAppliance = "10.77.1.1"
	roadToControl   = "10.77.2.1"
	controlOnRoad   = "10.77.2.2"
	controlDirect   = "10.77.3.1"
	port            = "7443"
	innerPort       = "8443"
)

// topology is three namespaces: the appliance's, the control plane's, and the road's between them. A second link goes from the
// appliance straight to the control plane: it stands for a private endpoint.
type topology struct {
	appliance, road, control string // names of the namespaces
	relay                    *roadtest.Relay
	proxy                    *roadtest.Proxy
	own, nobodys             *roadtest.CA // of the proxy's own certificate
	foreign                  atomic.Bool  // the proxy shows one of nobody's
	dnsFails                 atomic.Bool
	closers                  []func()

	// Of a world with a tailnet.
	tailnet    *meshtest.Tailnet
	wire       *wire        // of the appliance's link; nil: there is none
	cable      string       // the namespace of the wire
	unresolved atomic.Int64 // questions for the coordinator that the resolver failed
}

func command(name string, args ...string) error {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	if out, err := exec.CommandContext(ctx, name, args...).CombinedOutput(); err != nil {
		return fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, out)
	}
	return nil
}

// inside runs f on a thread of a namespace; the thread ends with it. A socket stays in the namespace that it was made in.
func inside(ns string, f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread is thrown away
		fd, err := unix.Open("/run/netns/"+ns, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err == nil {
			err = unix.Setns(fd, unix.CLONE_NEWNET)
			_ = unix.Close(fd)
		}
		if err == nil {
			err = f()
		}
		done <- err
	}()
	return <-done
}

// proxy is what stands before the https road.
type proxy string

// The proxies.
const (
	none    proxy = ""
	asks    proxy = "asks"    // for a user and password
	silent  proxy = "silent"  // asks for nothing
	private proxy = "private" // likewise, and is reached by https with a certificate of a private CA
)

// lines are those of the appliance's file.
func (p proxy) lines() string {
	return map[proxy]string{
		asks:    "\n    proxy: {url: \"http://proxy.road.test:3128\", auth_file: proxy.auth}",
		silent:  "\n    proxy: {url: \"http://proxy.road.test:3128\"}",
		private: "\n    proxy: {url: \"https://proxy.road.test:3130\"}\n    ca_file: proxy-ca.pem",
	}[p]
}

func newTopology(n int, by proxy) (_ *topology, err error) {
	base := fmt.Sprintf("dmroads%dx%d", os.Getpid(), n)
	t := &topology{appliance: base + "a", road: base + "r", control: base + "c"}
	defer func() {
		if err != nil {
			err = errors.Join(err, t.close())
		}
	}()
	steps := [][]string{}
	for _, ns := range []string{t.appliance, t.road, t.control} {
		steps = append(steps, []string{"netns", "add", ns}, []string{"-n", ns, "link", "set", "lo", "up"})
	}
	for _, l := range [][6]string{
		{t.appliance, "road0", "10.77.1.2/24", t.road, "app0", roadToAppliance + "/24"},
		{t.road, "cp0", roadToControl + "/24", t.control, "road0", controlOnRoad + "/24"},
		{t.appliance, "link0", "10.77.3.2/24", t.control, "link0", controlDirect + "/24"},
	} {
		steps = append(steps, []string{"link", "add", l[1], "netns", l[0], "type", "veth", "peer", "name", l[4], "netns", l[3]})
		for _, end := range [][]string{l[:3], l[3:]} {
			steps = append(steps, []string{"-n", end[0], "addr", "add", end[2], "dev", end[1]}, []string{"-n", end[0], "link", "set", end[1], "up"})
		}
	}
	for _, s := range steps {
		if err := command("ip", s...); err != nil {
			return nil, err
		}
	}
	if err := resolver(t.appliance, roadToAppliance); err != nil {
		return nil, err
	}
	return t, t.stand(by)
}

// resolver names the resolver of a namespace's programs: ip netns exec puts this folder over /etc, in that process alone.
func resolver(ns, at string) error {
	etc := filepath.Join("/etc/netns", ns)
	if err := os.MkdirAll(etc, 0o755); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(etc, "resolv.conf"), []byte("nameserver "+at+"\noptions timeout:1 attempts:2\n"), 0o644)
}

// stand puts the relay, the proxy and the resolver on the road.
func (t *topology) stand(by proxy) error {
	ca, err := roadtest.NewCA("Corp Inspect CA")
	if err == nil {
		t.own, err = roadtest.NewCA("Corp Proxy CA")
	}
	if err == nil {
		t.nobodys, err = roadtest.NewCA("Corp Proxy CA")
	}
	if err != nil {
		return err
	}
	dial := func(ctx context.Context, network, addr string) (c net.Conn, err error) {
		// whatever host it is asked for, there is one control plane
		_, at, err := net.SplitHostPort(addr)
		if err != nil {
			return nil, err
		}
		err = inside(t.road, func() error {
			c, err = new(net.Dialer).DialContext(ctx, network, net.JoinHostPort(controlOnRoad, at))
			return err
		})
		return c, err
	}
	t.relay = &roadtest.Relay{Target: net.JoinHostPort(controlOnRoad, port), Dial: dial}
	t.proxy = &roadtest.Proxy{CA: ca, Dial: dial}
	if by == asks {
		t.proxy.User, t.proxy.Password = "ann", "s3cret"
	}
	sealed := &tls.Config{GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
		if t.foreign.Load() {
			return t.nobodys.Leaf("proxy.road.test")
		}
		return t.own.Leaf("proxy.road.test")
	}}
	return inside(t.road, func() error {
		for at, serve := range map[string]func(net.Listener){
			port: t.relay.Serve, "3128": t.proxy.Serve, "3130": func(l net.Listener) { t.proxy.Serve(tls.NewListener(l, sealed)) }} {
			ln, err := net.Listen("tcp", net.JoinHostPort(roadToAppliance, at))
			if err != nil {
				return err
			}
			t.closers = append(t.closers, func() { _ = ln.Close() })
			go serve(ln)
		}
		pc, err := net.ListenPacket("udp", net.JoinHostPort(roadToAppliance, "53"))
		if err != nil {
			return err
		}
		t.closers = append(t.closers, func() { _ = pc.Close() })
		go t.resolve(pc)
		return nil
	})
}

// resolve answers each name of road.test with the road's address.
func (t *topology) resolve(pc net.PacketConn) {
	for b := make([]byte, 1500); ; {
		n, from, err := pc.ReadFrom(b)
		if err != nil {
			return
		}
		var m dnsmessage.Message
		if m.Unpack(b[:n]) != nil || len(m.Questions) != 1 {
			continue
		}
		m.Response, m.Additionals = true, nil
		q := m.Questions[0]
		switch {
		case t.dnsFails.Load():
			m.RCode = dnsmessage.RCodeServerFailure
		case !strings.HasSuffix(q.Name.String(), ".road.test."):
			m.RCode = dnsmessage.RCodeNameError
		case q.Type == dnsmessage.TypeA:
			m.Answers = []dnsmessage.Resource{{Header: dnsmessage.ResourceHeader{Name: q.Name, Class: q.Class, Type: q.Type, TTL: 1},
				Body: &dnsmessage.AResource{A: [4]byte{10, 77, 1, 1}}}}
		}
		if out, err := m.Pack(); err == nil {
			_, _ = pc.WriteTo(out, from)
		}
	}
}

// lose drops packets of the road at random, both ways.
func (t *topology) lose(on bool) error {
	word := map[bool]string{true: "-A", false: "-D"}[on]
	for _, way := range [][]string{{"INPUT", "-i", "road0"}, {"OUTPUT", "-o", "road0"}} {
		args := append([]string{"netns", "exec", t.appliance, "iptables", "-w", "10", word}, way...)
		if err := command("ip", append(args, "-m", "statistic", "--mode", "random", "--probability", "0.3", "-j", "DROP")...); err != nil {
			return err
		}
	}
	return nil
}

// tailnetRule treats all that the appliance's namespace sends or takes, but questions to the resolver and the road beside the tailnet.
func (t *topology) tailnetRule(on bool, ways, how []string) error {
	word := map[bool]string{true: "-A", false: "-D"}[on]
	for _, way := range ways {
		for _, what := range [][]string{{"udp", map[string]string{"INPUT": "--sport", "OUTPUT": "--dport"}[way], "53"},
			{"tcp", map[string]string{"INPUT": "--sport", "OUTPUT": "--dport"}[way], port}} {
			for _, tool := range []string{"iptables", "ip6tables"} {
				args := []string{"netns", "exec", t.appliance, tool, "-w", "10", word, way, "-i", "road0"}
				if way == "OUTPUT" {
					args[len(args)-2] = "-o"
				}
				args = append(args, "-p", what[0], "!", what[1], what[2])
				if err := command("ip", append(args, how...)...); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// cut cuts the appliance's link in two, with a wire between the ends.
func (t *topology) cut(ns string) error {
	t.cable = ns
	for _, s := range [][]string{
		{"netns", "add", ns},
		// it says nothing of its own
		{"netns", "exec", ns, "sysctl", "-q", "-w", "net.ipv6.conf.all.disable_ipv6=1", "net.ipv6.conf.default.disable_ipv6=1"},
		{"-n", t.road, "link", "set", "app0", "netns", ns, "name", "near"},
		{"link", "add", "far", "netns", ns, "type", "veth", "peer", "name", "app0", "netns", t.road},
		{"-n", ns, "link", "set", "near", "up"}, {"-n", ns, "link", "set", "far", "up"},
		{"-n", t.road, "addr", "add", roadToAppliance + "/24", "dev", "app0"},
		{"-n", t.road, "addr", "add", "fd77:1::1/64", "dev", "app0", "nodad"}, {"-n", t.road, "link", "set", "app0", "up"},
	} {
		if err := command("ip", s...); err != nil {
			return err
		}
	}
	return inside(ns, func() (err error) {
		t.wire, err = newWire("near", "far")
		return err
	})
}

func (t *topology) close() error {
	for _, c := range t.closers {
		c()
	}
	if t.relay != nil {
		t.relay.Set(roadtest.Reset)
		t.proxy.Cut()
	}
	var errs []error
	if t.wire != nil {
		errs = append(errs, t.wire.close())
	}
	for _, ns := range []string{t.appliance, t.road, t.control, t.cable} {
		if ns == "" {
			continue
		}
		if _, err := os.Stat("/run/netns/" + ns); err == nil {
			errs = append(errs, command("ip", "netns", "del", ns))
		}
		errs = append(errs, os.RemoveAll(filepath.Join("/etc/netns", ns)))
	}
	return errors.Join(errs...)
}
