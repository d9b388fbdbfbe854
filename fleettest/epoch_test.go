// SPDX-License-Identifier: Apache-2.0

package fleettest_test

import (
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/demarc-dev/demarc/daemon/controlplane/book"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/fleettest"
)

// asked has the vendor send an appliance orders, and waits until it has taken them.
func asked(f *fleettest.Fleet, a *fleettest.Appliance, n int) {
	want := a.Status().GetProbesSeen() + uint64(n)
	for range n {
		f.Order(a.Name)
	}
	f.Wait("the orders are taken and echoed", time.Minute, func() bool { // every order is a probe, and every report an echo
		at := f.Of(a.Name)
		return len(at.Orders) == 0 && at.OrdersDone == at.ReportsDone && a.Status().GetProbesSeen() == want
	})
}

// loss is what both sides' entries say of a meeting.
type loss struct {
	Lost struct {
		Orders, Reports, Log, Again fleet.Span
	}
}

func lossOf(t *testing.T, entries []json.RawMessage, want int) (out loss) {
	t.Helper()
	if len(entries) != want {
		t.Fatalf("%d entries of meetings, want %d: %s", len(entries), want, entries)
	}
	// The spans of the two sides have the same spelling but for again, which is a count at the vendor.
	var raw struct{ Lost map[string]json.RawMessage }
	if err := json.Unmarshal(entries[want-1], &raw); err != nil {
		t.Fatal(err)
	}
	for name, to := range map[string]*fleet.Span{"orders": &out.Lost.Orders, "reports": &out.Lost.Reports, "log": &out.Lost.Log} {
		if b, ok := raw.Lost[name]; ok {
			if err := json.Unmarshal(b, to); err != nil {
				t.Fatal(err)
			}
		}
	}
	return out
}

// TestARestoredBookMeetsItsAppliances: an appliance that acknowledged orders after the snapshot comes back by itself, nothing that it is
// asked from then on vanishes, what it reported is sent again, and both books say what was lost. FAULTS.md I3.
func TestARestoredBookMeetsItsAppliances(t *testing.T) {
	bubble(t, func(t *testing.T, f *fleettest.Fleet) {
		a := f.AddAppliance("eu-1")
		a.Start()
		a.WaitUp(time.Minute)
		asked(f, a, 3)
		saved := f.Save()
		asked(f, a, 4) // orders 4 to 7 are forgotten
		bundle := f.View().Bundle()
		f.Restore(saved)
		f.Order("eu-1") // before it is back: with the number of one that it has taken, it would vanish
		a.WaitUp(2 * time.Minute)
		f.Wait("all orders are taken", time.Minute, func() bool { return len(f.Of("eu-1").Orders) == 0 })
		asked(f, a, 2)
		at := f.Of("eu-1")
		if at.OrdersDone != 10 || a.Status().GetProbesSeen() != 10 {
			t.Errorf("order %d is the last, and %d probes were seen; want 10 and 10", at.OrdersDone, a.Status().GetProbesSeen())
		}
		if at.ReportsDone != 10 || at.Met.Number == 0 {
			t.Errorf("report %d is the last in the book, want 10: %+v", at.ReportsDone, at)
		}
		theirs, ours := lossOf(t, f.Entries("appliance.meet/1"), 1), lossOf(t, a.Entries("vendor.epoch/1"), 1)
		want := fleet.Span{From: 4, To: 7}
		if theirs.Lost.Orders != want || ours.Lost.Orders != want || theirs.Lost.Reports.Len()+ours.Lost.Reports.Len() != 0 {
			t.Errorf("the vendor's book says that %+v is lost, the customer's %+v; want orders 4 to 7", theirs, ours)
		}
		if told := a.Status().GetVendorEpoch(); told.GetCause() != "restore" ||
			!strings.Contains(strings.Join(told.GetLost(), "\n"), "orders 4 to 7 were taken here") {
			t.Errorf("the customer is told %v", told)
		}
		if n := f.View().Bundle(); n <= bundle {
			t.Errorf("the bundle has the number %d, and appliances hold %d", n, bundle)
		}
	})
}

// TestWhateverTheSnapshotMissed: the snapshot is older than what the appliance is, and it comes back with nobody's help, or with that of
// the operator who registers it again.
func TestWhateverTheSnapshotMissed(t *testing.T) {
	start := func(f *fleettest.Fleet, a *fleettest.Appliance) { a.Start(); a.WaitUp(time.Minute); asked(f, a, 3) }
	for what, play := range map[string]func(t *testing.T, f *fleettest.Fleet){
		"it was not registered": func(t *testing.T, f *fleettest.Fleet) {
			saved := f.Save()
			a := f.AddAppliance("eu-1")
			start(f, a)
			f.Restore(saved)
			time.Sleep(time.Hour)
			f.Register("eu-1")
			a.WaitUp(15 * time.Minute)
			asked(f, a, 2)
			if got := lossOf(t, f.Entries("appliance.meet/1"), 1); got.Lost.Orders != (fleet.Span{From: 1, To: 3}) {
				t.Errorf("lost: %+v", got)
			}
			if n := a.Status().GetProbesSeen(); n != 5 {
				t.Errorf("%d probes", n)
			}
		},
		"it was registered and not enrolled": func(t *testing.T, f *fleettest.Fleet) {
			a := f.AddAppliance("eu-1")
			saved := f.Save()
			start(f, a)
			f.Restore(saved)
			a.WaitUp(15 * time.Minute)
			asked(f, a, 2)
			if n := a.Status().GetProbesSeen(); n != 5 {
				t.Errorf("%d probes", n)
			}
		},
		"its certificate was renewed since": func(t *testing.T, f *fleettest.Fleet) {
			a := f.AddAppliance("eu-1")
			start(f, a)
			saved, before := f.Save(), f.Of("eu-1")
			a.Stop()
			time.Sleep(20 * day)
			a.Start()
			renewed(f, a, before, 2*time.Hour)
			proofs := a.Proofs()
			f.Restore(saved)
			a.WaitUp(15 * time.Minute)
			asked(f, a, 2)
			if a.Proofs() != proofs+1 {
				t.Errorf("%d proofs, want one more than %d", a.Proofs(), proofs)
			}
		},
		"the CA was changed since": func(t *testing.T, f *fleettest.Fleet) {
			a := f.AddAppliance("eu-1")
			start(f, a)
			saved, old := f.Save(), f.IssuerCA()
			id := f.PrepareCA()
			f.Wait("the new CA is active", 10*time.Minute, func() bool { return f.ActivateCA(id) == nil })
			f.Wait("the old CA is retired", 10*day, func() bool { return f.RetireCA(old, false) == nil })
			f.Restore(saved)
			a.WaitUp(15 * time.Minute)
			asked(f, a, 2)
			next := f.PrepareCA() // and the operator does it again
			f.Wait("another CA is active", 10*time.Minute, func() bool { return f.ActivateCA(next) == nil })
		},
		"the book was restored from the same snapshot before": func(t *testing.T, f *fleettest.Fleet) {
			a := f.AddAppliance("eu-1")
			start(f, a)
			saved := f.Save()
			asked(f, a, 1)
			f.Restore(saved)
			a.WaitUp(15 * time.Minute)
			asked(f, a, 5)
			f.Restore(saved)
			a.WaitUp(15 * time.Minute)
			asked(f, a, 1)
			if got := lossOf(t, a.Entries("vendor.epoch/1"), 2); got.Lost.Orders != (fleet.Span{From: 4, To: 9}) {
				t.Errorf("lost: %+v", got)
			}
			if n := a.Status().GetProbesSeen(); n != 10 {
				t.Errorf("%d probes", n)
			}
		},
		"it was away, twice": func(t *testing.T, f *fleettest.Fleet) {
			a := f.AddAppliance("eu-1")
			start(f, a)
			saved := f.Save()
			asked(f, a, 2)
			a.Cut()
			f.Wait("it left", time.Hour, func() bool { return !f.Of("eu-1").Online })
			f.Restore(saved)
			f.Order("eu-1")
			time.Sleep(time.Minute)
			f.Restore(f.Save())
			f.Order("eu-1")
			a.Heal()
			a.WaitUp(15 * time.Minute)
			f.Wait("all orders are taken", time.Minute, func() bool { return len(f.Of("eu-1").Orders) == 0 })
			if n := a.Status().GetProbesSeen(); n != 7 {
				t.Errorf("%d probes", n)
			}
		},
	} {
		t.Run(what, func(t *testing.T) { bubble(t, play) })
	}
}

// TestTheForgottenHistoryWakes: a node that goes on with what the vendor's book forgot is refused by an appliance that has met the new
// epoch, and refuses it; both have that on record, once and not for each try. The appliance comes back to the right one.
func TestTheForgottenHistoryWakes(t *testing.T) {
	bubble(t, func(t *testing.T, f *fleettest.Fleet) {
		a := f.AddAppliance("eu-1")
		a.Start()
		a.WaitUp(time.Minute)
		asked(f, a, 3)
		saved := f.Save()
		asked(f, a, 2)
		old := f.Restore(saved)
		a.WaitUp(2 * time.Minute)
		asked(f, a, 1)
		right := f.Save()
		f.Wake(old)
		time.Sleep(time.Hour)
		f.Order("eu-1")
		time.Sleep(time.Minute)
		if n := a.Status().GetProbesSeen(); n != 6 {
			t.Errorf("it took an order of the forgotten history: %d probes", n)
		}
		if n := len(f.Entries("refused/1")); n == 0 || n > 1000 {
			t.Errorf("%d refusals in the vendor's book", n)
		}
		f.Wake(right)
		f.Wait("it is back at the right one", 15*time.Minute, func() bool { return a.Status().GetConnected() })
		asked(f, a, 1)
	})
}

// TestEpochsAreBounded: a vendor that begins one epoch after another is not followed, and the appliance comes back when the bound allows.
func TestEpochsAreBounded(t *testing.T) {
	bubble(t, func(t *testing.T, f *fleettest.Fleet) {
		a := f.AddAppliance("eu-1")
		a.Start()
		a.WaitUp(time.Minute)
		for range 8 {
			f.Restore(f.Save())
			a.WaitUp(15 * time.Minute)
			asked(f, a, 1)
		}
		met := f.Of("eu-1").Met
		f.Restore(f.Save())
		time.Sleep(2 * time.Hour)
		if got := f.Of("eu-1").Met; got != met {
			t.Fatal("the ninth epoch of a day was met")
		}
		if n := len(a.Entries("vendor.epoch.refused/1")); n == 0 || n > 2*6+1 {
			t.Errorf("%d entries about refused epochs", n)
		}
		if told := a.Status().GetVendorEpoch().GetRefused(); !strings.Contains(told, "8 epochs within 24h") {
			t.Errorf("the customer is told %q", told)
		}
		a.Stop()
		time.Sleep(22 * time.Hour)
		a.Start()
		f.Wait("it met the ninth", time.Hour, func() bool { return len(a.Entries("vendor.epoch/1")) == 9 })
		asked(f, a, 1)
	})
}

// TestCountersigningGoesOnInTheNewEpoch: what was countersigned of the forgotten history is named as lost in both books, and both logs are
// countersigned again, each from the newest head that both sides have.
func TestCountersigningGoesOnInTheNewEpoch(t *testing.T) {
	bubble(t, func(t *testing.T, f *fleettest.Fleet) {
		f.Evidence = true
		f.CrashNode()
		f.StartNode()
		a := f.AddAppliance("eu-1")
		a.Start()
		a.WaitUp(time.Minute)
		seen := func(n int) {
			t.Helper()
			f.Wait("both logs are countersigned", 10*time.Minute, func() bool {
				at := f.Of("eu-1")
				f.Order("eu-1")
				return len(at.Cosigned) >= n && len(at.Witnessed) >= n
			})
		}
		seen(2)
		saved, kept := f.Save(), f.Size()
		before := f.Of("eu-1")
		seen(6)
		f.Restore(saved)
		a.WaitUp(15 * time.Minute)
		seen(len(before.Cosigned) + 3)
		theirs, ours := lossOf(t, f.Entries("appliance.meet/1"), 1), lossOf(t, a.Entries("vendor.epoch/1"), 1)
		if theirs.Lost.Log != ours.Lost.Log || ours.Lost.Log.From != uint64(kept)+1 || ours.Lost.Log.Len() == 0 {
			t.Errorf("lost of the vendor's log: %v by the vendor, %v by the customer; it kept %d entries", theirs.Lost.Log, ours.Lost.Log, kept)
		}
		if forks := f.Entries("refused/1"); len(forks) != 0 {
			t.Errorf("the vendor takes the customer's log for a fork: %s", forks)
		}
		for _, e := range a.Entries("order.take/1") {
			if strings.Contains(string(e), "not countersigned") {
				t.Errorf("the customer takes the vendor's log for a fork: %s", e)
			}
		}
	})
}

// TestReportsThatAreNotKept: more was reported after the snapshot than an appliance keeps, and both books name the same numbers.
func TestReportsThatAreNotKept(t *testing.T) {
	bubble(t, func(t *testing.T, f *fleettest.Fleet) {
		a := f.AddAppliance("eu-1")
		a.Start()
		a.WaitUp(time.Minute)
		asked(f, a, 2)
		saved := f.Save()
		for range 5 {
			asked(f, a, 100)
		}
		f.Restore(saved)
		a.WaitUp(15 * time.Minute)
		asked2 := func() bool { return f.Of("eu-1").ReportsDone == 502 }
		f.Wait("what is kept was sent again", 10*time.Minute, asked2)
		theirs, ours := lossOf(t, f.Entries("appliance.meet/1"), 1), lossOf(t, a.Entries("vendor.epoch/1"), 1)
		if want := (fleet.Span{From: 3, To: 246}); theirs.Lost.Reports != want || ours.Lost.Reports != want {
			t.Errorf("lost: %v by the vendor, %v by the customer; want %v", theirs.Lost.Reports, ours.Lost.Reports, want)
		}
		if at := f.Of("eu-1"); at.Status != book.Enrolled || at.Probe.Doubled != 0 {
			t.Errorf("%+v", at)
		}
	})
}
