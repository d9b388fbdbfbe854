// SPDX-License-Identifier: Apache-2.0

package fleettest_test

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/demarc-dev/demarc/fleettest"
)

func TestEnrolAndRenew(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := fleettest.New(t)
		a := f.AddAppliance("eu-1")
		a.Start()
		a.WaitUp(time.Minute)
		first := f.Of("eu-1")
		a.Cut()
		time.Sleep(20 * 24 * time.Hour)
		a.Heal()
		f.Wait("the next certificate is in use", time.Hour, func() bool { return f.Of("eu-1").Current != first.Current && a.Up() })
		if a.Proofs != 1 {
			t.Errorf("%d proofs, want the one of the first enrolment", a.Proofs)
		}
	})
}
