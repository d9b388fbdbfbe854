// SPDX-License-Identifier: Apache-2.0

package workload

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"net"
	"strconv"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/manifest"
)

// Ports are taken from below the range that Linux gives to outgoing connections (32768 and up, unless it was changed),
// so that no connection takes the port of a service while that is being restarted.
const (
	lowPort  = 20000
	highPort = 32768
)

func listener(service string, port int) string { return fmt.Sprintf("%s:%d", service, port) }

// address gives each listener of the plan its address, and records it: the one it had, unless somebody else took it.
// held are the addresses that our own services listen on now.
func (p *Process) address(plan manifest.Plan, held map[string]string) (map[string]string, error) {
	const op = "workload.address"
	had := p.disk.get().Addrs
	given := map[string]bool{}
	for _, a := range had {
		given[a] = true
	}
	out := map[string]string{}
	for _, s := range plan.Services {
		for _, l := range s.Listen {
			name := listener(s.Name, l.Port)
			addr := had[name]
			if addr == "" || (held[name] != addr && !free(addr)) {
				var err error
				if addr, err = pick(given); err != nil {
					return nil, fault.At(op, "", err)
				}
				given[addr] = true
			}
			out[name] = addr
		}
	}
	if news := func() bool {
		for k, v := range out {
			if had[k] != v {
				return true
			}
		}
		return false
	}(); !news {
		return out, nil // a disk that is full keeps nobody from starting what ran before
	}
	err := p.disk.change(func(r *record) { maps.Copy(r.Addrs, out) })
	return out, fault.At(op, "", err)
}

func free(addr string) bool {
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return false
	}
	l.Close()
	return true
}

func pick(given map[string]bool) (string, error) {
	for range 200 {
		addr := net.JoinHostPort("127.0.0.1", strconv.Itoa(lowPort+rand.IntN(highPort-lowPort)))
		if !given[addr] && free(addr) {
			return addr, nil
		}
	}
	return "", fleet.Reason{Kind: fleet.NoPortFree}.With(fault.New("workload.address", fault.Unavailable, "no loopback port between %d and "+
		"%d is free", lowPort, highPort))
}
