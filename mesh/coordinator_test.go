// SPDX-License-Identifier: Apache-2.0

package mesh_test

import (
	"context"
	"net"
	"testing"
	"time"

	"github.com/demarc-dev/demarc/mesh"
	"github.com/demarc-dev/demarc/mesh/meshtest"
)

// TestCoordinatorComesBack: the coordinator goes, with every connection to it, and comes back at its URL. What was connected lives on,
// new connections to known peers are made meanwhile, and a policy that was changed meanwhile holds once it is back.
func TestCoordinatorComesBack(t *testing.T) {
	strict := policy(t, "globex", "initech")
	tn, err := meshtest.StartWith("key-for-tests", meshtest.Open(strict))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = tn.Close() })
	b := join(t, tn, mesh.TailnetConfig{Hostname: "b", Doors: true, Tags: []string{mesh.CustomerTag("initech")}})
	hold(t, b, ":8443")
	to := net.JoinHostPort(b.Addrs()[0].String(), "8443")
	a := join(t, tn, mesh.TailnetConfig{Hostname: "a", Addresses: []string{to}, Tags: []string{mesh.CustomerTag("globex")}, Wait: 30 * time.Second})
	c, err := a.Dial(t.Context(), to)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	if err := roundTrip(c); err != nil {
		t.Fatal(err)
	}
	if err := tn.StopCoordinator(); err != nil {
		t.Fatal(err)
	}
	streams := tn.Streams()
	tn.SetPolicy(strict)
	for range 20 {
		if err := roundTrip(c); err != nil {
			t.Fatalf("without the coordinator: %v", err)
		}
	}
	if err := reach(t, a, to, 10*time.Second); err != nil {
		t.Errorf("a new connection without the coordinator: %v", err)
	}
	if tn.Streams() != streams {
		t.Error("a node reached the coordinator that is away: the test shows nothing")
	}
	if err := tn.StartCoordinator(); err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(90 * time.Second); reach(t, a, to, time.Second) == nil; time.Sleep(300 * time.Millisecond) { // few connections: see endWait
		if time.Now().After(end) {
			t.Fatal("90 s after the coordinator came back, b still accepts what the new policy forbids")
		}
	}
	if tn.Streams() == streams {
		t.Error("no node asked the coordinator that came back")
	}
	tn.SetPolicy(meshtest.Open(strict))
	if err := reach(t, a, to, 30*time.Second); err != nil {
		t.Errorf("under the old policy again: %v", err)
	}
}

// TestACoordinatorLearnsNothingOfTheProcess: what the library would tell a coordinator that asks, stack traces for instance, is not in
// this build.
func TestACoordinatorLearnsNothingOfTheProcess(t *testing.T) {
	tn, err := meshtest.Start("key-for-tests")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = tn.Close() })
	join(t, tn, mesh.TailnetConfig{Hostname: "a", Addresses: []string{"vendor:443"}})
	for _, path := range []string{"/echo", "/debug/goroutines", "/debug/pprof/heap", "/debug/prefs", "/debug/metrics"} {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		asked, answered := tn.Ask(ctx, path)
		cancel()
		if asked == 0 || answered != 0 {
			t.Errorf("%s: asked %d times, answered %d times", path, asked, answered)
		}
	}
}
