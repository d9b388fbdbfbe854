// SPDX-License-Identifier: Apache-2.0

package roads

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// byAddress has the road beside the tailnet need no resolver.
const byAddress = "\n    addresses: [\"" + controlOnRoad + ":" + port + "\"]"

// hostname is the appliance's on the tailnet.
const hostname = "globex-eu-1"

// ofTailnet are the faults that are of a tailnet alone, or are made in another way there.
func ofTailnet() []fault {
	slow := func(on bool) func(*topology) error {
		return func(t *topology) error { t.wire.set(on); return nil }
	}
	return []fault{
		{name: "tailscale, latency 2 s", road: "tailscale", wired: true, during: stays, proof: slowed("udp"),
			inject: slow(true), heal: slow(false)},
		{name: "tailscale, latency, relayed", road: "tailscale", wired: true, during: stays, proof: slowed("tcp"),
			inject: slow(true), heal: slow(false), ready: func(t *topology) { t.wire.relayed() }},
		{name: "tailscale, DNS failure", road: "tailscale", beside: byAddress, during: moveWithoutNames, proof: unresolved,
			inject: func(t *topology) error {
				t.dnsFails.Store(true)
				return errors.Join(t.tailnet.StopCoordinator(), inside(t.road, t.tailnet.StartCoordinator)) // it must be found again
			},
			heal: func(t *topology) error { t.dnsFails.Store(false); return nil }},
		{name: "tailscale, DNS, key expired", road: "tailscale", beside: byAddress, moves: true, told: "coordinator", proof: unresolved,
			inject: func(t *topology) error {
				t.dnsFails.Store(true)
				if n := t.tailnet.Expire(hostname); n != 1 {
					return fmt.Errorf("%d nodes are called %s", n, hostname)
				}
				return nil
			},
			heal: func(t *topology) error { t.dnsFails.Store(false); return nil }},
	}
}

// stays tells that the channel sat the fault out.
func stays(ctx context.Context, p *pair) error { return p.seen(ctx, "tailscale", time.Second) }

// slowed shows that what the channel is made of passed the wire, and waited there.
func slowed(proto string) func(*topology, counts) error {
	return func(t *topology, _ counts) error {
		if t.wire.count(proto) < 100 {
			return fmt.Errorf("of the packets that waited, %s: the channel did not go that way", t.wire.told())
		}
		return nil
	}
}

// unresolved shows that the coordinator's name was asked for while the resolver failed.
func unresolved(t *topology, _ counts) error {
	if t.unresolved.Load() == 0 {
		return errors.New("nobody asked for the coordinator while the resolver failed")
	}
	return nil
}

// moveWithoutNames leaves the tailnet and comes back to it while no name is resolved: the control plane's name on the tailnet is in the
// map that the node has.
func moveWithoutNames(ctx context.Context, p *pair) error {
	for _, route := range []string{"https", "tailscale"} {
		if err := told(p.customer(ctx, "transport", "use", route)); err != nil {
			return err
		}
		if err := p.seen(ctx, route, 20*time.Second); err != nil {
			return err
		}
	}
	return nil
}
