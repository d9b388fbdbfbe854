// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"

	"github.com/demarc-dev/demarc/fleettest/caller"
	"github.com/demarc-dev/demarc/fleettest/process"
)

// host is one network namespace on the bridge.
type host struct{ name, ns, addr, port string }

// network is a bridge in a namespace of its own, and the hosts on it. They see nobody else.
type network struct {
	hub   string
	hosts map[string]*host
}

// newNetwork makes the namespaces. The name of a host is also the last part of its namespace's name, and its place gives its address.
func newNetwork(names ...string) (_ *network, err error) {
	base := fmt.Sprintf("dmrob%d", os.Getpid())
	n := &network{hub: base + "-hub", hosts: map[string]*host{}}
	defer func() {
		if err != nil {
			err = errors.Join(err, n.close())
		}
	}()
	steps := [][]string{{"netns", "add", n.hub}, {"-n", n.hub, "link", "set", "lo", "up"},
		{"-n", n.hub, "link", "add", "br0", "type", "bridge"}, {"-n", n.hub, "link", "set", "br0", "up"}}
	for i, name := range names {
		h := &host{name: name, ns: base + "-" + name, addr: fmt.Sprintf("10.78.0.%d", 11+i), port: fmt.Sprintf("p%d", i)}
		n.hosts[name] = h
		steps = append(steps, []string{"netns", "add", h.ns}, []string{"-n", h.ns, "link", "set", "lo", "up"},
			[]string{"link", "add", "eth0", "netns", h.ns, "type", "veth", "peer", "name", h.port, "netns", n.hub},
			[]string{"-n", n.hub, "link", "set", h.port, "master", "br0", "up"},
			[]string{"-n", h.ns, "addr", "add", h.addr + "/24", "dev", "eth0"}, []string{"-n", h.ns, "link", "set", "eth0", "up"})
	}
	for _, s := range steps {
		if err := process.Command("ip", s...); err != nil {
			return nil, err
		}
	}
	return n, nil
}

// dialFrom dials out of a host.
func (n *network) dialFrom(name string) caller.Dialer {
	return func(ctx context.Context, network, addr string) (c net.Conn, err error) {
		err = process.Inside(n.hosts[name].ns, func() error {
			c, err = new(net.Dialer).DialContext(ctx, network, addr)
			return err
		})
		return c, err
	}
}

func (n *network) rule(at string, on bool, args ...string) error {
	word := map[bool]string{true: "-A", false: "-D"}[on]
	return process.Command("ip", append([]string{"netns", "exec", n.hosts[at].ns, "iptables", "-w", "10", word, "INPUT"}, args...)...)
}

// deafen makes a host hear nothing of another: one way.
func (n *network) deafen(on bool, at, of string) error {
	return n.rule(at, on, "-s", n.hosts[of].addr, "-j", "DROP")
}

// lose drops a part of what comes to a host.
func (n *network) lose(on bool, at string, part float64) error {
	return n.rule(at, on, "-m", "statistic", "--mode", "random", "--probability", fmt.Sprint(part), "-j", "DROP")
}

func (n *network) close() error {
	var errs []error
	spaces := []string{n.hub}
	for _, h := range n.hosts {
		spaces = append(spaces, h.ns)
	}
	for _, ns := range spaces {
		if _, err := os.Stat("/run/netns/" + ns); err == nil {
			errs = append(errs, process.Command("ip", "netns", "del", ns))
		}
	}
	return errors.Join(errs...)
}
