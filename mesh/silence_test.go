// SPDX-License-Identifier: Apache-2.0

package mesh

import (
	"errors"
	"go/build"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/demarc-dev/demarc/fault"
)

// environment lists what the library's node reads from the environment of the process, as its source says.
func environment(t *testing.T) (names []string) {
	t.Helper()
	p, err := build.Import("tailscale.com/tsnet", ".", 0)
	if err != nil {
		t.Fatal(err)
	}
	reads := regexp.MustCompile(`(?:os\.Getenv|os\.LookupEnv|envknob\.(?:Bool|String))\("(\w+)"\)`)
	for _, f := range p.GoFiles {
		b, err := os.ReadFile(filepath.Join(p.Dir, f))
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(b)) {
			if strings.HasPrefix(strings.TrimSpace(line), "//") {
				continue
			}
			for _, m := range reads.FindAllStringSubmatch(line, -1) {
				names = append(names, m[1])
			}
		}
	}
	slices.Sort(names)
	return slices.Compact(names)
}

// TestTheEnvironmentJoinsNobody: nothing that the library would read there for a node outlives the first look at the operator's
// file. It runs in a process of its own: the environment is written once.
func TestTheEnvironmentJoinsNobody(t *testing.T) {
	const child = "DEMARC_TEST_ENVIRONMENT"
	names := environment(t)
	if len(names) < 8 || !slices.Contains(names, "TS_AUTHKEY") {
		t.Fatalf("the library reads %q: the test no longer finds what", names)
	}
	if os.Getenv(child) == "" {
		c := exec.Command(os.Args[0], "-test.run=^"+t.Name()+"$", "-test.v")
		c.Env = append(os.Environ(), child+"=1")
		for _, n := range names {
			c.Env = append(c.Env, n+"=from-the-environment")
		}
		if out, err := c.CombinedOutput(); err != nil || !strings.Contains(string(out), "all gone") {
			t.Fatalf("%v: %s", err, out)
		}
		return
	}
	if err := quiet(""); err != nil {
		t.Fatal(err)
	}
	for _, n := range names {
		if v, is := os.LookupEnv(n); is {
			t.Errorf("%s is still %q", n, v)
		}
	}
	t.Log("all gone")
}

// TestACoordinatorSendsNobodyElsewhere: of the library's requests over HTTP only those that it needs pass, to the very place that the
// file names (FAULTS.md I11). What it asks for the proxy to a relay, without sending anything, passes too.
func TestACoordinatorSendsNobodyElsewhere(t *testing.T) {
	tell := func(at string) {
		u, err := url.Parse(at)
		if err != nil {
			t.Fatal(err)
		}
		for _, s := range spots(u) {
			coordinators.Store(s, true)
			t.Cleanup(func() { coordinators.Delete(s) })
		}
	}
	tell("https://coordinator.test")
	tell("http://local.test:8080")
	tell("https://other.test:9443")
	for at, want := range map[string]struct{ sent, asked bool }{
		"https://coordinator.test/key?v=131":                      {true, true},
		"https://Coordinator.Test:443/key?v=131":                  {true, true},
		"http://coordinator.test:80/ts2021":                       {true, true},
		"https://coordinator.test:443/ts2021":                     {true, true},
		"http://local.test:8080/key?v=1":                          {true, true},
		"https://local.test:443/ts2021":                           {true, true},
		"https://other.test:9443/ts2021":                          {true, true},
		"https://coordinator.test/":                               {true, true},
		"https://relay.test/":                                     {false, true},
		"https://coordinator.test/machine/register":               {},
		"https://coordinator.test/?action=delete":                 {},
		"https://coordinator.test/?":                              {},
		"https://coordinator.test/key?v=1&action=delete":          {},
		"https://coordinator.test/key?action=delete":              {},
		"https://u:p@coordinator.test/":                           {},
		"https://u:p@coordinator.test/key?v=1":                    {},
		"https://coordinator.test:22/":                            {false, true},
		"https://coordinator.test:8443/ts2021":                    {},
		"http://coordinator.test:8080/ts2021":                     {},
		"http://coordinator.test/":                                {},
		"http://local.test/key?v=1":                               {},
		"https://other.test/ts2021":                               {},
		"http://other.test:80/ts2021":                             {},
		"https://coordinator.test/%6bey?v=1":                      {},
		"https://coordinator.test/ts2021/../delete":               {},
		"https://coordinator.test/#x":                             {},
		"https://relay.test/?action=delete":                       {},
		"https://u:p@relay.test/":                                 {},
		"http://relay.test/":                                      {},
		"https://relay.test//":                                    {},
		"https://log.tailscale.com/c/tailnode.log.tailscale.io/x": {},
		"https://derp1.tailscale.com/bootstrap-dns?q=x":           {},
		"http://169.254.169.254/latest/meta-data/":                {},
		"http://169.254.169.254/":                                 {},
		"https://169.254.169.254/":                                {false, true},
		"https://intranet.globex.test/delete":                     {},
		"https://coordinator.test.evil.test/key?v=1":              {},
		"https://relay.test":                                      {}, // the library writes the root as /
	} {
		u, err := url.Parse(at)
		if err != nil {
			t.Fatal(err)
		}
		for _, sends := range []bool{true, false} {
			ok := want.asked
			if sends {
				ok = want.sent
			}
			if _, err := only(func(*url.URL) (*url.URL, error) { return nil, nil }, func() bool { return sends })(u); (err == nil) != ok {
				t.Errorf("%s, about to be sent %v: %v", at, sends, err)
			}
		}
	}
	for _, at := range []string{"https://169.254.169.254", "http://[fd00:ec2::254]", "http://[fe80::1]", "http://[::ffff:169.254.169.254]",
		"ftp://a.test", "https://u:p@a.test", "https://a.test?x", "a.test"} {
		if err := quiet(at); fault.Of(err) != fault.Invalid {
			t.Errorf("control_url %s: %v, want invalid", at, err)
		}
	}
}

// TestWhoAsksForAProxy: a request that is about to be sent is told from the question alone.
func TestWhoAsksForAProxy(t *testing.T) {
	var saw atomic.Bool
	proxy := func(*http.Request) (*url.URL, error) {
		saw.Store(sending())
		return nil, errStranger
	}
	r, err := http.NewRequest(http.MethodHead, "https://relay.test/", nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, _ = proxy(r); saw.Load() {
		t.Error("a question is taken for a request")
	}
	if _, err := (&http.Transport{Proxy: proxy}).RoundTrip(r); !errors.Is(err, errStranger) || !saw.Load() {
		t.Errorf("a request is not seen: %v", err)
	}
	saw.Store(false)
	c := &http.Client{Transport: &http.Transport{Proxy: proxy, ForceAttemptHTTP2: true}}
	if _, err := c.Do(r); !errors.Is(err, errStranger) || !saw.Load() {
		t.Errorf("a client's request is not seen: %v", err)
	}
}

// TestWhatTheLibraryLeavesOut: what of the library would send something of its own accord, or take orders from a coordinator, is not
// linked in. There is no setting for it.
func TestWhatTheLibraryLeavesOut(t *testing.T) {
	out, err := exec.Command("go", "list", "-deps", ".").Output()
	if err != nil {
		t.Fatal(err)
	}
	linked := strings.Fields(string(out))
	if !slices.Contains(linked, "tailscale.com/tsnet") {
		t.Fatalf("%d packages without the library's node: the test shows nothing", len(linked))
	}
	for path, why := range map[string]string{
		"captiveportal":   "it asks hosts of its own list whether a portal is in the way",
		"clientupdate":    "it asks for newer builds of the library's own program, and would install them at a coordinator's word",
		"debugportmapper": "it asks gateways",
		"doctor":          "it looks at the host at a coordinator's word",
		"posture":         "it tells the coordinator the host's serial numbers",
		"ssh":             "it serves shells",
		"taildrop":        "it takes files from peers",
		"tpm":             "it opens the host's TPM",
		"webclient":       "it serves a page of settings",
	} {
		if slices.Contains(linked, "tailscale.com/feature/"+path) {
			t.Errorf("feature/%s is linked in: %s", path, why)
		}
	}
}
