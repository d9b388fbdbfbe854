// SPDX-License-Identifier: Apache-2.0

package refusal

import (
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/demarc-dev/demarc/fleet"
)

// TestRefusalsAreBounded: what one caller, all of them, anonymous ones and forks can put on record at once and with time, that none
// of them uses up what is another one's, and that what is left out is counted.
func TestRefusalsAreBounded(t *testing.T) {
	caller := func(i int) Caller {
		return Principal(fleet.PrincipalOf("example.org", fleet.Operator, fmt.Sprint("op-", i)))
	}
	flood := func(r *Recorder, n int, who func(int) Caller) (on int) {
		for i := range n {
			if now, _ := r.Allow(who(i)); now {
				on++
			}
		}
		return on
	}
	one := func(who Caller) func(int) Caller { return func(int) Caller { return who } }
	for name, c := range map[string]struct {
		who             func(int) Caller
		atOnce, further int // and in the 60 s after
	}{
		"one caller":             {one(caller(0)), 5, 15},
		"all callers":            {caller, 20, 60},
		"at the bootstrap":       {one(atBootstrap), 64, 60},
		"anonymous elsewhere":    {one(elsewhere), 5, 15},
		"one fork":               {one(Fork("eu-1")), 5, 15},
		"a fork under a crowd's": {one(Fork("eu-1")), 5, 15},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := NewRecorder(nil, nil, nil)
				if name == "a fork under a crowd's" {
					flood(r, 1000, caller)
				}
				if got := flood(r, 1000, c.who); got != c.atOnce {
					t.Errorf("%d of 1000 at once are on record, want %d", got, c.atOnce)
				}
				further := 0
				for range 60 {
					time.Sleep(time.Second)
					further += flood(r, 100, c.who)
				}
				if further != c.further {
					t.Errorf("%d are on record in the minute after, want %d", further, c.further)
				}
			})
		})
	}
}

// TestNoRefuserUsesUpAnothers: whoever floods, each of the others is on record.
func TestNoRefuserUsesUpAnothers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		all := map[string]Caller{"caller": Principal("spiffe://example.org/operator/ann"), "bootstrap": atBootstrap, "anonymous": elsewhere,
			"fork": Fork("eu-1"), "other fork": Fork("eu-2")}
		for name, floods := range all {
			r := NewRecorder(nil, nil, nil)
			for range 1000 {
				r.Allow(floods)
			}
			for other, who := range all {
				if now, _ := r.Allow(who); now != (other != name) {
					t.Errorf("after a flood of the %s: on record is the %s: %v", name, other, now)
				}
			}
		}
	})
}

// TestLeftOutIsCounted: the next refusal that goes on record tells how many did not, of this caller, once.
func TestLeftOutIsCounted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, ann, ben := NewRecorder(nil, nil, nil), Principal("ann"), Principal("ben")
		for range 105 {
			r.Allow(ann)
		}
		if now, left := r.Allow(ben); !now || left != 0 {
			t.Errorf("another caller's is on record: %v, and tells of %d left out", now, left)
		}
		for _, want := range []int{100, 0} {
			time.Sleep(4 * time.Second)
			if now, left := r.Allow(ann); !now || left != want {
				t.Errorf("on record: %v, and tells of %d left out, want %d", now, left, want)
			}
		}
	})
}

// TestRefusersAreBounded: a bounded number is told apart, whatever they call themselves.
func TestRefusersAreBounded(t *testing.T) {
	r := NewRecorder(nil, nil, nil)
	for i := range 3 * callersMax {
		r.Allow(Principal(fleet.Principal(fmt.Sprint(i))))
	}
	if n := len(r.by.By); n != callersMax || r.by.Used.Len() != n {
		t.Fatalf("%d refusers are kept, in a list of %d, want %d", n, r.by.Used.Len(), callersMax)
	}
}

// TestAllAnonymousTogetherAreBounded: who has many networks is one of many.
func TestAllAnonymousTogetherAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := NewRecorder(nil, nil, nil)
		heard := 0
		for i := range 4 * anonymousBurst {
			if s.Heard(fmt.Sprintf("10.%d.%d.1:443", i/256, i%256)) {
				heard++
			}
		}
		if heard != anonymousBurst {
			t.Errorf("%d calls at once were heard, want %d", heard, anonymousBurst)
		}
		time.Sleep(time.Second)
		if !s.Heard("192.0.2.1:443") {
			t.Error("a second later nobody is heard")
		}
	})
}
