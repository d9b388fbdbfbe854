// SPDX-License-Identifier: Apache-2.0

package appliance_test

import (
	"encoding/json"
	"reflect"
	"testing"
	"time"

	"github.com/demarc-dev/demarc/daemon/appliance/book"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/grant"
	"github.com/demarc-dev/demarc/ledger"
)

// observeOff switches observing off.
func observeOff(t *testing.T, o *order) {
	t.Helper()
	must(t, o, consent(t, grant.Revoke{Appliance: "eu-1", Phase: fleet.Observe, At: o.now(), Nonce: nonce()}, customer))
}

// edges lists what waits for the vendor of the deployment, after the first n reports.
func edges(s book.State, n int) (out []book.Deploy) {
	for _, r := range s.Reports[n:] {
		if r.Deploy != nil {
			out = append(out, *r.Deploy)
		}
	}
	return out
}

// another deploys release 1.1.0, by way of an edge that nobody needs to hear of.
func another(t *testing.T, o *order) {
	t.Helper()
	take(t, o, book.Take{Release: sealed(t, release(t, "1.1.0"), vendor)})
	id := must(t, o, consent(t, o.approval(t, ""), customer)).ID
	must(t, o, book.BeginDeploy{Approval: id})
	must(t, o, book.EndDeploy{Approval: id, State: fleet.StateDeployed})
}

// FAULTS.md G6, A8: the vendor's view comes again with observe, once, and the same from a snapshot of the book.
func TestTheDeploymentIsToldWhenObserveIsOnAgain(t *testing.T) {
	o := deployed(t)
	observeOff(t, o)
	another(t, o)
	n := len(o.book.View().Reports)
	b, err := json.Marshal(o.book.View())
	if err != nil {
		t.Fatal(err)
	}
	on := consent(t, granted(fleet.Observe, 0), customer)
	must(t, o, on)
	s := o.book.View()
	if got := edges(s, n); len(got) != 1 || got[0].Version != "1.1.0" || got[0].State != fleet.StateDeployed ||
		got[0].Release != s.Good.Release {
		t.Fatalf("told: %+v", got)
	}
	var kept book.State
	if err := json.Unmarshal(b, &kept); err != nil {
		t.Fatal(err)
	}
	if _, err := on.Apply(&kept, ledger.Meta{At: o.now()}); err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(edges(kept, n), edges(s, n)) {
		t.Errorf("from the snapshot: %+v", edges(kept, n))
	}
	must(t, o, book.Observe{Status: book.Status{Posture: fleet.Public}})
	observeOff(t, o)
	must(t, o, consent(t, granted(fleet.Observe, 0), customer))
	if got := edges(o.book.View(), n); len(got) != 1 {
		t.Errorf("told again, without a deploy: %+v", got)
	}
}

// FAULTS.md G6, A8: a grant of observe that begins later tells with the next observation, and not before.
func TestTheDeploymentIsToldWhenObserveBegins(t *testing.T) {
	o := deployed(t)
	observeOff(t, o)
	another(t, o)
	n := len(o.book.View().Reports)
	later := granted(fleet.Observe, 0)
	later.From = o.now().Add(time.Hour)
	must(t, o, consent(t, later, customer))
	s := o.book.View()
	look := book.Observe{Status: s.Status}
	for _, c := range []struct {
		after time.Duration
		want  int
	}{{time.Minute, 0}, {time.Hour + time.Minute, 1}, {2 * time.Hour, 1}} {
		if _, err := look.Apply(&s, ledger.Meta{At: o.now().Add(c.after)}); err != nil {
			t.Fatal(err)
		}
		if got := edges(s, n); len(got) != c.want {
			t.Errorf("after %s: told %+v, want %d", c.after, got, c.want)
		}
	}
}

// FAULTS.md G6, A8: where as many edges wait as may, the newest follows them, and it is one.
func TestTheDeploymentIsToldAfterTheEdgesThatWait(t *testing.T) {
	o := deployed(t)
	id := o.book.View().Good.ID
	for i := range 2 * book.MaxDeployEdges {
		must(t, o, book.EndDeploy{Approval: id, State: fleet.StateDegraded, Why: fleet.Reason{Kind: fleet.Exited, Number: int32(i)}})
	}
	observeOff(t, o)
	another(t, o)
	must(t, o, consent(t, granted(fleet.Observe, 0), customer))
	if got := edges(o.book.View(), 0); len(got) != book.MaxDeployEdges {
		t.Fatalf("%d edges wait", len(got))
	}
	observeOff(t, o)
	must(t, o, book.ReportsDone{Upto: o.book.View().ReportsSent()}) // what was held back is dropped
	if got := edges(o.book.View(), 0); len(got) != 0 {
		t.Fatalf("told while observing is off: %+v", got)
	}
	must(t, o, consent(t, granted(fleet.Observe, 0), customer))
	if got := edges(o.book.View(), 0); len(got) != 1 || got[0].Version != "1.1.0" {
		t.Errorf("told: %+v", got)
	}
}
