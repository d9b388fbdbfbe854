// SPDX-License-Identifier: Apache-2.0

package fleettest_test

import (
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/demarc-dev/demarc/daemon/controlplane/book"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/fleettest"
	"github.com/demarc-dev/demarc/mesh"
)

const day = 24 * time.Hour

func bubble(t *testing.T, play func(t *testing.T, f *fleettest.Fleet)) {
	synctest.Test(t, func(t *testing.T) { play(t, fleettest.New(t)) })
}

// renewed waits until another certificate than the one of before is in use.
func renewed(f *fleettest.Fleet, a *fleettest.Appliance, before book.Appliance, limit time.Duration) {
	f.Wait(a.Name+" uses another certificate", limit, func() bool { return f.Of(a.Name).Current != before.Current && a.Up() })
}

func TestRenewalFromHalfLife(t *testing.T) {
	bubble(t, func(t *testing.T, f *fleettest.Fleet) {
		a := f.AddAppliance("eu-1")
		a.Start()
		a.WaitUp(time.Minute)
		first := f.Of("eu-1")
		a.Cut()
		time.Sleep(14 * day)
		a.Heal()
		a.WaitUp(time.Minute)
		time.Sleep(time.Hour)
		if at := f.Of("eu-1"); at.Current != first.Current || at.Next != "" {
			t.Error("it renewed before half of its life")
		}
		a.Cut()
		time.Sleep(6 * day)
		a.Heal()
		renewed(f, a, first, time.Hour)
		if a.Proofs() != 1 {
			t.Errorf("%d proofs, want the one of the first enrolment", a.Proofs())
		}
	})
}

// An answer that is lost at any point locks nobody out, and the platform identity is not even asked for again.
func TestLostAnswers(t *testing.T) {
	for name, crash := range map[string]func(f *fleettest.Fleet, a *fleettest.Appliance, done chan struct{}){
		"the answer is lost": func(f *fleettest.Fleet, a *fleettest.Appliance, done chan struct{}) { a.Cut(); a.Heal(); close(done) },
		"the appliance dies before the answer": func(_ *fleettest.Fleet, a *fleettest.Appliance, done chan struct{}) {
			a.Cut()
			go func() { a.Stop(); a.Heal(); a.Start(); close(done) }()
		},
		"the node dies before the answer": func(f *fleettest.Fleet, a *fleettest.Appliance, done chan struct{}) {
			a.Cut()
			go func() { f.CrashNode(); f.StartNode(); a.Heal(); close(done) }()
		},
		"the appliance dies with the certificate stored": func(_ *fleettest.Fleet, a *fleettest.Appliance, done chan struct{}) {
			a.OnDial(func() { go func() { a.Stop(); a.Start(); close(done) }() })
		},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T, f *fleettest.Fleet) {
				a := f.AddAppliance("eu-1")
				a.Start()
				a.WaitUp(time.Minute)
				first := f.Of("eu-1")
				a.Stop()
				time.Sleep(20 * day)
				done := make(chan struct{})
				f.After(func(kind string, _ fleet.Principal) {
					if kind == "appliance.renew/2" {
						f.After(nil)
						crash(f, a, done)
					}
				})
				a.Start()
				select {
				case <-done:
				case <-time.After(day):
					t.Fatal("a day after half of its certificate's life the appliance has not asked for the next one, or what was to happen then has not")
				}
				renewed(f, a, first, 2*time.Hour)
				if a.Proofs() != 1 {
					t.Errorf("%d proofs, want the one of the first enrolment", a.Proofs())
				}
			})
		})
	}
}

func TestClock(t *testing.T) {
	for _, skew := range []time.Duration{-10 * time.Hour, 10 * time.Hour} {
		t.Run("enrols and renews "+skew.String(), func(t *testing.T) {
			bubble(t, func(t *testing.T, f *fleettest.Fleet) {
				a := f.AddAppliance("eu-1")
				a.Skew(skew)
				a.Start()
				a.WaitUp(time.Minute)
				first := f.Of("eu-1")
				a.Stop()
				time.Sleep(20 * day)
				a.Start()
				renewed(f, a, first, 2*time.Hour)
				a.Stop()
				time.Sleep(40 * day)
				a.Start()
				a.WaitUp(time.Minute)
			})
		})
	}
	for _, skew := range []time.Duration{-3 * day, 3 * day, -60 * day, 60 * day} {
		t.Run("comes back by the signed time "+skew.String(), func(t *testing.T) {
			bubble(t, func(t *testing.T, f *fleettest.Fleet) {
				a := f.AddAppliance("eu-1")
				a.Start()
				a.WaitUp(time.Minute)
				a.Stop()
				time.Sleep(20 * day)
				f.CrashNode() // its next certificate is new: for a slow clock it has not begun
				f.StartNode()
				a.Skew(skew)
				a.Start()
				a.WaitUp(2 * time.Minute)
				if a.Proofs() > 2 {
					t.Errorf("%d proofs", a.Proofs())
				}
			})
		})
	}
	t.Run("before the first enrolment nothing is pinned", func(t *testing.T) {
		bubble(t, func(t *testing.T, f *fleettest.Fleet) {
			a := f.AddAppliance("eu-1")
			a.Skew(-3 * day)
			a.Start()
			time.Sleep(time.Hour)
			if f.Of("eu-1").Status != book.Registered {
				t.Error("it trusted a node without anything to trust it by")
			}
			a.Skew(0)
			a.WaitUp(time.Minute)
		})
	})
}

func TestRollOver(t *testing.T) {
	bubble(t, func(t *testing.T, f *fleettest.Fleet) {
		old := f.IssuerCA()
		var all []*fleettest.Appliance
		for _, name := range []string{"eu-1", "eu-2", "us-1"} {
			a := f.AddAppliance(name)
			a.Start()
			a.WaitUp(time.Minute)
			all = append(all, a)
		}
		sleeper := all[2]
		sleeper.Stop()
		f.Wait("it left", time.Minute, func() bool { return !f.Of("us-1").Online })

		f.After(func(kind string, _ fleet.Principal) { // eu-2 is connected and can't take the bundle
			if kind == "ca.prepare/2" {
				f.After(nil)
				all[1].Cut()
			}
		})
		id := f.PrepareCA()
		if err := f.ActivateCA(id); fault.Of(err) != fault.Conflict || !strings.Contains(err.Error(), "appliance eu-2") {
			t.Fatalf("active at once: %v, want conflict that names eu-2", err)
		} else if strings.Contains(err.Error(), "us-1") {
			t.Fatalf("an appliance that is offline holds it up: %v", err)
		}
		all[1].Heal()
		f.Wait("all that are connected acknowledge", 5*time.Minute, func() bool { return f.ActivateCA(id) == nil })
		var missing []string
		for _, m := range f.CAs().GetMissing() {
			if !m.GetOnline() {
				missing = append(missing, m.GetName())
			}
		}
		if strings.Join(missing, " ") != "us-1" {
			t.Errorf("missing and offline: %q, want us-1", missing)
		}
		if err := f.RetireCA(old, false); fault.Of(err) != fault.Conflict || !strings.Contains(err.Error(), "us-1") {
			t.Fatalf("the old CA is retired under those who use it: %v", err)
		}
		late := f.AddAppliance("us-2") // its bundle file is of before the roll-over
		late.Start()
		time.Sleep(30 * time.Minute)
		if late.Up() {
			t.Error("it trusts a CA that its customer's file does not hold")
		}
		for _, a := range all[:2] {
			at := f.Of(a.Name)
			if string(at.CurrentIssuer) != id || !a.Up() || a.Proofs() != 1 {
				t.Errorf("%s: issuer %s, up %v, %d proofs: it must renew with the new CA by itself", a.Name, at.CurrentIssuer.Short(), a.Up(),
					a.Proofs())
			}
		}
		sleeper.Start() // the old CA still stands; it does not know the new one
		sleeper.WaitUp(time.Minute)
		late.Stop()
		late.NewBundleFile()
		late.Start()
		late.WaitUp(time.Minute)
		f.Wait("the old CA is retired", time.Hour, func() bool { return f.RetireCA(old, false) == nil })
		if sleeper.Proofs() != 1 {
			t.Errorf("%d proofs of the one that slept", sleeper.Proofs())
		}
		for _, a := range all {
			a.WaitUp(time.Minute)
		}
	})
}

func TestCompromisedCA(t *testing.T) {
	bubble(t, func(t *testing.T, f *fleettest.Fleet) {
		a := f.AddAppliance("eu-1")
		a.Start()
		a.WaitUp(time.Minute)
		first := f.Of("eu-1")
		old, id := f.IssuerCA(), f.PrepareCA()
		f.Wait("active", 5*time.Minute, func() bool { return f.ActivateCA(id) == nil })
		f.Wait("retired", 5*time.Minute, func() bool { return f.RetireCA(old, true) == nil })
		renewed(f, a, first, 2*time.Minute)
		if at := f.Of("eu-1"); string(at.CurrentIssuer) != id {
			t.Errorf("issuer %s", at.CurrentIssuer.Short())
		}
	})
}

func TestBan(t *testing.T) {
	bubble(t, func(t *testing.T, f *fleettest.Fleet) {
		a := f.AddAppliance("eu-1")
		a.Start()
		a.WaitUp(time.Minute)
		f.Ban("eu-1")
		f.Wait("the channel is closed", time.Second, func() bool { return !f.Of("eu-1").Online })
		proofs, size := a.Proofs(), f.Size()
		time.Sleep(day)
		if at := f.Of("eu-1"); at.Status != book.Banned || at.Online || at.Current != "" {
			t.Errorf("%+v", at)
		}
		if n := a.Proofs() - proofs; n < 2 || n > 400 {
			t.Errorf("%d proofs in a day of being banned: it must ask, and not run hot", n)
		}
		if n := f.Size() - size; n > 400 {
			t.Errorf("%d entries in the vendor's log in a day of being banned", n)
		}
	})
}

// A certificate that was refused once, by a node that was behind, is shown again where the platform gives no proof.
func TestRefusedOnceAndNoProof(t *testing.T) {
	bubble(t, func(t *testing.T, f *fleettest.Fleet) {
		a := f.AddAppliance("eu-1")
		a.Start()
		a.WaitUp(time.Minute)
		first := f.Of("eu-1")
		a.Mute(true)
		f.Shut(true)
		a.Cut()
		a.Heal()
		proofs := a.Proofs()
		f.Wait("it was asked for a proof", time.Hour, func() bool { return a.Proofs() > proofs })
		time.Sleep(day)
		if n := a.Proofs() - proofs; n < 2 || n > 400 {
			t.Errorf("%d proofs in a day: it must ask, and not run hot", n)
		}
		f.Shut(false)
		f.Wait("it is up", time.Hour, func() bool { return f.Of("eu-1").Online })
		if at := f.Of("eu-1"); at.Current != first.Current {
			t.Error("it has another certificate, and nobody could vouch for it")
		}
	})
}

// TestTheCustomerIsToldTheTrueCause (FAULTS.md F2): a ban, a platform that gives no proof and a node that is away are told apart on the
// customer's own page, for as long as they last.
func TestTheCustomerIsToldTheTrueCause(t *testing.T) {
	says := func(t *testing.T, a *fleettest.Appliance, why mesh.Reason, said string) {
		t.Helper()
		for range 20 { // between tries, too
			time.Sleep(7 * time.Minute)
			if r := a.Road(); r.GetReason() != string(why) || !strings.Contains(r.GetSaid(), said) || r.GetDo() == "" {
				t.Fatalf("%v, want %s, %q", r, why, said)
			}
		}
	}
	for name, play := range map[string]func(t *testing.T, f *fleettest.Fleet, a *fleettest.Appliance){
		"banned": func(t *testing.T, f *fleettest.Fleet, a *fleettest.Appliance) {
			a.Start()
			a.WaitUp(time.Minute)
			f.Ban("eu-1")
			says(t, a, mesh.VendorRefuses, `appliance "eu-1" is banned`)
		},
		"no proof": func(t *testing.T, f *fleettest.Fleet, a *fleettest.Appliance) {
			a.Mute(true)
			a.Start()
			says(t, a, mesh.NoProof, "the platform does not answer")
			a.Mute(false)
			a.WaitUp(time.Hour)
			time.Sleep(time.Minute)
			if r := a.Road(); r.GetReason() != "" || !r.GetInUse() {
				t.Errorf("%v", r)
			}
		},
		"the network is away": func(t *testing.T, f *fleettest.Fleet, a *fleettest.Appliance) {
			a.Start()
			a.WaitUp(time.Minute)
			a.Cut()
			says(t, a, mesh.Unreached, "")
		},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T, f *fleettest.Fleet) { play(t, f, f.AddAppliance("eu-1")) })
		})
	}
}
