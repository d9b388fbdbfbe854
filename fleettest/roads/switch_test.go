// SPDX-License-Identifier: Apache-2.0

package roads_test

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"
)

// flow is how numbered messages fared.
type flow struct {
	Sent       uint64 `json:"sent"`
	Echoed     uint64 `json:"echoed"`
	Doubled    uint64 `json:"doubled"`
	OutOfOrder uint64 `json:"out_of_order"`
}

const (
	messages = 750
	rate     = 25 // a second
)

// messages sends numbered messages while the test goes on; the answer tells how they fared.
func (f *fleet) messages() <-chan flow {
	done := make(chan flow, 1)
	go func() {
		out, err := f.demarc("probe", "--appliance", "eu-1", "--count", fmt.Sprint(messages), "--rate", fmt.Sprint(rate), "--timeout", "90s", "-o", "json")
		var w flow
		if jerr := json.Unmarshal([]byte(out), &w); jerr != nil {
			f.t.Errorf("probe: %v, %v", err, jerr)
		}
		done <- w
	}()
	return done
}

// faults is each kind of fault of the first road: how it is made, how it is healed, and what must follow.
var faults = []struct {
	name       string
	make, heal func(*fleet)
	over       bool   // the appliance must go over to the other road; else the channel may stay
	told       string // what the appliance's log must tell the customer
}{
	{"reset", func(f *fleet) { f.road.set(reset) }, func(f *fleet) { f.road.set(pass) }, true, ""},
	{"black hole", func(f *fleet) { f.drop("-I", "road1", "-j", "DROP") }, func(f *fleet) { f.drop("-D", "road1", "-j", "DROP") }, true, ""},
	{"half-open", func(f *fleet) { f.road.set(halfOpen) }, func(f *fleet) { f.road.set(pass) }, true, ""},
	{"30% loss", func(f *fleet) {
		f.drop("-I", "road1", "-m", "statistic", "--mode", "random", "--probability", "0.3", "-j", "DROP")
	}, func(f *fleet) {
		f.drop("-D", "road1", "-m", "statistic", "--mode", "random", "--probability", "0.3", "-j", "DROP")
	}, false, ""},
	{"2 s late", func(f *fleet) { f.road.set(late) }, func(f *fleet) { f.road.set(pass) }, false, ""},
	{"no DNS", func(f *fleet) { f.resolver.set(noName); f.road.set(reset) }, func(f *fleet) { f.resolver.set(pass); f.road.set(pass) }, true, strings.TrimSuffix(proxyName, ".")},
	{"proxy 407", func(f *fleet) { f.road.set(deny) }, func(f *fleet) { f.road.set(pass) }, true, "the proxy refuses the user and password"},
	{"proxy opens TLS", func(f *fleet) { f.road.set(inspect) }, func(f *fleet) { f.road.set(pass) }, true, inspectingCA},
}

// drop puts a rule for what comes in over a cable into both hosts, or takes it out.
func (f *fleet) drop(verb, dev string, rule ...string) {
	f.t.Helper()
	for _, ns := range []string{f.cp, f.ap} {
		f.run(ns, append([]string{"iptables", verb, "INPUT", "-i", dev}, rule...)...)
	}
}

// TestLiveSwitch: with messages on their way each fault strikes the road in use. The appliance goes over to the other road,
// the fault is healed, the customer orders the first road again, and no message is lost, doubled or out of order.
func TestLiveSwitch(t *testing.T) {
	need(t)
	for _, fault := range faults {
		t.Run(fault.name, func(t *testing.T) {
			t.Parallel()
			f := newFleet(t)
			done := f.messages()
			f.wait("messages flow", 20*time.Second, func() bool {
				out, err := f.demarc("appliance", "show", "eu-1", "-o", "json")
				var a struct {
					Done json.Number `json:"reports_done"` // a string in protobuf's JSON
				}
				if err != nil || json.Unmarshal([]byte(out), &a) != nil {
					return false
				}
				n, err := a.Done.Int64()
				return err == nil && n > 20
			})
			fault.make(f)
			over := "stayed"
			if fault.over {
				over = f.await("privatelink", 60*time.Second).Round(10 * time.Millisecond).String()
			} else {
				f.linger(8 * time.Second)
			}
			if log := f.log("appliance"); !strings.Contains(log, fault.told) {
				t.Errorf("the customer is not told %q\n%s", fault.told, f.logs())
			}
			fault.heal(f)
			f.wait("the customer has the first road again", 60*time.Second, func() bool {
				_, err := f.typed(f.ap, "transport", "use", "https")
				return err == nil
			})
			f.await("https", 20*time.Second)
			w := <-done
			t.Logf("FAULT %-16s sent %d, echoed %d, lost %d, doubled %d, out of order %d; other road after %s", fault.name, w.Sent, w.Echoed, w.Sent-w.Echoed, w.Doubled, w.OutOfOrder, over)
			if w.Sent != messages || w.Echoed != messages || w.Doubled != 0 || w.OutOfOrder != 0 {
				t.Errorf("messages were lost or doubled: %+v\n%s", w, f.logs())
			}
		})
	}
}

// linger lets a fault last that need not drive the appliance to the other road.
func (f *fleet) linger(long time.Duration) {
	end := time.Now().Add(long)
	f.wait("the fault has lasted", 2*long, func() bool { return time.Now().After(end) })
}

// TestFailBack: the first road comes back by itself when it works again, and the messages do not notice.
func TestFailBack(t *testing.T) {
	need(t)
	t.Parallel()
	f := newFleet(t)
	f.road.set(reset)
	f.await("privatelink", 60*time.Second)
	done := f.messages()
	f.road.set(pass)
	t.Logf("back on the first road after %s", f.await("https", 2*time.Minute).Round(time.Second))
	if w := <-done; w.Sent != messages || w.Echoed != messages || w.Doubled != 0 || w.OutOfOrder != 0 {
		t.Errorf("messages were lost or doubled: %+v\n%s", w, f.logs())
	}
}
