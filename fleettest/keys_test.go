// SPDX-License-Identifier: Apache-2.0

package fleettest_test

import (
	"testing"
	"time"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/fleettest"
)

// TestClusterRotatesItsKeys goes through a rotation as Kubernetes tells it: the new key is published, then it signs, then
// the old one goes. The appliance tells each step once and comes back after its certificate by the new key alone.
func TestClusterRotatesItsKeys(t *testing.T) {
	bubble(t, func(t *testing.T, f *fleettest.Fleet) {
		a := f.AddAppliance("eu-1")
		a.Start()
		a.WaitUp(time.Minute)
		time.Sleep(time.Hour)
		told, size := a.Told(), f.Size()
		time.Sleep(day)
		if n, m := a.Told()-told, f.Size()-size; n != 0 || m != 0 {
			t.Errorf("a day without news: the keys were told %d times, %d entries", n, m)
		}
		for _, step := range [][]string{{"k", "l"}, {"l", "k"}, {"l"}} {
			f.Keys(step...)
			told, want := a.Told(), string(f.JWKS())
			f.Wait("the vendor knows them", 11*time.Minute, func() bool { return string(f.Of("eu-1").Rolled) == want })
			if n := a.Told() - told; n != 1 {
				t.Errorf("%v: told %d times", step, n)
			}
		}
		before := f.Of("eu-1")
		a.Stop()
		time.Sleep(40 * day)
		a.Start()
		renewed(f, a, before, time.Minute)
		if string(f.Of("eu-1").Expect) != string(before.Expect) {
			t.Error("what the vendor registered was replaced")
		}
	})
}

// TestClusterRotatesAtOnce has the new key sign at once: nothing that counted vouches for it, so it waits for the operator.
func TestClusterRotatesAtOnce(t *testing.T) {
	bubble(t, func(t *testing.T, f *fleettest.Fleet) {
		a := f.AddAppliance("eu-1")
		a.Start()
		a.WaitUp(time.Minute)
		f.Keys("l", "k")
		f.Wait("the vendor was told", 11*time.Minute, func() bool { return len(f.Of("eu-1").Reported) > 0 })
		size := f.Size()
		waits := 2 * day // of one look at the keys in 10 minutes
		if fleettest.Long() {
			waits = 10 * day
		}
		time.Sleep(waits)
		if n := f.Size() - size; n != 0 {
			t.Errorf("%d entries while the keys wait", n)
		}
		before := f.Of("eu-1")
		if len(before.Rolled) > 0 {
			t.Fatal("the keys count, and nobody vouched for them")
		}
		a.Stop()
		time.Sleep(40 * day)
		a.Start()
		time.Sleep(time.Hour)
		if a.Up() {
			t.Fatal("it came back by a key that nobody vouched for")
		}
		if err := f.ConfirmKeys("eu-1", fleet.DigestOf([]byte("others"))); fault.Of(err) != fault.Conflict {
			t.Fatalf("other keys than those that wait are confirmed: %v", err)
		}
		if err := f.ConfirmKeys("eu-1", fleet.DigestOf(before.Reported)); err != nil {
			t.Fatal(err)
		}
		renewed(f, a, before, 15*time.Minute)
		f.Ban("eu-1")
		if at := f.Of("eu-1"); len(at.Rolled) > 0 || len(at.Reported) > 0 {
			t.Error("a ban leaves keys that the appliance told")
		}
	})
}
