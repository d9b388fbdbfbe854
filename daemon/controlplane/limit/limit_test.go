// SPDX-License-Identifier: Apache-2.0

package limit

import (
	"fmt"
	"testing"
	"testing/synctest"
	"time"
)

// TestABudgetForgetsWhoWasNotHeardLongest: however many sources there are, a bounded number is kept, and one that floods stays among them.
func TestABudgetForgetsWhoWasNotHeardLongest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := NewLimiter(8)
		allow := func(who string) bool {
			ok, _ := b.Allow(who, Rate{PerSecond: 1, Burst: 2}, nil)
			return ok
		}
		for range 2 {
			if !allow("flood") {
				t.Fatal("the first calls are refused")
			}
		}
		for i := range 100 {
			if allow("flood") {
				t.Fatalf("the flood is heard again after %d others", i)
			}
			if !allow(fmt.Sprint("other-", i)) {
				t.Fatalf("other %d is refused", i)
			}
			if len(b.By) > 8 || b.Used.Len() > 8 {
				t.Fatalf("%d sources are kept", len(b.By))
			}
		}
		time.Sleep(time.Second)
		if !allow("flood") {
			t.Fatal("a second later nothing is allowed")
		}
	})
}

// TestSourcesAreNetworks: who has a network of IPv6 has one budget, and not 2 to the 64.
func TestSourcesAreNetworks(t *testing.T) {
	for addr, want := range map[string]string{
		"192.0.2.7:443": "192.0.2.7", "[::ffff:192.0.2.7]:1": "192.0.2.7", "[2001:db8:1:2:3::4]:1": "2001:db8:1:2::/64",
		"[fe80::1%eth0]:1": "fe80::/64",
		"pipe":             "", "": "", "name:1": "",
	} {
		if got := Network(addr); got != want {
			t.Errorf("%q is of %q, want %q", addr, got, want)
		}
	}
}
