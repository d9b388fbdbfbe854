// SPDX-License-Identifier: Apache-2.0

package upgrade

import (
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/demarc-dev/demarc/audit"
	"github.com/demarc-dev/demarc/daemon/controlplane/book"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/fleettest/platform"
	"github.com/demarc-dev/demarc/fleettest/process"
)

func TestMain(m *testing.M) {
	platform.Command()
	os.Exit(m.Run())
}

// TestUpgrade rolls three nodes from the previous build to this one while clients make changes. Builds are mixed 1 to 2 and 2 to
// 1, with a leader of either; one follower goes back and forth. Appliances of both builds are served all the time. A kind of
// change that the new build alone knows is refused by name until all voters know it, and taken then. After that there is no way
// back: the previous build stops, by name, and serves nothing. No change is lost, none is made twice, and all logs are one.
func TestUpgrade(t *testing.T) {
	if os.Getenv("DEMARC_UPGRADE") == "" {
		t.Skip("builds and runs real processes: make test-upgrade")
	}
	b := programs(t)
	began := time.Now()
	w := begin(t, b)
	p, err := platform.Serve(w.path("tokens"))
	w.must(err)
	t.Cleanup(func() { _ = p.Close() })
	one, two, three := w.node[0], w.node[1], w.node[2]
	w.goesOn("three of the previous build")
	old, now := w.appliance(p, "eu-old", b.old), w.appliance(p, "eu-new", b.now) // each meets nodes of both builds on its way
	both := func(what string) { w.served(old); w.served(now); w.goesOn(what) }
	both("appliances of both builds at nodes of the previous one")

	w.lead(one)
	w.switchTo(three, b.now)
	both("one new follower, and the leader is old")
	w.refused(three, "cp-1", "cp-2") // it would forward to the old leader
	w.switchTo(three, b.old)
	w.goesOn("the follower is back at the previous build")
	w.switchTo(three, b.now)
	w.lead(three)
	both("one new node leads two old ones")
	w.refused(three, "cp-1", "cp-2")

	w.switchTo(two, b.now)
	both("two new nodes, one of which leads, and an old one")
	w.refused(two, "cp-1")
	w.lead(one)
	w.goesOn("an old node leads two new ones")
	w.refused(two, "cp-1")

	w.switchTo(one, b.now)
	w.must(process.Until(t.Context(), patience, "a change of the kind "+laterKind+" is taken once all voters know it", func() bool {
		_, err := w.demarc(b.now, one.api, "--timeout", "10s", "control-plane", "autopilot", "set")
		return err == nil
	}))
	both("three new nodes, and the new kind of change is in the log")

	w.noWayBack(two)
	for a, bin := range map[*process.Process]string{old: b.now, now: b.old} {
		w.must(a.End(syscall.SIGTERM, time.Minute))
		a.Argv[0] = filepath.Join(bin, "demarcd")
		w.must(a.Start())
	}
	both("the appliances have changed their builds")
	w.judge()
	t.Logf("%s, without the builds", time.Since(began).Round(time.Second))
}

// unknownKind is how a build that stops names the change that it does not know, in a line of its log.
var unknownKind = regexp.MustCompile(`does not know the change \\?"([a-z.]+/[0-9]+)\\?"`)

// refused makes a change that only new builds know, at one node, and sees it refused with the name of the change and of a node
// that does not know it.
func (w *world) refused(at *node, who ...string) {
	w.t.Helper()
	var out string
	var err error
	is := func() bool {
		out, err = w.demarc(w.b.now, at.api, "--timeout", "5s", "control-plane", "autopilot", "set")
		for _, name := range who {
			if strings.Contains(out, laterKind) && strings.Contains(out, name) && strings.Contains(out, "does not know") {
				return err != nil
			}
		}
		return err == nil
	}
	w.must(process.Until(w.t.Context(), patience, "the refusal names the change and a node", is)) // a new leader has not heard from all yet
	if err == nil {
		w.t.Fatalf("a change that %v do not know was taken: %s", who, out)
	}
	w.t.Logf("refused at %s: %s", at.Name, strings.TrimSpace(out))
}

// noWayBack starts a node with the previous build though the log holds what that does not know: it names it, stops, and shows
// nothing. With the new build it comes back.
func (w *world) noWayBack(n *node) {
	w.t.Helper()
	w.must(n.End(syscall.SIGTERM, time.Minute))
	n.Argv[0] = filepath.Join(w.b.old, "demarcd")
	before, err := os.Stat(n.Log)
	w.must(err)
	w.must(n.Start())
	n.Leave()
	w.must(process.Until(w.t.Context(), patience, n.Name+" with the previous build stops by itself", func() bool {
		select {
		case <-n.Ended():
			return true
		default:
			return false
		}
	}))
	b, err := os.ReadFile(n.Log)
	w.must(err)
	// The first change that it does not know may be one of its own that this build makes, and not the one that the test laid over.
	said := string(b[before.Size():])
	if kind := unknownKind.FindStringSubmatch(said); kind == nil || slices.Contains(book.FirstKinds(), kind[1]) {
		w.t.Fatalf("%s stopped with the previous build, and did not name a change that it does not know (%q): %s", n.Name, kind, said)
	}
	w.goesOn("one node is away")
	w.switchTo(n, w.b.now)
}

// judge compares what clients were told with the log of each node.
func (w *world) judge() {
	w.t.Helper()
	w.stop()
	w.calls.Wait()
	for _, f := range w.faults {
		w.t.Error(f)
	}
	args := []string{"verify"}
	var exports []export
	for _, n := range w.node {
		w.answers(n)
	}
	for _, n := range w.node {
		file := w.path("evidence-" + n.Name + ".json")
		_, err := w.demarc(w.b.now, n.api, "evidence", "export", "--out", file)
		w.must(err)
		args = append(args, file)
		text, err := os.ReadFile(file)
		w.must(err)
		bundle, err := audit.ParseBundle(text)
		w.must(err)
		exports = append(exports, export{n.Name, bundle.Logs[0].Entries})
		times := map[string]int{}
		for _, leaf := range bundle.Logs[0].Entries {
			e, err := audit.ParseEntry([]byte(leaf))
			w.must(err)
			if times[string(e.By)+" "+string(e.Request)]++; times[string(e.By)+" "+string(e.Request)] > 1 {
				w.t.Errorf("node %s: request %s of %s was applied twice", n.Name, e.Request, e.By)
			}
			times[string(e.Request)]++
		}
		for _, id := range w.acked {
			if times[id] != 1 {
				w.t.Errorf("node %s: %s was answered, and stands in the log %d times", n.Name, id, times[id])
			}
		}
	}
	w.must(oneHistory(exports))
	args = append(args, "--pin", audit.VendorOrigin(domain)+"="+w.path("acme", "log.pub"))
	for _, a := range []string{"eu-old", "eu-new"} {
		args = append(args, "--pin", audit.CustomerOrigin(domain, fleet.ApplianceID(a))+"="+w.path(a, "data", "log.pub"))
	}
	_, err := w.demarc(w.b.now, "", args...) // the same by what was signed, and the customers' logs
	w.must(err)
	if len(w.acked) < 200 {
		w.t.Errorf("nothing is shown: %d changes were answered", len(w.acked))
	}
	w.t.Logf("%d changes were answered; the exports have %d, %d and %d entries", len(w.acked), len(exports[0].leaves), len(exports[1].leaves),
		len(exports[2].leaves))
}
