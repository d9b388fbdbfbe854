// SPDX-License-Identifier: Apache-2.0

package fleettest

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/demarc-dev/demarc/daemon/controlplane/book"
	"github.com/demarc-dev/demarc/fleet"
)

// soakEvery is how far apart the looks at the soak are, in days. In between all of it is dark: months of three nodes that run
// take too long, even in fake time.
const soakEvery = 8

// soakDays is how long the soak lives.
func soakDays() int {
	if Long() {
		return 192
	}
	return 96
}

// TestThreeNodesSoak lives 96 days, and 192 in make test-long, with three nodes: certificates rotate, and the CA each 48 days. All is dark
// between two looks, 8 days apart. At each look, by a seed, something crashes right after a renewal is on record and before its answer is
// delivered, or after the certificate was stored and before it is shown; then the leader crashes. No human does anything for
// an appliance, each comes back as who it was, and the three books end as one.
func TestThreeNodesSoak(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	if s := os.Getenv("DEMARC_SEED"); s != "" {
		var err error
		if seed, err = strconv.ParseUint(s, 10, 64); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("DEMARC_SEED=%d", seed)
	synctest.Test(t, func(t *testing.T) {
		c := newTrio(t, unhurried)
		c.spread()
		(&soak{trio: c, t: t, r: rand.New(rand.NewPCG(seed, 0)), first: map[string]book.Appliance{}, serials: map[string][]fleet.Serial{}}).live()
	})
}

type soak struct {
	*trio
	t       *testing.T
	r       *rand.Rand
	all     []*Appliance
	first   map[string]book.Appliance
	serials map[string][]fleet.Serial // that each had, oldest first
	crashes [5]int                    // by what crashed
	leaders map[string]int            // that were taken down
	rolls   int
	proofs  int // that were counted
}

func (s *soak) live() {
	s.leaders = map[string]int{}
	for i := range 4 {
		a := s.AddAppliance(fmt.Sprint("eu-", i+1))
		a.Start()
		a.WaitUp(5 * time.Minute)
		s.all = append(s.all, a)
		s.first[a.Name] = s.Of(a.Name)
	}
	s.proven(0, len(s.all))
	for day := soakEvery; day <= soakDays(); day += soakEvery {
		late := s.all[s.r.IntN(len(s.all))] // is started only once the others are there
		for _, a := range s.all {
			a.Stop()
		}
		trap := s.crashSomewhere()
		s.pause(soakEvery*oneDay - time.Duration(s.r.IntN(int(6*time.Hour))))
		for _, a := range s.all {
			if a != late {
				a.Start()
			}
		}
		s.up(day, late)
		s.settle(trap)
		s.up(day, late)
		s.proven(day, len(s.all)*trap.nodes())
		if day%(6*soakEvery) == 0 {
			s.roll(day, late)
			s.proven(day, 0)
		}
		name := s.leader()
		s.crash(name)
		s.leaders[name]++
		late.Start()
		s.up(day, nil)
		s.startNode(name)
		s.proven(day, len(s.all))
		s.check(day)
	}
	s.agree()
	total := 0
	for _, n := range s.crashes {
		total += n
	}
	days, rolls := soakDays(), soakDays()/(6*soakEvery)
	s.t.Logf("%d days, crashes by kind %v, leaders taken down %v, %d CAs, %d certificates of eu-1, %d proofs, %d entries",
		days, s.crashes, s.leaders, 1+s.rolls, len(s.serials["eu-1"]), s.proofs, s.Size())
	if total < days/24 || len(s.serials["eu-1"]) < days/30 || s.rolls != rolls {
		s.t.Errorf("%d crashes, %d certificates, %d roll-overs, want %d: the soak does not soak", total, len(s.serials["eu-1"]), s.rolls, rolls)
	}
}

// proven asserts that the appliances proved their platform identity no more often than that since it was asked last. While there
// is no leader, a node that is behind can't tell a new certificate from a bad one and refuses it: that costs the
// appliance a proof, and nothing else. Nothing but a node that dies costs one.
func (s *soak) proven(day, most int) {
	s.t.Helper()
	sum := 0
	for _, a := range s.all {
		sum += a.Proofs()
	}
	if sum-s.proofs > most {
		s.t.Fatalf("day %d: %d proofs, want at most %d", day, sum-s.proofs, most)
	}
	s.proofs = sum
}

// up waits until all but one are up, and past half of its life none has the certificate that it had.
func (s *soak) up(day int, but *Appliance) {
	s.t.Helper()
	for _, a := range s.all {
		if a == but {
			continue
		}
		s.Wait(fmt.Sprintf("day %d: %s is up with a certificate that is young", day, a.Name), time.Hour, func() bool {
			return a.Up() && time.Until(s.Of(a.Name).CurrentTill) > LeafLife/4
		})
	}
}

// roll changes the CA while one appliance sleeps.
func (s *soak) roll(day int, late *Appliance) {
	s.t.Helper()
	old, id := s.IssuerCA(), s.prepare(fmt.Sprint("p", day))
	s.Wait("all but the one that sleeps hold the bundle", 10*time.Minute, func() bool { return s.missing() == late.Name+"*" })
	s.must(s.activate(fmt.Sprint("a", day), id))
	for _, a := range s.all {
		if a != late {
			s.Wait(fmt.Sprintf("day %d: %s is renewed by the new CA", day, a.Name), time.Hour, s.issuedBy(a, id))
		}
	}
	s.Wait("the nodes have the newest", 10*time.Minute, func() bool { return s.missing() == late.Name+"*" })
	named(s.t, "retired under the one that sleeps", s.retire(fmt.Sprint("r", day), old, false),
		[]string{"eu-1", "eu-2", "eu-3", "eu-4", "cp-"}, late.Name)
	late.Start()
	s.Wait(fmt.Sprintf("day %d: %s is renewed by the new CA", day, late.Name), time.Hour, s.issuedBy(late, id))
	s.must(s.retire(fmt.Sprint("s", day), old, false))
	late.Stop()
	s.Wait("it left", 10*time.Minute, func() bool { return !s.Of(late.Name).Online })
	s.rolls++
}

// settle takes the trap away, and waits for what it set off.
func (s *soak) settle(t *trap) {
	s.t.Helper()
	s.After(nil)
	if t.sprung.Load() {
		select {
		case <-t.done:
		case <-time.After(time.Hour):
			s.t.Fatal("what crashed is not back after an hour")
		}
	}
}

// check asserts that each appliance is who it was, and that of all its certificates only the current and the next come in.
func (s *soak) check(day int) {
	s.t.Helper()
	for _, a := range s.all {
		at, was := s.Of(a.Name), s.first[a.Name]
		if !bytes.Equal(at.LogKey, was.LogKey) || !at.Since.Equal(was.Since) || string(at.CurrentIssuer) != s.IssuerCA() {
			s.t.Fatalf("day %d: %s is another one: %+v", day, a.Name, at)
		}
		for _, serial := range []fleet.Serial{at.Current, at.Next} {
			if serial != "" && !slices.Contains(s.serials[a.Name], serial) {
				s.serials[a.Name] = append(s.serials[a.Name], serial)
			}
		}
		for _, serial := range s.serials[a.Name] {
			if err := s.Admit(a.Name, serial); (err == nil) != (serial == at.Current || serial == at.Next) {
				s.t.Fatalf("day %d: certificate %s of %s, current %s, next %q: %v", day, serial, a.Name, at.Current, at.Next, err)
			}
		}
	}
}

// trap is what makes something crash.
type trap struct {
	sprung atomic.Bool
	what   int           // crashes
	done   chan struct{} // closed once what crashed was started again
}

// nodes is how many nodes it made crash.
func (t *trap) nodes() int {
	if t.sprung.Load() && (t.what == 2 || t.what == 3) {
		return 1
	}
	return 0
}

// crashSomewhere has something crash at the next renewal of an appliance.
func (s *soak) crashSomewhere() *trap {
	t := &trap{what: s.r.IntN(len(s.crashes)), done: make(chan struct{})}
	done := t.done
	s.After(func(kind string, by fleet.Principal) {
		i := slices.IndexFunc(s.all, func(a *Appliance) bool { return by == fleet.PrincipalOf(Domain, fleet.Appliance, a.Name) })
		if kind != "appliance.renew/2" || i < 0 {
			return
		}
		if a := s.all[i]; t.sprung.CompareAndSwap(false, true) {
			s.After(nil)
			s.crashes[t.what]++
			switch t.what {
			case 0: // the answer is lost
				a.Cut()
				a.Heal()
				close(done)
			case 1: // the appliance dies before the answer
				a.Cut()
				go func() { a.Stop(); a.Heal(); a.Start(); close(done) }()
			case 2: // the leader dies before the answer
				go func() { s.bounce(s.leader()); close(done) }()
			case 3: // another node dies, perhaps the one that would have answered
				go func() { s.bounce(s.follower()); close(done) }()
			case 4: // the appliance dies with the certificate stored
				a.OnDial(func() { go func() { a.Stop(); a.Start(); close(done) }() })
			}
		}
	})
	return t
}

// bounce crashes a node and starts it again a minute later.
func (s *soak) bounce(name string) {
	s.crash(name)
	time.Sleep(time.Minute)
	s.startNode(name)
}
