// SPDX-License-Identifier: Apache-2.0

package mesh_test

import (
	"context"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"strings"
	"sync"
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
	a := join(t, tn,
		mesh.TailnetConfig{Hostname: "a", Addresses: []string{to}, Tags: []string{mesh.CustomerTag("globex")}, Wait: 30 * time.Second})
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
	for end := time.Now().Add(90 * time.Second); reach(t, a, to, time.Second) == nil; time.Sleep(300 * time.Millisecond) {
		// few connections: see endWait
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

// TestACoordinatorHasNothingSent: of all that a coordinator can have a node send over HTTP, nothing reaches a host of the customer's; the
// bare HEAD on its own root reaches the coordinator, which shows that the nodes were asked (FAULTS.md I11).
func TestACoordinatorHasNothingSent(t *testing.T) {
	tn, err := meshtest.Start("key-for-tests")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = tn.Close() })
	b := join(t, tn, mesh.TailnetConfig{Hostname: "b", Doors: true})
	join(t, tn, mesh.TailnetConfig{Hostname: "a", Addresses: []string{"vendor:443"}})
	own := make(chan string, 64)
	tn.Watch(func(r *http.Request) {
		if r.URL.Path == "/" || r.URL.Path == "/away" || r.URL.Path == "/delete" {
			own <- r.Method + " " + r.URL.String() + " " + r.Header.Get("Authorization")
		}
	})
	var mu sync.Mutex
	var got []string
	h := http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		got = append(got, r.Method+" "+r.URL.String()+" "+r.Header.Get("Authorization"))
	})
	plain, secure := httptest.NewServer(h), httptest.NewTLSServer(h)
	defer plain.Close()
	defer secure.Close()
	coordinator, err := url.Parse(tn.URL)
	if err != nil {
		t.Fatal(err)
	}
	ping := func(at, types string) int64 {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		return tn.Ping(ctx, at, types, b.Addrs()[0])
	}
	for _, at := range []string{plain.URL + "/", plain.URL + "/?action=delete", plain.URL + "/delete", plain.URL, secure.URL + "/",
		secure.URL + "/?action=delete",
		strings.Replace(plain.URL, "http://", "http://u:p@", 1) + "/", strings.Replace(plain.URL, "127.0.0.1", "localhost", 1) + "/",
		tn.URL + "/?action=delete", tn.URL + "/delete", strings.Replace(tn.URL, "http://", "http://u:p@", 1) + "/",
		"http://169.254.169.254/latest/meta-data/", "http://169.254.169.254/",
		"http://" + coordinator.Hostname() + ":1/"} {
		for _, types := range []string{"", "disco", "TSMP"} {
			if types != "" && at != plain.URL+"/" {
				continue
			}
			if ping(at, types) == 0 {
				t.Errorf("%s %s: no node was asked: the test shows nothing", at, types)
			}
		}
	}
	select {
	case r := <-own:
		t.Errorf("the coordinator itself was sent %s", r)
	default:
	}
	mu.Lock()
	if len(got) != 0 {
		t.Errorf("hosts that no file names were sent %q", got)
	}
	mu.Unlock()
	for end := time.Now().Add(30 * time.Second); ; {
		ping(tn.URL+"/", "")
		select {
		case r := <-own:
			if r != "HEAD / " {
				t.Errorf("the coordinator was sent %q", r)
			}
			return
		default:
		}
		if time.Now().After(end) {
			t.Fatal("no node sent the bare HEAD to its coordinator: the test shows nothing")
		}
	}
}

// TestWhatACoordinatorCanHaveSentByNoise holds what docs/tailnet.md says is left of FAULTS.md I11: asked by the protocol of the two, the
// library sends HEAD, or POST of how a ping went, in HTTP/2 without TLS to any http:// address. If this fails since nothing arrives, the
// library has mended it: take it out of the page.
func TestWhatACoordinatorCanHaveSentByNoise(t *testing.T) {
	tn, err := meshtest.Start("key-for-tests")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = tn.Close() })
	b := join(t, tn, mesh.TailnetConfig{Hostname: "b", Doors: true})
	got := make(chan string, 64)
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			first := make([]byte, 14)
			_ = c.SetReadDeadline(time.Now().Add(5 * time.Second))
			_, _ = io.ReadFull(c, first)
			_ = c.Close()
			got <- string(first)
		}
	}()
	for end := time.Now().Add(30 * time.Second); ; {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		tn.PingByNoise(ctx, "http://"+l.Addr().String()+"/", "", b.Addrs()[0])
		cancel()
		select {
		case first := <-got:
			if first != "PRI * HTTP/2.0" {
				t.Errorf("it was sent %q", first)
			}
			return
		default:
		}
		if time.Now().After(end) {
			t.Fatal("nothing arrives: docs/tailnet.md can promise more")
		}
	}
}

// TestACoordinatorNamesNoAddresses: a node asks for its coordinator where its file says, and not where the coordinator says.
func TestACoordinatorNamesNoAddresses(t *testing.T) {
	tn, err := meshtest.Start("key-for-tests")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = tn.Close() })
	u, err := url.Parse(tn.URL)
	if err != nil {
		t.Fatal(err)
	}
	elsewhere, err := net.Listen("tcp4", net.JoinHostPort("127.0.0.9", u.Port()))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = elsewhere.Close() }()
	asked := make(chan struct{}, 64)
	go func() {
		for {
			c, err := elsewhere.Accept()
			if err != nil {
				return
			}
			asked <- struct{}{}
			_ = c.Close()
		}
	}()
	tn.Plan(netip.MustParseAddr("127.0.0.9"))
	join(t, tn, mesh.TailnetConfig{Hostname: "a", Addresses: []string{"vendor:443"}})
	streams := tn.Streams()
	if err := tn.StopCoordinator(); err != nil {
		t.Fatal(err)
	}
	if err := tn.StartCoordinator(); err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(90 * time.Second); tn.Streams() == streams; time.Sleep(50 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("the node does not come back to its coordinator: the test shows nothing")
		}
	}
	select {
	case <-asked:
		t.Error("the node asked at an address that the coordinator named")
	default:
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
