// SPDX-License-Identifier: Apache-2.0

package mesh

import (
	"go/build"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
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

// TestACoordinatorSendsNobodyElsewhere: of the library's requests over HTTP only those to coordinators pass, and those for the bare root
// of a host, which relays are asked for.
func TestACoordinatorSendsNobodyElsewhere(t *testing.T) {
	coordinators.Store("coordinator.test", true)
	defer coordinators.Delete("coordinator.test")
	proxy := only(func(*url.URL) (*url.URL, error) { return nil, nil })
	for at, want := range map[string]bool{
		"https://coordinator.test/machine/register":               true,
		"http://coordinator.test:8080/key?v=1":                    true,
		"https://relay.test/":                                     true,
		"https://log.tailscale.com/c/tailnode.log.tailscale.io/x": false,
		"https://derp1.tailscale.com/bootstrap-dns?q=x":           false,
		"http://169.254.169.254/latest/meta-data/":                false,
		"https://intranet.globex.test/delete":                     false,
		"https://coordinator.test.evil.test/x":                    false,
		"https://relay.test":                                      false, // the library writes the root as /
	} {
		u, err := url.Parse(at)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := proxy(u); (err == nil) != want {
			t.Errorf("%s: %v", at, err)
		}
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
