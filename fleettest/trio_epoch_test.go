// SPDX-License-Identifier: Apache-2.0

package fleettest

import (
	"testing"
	"time"

	"github.com/demarc-dev/demarc/configs"
	"github.com/demarc-dev/demarc/daemon/controlplane"
)

// TestRecoverOfANodeThatIsBehind: two of three nodes are lost, and the one that goes on has not heard what an appliance has acknowledged
// since. It comes back by itself, and nothing that it is asked from then on vanishes. FAULTS.md I3.
func TestRecoverOfANodeThatIsBehind(t *testing.T) {
	playTrio(t, func(t *testing.T, c *trio) {
		a := c.AddAppliance("eu-1")
		a.Start()
		a.WaitUp(time.Minute)
		ask := func(n int) {
			t.Helper()
			for range n {
				c.Order("eu-1")
			}
			c.Wait("the orders are taken", time.Minute, func() bool { return len(c.Of("eu-1").Orders) == 0 })
		}
		ask(3)
		c.stopNode("cp-3")
		ask(4)
		c.PrepareCA() // and a number of the bundle that the survivor does not know
		c.Wait("the appliance holds the bundle", time.Minute, func() bool { return c.Of("eu-1").Bundle >= 2 })
		held := c.Of("eu-1").Bundle
		c.stopNode("cp-1")
		c.stopNode("cp-2")
		cfg := &configs.Control{Name: "cp-3", TrustDomain: Domain, Dir: c.dirs["cp-3"]}
		for _, m := range c.members {
			cfg.Cluster = append(cfg.Cluster, configs.Member{Name: m.Name, Raft: m.Raft, API: m.API})
		}
		inv, err := controlplane.Recover(cfg, 0)
		if err != nil {
			t.Fatal(err)
		}
		if inv.Bundle <= held || inv.Epoch.Number == 0 {
			t.Fatalf("the survivor goes on with bundle %d, and appliances hold %d: %+v", inv.Bundle, held, inv)
		}
		c.startNode("cp-3")
		c.front("cp-3")
		c.Wait("the survivor leads", 5*time.Minute, func() bool { return c.View().Epoch().Epoch == inv.Epoch })
		a.WaitUp(5 * time.Minute)
		ask(2)
		if n := a.Status().GetProbesSeen(); n != 9 {
			t.Errorf("%d probes were seen, want 9", n)
		}
		lost := c.Entries("appliance.meet/1")
		if len(lost) != 1 || len(a.Entries("vendor.epoch/1")) != 1 {
			t.Errorf("meetings: %s", lost)
		}
	})
}
