// SPDX-License-Identifier: Apache-2.0

package fleettest_test

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/fleettest"
)

// TestSoak lives 13 months, and 36 in make test-long: certificates rotate each month, the CA each 12 months, and each month, at a moment
// drawn from a seed, an answer is lost or a process dies right after something was stored. Of three appliances the process runs for some
// hours around the renewal and is down in between; the fourth one's runs, and is connected, all the time. No human does
// anything for an appliance.
func TestSoak(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	if s := os.Getenv("DEMARC_SEED"); s != "" {
		var err error
		if seed, err = strconv.ParseUint(s, 10, 64); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("DEMARC_SEED=%d", seed)
	bubble(t, func(t *testing.T, f *fleettest.Fleet) {
		f.Beat = 5 * time.Minute // that of a small fleet would be 19 million beats
		f.CrashNode()
		f.StartNode()
		stays := newStayer(f, "eu-0")
		r := rand.New(rand.NewPCG(seed, 0))
		var all []*fleettest.Appliance
		keys := map[string][]byte{}
		for i := range 3 {
			a := f.AddAppliance(fmt.Sprint("eu-", i+1))
			a.Start()
			a.WaitUp(time.Minute)
			all = append(all, a)
			keys[a.Name] = f.Of(a.Name).LogKey
		}
		crashes, months := 0, 13
		if fleettest.Long() {
			months = 36
		}
		for month := 1; month <= months; month++ {
			serials := map[string]fleet.Serial{}
			for _, a := range all {
				serials[a.Name] = f.Of(a.Name).Current
				a.Stop()
			}
			for range 24*30 - 12 - r.IntN(240) {
				time.Sleep(time.Hour)
				stays.WaitUp(10 * time.Second) // no more than that goes by between two channels
			}
			crashed := crashSomewhere(f, all, r)
			for _, a := range all {
				a.Start()
			}
			for _, a := range all {
				f.Wait(fmt.Sprintf("month %d: %s uses another certificate", month, a.Name),
					5*day, func() bool { return f.Of(a.Name).Current != serials[a.Name] && a.Up() })
			}
			<-crashed
			crashes++
			if month%12 == 0 {
				old, id := f.IssuerCA(), f.PrepareCA()
				f.Wait("the new CA is active", time.Hour, func() bool { return f.ActivateCA(id) == nil })
				f.Wait("the old CA is retired", day, func() bool { return f.RetireCA(old, false) == nil })
			}
			for _, a := range all {
				a.WaitUp(time.Hour)
				at := f.Of(a.Name)
				if !bytes.Equal(at.LogKey, keys[a.Name]) || string(at.CurrentIssuer) != f.IssuerCA() {
					t.Fatalf("month %d: %+v", month, at)
				}
			}
			stays.check(t, month)
		}
		proofs := 0
		for _, a := range all {
			proofs += a.Proofs()
		}
		t.Logf("%d months, %d crashes, %d proofs of 3 appliances, %d entries in the vendor's log", months, crashes, proofs, f.Size())
		if crashes != months {
			t.Errorf("%d crashes, want one each month: the soak does not soak", crashes)
		}
		if proofs != len(all) {
			t.Errorf("%d proofs, want one of each appliance: a lost answer must not cost another", proofs)
		}
		// A renewal takes a connection of its own and the channel that follows. What is over that is lost channels.
		dials, serials := stays.Dials(), len(f.Serials(stays.Name))
		t.Logf("%s: %d certificates, %d connections", stays.Name, serials, dials)
		if dials > 2*serials+4*crashes || serials < months {
			t.Errorf("%s came to the door %d times for %d certificates: its channel does not last", stays.Name, dials, serials)
		}
	})
}

// stayer is the appliance whose process never ends.
type stayer struct {
	*fleettest.Appliance
	f    *fleettest.Fleet
	key  []byte
	seen int // certificates, at the last check
}

func newStayer(f *fleettest.Fleet, name string) *stayer {
	a := f.AddAppliance(name)
	a.Start()
	a.WaitUp(time.Minute)
	return &stayer{a, f, f.Of(name).LogKey, len(f.Serials(name))}
}

// check asserts that the appliance is who it was and connected, that nobody helped, that its certificate was renewed, and
// that of all certificates it ever had only the current and the next one come in.
func (s *stayer) check(t *testing.T, month int) {
	t.Helper()
	f := s.f
	f.Wait(s.Name+" has a certificate of the CA that issues",
		15*time.Minute, func() bool { return string(f.Of(s.Name).CurrentIssuer) == f.IssuerCA() })
	s.WaitUp(10 * time.Second)
	at, serials := f.Of(s.Name), f.Serials(s.Name)
	if !bytes.Equal(at.LogKey, s.key) || at.Status != "enrolled" {
		t.Fatalf("month %d: %s is another one: %+v", month, s.Name, at)
	}
	if s.Proofs() != 1 {
		t.Fatalf("month %d: %s proved its platform identity %d times, want once: it was never away", month, s.Name, s.Proofs())
	}
	if len(serials) == s.seen {
		t.Fatalf("month %d: %s was not renewed", month, s.Name)
	}
	s.seen = len(serials)
	good := 0
	for _, serial := range serials {
		err := f.Admit(s.Name, serial)
		if err == nil {
			good++
		}
		if valid := serial == at.Current || serial == at.Next; valid != (err == nil) {
			t.Fatalf("month %d: certificate %s of %s, current %s, next %q: %v", month, serial, s.Name, at.Current, at.Next, err)
		}
	}
	if good == 0 || good > 2 {
		t.Fatalf("month %d: %d certificates of %s come in", month, good, s.Name)
	}
}

// crashSomewhere has one appliance or the node fail once: after that appliance's renewal is on record and before its
// answer is delivered, or after it stored the certificate and before it shows it. What it gives is closed after that.
func crashSomewhere(f *fleettest.Fleet, all []*fleettest.Appliance, r *rand.Rand) <-chan struct{} {
	a, what, done := all[r.IntN(len(all))], r.IntN(4), make(chan struct{})
	var once sync.Once
	f.After(func(kind string, by fleet.Principal) {
		if kind != "appliance.renew/2" || by != fleet.PrincipalOf(fleettest.Domain, fleet.Appliance, a.Name) {
			return
		}
		once.Do(func() {
			f.After(nil)
			switch what {
			case 0:
				a.Cut()
				a.Heal()
				close(done)
			case 1:
				a.Cut()
				go func() { a.Stop(); a.Heal(); a.Start(); close(done) }()
			case 2:
				for _, b := range all {
					b.Cut()
				}
				go func() {
					f.CrashNode()
					f.StartNode()
					for _, b := range all {
						b.Heal()
					}
					close(done)
				}()
			case 3:
				a.OnDial(func() { go func() { a.Stop(); a.Start(); close(done) }() })
			}
		})
	})
	return done
}
