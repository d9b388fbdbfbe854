// SPDX-License-Identifier: Apache-2.0

package fleettest_test

import (
	"bytes"
	"os"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/demarc-dev/demarc/fleettest"
)

type rung struct {
	name            string
	away, back      time.Duration
	running, rolled bool
	proofs          int
	entries         int64
}

// rungs reads the table of docs/offline.md.
func rungs(t *testing.T) []rung {
	t.Helper()
	b, err := os.ReadFile("../docs/offline.md")
	if err != nil {
		t.Fatal(err)
	}
	var out []rung
	for line := range strings.SplitSeq(string(b), "\n") {
		cells := strings.Split(strings.Trim(line, "| "), " | ")
		if len(cells) != 7 || !strings.HasPrefix(line, "| ") || cells[0] == "Away for" {
			continue
		}
		var r rung
		var errs [4]error
		r.name = cells[0] + " " + cells[1] + " " + cells[2]
		r.away, errs[0] = time.ParseDuration(cells[0])
		r.running, r.rolled = cells[1] == "running", cells[2] == "rolled"
		r.back, errs[1] = time.ParseDuration(cells[3])
		r.proofs, errs[2] = strconv.Atoi(cells[4])
		r.entries, errs[3] = strconv.ParseInt(cells[6], 10, 64)
		for _, err := range errs {
			if err != nil {
				t.Fatalf("docs/offline.md: %q: %v", line, err)
			}
		}
		if cells[5] != "yes" {
			t.Fatalf("docs/offline.md: %q: an appliance that comes back as another is not what was promised", line)
		}
		out = append(out, r)
	}
	if len(out) != 10 {
		t.Fatalf("docs/offline.md has %d rows, want 10", len(out))
	}
	return out
}

func TestOfflineLadder(t *testing.T) {
	for _, r := range rungs(t) {
		t.Run(r.name, func(t *testing.T) {
			if r.running && !r.rolled && r.away >= 90*24*time.Hour && !fleettest.Long() {
				t.Skip("make test-long: the same with a CA that was rolled is the harder one")
			}
			synctest.Test(t, func(t *testing.T) { r.play(t) })
		})
	}
}

func (r rung) play(t *testing.T) {
	f := fleettest.New(t)
	a := f.AddAppliance("eu-1")
	a.Start()
	a.WaitUp(time.Minute)
	before, proofs := f.Of("eu-1"), a.Proofs()
	if r.running {
		a.Cut()
	} else {
		a.Stop()
	}
	f.Wait("the vendor sees that it left", time.Minute, func() bool { return !f.Of("eu-1").Online })
	size := f.Size()
	if r.rolled {
		time.Sleep(10 * 24 * time.Hour)
		roll(t, f, 25*24*time.Hour)
	}
	time.Sleep(time.Until(before.CurrentTill.Add(r.away - fleettest.LeafLife)))
	if r.running {
		a.Heal()
	} else {
		a.Start()
	}
	took := a.WaitUp(r.back)
	after := f.Of("eu-1")
	t.Logf("back after %s, %d proofs, %d entries", took, a.Proofs()-proofs, f.Size()-size)
	if got := a.Proofs() - proofs; got != r.proofs {
		t.Errorf("%d proofs of the platform identity, the table says %d", got, r.proofs)
	}
	if got := f.Size() - size; got > r.entries {
		t.Errorf("the vendor's log grew by %d, the table says at most %d", got, r.entries)
	}
	if after.Name != before.Name || !bytes.Equal(after.LogKey, before.LogKey) || !after.Since.Equal(before.Since) ||
		after.ReportsDone < before.ReportsDone {
		t.Errorf("it came back as another: %+v, was %+v", after, before)
	}
	if r.proofs > 0 == (after.Current == before.Current) {
		t.Errorf("certificate %s, was %s", after.Current, before.Current)
	}
	if r.rolled && string(after.CurrentIssuer) != f.IssuerCA() {
		t.Error("its certificate is not of the CA that issues now")
	}
	// And it goes on: when its next renewal is due, it renews by itself, without a proof of the platform (MUTANTS.md).
	proofs = a.Proofs()
	a.Stop()
	time.Sleep(time.Until(after.CurrentTill.Add(-fleettest.LeafLife / 4)))
	a.Start()
	f.Wait("it renewed by itself what it came back with", time.Hour, func() bool { return f.Of("eu-1").Current != after.Current && a.Up() })
	if got := a.Proofs() - proofs; got != 0 {
		t.Errorf("%d proofs of the platform identity for a certificate that had a quarter of its life left", got)
	}
}

// roll prepares and activates another CA and retires the old one; in between it waits until that one may be retired.
func roll(t *testing.T, f *fleettest.Fleet, rest time.Duration) {
	t.Helper()
	old := f.IssuerCA()
	id := f.PrepareCA()
	f.Wait("the new CA is active", 10*time.Minute, func() bool { return f.ActivateCA(id) == nil })
	time.Sleep(rest)
	f.Wait("the old CA is retired", time.Hour, func() bool { return f.RetireCA(old, false) == nil })
}
