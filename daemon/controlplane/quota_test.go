// SPDX-License-Identifier: Apache-2.0

package controlplane

import (
	"context"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
)

// quotaRecords counts the entries about an appliance that is above its bounds.
func quotaRecords(s *Server, from int64) (n int) {
	log := s.replica.Log()
	for i := from; i < log.Size(); i++ {
		if strings.Contains(string(log.Entry(i)), `"what":"quota"`) {
			n++
		}
	}
	return n
}

// TestReportsOfAnApplianceAreBounded (FAULTS.md I5): one that reports without a pause is slowed to its rates, of reports, of bytes and
// of reports of status; it is on record, once in an hour; and it costs no other one a wait. What waited at a return of one that was
// away comes at once.
func TestReportsOfAnApplianceAreBounded(t *testing.T) {
	for name, x := range map[string]struct {
		size   int
		status bool
		want   time.Duration // for twice what may come at once
		many   int
	}{
		"small ones":      {100, false, reportBurst * time.Second / reportRate, 2 * reportBurst},
		"of status":       {100, true, statusBurst * statusEvery, 2 * statusBurst},
		"large ones":      {4 << 20, false, reportVolume / reportBytes * time.Second, 2 * reportVolume / (4 << 20)},
		"large of status": {64 << 10, true, reportVolume / reportBytes * time.Second, 2 * reportVolume / (64 << 10)},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s, _ := begun(t)
				size := s.replica.Log().Size()
				take := func(of fleet.ApplianceID) time.Duration {
					began := time.Now()
					ctx, cancel := context.WithTimeout(t.Context(), submitFor) // as the reader of a channel does
					defer cancel()
					if err := s.admit(ctx, of, x.size, x.status); err != nil {
						t.Fatal(err)
					}
					return time.Since(began)
				}
				began := time.Now()
				for i := range x.many {
					if took := take("eu-1"); i < x.many/2 && took != 0 {
						t.Fatalf("report %d of those that may come at once waited %s", i, took)
					}
				}
				if took := time.Since(began); took < x.want-2*time.Second || took > x.want+2*time.Second {
					t.Errorf("%d reports took %s, want %s", x.many, took, x.want)
				}
				if took := take("eu-2"); took != 0 {
					t.Errorf("another appliance waits %s for it", took)
				}
				if n, most := quotaRecords(s, size), 1+int(x.want/tooMuchEvery); n > most {
					t.Errorf("%d entries are about it, want at most %d", n, most)
				}
			})
		})
	}
}

// TestRenewalsOfAnApplianceAreBounded (FAULTS.md I5): 936 renewals in 3 s give as many certificates as may be had in a row; a lost
// answer may be asked for again, each two minutes for ever; and others renew meanwhile.
func TestRenewalsOfAnApplianceAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, _ := begun(t)
		s.quotas = newQuotas(30 * 24 * time.Hour)
		size, got := s.replica.Log().Size(), 0
		for range 936 {
			if err := s.renews("eu-1"); err == nil {
				got++
			} else if fault.Of(err) != fault.Busy {
				t.Fatal(err)
			}
			time.Sleep(3 * time.Second / 936)
		}
		if got != renewBurst {
			t.Errorf("%d certificates in 3 s, want %d", got, renewBurst)
		}
		if err := s.renews("eu-2"); err != nil {
			t.Errorf("another appliance: %v", err)
		}
		if n := quotaRecords(s, size); n != 1 {
			t.Errorf("%d entries are about it, want one", n)
		}
		for range 100 {
			time.Sleep(renewEvery)
			if err := s.renews("eu-1"); err != nil {
				t.Fatalf("one that asks as often as it may: %v", err)
			}
		}
		s.quotas = newQuotas(time.Hour) // of a vendor whose leaves live an hour
		for range renewBurst {
			if err := s.renews("eu-1"); err != nil {
				t.Fatal(err)
			}
		}
		time.Sleep(time.Hour / renewPart)
		if err := s.renews("eu-1"); err != nil {
			t.Error(err)
		}
	})
}

// TestArtifactsOfAnApplianceAreBounded (FAULTS.md I5): its streams at once, and the bytes a second of all of them.
func TestArtifactsOfAnApplianceAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, _ := begun(t)
		var ends []func()
		var pace func(int) error
		for range artifactStreams {
			p, done, err := s.stream(t.Context(), "eu-1")
			if err != nil {
				t.Fatal(err)
			}
			pace, ends = p, append(ends, done)
		}
		if _, _, err := s.stream(t.Context(), "eu-1"); fault.Of(err) != fault.Busy {
			t.Errorf("one stream too many: %v, want busy", err)
		}
		if _, done, err := s.stream(t.Context(), "eu-2"); err != nil {
			t.Errorf("another appliance: %v", err)
		} else {
			done()
		}
		began := time.Now()
		for range 1 << 30 / chunk {
			if err := pace(chunk); err != nil {
				t.Fatal(err)
			}
		}
		if took, want := time.Since(began), 31*time.Second; took < want-time.Second || took > want+time.Second {
			t.Errorf("1 GiB took %s, want %s", took, want)
		}
		ends[0]()
		if _, _, err := s.stream(t.Context(), "eu-1"); err != nil {
			t.Errorf("there is room: %v", err)
		}
	})
}

// TestComingsOfAnApplianceAreBounded (FAULTS.md I5): one that comes and goes without a pause is slowed, and no other one waits.
func TestComingsOfAnApplianceAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, _ := begun(t)
		size, began := s.replica.Log().Size(), time.Now()
		const more = 20
		for range edgeBurst + more {
			if err := s.came(t.Context(), &live{s: s, name: "eu-1", serial: "s1", by: "test"}, "https"); err != nil {
				t.Fatal(err)
			}
			s.gone(t.Context(), "eu-1")
		}
		if took, want := time.Since(began), more*edgeEvery; took < want-edgeEvery || took > want+edgeEvery {
			t.Errorf("%d comings took %s, want %s", edgeBurst+more, took, want)
		}
		if n := quotaRecords(s, size); n != 1 {
			t.Errorf("%d entries are about it, want one", n)
		}
		began = time.Now()
		if err := s.comes(t.Context(), "eu-2"); err != nil || time.Since(began) > 0 {
			t.Errorf("another appliance waits %s, %v", time.Since(began), err)
		}
	})
}
